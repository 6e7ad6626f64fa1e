"""Checks that refuse a damaged or malicious configuration or tokenizer, before a model is built from the files.

`CapivaraConfig` and the picture search `capivara_search` apply the same checks. The search works without torch and
transformers, so this module imports neither.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Each tuple lists the names of one kind of setting, such as the number of layers. The names differ between the
# configurations of transformers, timm and open_clip.
LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "layers", "depth", "depths")
HEAD_KEYS = ("num_attention_heads", "n_heads", "n_head", "num_heads", "heads", "encoder_attention_heads")
WIDTH_KEYS = ("hidden_size", "hidden_sizes", "intermediate_size", "hidden_dim", "dim", "d_model", "d_ff", "embed_dim")
EPSILON_KEYS = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rms_norm_eps")
DROPOUT_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "hidden_dropout", "dropout",
            "classifier_dropout", "dropout_rate", "drop_path_rate")  # fmt: skip
# Smallest and largest accepted value of each setting. The largest values are far above those of all published models. A
# file with a larger value is damaged or malicious: building its model would take hours or all memory.
SIZE_LIMITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(LAYER_KEYS, (0, 1000)),
    **dict.fromkeys(HEAD_KEYS, (1, 1000)),
    **dict.fromkeys((*WIDTH_KEYS, "head_width"), (1, 100_000)),
    "projection_dim": (0, 100_000),  # in some variants of BERT, 0 means that there is no projection
    "vocab_size": (1, 10**7),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "type_vocab_size"), (0, 10**6)),
    **dict.fromkeys(("image_size", "img_size", "patch_size", "num_channels"), (1, 10_000)),
    **dict.fromkeys(("height", "width", "shortest_edge", "longest_edge"), (1, 10_000)),  # settings of image processors
    **dict.fromkeys(("num_labels", "num_classes"), (0, 10**6)),
    "pad_token_id": (0, 10**7 - 1),
    **dict.fromkeys((*EPSILON_KEYS, *DROPOUT_KEYS), (0, 1)),
    # The natural logarithm of the factor that multiplies the cosine similarities. Published models are far from the
    # limits: they have 4.8 (SigLIP after training) or at most 4.6 (CLIP).
    **dict.fromkeys(("logit_scale", "logit_scale_init_value", "init_logit_scale"), (-20, 20)),
}
# Model types of text towers that need a padding token, because they number the positions of tokens from
# `pad_token_id` + 1.
PADDING_MODEL_TYPES = ("xlm-roberta", "xlm-roberta-xl", "roberta", "camembert", "altclip_text_model")
NOT_FINITE_MESSAGE = (
    "The embeddings are not finite: weights or settings of the model are damaged. Download or save the model again."
)
# Dictionaries that map class names to numbers or back. Their entries are not checked as settings, because a class may
# have the name of a setting, such as "width".
LABEL_KEYS = ("id2label", "label2id")


def check_config_ranges(values: Mapping[str, Any], section: str = "") -> None:
    """Check that the sizes in a configuration are within `SIZE_LIMITS`, and that its padding token is valid.

    Args:
        values: The configuration as a dictionary from setting names to values. Nested dictionaries are checked too.
        section: Prefix of the setting names in error messages, such as "text_config.".

    Raises:
        ValueError: If a value is outside its limits, the padding token is not in the vocabulary, or a required tower or
            padding token is null.
    """
    pad, vocab_size = values.get("pad_token_id", 0), values.get("vocab_size")
    if pad is None and values.get("model_type") in PADDING_MODEL_TYPES:
        raise ValueError(f"{section}pad_token_id must be the id of a token, got null.")
    if isinstance(pad, int) and isinstance(vocab_size, int) and pad >= vocab_size > 0:
        raise ValueError(f"{section}pad_token_id must be below the vocab_size of {vocab_size}, got {pad}.")
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in LABEL_KEYS:
            check_config_ranges(value, f"{section}{key}.")
        if key in ("vision_config", "text_config") and value is None:
            raise ValueError(f"{section}{key} must be the settings of a tower, got null.")
        if key not in SIZE_LIMITS:
            continue
        smallest, largest = SIZE_LIMITS[key]
        for number in value if isinstance(value, list | tuple) else [value]:
            # `not a <= number <= b` also refuses NaN, because every comparison with NaN is false. Booleans are refused
            # explicitly, because Python counts True as the int 1.
            if isinstance(number, bool) or (isinstance(number, int | float) and not smallest <= number <= largest):
                raise ValueError(f"{section}{key} must be from {smallest} to {largest}, got {str(value)[:80]}.")


@contextmanager
def wrap_tokenizer_errors(name: str) -> Iterator[None]:
    """Return a context manager that turns errors of the tokenizers library into a ValueError with a one-line message.

    Args:
        name: Subject of the error message, such as "The tokenizer of MODEL".

    Raises:
        ValueError: If the `with` block raises an error of the tokenizers library. Other errors pass unchanged.
    """
    try:
        yield
    # For a damaged tokenizer file, the library raises a plain `Exception` or a Rust panic.
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{name} can't be used: {' '.join(str(error).split())[:500]}") from error

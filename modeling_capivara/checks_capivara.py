"""What is asked of a model's files before anything is built of them: they may be somebody else's.

Neither torch nor transformers is imported, so that the search checks a model as `CapivaraConfig` does.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Sizes by the names that transformers, timm and open_clip have for them -> the least and the most. No published model
# comes near the most: a file that asks for more is damaged or means harm, and would take hours, or all memory.
LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "layers", "depth", "depths")
HEAD_KEYS = ("num_attention_heads", "n_heads", "n_head", "num_heads", "heads", "encoder_attention_heads")
WIDTH_KEYS = ("hidden_size", "hidden_sizes", "intermediate_size", "hidden_dim", "dim", "d_model", "d_ff", "embed_dim")
EPSILON_KEYS = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rms_norm_eps")
DROPOUT_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "hidden_dropout", "dropout",
            "classifier_dropout", "dropout_rate", "drop_path_rate")  # fmt: skip
SIZE_LIMITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(LAYER_KEYS, (0, 1000)),
    **dict.fromkeys(HEAD_KEYS, (1, 1000)),
    **dict.fromkeys((*WIDTH_KEYS, "head_width"), (1, 100_000)),
    "projection_dim": (0, 100_000),  # 0 of BERT's kin: no projection
    "vocab_size": (1, 10**7),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "type_vocab_size"), (0, 10**6)),
    **dict.fromkeys(("image_size", "img_size", "patch_size", "num_channels"), (1, 10_000)),
    **dict.fromkeys(("height", "width", "shortest_edge", "longest_edge"), (1, 10_000)),  # of an image processor
    **dict.fromkeys(("num_labels", "num_classes"), (0, 10**6)),
    "pad_token_id": (0, 10**7 - 1),
    **dict.fromkeys(EPSILON_KEYS, (0, 1)),
    **dict.fromkeys(DROPOUT_KEYS, (0, 1)),
    # Natural logarithms: SigLIP's scale is 4.8 after its training, CLIP's at most 4.6.
    **dict.fromkeys(("logit_scale", "logit_scale_init_value", "init_logit_scale"), (-20, 20)),
}
# Text encoders that count positions from the number of the padding token, and can't be without one.
PADDING_MODEL_TYPES = ("xlm-roberta", "xlm-roberta-xl", "roberta", "camembert", "altclip_text_model")
NOT_FINITE_MESSAGE = (
    "The embeddings are not finite: weights or settings of the model are damaged. Fetch or save it again."
)
LABEL_KEYS = ("id2label", "label2id")  # whose keys are anybody's words


def check_sizes(values: Mapping[str, Any], section: str = "") -> None:
    """Check the numbers of a configuration against `LIMITS`, and its padding token against its vocabulary.

    Raises:
        ValueError: If a value is outside of its limits, or a tower or a padding token that is needed is null. The
            message names the value with its section, such as "text_config.vocab_size".
    """
    pad, rows = values.get("pad_token_id", 0), values.get("vocab_size")
    if pad is None and values.get("model_type") in PADDING_MODEL_TYPES:
        raise ValueError(f"{section}pad_token_id must be the number of a token, got null.")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows > 0:
        raise ValueError(f"{section}pad_token_id must be below the vocab_size of {rows}, got {pad}.")
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in LABEL_KEYS:
            check_sizes(value, f"{section}{key}.")
        if key in ("vision_config", "text_config") and value is None:
            raise ValueError(f"{section}{key} must be the settings of a tower, got null.")
        if key not in SIZE_LIMITS:
            continue
        least, most = SIZE_LIMITS[key]
        for number in value if isinstance(value, list | tuple) else [value]:
            # NaN fails every comparison; True is an int to Python, and to no file.
            if isinstance(number, bool) or (isinstance(number, int | float) and not least <= number <= most):
                raise ValueError(f"{section}{key} must be from {least} to {most}, got {str(value)[:80]}.")


@contextmanager
def wrap_tokenizer_errors(name: str) -> Iterator[None]:
    """Raise ValueError, in one line, for what the tokenizers library raises: `Exception` itself, and panics of Rust."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{name} can't be used: {' '.join(str(error).split())[:500]}") from error

"""Configuration class of CAPIVARA models, with validation of its values."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .checks_capivara import SIZE_LIMITS, check_config_ranges

# The image tower of open_clip's `xlm-roberta-base-ViT-B-32` uses exact GELU. The default of CLIPVisionConfig,
# QuickGELU, would give other embeddings.
VISION_DEFAULTS = {"model_type": "clip_vision_model", "hidden_act": "gelu"}

# Values of XLM-RoBERTa base. They are necessary because the defaults of XLMRobertaConfig are the values of BERT.
TEXT_DEFAULTS = {
    "model_type": "xlm-roberta",
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}

# Keys of `trimmed_vocabulary` and the types of their values. "languages" and "words" are arguments of
# `trim_vocabulary.trim`. "tokenizer" and "table" are hashes of the original vocabulary and of the original embedding
# table, which had "of" rows.
TRIM_RECORD_TYPES = {"languages": list, "words": list, "tokenizer": str, "table": str, "of": int}


@strict
class CapivaraConfig(PreTrainedConfig):
    """Configuration of `CapivaraModel` and `CapivaraForImageClassification`.

    The defaults describe open_clip's `xlm-roberta-base-ViT-B-32` (366,121,473 parameters), the base model of CAPIVARA
    (arXiv 2310.13683).

    Args:
        vision_config: Image tower: configuration or dictionary of any transformers vision model whose output has a
            `pooler_output`. Default: ViT-B/32. A dictionary without `model_type`, or with "clip_vision_model", is
            completed with the values of ViT-B/32. Other model types keep their own defaults.
        text_config: Text tower: configuration or dictionary of any encoder-only transformers model. Default:
            XLM-RoBERTa base. A dictionary without `model_type`, or with "xlm-roberta", is completed with the values of
            XLM-RoBERTa base.
        projection_dim: Width of the embeddings of images and texts.
        text_projection_type: "mlp" (two linear layers with a GELU between them, as in the published model) or "linear"
            (a single linear layer). No layer has a bias.
        logit_scale_init_value: Initial value of `logit_scale`, the natural logarithm of the factor that multiplies the
            cosine similarities. The default corresponds to a temperature of 0.07.
        logit_bias_init_value: Initial bias of SigLIP's sigmoid loss, such as -10 (arXiv 2303.15343, section 3.1). None
            selects CLIP's loss, which has no bias.
        matryoshka_dims: Widths for which truncated embeddings were trained (Matryoshka representation learning, arXiv
            2205.13147). Each width must divide `projection_dim`. The widths are stored in descending order.
        trimmed_vocabulary: Record that `modeling_capivara.trim_vocabulary` writes when it removes tokens. Default: no
            token was removed.

    Raises:
        ValueError: If a value is invalid, such as a size outside the limits in `checks_capivara.py` or an unsupported
            model type.

    Example:
        >>> from modeling_capivara import CapivaraConfig, CapivaraModel
        >>> CapivaraConfig().projection_dim  # the published base model
        512
        >>> config = CapivaraConfig(
        ...     vision_config={"model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2},
        ...     text_config={"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000},
        ...     projection_dim=32,
        ... )
        >>> config.text_config.model_type, config.text_config.max_position_embeddings
        ('xlm-roberta', 514)
        >>> CapivaraModel(config).visual_projection.weight.shape
        torch.Size([32, 64])
    """

    model_type = "capivara"
    # During evaluation, transformers' `Trainer` collects all outputs except these two, which are large and would fill
    # the memory.
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output"]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, "clip_vision_model", VISION_DEFAULTS),
        "text_config": SubConfigSpec(AutoConfig, "xlm-roberta", TEXT_DEFAULTS),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    text_projection_type: Literal["mlp", "linear"] = "mlp"
    # Natural logarithm of 1 / temperature, the factor that multiplies the cosine similarities. CLIP starts with the
    # temperature 0.07 (arXiv 2103.00020, section 2.5).
    logit_scale_init_value: float = math.log(1 / 0.07)
    logit_bias_init_value: float | None = None
    matryoshka_dims: list[int] | None = None
    trimmed_vocabulary: dict | None = None

    def __post_init__(self, **kwargs):
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be at least 1, got {self.projection_dim}.")
        self.matryoshka_dims = check_and_sort_matryoshka_dims(self.matryoshka_dims or (), self.projection_dim) or None
        record = self.trimmed_vocabulary
        if record is not None and not all(isinstance(record.get(key), kind) for key, kind in TRIM_RECORD_TYPES.items()):
            raise ValueError(f"trimmed_vocabulary must have the keys {', '.join(TRIM_RECORD_TYPES)}, got {record}.")
        fields = {"projection_dim": self.projection_dim, "logit_scale_init_value": self.logit_scale_init_value}
        check_config_ranges(kwargs | fields)
        self.vision_config = _build_tower_config("vision_config", self.vision_config, VISION_DEFAULTS)
        self.text_config = _build_tower_config("text_config", self.text_config, TEXT_DEFAULTS)
        if self.text_config.is_encoder_decoder:
            problem = f"the encoder-decoder {self.text_config.model_type!r}"
            raise ValueError(f"text_config must be of an encoder-only model such as 'xlm-roberta', got {problem}.")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """Convert the configuration to a dictionary that can be saved as JSON.

        The key `logit_bias_init_value` is omitted if its value is None. The dictionary of a configuration that was
        saved before this key existed then stays the same, and so does the digest of the dictionary.
        """
        omitted = {"logit_bias_init_value"} if self.logit_bias_init_value is None else set()
        return {key: value for key, value in super().to_dict().items() if key not in omitted}


def check_and_sort_matryoshka_dims(dims: Sequence[int], projection_dim: int) -> list[int]:
    """Validate Matryoshka widths, remove duplicates and sort them in descending order.

    Embeddings that are truncated to a Matryoshka width (arXiv 2205.13147) are trained to be useful.

    Args:
        dims: Matryoshka widths.
        projection_dim: Width of a full embedding.

    Returns:
        The distinct widths, in descending order.

    Raises:
        ValueError: If a width does not divide `projection_dim`.
    """
    invalid_dims = [width for width in dims if not 0 < width <= projection_dim or projection_dim % width]
    if invalid_dims:
        divisors = ", ".join([str(n) for n in range(projection_dim, 0, -1) if not projection_dim % n][:12])
        rule = f"matryoshka_dims must divide the embedding's width, {projection_dim}"
        raise ValueError(f"{rule}, got {invalid_dims[0]}. Choose from {divisors}.")
    return sorted(set(dims), reverse=True)


def _build_tower_config(name: str, config: dict | PreTrainedConfig | None, defaults: dict) -> PreTrainedConfig:
    """Validate the configuration of one tower and return it as an object.

    Args:
        name: Field of `CapivaraConfig` for error messages: "vision_config" or "text_config".
        config: Configuration object, dictionary of its values, or None for the default tower.
        defaults: Values of the default tower with its `model_type`. They complete a dictionary that has the same
            `model_type` or none.

    Returns:
        The configuration object of the tower.

    Raises:
        ValueError: If a size is outside `SIZE_LIMITS`, or transformers does not know the model type.
    """
    if isinstance(config, PreTrainedConfig):
        check_config_ranges(collect_config_values_to_check(config), f"{name}.")
        return config
    config = dict(config or {})
    # This check must run before `from_dict`, which creates a name for each of `num_labels` labels. A huge number would
    # fill the memory.
    check_config_ranges(config, f"{name}.")
    model_type = config.setdefault("model_type", defaults["model_type"])
    if model_type not in CONFIG_MAPPING:
        problem = f"{name}.model_type {model_type!r} is not known to this version of transformers"
        raise ValueError(f"{problem}. Use a known type, such as {defaults['model_type']!r}, or upgrade transformers.")
    if model_type == defaults["model_type"]:
        config = {**defaults, **config}
    if model_type == "timm_wrapper":
        # `from_dict` requires the number of classes of a timm model. It is 0, because an image tower has no classifier.
        config.setdefault("num_classes", 0)
    # The constructor is not used, because only `from_dict` restores the labels of a TimmWrapperConfig.
    return _build_tower_config(name, CONFIG_MAPPING[model_type].from_dict(config), defaults)


def collect_config_values_to_check(config: PreTrainedConfig) -> dict[str, Any]:
    """Collect the settings of a configuration that `check_config_ranges` validates, such as sizes.

    Args:
        config: Configuration of any transformers model.

    Returns:
        A dictionary {setting name: value}. Missing settings are None. A nested configuration, such as `text_config`, is
        a nested dictionary.
    """
    values = {key: getattr(config, key, None) for key in (*SIZE_LIMITS, "model_args", "model_type")}
    for name in config.sub_configs:
        nested = getattr(config, name, None)
        if isinstance(nested, PreTrainedConfig):
            values[name] = collect_config_values_to_check(nested)
    return values

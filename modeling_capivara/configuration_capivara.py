"""CAPIVARA configuration: two towers, the size of the space they share, the temperature."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .checks_capivara import SIZE_LIMITS, check_sizes

# CLIP ViT-B/32 as open_clip's `xlm-roberta-base-ViT-B-32` has it: exact GELU, not CLIPVisionConfig's QuickGELU.
VISION_DEFAULTS = {"model_type": "clip_vision_model", "hidden_act": "gelu"}

# XLM-RoBERTa base; XLMRobertaConfig's own defaults are those of BERT.
TEXT_DEFAULTS = {
    "model_type": "xlm-roberta",
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}

# What `trimmed_vocabulary` holds: digests of the whole tokenizer and table, and the rows of the latter (`of`).
TRIM_RECORD_TYPES = {"languages": list, "words": list, "tokenizer": str, "table": str, "of": int}


@strict
class CapivaraConfig(PreTrainedConfig):
    """Architecture of a CAPIVARA model; the defaults are the published base (366,121,473 parameters).

    Source: CAPIVARA (arXiv 2310.13683), base model OpenCLIP `xlm-roberta-base-ViT-B-32`.

    Args:
        vision_config: image tower, any transformers vision model whose output has a `pooler_output`. Keys left out of
            a dictionary of the default `model_type` keep the base's value.
        text_config: text encoder, any encoder-only transformers model; the same rules hold.
        projection_dim: width of the space that images and texts share, at least 1.
        text_projection_type: "mlp" is width -> (width + projection_dim) // 2 -> GELU -> projection_dim, as published;
            "linear" is one matrix. Neither has a bias.
        logit_scale_init_value: natural logarithm of the scale that multiplies the cosines.
        logit_bias_init_value: what is added to the scaled cosines, where the loss is SigLIP's (arXiv 2303.15343,
            section 3.1, starts at -10); None where it is CLIP's.
        matryoshka_dims: widths at which the first numbers of an embedding were trained to be embeddings of their own
            (arXiv 2205.13147), in falling order. Any width can be cut; these keep more of the recall.
        trimmed_vocabulary: how `modeling_capivara.trim_vocabulary` chose the word pieces, and of which vocabulary; None
            where it is whole.

    Raises:
        ValueError: a size or the scale is outside of `LIMITS`, a tower's kind is unknown, the text tower is an
            encoder-decoder, a width of `matryoshka_dims` does not divide `projection_dim`, or `trimmed_vocabulary`
            lacks one of `TRIM_FACTS`.
    """

    model_type = "capivara"
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output"]  # `Trainer` gathers the rest
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, "clip_vision_model", VISION_DEFAULTS),
        "text_config": SubConfigSpec(AutoConfig, "xlm-roberta", TEXT_DEFAULTS),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    text_projection_type: Literal["mlp", "linear"] = "mlp"
    logit_scale_init_value: float = math.log(1 / 0.07)  # temperature 0.07, CLIP (arXiv 2103.00020) section 2.5
    logit_bias_init_value: float | None = None
    matryoshka_dims: list[int] | None = None
    trimmed_vocabulary: dict | None = None

    def __post_init__(self, **kwargs):
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be at least 1, got {self.projection_dim}.")
        self.matryoshka_dims = normalize_matryoshka_dims(self.matryoshka_dims or (), self.projection_dim) or None
        facts = self.trimmed_vocabulary
        if facts is not None and not all(isinstance(facts.get(key), kind) for key, kind in TRIM_RECORD_TYPES.items()):
            raise ValueError(f"trimmed_vocabulary must hold {', '.join(TRIM_RECORD_TYPES)}, got {facts}.")
        own = {"projection_dim": self.projection_dim, "logit_scale_init_value": self.logit_scale_init_value}
        check_sizes(kwargs | own)
        self.vision_config = _build_tower_config("vision_config", self.vision_config, VISION_DEFAULTS)
        self.text_config = _build_tower_config("text_config", self.text_config, TEXT_DEFAULTS)
        if self.text_config.is_encoder_decoder:
            kind = f"the encoder-decoder {self.text_config.model_type!r}; use an encoder alone, such as 'xlm-roberta'"
            raise ValueError(f"text_config must be an encoder, got {kind}.")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """As in transformers; without a bias as before there was one, so that digests of settings stay."""
        absent = {"logit_bias_init_value"} if self.logit_bias_init_value is None else set()
        return {key: value for key, value in super().to_dict().items() if key not in absent}


def normalize_matryoshka_dims(dims: Sequence[int], projection_dim: int) -> list[int]:
    """The widths that a model is trained for, the widest first, each once; ValueError unless they divide the whole."""
    if wrong := [width for width in dims if not 0 < width <= projection_dim or projection_dim % width]:
        known = ", ".join([str(n) for n in range(projection_dim, 0, -1) if not projection_dim % n][:12])
        raise ValueError(
            f"matryoshka_dims must divide the embedding's width, {projection_dim}, got {wrong[0]}; choose of {known}."
        )
    return sorted(set(dims), reverse=True)


def _build_tower_config(name: str, config: dict | PreTrainedConfig | None, defaults: dict) -> PreTrainedConfig:
    """A tower's configuration object; a dictionary of the default kind is completed by the published values."""
    if isinstance(config, PreTrainedConfig):
        check_sizes(get_sizes(config), f"{name}.")
        return config
    config = dict(config or {})
    check_sizes(config, f"{name}.")  # before the object is made, which writes a name for every label
    model_type = config.setdefault("model_type", defaults["model_type"])
    if model_type not in CONFIG_MAPPING:
        fault = f"model_type {model_type!r} is not known to this version of transformers; correct it"
        raise ValueError(f"{fault} (for instance {defaults['model_type']!r}) or install a newer transformers.")
    if model_type == defaults["model_type"]:
        config = {**defaults, **config}
    if model_type == "timm_wrapper":
        config.setdefault("num_classes", 0)  # its `from_dict` fails without, and a tower has no classifier
    # `from_dict`, not the constructor: TimmWrapperConfig restores its labels there only.
    return _build_tower_config(name, CONFIG_MAPPING[model_type].from_dict(config), defaults)


def get_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration object has for the names of `LIMITS`, for `check_sizes`; of its parts, too."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    sizes = {key: getattr(config, key, None) for key in (*SIZE_LIMITS, "model_args", "model_type")}
    return sizes | {name: get_sizes(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}

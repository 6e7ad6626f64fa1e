"""List the supported kinds of image-text models, such as CLIP and SigLIP, and the settings in which they differ.

    kind = get_supported_model_kind(read_json(folder / "config.json"))
    kind.pads_to_max_length

The dict `KINDS` has one entry for each kind, under its `model_type` of transformers. An entry states only the
differences from CLIP, so a kind that is built like CLIP needs only its names:

    KINDS["my_clip"] = ModelKind(model_type="my_clip", title="My CLIP", class_name="MyCLIPModel")
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# `model_type` of this project's own models. The digest of an image encoder (`image_encoder_digest`) assumes this type
# if a config has no `model_type`.
NATIVE_MODEL_TYPE = "capivara"
ADDING_PAGE = "docs/explanation/architecture.md"  # page of the documentation that says how to add a kind of model
# Default values of transformers' configs. Published configs omit fields that have their default value, but configs that
# were loaded and saved again contain these fields. For image towers, only fields that change the embedding of an image
# are listed, because the digest of the image encoder covers only these fields.
CLIP_VISION_DEFAULTS = {
    **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12, "patch_size": 32},
    "image_size": 224,
}
SIGLIP_VISION_DEFAULTS = CLIP_VISION_DEFAULTS | {
    **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16},
}
VIT_VISION_DEFAULTS = CLIP_VISION_DEFAULTS | {
    **{"hidden_act": "gelu", "layer_norm_eps": 1e-12, "patch_size": 16, "pooler_act": "tanh"},
}
DINOV2_VISION_DEFAULTS = CLIP_VISION_DEFAULTS | {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "patch_size": 14}
# `model_type` of image towers that accept images of any size, because they interpolate their position embeddings
ANY_SIZE_VISION_TOWERS = ("dinov2",)
# `model_type` of image towers built like CLIP's, whose embedding comes from the class token of the last layer
CLASS_TOKEN_VISION_TOWERS = (
    *("clip_vision_model", "chinese_clip_vision_model", "altclip_vision_model", "metaclip_2_vision_model"),
)
SIGLIP_TEXT_DEFAULTS = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-6},
    **{"max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh"},
}
METACLIP_2_TEXT_DEFAULTS = {
    **{"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "layer_norm_eps": 1e-5},
    **{"max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407},
}
# Well-known models that are not supported: {`model_type`: explanation that the error message gives after it}
UNSUPPORTED_MODEL_TYPES = {"siglip2": " (SigLIP 2 of any resolution, NaFlex)"}


def _read_projection_dim(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"projection_dim": config.get("projection_dim")}


def _read_siglip_widths(config: Mapping[str, Any]) -> dict[str, Any]:
    text = SIGLIP_TEXT_DEFAULTS | (config.get("text_config") or {})
    vision = {"hidden_size": 768} | (config.get("vision_config") or {})
    text_width = text.get("projection_size", text["hidden_size"])
    return {"text_config.projection_size": text_width, "vision_config.hidden_size": vision["hidden_size"]}


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """Properties that distinguish one kind of image-text model, such as SigLIP, from other kinds.

    A supported model has two towers: one encoder for images and one for texts. The default values describe CLIP.
    """

    # Value of `model_type` in config.json
    model_type: str
    # Name of the kind for messages
    title: str
    # Name of the model class, as results and model cards record it
    class_name: str
    # True: the classes of the model, processor and tokenizer belong to this project. They clean and truncate texts
    # themselves, and their code is saved with the model. False: these classes are part of transformers.
    is_native: bool = False
    # Names of the processor classes that models of this kind may have
    processors: tuple[str, ...] = (
        *("CLIPProcessor", "ChineseCLIPProcessor", "AltCLIPProcessor", "VisionTextDualEncoderProcessor"),
    )
    # True: texts are padded to the maximum length, and the model sees the padding, because there is no attention mask.
    # False: texts are padded to the longest text of the batch, and padding is masked.
    pads_to_max_length: bool = False
    # Function that gets the content of config.json and returns the width of the embeddings as `{name of the setting:
    # width}`. If each tower has its own setting, the text tower comes first.
    read_widths: Callable[[Mapping[str, Any]], dict[str, Any]] = _read_projection_dim
    # Supported values of `text_config.model_type`. Empty: there is a single type of text tower, or all are supported.
    text_towers: tuple[str, ...] = ()
    # Default values of `text_config`
    text_defaults: Mapping[str, Any] = field(default_factory=dict)
    # For a kind with several types of image tower: `{vision_config.model_type: default values}` of the settings that
    # change the embedding of an image. The first type is the default type.
    vision_towers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # For a kind with a single type of image tower: default values of the settings that change an image's embedding
    vision_defaults: Mapping[str, Any] = field(default_factory=lambda: CLIP_VISION_DEFAULTS)
    # Name of the class in `capivara_search/text_tower.py` that embeds texts with NumPy. None: PyTorch embeds texts.
    numpy_text_tower: str | None = None
    # Layout of the weights in open_clip: "hf_text" for a text tower of transformers with a projection, "timm_siglip"
    # for SigLIP. None: an export has no files for open_clip.
    open_clip_layout: Literal["hf_text", "timm_siglip"] | None = None
    # Name of a model in Immich's list that has this architecture. None: the export formats `immich` and `drop_in` are
    # not available.
    immich_name: str | None = None
    # Name of the class of transformers.js that preprocesses images. None: it has the same name as in Python.
    js_image_processor: str | None = None

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Check that a model of this kind has supported towers, whose embeddings have the same width.

        Args:
            config: Content of the model's config.json.

        Raises:
            ValueError: If the type of a tower is not supported, or the widths differ.
        """
        towers = {} if self.is_native else {"text_config": self.text_towers, "vision_config": tuple(self.vision_towers)}
        for section, supported in towers.items():
            tower = (config.get(section) or {}).get("model_type", supported and supported[0])
            if supported and tower not in supported:
                # Embeddings are computed from the output `pooler_output` of a tower. Models of other types, such as
                # ModernBERT, may lack this output.
                raise ValueError(f"{section}.model_type is {tower!r}; supported are {', '.join(supported)}")
        widths = self.read_widths(config)
        if len({*map(str, widths.values())}) > 1:
            settings = " and ".join(f"{name} is {width!s:.80}" for name, width in widths.items())
            raise ValueError(f"the towers have embeddings of different widths: {settings}")

    def select_vision_settings(self, vision: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the settings of a model's image tower that change the embedding of an image, and only these.

        Args:
            vision: Section `vision_config` of the model's config.json.

        Returns:
            `{name of the setting: value}`, with default values for the settings that `vision` omits. None if the type
            of the image tower is not supported.
        """
        tower, defaults = self.model_type, self.vision_defaults
        if self.vision_towers:
            tower = vision.get("model_type", next(iter(self.vision_towers)))
            defaults = self.vision_towers.get(tower)
        if defaults is None:
            return None
        return {"model_type": tower} | {name: vision.get(name, default) for name, default in defaults.items()}


def get_supported_model_kind(config: Mapping[str, Any]) -> ModelKind:
    """Check that the project supports a model, and return its kind, for example the entry of `KINDS` for SigLIP.

    Args:
        config: Content of the model's config.json.

    Returns:
        The entry of `KINDS` for the `model_type` of the model.

    Raises:
        ValueError: If the type of the model or of a tower is not supported, or the embeddings of its two towers differ
            in width. The message starts in lowercase, because callers append it to a sentence.
    """
    model_type = config.get("model_type")
    if model_type not in KINDS:
        supported = ", ".join(f"{kind.model_type} ({kind.title})" for kind in KINDS.values())
        explanation = UNSUPPORTED_MODEL_TYPES.get(str(model_type), "")
        hint = f"{ADDING_PAGE} says how to add a type"
        raise ValueError(f"model_type is {model_type!r}{explanation}; supported are {supported}; {hint}")
    KINDS[model_type].check_config(config)
    return KINDS[model_type]


# Plain data, because `capivara_search` reads it without importing torch or transformers.
KINDS = {
    kind.model_type: kind
    for kind in (
        ModelKind(
            model_type=NATIVE_MODEL_TYPE, title="CAPIVARA", class_name="CapivaraModel", is_native=True,
            processors=("CapivaraProcessor",),
            vision_towers={
                "clip_vision_model": CLIP_VISION_DEFAULTS | {"hidden_act": "gelu"},
                "timm_wrapper": {"architecture": None, "model_args": None, "do_pooling": True},
            },
            numpy_text_tower="TextTower", open_clip_layout="hf_text",
            immich_name="XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k", js_image_processor="CLIPImageProcessor",
        ),
        ModelKind(
            model_type="siglip", title="SigLIP and SigLIP 2 of fixed resolution", class_name="SiglipModel",
            processors=("SiglipProcessor", "Siglip2Processor"), pads_to_max_length=True,
            read_widths=_read_siglip_widths, text_defaults=SIGLIP_TEXT_DEFAULTS,
            vision_defaults=SIGLIP_VISION_DEFAULTS, numpy_text_tower="SiglipTextTower",
            open_clip_layout="timm_siglip", immich_name="ViT-B-16-SigLIP2__webli",
        ),
        ModelKind(model_type="clip", title="CLIP", class_name="CLIPModel"),
        ModelKind(
            model_type="chinese_clip", title="Chinese-CLIP", class_name="ChineseCLIPModel",
            js_image_processor="ChineseCLIPFeatureExtractor",
        ),
        ModelKind(model_type="altclip", title="AltCLIP", class_name="AltCLIPModel"),
        ModelKind(
            model_type="metaclip_2", title="MetaCLIP 2", class_name="MetaClip2Model",
            text_defaults=METACLIP_2_TEXT_DEFAULTS, numpy_text_tower="ClipTextTower",
        ),
        ModelKind(
            model_type="vision-text-dual-encoder", title="VisionTextDualEncoder",
            class_name="VisionTextDualEncoderModel", text_towers=("bert", "roberta", "xlm-roberta"),
            vision_towers={
                "vit": VIT_VISION_DEFAULTS, "clip_vision_model": CLIP_VISION_DEFAULTS,
                "siglip_vision_model": SIGLIP_VISION_DEFAULTS, "dinov2": DINOV2_VISION_DEFAULTS,
            },
        ),
    )
}  # fmt: skip

"""Names of tensors and fields of configurations, between open_clip's model and CAPIVARA's: pure functions."""

import json
import re
import tempfile
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, TimmWrapperConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from capivara_common.hub_cache import first_line

from .configuration_capivara import VISION_DEFAULTS, CapivaraConfig
from .convert_open_clip_flags import BASE_TEXT_MODEL
from .image_processing_capivara import CapivaraImageProcessor
from .loading import checked_config
from .modeling_capivara import CapivaraModel
from .open_clip_checkpoint import OPEN_CLIP_CONFIG, check_state
from .processing_capivara import CONTEXT_LENGTH

BASE_TEXT_NAMES = (BASE_TEXT_MODEL, "xlm-roberta-base")

# A block of the vision transformer, with its number.
BLOCK, OUR_BLOCK = "visual.transformer.resblocks.{}.", "vision_model.encoder.layers.{}."
# open_clip's name, or its beginning, to transformers'.
NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # sic, in transformers
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.trunk.": "vision_model.timm_model.",
    "visual.head.proj.": "visual_projection.",
    "text.transformer.": "text_model.",
    "text.proj.": "text_projection.",
    BLOCK + "ln_1.": OUR_BLOCK + "layer_norm1.",
    BLOCK + "ln_2.": OUR_BLOCK + "layer_norm2.",
    BLOCK + "attn.": OUR_BLOCK + "self_attn.",
    BLOCK + "mlp.c_fc.": OUR_BLOCK + "mlp.fc1.",
    BLOCK + "mlp.c_proj.": OUR_BLOCK + "mlp.fc2.",
}
NUMBER = re.compile(r"(?<=^visual\.transformer\.resblocks\.)\d+|(?<=^vision_model\.encoder\.layers\.)\d+")
# Of a block's attention, open_clip has query, key and value in one tensor, `in_proj_weight` and `in_proj_bias`.
FUSED = re.compile(r"(visual\.transformer\.resblocks\.\d+\.attn\.)in_proj_(weight|bias)")
PROJECTION = re.compile(r"(visual\.transformer\.resblocks\.\d+\.attn\.)([qkv])_proj\.(weight|bias)")
# A constant (0, 1, 2, ...) that transformers before 4.31 saved with every text encoder; no model reads it any more.
POSITION_IDS = "text.transformer.embeddings.position_ids"


def capivara_state_dict(open_clip_state: Mapping[str, Tensor], config: CapivaraConfig) -> dict[str, Tensor]:
    """The tensors of a `CapivaraModel`, from those of open_clip's model; values and types stay.

    Args:
        open_clip_state: open_clip's `state_dict()`.
        config: the architecture of both.

    Raises:
        ValueError: keys are missing or surplus, or a shape is wrong; all are named.
    """
    state = {name: tensor for name, tensor in open_clip_state.items() if name != POSITION_IDS}
    check_state(state, open_clip_shapes(config))
    result = {}
    for name, tensor in state.items():
        if fused := FUSED.fullmatch(name):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                # A clone: tensors that share memory are refused by safetensors.
                result[_renamed(f"{fused[1]}{letter}_proj.{fused[2]}", NAMES)] = part.clone()
        elif name == "visual.proj":
            result["visual_projection.weight"] = tensor.T.contiguous()
        else:
            result[_renamed(name, NAMES)] = tensor
    return result


def open_clip_state_dict(model: CapivaraModel) -> dict[str, Tensor]:
    """The tensors of open_clip's model, from those of a `CapivaraModel`; values and types stay.

    Raises:
        ValueError: the image tower is neither a CLIP vision transformer nor a timm model.
    """
    vit = _vision_kind(model.config) == "clip_vision_model"
    names = {ours: theirs for theirs, ours in NAMES.items()}
    result, parts = {}, {}
    for name, tensor in model.state_dict().items():
        renamed = _renamed(name, names)
        if projection := PROJECTION.fullmatch(renamed):
            parts.setdefault(f"{projection[1]}in_proj_{projection[3]}", {})[projection[2]] = tensor
        elif vit and name == "visual_projection.weight":
            result["visual.proj"] = tensor.T.contiguous()
        else:
            result[renamed] = tensor
    result.update({fused: torch.cat([letters[x] for x in "qkv"]) for fused, letters in parts.items()})
    return result


def open_clip_shapes(config: CapivaraConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of open_clip's model of this architecture; no memory is taken."""
    with torch.device("meta"):
        model = CapivaraModel(config)
    return {name: tensor.shape for name, tensor in open_clip_state_dict(model).items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    number = NUMBER.search(name)
    plain = NUMBER.sub("{}", name)
    for old, new in names.items():
        if plain == old or (old.endswith(".") and plain.startswith(old)):
            return (new + plain[len(old) :]).replace("{}", number[0] if number else "{}")
    raise ValueError(f"The tensor {name!r} has no counterpart in the other program.")


# Fields of open_clip that only training, or only another kind of tower, looks at; and those with one way supported.
TRAINING_FIELDS = {"patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "hf_model_pretrained"}
MODEL_FREE = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}
VIT_FIELDS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
MODEL_FIXED = {"custom_text": (True, False, None), "init_logit_bias": (None,), "nonscalar_logit_scale": (False,)}
VISION_FIXED = {
    **dict.fromkeys(("block_type", "act_kwargs", "norm_kwargs", "ls_init_value"), (None,)),
    **dict.fromkeys(("output_tokens", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), (False,)),
    **dict.fromkeys(("scale_attn", "scale_fc", "final_ln_after_pool", "attentional_pool", "no_ln_pre"), (False,)),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "timm_model_name": (None, ""),
}
TIMM_FIXED = {"timm_proj": ("linear",), "timm_proj_bias": (False,), "timm_pool": ("avg", ""), "output_tokens": (False,)}
TEXT_FIXED = {
    "hf_pooler_type": ("mean_pooler",),
    "hf_proj_type": ("mlp", "linear"),
    "context_length": (CONTEXT_LENGTH,),
    "tokenizer_mode": (None, ""),
    "output_tokens": (False,),
}
TOKENIZER_FIXED = {"clean": ("whitespace",), "strip_sep_token": (False,), "language": (None,)}
PREPROCESS_FIXED = {"mode": ("RGB",), "resize_mode": ("shortest",), "interpolation": ("bicubic", "bilinear")}
# Sizes of open_clip's own text transformer, without meaning beside `hf_model_name`.
IGNORED_TEXT_FIELDS = {"vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"}
TEXT_FREE = {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"} | TRAINING_FIELDS | IGNORED_TEXT_FIELDS
TOKENIZER_FREE = {"tokenizer_type"}  # what a folder for both programs needs, lest open_clip asks about config.json
TEXT_KINDS = ("xlm-roberta", "roberta", "bert")  # those that open_clip 3.3 can pool by the mean


def capivara_config(model_cfg: dict) -> CapivaraConfig:
    """The architecture that the `model_cfg` of an open_clip_config.json describes.

    Raises:
        ValueError: a field is missing, unknown, or has a value that is not supported.
    """
    _check_fields("model_cfg", model_cfg, MODEL_FIXED, MODEL_FREE)
    for name, kind in {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}.items():
        if not isinstance(model_cfg.get(name), kind):
            refuse("model_cfg", name, model_cfg.get(name), "a whole number" if kind is int else "fields in braces")
    init_logit_scale = model_cfg.get("init_logit_scale")
    if not isinstance(init_logit_scale, (int, float, type(None))):
        refuse("model_cfg", "init_logit_scale", init_logit_scale, "a number")
    text_cfg = model_cfg["text_cfg"]
    if not text_cfg.get("hf_model_name"):
        refuse("text_cfg", "hf_model_name", text_cfg.get("hf_model_name"), "a transformers text encoder")
    _check_fields("text_cfg", text_cfg, TEXT_FIXED, TEXT_FREE)
    _check_fields("text_cfg.tokenizer_kwargs", text_cfg.get("tokenizer_kwargs") or {}, TOKENIZER_FIXED, TOKENIZER_FREE)
    vision = _vision_config(model_cfg["vision_cfg"], bool(model_cfg.get("quick_gelu", False)))
    scale = {} if init_logit_scale is None else {"logit_scale_init_value": float(init_logit_scale)}
    text = _text_config(text_cfg["hf_model_name"])
    projection = text_cfg.get("hf_proj_type", "mlp")  # open_clip's default too
    sizes = {"projection_dim": model_cfg["embed_dim"], "text_projection_type": projection, **scale}
    try:
        return CapivaraConfig(vision_config=vision, text_config=text, **sizes)
    except ValueError as error:
        raise ValueError(f"model_cfg of {OPEN_CLIP_CONFIG} can't be: {error}") from error


def open_clip_model_cfg(config: CapivaraConfig, text_model_name: str, image_size: int | None = None) -> dict[str, Any]:
    """The `model_cfg` of an open_clip_config.json for this architecture.

    Args:
        config: the architecture.
        text_model_name: folder or Hub id of the text tower's configuration.
        image_size: pixels a side; None is the ViT's own, 224 for a timm model (which does not state it).

    Raises:
        ValueError: open_clip's configuration has no way to state the architecture.
    """
    if config.text_config.model_type not in TEXT_KINDS:
        refuse("text_config", "model_type", config.text_config.model_type, f"one of {TEXT_KINDS}", "config.json")
    vision, model_cfg = config.vision_config, {"embed_dim": config.projection_dim}
    if _vision_kind(config) == "timm_wrapper":
        if vision.model_args or not vision.do_pooling:
            refuse("vision_config", "model_args", vision.model_args, "none, with do_pooling true", "config.json")
        pool = "avg" if _timm_pool(vision.architecture) == "avg" else ""
        vision_cfg = {"timm_model_name": vision.architecture, "timm_pool": pool, "timm_proj": "linear"}
        vision_cfg["image_size"] = image_size or 224
    else:
        vision_cfg = _vit_cfg(vision)
        if image_size not in (None, vision.image_size):
            refuse("crop_size", "height", image_size, f"the image tower's {vision.image_size}", "the processor")
        if vision.hidden_act == "quick_gelu":
            model_cfg["quick_gelu"] = True
    text_cfg = {"hf_model_name": text_model_name, "hf_tokenizer_name": BASE_TEXT_MODEL}
    text_cfg |= {"hf_proj_type": config.text_projection_type, "hf_pooler_type": "mean_pooler"}
    return {**model_cfg, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def build_open_clip(config: CapivaraConfig) -> nn.Module:
    """open_clip's own model of this architecture, random weights, evaluation mode; nothing is downloaded."""
    from open_clip.model import CustomTextCLIP

    with tempfile.TemporaryDirectory() as folder:
        config.text_config.save_pretrained(folder)
        model_cfg = open_clip_model_cfg(config, folder)
        model_cfg["text_cfg"]["hf_model_pretrained"] = False
        return CustomTextCLIP(**model_cfg).eval()


def _vision_config(vision_cfg: dict, quick_gelu: bool) -> PreTrainedConfig | dict:
    if vision_cfg.get("timm_model_name"):
        return timm_config(vision_cfg)
    free = VIT_FIELDS | TRAINING_FIELDS | {"attn_pooler_queries", "attn_pooler_heads"} | set(TIMM_FIXED)
    _check_fields("vision_cfg", vision_cfg, VISION_FIXED, free - VISION_FIXED.keys())
    layers, width = vision_cfg.get("layers", 12), vision_cfg.get("width", 768)  # here and below: open_clip's defaults
    head_width, ratio = vision_cfg.get("head_width", 64), vision_cfg.get("mlp_ratio", 4.0)
    patch_size = vision_cfg.get("patch_size", 16)
    for name, value in {"layers": layers, "width": width, "head_width": head_width, "patch_size": patch_size}.items():
        if not isinstance(value, int) or value < 1:
            refuse("vision_cfg", name, value, "a whole number from 1 (a ViT; ResNets are not supported)")
    if not isinstance(ratio, (int, float)) or not ratio > 0:
        refuse("vision_cfg", "mlp_ratio", ratio, "a number above 0")
    if width % head_width:
        refuse("vision_cfg", "width", width, f"a multiple of head_width, {head_width}")
    return {
        **VISION_DEFAULTS,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head_width,
        "intermediate_size": int(width * ratio),
        "patch_size": patch_size,
        "image_size": square(vision_cfg),
    }


def timm_config(vision_cfg: dict) -> TimmWrapperConfig:
    """The image tower of a `vision_cfg` that names a timm model. Raises ValueError where it can't be converted."""
    free = {"timm_model_name"} | VIT_FIELDS | TRAINING_FIELDS
    _check_fields("vision_cfg", vision_cfg, TIMM_FIXED, free)
    square(vision_cfg)
    name = vision_cfg["timm_model_name"]
    own = _timm_pool(name)
    if vision_cfg.get("timm_pool", "avg") == "avg" and own not in ("avg", None):
        refuse("vision_cfg", "timm_pool", "avg", f'"", as the own pooling of {name} is {own!r}')
    return TimmWrapperConfig(architecture=name)


def _timm_pool(architecture: str) -> str | None:
    """How a timm model pools by itself ("avg", "token", ...); None where it does not say."""
    import timm

    if not timm.is_model(architecture):  # also keeps timm's own "hf-hub:" names, and so the network, out
        refuse("vision_cfg", "timm_model_name", architecture, f"the models that timm {timm.__version__} builds")
    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False)
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    return getattr(pool, "pool_type", pool)


def _vit_cfg(vision: PreTrainedConfig) -> dict[str, Any]:
    fixed = {"hidden_act": ("gelu", "quick_gelu"), "layer_norm_eps": (1e-5,), "num_channels": (3,)}
    for name, known in fixed.items():
        if (value := getattr(vision, name)) not in known:
            refuse("vision_config", name, value, " or ".join(map(json.dumps, known)), "config.json")
    ratio = vision.intermediate_size / vision.hidden_size
    if int(vision.hidden_size * ratio) != vision.intermediate_size:  # open_clip's own rounding
        ratio = (vision.intermediate_size + 0.5) / vision.hidden_size
    return {
        "image_size": vision.image_size,
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "patch_size": vision.patch_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "mlp_ratio": ratio,
    }


def _text_config(name: str) -> PreTrainedConfig | None:
    if name in BASE_TEXT_NAMES:
        return CapivaraConfig().text_config  # known by heart: no network
    try:
        config = checked_config(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text_cfg.hf_model_name of {OPEN_CLIP_CONFIG} is {name!r}; no text encoder's configuration is to be had "
            f"there ({first_line(error)}). If the folder has moved, write its new place into that file."
        ) from error
    if config.model_type not in TEXT_KINDS:
        refuse("text_cfg", "hf_model_name", f"{name} ({config.model_type})", f"model types {TEXT_KINDS}")
    return config


def _vision_kind(config: CapivaraConfig) -> str:
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "timm_wrapper"):
        refuse("vision_config", "model_type", kind, '"clip_vision_model" or "timm_wrapper"', "config.json")
    return kind


def image_processor_of(preprocess_cfg: dict, size: int) -> CapivaraImageProcessor:
    """The image processor of a `preprocess_cfg`, for squares of `size` pixels. Raises ValueError where it can't be."""
    # As open_clip reads it: null is absent, an unknown field is nothing, `size` is always that of the tower.
    cfg = {k: v for k, v in preprocess_cfg.items() if v is not None}
    _check_fields("preprocess_cfg", {k: v for k, v in cfg.items() if k in PREPROCESS_FIXED}, PREPROCESS_FIXED, set())
    mean, std = cfg.get("mean", OPENAI_CLIP_MEAN), cfg.get("std", OPENAI_CLIP_STD)
    for name, value in {"mean": mean, "std": std}.items():
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            refuse("preprocess_cfg", name, value, "three numbers")
    return CapivaraImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
        resample=PILImageResampling[cfg.get("interpolation", "bicubic").upper()],
    )


def preprocess_cfg_of(processor: CapivaraImageProcessor) -> tuple[int, dict[str, Any]]:
    """Side in pixels and `preprocess_cfg`, of a processor that does what open_clip can do."""
    steps = ("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize")
    for name in steps:
        if not getattr(processor, name):
            refuse("image_processor", name, False, "true", "the processor")
    size, crop = dict(processor.size).get("shortest_edge"), processor.crop_size
    if not size or (crop["height"], crop["width"]) != (size, size):
        refuse("image_processor", "crop_size", dict(crop), f"a square of size's shortest_edge, {size}", "the processor")
    if processor.rescale_factor != 1 / 255:
        refuse("image_processor", "rescale_factor", processor.rescale_factor, "1/255", "the processor")
    interpolation = PILImageResampling(processor.resample).name.lower()
    if interpolation not in PREPROCESS_FIXED["interpolation"]:
        refuse("image_processor", "resample", interpolation, "bicubic or bilinear", "the processor")
    cfg = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    return size, {**cfg, "interpolation": interpolation, "resize_mode": "shortest"}


def square(vision_cfg: dict) -> int:
    """Pixels a side that a `vision_cfg` names. Raises ValueError where they are no square."""
    size = vision_cfg.get("image_size", 224)
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or size < 1:
        refuse("vision_cfg", "image_size", size, "one number of pixels, or the same twice")
    return size


def _check_fields(section: str, values: dict, fixed: dict[str, tuple], free: set[str]) -> None:
    if not isinstance(values, dict):
        refuse(*section.split(".")[:1], section, values, "fields in braces")
    for name, value in values.items():
        if name in fixed and value not in fixed[name]:
            refuse(section, name, value, " or ".join(map(repr, fixed[name])))
        if name not in fixed and name not in free:
            refuse(section, name, value, f"the fields {sorted({*fixed, *free})}")


def refuse(section: str, name: str, value: Any, supported: str, where: str = OPEN_CLIP_CONFIG) -> NoReturn:
    """Raise ValueError about the field `name` in a `section` of the file `where`."""
    raise ValueError(f"{section}.{name} of {where} is {value!r}, which cannot be converted; supported: {supported}.")

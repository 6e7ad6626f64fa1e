"""Convert models from open_clip's format to a `CapivaraModel`.

    python -m modeling_capivara.convert_open_clip hf-hub:hiaac-nlp/CAPIVARA capivara-transformers

The command writes a folder that transformers can load, and verifies the converted model. The package open_clip is not
needed. Only tensors are read, so no code in a checkpoint file is executed. In Python, use
`CapivaraModel.from_open_clip`. For the opposite direction, use `hub_upload.export`.
"""

import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import atomic_folder, read_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES
from capivara_common.model_kinds import KINDS

from . import loading
from .checks_capivara import check_config_ranges, wrap_tokenizer_errors
from .configuration_capivara import CapivaraConfig
from .image_processing_capivara import CapivaraImageProcessor
from .modeling_capivara import CapivaraModel
from .processing_capivara import CONTEXT_LENGTH, CapivaraProcessor
from .two_towers import embed_images, embed_texts, random_images, random_texts

BASE_TEXT_MODEL = "FacebookAI/xlm-roberta-base"
BASE_TEXT_NAMES = (BASE_TEXT_MODEL, "xlm-roberta-base")

# Parameter names of open_clip and the corresponding names in `CapivaraModel`. A name that ends with "." or "_" is a
# prefix of several parameter names. {} stands for the index of a transformer block.
PARAMETER_NAMES = {
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers misspells this name
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.trunk.": "vision_model.timm_model.",
    "visual.head.proj.": "visual_projection.",
    "text.transformer.": "text_model.",
    "text.proj.": "text_projection.",
    "visual.transformer.resblocks.{}.ln_1.": "vision_model.encoder.layers.{}.layer_norm1.",
    "visual.transformer.resblocks.{}.ln_2.": "vision_model.encoder.layers.{}.layer_norm2.",
    "visual.transformer.resblocks.{}.attn.": "vision_model.encoder.layers.{}.self_attn.",
    "visual.transformer.resblocks.{}.mlp.c_fc.": "vision_model.encoder.layers.{}.mlp.fc1.",
    "visual.transformer.resblocks.{}.mlp.c_proj.": "vision_model.encoder.layers.{}.mlp.fc2.",
}
# Parameter names of open_clip and the corresponding names in transformers' SiglipModel, in the same format. In
# open_clip, the image tower of SigLIP is timm's ViT with attention pooling.
SIGLIP_PARAMETER_NAMES = {
    "logit_": "logit_",
    "visual.trunk.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "visual.trunk.norm.": "vision_model.post_layernorm.",
    "visual.trunk.attn_pool.latent": "vision_model.head.probe",
    "visual.trunk.attn_pool.proj.": "vision_model.head.attention.out_proj.",
    "visual.trunk.attn_pool.norm.": "vision_model.head.layernorm.",
    "visual.trunk.attn_pool.mlp.": "vision_model.head.mlp.",
    "visual.trunk.attn_pool.": "vision_model.head.attention.",
    "visual.trunk.blocks.{}.norm1.": "vision_model.encoder.layers.{}.layer_norm1.",
    "visual.trunk.blocks.{}.norm2.": "vision_model.encoder.layers.{}.layer_norm2.",
    "visual.trunk.blocks.{}.attn.qkv.": "vision_model.encoder.layers.{}.self_attn.in_proj_",
    "visual.trunk.blocks.{}.attn.proj.": "vision_model.encoder.layers.{}.self_attn.out_proj.",
    "visual.trunk.blocks.{}.mlp.": "vision_model.encoder.layers.{}.mlp.",
    "text.token_embedding.": "text_model.embeddings.token_embedding.",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.": "text_model.final_layer_norm.",
    "text.text_projection.": "text_model.head.",
    "text.transformer.resblocks.{}.ln_1.": "text_model.encoder.layers.{}.layer_norm1.",
    "text.transformer.resblocks.{}.ln_2.": "text_model.encoder.layers.{}.layer_norm2.",
    "text.transformer.resblocks.{}.attn.": "text_model.encoder.layers.{}.self_attn.",
    "text.transformer.resblocks.{}.mlp.c_fc.": "text_model.encoder.layers.{}.mlp.fc1.",
    "text.transformer.resblocks.{}.mlp.c_proj.": "text_model.encoder.layers.{}.mlp.fc2.",
}
BLOCK_NUMBER_RE = re.compile(r"(?<=resblocks\.)\d+|(?<=trunk\.blocks\.)\d+|(?<=_model\.encoder\.layers\.)\d+")
# open_clip stores the query, key and value projections of an attention layer in one tensor (in_proj_weight,
# in_proj_bias); transformers has three.
ATTENTION_PROJECTION_RE = re.compile(r"(.*_model\.encoder\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)")
# A constant tensor (0, 1, 2, ...) that transformers before 4.31 saved with every text encoder. No model needs it.
POSITION_IDS_NAME = "text.transformer.embeddings.position_ids"


def to_capivara_state_dict(open_clip_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of an open_clip model to the state dict of a `CapivaraModel`.

    Values and dtypes do not change. A tensor with an unknown name keeps its name.

    Args:
        open_clip_state: State dict of the open_clip model, {name in open_clip: tensor}.

    Returns:
        State dict of the `CapivaraModel`, {name in `CapivaraModel`: tensor}.
    """
    result = {}
    for open_clip_name, tensor in open_clip_state.items():
        name = _rename_parameter(open_clip_name, PARAMETER_NAMES)
        if name.startswith("vision_model.encoder.") and ".in_proj_" in name:
            # A damaged tensor may have fewer than three chunks, so `zip` is not strict. Loading the model then raises
            # an error that names the missing projection. The chunks are cloned, because safetensors refuses tensors
            # that share memory.
            chunks = zip("qkv", tensor.chunk(3), strict=False)
            result |= {name.replace("in_proj_", f"{letter}_proj."): chunk.clone() for letter, chunk in chunks}
        elif open_clip_name == "visual.proj":
            result["visual_projection.weight"] = tensor.T.contiguous()
        else:
            # An unknown name stays, so that `load_state_dict(strict=True)` later refuses the tensor.
            result[name] = tensor
    return result


def to_open_clip_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Convert the weights of a transformers model to the state dict of the same model in open_clip.

    Tensors are renamed, joined, split or transposed. Their values and dtypes do not change.

    Args:
        model: A `CapivaraModel`, or a `SiglipModel` of transformers.

    Returns:
        State dict of the open_clip model, {name in open_clip: tensor}.

    Raises:
        ValueError: If open_clip has no image tower of this type.
    """
    result, state = {}, model.state_dict()
    is_siglip = KINDS[model.config.model_type].open_clip_layout == "timm_siglip"
    names = {ours: theirs for theirs, ours in (SIGLIP_PARAMETER_NAMES if is_siglip else PARAMETER_NAMES).items()}
    is_vit = not is_siglip and _is_vit(model.config)
    for name, tensor in state.items():
        open_clip_name = _rename_parameter(name, names)
        if match := ATTENTION_PROJECTION_RE.fullmatch(name):
            # open_clip has one tensor for the query, key and value projections. It is built when the loop reaches the
            # query projection, and the other two are skipped.
            if match[2] == "q":
                projections = [state[f"{match[1]}{letter}_proj.{match[3]}"] for letter in "qkv"]
                result[_rename_parameter(f"{match[1]}in_proj_{match[3]}", names)] = torch.cat(projections)
        elif is_vit and name == "visual_projection.weight":
            result["visual.proj"] = tensor.T.contiguous()
        elif is_siglip and ".attn_pool.in_proj_" in open_clip_name:
            # transformers has one tensor with query, key and value of the attention pooling. open_clip has two tensors:
            # one with the query, one with key and value.
            query_rows = len(tensor) // 3
            for suffix, rows in {"q.": tensor[:query_rows], "kv.": tensor[query_rows:]}.items():
                result[open_clip_name.replace("in_proj_", suffix)] = rows.clone()
        elif is_siglip and open_clip_name == "visual.trunk.pos_embed":
            result[open_clip_name] = tensor[None]
        elif is_siglip and open_clip_name.startswith("logit_"):
            result[open_clip_name] = tensor.reshape(())
        else:
            result[open_clip_name] = tensor
    return result


def _rename_parameter(name: str, names: dict[str, str]) -> str:
    """Rename a parameter by the first entry of `names` that matches it.

    Args:
        name: Parameter name.
        names: Dictionary {old name: new name}, in the format of `PARAMETER_NAMES`. An old name that ends with "." or
            "_" also matches as a prefix. `{}` stands for the index of a transformer block.

    Returns:
        The new name, or `name` itself if no entry matches.
    """
    block, pattern = BLOCK_NUMBER_RE.search(name), BLOCK_NUMBER_RE.sub("{}", name)
    for old, new in names.items():
        if pattern == old or (old.endswith((".", "_")) and pattern.startswith(old)):
            return (new + pattern[len(old) :]).replace("{}", block[0] if block else "{}")
    return name


def new_open_clip_model(config: CapivaraConfig) -> nn.Module:
    """Build an open_clip model with the architecture of a CAPIVARA configuration and random weights.

    The model shows which tensor names and shapes open_clip expects.

    Args:
        config: Architecture of the model.

    Returns:
        An `open_clip.model.CustomTextCLIP` in evaluation mode.

    Raises:
        ImportError: If open_clip is not installed.
        ValueError: If open_clip can't represent the architecture.
    """
    from open_clip.model import CustomTextCLIP

    with tempfile.TemporaryDirectory() as folder:
        config.text_config.save_pretrained(folder)
        model_cfg = to_open_clip_model_cfg(config, folder)
        model_cfg["text_cfg"]["hf_model_pretrained"] = False  # random weights, so nothing is downloaded
        return CustomTextCLIP(**model_cfg).eval()


TEXT_MODEL_TYPES = ("xlm-roberta", "roberta", "bert")  # text towers that open_clip 3.3 can use with mean pooling
# Configuration fields of a ViT in open_clip, each with the name of the field in transformers and open_clip's default.
VIT_FIELDS = {
    "layers": ("num_hidden_layers", 12),
    "width": ("hidden_size", 768),
    "patch_size": ("patch_size", 16),
    "image_size": ("image_size", 224),
}
# Supported values of fields that change the embeddings, but not the names or shapes of tensors. Other wrong values are
# noticed when the tensors are loaded. The fields of `vision_config` are settings of a `CapivaraModel`, all others are
# settings of open_clip. A missing field is supported, because its default is.
SUPPORTED_VALUES: dict[str, tuple] = {
    "vision_cfg.pool_type": ("tok",),
    "vision_cfg.final_ln_after_pool": (False, None),
    "vision_cfg.act_kwargs": (None, {}),
    "vision_cfg.norm_kwargs": (None, {}),
    "vision_cfg.timm_model_name": (None, ""),  # towers of timm can be exported to open_clip, but not converted from it
    "text_cfg.hf_pooler_type": ("mean_pooler",),
    "text_cfg.context_length": (CONTEXT_LENGTH,),
    "tokenizer_kwargs.clean": ("whitespace",),
    "tokenizer_kwargs.strip_sep_token": (False, None),
    "preprocess_cfg.mode": ("RGB", None),
    "preprocess_cfg.resize_mode": ("shortest", None),
    "preprocess_cfg.interpolation": ("bicubic", "bilinear", None),
    "vision_config.model_type": ("clip_vision_model", "timm_wrapper"),
    "vision_config.hidden_act": ("gelu", "quick_gelu"),
    "vision_config.layer_norm_eps": (1e-5,),
}


def to_capivara_config(model_cfg: dict) -> CapivaraConfig:
    """Convert the `model_cfg` section of open_clip_config.json to a `CapivaraConfig`.

    Args:
        model_cfg: Content of the section, with the keys "embed_dim", "vision_cfg", "text_cfg" and optional keys.

    Returns:
        The configuration.

    Raises:
        ValueError: If a field is missing, has the wrong type, or describes an architecture that is not supported.
    """
    try:
        check_config_ranges(model_cfg)
        vision_cfg, text_cfg = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
        _check_supported("vision_cfg", vision_cfg)
        _check_supported("text_cfg", text_cfg)
        _check_supported("tokenizer_kwargs", text_cfg.get("tokenizer_kwargs") or {})
        vision = {name: vision_cfg.get(theirs, default) for theirs, (name, default) in VIT_FIELDS.items()}
        if not isinstance(vision["image_size"], int):
            _raise_unsupported("vision_cfg.image_size", vision["image_size"], "a single number of pixels")
        vision["num_attention_heads"] = vision["hidden_size"] // vision_cfg.get("head_width", 64)
        vision["intermediate_size"] = int(vision["hidden_size"] * vision_cfg.get("mlp_ratio", 4.0))
        vision["hidden_act"] = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
        projection_type = text_cfg.get("hf_proj_type", "mlp")
        options = {"projection_dim": model_cfg["embed_dim"], "text_projection_type": projection_type}
        for name in ("logit_scale", "logit_bias"):
            if model_cfg.get(f"init_{name}") is not None:
                options[f"{name}_init_value"] = float(model_cfg[f"init_{name}"])
        # The text configuration may come from the Hub, so it is loaded after everything else has been checked.
        text_config = _load_text_config(text_cfg.get("hf_model_name"))
        return CapivaraConfig(vision_config=vision, text_config=text_config, **options)
    # Missing fields, values of the wrong type and transformers' configuration classes raise errors of many types.
    except Exception as error:
        reason = " ".join(str(error).split())
        # The type is added because the message alone may be unclear: the message of a KeyError, for instance, is only
        # the key.
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__} {reason}"
        raise ValueError(f"model_cfg of {OPEN_CLIP_CONFIG} can't be converted: {reason}") from error


def to_open_clip_model_cfg(
    config: CapivaraConfig, text_model_name: str, image_size: int | None = None
) -> dict[str, Any]:
    """Convert a `CapivaraConfig` to the `model_cfg` section of open_clip_config.json.

    Args:
        config: Architecture of the model.
        text_model_name: Folder or Hub id from which open_clip loads the configuration of the text tower.
        image_size: Side of the square input images in pixels. Default: the ViT's `image_size`, or 224 for a timm model.

    Returns:
        Content of the section, with the keys "embed_dim", "vision_cfg", "text_cfg" and optional keys.

    Raises:
        ValueError: If open_clip can't represent the architecture.
    """
    text_type = config.text_config.model_type
    if text_type not in TEXT_MODEL_TYPES:
        _raise_unsupported("text_config.model_type", text_type, f"one of {TEXT_MODEL_TYPES}", "config.json")
    vision, model_cfg = config.vision_config, {"embed_dim": config.projection_dim}
    if config.logit_bias_init_value is not None:
        model_cfg["init_logit_bias"] = config.logit_bias_init_value
    if not _is_vit(config):
        if vision.model_args or not vision.do_pooling:
            supported = "none, with do_pooling true"
            _raise_unsupported("vision_config.model_args", vision.model_args, supported, "config.json")
        # With an empty `timm_pool`, open_clip keeps the pooling of the timm model instead of replacing it.
        vision_cfg = {"timm_model_name": vision.architecture, "timm_pool": "", "timm_proj": "linear"}
        vision_cfg["image_size"] = image_size or 224  # the configuration of a timm model does not state it
    else:
        _check_supported("vision_config", vision.to_dict(), "config.json")
        if image_size not in (None, vision.image_size):
            supported = f"the image tower's {vision.image_size}"
            _raise_unsupported("crop_size.height", image_size, supported, "the processor")
        ratio = vision.intermediate_size / vision.hidden_size
        # open_clip stores only this ratio, and computes the size of the hidden layer as int(width * ratio). If that
        # would be one too small because of rounding, the ratio is slightly increased.
        if int(vision.hidden_size * ratio) != vision.intermediate_size:
            ratio = (vision.intermediate_size + 0.5) / vision.hidden_size
        vision_cfg = {name: getattr(vision, ours) for name, (ours, _) in VIT_FIELDS.items()}
        vision_cfg |= {"head_width": vision.hidden_size // vision.num_attention_heads, "mlp_ratio": ratio}
        if vision.hidden_act == "quick_gelu":
            model_cfg["quick_gelu"] = True
    text_cfg = {"hf_model_name": text_model_name, "hf_tokenizer_name": BASE_TEXT_MODEL}
    text_cfg |= {"hf_proj_type": config.text_projection_type, "hf_pooler_type": "mean_pooler"}
    return {**model_cfg, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _is_vit(config: CapivaraConfig) -> bool:
    """Return whether the image tower is a ViT that open_clip implements itself (True) or a timm model (False).

    Args:
        config: Configuration of the model.

    Raises:
        ValueError: If the image tower is of another type, which open_clip can't represent.
    """
    model_type = config.vision_config.model_type
    _check_supported("vision_config", {"model_type": model_type}, "config.json")
    return model_type == "clip_vision_model"


def _load_text_config(name: Any) -> PreTrainedConfig:
    """Load the configuration of the text tower from the folder or Hub id in `text_cfg.hf_model_name`.

    Args:
        name: Value of that field. It may have any type, because the file may be damaged.

    Returns:
        The configuration.

    Raises:
        ValueError: If there is no configuration, or the text tower is not of a supported type.
    """
    if name in BASE_TEXT_NAMES:
        # CAPIVARA's default text tower is the same model, so its configuration need not be downloaded.
        return CapivaraConfig().text_config
    try:
        config = loading.load_transformers_config(name) if isinstance(name, str) else None
    except (OSError, ValueError) as error:
        reason = f"has no usable configuration ({_first_error_line(error)})"
        hint = "If it is a folder that has moved, enter its new path"
        raise ValueError(f"text_cfg.hf_model_name {name!r} {reason}. {hint}.") from error
    if config is None or config.model_type not in TEXT_MODEL_TYPES:
        _raise_unsupported("text_cfg.hf_model_name", name, f"text encoders of the types {', '.join(TEXT_MODEL_TYPES)}")
    return config


def _to_image_processor(preprocess_cfg: dict, size: int) -> CapivaraImageProcessor:
    """Convert the `preprocess_cfg` section of open_clip_config.json to an image processor.

    Args:
        preprocess_cfg: Content of the section. Missing fields have open_clip's defaults.
        size: Side of the square input images in pixels. The `size` in `preprocess_cfg` is ignored, because open_clip
            ignores it as well and uses the image size of the image tower.

    Returns:
        The image processor.

    Raises:
        ValueError: If a field has a value that is not supported.
    """
    _check_supported("preprocess_cfg", preprocess_cfg)
    return CapivaraImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=preprocess_cfg.get("mean") or OPENAI_CLIP_MEAN,
        image_std=preprocess_cfg.get("std") or OPENAI_CLIP_STD,
        resample=PILImageResampling[(preprocess_cfg.get("interpolation") or "bicubic").upper()],
    )


def to_preprocess_cfg(processor: BaseImageProcessor) -> dict[str, Any]:
    """Convert an image processor to the `preprocess_cfg` section of open_clip_config.json.

    Args:
        processor: Image processor of a CAPIVARA or SigLIP model.

    Returns:
        Content of the section, with the keys "mean", "std", "interpolation" and "resize_mode".

    Raises:
        ValueError: If open_clip can't do the same preprocessing.
    """
    settings, is_capivara = processor.to_dict(), isinstance(processor, CapivaraImageProcessor)
    side = dict(processor.size).get("shortest_edge")
    required = dict.fromkeys(("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize"), True)
    required |= {"rescale_factor": 1 / 255, "crop_size": {"height": side, "width": side}}
    for name, value in required.items() if is_capivara else ():
        if settings[name] != value:
            _raise_unsupported(f"image_processor.{name}", settings[name], str(value), "the processor")
    interpolation = PILImageResampling(processor.resample).name.lower()
    if interpolation not in SUPPORTED_VALUES["preprocess_cfg.interpolation"]:
        _raise_unsupported("image_processor.resample", interpolation, "bicubic or bilinear", "the processor")
    preprocess_cfg = {"mean": settings["image_mean"], "std": settings["image_std"], "interpolation": interpolation}
    return preprocess_cfg | {"resize_mode": "shortest" if is_capivara else "squash"}


def _check_supported(section: str, fields: dict, file: str = OPEN_CLIP_CONFIG) -> None:
    """Check that the values of a section of settings are among the `SUPPORTED_VALUES`.

    Args:
        section: Name of the section, such as "vision_cfg".
        fields: Content of the section.
        file: Name of the file that contains the section, for the error message.

    Raises:
        ValueError: If a field has a value that can't be converted.
    """
    for name, value in fields.items():
        supported = SUPPORTED_VALUES.get(f"{section}.{name}", (value,))
        if value not in supported:
            _raise_unsupported(f"{section}.{name}", value, " or ".join(map(repr, supported)), file)


def _raise_unsupported(field: str, value: Any, supported: str, file: str = OPEN_CLIP_CONFIG) -> NoReturn:
    """Raise a ValueError for a setting that can't be converted.

    Args:
        field: Name of the setting with its section, such as "vision_cfg.pool_type".
        value: Value of the setting.
        supported: Description of the supported values, for the error message.
        file: Name of the file that contains the setting, for the error message.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{field} of {file} is {value!r}, which cannot be converted; supported: {supported}.")


# Model card, configuration and tokenizer files, which are downloaded together with the weights.
DOWNLOADED_PATTERNS = ("README.md", "*.json", "*.model", "*.txt")
ORIGIN_SENTENCE = (
    "Converted to transformers by `python -m modeling_capivara.convert_open_clip`; the weights are unchanged."
)
# A folder that contains one of these files has its own tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt")


@dataclass
class OpenClipSource:
    """Files and settings of an open_clip model that is to be converted. The weights have not been read yet.

    The model is either a folder with open_clip_config.json, or a bare checkpoint file without a folder.

    Attributes:
        model_cfg: Section `model_cfg` of open_clip_config.json. None for a bare checkpoint file.
        preprocess_cfg: Section `preprocess_cfg` of open_clip_config.json. Empty for a bare checkpoint file.
        weights: Path of the checkpoint file.
        tokenizer: Folder or Hub id of the tokenizer.
        folder: Folder of the model. None for a bare checkpoint file.
        repo_id: Hub id of the model. None if it was not downloaded.
    """

    model_cfg: dict | None
    preprocess_cfg: dict
    weights: Path
    tokenizer: str
    folder: Path | None = None
    repo_id: str | None = None


def _find_or_download_open_clip_files(
    source: str, tokenizer: str | None = None, revision: str | None = None
) -> OpenClipSource:
    """Find an open_clip model, and download its files if it is on the Hub.

    Args:
        source: "hf-hub:OWNER/NAME", folder of a model, or path of a checkpoint file.
        tokenizer: Folder or Hub id of a tokenizer, used if `source` neither contains nor names one. Default: the
            tokenizer of XLM-RoBERTa base.
        revision: Branch, tag or commit on the Hub. Default: the main branch.

    Returns:
        Files and settings of the model.

    Raises:
        ValueError: If there is no open_clip model in `source`, its configuration is damaged, or it can't be downloaded.
    """
    repo_id = source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else None
    folder = _download_model(repo_id, revision) if repo_id else Path(source.removeprefix("local-dir:"))
    if folder.is_file():
        return OpenClipSource(None, {}, folder, tokenizer or BASE_TEXT_MODEL)
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        fault = f"has no {OPEN_CLIP_CONFIG}" if folder.exists() else "does not exist"
        hint = "Give hf-hub:OWNER/NAME, or a folder or checkpoint file in open_clip's format"
        raise ValueError(f"SOURCE {folder} {fault}. {hint} (hub_upload.export writes that format).")
    settings = read_json(folder / OPEN_CLIP_CONFIG, model_cfg=dict)
    model_cfg, preprocess_cfg = settings["model_cfg"], settings.get("preprocess_cfg") or {}
    for name, section in {"preprocess_cfg": preprocess_cfg, "text_cfg": model_cfg.get("text_cfg")}.items():
        if not isinstance(section, dict):
            _raise_unsupported(name, section, "a JSON object")
    weights = next((folder / name for name in OPEN_CLIP_WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"SOURCE {folder} has no weights; expected one of {', '.join(OPEN_CLIP_WEIGHT_FILES)}.")
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARY_FILES)
    own_tokenizer = str(folder) if has_tokenizer else model_cfg["text_cfg"].get("hf_tokenizer_name")
    tokenizer = own_tokenizer or tokenizer or BASE_TEXT_MODEL
    return OpenClipSource(model_cfg, preprocess_cfg, weights, tokenizer, folder, repo_id)


def _first_error_line(error: BaseException) -> str:
    """Return only the first line of an error's message, because some libraries append pages of advice.

    Args:
        error: Exception of any type. If its message is empty, the name of its type is returned.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _download_model(repo_id: str, revision: str | None) -> Path:
    """Download an open_clip model from the Hub: configuration, tokenizer, model card and a single weight file.

    Args:
        repo_id: Hub id of the model.
        revision: Branch, tag or commit. None for the main branch.

    Returns:
        Folder of the downloaded files in the cache of huggingface_hub.

    Raises:
        ValueError: If the files can't be downloaded.
    """
    try:
        patterns = [*DOWNLOADED_PATTERNS, OPEN_CLIP_WEIGHT_FILES[0]]
        folder = Path(snapshot_download(repo_id, allow_patterns=patterns, revision=revision))
        # A repository may hold the same weights in several formats. The file names are tried one by one, so that only
        # one file is downloaded. A weight file has more than a gigabyte.
        for name in OPEN_CLIP_WEIGHT_FILES[1:]:
            if not any((folder / weight_file).is_file() for weight_file in OPEN_CLIP_WEIGHT_FILES):
                # The name of the snapshot folder is its commit. With it as the revision, the weights come from the same
                # commit as the other files, even if the repository has changed since.
                folder = Path(snapshot_download(repo_id, allow_patterns=[name], revision=folder.name))
    except (OSError, ValueError) as error:  # HTTP errors of the Hub are OSErrors
        raise ValueError(f"{repo_id} could not be fetched from the Hub: {_first_error_line(error)}") from error
    return folder


def read_open_clip_tensors_and_notes(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of an open_clip model from a checkpoint file, and collect notes for the user.

    A common prefix of the tensor names, such as "model.", is removed.

    Args:
        path: Checkpoint file in the format of safetensors or of `torch.save`.

    Returns:
        A tuple (tensors, notes). The tensors are a dictionary {tensor name: tensor in float32}. The notes are sentences
        about ignored entries of the file.

    Raises:
        ValueError: If the file can't be read, contains objects other than tensors, or does not contain exactly one
            open_clip model.
    """
    state = _load_checkpoint(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} does not contain a state_dict: a dictionary of names and tensors.")
    candidates = [key.removesuffix("logit_scale") for key in state if key.endswith("logit_scale")]
    prefixes = [prefix for prefix in candidates if any(key.startswith(f"{prefix}visual.") for key in state)]
    if len(prefixes) != 1:
        rule = "must contain one open_clip model (with tensors logit_scale and visual.*)"
        raise ValueError(f"{path} {rule}, found {len(prefixes)}.")
    prefix = prefixes[0]
    entries = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    tensors.pop(POSITION_IDS_NAME, None)
    outside = [key for key in state if not key.startswith(prefix)]
    note = f"Ignored entries of the training program that are not part of the model: {', '.join(outside)}."
    return {name: tensor.float() for name, tensor in tensors.items()}, [note] if outside else []


def _load_checkpoint(path: Path) -> Any:
    """Load a checkpoint file without executing code that it contains.

    Args:
        path: Checkpoint file in the format of safetensors or of `torch.save`.

    Returns:
        The content of the file, usually a dictionary of tensors.

    Raises:
        ValueError: If the file can't be read, or contains Python objects other than tensors and plain containers.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # PyTorch can list the Python objects in a checkpoint only if the file has its newer format, a zip archive.
        is_zip = zipfile.is_zipfile(path)
        unsafe_names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        if unsafe_names:
            code = f"torch.load({path.name!r}, weights_only=False)['state_dict'], {path.stem + '.safetensors'!r}"
            fault = f"it contains Python objects ({', '.join(sorted(unsafe_names))}), but only tensors are read"
            hint = f"If you trust the file, convert it where it was written: safetensors.torch.save_file({code})"
            raise ValueError(f"{fault}. {hint}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    # For damaged or malicious files, the readers raise errors of many types.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {_first_error_line(error)}") from error


def _load_and_check_tokenizer(name: str, config: CapivaraConfig) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and check that the text tower has all of its tokens and the same padding token.

    Args:
        name: Folder or Hub id of the tokenizer.
        config: Configuration of the model.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If the tokenizer can't be loaded, has more tokens than the text tower, or has another padding token.
    """
    # Some models name their tokenizer "xlm-roberta-base", an old Hub id that the Hub redirects. The current id is used
    # instead.
    source = BASE_TEXT_MODEL if name in BASE_TEXT_NAMES and not Path(name).is_dir() else name
    try:
        with wrap_tokenizer_errors("it"):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # for damaged folders, transformers raises errors of many types
        problem = f"The tokenizer {name!r} can't be loaded ({_first_error_line(error)})"
        raise ValueError(f"{problem}. Give another tokenizer with --tokenizer.") from error
    text_config = config.text_config
    if len(tokenizer) > text_config.vocab_size or tokenizer.pad_token_id != text_config.pad_token_id:
        actual = f"has {len(tokenizer)} tokens and the padding token {tokenizer.pad_token_id}"
        expected = f"the text tower has {text_config.vocab_size} and {text_config.pad_token_id}"
        hint = "Give the model's own tokenizer with --tokenizer"
        raise ValueError(f"The tokenizer {name!r} {actual}, but {expected}. {hint}.")
    return tokenizer


def _convert_write_and_verify_model(source: OpenClipSource, folder: Path) -> tuple[CapivaraModel, list[str]]:
    """Convert an open_clip model to a folder that transformers can load, in float32, and verify the converted model.

    Args:
        source: Files and settings of the model.
        folder: Empty folder to write to.

    Returns:
        The converted model, read back from the folder, and sentences for the user about the files that were used.

    Raises:
        ValueError: If the model can't be converted, the conversion changed a tensor, or the embeddings of random inputs
            are not finite or are equal to each other.
    """
    # The configuration is converted before the weights are read, so that errors in it are found early.
    config = to_capivara_config(source.model_cfg) if source.model_cfg else CapivaraConfig()
    image_processor = _to_image_processor(source.preprocess_cfg, config.vision_config.image_size)
    state, notes = read_open_clip_tensors_and_notes(source.weights)
    CapivaraProcessor(image_processor, _load_and_check_tokenizer(source.tokenizer, config)).save_pretrained(folder)
    subject = "The tensors of the checkpoint (without a config, the published architecture is assumed)"
    loading.build_save_only_model_from_tensors(to_capivara_state_dict(state), config, subject).save_pretrained(folder)
    if source.folder:
        loading.write_origin_card(source.folder, folder, ORIGIN_SENTENCE, source.repo_id)
    model, processor = loading.load_model(folder).eval(), loading.load_processor(folder)
    returned = to_open_clip_state_dict(model)
    # Compare the bits of the floats, as integers. Compared as floats, NaN would count as changed, because NaN is not
    # equal to itself.
    changed = returned.keys() ^ state.keys()
    for name in returned.keys() & state.keys():
        if not torch.equal(returned[name].view(torch.int32), state[name].view(torch.int32)):
            changed.add(name)
    if changed:
        names = loading.format_weight_names_for_error(changed)
        raise ValueError(f"The conversion changed tensors, so nothing was written: {names}.")
    for embeds in (embed_images(model, processor, random_images()), embed_texts(model, processor, random_texts())):
        # The condition is written with `not`, so that it also refuses NaN, because every comparison with NaN is false.
        if not (embeds[0] - embeds[1:]).abs().amax(dim=1).min() > 1e-6:
            fault = "embeddings of random images or texts are not finite, or do not differ"
            hint = "The file is damaged or does not contain a trained model"
            raise ValueError(f"{source.weights}: {fault}. {hint}.")
    return model, [f"Weights: {source.weights}; tokenizer: {source.tokenizer}", *notes]


def convert_to_folder(source: str, folder: Path, revision: str | None) -> str:
    """Convert an open_clip model to a folder that transformers can load, and return a digest of its weights.

    Args:
        source: "hf-hub:OWNER/NAME", folder of a model, or path of a checkpoint file.
        folder: Empty folder to write to.
        revision: Branch, tag or commit on the Hub. None for the main branch.

    Returns:
        Digest of the weights (`weights_digest`) as 32 hexadecimal digits.
    """
    # The cache of converted models, `capivara_common.hub_cache`, calls this function.
    files = _find_or_download_open_clip_files(source, revision=revision)
    return loading.weights_digest(_convert_write_and_verify_model(files, folder)[0])


# --- The command -----------------------------------------------------------------------------------------------------


@dataclass
class ConvertArguments:
    """Command-line arguments of `convert_open_clip`, which converts an open_clip model for transformers."""

    source: str = flag(
        ...,
        "Model in open_clip's format: hf-hub:OWNER/NAME, a folder, or a checkpoint file with the architecture of the "
        "published CAPIVARA model.",
        positional=True,
    )
    output: Path = flag(..., "Folder to create. If it exists, it must be empty.", positional=True)
    overwrite_output_dir: bool = flag(False, "Replace the output folder if it exists.")
    tokenizer: str | None = flag(
        None,
        "Hub id or folder of the tokenizer, used if SOURCE neither contains nor names one. "
        f"Default: {BASE_TEXT_MODEL}.",
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command: convert an open_clip model, and print which files were used and where the result is.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(ConvertArguments, __doc__, argv)
    print(*convert(**vars(args)), f"Written: {args.output}", sep="\n")


def convert(
    source: str, output: str | Path, tokenizer: str | None = None, overwrite_output_dir: bool = False
) -> list[str]:
    """Convert an open_clip model to a new folder that transformers can load, and verify the result.

    Args:
        source: "hf-hub:OWNER/NAME", folder of a model, or path of a checkpoint file with the architecture of the
            published CAPIVARA model.
        output: Folder to create. An existing folder must be empty.
        tokenizer: Folder or Hub id of a tokenizer, used if `source` neither contains nor names one. Default: the
            tokenizer of XLM-RoBERTa base.
        overwrite_output_dir: Replace an existing `output`, even if it has files.

    Returns:
        Sentences that tell the user which files were used and which entries were ignored.

    Raises:
        ValueError: If there is no such model, it can't be converted, or `output` has files. Then nothing is written.
    """
    with atomic_folder(Path(output), overwrite_output_dir) as folder:
        return _convert_write_and_verify_model(_find_or_download_open_clip_files(source, tokenizer), folder)[1]


if __name__ == "__main__":
    run_main_and_report_user_errors(main)

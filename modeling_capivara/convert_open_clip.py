"""open_clip's format and transformers': names of tensors and configurations both ways, and models of open_clip read.

    python -m modeling_capivara.convert_open_clip hf-hub:hiaac-nlp/CAPIVARA capivara-transformers

As `CapivaraModel.from_open_clip`, into a folder of one's own, without open_clip. Tensors alone are read, nothing of a
file is executed, and what is written is compared. `hub_upload.export` writes open_clip's format.
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
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import atomic_folder, read_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES

from .checks_capivara import check_sizes, wrap_tokenizer_errors
from .configuration_capivara import VISION_DEFAULTS, CapivaraConfig
from .image_processing_capivara import CapivaraImageProcessor
from .loading import (
    build_model_from_tensors,
    format_keys,
    load_config,
    load_model,
    load_processor,
    weights_digest,
    write_origin_card,
)
from .modeling_capivara import CapivaraModel
from .processing_capivara import CONTEXT_LENGTH, CapivaraProcessor
from .two_towers import embed_images, embed_texts, random_images, random_texts

BASE_TEXT_MODEL = "FacebookAI/xlm-roberta-base"
BASE_TEXT_NAMES = (BASE_TEXT_MODEL, "xlm-roberta-base")

# open_clip's name, or its beginning, and transformers'; {} is the number of a block of the vision transformer.
PARAMETER_NAMES = {
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # sic, in transformers
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
# The same of SigLIP: timm's image tower with attention pooling, and open_clip's own text tower.
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
# Of a block's attention open_clip has query, key and value in one tensor, in_proj_weight and in_proj_bias.
ATTENTION_PROJECTION_RE = re.compile(r"(.*_model\.encoder\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)")
# A constant (0, 1, 2, ...) that transformers before 4.31 saved with every text encoder; no model reads it any more.
POSITION_IDS_NAME = "text.transformer.embeddings.position_ids"


def to_capivara_state_dict(open_clip_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `CapivaraModel`, from those of open_clip's model; values and types stay.

    A name without counterpart stays what it is, for `load_state_dict(strict=True)` to refuse.
    """
    result = {}
    for name, tensor in open_clip_state.items():
        ours = _rename_parameter(name, PARAMETER_NAMES)
        if ours.startswith("vision_model.encoder.") and ".in_proj_" in ours:
            # Fewer than three: a part is missing, and named. A clone: safetensors refuses tensors that share memory.
            parts = zip("qkv", tensor.chunk(3), strict=False)
            result |= {ours.replace("in_proj_", f"{letter}_proj."): part.clone() for letter, part in parts}
        elif name == "visual.proj":
            result["visual_projection.weight"] = tensor.T.contiguous()
        else:
            result[ours] = tensor
    return result


def to_open_clip_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of open_clip's model, the other way, of CAPIVARA or SigLIP; ValueError for another image tower."""
    is_own, result, state = model.config.model_type == "capivara", {}, model.state_dict()
    names = {ours: theirs for theirs, ours in (PARAMETER_NAMES if is_own else SIGLIP_PARAMETER_NAMES).items()}
    is_vit = is_own and _is_vit(model.config)
    for name, tensor in state.items():
        theirs = _rename_parameter(name, names)
        if part := ATTENTION_PROJECTION_RE.fullmatch(name):
            if part[2] == "q":
                parts = [state[f"{part[1]}{letter}_proj.{part[3]}"] for letter in "qkv"]
                result[_rename_parameter(f"{part[1]}in_proj_{part[3]}", names)] = torch.cat(parts)
        elif is_vit and name == "visual_projection.weight":
            result["visual.proj"] = tensor.T.contiguous()
        elif not is_own and ".attn_pool.in_proj_" in theirs:  # of the pooling, query apart from key and value
            for part, values in {"q.": tensor[: len(tensor) // 3], "kv.": tensor[len(tensor) // 3 :]}.items():
                result[theirs.replace("in_proj_", part)] = values.clone()
        elif not is_own and theirs == "visual.trunk.pos_embed":
            result[theirs] = tensor[None]
        else:
            result[theirs] = tensor if is_own or not theirs.startswith("logit_") else tensor.reshape(())
    return result


def _rename_parameter(name: str, names: dict[str, str]) -> str:
    number, plain = BLOCK_NUMBER_RE.search(name), BLOCK_NUMBER_RE.sub("{}", name)
    for old, new in names.items():
        if plain == old or (old.endswith((".", "_")) and plain.startswith(old)):
            return (new + plain[len(old) :]).replace("{}", number[0] if number else "{}")
    return name


def build_open_clip_model(config: CapivaraConfig) -> nn.Module:
    """open_clip's own model of this architecture, random weights, evaluation mode; nothing is downloaded."""
    from open_clip.model import CustomTextCLIP

    with tempfile.TemporaryDirectory() as folder:
        config.text_config.save_pretrained(folder)
        model_cfg = to_open_clip_model_cfg(config, folder)
        model_cfg["text_cfg"]["hf_model_pretrained"] = False
        return CustomTextCLIP(**model_cfg).eval()


TEXT_MODEL_TYPES = ("xlm-roberta", "roberta", "bert")  # those that open_clip 3.3 can pool by the mean
# open_clip's fields of a ViT, transformers' names for them, and open_clip's defaults
VIT_FIELDS = {"layers": ("num_hidden_layers", 12), "width": ("hidden_size", 768)}
VIT_FIELDS |= {"patch_size": ("patch_size", 16), "image_size": ("image_size", 224)}
# Fields that change numbers and no tensor, and the values that are supported; a field that is absent has one of them.
# All other fields show in the names and shapes of the tensors, which have to fit.
SUPPORTED_VALUES: dict[str, tuple] = {
    **{"vision_cfg.pool_type": ("tok",), "vision_cfg.final_ln_after_pool": (False, None)},
    **dict.fromkeys(("vision_cfg.act_kwargs", "vision_cfg.norm_kwargs"), (None, {})),
    "vision_cfg.timm_model_name": (None, ""),  # timm's towers go the other way alone
    **{"text_cfg.hf_pooler_type": ("mean_pooler",), "text_cfg.context_length": (CONTEXT_LENGTH,)},
    **{"tokenizer_kwargs.clean": ("whitespace",), "tokenizer_kwargs.strip_sep_token": (False, None)},
    **{"preprocess_cfg.mode": ("RGB", None), "preprocess_cfg.resize_mode": ("shortest", None)},
    "preprocess_cfg.interpolation": ("bicubic", "bilinear", None),
}


def to_capivara_config(model_cfg: dict) -> CapivaraConfig:
    """The architecture that a `model_cfg` describes. Raises ValueError where it can't be built."""
    try:
        check_sizes(model_cfg)
        vision_cfg, text_cfg = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
        _check_supported("vision_cfg", vision_cfg)
        _check_supported("text_cfg", text_cfg)
        _check_supported("tokenizer_kwargs", text_cfg.get("tokenizer_kwargs") or {})
        vision = VISION_DEFAULTS | {ours: vision_cfg.get(name, own) for name, (ours, own) in VIT_FIELDS.items()}
        if not isinstance(side := vision["image_size"], int):
            raise_unsupported("vision_cfg.image_size", side, "one number of pixels")
        vision["num_attention_heads"] = vision["hidden_size"] // vision_cfg.get("head_width", 64)
        vision["intermediate_size"] = int(vision["hidden_size"] * vision_cfg.get("mlp_ratio", 4.0))
        vision["hidden_act"] = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
        kind = text_cfg.get("hf_proj_type", "mlp")
        options = {"projection_dim": model_cfg["embed_dim"], "text_projection_type": kind}
        starts = {name: model_cfg.get(f"init_{name}") for name in ("logit_scale", "logit_bias")}
        options |= {f"{name}_init_value": float(value) for name, value in starts.items() if value is not None}
        return CapivaraConfig(
            vision_config=vision, text_config=_load_text_config(text_cfg.get("hf_model_name")), **options
        )
    except Exception as error:  # fields that are missing or of another kind, and what the data classes raise
        reason = f"{type(error).__name__} " * (not isinstance(error, ValueError)) + " ".join(str(error).split())
        raise ValueError(f"model_cfg of {OPEN_CLIP_CONFIG} can't be: {reason}") from error


def to_open_clip_model_cfg(
    config: CapivaraConfig, text_model_name: str, image_size: int | None = None
) -> dict[str, Any]:
    """The `model_cfg` of an architecture; ValueError where open_clip has no way to state it.

    `text_model_name` is a folder or Hub id of the text tower's configuration, `image_size` in pixels a side: None is
    the ViT's own, 224 for a timm model (which does not state it).
    """
    if config.text_config.model_type not in TEXT_MODEL_TYPES:
        raise_unsupported(
            "text_config.model_type", config.text_config.model_type, f"one of {TEXT_MODEL_TYPES}", "config.json"
        )
    vision, model_cfg = config.vision_config, {"embed_dim": config.projection_dim}
    model_cfg |= {} if config.logit_bias_init_value is None else {"init_logit_bias": config.logit_bias_init_value}
    if not _is_vit(config):
        if vision.model_args or not vision.do_pooling:
            raise_unsupported(
                "vision_config.model_args", vision.model_args, "none, with do_pooling true", "config.json"
            )
        vision_cfg = {"timm_model_name": vision.architecture, "timm_pool": "", "timm_proj": "linear"}  # its own pooling
        vision_cfg["image_size"] = image_size or 224
    else:
        for name, known in {"hidden_act": ("gelu", "quick_gelu"), "layer_norm_eps": (1e-5,)}.items():
            if (value := getattr(vision, name)) not in known:
                raise_unsupported(f"vision_config.{name}", value, " or ".join(map(repr, known)), "config.json")
        if image_size not in (None, vision.image_size):
            raise_unsupported("crop_size.height", image_size, f"the image tower's {vision.image_size}", "the processor")
        ratio = vision.intermediate_size / vision.hidden_size
        if int(vision.hidden_size * ratio) != vision.intermediate_size:  # open_clip's own rounding
            ratio = (vision.intermediate_size + 0.5) / vision.hidden_size
        vision_cfg = {name: getattr(vision, ours) for name, (ours, _) in VIT_FIELDS.items()}
        vision_cfg |= {"head_width": vision.hidden_size // vision.num_attention_heads, "mlp_ratio": ratio}
        if vision.hidden_act == "quick_gelu":
            model_cfg["quick_gelu"] = True
    text_cfg = {"hf_model_name": text_model_name, "hf_tokenizer_name": BASE_TEXT_MODEL}
    text_cfg |= {"hf_proj_type": config.text_projection_type, "hf_pooler_type": "mean_pooler"}
    return {**model_cfg, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _is_vit(config: CapivaraConfig) -> bool:
    if (kind := config.vision_config.model_type) not in ("clip_vision_model", "timm_wrapper"):
        raise_unsupported("vision_config.model_type", kind, '"clip_vision_model" or "timm_wrapper"', "config.json")
    return kind == "clip_vision_model"


def _load_text_config(name: Any) -> PreTrainedConfig:
    if name in BASE_TEXT_NAMES:
        return CapivaraConfig().text_config  # known by heart: no network
    try:
        config = load_config(name, trust_remote_code=False) if isinstance(name, str) else None
    except (OSError, ValueError) as error:
        reason = f"{name!r}, where no text encoder's configuration is to be had ({first_error_line(error)})"
        raise ValueError(f"text_cfg.hf_model_name is {reason}; where a folder has moved, name its place.") from error
    if config is None or config.model_type not in TEXT_MODEL_TYPES:
        raise_unsupported("text_cfg.hf_model_name", name, f"text encoders of the types {', '.join(TEXT_MODEL_TYPES)}")
    return config


def to_image_processor(preprocess_cfg: dict, size: int) -> CapivaraImageProcessor:
    """The image processor of a `preprocess_cfg`, for squares of `size` pixels. Raises ValueError where it can't be."""
    _check_supported("preprocess_cfg", preprocess_cfg)
    return CapivaraImageProcessor(
        size={"shortest_edge": size},  # never the `size` that is given: open_clip takes the tower's, too
        crop_size={"height": size, "width": size},
        image_mean=preprocess_cfg.get("mean") or OPENAI_CLIP_MEAN,
        image_std=preprocess_cfg.get("std") or OPENAI_CLIP_STD,
        resample=PILImageResampling[(preprocess_cfg.get("interpolation") or "bicubic").upper()],
    )


def to_preprocess_cfg(processor: BaseImageProcessor) -> dict[str, Any]:
    """The `preprocess_cfg` of CAPIVARA's image processor or SigLIP's. ValueError where open_clip can't do the same."""
    found, is_own = processor.to_dict(), isinstance(processor, CapivaraImageProcessor)
    side = dict(processor.size).get("shortest_edge")
    fixed = dict.fromkeys(("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize"), True)
    fixed |= {"rescale_factor": 1 / 255, "crop_size": {"height": side, "width": side}}
    for name, value in fixed.items() if is_own else ():
        if found[name] != value:
            raise_unsupported(f"image_processor.{name}", found[name], str(value), "the processor")
    interpolation = PILImageResampling(processor.resample).name.lower()
    if interpolation not in SUPPORTED_VALUES["preprocess_cfg.interpolation"]:
        raise_unsupported("image_processor.resample", interpolation, "bicubic or bilinear", "the processor")
    cfg = {"mean": found["image_mean"], "std": found["image_std"], "interpolation": interpolation}
    return cfg | {"resize_mode": "shortest" if is_own else "squash"}


def _check_supported(section: str, fields: dict) -> None:
    for name, value in fields.items():
        supported = SUPPORTED_VALUES.get(f"{section}.{name}", (value,))
        if value not in supported:
            raise_unsupported(f"{section}.{name}", value, " or ".join(map(repr, supported)))


def raise_unsupported(field: str, value: Any, supported: str, file: str = OPEN_CLIP_CONFIG) -> NoReturn:
    """Raise ValueError about a field of the file `where`."""
    raise ValueError(f"{field} of {file} is {value!r}, which cannot be converted; supported: {supported}.")


TOKENIZER_SUFFIXES = (".json", ".model", ".txt")
VOCABULARY_FILES = ("tokenizer.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt")


@dataclass
class OpenClipSource:
    """An open_clip model, found but not yet read; of a bare checkpoint file there is neither `model_cfg` nor folder."""

    model_cfg: dict | None  # as in open_clip_config.json
    preprocess_cfg: dict
    weights: Path  # the checkpoint file
    tokenizer: str  # folder or Hub id
    folder: Path | None = None
    repo_id: str | None = None  # of the Hub, where it was fetched from there


def find_open_clip_model(source: str, tokenizer: str | None = None, revision: str | None = None) -> OpenClipSource:
    """Find an open_clip model (`hf-hub:OWNER/NAME`, folder or checkpoint file), downloading what is needed of it.

    `tokenizer` is a folder or Hub id, where `source` neither holds nor names one. ValueError where it is no such model.
    """
    repo_id = source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else None
    folder = _download_model(repo_id, revision) if repo_id else Path(source.removeprefix("local-dir:"))
    if folder.is_file():
        return OpenClipSource(None, {}, folder, tokenizer or BASE_TEXT_MODEL)
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        fault = f"has no {OPEN_CLIP_CONFIG}" if folder.exists() else "does not exist"
        way_out = "give hf-hub:OWNER/NAME, a folder or a file of open_clip's; hub_upload.export writes its format"
        raise ValueError(f"SOURCE {folder} {fault}; {way_out}.")
    settings = read_json(folder / OPEN_CLIP_CONFIG, model_cfg=dict)
    model_cfg, preprocess_cfg = settings["model_cfg"], settings.get("preprocess_cfg") or {}
    for name, section in {"preprocess_cfg": preprocess_cfg, "text_cfg": model_cfg.get("text_cfg")}.items():
        if not isinstance(section, dict):
            raise_unsupported(name, section, "fields in braces")
    weights = next((folder / name for name in OPEN_CLIP_WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"SOURCE {folder} has no weights; looked for {', '.join(OPEN_CLIP_WEIGHT_FILES)}.")
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARY_FILES)
    named = model_cfg["text_cfg"].get("hf_tokenizer_name") or tokenizer or BASE_TEXT_MODEL
    return OpenClipSource(model_cfg, preprocess_cfg, weights, str(folder) if has_tokenizer else named, folder, repo_id)


def first_error_line(error: BaseException) -> str:
    """The first line of an error's message; libraries append pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _download_model(repo_id: str, revision: str | None) -> Path:
    try:
        patterns = ["README.md", *(f"*{end}" for end in TOKENIZER_SUFFIXES), OPEN_CLIP_WEIGHT_FILES[0]]
        folder = Path(snapshot_download(repo_id, allow_patterns=patterns, revision=revision))
        for name in OPEN_CLIP_WEIGHT_FILES[1:]:  # one at a time: a second file of the same weights is over a gigabyte
            if not any((folder / found).is_file() for found in OPEN_CLIP_WEIGHT_FILES):
                # The snapshot folder is named by its commit: all files come from the same one.
                folder = Path(snapshot_download(repo_id, allow_patterns=[name], revision=folder.name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{repo_id} could not be fetched from the Hub: {first_error_line(error)}") from error
    return folder


def read_open_clip_state_dict(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of open_clip's model in a checkpoint file, in float32, and sentences that name what was left behind.

    All lies under one prefix, a Lightning module's, say. ValueError: it holds no such model, or more than tensors.
    """
    state = _load_checkpoint(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds no state_dict: a dictionary of names and tensors.")
    ends = [key.removesuffix("logit_scale") for key in state if key.endswith("logit_scale")]
    prefixes = [prefix for prefix in ends if any(key.startswith(f"{prefix}visual.") for key in state)]
    if len(prefixes) != 1:
        raise ValueError(f"{path} has {len(prefixes)} models of open_clip (logit_scale, visual.…) in it, not one.")
    prefix = prefixes[0]
    found = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    found = {name: t for name, t in found.items() if isinstance(t, Tensor) and name != POSITION_IDS_NAME}
    notes = []
    if outside := [key for key in state if not key.startswith(prefix)]:
        notes.append(f"Left behind, as the training program's own and not the model's: {', '.join(outside)}.")
    return {name: t.float() for name, t in found.items()}, notes


def _load_checkpoint(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = zipfile.is_zipfile(path)  # the older format, without a zip file around it, has no list of names
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []:
            code = f"torch.load({path.name!r}, weights_only=False)['state_dict'], {path.stem + '.safetensors'!r}"
            raise ValueError(
                f"it holds objects of a program ({', '.join(sorted(names))}), and tensors alone are read. If you trust "
                f"it, make a safetensors file where it was written: safetensors.torch.save_file({code})"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile file makes the readers raise anything at all
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_error_line(error)}") from error


def _load_tokenizer(name: str, config: CapivaraConfig) -> PreTrainedTokenizerBase:
    # The Hub sends who asks for the short name on to the long one.
    source = BASE_TEXT_MODEL if name in BASE_TEXT_NAMES and not Path(name).is_dir() else name
    try:
        with wrap_tokenizer_errors("it"):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged folder makes transformers raise anything at all
        fault = f"No tokenizer is to be had from {name!r} ({first_error_line(error)})"
        raise ValueError(f"{fault}; give another with --tokenizer.") from error
    wanted, facts = config.text_config, f"has {len(tokenizer)} tokens and pads with {tokenizer.pad_token_id}"
    if len(tokenizer) > wanted.vocab_size or tokenizer.pad_token_id != wanted.pad_token_id:
        tower = f"the text tower has {wanted.vocab_size} and pads with {wanted.pad_token_id}"
        raise ValueError(f"The tokenizer {name!r} {facts}, {tower}; give the model's own with --tokenizer.")
    return tokenizer


def write_capivara_model(
    open_clip_source: OpenClipSource, folder: Path, config: CapivaraConfig | None = None
) -> tuple[CapivaraModel, list[str]]:
    """Convert a model that was found into an empty folder, in float32, and compare what was written.

    A bare checkpoint file has the architecture `config`, or the published one. ValueError where it can't be converted,
    said before its weights are read, where a tensor came back changed, or embeddings of random inputs are none.
    Returned are the model as it was written, and sentences for the person who asked.
    """
    config = (
        to_capivara_config(open_clip_source.model_cfg) if open_clip_source.model_cfg else config or CapivaraConfig()
    )
    image_processor = to_image_processor(open_clip_source.preprocess_cfg, config.vision_config.image_size)
    state, notes = read_open_clip_state_dict(open_clip_source.weights)
    CapivaraProcessor(image_processor, _load_tokenizer(open_clip_source.tokenizer, config)).save_pretrained(folder)
    about = "The checkpoint's tensors (a bare file is taken to have the published architecture)"
    build_model_from_tensors(to_capivara_state_dict(state), config, about).save_pretrained(folder)
    if open_clip_source.folder:
        made = "Converted to transformers by `python -m modeling_capivara.convert_open_clip`, its weights as they were."
        write_origin_card(open_clip_source.folder, folder, made, open_clip_source.repo_id)
    model, processor = load_model(folder).eval(), load_processor(folder)
    returned, names = to_open_clip_state_dict(model), state.keys()
    # As whole numbers, since what is not a number is unequal to itself
    bits = {name: (returned[name].view(torch.int32), state[name].view(torch.int32)) for name in returned.keys() & names}
    if changed := {name for name in bits if not torch.equal(*bits[name])} | (returned.keys() ^ names):
        raise ValueError(f"Tensors were changed by the conversion, nothing was kept: {format_keys(changed)}.")
    for embeds in (embed_images(model, processor, random_images()), embed_texts(model, processor, random_texts())):
        if not (embeds[0] - embeds[1:]).abs().amax(dim=1).min() > 1e-6:  # also where it is not a number
            fault = "embeddings of random images or texts are not finite, or do not differ"
            raise ValueError(f"{open_clip_source.weights}: {fault}; the file is damaged, or holds no trained model.")
    return model, [f"Weights: {open_clip_source.weights}; tokenizer: {open_clip_source.tokenizer}", *notes]


def convert_to_folder(source: str, folder: Path, revision: str | None) -> str:
    """`write_capivara` of a source, for `capivara_common.hub_cache`; a digest of its weights."""
    return weights_digest(write_capivara_model(find_open_clip_model(source, revision=revision), folder)[0])


# --- The command -----------------------------------------------------------------------------------------------------


@dataclass
class ConvertArguments:
    """Flags of `modeling_capivara.convert_open_clip`."""

    source: str = flag(..., "hf-hub:OWNER/NAME, a folder, or a file of the published architecture.", positional=True)
    output: Path = flag(..., "Folder to create; must not exist, or be empty.", positional=True)
    overwrite_output_dir: bool = flag(False, "Replace the output folder.")
    tokenizer: str | None = flag(None, f"Where SOURCE has and names none: Hub id or folder, else {BASE_TEXT_MODEL}.")
    gone = dict.fromkeys(("to_open_clip", "hf_model_name"), "`hub_upload.export` writes open_clip's format")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(ConvertArguments, __doc__, argv)
    print(*convert(**vars(args)), f"Written: {args.output}", sep="\n")


def convert(
    source: str,
    output: str | Path,
    tokenizer: str | None = None,
    overwrite_output_dir: bool = False,
    config: CapivaraConfig | None = None,
) -> list[str]:
    """`write_capivara` of a source into a new folder that appears whole and checked, or not at all; its sentences."""
    with atomic_folder(Path(output), overwrite_output_dir) as folder:
        return write_capivara_model(find_open_clip_model(source, tokenizer), folder, config)[1]


if __name__ == "__main__":
    run_command(main)

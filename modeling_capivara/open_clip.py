"""open_clip's models and CAPIVARA's, both ways: names of tensors, configurations, folders. open_clip is not needed.

    write_capivara(find_open_clip("hf-hub:hiaac-nlp/CAPIVARA"), folder)

Every tensor that is written is compared with the source's; `convert_open_clip.py` compares what both programs make of
them. Weights are read from safetensors, or as tensors alone: nothing of a file is ever executed.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TimmWrapperConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from capivara_common.files import read_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES, Converter, first_line

from .checks_capivara import tokenizer_errors
from .configuration_capivara import VISION_DEFAULTS, CapivaraConfig
from .image_processing_capivara import CapivaraImageProcessor
from .loading import (
    checked_config,
    load_model,
    load_processor,
    model_of_tensors,
    read_config,
    weights_digest,
    write_origin_card,
)
from .modeling_capivara import CapivaraModel
from .processing_capivara import CONTEXT_LENGTH, CapivaraProcessor
from .two_towers import embed_images, embed_texts, random_images, random_texts

BASE_TEXT_MODEL = "FacebookAI/xlm-roberta-base"
BASE_TEXT_NAMES = (BASE_TEXT_MODEL, "xlm-roberta-base")


# --- Names of tensors ------------------------------------------------------------------------------------------------

# open_clip's name, or its beginning, and transformers'; {} is the number of a block of the vision transformer.
BLOCK, OUR_BLOCK = "visual.transformer.resblocks.{}.", "vision_model.encoder.layers.{}."
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
# Of a block's attention open_clip has query, key and value in one tensor, in_proj_weight and in_proj_bias.
PART = re.compile(r"(vision_model\.encoder\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)")
# A constant (0, 1, 2, ...) that transformers before 4.31 saved with every text encoder; no model reads it any more.
POSITION_IDS = "text.transformer.embeddings.position_ids"


def capivara_state_dict(open_clip_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `CapivaraModel`, from those of open_clip's model; values and types stay.

    A name without counterpart stays what it is, for `load_state_dict(strict=True)` to refuse.
    """
    result = {}
    for name, tensor in open_clip_state.items():
        ours = _renamed(name, NAMES)
        if ours.startswith("vision_model.encoder.") and ".in_proj_" in ours:
            for letter, part in zip("qkv", tensor.chunk(3), strict=False):  # fewer: a part is missing, and named
                # A clone: tensors that share memory are refused by safetensors.
                result[ours.replace("in_proj_", f"{letter}_proj.")] = part.clone()
        elif name == "visual.proj":
            result["visual_projection.weight"] = tensor.T.contiguous()
        elif name != POSITION_IDS:
            result[ours] = tensor
    return result


def open_clip_state_dict(model: CapivaraModel) -> dict[str, Tensor]:
    """The tensors of open_clip's model, the other way. Raises ValueError where it has no such image tower."""
    names = {ours: theirs for theirs, ours in NAMES.items()}
    vit = _vision_kind(model.config) == "clip_vision_model"
    result, state = {}, model.state_dict()
    for name, tensor in state.items():
        if part := PART.fullmatch(name):
            theirs = _renamed(f"{part[1]}in_proj_{part[3]}", names)
            if theirs not in result:
                result[theirs] = torch.cat([state[f"{part[1]}{x}_proj.{part[3]}"] for x in "qkv"])
        elif vit and name == "visual_projection.weight":
            result["visual.proj"] = tensor.T.contiguous()
        else:
            result[_renamed(name, names)] = tensor
    return result


def _renamed(name: str, names: dict[str, str]) -> str:
    number = NUMBER.search(name)
    plain = NUMBER.sub("{}", name)
    for old, new in names.items():
        if plain == old or (old.endswith(".") and plain.startswith(old)):
            return (new + plain[len(old) :]).replace("{}", number[0] if number else "{}")
    return name


def build_open_clip(config: CapivaraConfig) -> nn.Module:
    """open_clip's own model of this architecture, random weights, evaluation mode; nothing is downloaded."""
    from open_clip.model import CustomTextCLIP

    with tempfile.TemporaryDirectory() as folder:
        config.text_config.save_pretrained(folder)
        model_cfg = open_clip_model_cfg(config, folder)
        model_cfg["text_cfg"]["hf_model_pretrained"] = False
        return CustomTextCLIP(**model_cfg).eval()


# --- Configurations --------------------------------------------------------------------------------------------------

TEXT_KINDS = ("xlm-roberta", "roberta", "bert")  # those that open_clip 3.3 can pool by the mean
# What changes the size of a text tower
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
# open_clip's fields of a ViT that transformers has under another name
VIT = {"image_size": "image_size", "layers": "num_hidden_layers", "width": "hidden_size", "patch_size": "patch_size"}
# The fields that are read, by section: the kind of one that must be there, the default of one that need not, or all
# values that are supported, the default first. Every other field must be off, as it is unless open_clip is told
# otherwise, or is IGNORED: only training looks at it, or it means nothing beside `hf_model_name`.
FIELDS: dict[str, dict[str, Any]] = {
    "model_cfg": {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict, "quick_gelu": False, "init_logit_scale": 0.0},
    "vision_cfg": {
        **{"layers": 12, "width": 768, "patch_size": 16, "head_width": 64, "mlp_ratio": 4.0, "timm_model_name": ""},
        **{"pos_embed_type": ("learnable",), "pool_type": ("tok",), "timm_proj": ("linear",), "timm_pool": ("avg", "")},
    },
    "text_cfg": {
        **{"hf_model_name": str, "hf_pooler_type": ("mean_pooler",), "hf_proj_type": ("mlp", "linear")},
        **{"context_length": (CONTEXT_LENGTH,), "tokenizer_kwargs": {}},
    },
    "text_cfg.tokenizer_kwargs": {"clean": ("whitespace",)},
    "preprocess_cfg": {
        **{"mean": [*OPENAI_CLIP_MEAN], "std": [*OPENAI_CLIP_STD], "interpolation": ("bicubic", "bilinear")},
        **{"mode": ("RGB",), "resize_mode": ("shortest",)},
    },
}
IGNORED = {
    *("custom_text", "image_size", "hf_tokenizer_name", "tokenizer_type", "vocab_size", "heads", "pad_id", "eos_id"),
    *("patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "hf_model_pretrained"),
    *("attn_pooler_queries", "attn_pooler_heads"),
}
KINDS = {int: "a whole number from 1 (a ViT; ResNets are not supported)", float: "a number", str: "a name"}
KINDS |= {bool: "true or false", dict: "fields in braces", list: "three numbers"}


def capivara_config(model_cfg: dict) -> CapivaraConfig:
    """The architecture that a `model_cfg` describes. Raises ValueError about a field that is not supported."""
    fields = _fields("model_cfg", model_cfg)
    vision_cfg, text_cfg = (_fields(name, fields[name]) for name in ("vision_cfg", "text_cfg"))
    _fields("text_cfg.tokenizer_kwargs", text_cfg["tokenizer_kwargs"])
    if name := vision_cfg["timm_model_name"]:
        own = _timm_pool(name)
        if vision_cfg["timm_pool"] == "avg" and own not in ("avg", None):
            refuse("vision_cfg", "timm_pool", "avg", f'"", as the own pooling of {name} is {own!r}')
        vision = TimmWrapperConfig(architecture=name)
    else:
        heads, rest = divmod(vision_cfg["width"], vision_cfg["head_width"])
        if rest:
            refuse("vision_cfg", "width", vision_cfg["width"], f"a multiple of head_width, {vision_cfg['head_width']}")
        vision_cfg["image_size"] = _square(fields["vision_cfg"])
        vision = VISION_DEFAULTS | {ours: vision_cfg[theirs] for theirs, ours in VIT.items()}
        vision |= {"num_attention_heads": heads, "hidden_act": "quick_gelu" if fields["quick_gelu"] else "gelu"}
        vision["intermediate_size"] = int(vision_cfg["width"] * vision_cfg["mlp_ratio"])
    options = {"projection_dim": fields["embed_dim"], "text_projection_type": text_cfg["hf_proj_type"]}
    if model_cfg.get("init_logit_scale") is not None:
        options["logit_scale_init_value"] = float(fields["init_logit_scale"])
    text = _text_config(text_cfg["hf_model_name"])
    try:
        return CapivaraConfig(vision_config=vision, text_config=text, **options)
    except ValueError as error:
        raise ValueError(f"model_cfg of {OPEN_CLIP_CONFIG} can't be: {error}") from error


def open_clip_model_cfg(config: CapivaraConfig, text_model_name: str, image_size: int | None = None) -> dict[str, Any]:
    """The `model_cfg` of an open_clip_config.json for an architecture.

    Args:
        config: the architecture; ValueError where open_clip has no way to state it.
        text_model_name: folder or Hub id of the text tower's configuration.
        image_size: pixels a side; None is the ViT's own, 224 for a timm model (which does not state it).
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


def _vision_kind(config: CapivaraConfig) -> str:
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "timm_wrapper"):
        refuse("vision_config", "model_type", kind, '"clip_vision_model" or "timm_wrapper"', "config.json")
    return kind


def _vit_cfg(vision: PreTrainedConfig) -> dict[str, Any]:
    fixed = {"hidden_act": ("gelu", "quick_gelu"), "layer_norm_eps": (1e-5,), "num_channels": (3,)}
    for name, known in fixed.items():
        if (value := getattr(vision, name)) not in known:
            refuse("vision_config", name, value, " or ".join(map(repr, known)), "config.json")
    ratio = vision.intermediate_size / vision.hidden_size
    if int(vision.hidden_size * ratio) != vision.intermediate_size:  # open_clip's own rounding
        ratio = (vision.intermediate_size + 0.5) / vision.hidden_size
    sizes = {theirs: getattr(vision, ours) for theirs, ours in VIT.items()}
    return sizes | {"head_width": vision.hidden_size // vision.num_attention_heads, "mlp_ratio": ratio}


def _timm_pool(architecture: str) -> str | None:
    """How a timm model pools by itself ("avg", "token", ...); None where it does not say."""
    import timm

    if not timm.is_model(architecture):  # also keeps timm's own "hf-hub:" names, and so the network, out
        refuse("vision_cfg", "timm_model_name", architecture, f"the models that timm {timm.__version__} builds")
    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False)
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    return getattr(pool, "pool_type", pool)


def _text_config(name: str) -> PreTrainedConfig:
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


def image_processor_of(preprocess_cfg: dict, size: int) -> CapivaraImageProcessor:
    """The image processor of a `preprocess_cfg`, for squares of `size` pixels. Raises ValueError where it can't be."""
    # As open_clip reads it: null is absent, an unknown field is nothing, `size` is always that of the tower.
    given = {name: preprocess_cfg.get(name) for name in FIELDS["preprocess_cfg"]}
    cfg = _fields("preprocess_cfg", {name: value for name, value in given.items() if value is not None})
    for name in ("mean", "std"):
        if len(cfg[name]) != 3:
            refuse("preprocess_cfg", name, cfg[name], KINDS[list])
    return CapivaraImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=cfg["mean"],
        image_std=cfg["std"],
        resample=PILImageResampling[cfg["interpolation"].upper()],
    )


def preprocess_cfg_of(processor: CapivaraImageProcessor) -> tuple[int, dict[str, Any]]:
    """Side in pixels and `preprocess_cfg`. Raises ValueError where open_clip can't do what the processor does."""
    size, found = dict(processor.size).get("shortest_edge"), processor.to_dict()
    fixed = dict.fromkeys(("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize"), True)
    for name, value in (fixed | {"rescale_factor": 1 / 255, "crop_size": {"height": size, "width": size}}).items():
        if found[name] != value:
            refuse("image_processor", name, found[name], str(value), "the processor")
    interpolation = PILImageResampling(processor.resample).name.lower()
    if interpolation not in FIELDS["preprocess_cfg"]["interpolation"]:
        refuse("image_processor", "resample", interpolation, "bicubic or bilinear", "the processor")
    cfg = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    return size, {**cfg, "interpolation": interpolation, "resize_mode": "shortest"}


def _square(vision_cfg: dict) -> int:
    size = vision_cfg.get("image_size", 224)
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or size < 1:
        refuse("vision_cfg", "image_size", size, "one number of pixels, or the same twice")
    return size


def _fields(section: str, given: dict) -> dict[str, Any]:
    """The fields of a section, with open_clip's defaults. Raises ValueError about one that is not supported."""
    found = {}
    for name, known in FIELDS[section].items():
        if isinstance(known, tuple):
            found[name] = given.get(name, known[0])
            fits, supported = found[name] in known, " or ".join(map(repr, known))
        else:
            kind = known if isinstance(known, type) else type(known)
            found[name] = known if given.get(name) is None else given[name]
            fits = isinstance(found[name], int | float if kind is float else kind) and (
                kind is not int or found[name] > 0
            )
            supported = KINDS[kind]
        if not fits:
            refuse(section, name, given.get(name), supported)
    for name in sorted(given.keys() - found.keys() - IGNORED):
        if given[name] not in (None, False, ""):
            refuse(section, name, given[name], "null or false")
    return found


def refuse(section: str, name: str, value: Any, supported: str, where: str = OPEN_CLIP_CONFIG) -> NoReturn:
    """Raise ValueError about the field `name` in a `section` of the file `where`."""
    raise ValueError(f"{section}.{name} of {where} is {value!r}, which cannot be converted; supported: {supported}.")


# --- Where models are ------------------------------------------------------------------------------------------------

CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")
VOCABULARY_FILES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "tokenizer.json", "vocab.txt")
VOCABULARY_FILES += ("vocab.json",)


@dataclass
class OpenClipSource:
    """An open_clip model, found but not yet read."""

    model_cfg: dict | None  # as in open_clip_config.json; None for a bare checkpoint file
    preprocess_cfg: dict  # as in open_clip_config.json
    weights: Path  # the checkpoint file
    tokenizer: str  # folder or Hub id
    folder: Path | None = None  # that holds it; None for a bare checkpoint file
    repo_id: str | None = None  # of the Hub, where it was fetched from there


def find_open_clip(source: str, tokenizer: str | None = None, revision: str | None = None) -> OpenClipSource:
    """Find an open_clip model, downloading what is needed of it; the weights are not read.

    Args:
        source: `hf-hub:OWNER/NAME`, folder or checkpoint file; ValueError where it is no open_clip model.
        tokenizer: folder or Hub id, where `source` neither holds nor names one.
        revision: branch, tag or commit of a Hub id; the main branch where None.
    """
    if source.startswith("hf-hub:"):
        repo_id = source.removeprefix("hf-hub:")
        return _find_in_folder(_download(repo_id, revision), tokenizer, repo_id)
    path = Path(source.removeprefix("local-dir:"))
    if path.is_dir():
        return _find_in_folder(path, tokenizer)
    if not path.exists():
        raise ValueError(f"SOURCE {source} does not exist; give hf-hub:OWNER/NAME, a folder or a file.")
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"SOURCE {source} is no checkpoint file; those end in {', '.join(CHECKPOINT_SUFFIXES)}.")
    return OpenClipSource(None, {}, path, tokenizer or BASE_TEXT_MODEL)


def _find_in_folder(folder: Path, tokenizer: str | None, repo_id: str | None = None) -> OpenClipSource:
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        ours = (folder / "config.json").is_file()
        hint = "; config.json makes it a transformers folder: use --to-open-clip" if ours else ""
        raise ValueError(f"SOURCE {folder} has no {OPEN_CLIP_CONFIG}, so it is not an open_clip model{hint}.")
    settings = read_json(folder / OPEN_CLIP_CONFIG, model_cfg=dict)
    model_cfg, preprocess_cfg = settings["model_cfg"], settings.get("preprocess_cfg") or {}
    if not isinstance(preprocess_cfg, dict):
        refuse("settings", "preprocess_cfg", preprocess_cfg, KINDS[dict])
    text_cfg = _fields("model_cfg", model_cfg)["text_cfg"]
    weights = next((folder / name for name in OPEN_CLIP_WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"SOURCE {folder} has no weights; looked for {', '.join(OPEN_CLIP_WEIGHT_FILES)}.")
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARY_FILES)
    name = str(folder) if has_tokenizer else text_cfg.get("hf_tokenizer_name") or tokenizer or BASE_TEXT_MODEL
    return OpenClipSource(model_cfg, preprocess_cfg, weights, name, folder, repo_id)


def _download(repo_id: str, revision: str | None) -> Path:
    try:
        patterns = ["README.md", *(f"*{end}" for end in TOKENIZER_SUFFIXES), OPEN_CLIP_WEIGHT_FILES[0]]
        folder = Path(snapshot_download(repo_id, allow_patterns=patterns, revision=revision))
        for name in OPEN_CLIP_WEIGHT_FILES[1:]:  # one at a time: a second file of the same weights is over a gigabyte
            if not any((folder / found).is_file() for found in OPEN_CLIP_WEIGHT_FILES):
                # The snapshot folder is named by its commit: all files come from the same one.
                folder = Path(snapshot_download(repo_id, allow_patterns=[name], revision=folder.name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{repo_id} could not be fetched from the Hub: {first_line(error)}") from error
    return folder


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_open_clip_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of open_clip's model in a checkpoint file, and sentences that name what was left behind.

    All of the model lies under one prefix (DataParallel's, or of a Lightning module around it). Tensors outside it
    (metric states, losses) belong to the training program. Raises ValueError where the file holds no such model, or
    more than tensors.
    """
    checkpoint = _load_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds no state_dict: a dictionary of names and tensors.")
    ends = [key.removesuffix("logit_scale") for key in state if key.endswith("logit_scale")]
    prefixes = [prefix for prefix in ends if any(key.startswith(f"{prefix}visual.") for key in state)]
    if not prefixes:
        raise ValueError(
            f"{path} has no model of open_clip (logit_scale, visual.…); it has {', '.join([*state][:10])}."
        )
    if len(prefixes) > 1:
        raise ValueError(f"{path} holds several models, under the prefixes {prefixes}; keep one.")
    prefix = prefixes[0]
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    found.pop(POSITION_IDS, None)
    if others := [key for key, value in found.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} holds {', '.join(others)} among the tensors of the model, which are none.")
    notes = [f"The model lies under the prefix {prefix!r}."] if prefix else []
    if outside := [key for key in state if not key.startswith(prefix)]:
        notes.append(f"Left behind, as the training program's own and not the model's: {', '.join(outside)}.")
    if kinds := {str(t.dtype) for t in found.values() if t.is_floating_point()} - {"torch.float32"}:
        notes.append(f"Stored as {', '.join(sorted(kinds))}, written as float32.")
    return found, notes


def _load_checkpoint(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = zipfile.is_zipfile(path)  # the older format, without a zip file around it, has no list of names
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []:
            raise ValueError(
                f"it holds objects of a program ({', '.join(sorted(names))}), and tensors alone are read. If you trust "
                "it, make a safetensors file where it was written: safetensors.torch.save_file(torch.load("
                f"{path.name!r}, weights_only=False)['state_dict'], {path.stem + '.safetensors'!r})"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile file makes the readers raise anything at all
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error


def _load_tokenizer(name: str, config: CapivaraConfig) -> PreTrainedTokenizerBase:
    # The Hub sends who asks for the short name on to the long one.
    source = BASE_TEXT_MODEL if name in BASE_TEXT_NAMES and not Path(name).is_dir() else name
    try:
        with tokenizer_errors("it"):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged folder makes transformers raise anything at all
        raise ValueError(
            f"No tokenizer is to be had from {name!r} ({first_line(error)}); give another with --tokenizer."
        ) from error
    wanted = config.text_config
    if len(tokenizer) > wanted.vocab_size or tokenizer.pad_token_id != wanted.pad_token_id:
        raise ValueError(
            f"The tokenizer {name!r} has {len(tokenizer)} tokens and pads with {tokenizer.pad_token_id}, the text "
            f"tower has {wanted.vocab_size} and pads with {wanted.pad_token_id}; give the model's own with --tokenizer."
        )
    return tokenizer


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_open_clip_weights(model: CapivaraModel, folder: Path) -> None:
    """Write the weights under open_clip's names; only those that are joined or turned are copied in memory."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in open_clip_state_dict(model).items()}
    save_file(tensors, folder / OPEN_CLIP_WEIGHT_FILES[0], metadata={"format": "pt"})


def write_capivara(
    found: OpenClipSource, folder: Path, config: CapivaraConfig | None = None
) -> tuple[CapivaraModel, dict[str, Tensor], list[str]]:
    """Convert a model that was found into an empty folder, in float32, and check what was written.

    Args:
        found: the model; the `model_cfg` of a bare checkpoint is filled in. The new card names its origin.
        folder: to write to.
        config: architecture of a bare checkpoint file; None is the published base.

    Returns:
        The model as it was written; what was read, under open_clip's names and as it was stored; sentences for the
        person who asked.

    Raises:
        ValueError: it can't be converted, which is said before its weights are read, or a tensor came back changed.
    """
    if found.model_cfg is not None:
        config = capivara_config(found.model_cfg)
    else:
        config = config or CapivaraConfig()
        found.model_cfg = open_clip_model_cfg(config, BASE_TEXT_MODEL)
    image_processor = image_processor_of(found.preprocess_cfg, _square(found.model_cfg["vision_cfg"]))
    state, notes = read_open_clip_state(found.weights)
    CapivaraProcessor(image_processor, _load_tokenizer(found.tokenizer, config)).save_pretrained(folder)
    tensors = capivara_state_dict({name: _in_float32(tensor) for name, tensor in state.items()})
    about = "The checkpoint's tensors (a bare file is taken to have the published architecture)"
    model_of_tensors(tensors, config, about).save_pretrained(folder)
    del tensors  # those of the attention are copies
    if found.folder:
        made = "Converted to transformers by `python -m modeling_capivara.convert_open_clip`, its weights as they were."
        write_origin_card(found.folder, folder, made, found.repo_id)
    model = load_model(folder).eval()
    returned, names = open_clip_state_dict(model), state.keys()
    changed = {name for name in returned.keys() & names if not _same(returned[name], state[name])}
    if changed := changed | (returned.keys() ^ names):
        raise ValueError(f"Tensors were changed by the conversion, nothing was kept: {', '.join(sorted(changed))}.")
    return model, state, [f"Weights: {found.weights}; tokenizer: {found.tokenizer}", *notes]


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors hold the same bits, without a copy of them; not a number equals itself, too."""
    pair = [t.view(torch.int32) if t.is_floating_point() else t for t in (ours, _in_float32(theirs))]
    return ours.shape == theirs.shape and torch.equal(*pair)


def _convert(source: str, folder: Path, revision: str | None) -> str:
    """Without open_clip to compare with, embeddings of random inputs have to be what embeddings are."""
    found = find_open_clip(source, revision=revision)
    model, processor = write_capivara(found, folder)[0], load_processor(folder)
    images, texts = embed_images(model, processor, random_images()), embed_texts(model, processor, random_texts())
    for name, embeds in {"images": images, "texts": texts}.items():
        if not embeds.isfinite().all():
            raise ValueError(f"{found.weights}: the embeddings of random {name} are not finite; the file is damaged.")
        if (embeds[0] - embeds[1:]).abs().amax(dim=1).min() < 1e-6:
            raise ValueError(f"{found.weights}: different {name} have one embedding; the file holds no trained model.")
    return weights_digest(model)


# For `capivara_common.hub_cache.model_folder`
CONVERTER = Converter(_convert, explain=lambda folder: (load_processor(folder), read_config(folder)))

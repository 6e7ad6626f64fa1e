"""CAPIVARA between open_clip's format and transformers', both ways, checked on random inputs before it is kept.

    python -m modeling_capivara.convert_open_clip hf-hub:hiaac-nlp/CAPIVARA capivara-transformers
    python -m modeling_capivara.convert_open_clip capivara-transformers capivara-open-clip --to-open-clip

One file, longer than the others here: a conversion is one table of names and the checks around it, and the files that
travel to the Hub must not come to depend on it. It reads top to bottom: command, two directions, names of tensors,
fields of the configurations, checkpoint files, comparison.
"""

import argparse
import copy
import errno
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TimmWrapperConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from .configuration_capivara import VISION_DEFAULTS, CapivaraConfig
from .image_processing_capivara import CapivaraImageProcessor
from .modeling_capivara import CapivaraModel
from .processing_capivara import CONTEXT_LENGTH, CapivaraProcessor

TOLERANCE = 1e-4  # of cosines and logits in float32; the two programs differ by some 1e-6, a wrong layer by 1e-3 and up
BASE_TEXT_MODEL = "FacebookAI/xlm-roberta-base"
BASE_TEXT_NAMES = (BASE_TEXT_MODEL, "xlm-roberta-base")
OPEN_CLIP_CONFIG = "open_clip_config.json"
# In order of preference: a pickle is opened only where there is nothing safer.
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
VOCABULARY_FILES = (
    *("tokenizer.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json"),
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


@dataclass
class Conversion:
    """What a finished conversion has to say.

    Attributes:
        largest_difference: between the two programs, over cosines' embeddings and logits, on random inputs.
        notes: whole sentences for the person who asked.
    """

    largest_difference: float
    notes: list[str] = field(default_factory=list)


@dataclass
class OpenClipSource:
    """An open_clip model, found but not yet read.

    Attributes:
        model_cfg: as in open_clip_config.json; None for a bare checkpoint file.
        preprocess_cfg: as in open_clip_config.json.
        weights: the checkpoint file.
        tokenizer: folder or Hub id.
    """

    model_cfg: dict | None
    preprocess_cfg: dict
    weights: Path
    tokenizer: str


# --- Command ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_capivara.convert_open_clip",
        description="Convert a CAPIVARA model from open_clip to transformers, or back. Both models are then loaded "
        f"from files and compared on random images and texts; above a difference of {TOLERANCE:g} nothing is kept.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="hf-hub:OWNER/NAME, local-dir:FOLDER, or a checkpoint file (.safetensors, .bin, .pt, .pth, or the .ckpt "
        "of the authors' training program; read without executing anything). A bare file is taken to have the "
        "published architecture. With --to-open-clip: a transformers model folder or a Hub id.",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to create; must not exist, or be empty")
    parser.add_argument("--to-open-clip", action="store_true", help="convert from transformers to open_clip")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="tokenizer where SOURCE neither holds nor names one, as a bare file does not "
        f"(default: {BASE_TEXT_MODEL}); not with --to-open-clip",
    )
    parser.add_argument(
        "--hf-model-name",
        metavar="ID",
        help="with --to-open-clip: Hub id from which open_clip shall take the text tower's configuration, such as "
        f"{BASE_TEXT_MODEL}: for a folder to be published. Without it the configuration is written to "
        "OUTPUT/text_model, and OUTPUT works offline but must stay where it is.",
    )
    args = parser.parse_args(argv)
    try:
        result = convert(args.source, args.output, args.to_open_clip, args.tokenizer, args.hf_model_name)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"convert_open_clip: {error}") from error
    print(*result.notes, sep="\n")
    print(f"Largest difference between open_clip and transformers: {result.largest_difference:.2e}")
    print(f"Written: {args.output}")


def convert(
    source: str,
    output: str | Path,
    to_open_clip: bool = False,
    tokenizer: str | None = None,
    hf_model_name: str | None = None,
    config: CapivaraConfig | None = None,
) -> Conversion:
    """Convert `source` into the new folder `output`, which appears whole and checked, or not at all.

    Args:
        source: as for the command line.
        output: folder that does not exist yet, or is empty.
        to_open_clip: from transformers to open_clip, not the other way.
        tokenizer: folder or Hub id, where `source` neither holds nor names a tokenizer.
        hf_model_name: with `to_open_clip`, Hub id of the text tower's configuration.
        config: architecture of a bare checkpoint file; None is the published base.

    Raises:
        ValueError: the source is not what it should be, holds what is not supported, or the two models differ.
        OSError: the output exists, or cannot be written (disk full).
        ImportError: open_clip is not installed.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"OUTPUT {output} exists and is not an empty folder; remove it or name another.")
    if to_open_clip and (tokenizer or config):
        raise ValueError("--tokenizer is for the other direction; with --to-open-clip the tokenizer is SOURCE's own.")
    if hf_model_name and not to_open_clip:
        raise ValueError("--hf-model-name is for --to-open-clip only.")
    _open_clip()
    if to_open_clip:
        return _to_open_clip(source, output, hf_model_name)
    return _to_transformers(source, output, tokenizer, config)


# --- The two directions ----------------------------------------------------------------------------------------------


def _to_transformers(source: str, output: Path, tokenizer: str | None, config: CapivaraConfig | None) -> Conversion:
    found = find_open_clip(source, tokenizer)
    if found.model_cfg is not None:
        config = capivara_config(found.model_cfg)
    else:
        config = config or CapivaraConfig()
        found.model_cfg = open_clip_model_cfg(config, BASE_TEXT_MODEL)
    image_processor = _image_processor(found.preprocess_cfg, _square(found.model_cfg["vision_cfg"]))
    processor = CapivaraProcessor(image_processor, _load_tokenizer(found.tokenizer, config))
    state, notes = read_open_clip_state(found.weights, config)
    notes.insert(0, f"Weights: {found.weights}; tokenizer: {found.tokenizer}")
    with _new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        ours = capivara_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, config)
        CapivaraModel.from_pretrained(None, config=config, state_dict=ours).save_pretrained(folder)
        processor.save_pretrained(folder)
        del ours, state
        reference = _reference_folder(Path(scratch), found, config, processor.tokenizer)
        difference = _checked_difference(folder, reference, found.weights)
    return Conversion(difference, notes)


def _to_open_clip(source: str, output: Path, hf_model_name: str | None) -> Conversion:
    folder = _find_capivara(source)
    processor = _load_processor(folder)
    # Whatever cannot be said in open_clip's configuration is refused here, before the weights are read.
    size, preprocess_cfg = _preprocess_cfg(processor.image_processor)
    config = _load_config(folder)
    text_name = hf_model_name or str(output / "text_model")  # where it will be, not the temporary folder
    model_cfg = open_clip_model_cfg(config, text_name, size)
    model_cfg["text_cfg"]["hf_tokenizer_name"] = hf_model_name or BASE_TEXT_MODEL  # read for the Hub only
    tensors = {k: v.contiguous() for k, v in open_clip_state_dict(_load_capivara(folder)).items()}
    with _new_folder(output) as target, tempfile.TemporaryDirectory() as scratch:
        _write_json(target / OPEN_CLIP_CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
        save_file(tensors, target / WEIGHT_FILES[0], metadata={"format": "pt"})
        del tensors
        processor.tokenizer.save_pretrained(target)
        text_folder = Path(scratch) if hf_model_name else target / "text_model"
        config.text_config.save_pretrained(text_folder)
        difference = _checked_difference(folder, target, None, text_folder)
    return Conversion(difference, [_text_name_note(hf_model_name, text_name, config)])


def _text_name_note(hf_model_name: str | None, text_name: str, config: CapivaraConfig) -> str:
    if not hf_model_name:
        return (
            f"Text tower: open_clip reads its configuration from {text_name}. The folder loads offline; if it is moved, "
            f"change text_cfg.hf_model_name in {OPEN_CLIP_CONFIG}. To publish it, convert with --hf-model-name."
        )
    note = (
        f"Text tower: open_clip fetches its configuration from the Hub repository {hf_model_name}. The folder can be "
        "published; it needs the network, or that repository in the cache, and was checked with the model's own copy."
    )
    base = CapivaraConfig().text_config
    if hf_model_name in BASE_TEXT_NAMES and any(getattr(config.text_config, k) != getattr(base, k) for k in SIZES):
        note += f" Careful: this text tower is not of the size of {hf_model_name}."
    return note


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name at the end, or is removed on any error."""
    created = [parent for parent in output.parents if not parent.exists()]  # nearest first
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
    folder = scratch / "folder"  # mkdtemp's own is closed to other users, and would stay so
    try:
        folder.mkdir()
        yield folder
        os.replace(folder, output)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        # safetensors reports the system's error as text inside its own exception.
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            raise OSError(
                errno.ENOSPC, f"no space left for OUTPUT {output}; nothing was kept. Free space or name another disk"
            ) from error
        raise
    shutil.rmtree(scratch, ignore_errors=True)


# --- Names of tensors ------------------------------------------------------------------------------------------------

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
}
# The same inside a block of the vision transformer, after its number.
BLOCK_NAMES = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
OPEN_CLIP_BLOCK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.+)")
CAPIVARA_BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)")
PROJECTION = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
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
    _check_state(state, open_clip_shapes(config))
    result = {}
    for name, tensor in state.items():
        block = OPEN_CLIP_BLOCK.fullmatch(name)
        if block and block[2].startswith("attn.in_proj_"):
            kind = block[2].removeprefix("attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                # A clone: tensors that share memory are refused by safetensors.
                result[f"vision_model.encoder.layers.{block[1]}.self_attn.{letter}_proj.{kind}"] = part.clone()
        elif block:
            result[f"vision_model.encoder.layers.{block[1]}.{_renamed(block[2], BLOCK_NAMES)}"] = tensor
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
    block_names = {ours: theirs for theirs, ours in BLOCK_NAMES.items()}
    result, parts = {}, {}
    for name, tensor in model.state_dict().items():
        block = CAPIVARA_BLOCK.fullmatch(name) if vit else None
        projection = PROJECTION.fullmatch(block[2]) if block else None
        if projection:
            fused = f"visual.transformer.resblocks.{block[1]}.attn.in_proj_{projection[2]}"
            parts.setdefault(fused, {})[projection[1]] = tensor
        elif block:
            result[f"visual.transformer.resblocks.{block[1]}.{_renamed(block[2], block_names)}"] = tensor
        elif vit and name == "visual_projection.weight":
            result["visual.proj"] = tensor.T.contiguous()
        else:
            result[_renamed(name, names)] = tensor
    result.update({fused: torch.cat([letters[x] for x in "qkv"]) for fused, letters in parts.items()})
    return result


def open_clip_shapes(config: CapivaraConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of open_clip's model of this architecture; no memory is taken."""
    with torch.device("meta"):
        model = CapivaraModel(config)
    return {name: tensor.shape for name, tensor in open_clip_state_dict(model).items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name[len(old) :]
    raise ValueError(f"The tensor {name!r} has no counterpart in the other program.")


def _check_state(state: Mapping[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    problems = []
    if missing := sorted(shapes.keys() - state.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if surplus := sorted(state.keys() - shapes.keys()):
        problems.append(f"surplus: {', '.join(surplus)}")
    for name in sorted(shapes.keys() & state.keys()):
        if not isinstance(state[name], Tensor):
            problems.append(f"{name} is a {type(state[name]).__name__}, not a tensor")
        elif state[name].shape != shapes[name]:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, not {tuple(shapes[name])}")
    if problems:
        raise ValueError(
            "The checkpoint does not hold the model that its configuration describes (a bare file is taken to have the "
            "published architecture): " + "; ".join(problems)
        )


# --- Fields of the configurations ------------------------------------------------------------------------------------

# Fields of open_clip that only training, or only another kind of tower, looks at; and those with one way supported.
TRAINING_FIELDS = {"patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "hf_model_pretrained"}
VIT_FIELDS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
MODEL_FIXED = {"custom_text": (True, False, None), "init_logit_bias": (None,), "nonscalar_logit_scale": (False,)}
BLOCK_FIXED = {
    "block_type": (None,),
    "act_kwargs": (None,),
    "norm_kwargs": (None,),
    "ls_init_value": (None,),
    "output_tokens": (False,),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), (False,)),
    **dict.fromkeys(("scale_attn", "scale_fc", "final_ln_after_pool"), (False,)),
}
VISION_FIXED = {
    **BLOCK_FIXED,
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
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
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}
    _check_fields("model_cfg", model_cfg, MODEL_FIXED, known)
    for name, kind in {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}.items():
        if not isinstance(model_cfg.get(name), kind):
            _refuse("model_cfg", name, model_cfg.get(name), "a whole number" if kind is int else "fields in braces")
    init_logit_scale = model_cfg.get("init_logit_scale")
    if not isinstance(init_logit_scale, (int, float, type(None))):
        _refuse("model_cfg", "init_logit_scale", init_logit_scale, "a number")
    text_cfg = model_cfg["text_cfg"]
    if not text_cfg.get("hf_model_name"):
        _refuse("text_cfg", "hf_model_name", text_cfg.get("hf_model_name"), "a transformers text encoder")
    _check_fields("text_cfg", text_cfg, TEXT_FIXED, TEXT_FREE)
    _check_fields("text_cfg.tokenizer_kwargs", text_cfg.get("tokenizer_kwargs") or {}, TOKENIZER_FIXED, TOKENIZER_FREE)
    vision = _vision_config(model_cfg["vision_cfg"], bool(model_cfg.get("quick_gelu", False)))
    scale = {} if init_logit_scale is None else {"logit_scale_init_value": float(init_logit_scale)}
    return CapivaraConfig(
        vision_config=vision,
        text_config=_text_config(text_cfg["hf_model_name"]),
        projection_dim=model_cfg["embed_dim"],
        text_projection_type=text_cfg.get("hf_proj_type", "mlp"),  # "mlp" is open_clip's default too
        **scale,
    )


def open_clip_model_cfg(config: CapivaraConfig, text_model_name: str, image_size: int | None = None) -> dict[str, Any]:
    """The `model_cfg` of an open_clip_config.json for this architecture.

    Args:
        config: the architecture.
        text_model_name: folder or Hub id of the text tower's configuration.
        image_size: pixels a side; None is the ViT's own, 224 for a timm model (which does not state it).

    Raises:
        ValueError: the architecture cannot be said in open_clip's configuration.
    """
    if config.text_config.model_type not in TEXT_KINDS:
        _refuse("text_config", "model_type", config.text_config.model_type, f"one of {TEXT_KINDS}", "config.json")
    vision, model_cfg = config.vision_config, {"embed_dim": config.projection_dim}
    if _vision_kind(config) == "timm_wrapper":
        if vision.model_args or not vision.do_pooling:
            _refuse("vision_config", "model_args", vision.model_args, "none, with do_pooling true", "config.json")
        pool = "avg" if _timm_pool(vision.architecture) == "avg" else ""
        vision_cfg = {"timm_model_name": vision.architecture, "timm_pool": pool, "timm_proj": "linear"}
        vision_cfg["image_size"] = image_size or 224
    else:
        vision_cfg = _vit_cfg(vision)
        if image_size not in (None, vision.image_size):
            _refuse("crop_size", "height", image_size, f"the image tower's {vision.image_size}", "the processor")
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
        return _timm_config(vision_cfg)
    free = VIT_FIELDS | TRAINING_FIELDS | {"attn_pooler_queries", "attn_pooler_heads"} | set(TIMM_FIXED)
    _check_fields("vision_cfg", vision_cfg, VISION_FIXED, free - VISION_FIXED.keys())
    layers, width = vision_cfg.get("layers", 12), vision_cfg.get("width", 768)  # here and below: open_clip's defaults
    head_width, ratio = vision_cfg.get("head_width", 64), vision_cfg.get("mlp_ratio", 4.0)
    patch_size = vision_cfg.get("patch_size", 16)
    for name, value in {"layers": layers, "width": width, "head_width": head_width, "patch_size": patch_size}.items():
        if not isinstance(value, int) or value < 1:
            _refuse("vision_cfg", name, value, "a whole number from 1 (a ViT; ResNets are not supported)")
    if not isinstance(ratio, (int, float)) or not ratio > 0:
        _refuse("vision_cfg", "mlp_ratio", ratio, "a number above 0")
    if width % head_width:
        _refuse("vision_cfg", "width", width, f"a multiple of head_width, {head_width}")
    return {
        **VISION_DEFAULTS,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head_width,
        "intermediate_size": int(width * ratio),
        "patch_size": patch_size,
        "image_size": _square(vision_cfg),
    }


def _timm_config(vision_cfg: dict) -> TimmWrapperConfig:
    free = {"timm_model_name"} | VIT_FIELDS | TRAINING_FIELDS
    _check_fields("vision_cfg", vision_cfg, TIMM_FIXED, free)
    _square(vision_cfg)
    name = vision_cfg["timm_model_name"]
    own = _timm_pool(name)
    if vision_cfg.get("timm_pool", "avg") == "avg" and own not in ("avg", None):
        _refuse("vision_cfg", "timm_pool", "avg", f'"", as the own pooling of {name} is {own!r}')
    return TimmWrapperConfig(architecture=name)


def _timm_pool(architecture: str) -> str | None:
    """How a timm model pools by itself ("avg", "token", ...); None where it does not say."""
    import timm

    if not timm.is_model(architecture):  # also keeps timm's own "hf-hub:" names, and so the network, out
        _refuse("vision_cfg", "timm_model_name", architecture, f"the models that timm {timm.__version__} builds")
    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False)
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", None)
    return getattr(pool, "pool_type", pool)


def _vit_cfg(vision: PreTrainedConfig) -> dict[str, Any]:
    if vision.hidden_act not in ("gelu", "quick_gelu"):
        _refuse("vision_config", "hidden_act", vision.hidden_act, '"gelu" or "quick_gelu"', "config.json")
    if vision.layer_norm_eps != 1e-5:
        _refuse("vision_config", "layer_norm_eps", vision.layer_norm_eps, "1e-05", "config.json")
    if vision.num_channels != 3:
        _refuse("vision_config", "num_channels", vision.num_channels, "3", "config.json")
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
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text_cfg.hf_model_name of {OPEN_CLIP_CONFIG} is {name!r}; no text encoder's configuration is to be had "
            f"there ({_first_line(error)}). If the folder has moved, write its new place into that file."
        ) from error
    if config.model_type not in TEXT_KINDS:
        _refuse("text_cfg", "hf_model_name", f"{name} ({config.model_type})", f"model types {TEXT_KINDS}")
    return config


def _vision_kind(config: CapivaraConfig) -> str:
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "timm_wrapper"):
        _refuse("vision_config", "model_type", kind, '"clip_vision_model" or "timm_wrapper"', "config.json")
    return kind


def _image_processor(preprocess_cfg: dict, size: int) -> CapivaraImageProcessor:
    # As open_clip reads it: null is absent, an unknown field is nothing, `size` is always that of the tower.
    cfg = {k: v for k, v in preprocess_cfg.items() if v is not None}
    _check_fields("preprocess_cfg", {k: v for k, v in cfg.items() if k in PREPROCESS_FIXED}, PREPROCESS_FIXED, set())
    mean, std = cfg.get("mean", OPENAI_CLIP_MEAN), cfg.get("std", OPENAI_CLIP_STD)
    for name, value in {"mean": mean, "std": std}.items():
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            _refuse("preprocess_cfg", name, value, "three numbers")
    return CapivaraImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
        resample=PILImageResampling[cfg.get("interpolation", "bicubic").upper()],
    )


def _preprocess_cfg(processor: CapivaraImageProcessor) -> tuple[int, dict[str, Any]]:
    """Side in pixels and `preprocess_cfg`, of a processor that does what open_clip can do."""
    steps = ("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize")
    for name in steps:
        if not getattr(processor, name):
            _refuse("image_processor", name, False, "true", "the processor")
    size, crop = dict(processor.size).get("shortest_edge"), processor.crop_size
    if not size or (crop["height"], crop["width"]) != (size, size):
        _refuse(
            "image_processor", "crop_size", dict(crop), f"a square of size's shortest_edge, {size}", "the processor"
        )
    if processor.rescale_factor != 1 / 255:
        _refuse("image_processor", "rescale_factor", processor.rescale_factor, "1/255", "the processor")
    interpolation = PILImageResampling(processor.resample).name.lower()
    if interpolation not in PREPROCESS_FIXED["interpolation"]:
        _refuse("image_processor", "resample", interpolation, "bicubic or bilinear", "the processor")
    cfg = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    return size, {**cfg, "interpolation": interpolation, "resize_mode": "shortest"}


def _square(vision_cfg: dict) -> int:
    size = vision_cfg.get("image_size", 224)
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or size < 1:
        _refuse("vision_cfg", "image_size", size, "one number of pixels, or the same twice")
    return size


def _check_fields(section: str, values: dict, fixed: dict[str, tuple], free: set[str]) -> None:
    if not isinstance(values, dict):
        _refuse(*section.split(".")[:1], section, values, "fields in braces")
    for name, value in values.items():
        if name in fixed and value not in fixed[name]:
            _refuse(section, name, value, " or ".join(map(repr, fixed[name])))
        if name not in fixed and name not in free:
            _refuse(section, name, value, f"the fields {sorted({*fixed, *free})}")


def _refuse(section: str, name: str, value: Any, supported: str, where: str = OPEN_CLIP_CONFIG) -> NoReturn:
    raise ValueError(f"{section}.{name} of {where} is {value!r}, which cannot be converted; supported: {supported}.")


# --- Sources ---------------------------------------------------------------------------------------------------------


def find_open_clip(source: str, tokenizer: str | None = None) -> OpenClipSource:
    """Find an open_clip model, downloading what is needed of it; the weights are not read.

    Args:
        source: `hf-hub:OWNER/NAME`, `local-dir:FOLDER` or a checkpoint file.
        tokenizer: folder or Hub id, where `source` neither holds nor names one.

    Raises:
        ValueError: there is no such model, or it is not open_clip's.
    """
    if source.startswith("hf-hub:"):
        return _find_in_folder(_download_open_clip(source.removeprefix("hf-hub:")), tokenizer)
    if source.startswith("local-dir:"):
        return _find_in_folder(Path(source.removeprefix("local-dir:")), tokenizer)
    path = Path(source)
    if path.is_dir():
        hint = f"local-dir:{source}" if (path / OPEN_CLIP_CONFIG).exists() else f"{source} with --to-open-clip"
        raise ValueError(f"SOURCE {source} is a folder; did you mean {hint}?")
    if not path.exists():
        raise ValueError(f"SOURCE {source} does not exist; give hf-hub:OWNER/NAME, local-dir:FOLDER or a file.")
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"SOURCE {source} is no checkpoint file; those end in {', '.join(CHECKPOINT_SUFFIXES)}.")
    return OpenClipSource(None, {}, path, tokenizer or BASE_TEXT_MODEL)


def _find_in_folder(folder: Path, tokenizer: str | None) -> OpenClipSource:
    if not folder.is_dir():
        raise ValueError(f"SOURCE folder {folder} does not exist.")
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        hint = "; config.json makes it a transformers folder: use --to-open-clip" if _is_capivara(folder) else ""
        raise ValueError(f"SOURCE {folder} has no {OPEN_CLIP_CONFIG}, so it is not an open_clip model{hint}.")
    settings = _read_json(folder / OPEN_CLIP_CONFIG)
    model_cfg = settings.get("model_cfg")
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("text_cfg"), dict):
        _refuse("model_cfg", "text_cfg", model_cfg, "the fields of an open_clip model", str(folder / OPEN_CLIP_CONFIG))
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"SOURCE {folder} has no weights; looked for {', '.join(WEIGHT_FILES)}.")
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARY_FILES)
    named = model_cfg["text_cfg"].get("hf_tokenizer_name")
    name = str(folder) if has_tokenizer else named or tokenizer or BASE_TEXT_MODEL
    return OpenClipSource(model_cfg, settings.get("preprocess_cfg") or {}, weights, name)


def _download_open_clip(repo_id: str) -> Path:
    folder = _download(repo_id, [OPEN_CLIP_CONFIG, *TOKENIZER_FILES, WEIGHT_FILES[0]])
    for name in WEIGHT_FILES[1:]:  # one at a time: a second file of the same weights is over a gigabyte
        if any((folder / found).is_file() for found in WEIGHT_FILES):
            break
        # The snapshot folder is named by its commit: all files come from the same one.
        folder = _download(repo_id, [name], revision=folder.name)
    return folder


def _download(repo_id: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, revision=revision))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{repo_id} could not be fetched from the Hub: {_first_line(error)}") from error


def _find_capivara(source: str) -> Path:
    for prefix in ("local-dir:", "hf-hub:"):
        if source.startswith(prefix):
            raise ValueError(f"With --to-open-clip, SOURCE is a transformers model without {prefix!r} before it.")
    folder = Path(source)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        folder = _download(source, ["*.json", "model*.safetensors", *TOKENIZER_FILES])
    if not folder.is_dir():
        raise ValueError(f"SOURCE {source} is no folder and no Hub id; --to-open-clip needs a transformers model.")
    if not _is_capivara(folder):
        hint = f": it is an open_clip model, leave out --to-open-clip and give local-dir:{folder}"
        hint = hint if (folder / OPEN_CLIP_CONFIG).is_file() else ""
        raise ValueError(f'SOURCE {folder} has no config.json with model_type "capivara"{hint}.')
    return folder


def _is_capivara(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and _read_json(path).get("model_type") == "capivara"


def _load_config(folder: Path) -> CapivaraConfig:
    try:
        return CapivaraConfig.from_pretrained(folder)
    except (StrictDataclassError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"The config.json of {folder} is not valid: {_first_line(error)}") from error


def _load_capivara(folder: Path) -> CapivaraModel:
    """The model of a transformers folder, float32, evaluation mode, after a look at what loading reported."""
    try:
        model, report = CapivaraModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"The weights of {folder} cannot be read: {_first_line(error)}") from error
    # transformers only prints these, and leaves the weights random.
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"The weights of {folder} are not those of its config.json: {wrong}.")
    return model.eval()


def _load_processor(folder: Path) -> CapivaraProcessor:
    way_out = f"save it there with CapivaraProcessor.save_pretrained({str(folder)!r})"
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise ValueError(f"SOURCE {folder} has no processor, so its tokenizer and image steps are unknown; {way_out}.")
    try:
        return CapivaraProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"The processor of {folder} does not load: {_first_line(error)}; {way_out}.") from error


def _load_tokenizer(name: str, config: CapivaraConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"No tokenizer is to be had from {name!r} ({_first_line(error)}); give another with --tokenizer."
        ) from error
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer {name!r} has {len(tokenizer)} tokens, the text tower {config.text_config.vocab_size}; "
            "give the model's own with --tokenizer."
        )
    if tokenizer.pad_token_id != config.text_config.pad_token_id:
        raise ValueError(
            f"The tokenizer {name!r} pads with {tokenizer.pad_token_id}, the text tower with "
            f"{config.text_config.pad_token_id}; open_clip finds the padding by that number."
        )
    return tokenizer


# --- Checkpoint files ------------------------------------------------------------------------------------------------

# What training programs put before the names: nothing, DataParallel, and Lightning modules around open_clip's model.
PREFIXES = ("", "module.", "model.", "model.model.")


def read_open_clip_state(path: Path, config: CapivaraConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of open_clip's model in a checkpoint file, under open_clip's own names.

    All of the model lies under one prefix. Tensors outside it (metric states, losses of a Lightning module) belong to
    the training program; they are left behind and named. Without a prefix there is no outside: every key must fit.

    Returns:
        The tensors, and sentences that name what was left behind.

    Raises:
        ValueError: the file is no checkpoint, carries code, or does not hold the model of `config`.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds no state_dict: a dictionary of names and tensors.")
    shapes = open_clip_shapes(config)
    found = {p: sum(k.startswith(p) and k[len(p) :] in shapes for k in state) for p in PREFIXES}
    prefix = max(PREFIXES, key=found.__getitem__)
    if not found[prefix]:
        raise ValueError(f"{path} has no tensor of an open_clip model; it has {', '.join(list(state)[:10])} ...")
    whole = [p for p in PREFIXES if found[p] == len(shapes)]
    if len(whole) > 1:
        raise ValueError(f"{path} holds several whole models, under the prefixes {whole}; keep one.")
    model_state = {k[len(prefix) :]: tensor for k, tensor in state.items() if k.startswith(prefix)}
    model_state.pop(POSITION_IDS, None)
    _check_state(model_state, shapes)
    notes = []
    if prefix:
        notes.append(f"The model lies under the prefix {prefix!r}.")
    if outside := [k for k in state if not k.startswith(prefix)]:
        notes.append(f"Left behind, as the training program's own and not the model's: {', '.join(outside)}.")
    if kinds := {str(t.dtype) for t in model_state.values() if t.is_floating_point()} - {"torch.float32"}:
        notes.append(f"Stored as {', '.join(sorted(kinds))}, written as float32.")
    return model_state, notes


class InertObject:
    """Stands in for the classes of a training program's settings: takes any arguments and any state, keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict:
    """Stands in for kinds of dictionaries. torch fills items into nothing but `dict` and `OrderedDict` themselves."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict:
        return OrderedDict()


# Of Python's own modules, the data types that settings are made of. All else there is refused: it does things.
HARMLESS_STDLIB = {
    "argparse": {"Namespace"},
    "builtins": {"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "str"}
    | {"tuple", "slice", "range"},
    "collections": {"OrderedDict", "defaultdict"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "typing": {"Any", "Dict", "List", "Optional", "Tuple", "Union"},
    "types": {"SimpleNamespace"},
}
NUMPY_DATA = re.compile(r"numpy\.((_?core\.multiarray\.(scalar|_reconstruct))|dtype|ndarray|[a-z]+\d*_?)")
NUMPY_TYPES = {"dtype", "ndarray", "bool", "bool_", "str_", "bytes_"}
CLASS_NAME = re.compile(r"_?[A-Z]\w*")


def load_checkpoint(path: Path) -> dict:
    """What a checkpoint file holds, with every object that is neither tensor nor plain data replaced by an inert one.

    Nothing of the file is ever executed, and nothing it names is ever imported: torch's restricted unpickler looks
    names up in a table, and the table here has only `InertObject` and `InertDict` in it. Their methods are the whole
    of what a file can call. A name that is not that of a class of settings (`os.system`, `builtins.getattr`,
    `functools.partial`, any function) would be as inert, but a file that asks for it is not a checkpoint to trust, and
    is refused.

    Raises:
        ValueError: the file is damaged, no checkpoint, or refused.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The older format, without a zip file around it, has no list of names: torch's own table has to do.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        if refused := sorted(name for name in names if not _is_settings_class(name)):
            raise ValueError(
                f"it asks for {', '.join(refused)}, which is code, not data. If you made the file yourself, save its "
                "state_dict alone: torch.save(checkpoint['state_dict'], ...)"
            )
        stand_ins = [(InertDict if name.lower().endswith("dict") else InertObject, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file makes the readers raise anything at all
        raise ValueError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint's dictionary.")
    return checkpoint


def _is_settings_class(name: str) -> bool:
    module, _, last = name.rpartition(".")
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names:
        return last in HARMLESS_STDLIB.get(module, ())
    if root == "numpy" and NUMPY_DATA.fullmatch(name):
        return module != "numpy" or last in NUMPY_TYPES or last[-1:].isdigit()  # numpy.int64, not numpy.load
    return CLASS_NAME.fullmatch(last) is not None and not module.startswith("torch.hub")


# --- Comparison ------------------------------------------------------------------------------------------------------


def _reference_folder(
    scratch: Path, found: OpenClipSource, config: CapivaraConfig, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """An open_clip folder without weights that needs no network: the source's own fields, the text tower's beside."""
    model_cfg = copy.deepcopy(found.model_cfg)
    model_cfg["text_cfg"]["hf_model_name"] = str(scratch / "text_model")
    model_cfg["text_cfg"]["hf_tokenizer_name"] = BASE_TEXT_MODEL  # any name: a local folder's own tokenizer is taken
    config.text_config.save_pretrained(scratch / "text_model")
    _write_json(scratch / OPEN_CLIP_CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": found.preprocess_cfg})
    if Path(found.tokenizer).is_dir():
        for name in TOKENIZER_FILES:
            if (Path(found.tokenizer) / name).is_file():
                shutil.copy(Path(found.tokenizer) / name, scratch)
    else:
        tokenizer.save_pretrained(scratch)
    return scratch


def _checked_difference(
    capivara: Path, open_clip_folder: Path, weights: Path | None, text_folder: Path | None = None
) -> float:
    """Load both models from their folders and compare them.

    Args:
        capivara: transformers folder.
        open_clip_folder: open_clip folder.
        weights: open_clip's checkpoint file; None is the one in its folder, loaded by open_clip itself.
        text_folder: where the text tower's configuration lies for now, when not where the folder says.

    Raises:
        ValueError: the largest difference is above `TOLERANCE`.
    """
    open_clip = _open_clip()
    name, overrides = f"local-dir:{open_clip_folder}", {}
    if text_folder:
        text_cfg = _read_json(open_clip_folder / OPEN_CLIP_CONFIG)["model_cfg"]["text_cfg"]
        overrides["text_cfg"] = {**text_cfg, "hf_model_name": str(text_folder), "hf_model_pretrained": False}
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # "no pretrained weights": they come two lines below
    try:
        reference, _, preprocess = open_clip.create_model_and_transforms(
            name, load_weights=weights is None, pretrained_text=False, **overrides
        )
    finally:
        logging.disable(silenced)
    model, processor = _load_capivara(capivara), _load_processor(capivara)
    if weights is not None:
        reference.load_state_dict(read_open_clip_state(weights, model.config)[0], strict=True)
    difference = largest_difference(model, processor, reference, preprocess, open_clip.get_tokenizer(name))
    if not difference <= TOLERANCE:  # also when it is not a number
        raise ValueError(
            f"The converted model differs from the original by {difference:.3g} on random inputs, above {TOLERANCE:g}; "
            "nothing was kept. One of the two programs reads this model in another way."
        )
    return difference


@torch.no_grad()
def largest_difference(
    model: CapivaraModel,
    processor: CapivaraProcessor,
    reference: nn.Module,
    preprocess: Callable[[Image.Image], Tensor],
    tokenize: Callable[[list[str]], Tensor],
) -> float:
    """Largest difference of unit-length embeddings and of logits, on the same random images and texts.

    Args:
        model: ours.
        processor: ours; pads to the longest text.
        reference: open_clip's model.
        preprocess: open_clip's image transform.
        tokenize: open_clip's tokenizer; pads to 77 tokens.
    """
    model.eval()
    reference.eval()
    images, texts = random_images(), random_texts()
    ours = model(**processor(images=images, text=texts, return_tensors="pt"))
    image_embeds = reference.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    text_embeds = reference.encode_text(tokenize(texts), normalize=True)
    pairs = [(ours.image_embeds, image_embeds), (ours.text_embeds, text_embeds)]
    pairs.append((ours.logits_per_text, reference.logit_scale.exp() * text_embeds @ image_embeds.T))
    # torch's max, unlike Python's, passes NaN on.
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()


def random_images(seed: int = 0) -> list[Image.Image]:
    """Colour images of odd sizes, smaller and larger than towers take, one in grey and one with transparency."""
    numbers = np.random.default_rng(seed)
    shapes = [(37, 61, 3), (301, 199, 3), (224, 227, 3), (97, 450, 3), (130, 131), (259, 225, 4)]
    return [Image.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def random_texts(seed: int = 0) -> list[str]:
    """Portuguese-looking texts of 1 to 120 words: far below and above the length that is kept."""
    numbers = random.Random(seed)
    syllables = ("ca", "pi", "va", "ra", "ção", "ões", "nha", "lho", "ba", "tu", "gue", "mar", "é", "ão", "sol", "que")
    lengths = (1, 2, 5, 9, 30, 120)
    words = [["".join(numbers.choices(syllables, k=numbers.randint(1, 4))) for _ in range(n)] for n in lengths]
    return [" ".join(text) for text in words]


# --- Small things ----------------------------------------------------------------------------------------------------


def _open_clip() -> Any:
    try:
        import open_clip  # takes seconds, and only this program needs it
    except ImportError as error:
        raise ImportError("open_clip is needed to compare the two models: pip install open_clip_torch") from error
    return open_clip


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold fields, got a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

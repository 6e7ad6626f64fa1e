"""Where models come from: open_clip's and CAPIVARA's folders, files and Hub ids, and what their cards state.

Nothing is loaded but what a checkpoint file holds, and that without executing anything (`open_clip_checkpoint.py`).
"""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from capivara_common.hub_cache import first_line

from .checks_capivara import tokenizer_errors
from .configuration_capivara import CapivaraConfig
from .convert_open_clip_flags import BASE_TEXT_MODEL
from .loading import card_metadata
from .open_clip_checkpoint import OPEN_CLIP_CONFIG, WEIGHT_FILES, check_state, load_checkpoint
from .open_clip_mapping import BASE_TEXT_NAMES, POSITION_IDS, open_clip_shapes, refuse

CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
VOCABULARY_FILES = [f"{name}.model" for name in ("sentencepiece.bpe", "spiece", "tokenizer")]
VOCABULARY_FILES += ["tokenizer.json", "vocab.txt", "vocab.json"]
TOKENIZER_FILES = [f"{name}.json" for name in ("tokenizer_config", "special_tokens_map", "added_tokens")]
TOKENIZER_FILES += [*VOCABULARY_FILES, "merges.txt"]
KEPT = ("license", "license_name", "license_link", "language", "attribution")  # of the source's own card
CARD = """---
{metadata}---

# {title}

{made}
What the model is, how it was trained and under which licence it may be used is stated where it comes from.
"""
CONVERTED = (
    "Converted to transformers by `python -m modeling_capivara.convert_open_clip`, with the weights as they were."
)


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
        source: `hf-hub:OWNER/NAME`, `local-dir:FOLDER` or a checkpoint file.
        tokenizer: folder or Hub id, where `source` neither holds nor names one.
        revision: branch, tag or commit of a Hub id; the main branch where None.

    Raises:
        ValueError: there is no such model, or it is not open_clip's.
    """
    if source.startswith("hf-hub:"):
        repo_id = source.removeprefix("hf-hub:")
        return replace(_find_in_folder(_download_open_clip(repo_id, revision), tokenizer), repo_id=repo_id)
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
    settings = read_fields(folder / OPEN_CLIP_CONFIG)
    model_cfg = settings.get("model_cfg")
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("text_cfg"), dict):
        refuse("model_cfg", "text_cfg", model_cfg, "the fields of an open_clip model", str(folder / OPEN_CLIP_CONFIG))
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"SOURCE {folder} has no weights; looked for {', '.join(WEIGHT_FILES)}.")
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARY_FILES)
    named = model_cfg["text_cfg"].get("hf_tokenizer_name")
    name = str(folder) if has_tokenizer else named or tokenizer or BASE_TEXT_MODEL
    return OpenClipSource(model_cfg, settings.get("preprocess_cfg") or {}, weights, name, folder)


def _download_open_clip(repo_id: str, revision: str | None) -> Path:
    folder = _download(repo_id, [OPEN_CLIP_CONFIG, "README.md", *TOKENIZER_FILES, WEIGHT_FILES[0]], revision)
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
        raise ValueError(f"{repo_id} could not be fetched from the Hub: {first_line(error)}") from error


def find_capivara(source: str) -> Path:
    """The folder of a CAPIVARA model, by path or Hub id. Raises ValueError where it is none."""
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
    return path.is_file() and read_fields(path).get("model_type") == "capivara"


def load_tokenizer(name: str, config: CapivaraConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises ValueError where it does not fit the text tower of `config`."""
    # The Hub sends who asks for the short name on to the long one.
    source = BASE_TEXT_MODEL if name in BASE_TEXT_NAMES and not Path(name).is_dir() else name
    try:
        with tokenizer_errors("it"):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged folder makes transformers raise anything at all
        raise ValueError(
            f"No tokenizer is to be had from {name!r} ({first_line(error)}); give another with --tokenizer."
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
    check_state(model_state, shapes)
    notes = []
    if prefix:
        notes.append(f"The model lies under the prefix {prefix!r}.")
    if outside := [k for k in state if not k.startswith(prefix)]:
        notes.append(f"Left behind, as the training program's own and not the model's: {', '.join(outside)}.")
    if kinds := {str(t.dtype) for t in model_state.values() if t.is_floating_point()} - {"torch.float32"}:
        notes.append(f"Stored as {', '.join(sorted(kinds))}, written as float32.")
    return model_state, notes


def origin_card(folder: Path, repo_id: str | None = None, made: str = CONVERTED) -> str | None:
    """Text of README.md; None where nothing is known of the source.

    Args:
        folder: of the source; its README.md, if there is one, states the licence.
        repo_id: where on the Hub it was fetched from, which is the base of what is made from it; where None, the base
            is the one that the source's card names.
        made: what was done to it, a sentence.
    """

    def is_text(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))

    stated = {key: value for key, value in card_metadata(folder / "README.md").items() if is_text(value)}
    known = {"base_model": repo_id or stated.get("base_model"), **{key: stated.get(key) for key in KEPT}}
    known = {key: value for key, value in known.items() if value}
    if not known:
        return None
    about = {**known, "library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
    title = html.escape(repo_id or folder.resolve().name)
    return CARD.format(metadata=yaml_dump(about, sort_keys=False), title=title, made=made)


def read_fields(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError where it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold fields, got a {type(content).__name__}.")
    return content

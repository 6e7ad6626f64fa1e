"""Find models of the Hub on this machine, download them once, and convert open_clip models once.

A converted model lies in `cache_home()/open_clip/OWNER--NAME/COMMIT`; `refs/BRANCH` next to the commits names the
commit of a branch. Conversions are written atomically. Cached models are used without a request to the Hub, unless a
revision is requested that is a branch or tag. Of a local open_clip model, only the conversion of its last state is
kept.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock

from capivara_common.cli import coded_error
from capivara_common.environment import cache_home
from capivara_common.files import atomic_folder, read_json, write_json, write_text
from capivara_common.weight_file import find_weight_files

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHT_FILES = tuple(  # in order of preference
    f"open_clip_{name}" for name in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
)
# Two-tower models that all tools support: `model_type` in config.json -> name for messages
SUPPORTED_MODEL_TYPES = {
    "capivara": "CAPIVARA",
    "siglip": "SigLIP and SigLIP 2 of fixed resolution",
    "clip": "CLIP",
    "chinese_clip": "Chinese-CLIP",
    "altclip": "AltCLIP",
    "metaclip_2": "MetaCLIP 2",
}
# Older versions of transformers wrote the second file.
PROCESSOR_CONFIG_FILES = ("processor_config.json", "preprocessor_config.json")
SMALL_FILE_PATTERNS = ["*.json", "*.model", "*.txt"]
MODEL_FILE_PATTERNS = [*SMALL_FILE_PATTERNS, "model*.safetensors"]
HUB_TIMEOUT_S = 5  # seconds for each network operation of the request that tests whether the Hub has a model
DEFAULT_BRANCH = "main"
COMMIT_RE = re.compile(r"[0-9a-f]{40}")
CONVERSION_FILE = "conversion.json"  # records in a converted folder which model it was made from
# Called with source, target folder and revision; writes the converted model and returns the digest of its weights.
Converter = Callable[[str, Path, str | None], str]
logger = logging.getLogger("capivara")


def resolve_model_folder(source: str, convert: Converter, revision: str | None = None) -> Path:
    """Return a folder with a supported model in transformers' format; download or convert the model if necessary.

    Args:
        source: Folder, Hub id, or open_clip checkpoint file, optionally with the prefix `hf-hub:` or `local-dir:`.
        convert: Function that converts open_clip models. Called only for such models, because it imports torch.
        revision: Branch, tag or commit of a Hub id. Default: the cached version if there is one, else the main branch.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no such model, its type is not in `SUPPORTED_MODEL_TYPES`, or it can't be downloaded.
        OSError: If the disk is full.
    """
    name = source.removeprefix("local-dir:")
    path = Path(name).expanduser()
    if path.is_file() or ((path / OPEN_CLIP_CONFIG).is_file() and not is_complete_model(path)):
        return _convert_local_model(path.resolve(), convert)
    if path.exists():
        check_model(path, name)
        return path.resolve()
    if not is_hub_id(source):
        raise coded_error(ValueError, "no_model", "The model folder {model} does not exist.", model=name)
    repo_id = source.removeprefix("hf-hub:")
    may_have_moved = revision is not None and not COMMIT_RE.fullmatch(revision)  # true for branches and tags
    cached = None if may_have_moved else find_cached_model(repo_id, revision)
    return cached or _fetch_model(repo_id, convert, revision)


def find_cached_model(repo_id: str, revision: str | None = None) -> Path | None:
    """Return the folder of a Hub model that is cached on this machine, downloaded or converted; otherwise None."""
    snapshot = _cached_snapshot(repo_id, "config.json", revision)
    if snapshot and is_complete_model(snapshot):
        return snapshot
    folder = _conversion_folder(repo_id, revision or DEFAULT_BRANCH)
    return folder if is_complete_model(folder) else None


def is_reachable(repo_id: str) -> bool:
    """Return whether the model is cached or the Hub has it. Takes seconds; `HF_HUB_OFFLINE` suppresses the request."""
    with suppress(ValueError):
        check_reachable(repo_id)
        return True
    return False


def check_reachable(source: str | Path, *names: str, revision: str | None = None) -> None:
    """Check with a single short request that a model exists, before libraries retry for minutes.

    Args:
        source: Folder or Hub id. Names of local files and folders pass without a check.
        *names: Files of the model; if one of them is in the Hub's cache, no request is sent. Default: config.json.
        revision: Branch, tag or commit.

    Raises:
        ValueError: If the model is not cached, and the Hub has no such model or can't be reached.
    """
    source, names = str(source), names or ("config.json",)
    is_local = Path(source).exists() or not is_hub_id(source)  # the loader reports errors of local models
    if is_local or any(_cached_snapshot(source, name, revision) for name in names):
        return
    try:
        get_hf_file_metadata(hf_hub_url(source, names[0], revision=revision), timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            return  # the Hub is reachable: the loader reports what is missing or refused
        raise hub_access_error(source, error) from error


def is_hub_id(source: str) -> bool:
    """Return whether a source looks like a repository id, OWNER/NAME."""
    name = source.removeprefix("hf-hub:")
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def unsupported_reason(model_type: str | None) -> str | None:
    """Return why a `model_type` is not supported, with a list of the supported types; None if it is supported."""
    if model_type in SUPPORTED_MODEL_TYPES:
        return None
    supported = ", ".join(f"{name} ({title})" for name, title in SUPPORTED_MODEL_TYPES.items())
    explanation = " (SigLIP 2 of any resolution, NaFlex)" if model_type == "siglip2" else ""
    return f"model_type is {model_type!r}{explanation}; supported are {supported}"


def is_complete_model(folder: Path) -> bool:
    """Return whether a folder contains a complete supported model: config, processor and weights."""
    with suppress(ValueError):
        check_model(folder, folder)
        return True
    return False


def check_model(folder: Path, name: str | Path) -> None:
    """Check that a folder contains a complete supported model.

    Args:
        folder: The folder.
        name: Name of the model for error messages.

    Raises:
        ValueError: If a file is missing, or the type of the model is not supported.
    """
    if error := _model_error(folder, name):
        raise error
    find_weight_files(folder)


def _model_error(folder: Path, name: str | Path) -> ValueError | None:
    """Return the error of a model whose config or processor is missing or unsupported, else None."""
    file = "config.json"
    if (folder / file).is_file():
        model_type = None
        try:
            model_type = read_json(folder / file, model_type=str)["model_type"]
            reason = unsupported_reason(model_type)
        except ValueError as error:
            reason = str(error)
        if reason:
            text = "The config.json of {model} does not describe a supported two-tower model: {reason}"
            return coded_error(ValueError, "no_two_towers", text, model=name, reason=reason)
        file = PROCESSOR_CONFIG_FILES[0]
        candidates = PROCESSOR_CONFIG_FILES[:1] if model_type == "capivara" else PROCESSOR_CONFIG_FILES
        if any((folder / candidate).is_file() for candidate in candidates):
            return None
    text = "{model} is not a complete model of transformers or open_clip: {file} is missing."
    return coded_error(ValueError, "not_a_model", text, model=name, file=file)


def hub_access_error(source: str | Path, error: Exception) -> ValueError:
    """Return the error to raise for a model that could not be requested from the Hub.

    Args:
        source: The model.
        error: Exception of huggingface_hub or of the network.
    """
    if isinstance(error, RepositoryNotFoundError):
        text = (
            "There is no model {model}: it is not a folder, and the Hub has no model of that name that you may read. "
            "Check the name; a private or gated model needs `hf auth login`."
        )
        return coded_error(ValueError, "no_model_on_hub", text, model=source)
    if isinstance(error, HfHubHTTPError):
        text = "{model} could not be fetched from the Hub: {error}"
        return coded_error(ValueError, "not_fetched", text, model=source, error=" ".join(str(error).split()))
    text = (
        "The model {model} is not a folder and not in the Hub's cache ({cache}), and the Hub can't be reached "
        "({error}). Check the name, or the connection and HF_HUB_OFFLINE."
    )
    name = type(error.__cause__ or error).__name__
    return coded_error(ValueError, "no_hub", text, model=source, cache=constants.HF_HUB_CACHE, error=name)


def _fetch_model(repo_id: str, convert: Converter, revision: str | None) -> Path:
    """Download a model, convert it if it is in open_clip's format, and return its folder."""
    try:  # without a network, snapshot_download returns the cached files
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=SMALL_FILE_PATTERNS))
        logger.info("Downloading the model %s from the Hub, once …", repo_id, extra={"code": "downloading"})
        if not _model_error(folder, repo_id):
            folder = Path(snapshot_download(repo_id, revision=folder.name, allow_patterns=MODEL_FILE_PATTERNS))
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError) as error:
        raise hub_access_error(repo_id, error) from error
    if is_complete_model(folder) or not (folder / OPEN_CLIP_CONFIG).is_file():
        check_model(folder, repo_id)
        return folder
    commit, branch = folder.name, revision or DEFAULT_BRANCH
    folder = _conversion_folder(repo_id, commit)
    with cache_folder_lock(folder):
        if not is_complete_model(folder):
            _convert_model(f"hf-hub:{repo_id}", folder, convert, revision=commit)
        if branch != commit:
            write_text(folder.parent / "refs" / branch, commit)
    return folder


def _convert_model(source: str, folder: Path, convert: Converter, revision: str | None = None) -> None:
    """Convert an open_clip model into `folder`, and record its source."""
    logger.info("Converting %s from open_clip's format, once …", source, extra={"code": "converting"})
    with atomic_folder(folder, overwrite=True) as new:
        digest = convert(source, new, revision)
        write_json(new / CONVERSION_FILE, {"source": source, "revision": revision, "weights_digest": digest})


def _convert_local_model(path: Path, convert: Converter) -> Path:
    """Return the converted copy of a local open_clip folder or checkpoint file; convert again if its files changed."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    metadata = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    state = hashlib.blake2b(json.dumps(metadata).encode(), digest_size=16).hexdigest()
    name = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    parent = cache_home() / "open_clip" / f"{path.name}-{name}"
    folder = parent / state
    with cache_folder_lock(parent):
        if not is_complete_model(folder):
            _convert_model(f"local-dir:{path}" if path.is_dir() else str(path), folder, convert)
            for outdated in set(parent.iterdir()) - {folder}:
                shutil.rmtree(outdated)
    return folder


def _conversion_folder(repo_id: str, revision: str) -> Path:
    """Return the cache folder of a converted commit; a branch stands for the commit of its last conversion."""
    folder = cache_home() / "open_clip" / repo_id.replace("/", "--")
    with suppress(OSError, ValueError):
        revision = (folder / "refs" / revision).read_text(encoding="utf-8")
    return folder / revision


def _cached_snapshot(repo_id: str, name: str, revision: str | None = None) -> Path | None:
    """Return the snapshot folder of a revision in the Hub's cache if it contains the file `name`, else None."""
    path = try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def cache_folder_lock(folder: Path) -> AbstractContextManager:
    """Return a context manager that locks a cache folder, so that two processes don't convert the same model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(folder.parent / f".{folder.name}.lock")

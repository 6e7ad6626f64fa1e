"""Find Hub models in the cache of this machine, download missing models, and convert open_clip models.

Each model is downloaded and converted only once. A cached model is used without a request to the Hub, unless the caller
requests a branch or tag, which may have moved to another commit. If the files of a local open_clip model change, the
model is converted again.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock

from capivara_common.cli import make_coded_error
from capivara_common.environment import cache_home
from capivara_common.files import atomic_folder, json_digest, read_json, write_json, write_text
from capivara_common.model_kinds import get_supported_model_kind
from capivara_common.weight_file import find_weight_files

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHT_FILES = tuple(  # in order of preference
    f"open_clip_{name}" for name in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
)
# transformers writes the first file; older versions of transformers wrote the second file.
PROCESSOR_CONFIG_FILES = ("processor_config.json", "preprocessor_config.json")
SMALL_FILE_PATTERNS = ["*.json", "*.model", "*.txt"]
MODEL_FILE_PATTERNS = [*SMALL_FILE_PATTERNS, "model*.safetensors"]
HUB_TIMEOUT_S = 5  # time limit for connecting to the Hub, and for each read, when a model is looked up
DEFAULT_BRANCH = "main"
COMMIT_RE = re.compile(r"[0-9a-f]{40}")
CONVERSION_FILE = "conversion.json"  # file in the folder of a converted model that names the original model
# Function that converts a model. Its arguments are the source, the target folder and the revision (None for a local
# model). It writes the converted model and returns the digest of its weights. It is called only if a conversion is
# necessary, because it imports torch.
Converter = Callable[[str, Path, str | None], str]
logger = logging.getLogger("capivara")


def find_download_or_convert_model_folder(source: str, convert: Converter, revision: str | None = None) -> Path:
    """Return a local folder with a model in transformers' format, whatever the source of the model is.

    A Hub model is downloaded, and an open_clip model is converted, unless the result is in the cache.

    Args:
        source: Model folder, Hub id, or open_clip checkpoint file. A Hub id may have the prefix `hf-hub:`, a path the
            prefix `local-dir:`.
        convert: Function (source, target folder, revision or None) that converts an open_clip model to transformers'
            format and returns the digest of its weights.
        revision: Branch, tag or commit of a Hub model. Default: the cached version, otherwise the main branch.

    Returns:
        Path of the model folder.

    Raises:
        ValueError: If the model does not exist, can't be downloaded, is incomplete, or its type is not supported.
        OSError: If the disk is full.
    """
    name = source.removeprefix("local-dir:")
    path = Path(name).expanduser()
    if path.is_file() or ((path / OPEN_CLIP_CONFIG).is_file() and not is_complete_model(path)):
        return _get_or_convert_local_open_clip_model(path.resolve(), convert)
    if path.exists():
        _check_model_folder(path, name)
        return path.resolve()
    if not looks_like_hub_id(source):
        raise make_coded_error(ValueError, "no_model", "The model folder {model} does not exist.", model=name)
    repo_id = source.removeprefix("hf-hub:")
    may_have_moved = revision is not None and not COMMIT_RE.fullmatch(revision)  # True for a branch or tag
    cached = None if may_have_moved else find_cached_model(repo_id, revision)
    return cached or _download_hub_model_converting_open_clip(repo_id, convert, revision)


def find_cached_model(repo_id: str, revision: str | None = None) -> Path | None:
    """Find a Hub model in the cache of this machine, without a request to the Hub.

    Args:
        repo_id: Hub id, OWNER/NAME.
        revision: Branch, tag or commit. Default: the main branch.

    Returns:
        Folder with the model in transformers' format, which may be a converted copy. None if the model is not
        completely cached.
    """
    snapshot = _find_cached_hub_snapshot(repo_id, "config.json", revision)
    converted = _get_hub_model_conversion_folder(repo_id, revision or DEFAULT_BRANCH)
    return next((folder for folder in (snapshot, converted) if folder and is_complete_model(folder)), None)


def is_model_reachable(repo_id: str) -> bool:
    """Return whether a model is cached on this machine or exists on the Hub.

    If the model is not cached, a request is sent to the Hub, which may take up to `HUB_TIMEOUT_S` seconds. With the
    environment variable HF_HUB_OFFLINE, no request is sent.

    Args:
        repo_id: Hub id, OWNER/NAME.
    """
    with suppress(ValueError):
        check_hub_model_reachable(repo_id)
        return True
    return False


def check_hub_model_reachable(source: str | Path, *names: str, revision: str | None = None) -> None:
    """Check that a model exists before it is loaded, with at most one short request to the Hub.

    Local models are not checked. If one of the files `names` is in the cache, no request is sent.

    Args:
        source: Folder or Hub id of the model.
        *names: Names of files of the model, of which the Hub is asked for the first. Default: "config.json".
        revision: Branch, tag or commit. Default: the main branch.

    Raises:
        ValueError: If the model is not cached, and the Hub has no such model or can't be reached.
    """
    source, names = str(source), names or ("config.json",)
    # If the Hub can't be reached, the loading functions of other libraries retry for minutes.
    # A local model need not be checked here: if it is missing, loading it fails at once with a clear error message.
    is_local = Path(source).exists() or not looks_like_hub_id(source)
    if is_local or any(_find_cached_hub_snapshot(source, name, revision) for name in names):
        return
    try:
        get_hf_file_metadata(hf_hub_url(source, names[0], revision=revision), timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            return  # the Hub can be reached, so the function that loads the model reports the error soon
        raise _model_fetch_error(source, error) from None  # hide the cause, which the message names


def looks_like_hub_id(source: str) -> bool:
    """Return True if the name of a model has the form of a Hub id, OWNER/NAME, optionally with the prefix `hf-hub:`."""
    name = source.removeprefix("hf-hub:")
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def is_complete_model(folder: Path) -> bool:
    """Return whether a folder contains the config, processor and weights of a model of a supported type."""
    with suppress(ValueError):
        _check_model_folder(folder, folder)
        return True
    return False


def _check_model_folder(folder: Path, name: str | Path) -> None:
    """Check that a folder contains the config, processor and weights of a model of a supported type.

    Args:
        folder: Model folder.
        name: Name of the model for error messages.

    Raises:
        ValueError: If a file is missing, or the type of the model is not supported.
    """
    if error := _find_config_or_processor_error(folder, name):
        raise error
    find_weight_files(folder)


def _find_config_or_processor_error(folder: Path, name: str | Path) -> ValueError | None:
    """Check the config and the processor of a model, but not its weights.

    Args:
        folder: Model folder.
        name: Name of the model for error messages.

    Returns:
        The error to raise if a file is missing or the type of the model is not supported; otherwise None.
    """
    file = "config.json"
    if (folder / file).is_file():
        try:
            kind = get_supported_model_kind(read_json(folder / file, model_type=str))
        # TypeError and AttributeError are raised if a section of the config is not a dict.
        except (ValueError, TypeError, AttributeError) as error:
            text = "The config.json of {model} does not describe a supported two-tower model: {reason}"
            return make_coded_error(ValueError, "no_two_towers", text, model=name, reason=str(error))
        file = PROCESSOR_CONFIG_FILES[0]
        candidates = PROCESSOR_CONFIG_FILES[:1] if kind.is_native else PROCESSOR_CONFIG_FILES
        if any((folder / candidate).is_file() for candidate in candidates):
            return None
    text = "{model} is not a complete model of transformers or open_clip: {file} is missing."
    return make_coded_error(ValueError, "not_a_model", text, model=name, file=file)


def _model_fetch_error(source: str | Path, error: Exception) -> ValueError:
    """Return the error to raise if a model could not be fetched from the Hub.

    Args:
        source: Name of the model as the user gave it.
        error: Exception that huggingface_hub or the network library raised.

    Returns:
        ValueError whose message says whether the model does not exist, the Hub refused the request, or the Hub can't be
        reached.
    """
    if isinstance(error, RepositoryNotFoundError):
        text = (
            "There is no model {model}: it is not a folder, and the Hub has no model of that name that you may read. "
            "Check the name; a private or gated model needs `hf auth login`."
        )
        return make_coded_error(ValueError, "no_model_on_hub", text, model=source)
    if isinstance(error, HfHubHTTPError):
        text = "{model} could not be fetched from the Hub: {error}"
        return make_coded_error(ValueError, "not_fetched", text, model=source, error=" ".join(str(error).split()))
    text = (
        "The model {model} is not a folder and not in the Hub's cache ({cache}), and the Hub can't be reached "
        "({error}). Check the name, or the connection and HF_HUB_OFFLINE."
    )
    name = type(error.__cause__ or error).__name__
    return make_coded_error(ValueError, "no_hub", text, model=source, cache=constants.HF_HUB_CACHE, error=name)


def _download_hub_model_converting_open_clip(repo_id: str, convert: Converter, revision: str | None) -> Path:
    """Download a Hub model, and convert it if it is in open_clip's format.

    Args:
        repo_id: Hub id, OWNER/NAME.
        convert: Function that converts an open_clip model.
        revision: Branch, tag or commit. Default: the main branch.

    Returns:
        Folder of the downloaded model, or of its converted copy.

    Raises:
        ValueError: If the model can't be downloaded, is incomplete, or its type is not supported.
    """
    try:  # without a network, snapshot_download returns the cached files
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=SMALL_FILE_PATTERNS))
        logger.info("Downloading the model %s from the Hub, once …", repo_id, extra={"code": "downloading"})
        if not _find_config_or_processor_error(folder, repo_id):
            folder = Path(snapshot_download(repo_id, revision=folder.name, allow_patterns=MODEL_FILE_PATTERNS))
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError) as error:
        raise _model_fetch_error(repo_id, error) from None
    if is_complete_model(folder) or not (folder / OPEN_CLIP_CONFIG).is_file():
        _check_model_folder(folder, repo_id)
        return folder
    commit, branch = folder.name, revision or DEFAULT_BRANCH
    folder = _get_hub_model_conversion_folder(repo_id, commit)
    with lock_model_cache_folder(folder):
        if not is_complete_model(folder):
            _convert_open_clip_model(f"hf-hub:{repo_id}", folder, convert, revision=commit)
        if branch != commit:
            write_text(folder.parent / "refs" / branch, commit)
    return folder


def _convert_open_clip_model(source: str, folder: Path, convert: Converter, revision: str | None = None) -> None:
    """Convert an open_clip model, and record its source in the file `CONVERSION_FILE`.

    Args:
        source: Model to convert: `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, or the path of a checkpoint file.
        folder: Folder of the converted model. It is replaced if it exists.
        convert: Function that converts an open_clip model.
        revision: Commit of a Hub model; None for a local model.
    """
    logger.info("Converting %s from open_clip's format, once …", source, extra={"code": "converting"})
    with atomic_folder(folder, overwrite=True) as new:
        digest = convert(source, new, revision)
        write_json(new / CONVERSION_FILE, {"source": source, "revision": revision, "weights_digest": digest})


def _get_or_convert_local_open_clip_model(path: Path, convert: Converter) -> Path:
    """Convert a local open_clip model, unless a conversion of its current files is cached.

    Args:
        path: Folder or checkpoint file of the model.
        convert: Function that converts an open_clip model.

    Returns:
        Folder of the converted model in the cache. Conversions of earlier states of the files are removed.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    metadata = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    name = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    parent = cache_home() / "open_clip" / f"{path.name}-{name}"
    folder = parent / json_digest(metadata)
    with lock_model_cache_folder(parent):
        if not is_complete_model(folder):
            _convert_open_clip_model(f"local-dir:{path}" if path.is_dir() else str(path), folder, convert)
            for outdated in set(parent.iterdir()) - {folder}:
                shutil.rmtree(outdated)
    return folder


def _get_hub_model_conversion_folder(repo_id: str, revision: str) -> Path:
    """Return the cache folder for the converted copy of a Hub model. The folder need not exist.

    Args:
        repo_id: Hub id, OWNER/NAME.
        revision: Commit, branch or tag. A branch or tag stands for the commit that it had at the last conversion.
    """
    # A converted copy lies in `open_clip/OWNER--NAME/COMMIT`. The file `refs/BRANCH` in `OWNER--NAME` contains the
    # commit to which the branch pointed at the last conversion.
    folder = cache_home() / "open_clip" / repo_id.replace("/", "--")
    with suppress(OSError, ValueError):
        revision = (folder / "refs" / revision).read_text(encoding="utf-8")
    return folder / revision


def _find_cached_hub_snapshot(repo_id: str, name: str, revision: str | None = None) -> Path | None:
    """Return the folder in the Hub's cache that contains a downloaded file of a model.

    Args:
        repo_id: Hub id, OWNER/NAME.
        name: Name of the file, such as "config.json".
        revision: Branch, tag or commit. Default: the main branch.

    Returns:
        Folder with the files of the revision; None if the file is not in the cache.
    """
    path = try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def lock_model_cache_folder(folder: Path) -> AbstractContextManager:
    """Lock the cache folder of a model for a `with` block, so that two processes don't convert it at the same time.

    Args:
        folder: The cache folder. It need not exist. The lock is a file next to it.

    Returns:
        Context manager that waits for the lock, and holds it during the `with` block.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(folder.parent / f".{folder.name}.lock")

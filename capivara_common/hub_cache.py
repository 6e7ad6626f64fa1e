"""Models of the Hub on this machine: found without asking, fetched once, converted once where they are open_clip's.

A converted model lies in `cache_home()/open_clip/OWNER--NAME/COMMIT`, and the name of its branch beside it; it is there
whole or not at all. What is in the cache is used as it is, without a request; a revision asks the Hub for another one.
Of a folder of this machine, the state that was converted last is kept.
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
# Models of two towers that are taken everywhere: `model_type` -> which these are
SUPPORTED_MODEL_TYPES = {
    "capivara": "CAPIVARA",
    "siglip": "SigLIP and SigLIP 2 of fixed resolution",
    "clip": "CLIP",
    "chinese_clip": "Chinese-CLIP",
    "altclip": "AltCLIP",
    "metaclip_2": "MetaCLIP 2",
}
PROCESSOR_CONFIG_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
)  # the second as older versions of transformers wrote
SMALL_FILE_PATTERNS = ["*.json", "*.model", "*.txt"]
MODEL_FILE_PATTERNS = [*SMALL_FILE_PATTERNS, "model*.safetensors"]
HUB_TIMEOUT_S = 5  # of each step to learn whether the Hub is there, and has a model
DEFAULT_BRANCH = "main"
COMMIT_RE = re.compile(r"[0-9a-f]{40}")
CONVERSION_FILE = "conversion.json"  # in a converted folder: where it is from
Converter = Callable[[str, Path, str | None], str]  # writes a model of (source, folder, revision), and returns a digest
logger = logging.getLogger("capivara")


def resolve_model_folder(source: str, convert: Converter, revision: str | None = None) -> Path:
    """The folder of a model of two towers that is `TAKEN`, as transformers loads it; fetched where it is not here.

    Args:
        source: folder, Hub id, or checkpoint file of open_clip, with or without `hf-hub:` or `local-dir:` before it.
        convert: of models of open_clip, called only where one is met, since it imports torch.
        revision: branch, tag or commit of a Hub id; where None, what is in the cache, else the main branch.

    Raises:
        ValueError: there is no such model, it is of another kind, or it can't be fetched.
        OSError: no space is left for it.
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
    asks = revision is not None and not COMMIT_RE.fullmatch(revision)  # a branch or tag may have moved
    return (None if asks else find_cached_model(repo_id, revision)) or _fetch_model(repo_id, convert, revision)


def find_cached_model(repo_id: str, revision: str | None = None) -> Path | None:
    """The folder of a model of the Hub that is on this machine, as it is or converted; None where it is not."""
    if (found := _cached_snapshot(repo_id, "config.json", revision)) and is_complete_model(found):
        return found
    folder = _conversion_folder(repo_id, revision or DEFAULT_BRANCH)
    return folder if is_complete_model(folder) else None


def is_reachable(repo_id: str) -> bool:
    """Whether the Hub answers within seconds, and has the model; not asked with `HF_HUB_OFFLINE`."""
    with suppress(ValueError):
        check_reachable(repo_id)
        return True
    return False


def check_reachable(source: str | Path, *names: str, revision: str | None = None) -> None:
    """Ask once, for seconds, whether a model is there, before libraries that would try again for minutes.

    One file of `names`, config.json where none is given, in the Hub's cache will do without the Hub.

    Raises:
        ValueError: it is no folder and not in the cache, and the Hub has no such model or can't be reached.
    """
    source, names = str(source), names or ("config.json",)
    known = Path(source).exists() or not is_hub_id(source)  # the loader raises the error
    if known or any(_cached_snapshot(source, name, revision) for name in names):
        return
    try:
        get_hf_file_metadata(hf_hub_url(source, names[0], revision=revision), timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            return  # the Hub answers: the loader raises what is missing or refused
        raise hub_access_error(source, error) from error


def is_hub_id(source: str) -> bool:
    """Whether it may be the name of a repository, owner/name."""
    name = source.removeprefix("hf-hub:")
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def unsupported_reason(model_type: str | None) -> str | None:
    """What is to be said of a model of this `model_type`: None where it is `TAKEN`; else all that are."""
    own = " (SigLIP 2 of any resolution, NaFlex)" if model_type == "siglip2" else ""
    known = ", ".join(f"{name} ({title})" for name, title in SUPPORTED_MODEL_TYPES.items())
    return None if model_type in SUPPORTED_MODEL_TYPES else f"model_type is {model_type!r}{own}; taken are {known}"


def is_complete_model(folder: Path) -> bool:
    """Whether a folder holds a whole model that is `TAKEN`: settings, processor and weights."""
    with suppress(ValueError):
        check_model(folder, folder)
        return True
    return False


def check_model(folder: Path, name: str | Path) -> None:
    """Raise ValueError, with what is missing or wrong, unless a folder, called `name`, holds a whole model."""
    if fault := _model_error(folder, name):
        raise fault
    find_weight_files(folder)


def _model_error(folder: Path, name: str | Path) -> ValueError | None:
    """What is to be said of a model, called `name`, whose settings or processor are missing or of no kind `TAKEN`."""
    file = "config.json"
    if (folder / file).is_file():
        kind = None
        try:
            fault = unsupported_reason(kind := read_json(folder / file, model_type=str)["model_type"])
        except ValueError as error:
            fault = str(error)
        if fault:
            text = "The config.json of {model} is of no model of two towers: {reason}"
            return coded_error(ValueError, "no_two_towers", text, model=name, reason=fault)
        file = PROCESSOR_CONFIG_FILES[0]
        if any((folder / one).is_file() for one in PROCESSOR_CONFIG_FILES[: 1 if kind == "capivara" else 2]):
            return None
    text = "{model} holds no whole model, of transformers or open_clip: {file} is missing."
    return coded_error(ValueError, "not_a_model", text, model=name, file=file)


def hub_access_error(source: str | Path, error: Exception) -> ValueError:
    """What is to be said where the Hub was asked for a model, and `error` was the answer."""
    if isinstance(error, RepositoryNotFoundError):
        text = (
            "There is no model {model}: it is no folder here, and the Hub has none of that name for you. Check the "
            "name; a private or gated one needs `hf auth login`."
        )
        return coded_error(ValueError, "no_model_on_hub", text, model=source)
    if isinstance(error, HfHubHTTPError):
        text = "{model} could not be fetched from the Hub: {error}"
        return coded_error(ValueError, "not_fetched", text, model=source, error=" ".join(str(error).split()))
    text = (
        "The model {model} is no folder here, nor in the cache of the Hub ({cache}), and the Hub can't be reached "
        "({error}). Check the name, or the connection and HF_HUB_OFFLINE."
    )
    name = type(error.__cause__ or error).__name__
    return coded_error(ValueError, "no_hub", text, model=source, cache=constants.HF_HUB_CACHE, error=name)


def _fetch_model(repo_id: str, convert: Converter, revision: str | None) -> Path:
    try:  # without the network, what is in the cache of the Hub serves
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
    logger.info("Converting %s from open_clip's format, once …", source, extra={"code": "converting"})
    with atomic_folder(folder, overwrite=True) as new:
        digest = convert(source, new, revision)
        write_json(new / CONVERSION_FILE, {"source": source, "revision": revision, "weights_digest": digest})


def _convert_local_model(path: Path, convert: Converter) -> Path:
    """Of a folder or checkpoint file of open_clip; made anew where the files have changed."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    known = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    state = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
    name = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    place = cache_home() / "open_clip" / f"{path.name}-{name}"
    with cache_folder_lock(place):
        if not is_complete_model(place / state):
            _convert_model(f"local-dir:{path}" if path.is_dir() else str(path), place / state, convert)
            for old in set(place.iterdir()) - {place / state}:
                shutil.rmtree(old)
    return place / state


def _conversion_folder(repo_id: str, revision: str) -> Path:
    """Where a commit is kept that was converted; of a branch, the commit that it led to then, as a file has it."""
    folder = cache_home() / "open_clip" / repo_id.replace("/", "--")
    with suppress(OSError, ValueError):
        revision = (folder / "refs" / revision).read_text(encoding="utf-8")
    return folder / revision


def _cached_snapshot(repo_id: str, name: str, revision: str | None = None) -> Path | None:
    """The folder of a revision in the Hub's cache, where a file of that name is in it."""
    found = try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def cache_folder_lock(folder: Path) -> AbstractContextManager:
    """Wait until no other process works on a folder of the cache: a conversion is not done twice at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(folder.parent / f".{folder.name}.lock")

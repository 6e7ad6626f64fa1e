"""What may leave this machine: an allow-list of the files of a model or data set, and a look into them for what must
stay here."""

import io
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image
from huggingface_hub.utils import validate_repo_id

from capivara_common.files import check_links_stay_inside
from capivara_common.image_files import IMAGE_FORMATS
from capivara_common.privacy import (
    SECRET_RE2,
    find_hub_tokens,
    find_machine_path,
    find_secret,
    local_paths,
    make_printable,
)

_MODEL_CODE_PARTS = "checks configuration image_processing modeling processing text_cleaning tokenization"
MODEL_CODE = tuple(f"{part}_capivara.py" for part in _MODEL_CODE_PARTS.split())
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt"),
)
RUN_PLOT_FILES = ("curves.png", "retrieval.png")  # of a training run
# A star stands for any part of one name, never for a folder. Export and upload know no other list.
ALLOWED_FILES = (
    *("config.json", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES, *MODEL_CODE),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "rotation.safetensors"),
    *("open_clip_config.json", "open_clip_model.safetensors", "text_model/config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Normalize/config.json"),
    *("1_Pooling/config.json", "*_Dense/config.json", "*_Dense/model.safetensors"),
    *("open_clip_text.safetensors", "drop_in.json"),
    *("onnx/*.onnx", "onnx/*.onnx.data", "onnx/*.onnx_data", "onnx/*.onnx_data_*", "onnx/quantisation.json"),
    *("textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json"),  # Immich's
    *("visual/model.onnx", "visual/preprocess_cfg.json"),
    *("README.md", "LICENSE", "run.json", "results/*.json", *RUN_PLOT_FILES),
)
# Pieces of a vocabulary may look like paths.
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
BINARY_SUFFIXES = (
    *(".safetensors", ".onnx", ".data", ".onnx_data", ".onnx_data_1", ".model"),
    *(".png", ".jpg", ".jpeg", ".webp", ".tar"),
)
SEARCH_CHUNK_BYTES = 2**24
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # of safetensors; its own reader takes no more


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless it is `owner/name` as the Hub takes it."""
    if repo_id.count("/") != 1:
        raise ValueError(
            f"The repository id must be owner/name, such as my-name/my-model, got {make_printable(repo_id)!r}."
        )
    validate_repo_id(repo_id)


def list_files_to_send(folder: Path, repo_type: str) -> list[Path]:
    """The files of a folder that may leave this machine, relative to it, in order; no secret is in them.

    Not `HfApi.upload_folder`: a star of its patterns stands for folders, too, and it follows links out of the folder.
    """
    paths = sorted(
        list_allowed_files(folder) if repo_type == "model" else list_data_files(folder, repo_type == "space")
    )
    if not paths:
        raise ValueError(f"{folder} holds no file of a {repo_type}.")
    for path in paths:
        check_text(path.as_posix(), "The name of a file")
        if repo_type == "space":
            check_secrets(folder / path, path)
    if repo_type == "dataset":
        check_dataset_files(folder, paths)
    elif repo_type == "model":
        try:
            check_model_files(folder)
        except ValueError as error:
            raise ValueError(f"{error} `python -m hub_upload.export` makes a folder that can be sent.") from error
    return paths


def list_allowed_files(folder: Path) -> list[Path]:
    """The files of a repository's folder that may be uploaded, relative to it, in order; no links.

    Raises ValueError where one is no regular file.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        depth = len(name.parts) - 1
        if not path.is_symlink() and any(rule.count("/") == depth and name.match(rule) for rule in ALLOWED_FILES):
            check_regular_file(path)
            found.append(name)
    return found


def check_regular_file(path: Path) -> None:
    """Raise ValueError unless it is a file with content of its own: no folder, and no pipe, which is waited for."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file. Remove it.")


def check_model_files(folder: Path) -> None:
    """Raise ValueError, naming file and line, where an allowed file holds a path of a machine or an access token, or
    is no whole safetensors file.

    Weights are searched in their header alone, vocabularies and the data of ONNX for tokens, ONNX graphs for this
    machine's paths, and pictures in their texts, too.
    """
    for name in list_allowed_files(folder):
        path = folder / name
        if name.suffix == ".safetensors":
            check_text(_decode_json_escapes(_read_safetensors_header(path)), f"{name}, its header,")
            continue
        check_secrets(path, name)
        if name.suffix == ".png":
            check_text(_read_image_texts(path, name), f"{name}, a text in it,")
        elif name.suffix not in BINARY_SUFFIXES and name.name not in VOCABULARY_FILES:
            check_paths(path, name)


# How files begin that hide what they say: gzip, bzip2, xz, zstandard, zip, UTF-16.
UNSEARCHABLE_PREFIXES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff")


def check_secrets(path: Path, name: Path | str) -> None:
    """Raise ValueError, naming file and line or byte, where a file of any size and form holds a token or key.

    Graphs and vocabularies that are no text may not name a folder of this machine, either.
    """
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if (path.suffix not in BINARY_SUFFIXES or path.suffix == ".tar") and content[:6].startswith(
            UNSEARCHABLE_PREFIXES
        ):
            raise ValueError(f"{name} is compressed or no UTF-8, and can't be searched for secrets. Write it plainly.")
        if found := find_secret(content):
            chunks = (
                content[at : min(at + SEARCH_CHUNK_BYTES, found[1])] for at in range(0, found[1], SEARCH_CHUNK_BYTES)
            )
            line = 1 + sum(chunk.count(b"\n") for chunk in chunks)
            where = f"byte {found[1]}" if path.suffix in BINARY_SUFFIXES else f"line {line}"
            raise ValueError(f"{name}, {where}, holds {found[0]}. Remove it, and revoke it if it is real.")
        places = local_paths() if path.suffix in (".onnx", ".model") else ()
        if place := next((place for place in places if content.find(f"{place}/".encode()) >= 0), None):
            raise ValueError(f"{name} names a place on this machine, {place!r}. Make the file anew without it.")


def check_paths(path: Path, name: Path | str) -> None:
    """Raise ValueError, naming file and line, where a text file holds a path of a machine."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            _check_machine_paths(
                _decode_json_escapes(line) if path.suffix == ".json" else line, f"{name}, line {number},"
            )


def check_text(text: str, subject: str) -> None:
    """Raise ValueError where a text holds an access token or key, or a path of a machine."""
    if found := find_secret(text):
        raise ValueError(f"{subject} holds {found[0]}. Remove it, and revoke it if it is real.")
    _check_machine_paths(text, subject)


def _check_machine_paths(text: str, subject: str) -> None:
    if path := find_machine_path(text):
        raise ValueError(f"{subject} names a place on a machine, {path!r}. Write it relative, or leave it out.")


def _read_image_texts(file: Path | BinaryIO, name: Path | str) -> str:
    """What a picture says in words before its pixels, which are not read, such as comments of PNG, compressed or not.

    ValueError where it is no picture.
    """
    PIL.Image.init()
    try:
        with PIL.Image.open(file, formats=[form for form in IMAGE_FORMATS if form in PIL.Image.OPEN]) as image:
            return "\n".join(f"{key}: {text}" for key, text in image.info.items() if isinstance(text, str))
    except Exception:  # PIL raises a dozen kinds
        raise ValueError(f"{name} is no picture that can be read. Remove it.") from None


def _decode_json_escapes(line: str) -> str:
    """A line of JSON with its escapes decoded: `\\/` is a slash, `\\u2192` an arrow; `\\n` becomes a blank."""

    def read(found: re.Match[str]) -> str:
        return chr(int(found[2], 16)) if found[2] else found[1] if found[1] in '"\\/' else " "

    return re.sub(r"\\(u([0-9a-fA-F]{4})|.)", read, line)


def _read_safetensors_header(path: Path) -> str:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(MAX_SAFETENSORS_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError(f"{path} is no whole safetensors file: its header can't be read. Make it anew.")
        return file.read(size).decode(errors="replace")


# --- Data sets: rows, images, card and licence -----------------------------------------------------------------------

DATASET_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
DATASET_SUFFIXES = DATASET_IMAGE_SUFFIXES | {".parquet", ".tar", ".arrow", ".json", ".jsonl", ".csv", ".tsv"}
DATASET_FILE_NAMES = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"}
MAX_METADATA_JSON_BYTES = 2**21  # JSON files that are not larger say how a data set was made; larger ones are rows
BATCH_ROWS = 256  # that are looked at together: some megabytes, also of pictures
PARQUET_BUFFER_BYTES = 2**20  # of a column that is read at once
OUTSIDE_PATH_PATTERN = r"^(/|~|[A-Za-z]:[\\/]|file:)|(^|/)\.\.(/|$)"  # of the path of a picture
SECRET_MESSAGE = "holds what looks like an access token or key. Take it out, and revoke it if it is real"


def list_data_files(folder: Path, is_space: bool = False) -> list[Path]:
    """Files of a data set, or all of a Space, relative to their folder; hidden ones stay here, and whatever else.

    Raises ValueError where a link leads out of the folder, or a file that would be sent is no regular file.
    """
    check_links_stay_inside(folder)
    found = []
    for path in (path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder)
        is_sent = (
            name.suffix != ".pyc" if is_space else name.suffix in DATASET_SUFFIXES or name.name in DATASET_FILE_NAMES
        )
        if is_sent and not any(part.startswith("." if is_space else (".", "__")) for part in name.parts):
            check_regular_file(path)
            found.append(name)
    return found


def check_dataset_files(folder: Path, names: Sequence[Path]) -> None:
    """Raise ValueError, naming file, column and row but no secret, where a text, however nested, holds a token or key,
    an image path leads out of the folder, or image bytes are no image.
    """
    for name in names:
        path = folder / name
        if name.suffix in DATASET_IMAGE_SUFFIXES:
            _read_image_texts(path, name)
            check_secrets(path, name)
        elif name.suffix in (".parquet", ".arrow"):
            _check_table(path, name)
        else:  # archives among them: only uncompressed ones are accepted
            check_secrets(path, name)
            if name.name in DATASET_FILE_NAMES or (
                name.suffix == ".json" and path.stat().st_size <= MAX_METADATA_JSON_BYTES
            ):
                check_paths(path, name)


def _check_table(path: Path, name: Path) -> None:
    import pyarrow

    first = 0
    try:
        for batch in _iter_batches(path):
            if not first and find_secret(f"{batch.schema} {batch.schema.metadata}"):
                raise ValueError(f"{name}, its header, {SECRET_MESSAGE}.")
            for column, array in zip(batch.schema.names, batch.columns, strict=True):
                if _find_fault(array):
                    row, fault = next((n, bad) for n in range(len(array)) if (bad := _find_fault(array[n : n + 1])))
                    raise ValueError(f"{name}, column {column!r}, row {first + row}, {fault}.")
            first += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name} can't be read as a file of rows: {' '.join(str(error).split())}") from None


def _iter_batches(path: Path) -> Iterator[Any]:
    """The rows of a file, some at a time; the first may be none."""
    import pyarrow
    from pyarrow import parquet

    if path.suffix == ".arrow":
        with pyarrow.memory_map(str(path)) as file:
            yield from pyarrow.ipc.open_stream(file)
        return
    with parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES) as file:
        yield pyarrow.RecordBatch.from_pylist([], file.schema_arrow)
        yield from file.iter_batches(BATCH_ROWS)


def _find_fault(array: Any) -> str | None:
    """What must not be sent of the values of an array of pyarrow, however nested, in words; None where all may."""
    from pyarrow import ExtensionArray, ListArray, compute, types

    kind = array.type
    if isinstance(array, ExtensionArray):
        return _find_fault(array.storage)
    if types.is_dictionary(kind):
        return _find_fault(array.dictionary_decode())
    if types.is_struct(kind):
        parts = dict(zip([field.name for field in kind], array.flatten(), strict=True))
        fault = _find_image_fault(parts["bytes"], parts["path"]) if set(parts) == {"bytes", "path"} else None
        return fault or next(filter(None, map(_find_fault, parts.values())), None)
    if types.is_map(kind):
        halves = [ListArray.from_arrays(array.offsets, half) for half in (array.keys, array.items)]
        return next(filter(None, map(_find_fault, halves)), None)
    if types.is_nested(kind):
        return _find_fault(array.flatten())
    if "string" not in str(kind) and "binary" not in str(kind):
        return None
    pattern = "|".join([SECRET_RE2, *map(re.escape, find_hub_tokens())])
    return (
        SECRET_MESSAGE
        if compute.any(compute.match_substring_regex(array.cast("large_binary"), pattern)).as_py()
        else None
    )


def _find_image_fault(contents: Any, paths: Any) -> str | None:
    from pyarrow import compute, types

    if types.is_string(paths.type) and compute.any(compute.match_substring_regex(paths, OUTSIDE_PATH_PATTERN)).as_py():
        return "names the file of a picture by a path outside of the data set. Put the picture into it"
    try:
        for content in (content for content in contents if content.is_valid):
            _read_image_texts(io.BytesIO(content.as_buffer()), "")
    except ValueError:
        return "has bytes that are no picture that can be read. Take the row out"
    return None

"""Decide which files may be published, and check them before they leave this machine.

An allow-list names the files of a model; datasets and Spaces have rules of their own. The checks refuse access tokens
and keys, paths of a machine, damaged files and links that lead out of the folder.
"""

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
RUN_PLOT_FILES = ("curves.png", "retrieval.png")  # plots that a training run writes
# The only list of files that an export writes and an upload sends. A star matches any part of one file or folder name,
# but never a slash.
ALLOWED_FILES = (
    *("config.json", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES, *MODEL_CODE),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "rotation.safetensors"),
    *("open_clip_config.json", "open_clip_model.safetensors", "text_model/config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Normalize/config.json"),
    *("1_Pooling/config.json", "*_Dense/config.json", "*_Dense/model.safetensors"),
    *("open_clip_text.safetensors", "drop_in.json"),
    *("onnx/*.onnx", "onnx/*.onnx.data", "onnx/*.onnx_data", "onnx/*.onnx_data_*", "onnx/quantisation.json"),
    *("textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json"),  # read by Immich
    *("visual/model.onnx", "visual/preprocess_cfg.json"),
    *("README.md", "LICENSE", "run.json", "results/*.json", *RUN_PLOT_FILES),
)
# Tokens of a vocabulary may look like paths, so these files are searched for secrets only.
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
BINARY_SUFFIXES = (
    *(".safetensors", ".onnx", ".data", ".onnx_data", ".onnx_data_1", ".model"),
    *(".png", ".jpg", ".jpeg", ".webp", ".tar"),
)
SEARCH_CHUNK_BYTES = 2**24  # bytes in which line feeds are counted at a time, to limit memory
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # limit of the safetensors library


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless `repo_id` is a valid repository id, `owner/name`."""
    if repo_id.count("/") != 1:
        raise ValueError(
            f"The repository id must be owner/name, for example my-name/my-model, got {make_printable(repo_id)!r}."
        )
    validate_repo_id(repo_id)


def list_files_to_send(folder: Path, repo_type: str) -> list[Path]:
    """List and check the files of a folder that may be uploaded.

    `HfApi.upload_folder` is not used because a star in its patterns also matches slashes, and because it follows links
    that lead out of the folder.

    Args:
        folder: Folder of a model, dataset or Space.
        repo_type: "model", "dataset" or "space".

    Returns:
        Sorted paths relative to `folder`.

    Raises:
        ValueError: If there is no file to upload, or a file must not be published (its name is in the message).
    """
    paths = sorted(
        list_allowed_files(folder) if repo_type == "model" else list_data_files(folder, repo_type == "space")
    )
    if not paths:
        raise ValueError(f"{folder} contains no files of a {repo_type}. Check the folder and --repo_type.")
    for path in paths:
        check_text(path.as_posix(), "A file name")
        if repo_type == "space":
            check_secrets(folder / path, path)
    if repo_type == "dataset":
        check_dataset_files(folder, paths)
    elif repo_type == "model":
        try:
            check_model_files(folder)
        except ValueError as error:
            raise ValueError(f"{error} `python -m hub_upload.export` writes a folder that can be uploaded.") from error
    return paths


def list_allowed_files(folder: Path) -> list[Path]:
    """Return the sorted paths, relative to `folder`, of the files that match `ALLOWED_FILES`. Links are left out.

    Raises ValueError if a matching path is not a regular file.
    """
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        depth = len(name.parts) - 1
        if not path.is_symlink() and any(rule.count("/") == depth and name.match(rule) for rule in ALLOWED_FILES):
            check_regular_file(path)
            names.append(name)
    return names


def check_regular_file(path: Path) -> None:
    """Raise ValueError if `path` is not a regular file. It may be a folder, or a pipe, which would block a reader."""
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file. Remove it.")


def check_model_files(folder: Path) -> None:
    """Check the content of all allowed files of a model folder.

    Text files are searched for secrets and for paths of any machine. Of weights, only the header is searched.
    Vocabularies and binary files are searched for secrets, ONNX graphs also for paths of this machine, and PNG images
    also in their text fields.

    Raises:
        ValueError: If a file contains a secret or a path, or a safetensors file or image is damaged. The message names
            the file and, if possible, the line.
    """
    for name in list_allowed_files(folder):
        path = folder / name
        if name.suffix == ".safetensors":
            check_text(_decode_json_escapes(_read_safetensors_header(path)), f"{name}, in its header,")
            continue
        check_secrets(path, name)
        if name.suffix == ".png":
            check_text(_read_image_texts(path, name), f"{name}, in a text field,")
        elif name.suffix not in BINARY_SUFFIXES and name.name not in VOCABULARY_FILES:
            check_paths(path, name)


# First bytes of files whose content can't be searched for secrets: gzip, bzip2, xz, zstandard, zip and UTF-16 (LE, BE).
UNSEARCHABLE_PREFIXES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff")


def check_secrets(path: Path, name: Path | str) -> None:
    """Search a file of any type and size for access tokens and keys, without loading it into memory.

    ONNX graphs and binary vocabularies are also searched for folders of this machine.

    Args:
        path: File to search.
        name: Name of the file in messages.

    Raises:
        ValueError: If the file contains a secret or such a folder, or if it can't be searched because it is compressed
            or UTF-16. The message names the file and the line (text files) or byte (binary files) of a secret.
    """
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if (path.suffix not in BINARY_SUFFIXES or path.suffix == ".tar") and content[:6].startswith(
            UNSEARCHABLE_PREFIXES
        ):
            raise ValueError(
                f"{name} is compressed or UTF-16, so it can't be searched for secrets. Store it as plain UTF-8."
            )
        if secret := find_secret(content):
            description, offset = secret
            starts = range(0, offset, SEARCH_CHUNK_BYTES)
            chunks = (content[start : min(start + SEARCH_CHUNK_BYTES, offset)] for start in starts)
            line = 1 + sum(chunk.count(b"\n") for chunk in chunks)
            position = f"byte {offset}" if path.suffix in BINARY_SUFFIXES else f"line {line}"
            raise ValueError(f"{name}, {position}, contains {description}. Remove it, and revoke it if it is real.")
        for local_path in local_paths() if path.suffix in (".onnx", ".model") else ():
            if content.find(f"{local_path}/".encode()) >= 0:
                raise ValueError(
                    f"{name} contains a path of this machine, {local_path!r}. Write the file again without it."
                )


def check_paths(path: Path, name: Path | str) -> None:
    """Raise ValueError if a text file contains an absolute path of a machine. The message has file name and line."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decode_json_escapes(line) if path.suffix == ".json" else line
            _check_machine_paths(text, f"{name}, line {number},")


def check_text(text: str, subject: str) -> None:
    """Raise ValueError if a text contains a secret or an absolute path of a machine.

    Args:
        text: Text to search.
        subject: Start of the message: where the text comes from.
    """
    if secret := find_secret(text):
        raise ValueError(f"{subject} contains {secret[0]}. Remove it, and revoke it if it is real.")
    _check_machine_paths(text, subject)


def _check_machine_paths(text: str, subject: str) -> None:
    if path := find_machine_path(text):
        raise ValueError(f"{subject} contains an absolute path, {path!r}. Make it relative, or leave it out.")


def _read_image_texts(file: Path | BinaryIO, name: Path | str) -> str:
    """Return the text fields of an image file, such as PNG comments. Pixels are not decoded.

    Raises ValueError if the file is not an image.
    """
    PIL.Image.init()
    try:
        with PIL.Image.open(file, formats=[form for form in IMAGE_FORMATS if form in PIL.Image.OPEN]) as image:
            return "\n".join(f"{key}: {text}" for key, text in image.info.items() if isinstance(text, str))
    except Exception:  # PIL raises many types of errors for damaged files
        raise ValueError(f"{name} can't be read as an image. Remove it.") from None


def _decode_json_escapes(line: str) -> str:
    r"""Decode the escapes in a line of JSON: `\/` becomes a slash, `\u2192` an arrow, `\n` a space."""

    def decode(escape: re.Match[str]) -> str:
        if escape[2]:
            return chr(int(escape[2], 16))
        return escape[1] if escape[1] in '"\\/' else " "

    return re.sub(r"\\(u([0-9a-fA-F]{4})|.)", decode, line)


def _read_safetensors_header(path: Path) -> str:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(MAX_SAFETENSORS_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError(f"{path} is not a complete safetensors file: its header can't be read. Write it again.")
        return file.read(size).decode(errors="replace")


# --- Datasets: rows, images, card and license ------------------------------------------------------------------------

DATASET_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
DATASET_SUFFIXES = DATASET_IMAGE_SUFFIXES | {".parquet", ".tar", ".arrow", ".json", ".jsonl", ".csv", ".tsv"}
DATASET_FILE_NAMES = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"}
# JSON files up to this size describe a dataset, so they are searched for paths. Larger ones hold rows, whose texts may
# look like paths.
MAX_METADATA_JSON_BYTES = 2**21
BATCH_ROWS = 256  # rows checked at a time; a few megabytes even if they contain images
PARQUET_BUFFER_BYTES = 2**20  # bytes of a column read at a time
OUTSIDE_PATH_PATTERN = r"^(/|~|[A-Za-z]:[\\/]|file:)|(^|/)\.\.(/|$)"  # image paths that lead out of the dataset
SECRET_MESSAGE = "contains what looks like an access token or key. Remove it, and revoke it if it is real"


def list_data_files(folder: Path, is_space: bool = False) -> list[Path]:
    """List the files to upload of a dataset (rows, images, card and license) or of a Space (everything but bytecode).

    Hidden files are left out; of a dataset, names that begin with two underscores too.

    Args:
        folder: Folder of the dataset or Space.
        is_space: Whether it is a Space.

    Returns:
        Paths relative to `folder`.

    Raises:
        ValueError: If a link leads out of the folder, or a file to upload is not a regular file.
    """
    check_links_stay_inside(folder)
    names = []
    for path in (path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder)
        is_sent = (
            name.suffix != ".pyc" if is_space else name.suffix in DATASET_SUFFIXES or name.name in DATASET_FILE_NAMES
        )
        if is_sent and not any(part.startswith("." if is_space else (".", "__")) for part in name.parts):
            check_regular_file(path)
            names.append(name)
    return names


def check_dataset_files(folder: Path, names: Sequence[Path]) -> None:
    """Check the content of the files of a dataset.

    Args:
        folder: Folder of the dataset.
        names: Files to check, relative to `folder`.

    Raises:
        ValueError: If a text (also in nested columns) contains a secret, an image path leads out of the folder, or
            image bytes can't be read. The message names the file, column and row, but does not repeat the secret.
    """
    for name in names:
        path = folder / name
        if name.suffix in DATASET_IMAGE_SUFFIXES:
            _read_image_texts(path, name)
            check_secrets(path, name)
        elif name.suffix in (".parquet", ".arrow"):
            _check_table(path, name)
        else:  # tar archives too; `check_secrets` refuses compressed ones
            check_secrets(path, name)
            if name.name in DATASET_FILE_NAMES or (
                name.suffix == ".json" and path.stat().st_size <= MAX_METADATA_JSON_BYTES
            ):
                check_paths(path, name)


def _check_table(path: Path, name: Path) -> None:
    """Raise ValueError if the schema or a row of a Parquet or Arrow file must not be published."""
    import pyarrow

    first_row = 0
    try:
        for batch in _iter_batches(path):
            if not first_row and find_secret(f"{batch.schema} {batch.schema.metadata}"):
                raise ValueError(f"{name}, in its header, {SECRET_MESSAGE}.")
            for column, array in zip(batch.schema.names, batch.columns, strict=True):
                if not _find_fault(array):
                    continue
                faults = (_find_fault(array[row : row + 1]) for row in range(len(array)))
                row, fault = next((row, fault) for row, fault in enumerate(faults, start=first_row) if fault)
                raise ValueError(f"{name}, column {column!r}, row {row}, {fault}.")
            first_row += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name} can't be read as Parquet or Arrow: {' '.join(str(error).split())}") from None


def _iter_batches(path: Path) -> Iterator[Any]:
    """Yield the record batches of a Parquet or Arrow file. The first batch of a Parquet file is empty (schema only)."""
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
    """Return why a pyarrow array must not be published, or None if it may be. Nested values are checked too."""
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
        keys_and_items = [ListArray.from_arrays(array.offsets, values) for values in (array.keys, array.items)]
        return next(filter(None, map(_find_fault, keys_and_items)), None)
    if types.is_nested(kind):
        return _find_fault(array.flatten())
    if "string" not in str(kind) and "binary" not in str(kind):
        return None
    pattern = "|".join([SECRET_RE2, *map(re.escape, find_hub_tokens())])
    has_secret = compute.any(compute.match_substring_regex(array.cast("large_binary"), pattern)).as_py()
    return SECRET_MESSAGE if has_secret else None


def _find_image_fault(contents: Any, paths: Any) -> str | None:
    """Return why the images of a `datasets.Image` column must not be published, or None if they may be."""
    from pyarrow import compute, types

    if types.is_string(paths.type) and compute.any(compute.match_substring_regex(paths, OUTSIDE_PATH_PATTERN)).as_py():
        return "has an image path that leads out of the dataset. Store the image inside the dataset"
    try:
        for content in (content for content in contents if content.is_valid):
            _read_image_texts(io.BytesIO(content.as_buffer()), "")
    except ValueError:
        return "has bytes that can't be read as an image. Remove the row"
    return None

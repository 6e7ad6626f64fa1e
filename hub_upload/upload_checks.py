"""Choose the files of a model, dataset or Space that may be published, and check them before they are uploaded.

Model files are chosen by an allow-list of names (`ALLOWED_FILES`), other files by suffix and name. Damaged files, and
files that contain access tokens, keys or absolute paths, are refused.
"""

import io
import mmap
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image
from huggingface_hub.utils import validate_repo_id

from capivara_common import privacy
from capivara_common.files import check_folder_for_outside_links_and_pipes
from capivara_common.image_files import IMAGE_FORMATS

_MODEL_CODE_PARTS = "checks configuration image_processing modeling processing text_cleaning tokenization"
MODEL_CODE = tuple(f"{part}_capivara.py" for part in _MODEL_CODE_PARTS.split())
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt"),
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")  # name patterns
RUN_PLOT_FILES = ("curves.png", "retrieval.png")  # plots that a training run writes
# Patterns of all model files that `hub_upload.export` may write and `hub_upload.push` may upload, relative to the model
# folder. A star matches any characters of one file or folder name, but never a slash.
ALLOWED_FILES = (
    *("config.json", *PROCESSOR_FILES, *MODEL_CODE, *WEIGHT_FILES, "rotation.safetensors"),
    *("open_clip_config.json", "open_clip_model.safetensors", "text_model/config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Normalize/config.json"),
    *("1_Pooling/config.json", "*_Dense/config.json", "*_Dense/model.safetensors"),
    *("open_clip_text.safetensors", "drop_in.json"),
    *("onnx/*.onnx", "onnx/*.onnx.data", "onnx/*.onnx_data", "onnx/*.onnx_data_*", "onnx/quantisation.json"),
    *("textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json"),  # read by Immich
    *("visual/model.onnx", "visual/preprocess_cfg.json"),
    *("README.md", "LICENSE", "run.json", "results/*.json", *RUN_PLOT_FILES),
)
# Vocabulary files are searched for secrets, but not for absolute paths, because some tokens look like paths.
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
BINARY_SUFFIXES = IMAGE_SUFFIXES | {".safetensors", ".onnx", ".data", ".onnx_data", ".onnx_data_1", ".model", ".tar"}
LINE_FEED_RE = re.compile(rb"\n")  # finds the lines of a memory-mapped file, without loading the file into memory
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # limit of the safetensors library


def check_repo_id(repo_id: str) -> None:
    """Check that a string is a valid id of a repository on the Hub, such as `my-name/my-model`.

    Args:
        repo_id: String to check.

    Raises:
        ValueError: If the string does not have the form `owner/name`, or the Hub does not accept one of the two names.
    """
    if repo_id.count("/") != 1:
        printable = privacy.make_printable(repo_id)
        raise ValueError(f"The repository id must be owner/name, for example my-name/my-model, got {printable!r}.")
    validate_repo_id(repo_id)


def list_and_check_files_to_send(folder: Path, repo_type: str) -> list[Path]:
    """List the files of a folder that may be uploaded to the Hub, and check that they contain no secrets.

    A secret is an access token or a key. In files that describe a model or dataset, absolute paths are refused, too.

    Args:
        folder: Folder of a model, dataset or Space.
        repo_type: "model", "dataset" or "space".

    Returns:
        Sorted paths relative to `folder`.

    Raises:
        ValueError: If there is no file to upload, or a file must not be published. The message names the file.
    """
    if repo_type == "model":
        paths = list_uploadable_model_files(folder)
    else:
        paths = list_uploadable_dataset_or_space_files(folder, repo_type == "space")
    if not paths:
        raise ValueError(f"{folder} contains no files of a {repo_type}. Check the folder and --repo_type.")
    for path in paths:
        check_regular_file(folder / path)
        check_text_is_publishable(path.as_posix(), "A file name")
        if repo_type == "space":
            check_file_for_secrets(folder / path, path)
    if repo_type == "dataset":
        check_dataset_files(folder, paths)
    elif repo_type == "model":
        try:
            check_model_files(folder)
        except ValueError as error:
            raise ValueError(f"{error} `python -m hub_upload.export` writes a folder that can be uploaded.") from error
    return paths


def list_uploadable_model_files(folder: Path) -> list[Path]:
    """List the files of a model folder that may be uploaded, according to the allow-list `ALLOWED_FILES`.

    All other files and all symbolic links are skipped.

    Args:
        folder: Folder of the model.

    Returns:
        Sorted paths relative to `folder`.
    """
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_symlink())
    rules = [(rule, len(Path(rule).parts)) for rule in ALLOWED_FILES]
    return [name for name in names if any(len(name.parts) == depth and name.match(rule) for rule, depth in rules)]


def check_regular_file(path: Path) -> None:
    """Check that a path is a regular file before it is read.

    Folders and pipes are refused, because reading from a pipe might never end.

    Args:
        path: Path to check.

    Raises:
        ValueError: If `path` is not a regular file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file. Remove it.")


def check_model_files(folder: Path) -> None:
    """Check that the files of a model that would be uploaded contain no secrets and no absolute paths.

    A secret is an access token or a key. Vocabularies and most binary files are searched only for secrets, ONNX graphs
    and `.model` files also for paths of this machine. Of safetensors files, only the header is searched.

    Args:
        folder: Folder of the model.

    Raises:
        ValueError: If a file contains a secret or path, is damaged, or is not a regular file. The message names the
            file and, if possible, the line.
    """
    for name in list_uploadable_model_files(folder):
        path = folder / name
        check_regular_file(path)
        if name.suffix == ".safetensors":
            check_text_is_publishable(_decode_json_escapes(_read_safetensors_header(path)), f"{name}, in its header,")
            continue
        check_file_for_secrets(path, name)
        if name.suffix == ".png":
            check_text_is_publishable(_read_image_text_fields(path, name), f"{name}, in a text field,")
        elif name.suffix not in BINARY_SUFFIXES and name.name not in VOCABULARY_FILES:
            check_paths(path, name)


# First bytes of files whose content can't be searched for secrets, because it is compressed (gzip, bzip2, xz,
# zstandard, zip) or text in UTF-16 (little-endian, big-endian).
UNSEARCHABLE_PREFIXES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff")


def check_file_for_secrets(path: Path, name: Path | str) -> None:
    """Check that a file of any type and size contains no secret (access token or key).

    ONNX graphs and binary vocabularies (`.model`) must also not contain paths of this machine.

    Args:
        path: File to search.
        name: Name of the file in error messages.

    Raises:
        ValueError: If the file contains a secret or such a path, or can't be searched because it is compressed or
            UTF-16.
    """
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        may_be_text = path.suffix not in BINARY_SUFFIXES or path.suffix == ".tar"
        if may_be_text and content[:6].startswith(UNSEARCHABLE_PREFIXES):
            raise ValueError(
                f"{name} is compressed or UTF-16, so it can't be searched for secrets. Store it as plain UTF-8."
            )
        if secret := privacy.find_secret(content):
            description, offset = secret
            line = 1 + sum(1 for _ in LINE_FEED_RE.finditer(content, 0, offset))
            position = f"byte {offset}" if path.suffix in BINARY_SUFFIXES else f"line {line}"
            raise ValueError(f"{name}, {position}, contains {description}. Remove it, and revoke it if it is real.")
        for local_path in privacy.list_private_folders() if path.suffix in (".onnx", ".model") else ():
            if content.find(f"{local_path}/".encode()) >= 0:
                raise ValueError(
                    f"{name} contains a path of this machine, {local_path!r}. Write the file again without it."
                )


def check_paths(path: Path, name: Path | str) -> None:
    """Check that a text file contains no absolute path, which could reveal a user name, for example.

    Args:
        path: File to search.
        name: Name of the file in error messages.

    Raises:
        ValueError: If a line contains an absolute path. The message names the file and the line.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decode_json_escapes(line) if path.suffix == ".json" else line
            _check_machine_paths(text, f"{name}, line {number},")


def check_text_is_publishable(text: str, subject: str) -> None:
    """Check that a text contains no secret (access token or key) and no absolute path.

    Args:
        text: Text to search.
        subject: What the text is, such as "A file name". The error message begins with it: "A file name contains …".

    Raises:
        ValueError: If the text contains a secret or an absolute path.
    """
    if secret := privacy.find_secret(text):
        raise ValueError(f"{subject} contains {secret[0]}. Remove it, and revoke it if it is real.")
    _check_machine_paths(text, subject)


def _check_machine_paths(text: str, subject: str) -> None:
    if path := privacy.find_machine_path(text):
        raise ValueError(f"{subject} contains an absolute path, {path!r}. Make it relative, or leave it out.")


def _read_image_text_fields(file: Path | BinaryIO, name: Path | str) -> str:
    """Return the text fields of an image file, such as PNG comments, without decoding pixels.

    Args:
        file: Path of the image, or its content as a binary stream.
        name: Name of the file in error messages.

    Returns:
        One line `key: text` for each text field.

    Raises:
        ValueError: If the file can't be read as an image.
    """
    PIL.Image.init()
    try:
        with PIL.Image.open(file, formats=[form for form in IMAGE_FORMATS if form in PIL.Image.OPEN]) as image:
            return "\n".join(f"{key}: {text}" for key, text in image.info.items() if isinstance(text, str))
    except Exception:  # PIL raises many types of errors for damaged files
        raise ValueError(f"{name} can't be read as an image. Remove it.") from None


def _decode_json_escapes(line: str) -> str:
    r"""Decode the escape sequences in a line of a JSON file, so that absolute paths in the line can be found.

    For example, `\/` becomes a slash and `\u2192` an arrow. Escape sequences of control characters, such as `\n`,
    become a space.
    """

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

DATASET_SUFFIXES = IMAGE_SUFFIXES | {".parquet", ".tar", ".arrow", ".json", ".jsonl", ".csv", ".tsv"}
DATASET_FILE_NAMES = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"}
# JSON files of a dataset up to this size are searched for absolute paths, because they probably describe the dataset.
# Larger JSON files probably hold its rows. They are not searched for paths, because texts in rows may look like paths.
MAX_METADATA_JSON_BYTES = 2**21
BATCH_ROWS = 256  # rows that are read and checked at a time; even with images, they need only a few megabytes
PARQUET_BUFFER_BYTES = 2**20  # bytes of a column that are read at a time
OUTSIDE_PATH_PATTERN = r"^(/|~|[A-Za-z]:[\\/]|file:)|(^|/)\.\.(/|$)"  # image paths that lead out of the dataset
# The message does not repeat the secret.
SECRET_MESSAGE = "contains what looks like an access token or key. Remove it, and revoke it if it is real"


def list_uploadable_dataset_or_space_files(folder: Path, is_space: bool = False) -> list[Path]:
    """List the files of a dataset or Space that may be uploaded.

    - Dataset: files with rows (such as Parquet files), images, card and license. Names that begin with two underscores
      are skipped.
    - Space: all files except Python bytecode.

    Hidden files and folders are always skipped.

    Args:
        folder: Folder of the dataset or Space.
        is_space: Whether `folder` is a Space.

    Returns:
        Sorted paths relative to `folder`.

    Raises:
        ValueError: If a link leads out of the folder, or the folder contains a pipe, a socket or a device.
    """
    check_folder_for_outside_links_and_pipes(folder)
    skipped_prefixes = "." if is_space else (".", "__")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    names = [name for name in names if not any(part.startswith(skipped_prefixes) for part in name.parts)]
    if is_space:
        return [name for name in names if name.suffix != ".pyc"]
    return [name for name in names if name.suffix in DATASET_SUFFIXES or name.name in DATASET_FILE_NAMES]


def check_dataset_files(folder: Path, names: Sequence[Path]) -> None:
    """Check that the files of a dataset contain no secrets, no private paths and no damaged images.

    Args:
        folder: Folder of the dataset.
        names: Files to check, relative to `folder`.

    Raises:
        ValueError: If a file contains a secret (access token or key) or a damaged image, an image path leads out of the
            folder, or a file that describes the dataset contains an absolute path. The message names the file and, for
            Parquet and Arrow files, the column and row.
    """
    for name in names:
        path = folder / name
        if name.suffix in IMAGE_SUFFIXES:
            _read_image_text_fields(path, name)
            check_file_for_secrets(path, name)
        elif name.suffix in (".parquet", ".arrow"):
            _check_table_contents(path, name)
        else:
            # All other files, such as JSON files and archives. Compressed archives can't be checked, and
            # `check_file_for_secrets` refuses them.
            check_file_for_secrets(path, name)
            is_metadata = name.suffix == ".json" and path.stat().st_size <= MAX_METADATA_JSON_BYTES
            if name.name in DATASET_FILE_NAMES or is_metadata:
                check_paths(path, name)


def _check_table_contents(path: Path, name: Path) -> None:
    """Check the schema and all rows of a Parquet or Arrow file.

    Args:
        path: File to check.
        name: Name of the file in error messages.

    Raises:
        ValueError: If the schema or a row contains a secret (access token or key), or a row has an image that must not
            be published (see `_find_image_column_fault`). The message names the column and row. Also if the file can't
            be read.
    """
    import pyarrow

    first_row = 0
    try:
        for batch in _iter_record_batches(path):
            if not first_row and privacy.find_secret(f"{batch.schema} {batch.schema.metadata}"):
                raise ValueError(f"{name}, in its header, {SECRET_MESSAGE}.")
            for column, array in zip(batch.schema.names, batch.columns, strict=True):
                if not _find_array_fault(array):
                    continue
                # The batch has a row that must not be published. A binary search finds the first such row with a few
                # calls of `_find_array_fault`. One call per row would be slow, because each compiles a long pattern.
                row = bisect_left(range(len(array)), True, key=lambda row: bool(_find_array_fault(array[: row + 1])))
                fault = _find_array_fault(array[row : row + 1])
                raise ValueError(f"{name}, column {column!r}, row {first_row + row}, {fault}.")
            first_row += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name} can't be read as Parquet or Arrow: {' '.join(str(error).split())}") from None


def _iter_record_batches(path: Path) -> Iterator[Any]:
    """Read a Parquet or Arrow file in batches of rows.

    Args:
        path: File to read.

    Yields:
        The pyarrow record batches of the file. For a Parquet file, the first batch has a schema but no rows, so that
        the caller can check the schema even if the file contains no rows.
    """
    import pyarrow
    from pyarrow import parquet

    if path.suffix == ".arrow":
        with pyarrow.memory_map(str(path)) as file:
            yield from pyarrow.ipc.open_stream(file)
        return
    with parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES) as file:
        yield pyarrow.RecordBatch.from_pylist([], file.schema_arrow)
        yield from file.iter_batches(BATCH_ROWS)


def _find_array_fault(array: Any) -> str | None:
    """Find a reason not to publish the values of a pyarrow array, including nested arrays at any depth.

    Texts and binary values are searched for secrets (access tokens and keys). Structs with the fields `bytes` and
    `path` are images, which are also checked by `_find_image_column_fault`.

    Args:
        array: pyarrow array of any type, such as a column of a table.

    Returns:
        The reason, as the end of an error message. None if the array may be published.
    """
    from pyarrow import ExtensionArray, ListArray, compute, types

    kind = array.type
    if isinstance(array, ExtensionArray):
        return _find_array_fault(array.storage)
    if types.is_dictionary(kind):
        return _find_array_fault(array.dictionary_decode())
    if types.is_struct(kind):
        parts = dict(zip([field.name for field in kind], array.flatten(), strict=True))
        fault = _find_image_column_fault(parts["bytes"], parts["path"]) if set(parts) == {"bytes", "path"} else None
        return fault or next(filter(None, map(_find_array_fault, parts.values())), None)
    if types.is_map(kind):
        keys_and_items = [ListArray.from_arrays(array.offsets, values) for values in (array.keys, array.items)]
        return next(filter(None, map(_find_array_fault, keys_and_items)), None)
    if types.is_nested(kind):
        return _find_array_fault(array.flatten())
    if "string" not in str(kind) and "binary" not in str(kind):
        return None
    pattern = "|".join([privacy.SECRET_RE2, *map(re.escape, privacy.read_hub_tokens())])
    has_secret = compute.any(compute.match_substring_regex(array.cast("large_binary"), pattern)).as_py()
    return SECRET_MESSAGE if has_secret else None


def _find_image_column_fault(contents: Any, paths: Any) -> str | None:
    """Find a reason not to publish the images of a `datasets.Image` column.

    The bytes of each image must be readable, and its path must not lead out of the dataset.

    Args:
        contents: pyarrow array with the bytes of each image file, or null for a row without bytes.
        paths: pyarrow array with the path of each image file.

    Returns:
        The reason, as the end of an error message. None if the images may be published.
    """
    from pyarrow import compute, types

    if types.is_string(paths.type) and compute.any(compute.match_substring_regex(paths, OUTSIDE_PATH_PATTERN)).as_py():
        return "has an image path that leads out of the dataset. Store the image inside the dataset"
    try:
        for content in (content for content in contents if content.is_valid):
            _read_image_text_fields(io.BytesIO(content.as_buffer()), "")
    except ValueError:
        return "has bytes that can't be read as an image. Remove the row"
    return None

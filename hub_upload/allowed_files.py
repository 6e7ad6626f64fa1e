"""What may leave this machine: an allow-list of a repository's files, and a look into them for what must stay here."""

import mmap
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from common.privacy import machine_path_in, own_paths, secret_in

MODEL_CODE = tuple(
    f"{name}_capivara.py"
    for name in (
        "configuration",
        "image_classification",
        "image_processing",
        "loss",
        "modeling",
        "processing",
        "tokenization",
    )
)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt"),
)
# A star stands for any part of one name, never for a folder. Export and upload know no other list.
ALLOWED_FILES = (
    *("config.json", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES, *MODEL_CODE),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("open_clip_config.json", "open_clip_model.safetensors", "text_model/config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Normalize/config.json"),
    *("onnx/*.onnx", "onnx/*.onnx.data", "onnx/quantisation.json"),
    *("README.md", "LICENSE", "run.json", "results/*.json", ".eval_results/*.yaml", "*.png", ".gitattributes"),
)
RUN_PICTURES = ("curves.png", "retrieval.png")  # of a training run; any other picture must be named in the card
# Pieces of a vocabulary are no paths, whatever they look like.
NOT_SEARCHED = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
CHUNK_BYTES = 2**24
MAX_HEADER_BYTES = 100_000_000  # of safetensors; its own reader takes no more


def allowed_files(folder: Path) -> list[Path]:
    """The files of a repository's folder that may be uploaded, relative to it, in order.

    Links are left out, and so are pictures that neither a training run writes nor README.md names.

    Raises:
        ValueError: one is no regular file; to read a pipe would wait for ever.
    """
    found = []
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() or not _is_allowed(name):
            continue
        check_regular(path)
        if name.suffix == ".png" and name.name not in (*RUN_PICTURES, *re.findall(r"[\w.-]+\.png", text)):
            continue
        found.append(name)
    return found


def check_regular(path: Path) -> None:
    """Raise ValueError unless it is a file with content of its own: no pipe, socket, device or folder."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file. Remove it.")


def check_contents(folder: Path) -> None:
    """Raise ValueError, naming file and line, where an allowed file holds a path of a machine or an access token, or
    is no whole safetensors file.

    Weights are searched in their header alone, vocabularies for tokens; other binary files for this machine's paths.
    """
    for name in allowed_files(folder):
        path = folder / name
        if name.suffix in (".onnx", ".png", ".model", ".safetensors"):
            _check_binary(path, name)
        elif name.suffix != ".data":
            check_text(path, name, with_paths=name.name not in NOT_SEARCHED)


def check_text(path: Path, name: Path | str, with_paths: bool) -> None:
    """Raise ValueError, naming file and line, where a file holds an access token or key, or a path of a machine.

    Args:
        path: of the file; of any size, as it is mapped.
        name: for the message.
        with_paths: whether it is searched for paths, too, line by line.
    """
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if found := secret_in(content):
            raise ValueError(
                f"{name}, line {_lines_before(file, found[1]) + 1}, holds {found[0]}. Remove it, and revoke "
                "it if it is real."
            )
    if not with_paths:
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if name_of_place := machine_path_in(_unescaped(line) if path.suffix == ".json" else line):
                raise ValueError(
                    f"{name}, line {number}, names a place on a machine, {name_of_place!r}. Write it relative, or "
                    "leave it out."
                )


def _is_allowed(name: Path) -> bool:
    return any(
        len(name.parts) == len(PurePosixPath(pattern).parts)
        and all(map(fnmatchcase, name.parts, PurePosixPath(pattern).parts))
        for pattern in ALLOWED_FILES
    )


def _lines_before(file: BinaryIO, place: int) -> int:
    return sum(file.read(min(CHUNK_BYTES, place - at)).count(b"\n") for at in range(0, place, CHUNK_BYTES))


def _unescaped(line: str) -> str:
    """A line of JSON as its texts are read: `\\/` is a slash, `\\n` ends what is before it."""
    return re.sub(r"\\(.)", lambda found: found[1] if found[1] in '"\\/' else " ", line)


def _check_binary(path: Path, name: Path) -> None:
    wanted = [f"{folder}/".encode() for folder in own_paths()]
    for chunk in _chunks(path):
        if found := next((folder for folder in wanted if folder in chunk), None):
            raise ValueError(
                f"{name} names a place on this machine, {found.decode()!r}. Make the file anew without it."
            )


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file that can hold text, in overlapping parts."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
                raise ValueError(f"{path} is no whole safetensors file: its header can't be read. Make it anew.")
            yield file.read(size)
            return
        tail = b""
        while part := file.read(CHUNK_BYTES):
            yield tail + part
            tail = part[-256:]

"""What may leave this machine: an allow-list of a repository's files, and a look into them for what must stay here."""

import re
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

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
# Where people and programs keep their own things, on any machine.
PRIVATE_FOLDERS = ("home", "Users", "root", "mnt", "media", "tmp", "private", "scratch", "workspace")
TOKEN = re.compile(r"\b(?:hf|api_org|ghp|github_pat)_[A-Za-z0-9]{16,}")
CHUNK_BYTES = 2**24
MAX_HEADER_BYTES = 100_000_000  # of safetensors; its own reader takes no more


def allowed_files(folder: Path) -> list[Path]:
    """The files of a repository's folder that may be uploaded, relative to it, in order.

    Links are left out, and so are pictures that neither a training run writes nor README.md names.
    """
    found = []
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or not _is_allowed(name):
            continue
        if name.suffix == ".png" and name.name not in (*RUN_PICTURES, *re.findall(r"[\w.-]+\.png", text)):
            continue
        found.append(name)
    return found


def check_contents(folder: Path) -> None:
    """Raise ValueError, naming file and line, where an allowed file holds a path of a machine or an access token, or
    is no whole safetensors file.

    Weights are searched in their header alone, vocabularies not at all; other binary files for this machine's paths.
    """
    private = private_paths()
    for name in allowed_files(folder):
        path = folder / name
        if name.suffix in (".onnx", ".png", ".model", ".safetensors"):
            _check_binary(path, name)
        elif name.suffix != ".data" and name.name not in NOT_SEARCHED:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                _check_line(line, f"{name}, line {number},", private)


def private_paths() -> re.Pattern[str]:
    """Finds absolute paths in a text: those of this machine, and those under a folder of people's own."""
    ours = "|".join(re.escape(path) for path in _own_paths())
    others = "|".join(PRIVATE_FOLDERS)
    # A path's beginning, not the middle of a URL or of a relative path; `file://` is one's own machine, too.
    start = r"(?:(?<=file://)|(?<![\w./:~-]))"
    return re.compile(
        rf"{start}(?:(?:{ours})(?![\w.-])|/(?:{others})/[\w.@+-])[^\s\"'`<>|;,)\]}}]*|[A-Z]:\\+Users\\+\S+"
    )


def without_private_paths(value: Any) -> Any:
    """A JSON value whose absolute paths are relative to the current folder, or their last part where they can't be."""
    if isinstance(value, dict):
        cleaned = {without_private_paths(key): without_private_paths(item) for key, item in value.items()}
        if len(cleaned) < len(value):
            raise ValueError(f"{sorted(value)} are the same but for their folders; rename one of them.")
        return cleaned
    if isinstance(value, list):
        return [without_private_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"/[^\s/][^\n]*", value):  # the whole text is a path, wherever it leads
        return _relative(value)
    return private_paths().sub(lambda match: _relative(match[0]), value)


def _relative(path: str) -> str:
    here, target = Path.cwd(), Path(path)
    if target.is_relative_to(here):
        return target.relative_to(here).as_posix()
    return target.name


def _is_allowed(name: Path) -> bool:
    return any(
        len(name.parts) == len(PurePosixPath(pattern).parts)
        and all(map(fnmatchcase, name.parts, PurePosixPath(pattern).parts))
        for pattern in ALLOWED_FILES
    )


def _own_paths() -> list[str]:
    """Folders of this machine that a published file has no reason to name, longest first."""
    checkout = Path(__file__).resolve().parents[1]
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(sys.prefix), checkout}
    return sorted({str(folder) for folder in folders if len(folder.parts) > 1}, key=len, reverse=True)


def _check_line(line: str, where: str, private: re.Pattern[str]) -> None:
    if match := private.search(line):
        raise ValueError(f"{where} names a place on a machine, {match[0]!r}. Write it relative, or leave it out.")
    if match := TOKEN.search(line):
        raise ValueError(
            f"{where} holds what looks like an access token, {match[0][:7]}… Remove it, and revoke it if it is real."
        )


def _check_binary(path: Path, name: Path) -> None:
    wanted = [f"{folder}/".encode() for folder in _own_paths()]
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

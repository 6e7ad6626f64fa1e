"""Whether Immich reads the folder of a model: its files, and its graphs, run on two sentences and two pictures.

Only what its machine-learning service looks at counts, in models of open_clip's kind (read in versions 1.134 and 2.5).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capivara_common.files import read_json

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

BASE_NAME, BASE_WIDTH = "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k", 512  # of the base, in Immich's list
FILES = {
    "textual": ("model.onnx", "tokenizer.json", "tokenizer_config.json"),
    "visual": ("model.onnx", "preprocess_cfg.json"),
}
CONTEXT_LENGTH = 77  # where config.json names none
RESIZE_MODES, INTERPOLATIONS = ("shortest", "squash"), ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
# Graphs for other runtimes, which Immich runs in place of model.onnx where the machine can, and what turns them off.
OTHER_RUNTIMES = {".armnn": "MACHINE_LEARNING_ANN", ".rknn": "MACHINE_LEARNING_RKNN"}
SENTENCES = ("um gato dormindo no sofá", "crianças brincando na praia ao pôr do sol")


def check(folder: Path) -> list[str]:
    """What Immich would not read in the folder of a model, a line each; none where it reads all.

    Embeddings need no unit length: Immich compares by the cosine. Folders without visual/ are the text side alone.
    """
    towers = [tower for tower in FILES if (folder / tower).is_dir()]
    if not towers:
        return [f"{folder} has neither textual/ nor visual/. Name the folder of one model, as clip/{BASE_NAME}."]
    names = [f"{tower}/{name}" for tower in towers for name in FILES[tower]]
    if len(towers) == 2:  # else that of the base lies in the cache already
        names.append("config.json")
    if missing := [f"{name} is missing." for name in names if not (folder / name).is_file()]:
        return missing
    widths: dict[str, int] = {}
    faults = [
        fault for tower in towers for fault in _told({"textual": _textual, "visual": _visual}[tower](folder, widths))
    ]
    if len(set(widths.values())) > 1:
        faults.append("The towers embed into {textual} and {visual} numbers, which can't be compared.".format(**widths))
    elif folder.resolve().name == BASE_NAME and widths and BASE_WIDTH not in widths.values():
        faults.append(f"Embeddings have {max(widths.values())} numbers; Immich expects {BASE_WIDTH} of {BASE_NAME}.")
    return faults


def padded_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of a model's folder as Immich sets it up: every text cut and filled up to the context's length.

    Raises:
        ValueError: a file is damaged, or the padding token is none.
    """
    from tokenizers import Tokenizer

    length, textual = _context_length(folder), folder / "textual"
    pad = read_json(textual / "tokenizer_config.json", pad_token=str)["pad_token"]
    try:
        tokenizer = Tokenizer.from_file(str(textual / "tokenizer.json"))
    except Exception as error:  # the library raises no other kind
        raise ValueError(f"textual/tokenizer.json can't be read: {' '.join(str(error).split())}") from error
    pad_id = tokenizer.token_to_id(pad)
    if pad_id is None:
        raise ValueError(f"pad_token of textual/tokenizer_config.json, {pad!r}, is not in textual/tokenizer.json.")
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=pad_id)
    tokenizer.enable_truncation(max_length=length)
    return tokenizer


def open_graph(path: Path) -> "InferenceSession":
    """A graph in onnxruntime, on the CPU. Raises ValueError where it can't be read."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is said once, here
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a dozen kinds, without a common class
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path.parent.name}/{path.name} can't be read by onnxruntime {onnxruntime.__version__}: {reason}"
        ) from error


def _told(faults: Iterator[str]) -> list[str]:
    """All faults; an error, after which nothing more can be looked at, is the last."""
    found = []
    try:
        for fault in faults:
            found.append(fault)
    except ValueError as error:
        found.append(str(error))
    return found


def _textual(folder: Path, widths: dict[str, int]) -> Iterator[str]:
    """Faults of the text side; its width is added to `widths`."""
    yield from _other_graphs(folder / "textual")
    tokenizer = padded_tokenizer(folder)
    session = open_graph(folder / "textual" / "model.onnx")
    ids = [np.array([tokenizer.encode(text).ids], np.int32) for text in SENTENCES]
    yield from _run(session, "textual", {"text": ids}, "tensor(int32)", widths)


def _visual(folder: Path, widths: dict[str, int]) -> Iterator[str]:
    """Faults of the image side; its width is added to `widths`."""
    yield from _other_graphs(folder / "visual")
    settings = read_json(folder / "visual" / "preprocess_cfg.json")
    yield from (faults := [f"visual/preprocess_cfg.json: {fault}" for fault in _preprocessing_faults(settings)])
    if faults:
        return
    session, side = open_graph(folder / "visual" / "model.onnx"), _side(settings)
    pixels = [np.full((1, 3, side, side), value, np.float32) for value in (-1, 1)]
    pixels[1][:, :, : side // 2] = 0
    yield from _run(session, "visual", {"image": pixels}, "tensor(float)", widths)


def _context_length(folder: Path) -> int:
    """Tokens of a text. Raises ValueError where config.json does not have `text_cfg`, or no number there."""
    if not (folder / "config.json").is_file():
        return CONTEXT_LENGTH
    length = read_json(folder / "config.json", text_cfg=dict)["text_cfg"].get("context_length", CONTEXT_LENGTH)
    if type(length) is not int or not 2 < length <= 10_000:
        raise ValueError(f"text_cfg.context_length of config.json must be a number of tokens, got {length!r}.")
    return length


def _side(settings: dict[str, Any]) -> Any:
    size = settings.get("size")
    return size[0] if isinstance(size, list) and size else size


def _preprocessing_faults(settings: Any) -> Iterator[str]:
    if not isinstance(settings, dict):
        yield "must hold an object."
        return
    side, interpolation = _side(settings), str(settings.get("interpolation")).lower()
    if type(side) is not int or not 0 < side <= 10_000:
        yield f"size must be pixels a side, got {settings.get('size')!r}."
    if interpolation not in INTERPOLATIONS:
        yield f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}."
    if settings.get("resize_mode", RESIZE_MODES[0]) not in RESIZE_MODES:
        yield f"resize_mode must be {' or '.join(RESIZE_MODES)}, got {settings['resize_mode']!r}."
    for name in ("mean", "std"):
        value = settings.get(name)
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
            yield f"{name} must be three numbers, got {value!r}."
        elif not np.isfinite(value).all() or (name == "std" and 0 in value):
            yield f"{name} must be finite{' and not 0' * (name == 'std')}, got {value!r}."


def _other_graphs(tower: Path) -> Iterator[str]:
    """What Immich would run in place of model.onnx: graphs for other runtimes, and what it has prepared itself."""
    for path in sorted(path for path in tower.rglob("*") if path.suffix in OTHER_RUNTIMES):
        yield (
            f"{tower.name}/{path.relative_to(tower)} is another export, which Immich runs in place of model.onnx where "
            f"the machine can. Remove it, and set {OTHER_RUNTIMES[path.suffix]}=false."
        )
    laid = (tower / "model.onnx").stat().st_ctime  # whatever date the file itself has
    for path in sorted(tower.rglob("manifest.json")):
        if path.stat().st_mtime < laid:
            where = path.relative_to(tower).parent
            yield f"{tower.name}/{where} was prepared from an earlier model.onnx, and would be run. Remove it."


def _run(
    session: "InferenceSession", tower: str, inputs: dict[str, list[np.ndarray]], kind: str, widths: dict[str, int]
) -> Iterator[str]:
    """Faults of a graph by what it says of its input, and by two runs."""
    ((name, examples),) = inputs.items()
    found, graph = session.get_inputs(), f"{tower}/model.onnx"
    if [one.name for one in found] != [name]:
        yield (
            f"{graph} takes {', '.join(one.name for one in found)}; Immich gives a model of open_clip's kind {name!r} "
            "alone. Models of M-CLIP's kind are not checked here."
        )
        return
    faults = []
    if found[0].type != kind:
        faults.append(f"{graph} takes {name} as {found[0].type}; Immich gives {kind}.")
    given = examples[0].shape
    if len(found[0].shape) != len(given) or any(
        isinstance(size, int) and size != wanted for size, wanted in zip(found[0].shape, given, strict=False)
    ):
        faults.append(f"{graph} takes {name} of shape {tuple(found[0].shape)}; Immich gives {given}.")
    yield from faults
    if faults:
        return
    try:
        rows = [np.asarray(session.run(None, {name: example})[0])[0] for example in examples]
    except Exception as error:  # of onnxruntime, and IndexError of an output without rows
        raise ValueError(f"{graph} does not run: {' '.join(str(error).split())[:200]}") from error
    if rows[0].ndim != 1 or not all(np.isfinite(row).all() and row.any() for row in rows):
        yield f"The first output of {graph} must be a row of finite numbers, not all 0, a text or picture."
    elif np.allclose(*rows, rtol=0, atol=1e-6):
        yield f"{graph} gives two different inputs the same embedding."
    else:
        widths[tower] = len(rows[0])

"""Benchmarks as data: a JSON file each says where the data come from, how they are measured and what was published.

    flickr = load_benchmarks()["flickr30k-pt"]
    flickr.published_figure("baseline", "text_to_image")  # {"mean": 76.23}, per cent
    folder = adapted("xm3600", Path("data/xm3600"), "test", "hi", Path("results/layouts/xm3600-hi"))

Published figures are those of CAPIVARA's model card and paper, and of a benchmark's own authors where `protocol_note`
says so, in per cent; what was not published is absent. A Hub id that was not looked up is null: such data are taken
from a local path alone. A published layout of its own is made readable by `eval.retrieval`: a reader gives the folder
of images and, for each, its file and captions, which become a `metadata.jsonl` beside a link to the images, so that
nothing is copied. File names that point out of the folder are refused.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, get_session

from capivara_common.cli import WrongUse
from capivara_common.files import read_json, write_text
from capivara_common.links import refuse_links_out
from eval.records.schema import DIRECTIONS
from eval.records.schema import METRICS as RECORD_METRICS

FOLDER = Path(__file__).resolve().parent
SUITES = ("paper", "elevater", "beyond", "retrieval", "classification")  # "paper" has all of them
METRICS = {  # of records, with the task that has them; all are shares but the median rank
    **dict.fromkeys(("mean_recall", "recall@1", "recall@5", "recall@10", "median_rank"), "retrieval"),
    **{metric: "classification" for metric, task in RECORD_METRICS.items() if task == "classes"},
}
Rows = list[tuple[str, list[str]]]  # file within the folder of images, and its captions


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is measured on which data; or, of the task "average", a published mean over others."""

    key: str  # name of the file, and of the data with --data
    title: str  # as tables show it
    task: str  # "retrieval", "classification" or "average"
    suite: tuple[str, ...]  # the suites that it belongs to, of `SUITES`
    metric: str  # of `METRICS`, that the published figures are in; "average"
    protocol_note: str  # what a reader of the figures must know
    # "baseline", "capivara" or "capivara_opt" -> `mean` and `std` in per cent, of retrieval by direction
    published: dict[str, dict[str, Any]]
    language: str = "pt"  # that the published figures are of
    # `hub_id` (None where it was not looked up), `local_layout` in words, `url` of where people get it, and `reader` of
    # `READERS` for a layout of its own
    source: dict[str, str | None] = field(default_factory=dict)
    split: str = ""  # that is measured
    protocol: str = ""  # "ours" or "babel" for names and prompts; "captions" for retrieval
    test_images: int | None = None  # of the published split where known; on other numbers figures are not like for like
    image_column: str | None = None  # None for the only column of images
    label_column: str | None = None  # None for one of the usual names
    caption_column: str = ""  # of retrieval, a pattern with `{language}`
    caption_positions: str = "all"  # of retrieval, as `eval.retrieval` takes them
    prompts: str | None = None  # of classification, key in `eval/prompts/pt`
    other_languages: tuple[str, ...] = ()  # that are measured, too
    known_languages: tuple[str, ...] = ()  # that may be asked for; those above where empty
    data_of: str | None = None  # key of the benchmark whose local data serve where there are none of this key
    like_for_like: bool = True  # whether the published figures are of the same texts and images
    of: str | None = None  # of an average: the suite whose `count` benchmarks must all have been measured
    count: int = 0

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that are measured where none are asked for."""
        return (self.language, *self.other_languages)

    @property
    def all_languages(self) -> tuple[str, ...]:
        """Codes of the languages that may be asked for."""
        return self.known_languages or self.languages

    @property
    def directions(self) -> tuple[str, ...]:
        """Of retrieval both, else an empty one, as in records."""
        return DIRECTIONS if self.task == "retrieval" else ("",)

    def published_figure(self, model: str, direction: str = "") -> dict[str, float] | None:
        """`mean`, and `std` where it was published, in per cent, of the benchmark's metric and language."""
        figure = self.published.get(model)
        return figure.get(direction) if figure and self.task == "retrieval" else figure


def load_benchmarks(averages: bool = False) -> dict[str, Benchmark]:
    """All by key, in the order of tables: retrieval, ELEVATER, ImageNet, those beyond the paper; or the averages.

    Raises:
        ValueError: a file has another form than this module describes.
    """

    def order(benchmark: Benchmark) -> tuple:
        suite = benchmark.suite
        return "beyond" in suite, benchmark.task != "retrieval", "elevater" not in suite, benchmark.title.casefold()

    found = [read_benchmark(path) for path in FOLDER.glob("*.json")]
    return {b.key: b for b in sorted(found, key=order) if (b.task == "average") == averages}


def read_benchmark(path: Path) -> Benchmark:
    """The benchmark, or average, of a file. Raises ValueError where it has other keys than the class here."""
    try:
        data = read_json(path)
        return Benchmark(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path.name} is no benchmark: {error}.") from error


def must_be_known(what: str, names: list[str], known: list[str]) -> None:
    """Raise WrongUse for the first of `names` that is not `known`; the known ones are listed, nearest first."""
    for name in names:
        if name not in known:
            ranked = sorted(known, key=lambda other: -SequenceMatcher(None, name.casefold(), other.casefold()).ratio())
            raise WrongUse(f"Unknown {what} {name!r}. Known, nearest first: {', '.join(ranked)}.")


def local_data(items: list[str]) -> dict[str, Path]:
    """Key -> path, of items KEY=PATH. Raises ValueError where one is none, its key is unknown or there is no path."""
    given = {}
    for item in items:
        key, _, path = item.partition("=")
        if not path:
            raise ValueError(f"--data takes KEY=PATH, such as food-101=data/food-101; got {item!r}.")
        must_be_known("benchmark", [key], list(load_benchmarks()))
        if not Path(path).exists():
            raise ValueError(f"--data {item}: there is no {path}.")
        given[key] = Path(path)
    return given


def locate(
    benchmark: Benchmark, given: dict[str, Path], folder: Path | None, hub_fault: Callable[[], str]
) -> dict[str, Any]:
    """Where the data of a benchmark are: at a `given` path by key, in `folder` under it, or on the Hub.

    That is `data`, a path or Hub id, whether it is `local`, and the `reason` why there are none, or "". `hub_fault`
    says why the Hub can't be used, or ""; it is asked where that is needed.
    """
    keys = [key for key in (benchmark.key, benchmark.data_of) if key]
    paths = [given[key] for key in keys if key in given]
    paths += [folder / key for key in keys if (folder / key).exists()] if folder else []
    if paths:
        return {"data": str(paths[0]), "local": True, "reason": ""}
    identity, url = benchmark.source["hub_id"], benchmark.source["url"]
    fault = "no Hub id is known" if identity is None else hub_fault()
    way = f"give --data {benchmark.key}=PATH{f', from {url}' if url else ''}"
    reason = f"no local data, and {fault}; {way}" if fault else ""
    return {"data": "" if fault else identity, "local": False, "reason": reason}


def hub_fault() -> str:
    """Why the Hub can't be used, or "": asked before the first data set, each of which waits half a minute in vain."""
    if constants.HF_HUB_OFFLINE:
        return ""  # what the Hub's cache lacks fails at once
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of the HTTP client, which huggingface_hub may exchange
        return f"the Hub can't be reached ({type(error).__name__})"
    return ""


def adapted(reader: str, folder: Path, split: str, language: str, target: Path) -> Path:
    """`folder`, or what was made of it at `target` where it has the layout of the reader of `READERS`.

    The captions become the column `captions-<language>`.

    Raises:
        ValueError: a file has another form, a language is missing, or a file name or link points out of the folder.
    """
    if folder.is_dir():
        refuse_links_out(folder)
    try:
        read = READERS[reader](folder, split, language)
    except json.JSONDecodeError as error:
        raise ValueError(f"A file of {folder.name} is no JSON: {error}.") from error
    if read is None:
        return folder
    images, rows = read
    if not images.is_dir():
        raise ValueError(f"{folder} has no folder of images {images.relative_to(folder)}.")
    for name, _ in rows:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ValueError(f"The file name {name!r} points out of the folder of images and is refused.")
    shutil.rmtree(target, ignore_errors=True)
    (target / split).mkdir(parents=True)
    (target / split / "images").symlink_to(images.resolve(), target_is_directory=True)
    lines = [{"file_name": f"images/{name}", f"captions-{language}": captions} for name, captions in rows]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(target / split / "metadata.jsonl", text)
    return target


def pracegover(folder: Path, split: str, language: str) -> tuple[Path, Rows] | None:
    """PraCegoVer: `pracegover_400k.json`, lists of posts by split, or a file with the list of one split.

    The form of `pracegover_400k.json` is the one that the paper's authors read (`dataset[split]`,
    clip_pt/src/utils/dataset/pracegover_dataset.py of hiaac-nlp/CAPIVARA).
    """
    names = ("pracegover_400k.json", f"{split}.json", f"{split}/dataset.json")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        if (folder / "dataset.json").is_file():
            raise ValueError(
                f"{folder.name}/dataset.json holds all posts and names no split. Take {names[0]} of the release, or "
                f"put the list of the split into {names[1]}."
            )
        return None
    posts = read_json(path)
    if isinstance(posts, dict) and split not in posts:
        raise ValueError(f"{path.name} has no split {split!r}; there are {sorted(posts)}.")
    posts, rows = posts[split] if isinstance(posts, dict) else posts, []
    if not isinstance(posts, list):
        raise ValueError(f"{path.name} must hold a list of posts.")
    for number, post in enumerate(posts):
        row = [post.get("filename"), post.get("caption")] if isinstance(post, dict) else [None]
        if not all(isinstance(text, str) for text in row):
            raise ValueError(f"{path.name}: post {number} needs the texts `filename` and `caption`.")
        rows.append((row[0], row[1:]))
    images = path.parent / "images"
    return images if images.is_dir() else folder / "images", rows


def xm3600(folder: Path, split: str, language: str) -> tuple[Path, Rows] | None:
    """XM3600: `captions.jsonl`, a line an image, and `images/<key>.jpg`, as CLIP_benchmark reads them."""
    path, rows = folder / "captions.jsonl", []
    if not path.is_file():
        return None
    for number, text in enumerate(filter(str.strip, _text_lines(path))):
        line = json.loads(text)
        if not isinstance(line, dict) or not isinstance(line.get("image/key"), str):
            raise ValueError(f"{path.name}: line {number} has no `image/key`.")
        there = {code: of["caption"] for code, of in line.items() if isinstance(of, dict) and "caption" in of}
        if not isinstance(there.get(language), list):
            known = ", ".join(sorted(there)) or "none"
            raise ValueError(f"{path.name}: line {number} has no captions of {language!r}; there are {known}.")
        rows.append((f"{line['image/key']}.jpg", there[language]))
    return folder / "images", rows


def flickr30k_200(folder: Path, split: str, language: str) -> tuple[Path, Rows] | None:
    """Flickr30k-200: `filenames.txt` and `<language>.txt`, or what CLIP_benchmark makes of them.

    Of the paths of CLIP_benchmark, which start at its root, the last part is taken.
    """
    made = folder / f"flickr30k_200-{language}.json"
    if (folder / "filenames.txt").is_file():
        names, captions = _text_lines(folder / "filenames.txt"), _text_lines(folder / f"{language}.txt")
    elif made.is_file():
        content = read_json(made)
        columns = [content.get(key) for key in ("image_paths", "annotations")] if isinstance(content, dict) else [None]
        if not all(isinstance(column, list) and all(isinstance(text, str) for text in column) for column in columns):
            raise ValueError(f"{made.name} needs `image_paths` and `annotations`, lists of texts.")
        names, captions = [PurePosixPath(name).name for name in columns[0]], columns[1]
    else:
        return None
    if len(captions) != len(names):
        raise ValueError(f"{folder.name}: {len(captions)} captions of {language} for {len(names)} images.")
    images = folder / "flickr30k-200" / "images"
    return images if images.is_dir() else folder / "images", [(n, [c]) for n, c in zip(names, captions, strict=True)]


READERS = {"pracegover": pracegover, "xm3600": xm3600, "flickr30k_200": flickr30k_200}


def _text_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"There is no {path.name} in {path.parent.name}.")
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")

"""Where a benchmark's data are, and published layouts of their own made readable by `eval.retrieval`.

    folder = adapted("xm3600", Path("data/xm3600"), "test", "hi", Path("results/layouts/xm3600-hi"))

A reader gives the folder of images and, for each, its file and captions. They become a `metadata.jsonl` beside a link
to the images, so that nothing is copied. File names that point out of the folder are refused.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, get_session

from capivara_common.files import read_json, write_text
from capivara_common.links import refuse_links_out
from capivara_common.privacy import hide_paths
from eval.benchmarks import Benchmark, load_benchmarks, must_be_known

Rows = list[tuple[str, list[str]]]  # file within the folder of images, and its captions


@dataclass(frozen=True)
class Location:
    """Where a benchmark's data are: a local path or Hub id (`name`), or the reason why they are not available."""

    name: str = ""
    local: bool = False
    reason: str = ""


def local_data(items: list[str]) -> dict[str, Path]:
    """Key -> path, of items KEY=PATH.

    Raises:
        ValueError: an item is no KEY=PATH, its key is unknown, or there is no such path.
    """
    given = {}
    for item in items:
        key, separator, path = item.partition("=")
        if not separator or not path:
            raise ValueError(f"--data takes KEY=PATH, such as food-101=data/food-101; got {item!r}.")
        must_be_known("benchmark", [key], list(load_benchmarks()))
        if not Path(path).exists():
            raise ValueError(f"--data {item}: there is no {path}.")
        given[key] = Path(path)
    return given


def locate(
    benchmark: Benchmark, given: dict[str, Path], folder: Path | None, offline: bool, hub_fault: Callable[[], str]
) -> Location:
    """Where the data of a benchmark are: at a `given` path by key, in `folder` under it, or on the Hub.

    `hub_fault` says why the Hub can't be used, or ""; it is asked where that is needed.
    """
    keys = [key for key in (benchmark.key, benchmark.data_of) if key]
    paths = [given[key] for key in keys if key in given]
    paths += [folder / key for key in keys if (folder / key).exists()] if folder else []
    if paths:
        return Location(str(paths[0]), local=True)
    identity, url = benchmark.source["hub_id"], benchmark.source["url"]
    way = f"give --data {benchmark.key}=PATH{f', from {url}' if url else ''}"
    if identity is None:
        return Location(reason=f"no local data, and no Hub id is known; {way}")
    fault = "offline" if offline else hub_fault()
    return Location(reason=f"no local data, and {fault}; {way}") if fault else Location(identity)


def hub_fault() -> str:
    """Why the Hub can't be used, or "": asked before the first data set, each of which waits half a minute in vain."""
    if constants.HF_HUB_OFFLINE:
        return ""  # what the Hub's cache lacks fails at once
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of the HTTP client, which huggingface_hub may exchange
        return f"the Hub can't be reached ({type(error).__name__})"
    return ""


def readable(benchmark: Benchmark, language: str, location: Location, folder: Path) -> tuple[str, str]:
    """What `eval.retrieval` or `eval.classification` takes for data, made below `folder`, and why it can't be had."""
    reader = benchmark.source.get("reader")
    if location.reason or not location.local or not reader:
        return location.name, location.reason
    try:
        target = folder / f"{benchmark.key}-{language}"
        return str(adapted(reader, Path(location.name), benchmark.split, language, target)), ""
    except (ValueError, OSError) as error:
        return location.name, " ".join(hide_paths(str(error)).split())


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
    shutil.rmtree(target, ignore_errors=True)
    (target / split).mkdir(parents=True)
    (target / split / "images").symlink_to(images.resolve(), target_is_directory=True)
    column = f"captions-{language}"
    lines = [{"file_name": f"images/{_inside(name)}", column: captions} for name, captions in rows]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(target / split / "metadata.jsonl", text)
    return target


def linked_images(made: Path, split: str) -> Path:
    """Where the link to the images leads, in what `adapted` made."""
    return (made / split / "images").resolve()


def pracegover(folder: Path, split: str, language: str) -> tuple[Path, Rows] | None:
    """PraCegoVer: `pracegover_400k.json`, lists of posts by split, or a file with the list of one split.

    The form of `pracegover_400k.json` is the one that the paper's authors read (`dataset[split]`,
    clip_pt/src/utils/dataset/pracegover_dataset.py of hiaac-nlp/CAPIVARA).
    """
    of_split = [f"{split}.json", f"{split}/dataset.json"]
    path = next((folder / name for name in ("pracegover_400k.json", *of_split) if (folder / name).is_file()), None)
    if path is None:
        if (folder / "dataset.json").is_file():
            raise ValueError(
                f"{folder.name}/dataset.json holds all posts and names no split. Take pracegover_400k.json of the "
                f"release, or put the list of the split into {of_split[0]}."
            )
        return None
    posts = read_json(path)
    if isinstance(posts, dict) and split not in posts:
        raise ValueError(f"{path.name} has no split {split!r}; there are {sorted(posts)}.")
    posts = posts[split] if isinstance(posts, dict) else posts
    if not isinstance(posts, list):
        raise ValueError(f"{path.name} must hold a list of posts.")
    rows = []
    for number, post in enumerate(posts):
        name, caption = (post.get("filename"), post.get("caption")) if isinstance(post, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{path.name}: post {number} needs the texts `filename` and `caption`.")
        rows.append((name, [caption]))
    images = path.parent / "images"
    return images if images.is_dir() else folder / "images", rows


def xm3600(folder: Path, split: str, language: str) -> tuple[Path, Rows] | None:
    """XM3600: `captions.jsonl`, a line an image, and `images/<key>.jpg`, as CLIP_benchmark reads them."""
    path, rows = folder / "captions.jsonl", []
    if not path.is_file():
        return None
    for number, text in enumerate(filter(str.strip, _text_lines(path))):
        line = json.loads(text)
        key = line.get("image/key") if isinstance(line, dict) else None
        if not isinstance(key, str):
            raise ValueError(f"{path.name}: line {number} has no `image/key`.")
        captions = line[language].get("caption") if isinstance(line.get(language), dict) else None
        if not isinstance(captions, list):
            there = ", ".join(sorted(key for key, value in line.items() if isinstance(value, dict))) or "none"
            raise ValueError(f"{path.name}: line {number} has no captions of {language!r}; there are {there}.")
        rows.append((f"{key}.jpg", captions))
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


def _inside(name: str) -> str:
    """The file name, if it stays within its folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"The file name {name!r} points out of the folder of images and is refused.")
    return name


def _text_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"There is no {path.name} in {path.parent.name}.")
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")

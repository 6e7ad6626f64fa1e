"""Small folders of data for each benchmark, and releases that docs/evaluation.md makes readable."""

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from eval.benchmarks import load_benchmarks
from eval.prompts import load_prompts

BENCHMARKS = load_benchmarks()
ELEVATER = [key for key, benchmark in BENCHMARKS.items() if "elevater" in benchmark.suite]
IMAGES = 12  # a retrieval with recall@10 needs ten


def picture(number: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (34, 38, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def save_pictures(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    names = [f"{number:03d}.jpg" for number in range(IMAGES)]
    for number, name in enumerate(names):
        picture(number).save(folder / name)
    return names


def save_test(folder: Path, column: str, feature: List, values: list) -> None:
    """A saved data set with a picture for each value of a column."""
    rows = {"image": list(map(picture, range(len(values)))), column: values}
    features = Features({"image": Image(), column: feature})
    DatasetDict(test=Dataset.from_dict(rows, features=features)).save_to_disk(folder)


def make_releases(folder: Path) -> None:
    """XM3600, PraCegoVer and Flickr30k-200 as they are published, each under its key."""
    for key in ("xm3600", "pracegover", "flickr30k_200"):
        names = save_pictures(folder / key / "images")
    keys, codes = [name.removesuffix(".jpg") for name in names], ("pt", "en", "es", "hi", "sw")
    lines = [
        {"image/key": key, "image/locale": "pt"}
        | {code: {"caption": [f"{code} foto {key}", f"casa {key}"]} for code in codes}
        for key in keys
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "xm3600" / "captions.jsonl").write_text(text, encoding="utf-8")
    posts = [{"user": "u", "filename": name, "raw_caption": "#PraCegoVer", "caption": f"foto {name}"} for name in names]
    content = {"train": [], "validation": [], "test": posts}
    (folder / "pracegover" / "pracegover_400k.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "flickr30k_200" / "filenames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for code in ("por_Latn", "hin_Deva", "xho_Latn"):
        text = "".join(f"{code} {name}\n" for name in names)
        (folder / "flickr30k_200" / f"{code}.txt").write_text(text, encoding="utf-8")


def make_readable(folder: Path) -> None:
    """The releases in `folder` as docs/evaluation.md makes them."""
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "captions.jsonl" in block)
    assert "data/benchmarks" in code
    exec(compile(code.replace("data/benchmarks", str(folder)), "evaluation.md", "exec"), {})


def make_classes(folder: Path, key: str, classes: int = 3) -> None:
    """A sub-folder of two images a class, of the last classes whose names can be folders."""
    names = [name for name in load_prompts(BENCHMARKS[key].prompts).english_names if "/" not in name][-classes:]
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            picture(10 * number + i).save(folder / name / f"{i}.png")


def make_data(folder: Path, key: str) -> None:
    """A small folder of a benchmark."""
    if key in ("flickr30k-pt", "coco-pt"):  # the column is that of the Hub's copies
        texts = [[f"foto {row} azul {i}" for i in range(5)] for row in range(IMAGES)]
        save_test(folder, "caption", List(Value("string")), texts)
    elif key == "voc-2007-classification":
        names = load_prompts(key).english_names
        labels = [[number, (number + 3) % len(names)] for number in range(len(names))]
        save_test(folder, "label", List(ClassLabel(names=names)), labels)
    else:
        make_classes(folder, key, classes=2 if len(load_prompts(BENCHMARKS[key].prompts).english_names) == 2 else 3)

"""Makes small datasets for each benchmark, some in the layout in which they are released."""

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
IMAGES = 12  # images of a retrieval dataset; recall@10 needs more than ten


def make_image(number: int) -> PIL.Image.Image:
    """Make a noisy image; the number is its seed."""
    pixels = np.random.default_rng(number).integers(0, 256, (34, 38, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def save_images(folder: Path) -> list[str]:
    """Save images to a new folder and return their file names."""
    folder.mkdir(parents=True)
    names = [f"{number:03d}.jpg" for number in range(IMAGES)]
    for number, name in enumerate(names):
        make_image(number).save(folder / name)
    return names


def save_test(folder: Path, column: str, feature: List, values: list) -> None:
    """Save a dataset with an image for each value of a column."""
    rows = {"image": list(map(make_image, range(len(values)))), column: values}
    features = Features({"image": Image(), column: feature})
    DatasetDict(test=Dataset.from_dict(rows, features=features)).save_to_disk(folder)


def make_releases(folder: Path) -> None:
    """Write XM3600, PraCegoVer and Flickr30k-200 in the layout of their release, each under its key."""
    for key in ("xm3600", "pracegover", "flickr30k_200"):
        names = save_images(folder / key / "images")
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
    """Convert the releases in `folder` with the code in docs/how-to/evaluation.md."""
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "captions.jsonl" in block)
    assert "data/benchmarks" in code
    exec(compile(code.replace("data/benchmarks", str(folder)), "evaluation.md", "exec"), {})


def make_classes(folder: Path, key: str, classes: int = 3) -> None:
    """Make a subfolder with two images for each of the last classes whose names can be folder names."""
    names = [name for name in load_prompts(BENCHMARKS[key].prompts).english_names if "/" not in name][-classes:]
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            make_image(10 * number + i).save(folder / name / f"{i}.png")


def make_data(folder: Path, key: str) -> None:
    """Make a small folder of data for a benchmark."""
    if key in ("flickr30k-pt", "coco-pt"):  # with the column of the copies on the Hub
        texts = [[f"foto {row} azul {i}" for i in range(5)] for row in range(IMAGES)]
        save_test(folder, "caption", List(Value("string")), texts)
    elif key == "voc-2007-classification":
        names = load_prompts(key).english_names
        labels = [[number, (number + 3) % len(names)] for number in range(len(names))]
        save_test(folder, "label", List(ClassLabel(names=names)), labels)
    else:
        make_classes(folder, key, classes=2 if len(load_prompts(BENCHMARKS[key].prompts).english_names) == 2 else 3)

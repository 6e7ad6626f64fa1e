"""From which similarity on two pictures are nearly the same: copies of real photographs against other photographs.

    python -m benchmarks.duplicates
    python -m benchmarks.duplicates --model hiaac-nlp/CAPIVARA --output /tmp/duplicates.json

Photographs that install from PyPI are copied in every kind of `KINDS`, written as files and indexed as a user would.
A copy is found where its similarity to its original reaches the threshold. What must not be found: any two files of
different photographs, and cuts of one picture, of half its width and height, which show the same thing in the same
colours and share at most a quarter of their pixels. Compared are vectors alone, looks alone, and both in some shares.
The last line of the output is JSON, kept in benchmarks/results/duplicates.json; docs/benchmarks.md shows it, and
`capivara_search.results.SAME` is chosen by it.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import RESULTS, conditions, finish
from capivara_common.cli import flag, parse, run_command
from capivara_search import PictureIndex
from capivara_search.duplicates import compared, look_of
from capivara_search.results import SAME
from examples.real_images import PHOTOGRAPHS, photo

DRAWINGS = ("colorwheel", "horse")  # of `PHOTOGRAPHS`, that are no photographs; they are cut, not copied
THRESHOLDS = (0.7, 0.75, 0.8, 0.82, SAME, 0.86, 0.9, 0.95, 0.97)
CUTS = {f"cut {x} {y}": (x, y) for x in range(3) for y in range(3)}  # corner, in quarters of a picture
RULES = [(6, 0), (6, 1), (6, 2 / 3), (6, 1 / 2), (6, 3 / 4), (4, 2 / 3), (8, 2 / 3)]  # pixels of a look, its share


@dataclass
class DuplicatesArguments:
    """Arguments of `benchmarks.duplicates`."""

    model: str = flag("miniature", "Folder or Hub id of the model; the miniature is there without network.")
    output: Path = flag(RESULTS / "duplicates.json", "JSON file.")


def reduced(pixels: int, image: Image.Image) -> Image.Image:
    """Its longer side at most so long."""
    scale = min(1, pixels / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def cropped(share: float, image: Image.Image) -> Image.Image:
    """Without a share of its width and height, two thirds of it on the left and above."""
    (width, height), (left, top) = image.size, (round(side * share * 2 / 3) for side in image.size)
    return image.crop((left, top, left + round(width * (1 - share)), top + round(height * (1 - share))))


KINDS: dict[str, tuple[Any, int]] = {  # name -> how a copy is made, quality of the JPEG file
    "reduced to 400 pixels": (partial(reduced, 400), 90),
    "reduced to 200 pixels": (partial(reduced, 200), 90),
    "reduced to 100 pixels": (partial(reduced, 100), 90),
    "recompressed, quality 50": (lambda image: image, 50),
    "recompressed, quality 10": (lambda image: image, 10),
    "cropped by 5 %": (partial(cropped, 0.05), 90),
    "cropped by 10 %": (partial(cropped, 0.1), 90),
    "cropped by 20 %": (partial(cropped, 0.2), 90),
    "cropped by 5 %, reduced to 200 pixels, quality 50": (lambda image: reduced(200, cropped(0.05, image)), 50),
}


def write_files(folder: Path) -> dict[tuple[str, str], str]:
    """Originals and copies of all photographs, and cuts of all pictures: picture and kind -> path."""
    files = {}
    for name in sorted(PHOTOGRAPHS):
        image = photo(name)
        made = {"original": (image, 95)} | {kind: (copy(image), quality) for kind, (copy, quality) in KINDS.items()}
        made = {} if name in DRAWINGS else made
        width, height = image.width // 2, image.height // 2
        for kind, corner in CUTS.items():
            left, top = (side * place // 2 for side, place in zip((width, height), corner, strict=True))
            made[kind] = (image.crop((left, top, left + width, top + height)), 95)
        for kind, (picture, quality) in made.items():
            files[name, kind] = str(folder / f"{len(files):04d}.jpg")
            picture.save(files[name, kind], quality=quality)
    return files


def measure(names: list[tuple[str, str]], scores: np.ndarray) -> dict[str, Any]:
    """Recall of copies at each threshold, and how many pairs are found that must not be."""
    place, whole = {own: number for number, own in enumerate(names)}, [own for own in names if own[1] not in CUTS]
    photographs, pictures = sorted({name for name, _ in whole}), sorted({name for name, _ in names})
    copies = {kind: np.array([scores[place[p, "original"], place[p, kind]] for p in photographs]) for kind in KINDS}
    others = {"different photographs": [(a, b) for a, b in combinations(whole, 2) if a[0] != b[0]]}
    for title, apart in (("share nothing", lambda x, y: 2 in (x, y)), ("share a quarter", lambda x, y: x == y == 1)):
        cuts = [(a, b) for a, b in combinations(CUTS, 2) if apart(*np.abs(np.subtract(CUTS[a], CUTS[b])))]
        others[f"cuts of one that {title}"] = [((name, a), (name, b)) for name in pictures for a, b in cuts]
    others = {name: np.array([scores[place[a], place[b]] for a, b in found]) for name, found in others.items()}
    at = {}
    for least in THRESHOLDS:
        recall = {kind: float(np.mean(one >= least)) for kind, one in copies.items()}
        wrong = {name: int(np.sum(one >= least)) for name, one in others.items()}
        right = sum(recall.values()) * len(photographs)
        at[str(least)] = {"recall": recall, "wrong": wrong, "precision": right / (right + sum(wrong.values()))}
    return {"pairs": {name: len(one) for name, one in others.items()}, "thresholds": at}


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(DuplicatesArguments, __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        index = PictureIndex.open(Path(folder) / "i.lance", model=args.model)
        index.add(folder)
        vectors, images = index.vectors(list(files.values())), [Image.open(path) for path in files.values()]
        rules = []
        for side, share in RULES:
            own = compared(vectors, [look_of(image, side) for image in images], share)
            rules.append({"side": side, "share": share, **measure(list(files), own @ own.T)})
    photographs = len(PHOTOGRAPHS.keys() - DRAWINGS)
    finish({**conditions(), "model": args.model, "photographs": photographs, "same": SAME, "rules": rules}, args.output)


if __name__ == "__main__":
    run_command(main)

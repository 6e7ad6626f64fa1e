"""Measure which pictures are taken for nearly the same: copies of photographs and icons, and what is no copy.

    python -m benchmarks.duplicates
    python -m benchmarks.duplicates --model hiaac-nlp/CAPIVARA --output /tmp/duplicates.json

Photographs and icons that install from PyPI (`pip install -e ".[test]"`) are copied in every kind of `PHOTO_KINDS` and
`ICON_KINDS`, written as files and indexed as a user would. A copy is found if its similarity to its original reaches
the threshold. What must not be found: any two files of different photographs; cuts of one picture, of half its width
and height, that share at most a quarter of their pixels; and pictures of different emoji, all of OpenMoji that
`examples.openmoji.concepts` has. Emoji whose drawings are the same to the eye, such as "full moon" and "yellow circle",
are not counted. `capivara_search.results.SAME` and the constants of `capivara_search.duplicates` were chosen by the
result, which is kept in benchmarks/results/duplicates.json; docs/benchmarks.md shows it.
"""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import RESULTS_FOLDER, describe_conditions, write_results
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_search import PictureIndex
from capivara_search.duplicates import (
    FLOAT16_TOLERANCE,
    SIGNATURE_BYTES,
    add_color_signatures,
    find_duplicate_groups,
    pairwise_similarity,
)
from capivara_search.results import DUPLICATE_MIN_SIMILARITY
from capivara_search.table import COLOR_SIGNATURE_COLUMN
from examples.openmoji.concepts import load_concepts
from examples.openmoji.dataset import render_png
from examples.real_images import PHOTOGRAPHS, load_photo

DRAWINGS = ("colorwheel", "horse")  # of `PHOTOGRAPHS`, that are no photographs; they are cut, not copied
CUT_CORNERS = {f"cut {x} {y}": (x, y) for x in range(3) for y in range(3)}  # corner, in quarters of a picture
COPIED_ICON_STEP = 31  # every so many of the icons are copied
SAME_DRAWING_MAX_DIFFERENCE = (
    0.35  # mean absolute difference of pixels, of 255, up to which two icons are the same drawing
)
ORIGINAL_KIND = "original"

CopyRecipe = tuple[Callable[[Image.Image], Image.Image], dict[str, Any]]  # how a copy is made, and options of its file


@dataclass
class DuplicatesArguments:
    """Command-line arguments of `benchmarks.duplicates`."""

    model: str = flag("miniature", "Folder or Hub id of the model; the miniature is there without network.")
    output: Path = flag(RESULTS_FOLDER / "duplicates.json", "JSON file.")


def reduce_image(pixels: int, image: Image.Image) -> Image.Image:
    """Return the image with its longer side reduced to at most so many pixels."""
    scale = min(1, pixels / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def crop_image(share: float, image: Image.Image) -> Image.Image:
    """Return the image without a share of its width and height, two thirds of it on the left and above."""
    (width, height), (left, top) = image.size, (round(side * share * 2 / 3) for side in image.size)
    return image.crop((left, top, left + round(width * (1 - share)), top + round(height * (1 - share))))


def copy_image(image: Image.Image) -> Image.Image:
    """Return the image itself."""
    return image


PHOTO_KINDS: dict[str, CopyRecipe] = {
    "reduced to 400 pixels": (partial(reduce_image, 400), {"quality": 90}),
    "reduced to 200 pixels": (partial(reduce_image, 200), {"quality": 90}),
    "reduced to 100 pixels": (partial(reduce_image, 100), {"quality": 90}),
    "recompressed, quality 50": (copy_image, {"quality": 50}),
    "recompressed, quality 10": (copy_image, {"quality": 10}),
    "cropped by 5 %": (partial(crop_image, 0.05), {"quality": 90}),
    "cropped by 10 %": (partial(crop_image, 0.1), {"quality": 90}),
    "cropped by 20 %": (partial(crop_image, 0.2), {"quality": 90}),
    "cropped by 5 %, reduced to 200 pixels, quality 50": (
        lambda image: reduce_image(200, crop_image(0.05, image)),
        {"quality": 50},
    ),
}
ICON_KINDS: dict[str, CopyRecipe] = {
    "enlarged to 448 pixels": (lambda image: image.resize((448, 448), Image.Resampling.BICUBIC), {"format": "PNG"}),
    "reduced to 112 pixels": (partial(reduce_image, 112), {"format": "PNG"}),
    "reduced to 64 pixels": (partial(reduce_image, 64), {"format": "PNG"}),
    "as JPEG, quality 90": (copy_image, {"quality": 90}),
    "as JPEG, quality 50": (copy_image, {"quality": 50}),
}


def write_photographs(folder: Path) -> dict[tuple[str, str], str]:
    """Write originals and copies of all photographs and cuts of all pictures; return name and kind -> path."""
    files = {}
    for name in sorted(PHOTOGRAPHS):
        image, made = load_photo(name), {}
        if name not in DRAWINGS:
            made = {ORIGINAL_KIND: (image, {"quality": 95})}
            made |= {kind: (copy(image), options) for kind, (copy, options) in PHOTO_KINDS.items()}
        width, height = image.width // 2, image.height // 2
        for kind, corner in CUT_CORNERS.items():
            left, top = (side * place // 2 for side, place in zip((width, height), corner, strict=True))
            made[kind] = (image.crop((left, top, left + width, top + height)), {"quality": 95})
        for kind, (picture, options) in made.items():
            files[name, kind] = str(folder / f"photo-{len(files):04d}.jpg")
            picture.save(files[name, kind], **options)
    return files


def write_icons(folder: Path) -> dict[tuple[str, str], str]:
    """Write OpenMoji's pictures, and copies of some; return emoji and kind -> path."""
    files = {}
    for number, icon in enumerate(chain.from_iterable(load_concepts().values())):
        drawn = render_png(icon.emoji)
        path = folder / f"icon-{len(files):05d}.png"
        path.write_bytes(drawn)
        files[icon.emoji, ORIGINAL_KIND] = str(path)
        for kind, (copy, options) in ICON_KINDS.items() if number % COPIED_ICON_STEP == 0 else ():
            ending = ".png" if "format" in options else ".jpg"
            files[icon.emoji, kind] = str(folder / f"icon-{len(files):05d}{ending}")
            copy(Image.open(io.BytesIO(drawn))).save(files[icon.emoji, kind], **options)
    return files


def overlap_share(one: str, other: str) -> float:
    """Return the share of a cut's pixels that another one of `CUT_CORNERS` has, too."""
    (x, y), (right, down) = CUT_CORNERS[one], CUT_CORNERS[other]
    return (1 - abs(x - right) / 2) * (1 - abs(y - down) / 2)


def compute_copy_recall(
    names: list[tuple[str, str]], found: np.ndarray, kinds: dict[str, CopyRecipe]
) -> dict[str, float]:
    """Return the share of copies of each kind that are found, by (files, files) of what is nearly the same."""
    place = {own: number for number, own in enumerate(names)}
    copies = {kind: [(name, kind) for name, own in names if own == kind] for kind in kinds}
    return {
        kind: float(np.mean([found[place[one[0], ORIGINAL_KIND], place[one]] for one in pairs]))
        for kind, pairs in copies.items()
    }


def find_wrong_photographs(names: list[tuple[str, str]], found: np.ndarray) -> dict[str, list[int]]:
    """Return how many pairs that are no copies are found, and of how many."""
    place, whole = (
        {own: number for number, own in enumerate(names)},
        [own for own in names if own[1] not in CUT_CORNERS],
    )
    others = {"different photographs": [(a, b) for a, b in combinations(whole, 2) if a[0] != b[0]]}
    for part, title in ((0, "cuts of one that share nothing"), (0.25, "cuts of one that share a quarter")):
        cuts = [pair for pair in combinations(CUT_CORNERS, 2) if overlap_share(*pair) == part]
        others[title] = [((name, a), (name, b)) for name in sorted({name for name, _ in names}) for a, b in cuts]
    return {
        title: [int(sum(found[place[a], place[b]] for a, b in pairs)), len(pairs)] for title, pairs in others.items()
    }


def find_same_drawings(paths: list[str]) -> list[tuple[int, int]]:
    """Return the pairs of icons, by their places in `paths`, that are the same to the eye."""
    images = [Image.open(path) for path in paths]
    small, pairs = np.stack([np.asarray(image.reduce(8), np.int16).ravel() for image in images]), []
    for place in range(len(paths)):
        # A mean of means is at most as different as the pixels; rounding adds half a level.
        near = np.abs(small[place + 1 :] - small[place]).mean(axis=1) <= SAME_DRAWING_MAX_DIFFERENCE + 0.5
        for other in (place + 1 + np.flatnonzero(near)).tolist():
            difference = np.subtract(*(np.asarray(images[number], np.int16) for number in (place, other)))
            pairs += [(place, other)] * bool(np.abs(difference).mean() <= SAME_DRAWING_MAX_DIFFERENCE)
    return pairs


def measure_rule(
    vectors: np.ndarray, photos: dict, icons: dict, same: list[tuple[int, int]], threshold: float
) -> dict[str, Any]:
    """Measure one rule.

    Args:
        vectors: of `compared`, of the files of photographs, then of icons.
        photos: of `write_photographs`.
        icons: of `write_icons`.
        same: of `find_same_drawings`, among the originals of icons.
        threshold: similarity from which two files are nearly the same.
    """
    of_photos, of_icons = vectors[: len(photos)], vectors[len(photos) :]
    found = pairwise_similarity(of_photos, of_photos) >= threshold - FLOAT16_TOLERANCE
    result = {"threshold": threshold, "recall": compute_copy_recall(list(photos), found, PHOTO_KINDS)}
    result["wrong"] = find_wrong_photographs(list(photos), found)
    found = pairwise_similarity(of_icons, of_icons) >= threshold - FLOAT16_TOLERANCE
    originals = [number for number, (_, kind) in enumerate(icons) if kind == ORIGINAL_KIND]
    result["icon_recall"] = compute_copy_recall(list(icons), found, ICON_KINDS)
    found = np.triu(found[np.ix_(originals, originals)], 1)
    wrong = int(found.sum() - sum(found[pair] for pair in same))
    result["wrong"]["icons of different emoji"] = [wrong, len(originals) * (len(originals) - 1) // 2 - len(same)]
    sizes = [len(group) for group in find_duplicate_groups(of_icons[originals], threshold)]
    return result | {"largest_icon_group": max(sizes)}


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse_arguments(DuplicatesArguments, __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        photos, icons = write_photographs(Path(folder)), write_icons(Path(folder))
        index = PictureIndex.open(Path(folder) / "i.lance", model=args.model)
        index.add(folder)
        paths = [*photos.values(), *icons.values()]
        vectors = index.vectors(paths)
        rows = index._table.rows(["path", COLOR_SIGNATURE_COLUMN])
        looks = dict(zip(rows["path"].to_pylist(), rows[COLOR_SIGNATURE_COLUMN].to_pylist(), strict=True))
        alone, both = (
            add_color_signatures(vectors, known) for known in ([None] * len(paths), [looks[path] for path in paths])
        )
        rules = {
            "vectors alone, strict": (alone, 0.97),
            "vectors alone": (alone, 0.8),
            "both": (both, DUPLICATE_MIN_SIMILARITY),
        }
        same = find_same_drawings([path for (_, kind), path in icons.items() if kind == ORIGINAL_KIND])
        flat = [len(looks[path]) > SIGNATURE_BYTES for path in paths]
        found = {
            "model": args.model,
            "photographs": len({name for name, _ in photos} - {*DRAWINGS}),
            "icons": len({name for name, _ in icons}),
            "copied_icons": sum(kind == "reduced to 64 pixels" for _, kind in icons),
            "flat": {"photographs": sum(flat[: len(photos)]), "icons": sum(flat[len(photos) :])},
            "same_drawings": len(same),
            "rules": {
                name: measure_rule(one, photos, icons, same, threshold) for name, (one, threshold) in rules.items()
            },
        }
    write_results(describe_conditions() | found, args.output)


if __name__ == "__main__":
    run_command(main)

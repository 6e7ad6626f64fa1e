"""Measure how well near-duplicate detection finds copies of images, and how often it is wrong.

    python -m benchmarks.duplicates
    python -m benchmarks.duplicates --model hiaac-nlp/CAPIVARA --output /tmp/duplicates.json

The benchmark adds photographs, icons and changed copies of them, for example reduced copies, to a search index. It
counts the copies that are recognized as duplicates of their originals. These pairs must not be recognized:

- different photographs;
- two crops of the same image that share at most a quarter of their pixels;
- icons of different emoji, unless their drawings look the same.

Install the images by `pip install -e ".[test]"`. docs/reference/benchmarks.md shows the results.
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

from benchmarks.tools import RESULTS_FOLDER, output_results_with_conditions
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_search import PictureIndex, duplicates
from capivara_search.results import DUPLICATE_MIN_SIMILARITY
from capivara_search.table import COLOR_SIGNATURE_COLUMN
from examples.openmoji.concepts import load_emoji_by_concept
from examples.openmoji.dataset import render_openmoji_png
from examples.real_images import PHOTOGRAPHS, load_example_photo

# Entries of `PHOTOGRAPHS` that are drawings. The benchmark makes copies only of photographs, but crops of both.
DRAWINGS = ("colorwheel", "horse")
# Upper left corner (x, y) of each crop, in quarters of the image's width and height. Keys are the names of the crops. A
# crop has half the width and half the height of the image.
CUT_CORNERS = {f"cut {x} {y}": (x, y) for x in range(3) for y in range(3)}
COPIED_ICON_STEP = 31  # copies are made only of a sample, every 31st icon
# Two icons count as the same drawing if the mean absolute difference of their pixel values (0 to 255) is at most this.
SAME_DRAWING_MAX_DIFFERENCE = 0.35
ORIGINAL_KIND = "original"

# How a copy is made: (function that turns the original into the copy, keyword arguments for `Image.save`).
CopyRecipe = tuple[Callable[[Image.Image], Image.Image], dict[str, Any]]


@dataclass
class DuplicatesArguments:
    """Command-line arguments of `benchmarks.duplicates`, which measures how well copies of images are recognized."""

    model: str = flag("miniature", "Folder or Hub id of the model, or miniature: a tiny model that needs no network.")
    output: Path = flag(RESULTS_FOLDER / "duplicates.json", "JSON file for the results.")


def _shrink_image_to_max_side(pixels: int, image: Image.Image) -> Image.Image:
    """Scale an image down, unless it is already small enough.

    Args:
        pixels: Largest length of the longer side in pixels.
        image: The image.

    Returns:
        The image, whose longer side has at most `pixels` pixels.
    """
    scale = min(1, pixels / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def _crop_image(share: float, image: Image.Image) -> Image.Image:
    """Crop the image at all four edges: two thirds of the cut at the left and top, one third at the right and bottom.

    Args:
        share: Fraction of the width and of the height to cut off, 0 to 1.
        image: The image.

    Returns:
        The cropped image.
    """
    (width, height), (left, top) = image.size, (round(side * share * 2 / 3) for side in image.size)
    return image.crop((left, top, left + round(width * (1 - share)), top + round(height * (1 - share))))


PHOTO_KINDS: dict[str, CopyRecipe] = {
    "reduced to 400 pixels": (partial(_shrink_image_to_max_side, 400), {"quality": 90}),
    "reduced to 200 pixels": (partial(_shrink_image_to_max_side, 200), {"quality": 90}),
    "reduced to 100 pixels": (partial(_shrink_image_to_max_side, 100), {"quality": 90}),
    "recompressed, quality 50": (Image.Image.copy, {"quality": 50}),
    "recompressed, quality 10": (Image.Image.copy, {"quality": 10}),
    "cropped by 5 %": (partial(_crop_image, 0.05), {"quality": 90}),
    "cropped by 10 %": (partial(_crop_image, 0.1), {"quality": 90}),
    "cropped by 20 %": (partial(_crop_image, 0.2), {"quality": 90}),
    "cropped by 5 %, reduced to 200 pixels, quality 50": (
        lambda image: _shrink_image_to_max_side(200, _crop_image(0.05, image)),
        {"quality": 50},
    ),
}
ICON_KINDS: dict[str, CopyRecipe] = {
    "enlarged to 448 pixels": (lambda image: image.resize((448, 448), Image.Resampling.BICUBIC), {"format": "PNG"}),
    "reduced to 112 pixels": (partial(_shrink_image_to_max_side, 112), {"format": "PNG"}),
    "reduced to 64 pixels": (partial(_shrink_image_to_max_side, 64), {"format": "PNG"}),
    "as JPEG, quality 90": (Image.Image.copy, {"quality": 90}),
    "as JPEG, quality 50": (Image.Image.copy, {"quality": 50}),
}


def _write_photograph_variants(folder: Path) -> dict[tuple[str, str], str]:
    """Write the original and all copies of each photograph, and nine crops of each photograph and drawing.

    Args:
        folder: Existing folder for the JPEG files.

    Returns:
        The path of each file. Keys are the name of the image in `PHOTOGRAPHS` and the kind of the file:
        `ORIGINAL_KIND`, a key of `PHOTO_KINDS` or a key of `CUT_CORNERS`.
    """
    files = {}
    for name in sorted(PHOTOGRAPHS):
        image, variants = load_example_photo(name), {}
        if name not in DRAWINGS:
            variants = {ORIGINAL_KIND: (image, {"quality": 95})}
            variants |= {kind: (copy(image), options) for kind, (copy, options) in PHOTO_KINDS.items()}
        width, height = image.width // 2, image.height // 2
        for kind, corner in CUT_CORNERS.items():
            left, top = (side * quarters // 2 for side, quarters in zip((width, height), corner, strict=True))
            variants[kind] = (image.crop((left, top, left + width, top + height)), {"quality": 95})
        for kind, (variant, options) in variants.items():
            files[name, kind] = str(folder / f"photo-{len(files):04d}.jpg")
            variant.save(files[name, kind], **options)
    return files


def _write_icon_variants(folder: Path) -> dict[tuple[str, str], str]:
    """Write the icons of OpenMoji, and copies of every `COPIED_ICON_STEP`-th icon.

    Args:
        folder: Existing folder for the PNG and JPEG files.

    Returns:
        The path of each file. Keys are the emoji and the kind of the file: `ORIGINAL_KIND` or a key of `ICON_KINDS`.
    """
    files = {}
    for number, icon in enumerate(chain.from_iterable(load_emoji_by_concept().values())):
        png = render_openmoji_png(icon.emoji)
        path = folder / f"icon-{len(files):05d}.png"
        path.write_bytes(png)
        files[icon.emoji, ORIGINAL_KIND] = str(path)
        for kind, (copy, options) in ICON_KINDS.items() if number % COPIED_ICON_STEP == 0 else ():
            suffix = ".png" if "format" in options else ".jpg"
            files[icon.emoji, kind] = str(folder / f"icon-{len(files):05d}{suffix}")
            copy(Image.open(io.BytesIO(png))).save(files[icon.emoji, kind], **options)
    return files


def _compute_crop_overlap(first: str, second: str) -> float:
    """Return the fraction of the first crop's pixels that also lie in the second crop.

    Args:
        first: Name of the first crop, a key of `CUT_CORNERS`.
        second: Name of the second crop, a key of `CUT_CORNERS`.
    """
    (first_x, first_y), (second_x, second_y) = CUT_CORNERS[first], CUT_CORNERS[second]
    return (1 - abs(first_x - second_x) / 2) * (1 - abs(first_y - second_y) / 2)


def _compute_recall_by_copy_kind(
    files: list[tuple[str, str]], is_duplicate: np.ndarray, kinds: dict[str, CopyRecipe]
) -> dict[str, float]:
    """Return the fraction of copies that are recognized as duplicates of their originals, for each kind of copy.

    Args:
        files: Pair (name of the image, kind of the file) of each file. The kind of an original is `ORIGINAL_KIND`.
        is_duplicate: Boolean array of shape (files, files): whether two files are recognized as duplicates.
        kinds: Kinds of copies to measure, as keys; the values are not used.

    Returns:
        Fraction from 0 to 1 for each key of `kinds`.
    """
    index = {file: position for position, file in enumerate(files)}
    is_found = {kind: [] for kind in kinds}
    for name, kind in files:
        if kind in kinds:
            is_found[kind].append(is_duplicate[index[name, ORIGINAL_KIND], index[name, kind]])
    return {kind: float(np.mean(values)) for kind, values in is_found.items()}


def _count_false_duplicates(files: list[tuple[str, str]], is_duplicate: np.ndarray) -> dict[str, list[int]]:
    """Count the pairs of different photographs, and of crops of one image, that are wrongly recognized as duplicates.

    Args:
        files: Pair (name of the image, kind of the file) of each file, from `_write_photograph_variants`.
        is_duplicate: Boolean array of shape (files, files): whether two files are recognized as duplicates.

    Returns:
        `{kind of pair, such as "different photographs": [wrongly recognized pairs, all pairs]}`.
    """
    index = {file: position for position, file in enumerate(files)}
    uncut = [file for file in files if file[1] not in CUT_CORNERS]
    pairs = {"different photographs": [(a, b) for a, b in combinations(uncut, 2) if a[0] != b[0]]}
    for overlap, title in ((0, "cuts of one that share nothing"), (0.25, "cuts of one that share a quarter")):
        cuts = [pair for pair in combinations(CUT_CORNERS, 2) if _compute_crop_overlap(*pair) == overlap]
        pairs[title] = [((name, a), (name, b)) for name in sorted({name for name, _ in files}) for a, b in cuts]
    return {
        title: [int(sum(is_duplicate[index[a], index[b]] for a, b in of_title)), len(of_title)]
        for title, of_title in pairs.items()
    }


def _find_lookalike_icon_pairs(paths: list[str]) -> list[tuple[int, int]]:
    """Find the pairs of icons that look the same.

    Args:
        paths: Paths of the icon files; all icons have the same size.

    Returns:
        Pairs of indices into `paths`, the smaller index first.
    """
    images = [Image.open(path) for path in paths]
    small, pairs = np.stack([np.asarray(image.reduce(8), np.int16).ravel() for image in images]), []
    for first in range(len(paths)):
        # Images reduced by a factor of 8 are compared first, because this is faster than comparing all pixels. The mean
        # difference of reduced images is never larger than that of the full images, so every pair with equal drawings
        # passes this test. The added 0.5 allows for the rounding of the reduced pixels.
        near = np.abs(small[first + 1 :] - small[first]).mean(axis=1) <= SAME_DRAWING_MAX_DIFFERENCE + 0.5
        for second in (first + 1 + np.flatnonzero(near)).tolist():
            difference = np.subtract(*(np.asarray(images[index], np.int16) for index in (first, second)))
            if np.abs(difference).mean() <= SAME_DRAWING_MAX_DIFFERENCE:
                pairs.append((first, second))
    return pairs


def _measure_duplicate_detection_at_threshold(
    vectors: np.ndarray, photos: dict, icons: dict, same_drawings: list[tuple[int, int]], threshold: float
) -> dict[str, Any]:
    """Measure how well a threshold on the similarity of two files detects duplicates.

    Args:
        vectors: Array with one row per file: first the files of `photos`, then the files of `icons`.
        photos: Paths of photographs by name and kind, from `_write_photograph_variants`.
        icons: Paths of icons by emoji and kind, from `_write_icon_variants`.
        same_drawings: Pairs of original icons that look the same. They are not counted.
        threshold: Two files count as duplicates if their similarity is at least this.

    Returns:
        A dict with these keys:

        - "threshold": the argument.
        - "recall" (photographs) and "icon_recall": `{kind of copy: fraction of the copies that are found}`.
        - "wrong": `{kind of pair: [wrongly recognized pairs, all pairs]}`.
        - "largest_icon_group": number of icons in the largest group of duplicates.
    """
    photo_vectors, icon_vectors = vectors[: len(photos)], vectors[len(photos) :]
    is_photo_duplicate, is_icon_duplicate = (
        duplicates.compute_duplicate_similarity(rows, rows) >= threshold - duplicates.FLOAT16_TOLERANCE
        for rows in (photo_vectors, icon_vectors)
    )
    originals = [index for index, (_, kind) in enumerate(icons) if kind == ORIGINAL_KIND]
    is_wrong = np.triu(is_icon_duplicate[np.ix_(originals, originals)], 1)
    wrong = int(is_wrong.sum() - sum(is_wrong[pair] for pair in same_drawings))
    pair_count = len(originals) * (len(originals) - 1) // 2 - len(same_drawings)
    wrong_photos = _count_false_duplicates(list(photos), is_photo_duplicate)
    return {
        "threshold": threshold,
        "recall": _compute_recall_by_copy_kind(list(photos), is_photo_duplicate, PHOTO_KINDS),
        "wrong": wrong_photos | {"icons of different emoji": [wrong, pair_count]},
        "icon_recall": _compute_recall_by_copy_kind(list(icons), is_icon_duplicate, ICON_KINDS),
        "largest_icon_group": max(map(len, duplicates.cluster_near_duplicates(icon_vectors[originals], threshold))),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the duplicate benchmark: compare three rules for near-duplicates, and print and write the results as JSON.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(DuplicatesArguments, __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        photos, icons = _write_photograph_variants(Path(folder)), _write_icon_variants(Path(folder))
        index = PictureIndex.open(Path(folder) / "i.lance", model=args.model)
        index.add(folder)
        paths = [*photos.values(), *icons.values()]
        vectors = index.vectors(paths)
        rows = index._table.rows(["path", COLOR_SIGNATURE_COLUMN])
        signatures = dict(zip(rows["path"].to_pylist(), rows[COLOR_SIGNATURE_COLUMN].to_pylist(), strict=True))
        without_colors = duplicates.combine_vectors_and_colors(vectors, [None] * len(paths))
        with_colors = duplicates.combine_vectors_and_colors(vectors, [signatures[path] for path in paths])
        # The search uses the rule "both". The results of this benchmark decided the value of its threshold,
        # DUPLICATE_MIN_SIMILARITY, and the constants of `capivara_search.duplicates`.
        rules = {
            "vectors alone, strict": (without_colors, 0.97),
            "vectors alone": (without_colors, 0.8),
            "both": (with_colors, DUPLICATE_MIN_SIMILARITY),
        }
        same_drawings = _find_lookalike_icon_pairs([path for (_, kind), path in icons.items() if kind == ORIGINAL_KIND])
        flat = [len(signatures[path]) > duplicates.SIGNATURE_BYTES for path in paths]
        results = {
            "model": args.model,
            "photographs": len({name for name, _ in photos} - {*DRAWINGS}),
            "icons": len({name for name, _ in icons}),
            "copied_icons": sum(kind == "reduced to 64 pixels" for _, kind in icons),
            "flat": {"photographs": sum(flat[: len(photos)]), "icons": sum(flat[len(photos) :])},
            "same_drawings": len(same_drawings),
            "rules": {
                name: _measure_duplicate_detection_at_threshold(rule_vectors, photos, icons, same_drawings, threshold)
                for name, (rule_vectors, threshold) in rules.items()
            },
        }
    output_results_with_conditions(results, args.output)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)

r"""Select captions and images with a caption strategy and the pair filter, and write a report about the selection.

    python -m captions.select --dataset data/scored --output data/selected --language pt \
        --caption_strategy rank --caption_count 5 --min_pair_similarity 0.2

A caption strategy is a rule that selects captions of an image. The pair filter skips images whose first caption has
a low similarity to the image, as computed by `captions.score`.

In the output, `captions-<language>` holds the selected captions in the order of the strategy,
`similarities-<language>` holds their similarities, and `generated-captions-<language>` is empty. Columns of other
languages do not change. Images without a selected caption are skipped, and listed in *.skipped.jsonl files.

The report, OUTPUT/report/index.html, shows a histogram, and the images closest to the lowest accepted similarity. The
file `selection.json` next to it has all its numbers.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capivara_common.cli import flag, run_main_and_report_user_errors
from capivara_common.files import write_json
from capivara_common.image_files import BadRow, decode_image
from capivara_common.privacy import get_publishable_model_or_dataset_name
from caption_data.rows import CAPTIONS_FEATURE, NOT_CHOSEN, CaptionChoice, convert_to_caption_list
from caption_data.sources import Split
from captions.stages import RowStage, StageArguments, check_stage_and_count_rows, read_skipped_rows, run_stage_command
from eval.records.tables import make_short_plain_line, write_html_from_template

# Path of the HTML page in the output folder. The page is written after all other files of the report, so that a report
# with a page is complete.
REPORT_PAGE = Path("report") / "index.html"
REPORT_TEMPLATE = Path(__file__).parent / "selection_report.html.j2"
EXAMPLES_PER_SIDE = 6  # number of dropped examples, and of kept examples, on the HTML page
# Possible values for the lowest similarity of the pair filter. The page shows for each value how many images the filter
# would keep. The CAPIVARA authors use 0.2.
SIMILARITY_CUTOFFS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
MAX_SHOWN_CHARACTERS = 300  # longer captions are shortened on the HTML page
DROPPED_COLOR = "#b9bec6"  # color of dropped captions in the histogram
HISTOGRAM_BINS = 60
EXAMPLE_IMAGE_SIDE = 240  # longest side of the example images, in pixels
# Columns and NumPy types of the report's table of captions. `_build_caption_similarity_frame` describes the columns.
CAPTION_TYPES = [("row", "int64"), ("place", "int32"), ("first", bool), ("kept", bool), ("similarity", "float64")]


@dataclass
class SelectArguments(CaptionChoice, StageArguments):
    """Command-line arguments of `captions.select`, which selects the captions and images of a dataset for training.

    The class also has the methods that run the command, which is one stage (step) of building a caption dataset.
    """

    # Training has the same strategies and flags. Selecting captions before training makes the dataset smaller, and the
    # selection can be inspected.
    language: str = flag("pt", "Language code at the end of the names of the caption columns.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice()

    @property
    def strategy_cutoff(self) -> float | None:
        """Lowest similarity of image and caption that the caption strategy accepts. None: the strategy has no limit.

        A caption strategy is a rule that selects captions of an image. Only the strategies "threshold" and "diverse"
        have a limit.
        """
        return self.min_similarity if self.caption_strategy in ("threshold", "diverse") else None

    def columns(self) -> list[str]:
        """Return the names of the three dataset columns that the selection changes.

        Returns:
            A list of three names: the columns of captions, of generated captions, and of similarities of image and
            caption. For Portuguese, these are ["captions-pt", "generated-captions-pt", "similarities-pt"].
        """
        return [f"{name}-{self.language}" for name in ("captions", "generated-captions", "similarities")]

    def required_columns(self) -> list[str]:
        """Return the names of the possible input columns of the selection. The dataset needs at least one of them.

        The list contains the caption columns. If the flags require similarities of image and caption, it contains only
        the column of similarities instead.
        """
        *captions, similarities = self.columns()
        reads_similarities = similarities in self.strategy_columns(self.language)
        return [similarities] if reads_similarities or self.min_pair_similarity is not None else captions

    def get_similarities_and_choose(self, row: dict[str, Any]) -> tuple[dict[str, float | None], list[str]]:
        """Look up the similarities of all captions of a row, and choose captions with the caption strategy.

        Args:
            row: A row of the dataset. A missing caption column is treated as empty.

        Returns:
            A tuple (similarities, chosen captions).

            - A dict `{caption: similarity}` with the distinct captions in order. An unknown similarity is None.
            - A list of captions. It is empty if the image must be skipped.

        Raises:
            BadRow: If the row has no caption, or the number of similarities differs from the number of captions.
        """
        captions, generated, similarities = self.columns()
        row = {captions: [], generated: [], **row}
        texts, scored = [*row[captions], *row[generated]], {}
        if not any(map(str.strip, texts)):
            raise BadRow("no caption", f"{captions!r} and {generated!r} are empty")
        try:
            chosen = [text for text in self.choose_captions(row, self.language) if text.strip()]
        except ValueError as error:
            raise BadRow("no caption", f"{error}") from error
        values = itertools.chain(row.get(similarities) or [], itertools.repeat(None))
        for text, value in zip(texts, values, strict=False):
            scored.setdefault(text, None if value is None or math.isnan(value) else value)
        return scored, chosen

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Return what the method `RowStage.run` needs to select the captions of all rows.

        Args:
            stage: Not used, because no model is loaded.

        Returns:
            The tuple (columns, settings, process): the types of the new columns, the settings to record, and a function
            that selects the captions of a list of rows.
        """
        settings = {
            "language": self.language,
            "caption_strategy": self.caption_strategy,
            "caption_count": self.caption_count if self.caption_strategy in ("first", "rank") else None,
            "min_similarity": self.strategy_cutoff,
            "min_pair_similarity": self.min_pair_similarity,
        }
        columns = {f"captions-{self.language}": CAPTIONS_FEATURE}
        return columns, settings, lambda rows: [select_row_captions(self, row) for row in rows]

    def report(self, rank: int = 0, world_size: int = 1) -> None:
        """Write a report about the selection: an HTML page with counts, a histogram and example images.

        The page is `report/index.html` in the output folder. If it exists already, it does not change.

        Args:
            rank: Index of the task (process). It is not used, because a single task writes the report.
            world_size: Number of tasks. It is not used.
        """
        if not (self.output / REPORT_PAGE).is_file():
            _write_selection_report(self)


def select_row_captions(args: SelectArguments, row: dict[str, Any]) -> dict[str, Any] | BadRow:
    """Select the captions of one image with the caption strategy and the pair filter of the flags.

    Args:
        args: Command-line arguments.
        row: A row of the dataset, with the image's captions and their similarities.

    Returns:
        A dict `{"column name": value}` with the selected captions, their similarities, and an empty list of generated
        captions. If no caption is selected, a `BadRow` that holds the reason.
    """
    try:
        scored, chosen = args.get_similarities_and_choose(row)
    except BadRow as bad:
        return bad
    if not chosen:
        return BadRow(NOT_CHOSEN, "no caption passes the pair filter and the strategy")
    return dict(zip(args.columns(), (chosen, [], [scored[text] for text in chosen]), strict=True))


# The functions below write the report. They read all captions once more instead of collecting numbers during the
# selection, because the selection may be split into tasks or interrupted.


def _write_selection_report(args: SelectArguments) -> None:
    """Write the report about a complete selection into the folder `report` of the output.

    The folder gets a histogram, example images, `selection.json` with all numbers, and the HTML page `index.html`. The
    page is written last, so that a report with a page is complete.

    Raises ValueError if the selection is not complete.
    """
    folder, source = args.output / REPORT_PAGE.parent, args.source()
    folder.mkdir(exist_ok=True)
    captions = _build_caption_similarity_frame(args, source)
    is_image_kept = captions.groupby("row")["kept"].any()
    kept_count = int(is_image_kept.sum())
    scored = captions.dropna(subset="similarity")
    first = scored[scored["first"]].assign(kept=lambda table: table["row"].map(is_image_kept).astype(bool))
    # Choose the captions that the histogram shows together with the cutoffs. If `min_pair_similarity`, which applies to
    # the first caption of each image, is the only cutoff, show only first captions. Whether other captions are kept
    # then does not depend on a cutoff.
    by_first = args.min_pair_similarity is not None and args.strategy_cutoff is None
    shown, unit = (first, "images, by their first caption") if by_first else (scored, "captions")
    settings = ("split", "language", "caption_strategy", "caption_count", "min_similarity", "min_pair_similarity")
    unusable = check_stage_and_count_rows(args.output).skipped
    unusable.pop(NOT_CHOSEN, None)
    sides = {"dropped": shown[~shown["kept"]]["similarity"], "kept": shown[shown["kept"]]["similarity"]}
    metadata = {
        "dataset": get_publishable_model_or_dataset_name(args.dataset),
        **{name: getattr(args, name) for name in settings},
        "images": {"kept": kept_count, "not chosen": len(is_image_kept) - kept_count, "can't be used": unusable},
        "captions": {"of these images": len(captions), "kept": int(captions["kept"].sum())},
        "images_passing": {f"{cutoff:g}": int((first["similarity"] >= cutoff).sum()) for cutoff in SIMILARITY_CUTOFFS},
        "shown": unit,
        "similarities": {
            side: {"count": len(values), **values.agg(["mean", "min", "max"]).to_dict()}
            for side, values in sides.items()
            if len(values)
        },
        "examples": _select_examples_and_write_images(args, source, shown, folder),
    }
    if len(shown):
        cutoff = args.min_pair_similarity if by_first else args.strategy_cutoff
        draw_similarity_histogram(sides, unit, cutoff, folder / "similarities.png")
    write_json(folder / "selection.json", metadata)
    write_html_from_template(
        REPORT_TEMPLATE,
        args.output / REPORT_PAGE,
        metadata=metadata,
        is_embedded=source.is_embedded,
        image_files={path.name for path in folder.glob("row-*.jpg")},
        shorten=partial(make_short_plain_line, limit=MAX_SHOWN_CHARACTERS),
    )


def _build_caption_similarity_frame(args: SelectArguments, source: Split) -> pd.DataFrame:
    """Return a table of all distinct captions of the valid rows.

    The table does not contain the texts of the captions, because there may be tens of millions.

    Args:
        args: Command-line arguments.
        source: The dataset split that the selection has read.

    Returns:
        A table with one row per distinct caption of an image, and these columns:
            row: Index of the image's row in the source, counted from 0.
            place: Index of the caption among the distinct captions of the image.
            first: True for the first original caption of the image.
            kept: True if the caption is selected.
            similarity: Cosine similarity of image and caption; NaN if unknown.
    """
    present = [old for old in source.columns if args.column_renames().get(old, old) in args.columns()]
    parts = args.output.glob(f"{args.split}-*.parquet")
    skipped = itertools.chain.from_iterable(map(read_skipped_rows, parts))
    unusable = {row for row, reason in skipped if reason != NOT_CHOSEN}

    def iter_captions() -> Iterator[tuple[Any, ...]]:
        for number, row in enumerate(source.rows(column_names=present)):
            if number not in unusable:
                row = _rename_columns_and_normalize_captions(args, row)
                similarities, chosen = args.get_similarities_and_choose(row)
                for place, (text, similarity) in enumerate(similarities.items()):
                    is_first = place == 0 and bool(row.get(args.columns()[0]))
                    is_scored = similarity is not None and text.strip()
                    yield number, place, is_first, text in chosen, similarity if is_scored else math.nan

    # Build a NumPy array, because lists of Python numbers would need several times the memory for millions of rows.
    return pd.DataFrame(np.fromiter(iter_captions(), CAPTION_TYPES))


def _rename_columns_and_normalize_captions(args: SelectArguments, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the source with the column names of the output, and with captions as lists of texts.

    Args:
        args: Command-line arguments; `rename` is applied.
        row: A row of the source.
    """
    row = {args.column_renames().get(old, old): value for old, value in row.items()}
    return row | {name: convert_to_caption_list(row[name], name) for name in args.columns()[:2] if name in row}


def _select_examples_and_write_images(
    args: SelectArguments, source: Split, captions: pd.DataFrame, folder: Path
) -> list[dict[str, Any]]:
    """Find the examples closest to the cutoff, and write their images as JPEG files.

    Args:
        args: Command-line arguments.
        source: The dataset split that the selection has read.
        captions: Table of captions from `_build_caption_similarity_frame`.
        folder: Folder for the images.

    Returns:
        First the `EXAMPLES_PER_SIDE` dropped captions with the highest similarities, then the same number of kept
        captions with the lowest similarities, each as a dict with the keys "row", "caption", "similarity" and "kept".
    """
    examples = []
    for kept in (False, True):
        side = captions[captions["kept"] == kept].sort_values("similarity", ascending=kept, kind="stable")
        for example in side.head(EXAMPLES_PER_SIDE).itertuples():
            row = _rename_columns_and_normalize_captions(args, next(source.rows(example.row)))
            similarities, _ = args.get_similarities_and_choose(row)
            text = list(similarities)[example.place]
            examples.append({"row": example.row, "caption": text, "similarity": example.similarity, "kept": kept})
            if source.is_embedded:
                continue
            with suppress(BadRow):  # if the image is invalid, the page shows only the caption
                image = decode_image(row[args.image_column], source.image_access).convert("RGB")
                image.thumbnail((EXAMPLE_IMAGE_SIDE, EXAMPLE_IMAGE_SIDE))
                image.save(folder / f"row-{example.row}.jpg")
    return examples


def draw_similarity_histogram(sides: dict[str, pd.Series], unit: str, cutoff: float | None, path: Path) -> None:
    """Draw a histogram of the similarities of kept and dropped captions to their images.

    Args:
        sides: Dict `{"dropped": similarities, "kept": similarities}`.
        unit: Label of the y axis, for example "captions".
        cutoff: Lowest similarity that the selection accepts, marked by a line. None: no line.
        path: PNG file to write.
    """
    # Import here, because matplotlib is slow to import and only the task that writes the report needs it.
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from eval.records.plots import MODEL_COLOR, TEXT_COLOR, draw_grid_and_hide_frame, save_png_and_close_figure

    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    labels = [f"{name}: {len(values):,}" for name, values in sides.items()]
    axis.hist(list(sides.values()), HISTOGRAM_BINS, stacked=True, color=[DROPPED_COLOR, MODEL_COLOR], label=labels)
    if cutoff is not None:
        axis.axvline(cutoff, color=TEXT_COLOR, linewidth=1.2, linestyle="--", label=f"cutoff: {cutoff:g}")
    axis.set(xlabel="cosine similarity of image and caption", ylabel=unit)
    draw_grid_and_hide_frame(axis, "y", "top", "right")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    # Put the legend below the axis, where it covers no bar.
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    save_png_and_close_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Run the command: select captions and images, and print the path of the report.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = run_stage_command(SelectArguments, __doc__, argv)
    if args is not None:
        print(f"Report with images: {args.output / REPORT_PAGE}")


if __name__ == "__main__":
    # When this file runs as a command, its classes belong to the module `__main__`, and other processes can't unpickle
    # them. Import the file again under its own name to avoid this.
    from captions import select

    run_main_and_report_user_errors(select.main, resumable=True)

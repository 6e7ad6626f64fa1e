"""Keep the captions that a strategy picks and the images whose caption fits them, and show what that does.

    python -m captions.select --dataset data/scored --output data/selected --language pt \\
        --caption_strategy rank --caption_count 5 --min_pair_similarity 0.2

The strategies and the pair filter are those of the training (`caption_data.rows`), under its names for them:
here the choice is made once, can be looked at, and makes the data set small. In the output `captions-<language>`
holds what was picked, in the order of the strategy, `similarities-<language>` belongs to it, and
`generated-captions-<language>` is empty; other languages stay as they were. Images that are left with nothing are left
out and listed. The folder `report` in the output has `index.html` to look at, with the counts, the histograms and the
pictures at the cut, and `selection.json` with every number of it.
"""

import itertools
import math
from array import array
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capivara_common.cli import flag, run_command
from capivara_common.files import write_json
from capivara_common.image_files import BadRow, decode_image
from capivara_common.privacy import short_name
from caption_data.rows import CAPTIONS_FEATURE, NOT_CHOSEN, SIMILARITY_STRATEGIES, CaptionChoice, normalize_captions
from caption_data.sources import Split
from captions.stages import RowStage, StageArguments, check_complete, read_skipped_rows, run_stage_command
from eval.records.tables import to_one_line, write_html_page

REPORT_PAGE = Path("report") / "index.html"  # in the output; it is written last
REPORT_TEMPLATE = Path(__file__).parent / "selection_report.html.j2"
EXAMPLES_PER_SIDE = 6  # on either side of the cut
SIMILARITY_CUTOFFS = (
    0.0,
    0.05,
    0.1,
    0.15,
    0.2,
    0.25,
    0.3,
    0.35,
    0.4,
)  # of the table that helps to choose one; CAPIVARA has 0.2
MAX_SHOWN_CHARACTERS = 300  # letters of a caption on the page
DROPPED_COLOR = "#b9bec6"
HISTOGRAM_BINS, EXAMPLE_IMAGE_SIDE = 60, 240  # of a histogram; pixels


@dataclass
class SelectArguments(CaptionChoice, StageArguments):
    """Arguments of `captions.select`."""

    language: str = flag("pt", "Language of the captions, the end of their columns' names.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice()

    @property
    def strategy_cutoff(self) -> float | None:
        """The similarity that the strategy asks of every caption; None where it asks for none."""
        return self.min_similarity if self.caption_strategy in ("threshold", "diverse") else None

    def columns(self) -> list[str]:
        """What the choice looks at: captions, generated ones, similarities."""
        return [f"{name}-{self.language}" for name in ("captions", "generated-captions", "similarities")]

    def required_columns(self) -> list[str]:
        """Columns of captions, and of similarities where they decide, of which one must be there."""
        scored = self.caption_strategy in SIMILARITY_STRATEGIES or self.min_pair_similarity is not None
        return self.columns()[2:] if scored else self.columns()[:2]

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """The choice of each row."""
        settings = {
            "language": self.language,
            "caption_strategy": self.caption_strategy,
            "caption_count": self.caption_count if self.caption_strategy in ("first", "rank") else None,
            "min_similarity": self.strategy_cutoff,
            "min_pair_similarity": self.min_pair_similarity,
        }
        return (
            {f"captions-{self.language}": CAPTIONS_FEATURE},
            settings,
            lambda rows: [select_row(self, row) for row in rows],
        )

    def report(self, rank: int = 0, world_size: int = 1) -> None:
        """Write the folder `report` of a selection that is complete, unless it is there."""
        if not (self.output / REPORT_PAGE).is_file():
            write_selection_report(self)


def choose_with_similarities(args: SelectArguments, row: dict[str, Any]) -> tuple[dict[str, float | None], list[str]]:
    """The distinct captions of a row in their order, with the similarity of each, None where there is none; and those
    that are kept, none where the image is left out. A column that the row lacks counts as empty.

    Raises BadRow where the row has no caption, or other than one similarity for each.
    """
    captions, generated, similarities = args.columns()
    row = {captions: [], generated: [], **row}
    texts, scored = [*row[captions], *row[generated]], {}
    if not any(map(str.strip, texts)):
        raise BadRow("no caption", f"{captions!r} and {generated!r} are empty")
    try:
        chosen = [text for text in args.choose_captions(row, args.language) if text.strip()]
    except ValueError as error:
        raise BadRow("no caption", f"{error}") from error
    for text, value in zip(texts, itertools.chain(row.get(similarities) or [], itertools.repeat(None)), strict=False):
        scored.setdefault(text, None if value is None or math.isnan(value) else value)
    return scored, chosen


def select_row(args: SelectArguments, row: dict[str, Any]) -> dict[str, Any] | BadRow:
    """The new columns of a row, or what is wrong with it."""
    try:
        scored, chosen = choose_with_similarities(args, row)
    except BadRow as bad:
        return bad
    if not chosen:
        return BadRow(NOT_CHOSEN, "no caption passes the pair filter and the strategy")
    return dict(zip(args.columns(), (chosen, [], [scored[text] for text in chosen]), strict=True))


# The report: of one pass over the captions, without the images, so that it says the same however the selection was
# shared out, killed or resumed.


def write_selection_report(args: SelectArguments) -> None:
    """The folder `report`; its page is written last."""
    folder, source = args.output / REPORT_PAGE.parent, args.source()
    folder.mkdir(exist_ok=True)
    captions = _build_caption_table(args, source)
    images = captions.groupby("row")["kept"].any()
    known = captions.dropna(subset="similarity")
    first = known[known["first"]].assign(kept=lambda table: table["row"].map(images).astype(bool))
    # Of the pair filter's cut the first captions are shown: `rank` drops captions of images that fit well, and they
    # would hide those that the filter has dropped.
    by_first = args.min_pair_similarity is not None and args.strategy_cutoff is None
    shown, unit = (first, "images, by their first caption") if by_first else (known, "captions")
    settings = ("split", "language", "caption_strategy", "caption_count", "min_similarity", "min_pair_similarity")
    unusable = {reason: n for reason, n in check_complete(args.output).skipped.items() if reason != NOT_CHOSEN}
    sides = {"dropped": shown[~shown["kept"]]["similarity"], "kept": shown[shown["kept"]]["similarity"]}
    facts = {
        "dataset": short_name(args.dataset),
        **{name: getattr(args, name) for name in settings},
        "images": {"kept": int(images.sum()), "not chosen": int((~images).sum()), "can't be used": unusable},
        "captions": {"of these images": len(captions), "kept": int(captions["kept"].sum())},
        "images_passing": {f"{cut:g}": int((first["similarity"] >= cut).sum()) for cut in SIMILARITY_CUTOFFS},
        "shown": unit,
        "similarities": {
            side: {"count": len(values), **values.agg(["mean", "min", "max"]).to_dict()}
            for side, values in sides.items()
            if len(values)
        },
        "examples": _write_examples(args, source, shown, folder),
    }
    if len(shown):
        cut = args.min_pair_similarity if by_first else args.strategy_cutoff
        plot_similarities(sides, unit, cut, folder / "similarities.png")
    write_json(folder / "selection.json", facts)
    pictures = {path.name for path in folder.glob("row-*.jpg")}
    write_html_page(
        REPORT_TEMPLATE,
        args.output / REPORT_PAGE,
        facts=facts,
        pictures=pictures,
        line=partial(to_one_line, limit=MAX_SHOWN_CHARACTERS),
    )


def _build_caption_table(args: SelectArguments, source: Split) -> pd.DataFrame:
    """A row a distinct caption of the images that could be used: number of the image and place in it, whether it is the
    image's first original one, whether it is kept, similarity. Texts of tens of millions are not held."""
    present = [old for old in source.columns if args.column_renames().get(old, old) in args.columns()]
    parts = args.output.glob(f"{args.split}-*.parquet")
    unusable = {row for part in parts for row, reason in read_skipped_rows(part) if reason != NOT_CHOSEN}
    table = {"row": array("q"), "place": array("i"), "first": array("b"), "kept": array("b"), "similarity": array("d")}
    for number, row in enumerate(source.rows(column_names=present)):
        if number not in unusable:
            row = _normalize_row(args, row)
            scored, chosen = choose_with_similarities(args, row)
            for place, (text, value) in enumerate(scored.items()):
                first, known = place == 0 and bool(row.get(args.columns()[0])), value is not None and text.strip()
                values = (number, place, first, text in chosen, value if known else math.nan)
                for column, one in zip(table.values(), values, strict=True):
                    column.append(one)
    return pd.DataFrame({name: np.asarray(column) for name, column in table.items()}).astype(
        {"first": bool, "kept": bool}
    )


def _normalize_row(args: SelectArguments, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the source under the names of the output, its captions as lists of texts."""
    row = {args.column_renames().get(old, old): value for old, value in row.items()}
    return row | {name: normalize_captions(row[name], name) for name in args.columns()[:2] if name in row}


def _write_examples(args: SelectArguments, source: Split, captions: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    """The captions that are nearest to the other side of the cut, the nearest first; their pictures are written."""
    examples = []
    for kept in (False, True):
        side = captions[captions["kept"] == kept].sort_values("similarity", ascending=kept, kind="stable")
        for one in side.head(EXAMPLES_PER_SIDE).itertuples():
            row = source.row(one.row)
            text = list(choose_with_similarities(args, _normalize_row(args, row))[0])[one.place]
            examples.append({"row": one.row, "caption": text, "similarity": one.similarity, "kept": kept})
            with suppress(BadRow):
                image = decode_image(row[args.image_column], source.image_access).convert("RGB")
                image.thumbnail((EXAMPLE_IMAGE_SIDE, EXAMPLE_IMAGE_SIDE))
                image.save(folder / f"row-{one.row}.jpg")
    return examples


def plot_similarities(sides: dict[str, pd.Series], unit: str, cutoff: float | None, path: Path) -> None:
    """What was kept over what was dropped, stacked, with the cut as a line."""
    from matplotlib import pyplot as plt  # here: they take long to import, and one task of a selection draws
    from matplotlib.ticker import MaxNLocator

    from eval.records.plots import MODEL_COLOR, TEXT_COLOR, save_figure, style_axis

    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    labels = [f"{name}: {len(values):,}" for name, values in sides.items()]
    axis.hist(list(sides.values()), HISTOGRAM_BINS, stacked=True, color=[DROPPED_COLOR, MODEL_COLOR], label=labels)
    if cutoff is not None:
        axis.axvline(cutoff, color=TEXT_COLOR, linewidth=1.2, linestyle="--", label=f"cut: {cutoff:g}")
    axis.set(xlabel="similarity of image and caption (cosine, lowest to highest)", ylabel=unit)
    style_axis(axis, "y", "top", "right")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))  # no bar is below
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    """The command; says where the report is."""
    args = run_stage_command(SelectArguments, __doc__, argv)
    if args is not None:
        print(f"Report with pictures: {args.output / REPORT_PAGE}")


if __name__ == "__main__":
    from captions import select  # by its name, as other machines find it

    run_command(select.main, resumable=True)

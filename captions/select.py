"""Keep the captions that a strategy picks and the images whose caption fits them, and show what that does.

    python -m captions.select --dataset data/scored --output data/selected --language pt \\
        --caption_strategy rank --caption_count 5 --min_pair_similarity 0.2

The strategies and the pair filter are those of the training (`caption_data.selection`), under its names for them:
here the choice is made once, can be looked at, and makes the data set small. In the output `captions-<language>`
holds what was picked, in the order of the strategy, `similarities-<language>` belongs to it, and
`generated-captions-<language>` is empty; other languages stay as they were. Images that are left with nothing are left
out and listed. The folder `report` in the output has the counts, the histograms, and the pictures at the cut.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

from capivara_common.cli import run_command
from capivara_common.image_files import BadRow
from caption_data.rows import CAPTIONS, NOT_CHOSEN
from captions.stage_arguments import SelectArguments
from captions.stages import Phase, RowStage, StageReport, check_complete, run_stage, stage_main

REPORT = Path("report") / "index.html"  # in the output; it is written last


class Selection:
    """The choice of a row, for the data set and for its report."""

    def __init__(self, args: SelectArguments):
        self.args = args
        self.captions, self.generated, self.similarities = args.columns()

    def chosen(self, row: dict[str, Any]) -> list[str]:
        """Captions that are kept, none where the image is left out; a column that the row lacks counts as empty.

        Raises BadRow where the row has no caption, or other than one similarity for each.
        """
        row = {self.captions: [], self.generated: [], **row}
        if not any(text.strip() for text in [*row[self.captions], *row[self.generated]]):
            raise BadRow("no caption", f"{self.captions!r} and {self.generated!r} are empty")
        try:
            return [text for text in self.args.chosen(row, self.args.language) if text.strip()]
        except ValueError as error:
            raise BadRow("no caption", f"{error}") from error

    def scored(self, row: dict[str, Any]) -> list[tuple[str, float | None]]:
        """Captions of a row with their similarities; None, also for NaN, where there is none."""
        captions = [*(row.get(self.captions) or []), *(row.get(self.generated) or [])]
        known = [None if value is None or math.isnan(value) else value for value in row.get(self.similarities) or []]
        return list(zip(captions, [*known, *[None] * len(captions)], strict=False))

    def outcome(self, row: dict[str, Any]) -> tuple[list[str], list[tuple[str, float | None]], float | None]:
        """What the report needs of a row: `chosen`, which may raise BadRow, `scored`, and what the pair filter looks
        at, the similarity of the first original caption."""
        scored = self.scored(row)
        return self.chosen(row), scored, scored[0][1] if row.get(self.captions) else None

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        """The new columns of each row, or what is wrong with the row."""
        return [self._new_columns(row) for row in rows]

    def _new_columns(self, row: dict[str, Any]) -> dict[str, Any] | BadRow:
        try:
            chosen = self.chosen(row)
        except BadRow as bad:
            return bad
        if not chosen:
            return BadRow(NOT_CHOSEN, "no caption passes the pair filter and the strategy")
        of_text: dict[str, float | None] = {}
        for text, similarity in self.scored(row):
            of_text.setdefault(text, similarity)
        similarities = [of_text[text] for text in chosen]
        return {self.captions: chosen, self.generated: [], self.similarities: similarities}


def select(args: SelectArguments) -> StageReport:
    """The whole stage in this process: its rows and the report. Raises as `select_rows` does."""
    report = select_rows(args)
    write_missing_report(args)
    return report


def select_rows(args: SelectArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """Write the parts of one task that are missing. Raises as `RowStage` does."""
    selection = Selection(args)
    settings = {
        "language": args.language,
        "caption_strategy": args.caption_strategy,
        "caption_count": args.caption_count if args.caption_strategy in ("first", "rank") else None,
        "min_similarity": args.min_similarity if args.caption_strategy in ("threshold", "diverse") else None,
        "min_pair_similarity": args.min_pair_similarity,
    }
    return RowStage(args, rank, world_size).run({selection.captions: CAPTIONS}, settings, selection, "Selection")


def write_missing_report(args: SelectArguments, rank: int = 0, world_size: int = 1) -> None:
    """The report of a selection that is complete, unless it is there."""
    if not (args.output / REPORT).is_file():
        from captions.selection_report import write_report  # here: the plots take long to import

        write_report(args, Selection(args).outcome, check_complete(args.output))


PHASES = {"rows": Phase(select_rows, shared=True), "report": Phase(write_missing_report)}


def main(argv: list[str] | None = None) -> None:
    """The command; says where the report is."""
    args = stage_main(SelectArguments, __doc__, argv, partial(run_stage, phases=PHASES))
    if args is not None:
        print(f"Report with pictures: {args.output / REPORT}")


if __name__ == "__main__":
    from captions import select  # by its name, as other machines find it

    run_command(select.main, resumes=True)

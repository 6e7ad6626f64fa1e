"""What a selection kept and what it dropped: counts, histograms of similarity, and the pictures at the cut.

`captions.select` writes it into the folder `report` of its output: `index.html` to look at, `selection.json` with every
number of it, `similarities.png` and `examples.png`. It is made of one pass over the captions, without the images, so
that it says the same however the selection was shared out, killed or resumed.
"""

import heapq
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image

from capivara_common.files import write_json, write_text
from capivara_common.image_files import BadRow, decode_image
from capivara_common.privacy import short_name
from caption_data.rows import NOT_CHOSEN, caption_texts
from caption_data.sources import Split
from captions.selection_plots import Example, Histogram, plot_examples, plot_similarities
from captions.stage_arguments import SelectArguments
from captions.stage_folder import StageReport, skipped_path
from captions.stages import stage_source
from eval.records.tables import one_line

TEMPLATE = Path(__file__).parent / "selection_report.html.j2"
BINS = 200  # of cosine -1 to 1
EXAMPLES = 6  # on either side of the cut
CUTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)  # of the table that helps to choose one; CAPIVARA has 0.2
SHOWN = 300  # letters of a caption on the page

# A row -> its chosen captions, all captions with their similarities, and the similarity of the first one.
Outcome = Callable[[dict[str, Any]], tuple[list[str], list[tuple[str, float | None]], float | None]]


@dataclass
class Side:
    """Captions, or first captions, that were kept or dropped."""

    count: int = 0
    total: float = 0.0
    lowest: float | None = None
    highest: float | None = None
    bins: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, similarity: float) -> None:
        """Count one of this cosine."""
        self.count, self.total = self.count + 1, self.total + similarity
        self.lowest = similarity if self.lowest is None else min(self.lowest, similarity)
        self.highest = similarity if self.highest is None else max(self.highest, similarity)
        self.bins[min(max(int((similarity + 1) / 2 * BINS), 0), BINS - 1)] += 1

    def facts(self) -> dict[str, Any]:
        """As `selection.json` has it."""
        mean = self.total / self.count if self.count else None
        return {"count": self.count, "mean": mean, "lowest": self.lowest, "highest": self.highest, "bins": self.bins}


@dataclass
class Summary:
    """What one pass over the captions found; the dictionaries are by whether something was kept."""

    # Whether the cut is that of the first captions, not of all: `rank` drops captions of images that fit well, and they
    # would hide those that the pair filter has dropped.
    by_first: bool = False
    kept: int = 0  # images
    not_chosen: int = 0  # images
    captions: int = 0  # of the images that could be used; what occurs twice in one counts once
    captions_kept: int = 0
    pairs: dict[bool, Side] = field(default_factory=lambda: {True: Side(), False: Side()})  # first captions of images
    all: dict[bool, Side] = field(default_factory=lambda: {True: Side(), False: Side()})  # captions
    passing: Counter[float] = field(default_factory=Counter)  # cut -> images whose first caption is as similar or more
    # (nearness, row, caption, similarity), the nearest to the other side
    at_the_cut: dict[bool, list[tuple]] = field(default_factory=lambda: {True: [], False: []})

    def add(self, row: int, chosen: list[str], scored: list[tuple[str, float | None]], first: float | None) -> None:
        """An image with what was chosen of its captions, and the similarity of the first one."""
        if self.by_first and first is not None:
            self._remember(bool(chosen), row, scored[0][0], first)
        scored = list({text: (text, similarity) for text, similarity in reversed(scored)}.values())
        self.kept, self.not_chosen = self.kept + bool(chosen), self.not_chosen + (not chosen)
        self.captions, self.captions_kept = self.captions + len(scored), self.captions_kept + len(chosen)
        if first is not None:
            self.pairs[bool(chosen)].add(first)
            self.passing.update(cut for cut in CUTS if first >= cut)
        for text, similarity in scored:
            if similarity is not None and text.strip():
                self.all[text in chosen].add(similarity)
                if not self.by_first:
                    self._remember(text in chosen, row, text, similarity)

    def _remember(self, kept: bool, row: int, text: str, similarity: float) -> None:
        nearest, entry = self.at_the_cut[kept], (-similarity if kept else similarity, -row, text, similarity)
        if not any(-entry[1] == -known[1] and text == known[2] for known in nearest):
            (heapq.heappush if len(nearest) < EXAMPLES else heapq.heappushpop)(nearest, entry)


def write_report(args: SelectArguments, outcome: Outcome, whole: StageReport) -> None:
    """The folder `report` of a selection that is complete; its page is written last."""
    summary, source = _summary(args, outcome)
    facts = _facts(args, summary, whole)
    examples = {kept: _examples(source, args.image_column, summary.at_the_cut[kept]) for kept in (False, True)}
    facts["examples"] = [
        {"row": one.row, "caption": one.caption, "similarity": one.similarity, "kept": kept}
        for kept, found in examples.items()
        for one in found
    ]
    folder = args.output / "report"
    folder.mkdir(exist_ok=True)
    drawn = bool(summary.all[True].count or summary.all[False].count)
    if drawn:
        plot_similarities(_histograms(args, summary), folder / "similarities.png")
        plot_examples(examples[False], examples[True], folder / "examples.png")
    write_json(folder / "selection.json", facts)
    write_text(folder / "index.html", _page(facts, drawn))


def _summary(args: SelectArguments, outcome: Outcome) -> tuple[Summary, Split]:
    """One pass over the captions, and the source that they are of."""
    columns, source, names = args.columns(), stage_source(args), args.renamed()
    present = [old for old in source.columns if names.get(old, old) in columns]
    by_first = args.min_pair_similarity is not None and _strategy_cut(args) is None
    summary, unusable = Summary(by_first), _unusable(args.output, args.split)
    for number, row in enumerate(source.rows(only=present)):
        row = {names.get(old, old): row.get(old) for old in present}
        if number not in unusable:
            row |= {name: caption_texts(row[name], name) for name in row.keys() & set(columns[:2])}
            summary.add(number, *outcome(row))
    return summary, source


def _unusable(output: Path, split: str) -> set[int]:
    """Rows that were left out for another reason than the choice."""
    rows = set()
    for part in output.glob(f"{split}-*.parquet"):
        if skipped_path(part).is_file():
            lines = map(json.loads, skipped_path(part).read_text(encoding="utf-8").splitlines())
            rows |= {line["row"] for line in lines if line["reason"] != NOT_CHOSEN}
    return rows


def _facts(args: SelectArguments, summary: Summary, whole: StageReport) -> dict[str, Any]:
    """`selection.json`, but for the examples."""
    settings = ("caption_strategy", "caption_count", "min_similarity", "min_pair_similarity")
    unusable = {reason: number for reason, number in whole.skipped.items() if reason != NOT_CHOSEN}
    return {
        "dataset": short_name(args.dataset),
        **{name: getattr(args, name) for name in ("split", "language", *settings)},
        "images": {"kept": summary.kept, "not chosen": summary.not_chosen, "can't be used": unusable},
        "captions": {"of these images": summary.captions, "kept": summary.captions_kept},
        "first_captions": {"kept": summary.pairs[True].facts(), "dropped": summary.pairs[False].facts()},
        "all_captions": {"kept": summary.all[True].facts(), "dropped": summary.all[False].facts()},
        "images_passing": {f"{cut:g}": summary.passing[cut] for cut in CUTS},
        "examples_of": "images, by their first caption" if summary.by_first else "all captions",
    }


def _strategy_cut(args: SelectArguments) -> float | None:
    """The similarity that a strategy asks of every caption; None where it asks for none."""
    return args.min_similarity if args.caption_strategy in ("threshold", "diverse") else None


def _histograms(args: SelectArguments, summary: Summary) -> list[Histogram]:
    strategy_cut = _strategy_cut(args)
    shown = [("Images, by their first caption", "images", summary.pairs, args.min_pair_similarity)]
    # With one caption an image this one would be the first.
    if summary.captions != summary.kept + summary.not_chosen or strategy_cut is not None:
        shown.append(("All captions", "captions", summary.all, strategy_cut))
    return [
        Histogram(title, unit, sides[True].bins, sides[False].bins, cut)
        for title, unit, sides, cut in shown
        if sides[True].count or sides[False].count
    ]


def _examples(source: Split, image_column: str, nearest: list[tuple]) -> list[Example]:
    """The nearest to the cut first."""

    def image(row: int) -> PIL.Image.Image | None:
        with suppress(BadRow):
            return decode_image(source.row(row)[image_column], source.files)

    return [Example(-row, text, cosine, image(-row)) for _, row, text, cosine in sorted(nearest, reverse=True)]


def _page(facts: dict[str, Any], drawn: bool) -> str:
    """The page of the facts; the similarities' part is left out where there are none."""
    images, captions = facts["images"], facts["captions"]
    usable, of_images = images["kept"] + images["not chosen"], captions["of these images"]
    counts = [["images", f"{usable:,}", f"{images['kept']:,}", _share(images["kept"], usable)]]
    counts.append(["captions", f"{of_images:,}", f"{captions['kept']:,}", _share(captions["kept"], of_images)])
    counts += [[f"images that can't be used: {k}", f"{n:,}", "0", ""] for k, n in images["can't be used"].items()]
    kinds = (("first_captions", "first captions of images"), ("all_captions", "captions"))
    sides = [(f"{name} {side}", facts[kind][side]) for kind, name in kinds for side in ("kept", "dropped")]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        rule=_rule(facts),
        counts=counts,
        drawn=drawn,
        similarities=[
            [name, f"{side['count']:,}", *(f"{side[key]:.3f}" for key in ("mean", "lowest", "highest"))]
            for name, side in sides
            if side["count"]
        ],
        passing=[[cut, f"{n:,}", _share(n, usable)] for cut, n in facts["images_passing"].items()],
        examples=[
            ["kept" if e["kept"] else "dropped", one_line(e["caption"], SHOWN), e["row"], f"{e['similarity']:.3f}"]
            for e in facts["examples"]
        ],
    )
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair can't be written


def _rule(facts: dict[str, Any]) -> str:
    """Strategy and cuts in words."""
    strategy, pair_cut = facts["caption_strategy"], facts["min_pair_similarity"]
    amount = f" with {facts['caption_count']}" if strategy in ("first", "rank") else ""
    cut = f" from {facts['min_similarity']:g}" if strategy in ("threshold", "diverse") else ""
    pairs = "no pair filter" if pair_cut is None else f"pair filter from {pair_cut:g}"
    return f"strategy {strategy}{amount}{cut}, {pairs}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""

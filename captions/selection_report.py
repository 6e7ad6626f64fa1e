"""What a selection kept and what it dropped: counts, histograms of similarity, and the pictures at the cut.

`captions.select` writes it into the folder `report` of its output: `index.html` to look at, `selection.json` with every
number of it, `similarities.png`, and small pictures. It is made of one pass over the captions, without the images, so
that it says the same however the selection was shared out, killed or resumed.
"""

import heapq
import json
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from capivara_common.files import write_json, write_text
from capivara_common.image_files import BadRow, decode_image
from capivara_common.privacy import short_name
from caption_data.rows import NOT_CHOSEN, caption_texts
from caption_data.sources import Split
from captions.stage_arguments import SelectArguments
from captions.stages import StageReport, skipped_path, stage_source
from eval.records.plots import INK, MODEL_COLOUR, save_figure, tidy
from eval.records.tables import one_line

TEMPLATE = Path(__file__).parent / "selection_report.html.j2"
BINS = 200  # of cosine -1 to 1
EXAMPLES = 6  # on either side of the cut
CUTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)  # of the table that helps to choose one; CAPIVARA has 0.2
SHOWN = 300  # letters of a caption on the page
KEPT_COLOUR, DROPPED_COLOUR = MODEL_COLOUR, "#b9bec6"
BARS, PICTURE_SIDE = 60, 240  # of a histogram; pixels

# A row -> its chosen captions, all captions with their similarities, and the similarity of the first one.
Outcome = Callable[[dict[str, Any]], tuple[list[str], list[tuple[str, float | None]], float | None]]


class Summary:
    """What one pass over the captions found; the dictionaries are by whether something was kept."""

    def __init__(self, by_first: bool):
        # Whether the cut is that of the first captions, not of all: `rank` drops captions of images that fit well, and
        # they would hide those that the pair filter has dropped.
        self.by_first = by_first
        self.images = {True: 0, False: 0}
        self.captions = self.captions_kept = 0  # of the images that could be used; twice in one image counts once
        self.first = {True: array("d"), False: array("d")}  # similarities of the images' first captions
        self.all = {True: array("d"), False: array("d")}  # and of all
        # (nearness, row, caption, similarity), the nearest to the other side
        self.at_the_cut: dict[bool, list[tuple]] = {True: [], False: []}

    def add(self, row: int, chosen: list[str], scored: list[tuple[str, float | None]], first: float | None) -> None:
        """An image with what was chosen of its captions, and the similarity of the first one."""
        if first is not None:
            self.first[bool(chosen)].append(first)
            if self.by_first:
                self._remember(bool(chosen), row, scored[0][0], first)
        scored = list({text: (text, similarity) for text, similarity in reversed(scored)}.values())
        self.images[bool(chosen)] += 1
        self.captions, self.captions_kept = self.captions + len(scored), self.captions_kept + len(chosen)
        for text, similarity in scored:
            if similarity is not None and text.strip():
                self.all[text in chosen].append(similarity)
                if not self.by_first:
                    self._remember(text in chosen, row, text, similarity)

    def _remember(self, kept: bool, row: int, text: str, similarity: float) -> None:
        nearest, entry = self.at_the_cut[kept], (-similarity if kept else similarity, -row, text, similarity)
        (heapq.heappush if len(nearest) < EXAMPLES else heapq.heappushpop)(nearest, entry)


def write_report(args: SelectArguments, outcome: Outcome, whole: StageReport) -> None:
    """The folder `report` of a selection that is complete; its page is written last."""
    summary, source = _summary(args, outcome)
    facts, folder = _facts(args, summary, whole), args.output / "report"
    folder.mkdir(exist_ok=True)
    for example in facts["examples"]:
        with suppress(BadRow):
            image = decode_image(source.row(example["row"])[args.image_column], source.files).convert("RGB")
            image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            image.save(folder / f"row-{example['row']}.jpg")
    strategy_cut = _strategy_cut(args)
    panels = [("Images, by their first caption", "images", summary.first, args.min_pair_similarity)]
    # With one caption an image this one would be the first.
    if summary.captions != sum(summary.images.values()) or strategy_cut is not None:
        panels.append(("All captions", "captions", summary.all, strategy_cut))
    panels = [panel for panel in panels if any(map(len, panel[2].values()))]
    if panels:
        plot_similarities(panels, folder / "similarities.png")
    write_json(folder / "selection.json", facts)
    write_text(folder / "index.html", _page(facts, folder))


def _summary(args: SelectArguments, outcome: Outcome) -> tuple[Summary, Split]:
    """One pass over the captions, and the source that they are of."""
    columns, source, names = args.columns(), stage_source(args), args.renamed()
    present = [old for old in source.columns if names.get(old, old) in columns]
    summary = Summary(by_first=args.min_pair_similarity is not None and _strategy_cut(args) is None)
    unusable = _unusable(args.output, args.split)
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


def _strategy_cut(args: SelectArguments) -> float | None:
    """The similarity that a strategy asks of every caption; None where it asks for none."""
    return args.min_similarity if args.caption_strategy in ("threshold", "diverse") else None


def _facts(args: SelectArguments, summary: Summary, whole: StageReport) -> dict[str, Any]:
    """`selection.json`."""
    settings = ("caption_strategy", "caption_count", "min_similarity", "min_pair_similarity")
    unusable = {reason: number for reason, number in whole.skipped.items() if reason != NOT_CHOSEN}
    first, names = np.concatenate([summary.first[True], summary.first[False]]), {True: "kept", False: "dropped"}
    return {
        "dataset": short_name(args.dataset),
        **{name: getattr(args, name) for name in ("split", "language", *settings)},
        "images": {"kept": summary.images[True], "not chosen": summary.images[False], "can't be used": unusable},
        "captions": {"of these images": summary.captions, "kept": summary.captions_kept},
        "first_captions": {name: _side(summary.first[kept]) for kept, name in names.items()},
        "all_captions": {name: _side(summary.all[kept]) for kept, name in names.items()},
        "images_passing": {f"{cut:g}": int((first >= cut).sum()) for cut in CUTS},
        "examples_of": "images, by their first caption" if summary.by_first else "all captions",
        "examples": [  # the nearest to the cut first
            {"row": -row, "caption": text, "similarity": similarity, "kept": kept}
            for kept in (False, True)
            for _, row, text, similarity in sorted(summary.at_the_cut[kept], reverse=True)
        ],
    }


def _side(similarities: array) -> dict[str, Any]:
    values = np.asarray(similarities)
    bins = np.bincount(np.clip((values + 1) / 2 * BINS, 0, BINS - 1).astype(int), minlength=BINS).tolist()
    mean, lowest, highest = (float(f(values)) if len(values) else None for f in (np.mean, np.min, np.max))
    return {"count": len(values), "mean": mean, "lowest": lowest, "highest": highest, "bins": bins}


def plot_similarities(panels: list[tuple[str, str, dict[bool, array], float | None]], path: Path) -> None:
    """Kept over dropped, stacked, with the cut as a line; a panel a (title, unit, similarities by side, cut)."""
    size = (6 * len(panels), 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, unit, sides, cut) in zip(axes[0], panels, strict=True):
        values = [np.asarray(sides[kept]) for kept in (False, True)]
        lowest, highest = np.concatenate(values).min() - 0.02, np.concatenate(values).max() + 0.02
        labels = [f"{name}: {len(side):,}" for name, side in zip(("dropped", "kept"), values, strict=True)]
        colours = [DROPPED_COLOUR, KEPT_COLOUR]
        axis.hist(values, BARS, (lowest, highest), stacked=True, color=colours, label=labels)
        if cut is not None:
            axis.axvline(cut, color=INK, linewidth=1.2, linestyle="--", label=f"cut: {cut:g}")
        xlabel = "similarity of image and caption (cosine, lowest to highest)"
        axis.set(title=title, xlabel=xlabel, ylabel=unit)
        tidy(axis, "y", "top", "right")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))  # no bar is below
    save_figure(figure, path)


def _page(facts: dict[str, Any], folder: Path) -> str:
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
        counts=counts,
        similarities=[
            [name, f"{side['count']:,}", *(f"{side[key]:.3f}" for key in ("mean", "lowest", "highest"))]
            for name, side in sides
            if side["count"]
        ],
        passing=[[cut, f"{n:,}", _share(n, usable)] for cut, n in facts["images_passing"].items()],
        one_line=lambda text: one_line(text, SHOWN),
        pictures={path.name for path in folder.glob("row-*.jpg")},
    )
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair can't be written


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""

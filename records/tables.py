"""Figures and texts as they are shown, and tables of result records as Markdown."""

import math
import re
import statistics
from collections.abc import Sequence

from records.schema import DIRECTIONS, MODEL_NAMES, Record

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ue000-\uf8ff]")
MARKDOWN = "\\`*_[]<>|~$#&"
COLUMNS = ("recall@1", "recall@5", "recall@10", "mean_recall")


def percent(values: Sequence[float]) -> str:
    """Shares as "12.3", "12.3 ± 0.4" (mean and sample standard deviation) for several runs, a dash where none is."""
    if not values:
        return "–"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def points(difference: float | None, is_rank: bool = False) -> str:
    """A difference of shares (or of ranks) with its sign: in points of per cent, or in ranks."""
    if difference is None or math.isnan(difference):
        return "–"
    rounded = round(difference if is_rank else 100 * difference, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def one_line(text: str, limit: int) -> str:
    """A text of anybody's on one line of at most `limit` letters, without controls and marks that turn it around."""
    text = text[: 4 * limit].encode("utf-8", "replace").decode()  # half a surrogate pair can't be written
    line = CONTROLS.sub("", " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def escape_markdown(text: str, limit: int = 300) -> str:
    """A text of anybody's as Markdown that shows it, on one line of at most `limit` letters, in a table, too."""
    text = "".join("\\" + letter if letter in MARKDOWN else letter for letter in one_line(text, limit))
    return re.sub(r"^([-+=])|^(\d+)(?=[.)])", lambda mark: f"\\{mark[1]}" if mark[1] else f"{mark[2]}\\", text)


def markdown_table(rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """A table in Markdown, the head first; `text_columns` of them stand to the left, before those of numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(rows[0]) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [rows[0], rule, *rows[1:]])


def retrieval_table(records: Sequence[Record]) -> str:
    """The paper's table, in per cent: a row a language and model, mean ± standard deviation over several seeds.

    Figures of embeddings that were cut have rows of their own, the whole ones before them.

    The gain's interval is that of the paired bootstrap over the split's images, for each seed where there are several.
    """
    rows = [["Language", "Model"]]
    for direction in ("Text-to-image", "Image-to-text"):
        rows[0] += [f"{direction} R@1", "R@5", "R@10", "**Mean recall**"]
    for language, dim in dict.fromkeys((record.language, record.dim) for record in records):
        of_language = [r for r in records if (r.language, r.dim) == (language, dim)]
        title = language if dim is None else f"{language}, first {dim} dimensions"
        for role, name in MODEL_NAMES.items():
            of_role = [r for r in of_language if r.model == role]
            if of_role:
                rows.append([title, name, *_cells(of_role, lambda found: [r.value for r in found])])
        rows.append([title, "chance", *_cells(of_language, lambda found: [r.chance for r in found][:1])])
    gains = [_gain_line(record) for record in records if record.is_gain]
    return "\n".join([markdown_table(rows, 2), "", *gains]).rstrip() + "\n"


def _cells(records, values) -> list[str]:
    """A cell a direction and metric, of the `values` of its records."""
    wanted = [(direction, metric) for direction in DIRECTIONS for metric in COLUMNS]
    return [percent(values([r for r in records if (r.direction, r.metric) == key])) for key in wanted]


def _gain_line(r: Record) -> str:
    low, high = r.interval_95
    seed = "" if r.seed is None else f", seed {r.seed}"
    return (
        f"- {r.language}, {r.direction.replace('_', '-')}{seed}: gain {100 * r.value:+.1f} points, "
        f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    )

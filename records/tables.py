"""Tables of result records, as Markdown."""

import statistics

from records.schema import MODEL_NAMES, Record

COLUMNS = ("recall@1", "recall@5", "recall@10", "mean_recall")


def retrieval_table(records: list[Record]) -> str:
    """The paper's table, in per cent: a row a language and model, mean ± standard deviation over several seeds.

    The gain's interval is that of the paired bootstrap over the split's images, for each seed where there are several.
    """
    header = ["Language", "Model"]
    for direction in ("Text-to-image", "Image-to-text"):
        header += [f"{direction} R@1", "R@5", "R@10", "**Mean recall**"]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for language in dict.fromkeys(record.language for record in records):
        rows = [r for r in records if r.language == language]
        lines += [_row(rows, language, model) for model in MODEL_NAMES if any(r.model == model for r in rows)]
        lines.append(_chance_row(rows, language))
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return "\n".join([table, "", *_gain_lines(records)]).rstrip() + "\n"


def percent(values: list[float]) -> str:
    """Shares as "12.3", "12.3 ± 0.4" (mean and sample standard deviation) for several runs, a dash where none is."""
    if not values:
        return "–"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _row(records: list[Record], language: str, model: str) -> list[str]:
    cells = []
    for direction in ("text_to_image", "image_to_text"):
        for metric in COLUMNS:
            cells.append(
                percent([r.value for r in records if (r.model, r.direction, r.metric) == (model, direction, metric)])
            )
    return [language, MODEL_NAMES[model], *cells]


def _chance_row(records: list[Record], language: str) -> list[str]:
    cells = []
    for direction in ("text_to_image", "image_to_text"):
        for metric in COLUMNS:
            cells.append(percent([r.chance for r in records if (r.direction, r.metric) == (direction, metric)][:1]))
    return [language, "chance", *cells]


def _gain_lines(records: list[Record]) -> list[str]:
    lines = []
    for r in records:
        if r.metric == "mean_recall_gain":
            low, high = r.interval_95
            seed = "" if r.seed is None else f", seed {r.seed}"
            lines.append(
                f"- {r.language}, {r.direction.replace('_', '-')}{seed}: gain {100 * r.value:+.1f} points, "
                f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
            )
    return lines

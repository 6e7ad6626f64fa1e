"""Compute means over seeds and gains over a baseline, and show them as Markdown and HTML tables.

A `Record` is one measured value with the conditions of its measurement. Tables are made in three steps, where `files`
is a list of `ResultFile` objects:

    frame = build_records_frame(files)  # one row per record
    values = average_over_seeds(frame, "folder")  # one mean per model and condition
    pairs = pair_with_baselines(values)  # each model next to its baseline
    pairs[0]["metric"], pairs[0]["capivara"].mean, pairs[0]["capivara"].deviation, pairs[0]["gain"]
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import pandas

from capivara_common.files import write_text
from capivara_common.privacy import shorten_absolute_paths
from eval.records.result_files import DIRECTIONS, RANK_METRICS, ROLE_NAMES, Condition, Record, ResultFile

# Characters that are removed from texts before they are shown, because they could hide or reorder other text: control
# characters, marks that change the direction of text, and private-use characters.
CONTROL_CHARACTERS_RE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ue000-\uf8ff]")
MARKDOWN_CHARACTERS = "\\`*_[]<>|~$#&"
TABLE_METRICS = ("recall@1", "recall@5", "recall@10", "mean_recall")


def build_records_frame(files: Iterable[ResultFile]) -> pandas.DataFrame:
    """Collect the records of several result files in one table, with a row per record.

    A record is one measured value with the conditions of its measurement.

    Returns:
        A table with these columns:

        - the fields of `Record`; `dim` is 0 if embeddings are not truncated;
        - `folder` and `seed`: model and training run, see `get_model_folder_and_seed`;
        - `name`, `precision`, `fingerprint` and `skipped_rows` of the result file;
        - `source`: file and position of the record, such as "results/pt.json#/records/3";
        - `record` and `file`: the `Record` and `ResultFile` objects.
    """
    rows = []
    for file in files:
        fingerprint, skipped = file.content.get("dataset_fingerprint"), file.content.get("skipped_rows")
        metadata = {"name": file.name, "file": file, "precision": str(file.content.get("precision", ""))}
        metadata["fingerprint"] = fingerprint if isinstance(fingerprint, str) else None
        metadata["skipped_rows"] = skipped if isinstance(skipped, int) else 0
        for number, record in enumerate(file.records):
            folder, seed = get_model_folder_and_seed(record, file.name)
            row = vars(record) | metadata
            row |= {"folder": folder, "seed": seed, "dim": record.dim or 0}
            row |= {"record": record, "source": f"{file.name}#/records/{number}"}
            for column, value in row.items():
                # JSON allows half of a surrogate pair, such as "\ud800", but pandas' Arrow strings do not. It is
                # replaced by "?".
                if isinstance(value, str):
                    row[column] = value.encode("utf-8", "replace").decode()
            rows.append(row)
    return pandas.DataFrame(rows, dtype=object).astype({"value": float, "chance": float, "n": float})


def build_mean_recall_record(recalls: Sequence[Record]) -> Record:
    """Average the records of recall@1, recall@5 and recall@10 into one record with the metric "mean_recall".

    Args:
        recalls: The records of these three metrics, for one model and one search direction.

    Returns:
        A copy of the first record with the metric "mean_recall". Its value and chance level are the means over
        `recalls`.
    """
    frame = pandas.DataFrame([vars(record) for record in recalls])
    return replace(recalls[0], metric="mean_recall", **frame[["value", "chance"]].mean().to_dict())


def get_model_folder_and_seed(record: Record, file_name: str) -> tuple[str, int | None]:
    """Find out which model a record belongs to, and the seed of its training run.

    Training runs in the subfolders `seed-0`, `seed-1` and so on of a folder count as one model.

    Args:
        record: The record.
        file_name: Path of the record's result file, relative to the folder of all results.

    Returns:
        A tuple (folder, seed). The folder identifies the model: its own folder, or the parent of a folder `seed-N`. It
        is "this run" if no folder is known. The seed is None if it is unknown.
    """
    folder, seed = PurePosixPath(record.model_folder), record.seed
    number = folder.name.removeprefix("seed-")
    if folder.name != number and number.isdecimal() and seed in (None, int(number)):
        folder, seed = folder.parent, int(number)
    # The results that a training run writes about itself have the folder "." or "seed-N". The folder of the result file
    # then identifies the model.
    if str(folder) == ".":
        folder = PurePosixPath(file_name).parent
        # A file in RUNS/seed-N/results belongs to the folder RUNS, which also has the runs with other seeds.
        if folder.parent.name == f"seed-{seed}":
            folder = folder.parent.parent
    return "this run" if str(folder) == "." else shorten_absolute_paths(folder.as_posix()), seed


def find_conflicting_records(
    frame: pandas.DataFrame, group_column: str, tolerance: float | pandas.Series = 0
) -> pandas.DataFrame:
    """Find records that contradict an earlier record: the same measurement, but another value.

    Two measurements are the same if all fields of `Condition`, the role of the model, the seed and `group_column` are
    equal.

    Args:
        frame: Table with one row per record, from `build_records_frame`.
        group_column: "folder" if the frame has several models. "precision" for the results of a single run, whose
            values may differ between precisions.
        tolerance: Largest difference that is no conflict: one number, or a Series with one number per row.

    Returns:
        The contradicting rows. The new columns `first` and `first_source` have value and source of the earlier record.
    """
    groups = frame.groupby([*Condition._fields, "model", group_column, "seed"], sort=False, dropna=False)
    frame = frame.assign(first=groups["value"].transform("first"), first_source=groups["source"].transform("first"))
    return frame[(frame["value"] - frame["first"]).abs() > tolerance]


def compute_means_and_deviations(frame: pandas.DataFrame, group_columns: list[str]) -> pandas.DataFrame:
    """Compute the mean and the standard deviation of the column `value`, for each group of rows.

    Args:
        frame: Table with the columns `value` and `n` (number of queries or images).
        group_columns: Columns that define the groups. Rows that are equal in all of them form a group.

    Returns:
        A table indexed by the group columns. Its columns are `mean`, `deviation` (sample standard deviation; NaN for a
        single row), `seeds` (number of rows) and `n` (from the first row).
    """
    groups = frame.groupby(group_columns, sort=False, dropna=False)
    return groups.agg(mean=("value", "mean"), deviation=("value", "std"), seeds=("value", "count"), n=("n", "first"))


def average_over_seeds(frame: pandas.DataFrame, group_column: str) -> list[Any]:
    """Average the results of each model over the seeds that it was trained with.

    Args:
        frame: Table with one row per record, from `build_records_frame`.
        group_column: Column that tells models apart, normally "folder"; "precision" for the results of a single run.

    Returns:
        One named tuple per model and `Condition` (task, dataset, metric and so on), in the order of files and records.
        Its fields are:

        - the fields of `Condition`, `model` (role: "baseline" or "capivara") and the group column;
        - `mean`, `deviation` (sample standard deviation; None for a single seed) and `seeds` (their number);
        - `n` and `chance` (may be None) of the first record;
        - `data`: the set of dataset fingerprints;
        - `measured`: the averaged rows, sorted by seed; a row without a seed comes first.
    """
    keys = [*Condition._fields, "model", group_column]
    frame = frame.assign(row=pandas.Series([*frame.itertuples(index=False, name="Measured")], frame.index, object))
    # A measurement that is in two files counts once. Otherwise it would have twice the weight in the mean.
    distinct = frame[~frame.duplicated([*keys, "seed"])]
    groups = frame.groupby(keys, sort=False, dropna=False)
    columns = groups.agg(chance=("chance", "first"), data=("fingerprint", lambda column: frozenset(column.dropna())))
    by_seed = distinct.sort_values("seed", na_position="first")
    columns["measured"] = by_seed.groupby(keys, sort=False, dropna=False)["row"].agg(tuple)
    values = compute_means_and_deviations(distinct, keys).join(columns).reset_index()
    values = values.astype({"deviation": object, "chance": object})
    return [*values.where(values.notna(), None).itertuples(index=False, name="Value")]


def pair_with_baselines(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Pair each trained model with the baselines that it can be compared with, and compute its gains.

    Models can be compared if they have the same `Condition` (task, dataset, language, metric and so on). Baselines that
    were measured on the same data are preferred.

    Args:
        values: Mean results of models and baselines, from `average_over_seeds`.

    Returns:
        One dict per pair, with these keys:

        - the fields of `Condition`;
        - `baseline` and `capivara`: the two elements of `values`; None for a missing partner;
        - `gain`: mean of the model minus mean of the baseline, or None;
        - `chance`: expected value for random scores, or None;
        - `n`: number of queries or images;
        - `seeds`: number of seeds, the larger of both;
        - `is_rank`: True for ranks, False for values from 0 to 1;
        - `doubts`: reasons why the two may not be comparable, as texts.
    """
    by_condition: dict[tuple, dict[str, list]] = {}
    for value in values:
        roles = by_condition.setdefault(value[: len(Condition._fields)], {role: [] for role in ROLE_NAMES})
        roles[value.model].append(value)
    pairs = []
    for roles in by_condition.values():
        matches = []
        for model in roles["capivara"]:
            candidates = [(baseline, model) for baseline in roles["baseline"] or [None]]
            matches += [pair for pair in candidates if not _find_doubts_about_comparability(*pair)] or candidates
        unmatched = [value for value in roles["baseline"] if not any(value is baseline for baseline, _ in matches)]
        pairs += matches + [(baseline, None) for baseline in unmatched]
    return [_build_baseline_comparison(baseline, model) for baseline, model in pairs]


def _find_doubts_about_comparability(baseline: Any | None, model: Any | None) -> list[str]:
    """Return the reasons to doubt that baseline and model were measured on the same data.

    Args:
        baseline: Result of the baseline from `average_over_seeds`, or None.
        model: Result of the model from `average_over_seeds`, or None.

    Returns:
        Reasons as texts for the reader of a report. The list is empty if there is no doubt, or if one of the two is
        None.
    """
    doubts = []
    if model and baseline and baseline.n != model.n:
        doubts.append(f"the baseline was measured on {baseline.n:g} queries or images, the model on {model.n:g}")
    if model and baseline and model.data and baseline.data.isdisjoint(model.data):
        doubts.append("the data differ: baseline and model have different dataset fingerprints")
    return doubts


def _build_baseline_comparison(baseline: Any | None, model: Any | None) -> dict[str, Any]:
    """Build the dict for one pair of baseline and model; `pair_with_baselines` describes its keys.

    Args:
        baseline: Result of the baseline from `average_over_seeds`; None if the model has no baseline.
        model: Result of the model from `average_over_seeds`; None if the baseline has no model.
    """
    sides = [value for value in (model, baseline) if value]
    return {
        **{name: getattr(sides[0], name) for name in Condition._fields},
        "baseline": baseline,
        "capivara": model,
        "gain": model.mean - baseline.mean if model and baseline else None,
        "chance": next((value.chance for value in sides if value.chance is not None), None),
        "n": sides[0].n,
        "seeds": max(value.seeds for value in sides),
        "is_rank": sides[0].metric in RANK_METRICS,
        "doubts": _find_doubts_about_comparability(baseline, model),
    }


def format_percent_over_seeds(values: Sequence[float]) -> str:
    """Format a metric that was measured with one or several seeds as text in percent, such as "12.3 ± 0.4".

    Args:
        values: Values of the metric from 0 to 1, one per seed.

    Returns:
        "12.3" for one value; "12.3 ± 0.4" (mean ± sample standard deviation) for several values; a dash for no value.
    """
    if not len(values):
        return "–"
    shares = 100 * pandas.Series(values, dtype=float)
    return f"{shares.mean():.1f}" if len(shares) == 1 else f"{shares.mean():.1f} ± {shares.std():.1f}"


def format_signed_difference(difference: float | None, is_rank: bool = False) -> str:
    """Format a difference with its sign, such as "+1.2".

    Args:
        difference: Difference between two metric values from 0 to 1, or between two ranks.
        is_rank: True: show a difference of ranks. False: show percentage points.

    Returns:
        The text. A dash for None and NaN.
    """
    if difference is None or math.isnan(difference):
        return "–"
    rounded = round(difference if is_rank else 100 * difference, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def make_short_plain_line(text: str, limit: int) -> str:
    """Convert untrusted text to one short line that is safe to show.

    Control characters and marks that change the direction of text are removed. Line breaks become spaces.

    Args:
        text: The text.
        limit: Largest number of characters; a longer text ends with "…".
    """
    # Half of a surrogate pair, such as "\ud800", can't be written as UTF-8, so it is replaced by "?". Only the start of
    # a long text is processed: the factor 4 normally leaves enough text when spaces and control characters are removed.
    text = text[: 4 * limit].encode("utf-8", "replace").decode()
    line = CONTROL_CHARACTERS_RE.sub("", " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def write_html_from_template(template: Path, file: Path, **values: object) -> None:
    """Render an HTML page from a Jinja template, and write it atomically. All values are escaped.

    Args:
        template: Path of a Jinja template that extends `page.html.j2` (in the folder of this module).
        file: HTML file to write.
        values: Variables of the template.
    """
    files = (template, Path(__file__).parent / "page.html.j2")
    loader = jinja2.DictLoader({path.name: path.read_text(encoding="utf-8") for path in files})
    strict = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    page = jinja2.Environment(loader=loader, autoescape=True, **strict).get_template(template.name).render(values)
    # Half of a surrogate pair, such as "\ud800", can't be written as UTF-8, so it is replaced by "?".
    write_text(file, page.encode("utf-8", "replace").decode())


def escape_markdown(text: str, limit: int = 300) -> str:
    """Escape untrusted text so that Markdown shows it literally. The result is one line and can be put in a table cell.

    Args:
        text: The text.
        limit: Largest number of characters before escaping; a longer text ends with "…".
    """
    text = re.sub(f"[{re.escape(MARKDOWN_CHARACTERS)}]", r"\\\g<0>", make_short_plain_line(text, limit))
    # At the start of a line, "-", "+", "=" or "1." would begin a list or a heading in Markdown. A backslash prevents
    # this.
    return re.sub(r"^([-+=])|^(\d+)(?=[.)])", lambda match: f"\\{match[1]}" if match[1] else f"{match[2]}\\", text)


def render_retrieval_table(records: Sequence[Record]) -> str:
    """Render recalls as a Markdown table like the one in CAPIVARA's paper, in percent.

    The table has a row per language and model, and a row with the chance level. Cells show the mean, with several seeds
    also ± the sample standard deviation. A list below the table has the gains over the baseline with their 95 %
    confidence intervals.

    Args:
        records: Retrieval records of baseline and trained model. Those with the metric "mean_recall_gain" go into the
            list of gains.

    Returns:
        The Markdown text.
    """
    head = ["Language", "Model"]
    for direction in ("Text-to-image", "Image-to-text"):
        head += [f"{direction} R@1", "R@5", "R@10", "**Mean recall**"]
    rows = [head, ["---"] * 2 + ["---:"] * 8]
    frame = pandas.DataFrame([vars(record) | {"dim": record.dim or 0} for record in records])
    for (language, dim), measured in frame.groupby(["language", "dim"], sort=False):
        title = f"{language}, first {dim} dimensions" if dim else language
        groups = [(name, "value", measured[measured["model"] == role]) for role, name in ROLE_NAMES.items()]
        groups.append(("chance", "chance", measured.drop_duplicates(["direction", "metric"])))
        for name, column, group in groups:
            if not group.empty:
                cells = group.groupby(["direction", "metric"])[column].agg(list).to_dict()
                keys = [(direction, metric) for direction in DIRECTIONS for metric in TABLE_METRICS]
                rows.append([title, name, *(format_percent_over_seeds(cells.get(key, [])) for key in keys)])
    lines = [*(f"| {' | '.join(cells)} |" for cells in rows), ""]
    for record in records:
        if record.is_gain:
            gain, low, high = (f"{100 * share:+.1f}" for share in (record.value, *record.interval_95))
            title = f"{record.language}, {record.direction.replace('_', '-')}"
            title += "" if record.seed is None else f", seed {record.seed}"
            lines.append(f"- {title}: gain {gain} points, 95 % interval {low} to {high}")
    return "\n".join(lines).rstrip() + "\n"

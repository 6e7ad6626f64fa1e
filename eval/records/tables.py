"""Records as a pandas table, and tables as Markdown: means and deviations over seeds, gains over a baseline.

    pairs = pair_with_baselines(average_over_seeds(build_records_frame(files), "folder"))
    pairs[0]["metric"], pairs[0]["capivara"].mean, pairs[0]["capivara"].deviation, pairs[0]["gain"]

A row of the table is one measured value.
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
from capivara_common.privacy import hide_paths
from eval.records.schema import DIRECTIONS, RANK_METRICS, ROLE_NAMES, Condition, Record, ResultFile

CONTROL_CHARACTERS_RE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ue000-\uf8ff]")
MARKDOWN_CHARACTERS = "\\`*_[]<>|~$#&"
TABLE_METRICS = ("recall@1", "recall@5", "recall@10", "mean_recall")


def build_records_frame(files: Iterable[ResultFile]) -> pandas.DataFrame:
    """A row a record: its fields, `folder` and `seed` as `get_folder_and_seed` tells them, and what its file says: `name`,
    `source` (file and JSON pointer), `precision`, `fingerprint`, `skipped_rows`; `record` and `file` are whole objects.
    """
    rows = []
    for file in files:
        fingerprint, skipped = file.content.get("dataset_fingerprint"), file.content.get("skipped_rows")
        facts = {"name": file.name, "file": file, "precision": str(file.content.get("precision", ""))}
        facts["fingerprint"] = fingerprint if isinstance(fingerprint, str) else None
        facts["skipped_rows"] = skipped if isinstance(skipped, int) else 0
        for number, record in enumerate(file.records):
            folder, seed = get_folder_and_seed(record, file.name)
            row = vars(record) | facts | {"folder": folder, "seed": seed, "dim": record.dim or 0}
            row |= {"record": record, "source": f"{file.name}#/records/{number}"}
            # Half a surrogate pair is a text of JSON, and none of Arrow's.
            rows.append({k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()})
    return pandas.DataFrame(rows, dtype=object).astype({"value": float, "chance": float, "n": float})


def average_recalls(recalls: Sequence[Record]) -> Record:
    """The record of the mean recall, and of its chance, of a direction's recalls at 1, 5 and 10."""
    of_cutoffs = pandas.DataFrame([vars(record) for record in recalls])
    return replace(recalls[0], metric="mean_recall", **of_cutoffs[["value", "chance"]].mean().to_dict())


def get_folder_and_seed(record: Record, file_name: str) -> tuple[str, int | None]:
    """The model's folder, of several seeds the one around theirs, and the training seed.

    The repetitions of a run lie in `seed-0`, `seed-1` and so on: they are one model. A run's own results name it by "."
    or by these alone, so that the folder of the result file tells two runs apart.
    """
    folder, seed = PurePosixPath(record.model_folder), record.seed
    number = folder.name.removeprefix("seed-")
    if folder.name != number and number.isdecimal() and seed in (None, int(number)):
        folder, seed = folder.parent, int(number)
    if str(folder) == ".":
        folder = PurePosixPath(file_name).parent
        if folder.parent.name == f"seed-{seed}":  # a run of its own, beside those of the other seeds
            folder = folder.parent.parent
    return "this run" if str(folder) == "." else hide_paths(folder.as_posix()), seed


def find_conflicts(
    frame: pandas.DataFrame, group_column: str, tolerance: float | pandas.Series = 0
) -> pandas.DataFrame:
    """Rows of `build_records_frame` whose value is not the `first` of its kind, which `first_source` gives.

    Of one kind are those of one condition, role, seed and `by` ("folder" or "precision"); differences up to `same`, one
    number or one a row, are none.
    """
    of_keys = frame.groupby([*Condition._fields, "model", group_column, "seed"], sort=False, dropna=False)
    firsts = {"first": of_keys["value"].transform("first"), "first_source": of_keys["source"].transform("first")}
    frame = frame.assign(**firsts)
    return frame[(frame["value"] - frame["first"]).abs() > tolerance]


def compute_means(frame: pandas.DataFrame, group_columns: list[str]) -> pandas.DataFrame:
    """Of each `by`, the `mean` of `value` over the rest, its sample `deviation`, the number of `seeds`, and the `n`."""
    of = frame.groupby(group_columns, sort=False, dropna=False)
    return of.agg(mean=("value", "mean"), deviation=("value", "std"), seeds=("value", "count"), n=("n", "first"))


def average_over_seeds(frame: pandas.DataFrame, group_column: str) -> list[Any]:
    """Measured values of models, each the mean over its seeds, in the order of files and records.

    Of a `build_records_frame`, by "folder", where several models may be in it, or by "precision", of the results of one run.
    A row has the fields of the condition, `model`, `by`; `mean` and the sample `deviation` (None of one seed) over
    `seeds` of them; `n`, `chance` (or None), the `data` that were measured on, by their fingerprints; and `measured`,
    the frame's rows, one a seed, in the order of seeds.
    """
    keys = [*Condition._fields, "model", group_column]
    frame = frame.assign(row=pandas.Series([*frame.itertuples(index=False, name="Measured")], frame.index, object))
    once = frame[~frame.duplicated([*keys, "seed"])]  # what is repeated is no seed more
    more = frame.groupby(keys, sort=False, dropna=False).agg(
        chance=("chance", "first"), data=("fingerprint", lambda of: frozenset(of.dropna()))
    )
    by_seed = lambda of: tuple(sorted(of, key=lambda one: -1 if one.seed is None else one.seed))  # noqa: E731
    more["measured"] = once.groupby(keys, sort=False, dropna=False)["row"].agg(by_seed)
    values = compute_means(once, keys).join(more).reset_index().astype({"deviation": object, "chance": object})
    return [*values.where(values.notna(), None).itertuples(index=False, name="Value")]


def pair_with_baselines(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Every model beside every baseline of the same condition; of several baselines, those on the same data if any.

    A dict a pair of `average_over_seeds`: the fields of the condition; `baseline` and `capivara`, or None where one was not
    measured; `gain`, in shares or ranks, `chance`, `n`, `seeds`, `is_rank`; and `doubts` that they are of other data.
    """
    by_condition: dict[tuple, dict[str, list]] = {}
    for value in values:
        roles = by_condition.setdefault(value[: len(Condition._fields)], {role: [] for role in ROLE_NAMES})
        roles[value.model].append(value)
    pairs = []
    for roles in by_condition.values():
        found = []
        for model in roles["capivara"]:
            candidates = [(baseline, model) for baseline in roles["baseline"] or [None]]
            found += [pair for pair in candidates if not _find_doubts(*pair)] or candidates
        alone = [one for one in roles["baseline"] if not any(baseline is one for baseline, _ in found)]
        pairs += found + [(baseline, None) for baseline in alone]
    values = [[one and one.mean for one in pair] for pair in pairs]
    sides = pandas.DataFrame(values, columns=[*ROLE_NAMES], dtype=float)
    gains = (sides["capivara"] - sides["baseline"]).astype(object)
    return [_make_pair(*pair, gain) for pair, gain in zip(pairs, gains.where(gains.notna(), None), strict=True)]


def _find_doubts(baseline: Any | None, model: Any | None) -> list[str]:
    """Why the two may be of other data."""
    doubts = []
    if model and baseline and baseline.n != model.n:
        doubts.append(f"baseline of {baseline.n:g}, model of {model.n:g} queries or images")
    if model and baseline and model.data and baseline.data.isdisjoint(model.data):
        doubts.append("other data: the fingerprints differ")
    return doubts


def _make_pair(baseline: Any | None, model: Any | None, gain: float | None) -> dict[str, Any]:
    sides = [one for one in (model, baseline) if one]
    return {
        **{name: getattr(sides[0], name) for name in Condition._fields},
        "baseline": baseline,
        "capivara": model,
        "gain": gain,
        "chance": next((one.chance for one in sides if one.chance is not None), None),
        "n": sides[0].n,
        "seeds": max(one.seeds for one in sides),
        "is_rank": sides[0].metric in RANK_METRICS,
        "doubts": _find_doubts(baseline, model),
    }


def format_percent(values: Sequence[float]) -> str:
    """Shares as "12.3", "12.3 ± 0.4" (mean and sample standard deviation) for several runs, a dash where none is."""
    if not len(values):
        return "–"
    shares = 100 * pandas.Series(values, dtype=float)
    return f"{shares.mean():.1f}" if len(shares) == 1 else f"{shares.mean():.1f} ± {shares.std():.1f}"


def format_points(difference: float | None, is_rank: bool = False) -> str:
    """A difference of shares (or of ranks) with its sign: in points of per cent, or in ranks."""
    if difference is None or math.isnan(difference):
        return "–"
    rounded = round(difference if is_rank else 100 * difference, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def to_one_line(text: str, limit: int) -> str:
    """A text of anybody's on one line of at most `limit` letters, without controls and marks that turn it around."""
    text = text[: 4 * limit].encode("utf-8", "replace").decode()  # half a surrogate pair can't be written
    line = CONTROL_CHARACTERS_RE.sub("", " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def write_html_page(template: Path, file: Path, **values: object) -> None:
    """Write a page of HTML by a template that extends `page.html.j2`, beside this file; every value is escaped."""
    files = (template, Path(__file__).parent / "page.html.j2")
    loader = jinja2.DictLoader({path.name: path.read_text(encoding="utf-8") for path in files})
    strict = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    page = jinja2.Environment(loader=loader, autoescape=True, **strict).get_template(template.name).render(values)
    write_text(file, page.encode("utf-8", "replace").decode())  # half a surrogate pair can't be written


def escape_markdown(text: str, limit: int = 300) -> str:
    """A text of anybody's as Markdown that shows it, on one line of at most `limit` letters, in a table, too."""
    text = "".join("\\" + letter if letter in MARKDOWN_CHARACTERS else letter for letter in to_one_line(text, limit))
    return re.sub(r"^([-+=])|^(\d+)(?=[.)])", lambda mark: f"\\{mark[1]}" if mark[1] else f"{mark[2]}\\", text)


def render_retrieval_table(records: Sequence[Record]) -> str:
    """The paper's table, in per cent: a row a language and model, mean ± standard deviation over several seeds.

    Figures of embeddings that were cut have rows of their own.

    The gain's interval is that of the paired bootstrap over the split's images, for each seed where there are several.
    """
    head = ["Language", "Model"]
    for direction in ("Text-to-image", "Image-to-text"):
        head += [f"{direction} R@1", "R@5", "R@10", "**Mean recall**"]
    rows = [head, ["---"] * 2 + ["---:"] * 8]
    frame = pandas.DataFrame([vars(record) | {"dim": record.dim or 0} for record in records])
    for (language, dim), measured in frame.groupby(["language", "dim"], sort=False):
        of_roles = [(name, "value", measured[measured["model"] == role]) for role, name in ROLE_NAMES.items()]
        chance = measured.drop_duplicates(["direction", "metric"])
        for name, column, found in [*of_roles, ("chance", "chance", chance)]:
            cells = found.groupby(["direction", "metric"])[column].agg(list).to_dict()
            shown = [format_percent(cells.get((way, metric), [])) for way in DIRECTIONS for metric in TABLE_METRICS]
            title = f"{language}, first {dim} dimensions" if dim else language
            rows += [[title, name, *shown]] * (not found.empty)
    lines = [*(f"| {' | '.join(cells)} |" for cells in rows), ""]
    for r in (record for record in records if record.is_gain):
        gain, low, high = (f"{100 * share:+.1f}" for share in (r.value, *r.interval_95))
        what = f"{r.language}, {r.direction.replace('_', '-')}" + ("" if r.seed is None else f", seed {r.seed}")
        lines.append(f"- {what}: gain {gain} points, 95 % interval {low} to {high}")
    return "\n".join(lines).rstrip() + "\n"

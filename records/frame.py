"""Records as a pandas table: means and deviations over seeds, and the gain of a model over its baseline.

frame = records_frame(files)
pairs, conflicts = compared(frame[frame["metric"] != GAIN])
pairs[0]["capivara"], pairs[0]["gain"]
"""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import pandas

from capivara_common.privacy import hide_paths
from records.schema import MODEL_NAMES, RANK_METRICS, Condition, Record, ResultFile

SAME = 5e-4  # a difference that no table shows: of two runs on different devices, say


def records_frame(files: Iterable[ResultFile]) -> pandas.DataFrame:
    """A row a record: its fields, `folder` and `seed` as `folder_and_seed` tells them, and what its file says.

    That is the file's name (`file`), the `fingerprint` of the data, and the images left out (`skipped_rows`).
    """
    rows = []
    for file in files:
        fingerprint, skipped = file.content.get("dataset_fingerprint"), file.content.get("skipped_rows")
        facts = {"file": file.name, "fingerprint": fingerprint if isinstance(fingerprint, str) else None}
        facts["skipped_rows"] = skipped if isinstance(skipped, int) else 0
        for record in file.records:
            folder, seed = folder_and_seed(record, file.name)
            row = vars(record) | facts | {"folder": folder, "seed": seed, "dim": record.dim or 0}
            # Half a surrogate pair is a text of JSON, and none of Arrow's.
            rows.append({k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()})
    return pandas.DataFrame(rows, dtype=object).astype({"value": float, "chance": float, "n": float})


def compared(frame: pandas.DataFrame) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Every model beside every baseline of the same condition; of several baselines, those on the same data if any.

    Args:
        frame: of `records_frame`, without gains.

    Returns:
        A dict a pair: the fields of the condition; `baseline` and `capivara`, (mean, sample deviation over the seeds or
        None), or None where one was not measured; `folder` of the model, or of a baseline alone, and `before`, that of
        the model's baseline; `gain`, `chance`, `n`, `seeds`; and `doubts`, why the two may be of other data. Beside
        them (file, what) of figures that contradict those of an earlier file, which stand.
    """
    condition, figure = list(Condition._fields), [*Condition._fields, "model", "folder"]
    first = frame.groupby([*figure, "seed"], sort=False, dropna=False)["value"].transform("first")
    wrong = frame[(frame["value"] - first).abs() > SAME].drop_duplicates(["file", "dataset", "folder"])
    conflicts = [
        (r.file, f"has other figures of {r.dataset} with {r.folder}; the first ones are shown")
        for r in wrong.itertuples()
    ]
    once = frame["value"].where(~frame.duplicated([*figure, "seed"]))  # what is repeated is no seed more
    groups = frame.assign(value=once).groupby(figure, sort=False, dropna=False)
    figures = groups.agg(
        mean=("value", "mean"), deviation=("value", "std"), seeds=("value", "count"), n=("n", "first"),
        chance=("chance", "first"), data=("fingerprint", lambda column: frozenset(column.dropna())),
    ).reset_index()  # fmt: skip
    pairs = []
    for _, rows in figures.groupby(condition, sort=False, dropna=False):
        roles = {role: rows[rows["model"] == role].to_dict("records") for role in MODEL_NAMES}
        found = []
        for model in roles["capivara"]:
            candidates = [_pair(baseline, model) for baseline in roles["baseline"] or [None]]
            found += [pair for pair in candidates if not pair["doubts"]] or candidates
        used = {pair["before"] for pair in found}
        pairs += found + [_pair(baseline, None) for baseline in roles["baseline"] if baseline["folder"] not in used]
    return pairs, conflicts


def means_of(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of pairs of several data sets a row a model and baseline: the means over the sets that both were measured on."""
    names = {"baseline": "baseline_mean", "capivara": "capivara_mean"}
    both = [p | {name: p[role][0] for role, name in names.items()} for p in pairs if p["gain"] is not None]
    means = []
    for _, rows in pandas.DataFrame(both).groupby(["before", "folder"], sort=False) if both else ():
        values = {role: (rows[name].mean(), None) for role, name in names.items()} | {"gain": rows["gain"].mean()}
        about = {"dataset": f"mean of {len(rows)} data sets", "metric": "", "chance": None, "n": None, "doubts": []}
        models = {name: rows[name].iloc[0] for name in ("before", "folder")}
        means += [both[0] | values | about | models] * (len(rows) > 1)
    return means


def folder_and_seed(record: Record, file_name: str) -> tuple[str, int | None]:
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


def _pair(baseline: dict[str, Any] | None, model: dict[str, Any] | None) -> dict[str, Any]:
    """A row of `compared`, of two rows of figures."""
    both, doubts = [one for one in (model, baseline) if one], []
    if model and baseline and baseline["n"] != model["n"]:
        doubts.append(f"baseline of {baseline['n']:g}, model of {model['n']:g} queries or images")
    if model and baseline and model["data"] and baseline["data"].isdisjoint(model["data"]):
        doubts.append("other data: the fingerprints differ")
    means = [one and (one["mean"], one["deviation"] if one["seeds"] > 1 else None) for one in (baseline, model)]
    return {
        **{name: both[0][name] for name in Condition._fields},
        "is_rank": both[0]["metric"] in RANK_METRICS,
        "baseline": means[0],
        "capivara": means[1],
        "before": baseline["folder"] if model and baseline else "",
        "folder": both[0]["folder"],
        "gain": means[1][0] - means[0][0] if len(both) == 2 else None,
        "chance": next((one["chance"] for one in both if pandas.notna(one["chance"])), None),
        "n": both[0]["n"],
        "seeds": max(one["seeds"] for one in both),
        "doubts": doubts,
    }

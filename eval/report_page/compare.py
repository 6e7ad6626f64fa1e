"""From the records of many result files to what is compared with what."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from torch import Tensor

from common.privacy import hide_paths
from eval.report_page.files import RANK_METRICS, ClassFigures, Found, Query, ResultFile
from records.schema import MODEL_NAMES, Record
from records.tables import percent

SAME = 5e-4  # a difference that no figure shows: of two runs on different devices, say
TASKS = ("retrieval", "classification", "linear_probe")


class Condition(NamedTuple):
    """What two figures must share to be compared."""

    task: str
    dataset: str
    split: str
    language: str
    protocol: str
    direction: str
    metric: str


@dataclass
class Series:
    """One model under one condition: a value, or one of each seed.

    Attributes:
        role: "baseline" or "capivara".
        source: the model's folder; of several seeds, the one around theirs.
        values: seed -> value; the seed of a model that was not trained in the run is None.
        n: queries or images of the first record.
        chance: of the first record.
        fingerprints: of the data that were measured on.
        skipped: images that could not be read, of the file with most of them.
    """

    role: str
    source: str
    n: float
    chance: float | None
    values: dict[int | None, float] = field(default_factory=dict)
    fingerprints: set[str] = field(default_factory=set)
    skipped: int = 0

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single value."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Pair:
    """A baseline and a model under one condition; one of them may not have been measured."""

    condition: Condition
    baseline: Series | None
    model: Series | None

    @property
    def is_rank(self) -> bool:
        return self.condition.metric in RANK_METRICS

    @property
    def difference(self) -> float | None:
        """Model minus baseline, in shares or ranks."""
        return self.model.mean - self.baseline.mean if self.model and self.baseline else None

    @property
    def chance(self) -> float | None:
        return next((s.chance for s in (self.model, self.baseline) if s and s.chance is not None), None)

    @property
    def doubts(self) -> list[str]:
        """Why the two may not have been measured on the same data."""
        if not self.model or not self.baseline:
            return []
        doubts = []
        if self.model.n != self.baseline.n:
            doubts.append(f"baseline of {self.baseline.n:g}, model of {self.model.n:g} queries or images")
        if self.model.fingerprints and self.baseline.fingerprints.isdisjoint(self.model.fingerprints):
            doubts.append("other data: the fingerprints differ")
        return doubts


@dataclass(frozen=True)
class ClassSeries:
    """Per-class accuracies (means over the seeds) and the summed confusion matrix of a model."""

    role: str
    source: str
    names: list[str]
    accuracies: list[float | None]
    confusion: Tensor  # (classes, classes), a row a true class
    files: list[ResultFile]


def series_by_condition(found: Found) -> dict[Condition, list[Series]]:
    """All figures save the gains, in the order of the files; repeated ones that differ are stated in `problems`."""
    grouped: dict[Condition, dict[tuple[str, str], Series]] = {}
    for result in found.results:
        for record in result.records:
            if is_gain(record):
                continue
            role, source, seed = identity(record, result.name)
            of_condition = grouped.setdefault(condition_of(record), {})
            series = of_condition.setdefault((role, source), Series(role, source, record.n, record.chance))
            if not math.isclose(series.values.setdefault(seed, record.value), record.value, abs_tol=SAME):
                problem = f"has other figures of {record.dataset} with {source}; the first ones are shown"
                found.problems += [(result.name, problem)] if (result.name, problem) not in found.problems else []
            fingerprint = result.facts.get("dataset_fingerprint")
            series.fingerprints |= {fingerprint} if isinstance(fingerprint, str) else set()
            skipped = result.facts.get("skipped_rows")
            series.skipped = max(series.skipped, skipped if isinstance(skipped, int) else 0)
    return {condition: list(series.values()) for condition, series in grouped.items()}


def pairs_of(series: dict[Condition, list[Series]]) -> list[Pair]:
    """Every model with every baseline of the same condition; of several, with those on the same data if any."""
    pairs = []
    for condition, of_condition in series.items():
        baselines = [s for s in of_condition if s.role == "baseline"]
        paired = []
        for model in (s for s in of_condition if s.role == "capivara"):
            candidates = [Pair(condition, baseline, model) for baseline in baselines] or [Pair(condition, None, model)]
            paired += [pair for pair in candidates if not pair.doubts] or candidates
        alone = [baseline for baseline in baselines if not any(pair.baseline is baseline for pair in paired)]
        pairs += paired + [Pair(condition, baseline, None) for baseline in alone]
    return pairs


def blocks_of(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs that share a figure: of retrieval those of a data set, of classification those of all data sets."""
    blocks: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        c = pair.condition
        dataset = c.dataset if c.task == "retrieval" else ""
        blocks.setdefault((c.task, dataset, c.split, c.language, c.protocol), []).append(pair)
    return sorted(blocks.values(), key=lambda block: reading_order(block[0].condition))


def reading_order(c: Condition) -> tuple[int, bool, bool]:
    """Tasks in their order, Portuguese before other languages, this project's prompts before others'."""
    task = TASKS.index(c.task) if c.task in TASKS else len(TASKS)
    return task, c.language not in ("pt", ""), c.protocol in ("authors", "babel")


def main_pairs(block: list[Pair]) -> list[Pair]:
    """Those that a figure shows: shares; of classification the data set's own metric, which its file holds first."""
    shares = [pair for pair in block if not pair.is_rank]
    if block[0].condition.task == "retrieval":
        return shares
    first: dict[str, str] = {}
    for pair in shares:
        first.setdefault(pair.condition.dataset, pair.condition.metric)
    return [pair for pair in shares if pair.condition.metric == first[pair.condition.dataset]]


def protocol_rows(series: dict[Condition, list[Series]]) -> list[tuple[Condition, Series, Series]]:
    """(condition, of the protocol authors, of ours) of the same model on the same images."""
    rows = []
    for condition, of_condition in series.items():
        if condition.protocol != "authors":
            continue
        ours = {(s.role, s.source): s for s in series.get(condition._replace(protocol="ours"), [])}
        rows += [(condition, s, ours[s.role, s.source]) for s in of_condition if (s.role, s.source) in ours]
    return rows


def gains_of(found: Found) -> list[tuple[Record, str]]:
    """Gains that have an interval, with their model's folder."""
    gains = [
        (record, identity(record, result.name)[1])
        for result in found.results
        for record in result.records
        if is_gain(record) and record.interval_95 is not None
    ]
    return sorted(gains, key=lambda gain: reading_order(condition_of(gain[0])))


def class_series(found: Found) -> dict[Condition, list[ClassSeries]]:
    """Class figures by condition (its direction and metric empty), seeds of a model taken together."""
    grouped: dict[Condition, dict[tuple[str, str], list[ResultFile]]] = {}
    for result in found.results:
        if result.classes:
            condition = condition_of(result.records[0])._replace(direction="", metric="")
            role, source, _ = identity(result.records[0], result.name)
            grouped.setdefault(condition, {}).setdefault((role, source), []).append(result)
    merged = {}
    for condition, of_condition in sorted(grouped.items(), key=lambda item: reading_order(item[0])):
        merged[condition] = [_merged(role, source, files, found) for (role, source), files in of_condition.items()]
    return merged


def galleries_of(found: Found) -> dict[Condition, dict[str, list[Query]]]:
    """Condition (direction and metric empty) -> role -> queries, of the first file of each role."""
    galleries: dict[Condition, dict[str, list[Query]]] = {}
    for result in found.results:
        if result.gallery:
            condition = condition_of(result.records[0])._replace(direction="", metric="")
            base = PurePosixPath(result.name).parent
            galleries.setdefault(condition, {}).setdefault(
                result.records[0].model, [_from_folder(query, base) for query in result.gallery]
            )
    return dict(sorted(galleries.items(), key=lambda item: reading_order(item[0])))


def confused_pairs(confusion: Tensor, count: int) -> list[tuple[int, int]]:
    """(true class, taken for) of the largest counts off the diagonal, those of none left out."""
    off = confusion.clone()
    off.fill_diagonal_(0)
    classes = len(off)
    order = off.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [divmod(index, classes) for index in order if off.flatten()[index] > 0]


def condition_of(record: Record) -> Condition:
    return Condition(*(getattr(record, name) for name in Condition._fields))


def is_gain(record: Record) -> bool:
    return record.metric.endswith("_gain")


def identity(record: Record, file_name: str) -> tuple[str, str, int | None]:
    """(role, folder, seed) of a record's model.

    The repetitions of a run lie in `seed-0`, `seed-1` and so on: they are one model. A run's own results name it by "."
    or by these alone, so that the result file's place is what tells two runs apart.
    """
    folder, seed = PurePosixPath(record.model_folder), record.seed
    number = folder.name.removeprefix("seed-")
    if folder.name != number and number.isdecimal() and seed in (None, int(number)):
        folder, seed = folder.parent, int(number)
    if str(folder) == ".":
        folder = PurePosixPath(file_name).parent
    return record.model, "this run" if str(folder) == "." else hide_paths(folder.as_posix()), seed


def value_text(series: Series | None, is_rank: bool) -> str:
    """Per cent or rank, with the standard deviation of several seeds; a dash where there is none."""
    if series is None:
        return "–"
    if not is_rank:
        return percent(list(series.values.values()))
    return f"rank {series.mean:g}" + (f" ± {series.deviation:.1f}" if series.deviation is not None else "")


def points(difference: float | None, is_rank: bool = False) -> str:
    """A difference with its sign: in points of per cent, or in ranks."""
    if difference is None or math.isnan(difference):
        return "–"
    rounded = round(difference if is_rank else 100 * difference, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def model_label(role: str, source: str, sources: set[str]) -> str:
    """Name of a model, with its folder where `sources` of the same role are several."""
    return MODEL_NAMES[role] if len(sources) < 2 else f"{MODEL_NAMES[role]} ({source})"


def _merged(role: str, source: str, files: list[ResultFile], found: Found) -> ClassSeries:
    names = files[0].classes.names
    fitting = [file for file in files if file.classes.names == names]
    for file in files:
        if file not in fitting:
            reason = f"has other classes than {files[0].name}; its class figures are left out"
            found.problems.append((file.name, reason))
    figures: list[ClassFigures] = [file.classes for file in fitting]
    accuracies = []
    for of_class in zip(*(f.accuracies for f in figures), strict=True):
        known = [accuracy for accuracy in of_class if accuracy is not None]
        accuracies.append(statistics.mean(known) if known else None)
    return ClassSeries(role, source, names, accuracies, sum(f.confusion for f in figures), fitting)


def _from_folder(query: Query, base: PurePosixPath) -> Query:
    """The query with its pictures' paths relative to the whole folder, not to the result file."""
    best = [(str(base / image), score) for image, score in query.best]
    return Query(query.text, query.rank, str(base / query.right), best)

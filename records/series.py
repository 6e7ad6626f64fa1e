"""Records over several seeds and models: one figure's mean and deviation, and a model's gain over the baseline.

for series in collect_series(files):
    print(series.condition.metric, series.mean, series.deviation)
gain = pairs_of(collect_series(files))[0].difference
"""

import statistics
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from records.schema import Condition, Record, ResultFile


@dataclass(frozen=True)
class Measured:
    """A record, its result file, and its number there, from 0."""

    record: Record
    file: ResultFile
    number: int

    @property
    def source(self) -> str:
        """File, `#`, and JSON pointer of the record."""
        return f"{self.file.name}#/records/{self.number}"

    @property
    def precision(self) -> str:
        """In which it was measured, such as "float32"."""
        return str(self.file.content.get("precision", ""))


@dataclass(frozen=True)
class Series:
    """One figure of one model: a record, or one of each seed."""

    measured: tuple[Measured, ...]  # at least one, in the order of seeds; a model that was not trained has None
    files: tuple[ResultFile, ...] = ()  # all that hold the figure, also those that repeat it
    conflicts: tuple[tuple[Measured, Measured], ...] = ()  # of a seed: the first, and one whose value differs

    @property
    def first(self) -> Record:
        """The record of the lowest seed."""
        return self.measured[0].record

    @property
    def condition(self) -> Condition:
        """What another series must share to be compared with this one."""
        return self.first.condition

    @property
    def role(self) -> str:
        """ "baseline" or "capivara"."""
        return self.first.model

    @property
    def values(self) -> list[float]:
        """Of each seed: shares from 0 to 1, ranks, or gains."""
        return [measured.record.value for measured in self.measured]

    @property
    def mean(self) -> float:
        """Of the values over the seeds."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single value."""
        return statistics.stdev(self.values) if len(self.measured) > 1 else None

    @property
    def fingerprints(self) -> set[str]:
        """Of the data that were measured on."""
        found = (file.content.get("dataset_fingerprint") for file in self.files)
        return {fingerprint for fingerprint in found if isinstance(fingerprint, str)}

    def of_seed(self, seed: int | None) -> Measured | None:
        """The figure of one seed; of a single model its only one."""
        if len(self.measured) == 1:
            return self.measured[0]
        return next((measured for measured in self.measured if measured.record.seed == seed), None)


@dataclass(frozen=True)
class Pair:
    """A baseline and a model under one condition; one of them may not have been measured."""

    condition: Condition
    baseline: Series | None
    model: Series | None

    @property
    def is_rank(self) -> bool:
        """Whether the values are ranks, the lower the better."""
        return (self.model or self.baseline).first.is_rank

    @property
    def difference(self) -> float | None:
        """Model minus baseline, in shares or ranks."""
        return self.model.mean - self.baseline.mean if self.model and self.baseline else None

    @property
    def chance(self) -> float | None:
        """Expected value of random scores, of either of them."""
        return next((s.first.chance for s in (self.model, self.baseline) if s and s.first.chance is not None), None)

    @property
    def doubts(self) -> list[str]:
        """Why the two may not have been measured on the same data."""
        if not self.model or not self.baseline:
            return []
        doubts, (before, after) = [], (self.baseline.first.n, self.model.first.n)
        if before != after:
            doubts.append(f"baseline of {before:g}, model of {after:g} queries or images")
        if self.model.fingerprints and self.baseline.fingerprints.isdisjoint(self.model.fingerprints):
            doubts.append("other data: the fingerprints differ")
        return doubts


def by_role_and_precision(measured: Measured) -> tuple[Hashable, int | None]:
    """Group of a record, and its seed: one condition, role and precision, for the results of one run."""
    return (measured.record.condition, measured.record.model, measured.precision), measured.record.seed


def collect_series(
    files: Iterable[ResultFile],
    group_and_seed: Callable[[Measured], tuple[Hashable, int | None]] = by_role_and_precision,
) -> list[Series]:
    """All figures, in the order of files and records; `group_and_seed` says which are one, and of which seed each."""
    groups: dict[Hashable, tuple[dict, list, list]] = {}  # measured by seed, files, conflicts
    for file in files:
        for number, record in enumerate(file.records):
            measured = Measured(record, file, number)
            group, seed = group_and_seed(measured)
            by_seed, sources, conflicts = groups.setdefault(group, ({}, [], []))
            known = by_seed.setdefault(seed, measured)
            if not sources or sources[-1] is not file:
                sources.append(file)
            if known.record.value != record.value:
                conflicts.append((known, measured))
    return [
        Series(
            tuple(by_seed[seed] for seed in sorted(by_seed, key=lambda seed: -1 if seed is None else seed)),
            tuple(sources),
            tuple(conflicts),
        )
        for by_seed, sources, conflicts in groups.values()
    ]


def pairs_of(series: Iterable[Series]) -> list[Pair]:
    """Every model with every baseline of the same condition; of several, with those on the same data if any."""
    by_condition: dict[Condition, list[Series]] = {}
    for one in series:
        by_condition.setdefault(one.condition, []).append(one)
    pairs = []
    for condition, of_condition in by_condition.items():
        baselines = [s for s in of_condition if s.role == "baseline"]
        paired = []
        for model in (s for s in of_condition if s.role == "capivara"):
            candidates = [Pair(condition, baseline, model) for baseline in baselines] or [Pair(condition, None, model)]
            paired += [pair for pair in candidates if not pair.doubts] or candidates
        alone = [baseline for baseline in baselines if not any(pair.baseline is baseline for pair in paired)]
        pairs += paired + [Pair(condition, baseline, None) for baseline in alone]
    return pairs

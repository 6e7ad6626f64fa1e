"""What a model card may state: the files of a run's folder, each value with the place where it stands.

    facts = card_facts(Path("runs/openmoji-pt-001"))
    facts.run["config"]["learning_rate"]  # Fact(value=5e-05, source="run.json#/config/learning_rate")

Nothing else is read than `run.json` (and those of `seed-*/`), `results/*.json`, for the architecture `config.json` and
the header of `model.safetensors`, and for ONNX `onnx/quantisation.json`. What they lack is an error where the card
needs it, and None where it doesn't; nothing is guessed.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.privacy import secret_in

RESULT_SCHEMA = 2  # of result files and of run.json
MAX_JSON_BYTES = 64 * 2**20
RANK_METRICS = ("median_rank",)  # ranks from 1, the lower the better; every other metric is a share
ROLES = ("baseline", "capivara")
GRAPHS = "onnx/quantisation.json"
PICTURES = ("curves.png", "retrieval.png")
FORMATS = {
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "open_clip_from_inside": ("text_model/config.json",),  # which open_clip finds only from inside the folder
    "sentence_transformers": ("modules.json",),
    "onnx": ("onnx/text_model.onnx", "onnx/vision_model.onnx"),
}
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<![.-])", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fact:
    """A JSON value and its place: file, `#`, and a JSON pointer."""

    value: Any
    source: str

    def __getitem__(self, key: str | int) -> "Fact":
        """Raises ValueError where the value is no container, or has no such key."""
        try:
            return Fact(self.value[key], f"{self.source}/{key}")
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.source} has no {key!r}, which the card needs.") from None

    def get(self, key: str) -> "Fact | None":
        """None where the key is missing, or its value is null or empty."""
        value = self.value.get(key) if isinstance(self.value, dict) else None
        return None if value in (None, "", [], {}) else Fact(value, f"{self.source}/{key}")

    def __iter__(self) -> Iterator["Fact"]:
        """The items of a list, or the values of an object. Raises ValueError where the value is neither."""
        if not isinstance(self.value, dict | list):
            raise ValueError(f"{self.source} must be a list, got {self.value!r:.60}.")
        keys = self.value if isinstance(self.value, dict) else range(len(self.value))
        return (self[key] for key in keys)

    def names(self) -> list[str]:
        """Raises ValueError where the value is no object."""
        if not isinstance(self.value, dict):
            raise ValueError(f"{self.source} must be an object, got {self.value!r:.60}.")
        return list(self.value)

    def number(self) -> float:
        """The value. Raises ValueError unless it is a finite number."""
        if not is_number(self.value):
            raise ValueError(f"{self.source} must be a number, got {self.value!r:.60}.")
        return self.value


@dataclass(frozen=True)
class Measured:
    """A record of a result file; `about` is the file's header, `value` its figure."""

    task: str
    dataset: str
    split: str
    language: str
    protocol: str
    direction: str
    metric: str
    model: str
    seed: int | None
    n: Fact
    value: Fact
    chance: Fact | None
    interval: Fact | None
    about: Fact

    @property
    def precision(self) -> str:
        return str(self.about["precision"].value)

    @property
    def condition(self) -> tuple[str, ...]:
        """What a figure must share with another one to be compared with it."""
        return (self.task, self.dataset, self.split, self.language, self.protocol, self.precision)

    @property
    def key(self) -> tuple[str, ...]:
        """What the figures of several seeds share."""
        return (*self.condition, self.direction, self.metric, self.model)


@dataclass(frozen=True)
class Series:
    """One figure, of one model or of several seeds in their order."""

    records: tuple[Measured, ...]

    @property
    def first(self) -> Measured:
        return self.records[0]

    @property
    def mean(self) -> float:
        return statistics.mean(record.value.value for record in self.records)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single figure."""
        values = [record.value.value for record in self.records]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def source(self) -> str:
        return ", ".join(record.value.source for record in self.records)

    def of_seed(self, seed: int | None) -> Measured | None:
        """The figure of one seed; of a single model its only one."""
        if len(self.records) == 1:
            return self.first
        return next((record for record in self.records if record.seed == seed), None)


@dataclass(frozen=True)
class CardFacts:
    """All that a card may state.

    Attributes:
        folder: of the run, or of the repository made from it.
        name: of the folder, as code names it.
        model: folder of the weights in it, "." or "seed-0".
        run: the `run.json` of the weights in the folder; of the first seed where each has a folder of its own.
        runs: every `run.json`, in the order of seeds.
        series: the figures, in the order of files and records.
        config: `config.json` of the model; None where the folder holds none.
        tokens: longest text that the processor lets through.
        parameters: numbers in the weights; None where the folder holds none.
        graphs: `onnx/quantisation.json`, which has the sizes and differences of the graphs; None where there is none.
        formats: keys of `FORMATS` whose files are there.
        pictures: paths of those of `PICTURES` that are there.
        digests: file -> SHA-256 of all that was read, and of the pictures.
    """

    folder: Path
    name: str
    model: str
    run: Fact
    runs: tuple[Fact, ...]
    series: tuple[Series, ...]
    config: Fact | None
    tokens: Fact
    parameters: Fact | None
    graphs: Fact | None
    formats: frozenset[str]
    pictures: tuple[str, ...]
    digests: dict[str, Fact]

    @property
    def seeds(self) -> list[int]:
        return [run["seed"].value for run in self.runs]

    def revision(self, record: Measured) -> Fact | None:
        """Commit on the Hub of the data that were measured on; None of any other data, whose name may look like an id.

        It is in the result file, or in the run's facts where the file is of the run's own evaluation: same fingerprint.
        """
        said, of_run = record.about.get("dataset_revision"), self.run.get("origins")
        fingerprint, known = record.about.get("dataset_fingerprint"), self.run.get("dataset_fingerprints")
        if not said and of_run and fingerprint and known:
            evaluated = of_run["evaluation_dataset"]
            is_ours = fingerprint.value in [known[name].value for name in known.names()]
            said = evaluated.get("revision") if is_ours and evaluated["hub_id"].value == record.dataset else None
        right = said and COMMIT.fullmatch(str(said.value)) and HUB_ID.fullmatch(record.dataset)
        return said if right else None

    def find(self, condition: tuple[str, ...], direction: str, metric: str, model: str) -> Series | None:
        key = (*condition, direction, metric, model)
        return next((series for series in self.series if series.first.key == key), None)


def card_facts(folder: Path, name: str | None = None) -> CardFacts:
    """Read and check all that the card of a folder may state.

    Args:
        folder: of a run of `train_accelerate.py`, of one seed or of several, or a repository made from it.
        name: how code in the card names the folder; its own name where None.

    Raises:
        ValueError: a file is missing or has another form, two records give one figure different values, or a file
            holds an access token. The message names the file and the place in it.
    """
    if name is not None and _usable(name) != name:
        raise ValueError(f"{name!r} is no name of a folder that code can hold; take letters, digits, - and _.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the one that a run of train_accelerate.py wrote.")
    digests: dict[str, Fact] = {}
    model, run, runs = _runs(folder, digests)
    results = sorted((folder / "results").glob("*.json"))
    measured = [record for path in results for record in _records(path, folder, digests)]
    if not measured:
        raise ValueError(f"{folder}/results holds no measurement, and a card states what was measured.")
    from modeling_capivara.processing_capivara import CONTEXT_LENGTH  # here: --help of the commands awaits no torch

    config, graphs = (_read_if_there(model / name, folder, digests) for name in ("config.json", GRAPHS))
    return CardFacts(
        folder=folder,
        name=name or _usable(folder.resolve().name),
        model=model.relative_to(folder).as_posix(),
        run=run,
        runs=runs,
        series=_series(measured),
        config=config,
        tokens=Fact(CONTEXT_LENGTH, "processing_capivara.py"),
        parameters=_parameters(model, folder),
        graphs=graphs,
        formats=frozenset(key for key, files in FORMATS.items() if all((folder / file).is_file() for file in files)),
        pictures=_pictures(model, folder, digests),
        digests=digests,
    )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18  # false of NaN


def _runs(folder: Path, digests: dict[str, Fact]) -> tuple[Path, Fact, tuple[Fact, ...]]:
    """Folder of the weights, their `run.json`, and every one in the order of seeds."""
    paths = [path for path in (folder / "run.json", *sorted(folder.glob("seed-*/run.json"))) if path.is_file()]
    if not paths:
        raise ValueError(f"{folder} has no run.json, and none in seed-*/: give the folder of a finished training run.")
    read = [(path.parent, _checked_run(_read(path, folder, digests))) for path in paths]
    model, run = read[0] if paths[0].parent == folder else min(read, key=lambda pair: pair[1]["seed"].value)
    by_seed = {of["seed"].value: of for _, of in [*read, (model, run)]}
    return model, run, tuple(by_seed[seed] for seed in sorted(by_seed))


def _usable(name: str) -> str:
    """A folder's name where code can hold it, and it is not that of a temporary folder."""
    return name if re.fullmatch(r"(?!.*--)[A-Za-z0-9][\w-]*(\.[\w-]+)*", name, re.ASCII) else "capivara"


# --- Files -----------------------------------------------------------------------------------------------------------


def _read(path: Path, folder: Path, digests: dict[str, Fact]) -> Fact:
    """The content of a JSON file; its digest is noted."""
    name = path.relative_to(folder).as_posix()
    if not path.is_file():  # to read a pipe would wait for ever
        raise ValueError(f"{name} is no regular file. Remove it.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{name} is larger than {MAX_JSON_BYTES // 2**20} MiB.")
    data = path.read_bytes()
    digests[name] = Fact(hashlib.sha256(data).hexdigest(), name)
    try:
        text = data.decode("utf-8")
        content = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}.") from error
    if secret := secret_in(text):
        raise ValueError(f"{name} holds {secret[0]}. Revoke it, and take it out before publishing.")
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold an object.")
    return Fact(content, f"{name}#")


def _read_if_there(path: Path, folder: Path, digests: dict[str, Fact]) -> Fact | None:
    return _read(path, folder, digests) if path.is_file() else None


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return content


def _checked_run(run: Fact) -> Fact:
    if run["schema_version"].value != RESULT_SCHEMA:
        raise ValueError(f"{run.source} has schema version {run['schema_version'].value!r:.20}, not {RESULT_SCHEMA}.")
    for key, kind in (("config", dict), ("versions", dict), ("seconds", dict), ("seed", int), ("device", str)):
        if not isinstance(run[key].value, kind):
            raise ValueError(f"{run[key].source} must be of type {kind.__name__}, got {run[key].value!r:.60}.")
    return run


def _parameters(model: Path, folder: Path) -> Fact | None:
    """How many numbers the weights are, by the headers of their files."""
    paths = sorted([*model.glob("model.safetensors"), *model.glob("model-*-of-*.safetensors")])
    if not paths:
        return None
    return Fact(sum(map(_numbers, paths)), ", ".join(path.relative_to(folder).as_posix() for path in paths))


def _numbers(path: Path) -> int:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size if size <= MAX_JSON_BYTES else 0))
            return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} is no safetensors file.") from error


def _pictures(model: Path, folder: Path, digests: dict[str, Fact]) -> tuple[str, ...]:
    found = [model / name for name in PICTURES if (model / name).is_file()]
    names = [path.relative_to(folder).as_posix() for path in found]
    for name, path in zip(names, found, strict=True):
        digests[name] = Fact(hashlib.sha256(path.read_bytes()).hexdigest(), name)
    return tuple(names)


# --- Records ---------------------------------------------------------------------------------------------------------


def _records(path: Path, folder: Path, digests: dict[str, Fact]) -> list[Measured]:
    """The records of a result file; none of another JSON file, such as a suite's summary."""
    content = _read(path, folder, digests)
    if "records" not in content.value:
        return []
    if content["schema_version"].value != RESULT_SCHEMA:
        raise ValueError(
            f"{content.source} is no result file of schema version {RESULT_SCHEMA}. Measure it again with this package."
        )
    if not isinstance(content["records"].value, list):
        raise ValueError(f"{content.source}/records must be a list.")
    return [_record(entry, content) for entry in content["records"]]


def _record(entry: Fact, about: Fact) -> Measured:
    texts = ("task", "dataset", "split", "language", "protocol", "direction", "metric", "model")
    values = {name: entry[name].value for name in texts}
    if wrong := [name for name, value in values.items() if not isinstance(value, str)]:
        raise ValueError(f"{entry.source}/{wrong[0]} must be text.")
    if values["model"] not in ROLES:
        raise ValueError(f"{entry.source}/model must be one of {', '.join(ROLES)}.")
    value, low = entry["value"].number(), -1 if values["metric"].endswith("_gain") else 0
    is_rank = values["metric"] in RANK_METRICS
    if value < 1 if is_rank else not low <= value <= 1:
        raise ValueError(f"{entry.source}/value must be {'a rank from 1' if is_rank else 'a share'}, got {value:g}.")
    seed, interval, chance = entry.value.get("seed"), entry.get("interval_95"), entry.get("chance")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"{entry.source}/seed must be a whole number or null.")
    if interval is not None and not (isinstance(interval.value, list) and len(interval.value) == 2):
        raise ValueError(f"{entry.source}/interval_95 must be two numbers.")
    for number in (*(interval or ()), *filter(None, [chance]), entry["n"]):
        number.number()
    return Measured(
        **values, seed=seed, n=entry["n"], value=entry["value"], chance=chance, interval=interval, about=about
    )


def _series(measured: list[Measured]) -> tuple[Series, ...]:
    """The records by figure; those of several seeds together."""
    by_key: dict[tuple[str, ...], dict[int | None, Measured]] = {}
    for record in measured:
        of_seeds = by_key.setdefault(record.key, {})
        there = of_seeds.setdefault(record.seed, record)
        if there.value.value != record.value.value:
            raise ValueError(
                f"{there.value.source} and {record.value.source} give one figure two values, {there.value.value:g} and "
                f"{record.value.value:g}. Remove the result file that is not of this model."
            )
    for of_seeds in by_key.values():
        if len(of_seeds) > 1 and None in of_seeds:
            raise ValueError(
                f"{of_seeds[None].value.source} names no seed, where others of the same figure do. Measure it with "
                "--seed, or remove the file."
            )
    return tuple(
        Series(tuple(of_seeds[seed] for seed in sorted(of_seeds, key=lambda s: -1 if s is None else s)))
        for of_seeds in by_key.values()
    )

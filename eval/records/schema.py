"""Result files: what was measured, and on what, in the one form that tables, plots, pages and the model card read.

    records = read_records(Path("results/retrieval_pt.json"))
    records[0].value, records[0].interval_95

A `Record` checks itself, so that a figure out of its range is neither written nor read.
"""

import json
import re
import reprlib
import sys
from collections import namedtuple
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from capivara_common.environment import package_versions
from capivara_common.files import write_json
from capivara_common.privacy import hide_paths, short_name

SCHEMA_VERSION = 2  # of result files and of run.json
MAX_JSON_BYTES = 64 * 2**20  # a 1000 x 1000 confusion matrix takes 12 MB, indented
ROLE_NAMES = {"baseline": "Baseline", "capivara": "CAPIVARA"}  # role -> as tables show it
TASKS = ("retrieval", "classification", "linear_probe")
DIRECTIONS = ("text_to_image", "image_to_text")
RANK_METRICS = ("median_rank",)  # ranks from 1, the lower the better; every other metric is a share
GAIN_METRIC = "mean_recall_gain"  # model minus baseline, from -1 to 1
METRIC_TASKS = {  # metric -> the task that reports it; beside `recall@k` of any k
    **dict.fromkeys(("mean_recall", "median_rank", GAIN_METRIC), "retrieval"),
    **dict.fromkeys(("accuracy", "mean_per_class_accuracy", "top_5_accuracy", "11point_mAP", "roc_auc"), "classes"),
}
LARGEST_RECALL_CUTOFF = 10  # of the mean recall
ROUNDING_TOLERANCE = 1e-9  # that a computed share may lie outside of its range


# What two figures must share to be compared: fields of `Record`.
Condition = namedtuple("Condition", "task dataset split language protocol direction metric dim", defaults=(None,))


@dataclass(frozen=True)
class Record:
    """One measured figure; ValueError, beginning with the field, for another type, or a value out of range."""

    task: str  # "retrieval", "classification" or "linear_probe"
    dataset: str
    split: str
    language: str  # code of the captions' or prompts' language, such as "pt"
    protocol: str  # what was compared with what; figures of different protocols are not comparable
    direction: str  # "text_to_image" or "image_to_text" of retrieval, else ""
    metric: str  # such as "recall@1", "mean_recall", "accuracy", or "mean_recall_gain" (model minus baseline)
    value: float  # a share from 0 to 1; of "median_rank" a rank from 1; of a gain from -1 to 1
    n: int  # queries or images averaged over
    model: str  # role, "baseline" or "capivara"
    model_folder: str  # relative to the run's
    seed: int | None = None  # of the training run, None for a model that was not trained in it
    chance: float | None = None  # expected value of random scores; None where it has no meaning
    interval_95: tuple[float, float] | None = None  # low and high end of a 95 % interval, for a gain
    dim: int | None = None  # first numbers of the embeddings that were compared, `protocol` says it too; None of all

    def __post_init__(self) -> None:
        if isinstance(self.interval_95, list):
            object.__setattr__(self, "interval_95", tuple(self.interval_95))
        for name in (*Condition._fields[:-1], "model", "model_folder"):
            self._check(name, isinstance(getattr(self, name), str), "text")
        for name in ("value", "n", "chance"):
            value = getattr(self, name)
            self._check(name, is_number(value) or (name == "chance" and value is None), "a finite number")
        for name in ("seed", "dim"):
            self._check(name, type(getattr(self, name)) in (int, type(None)), "a whole number or null")
        ends, is_retrieval = self.interval_95, self.task == "retrieval"
        pair = isinstance(ends, tuple) and len(ends) == 2 and all(map(is_number, ends)) and ends[0] <= ends[1]
        self._check("interval_95", ends is None or pair, "two numbers, the low end first")
        self._check("task", self.task in TASKS, f"one of {', '.join(TASKS)}")
        self._check("model", self.model in ROLE_NAMES, f"one of {', '.join(ROLE_NAMES)}")
        rule = f"one of {', '.join(DIRECTIONS)}" if is_retrieval else "empty"
        self._check("direction", self.direction in (DIRECTIONS if is_retrieval else ("",)), f"{rule} for {self.task}")
        recall = re.fullmatch(r"recall@([1-9]\d{0,8})", self.metric)
        kind = "retrieval" if recall else METRIC_TASKS.get(self.metric)
        self._check("metric", kind is not None and (kind == "retrieval") == is_retrieval, f"one of {self.task}")
        low, of = -1 if self.is_gain else 0, f" for {self.metric}"
        is_share = low - ROUNDING_TOLERANCE <= self.value <= 1 + ROUNDING_TOLERANCE
        rule = "a rank from 1" if self.is_rank else f"a share from {low} to 1"
        self._check("value", self.value >= 1 if self.is_rank else is_share, rule, of)
        self._check(
            "chance",
            self.chance is None or -ROUNDING_TOLERANCE <= self.chance <= 1 + ROUNDING_TOLERANCE,
            "a share from 0 to 1",
        )
        for name in ("n", "dim"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        k = int(recall[1]) if recall else LARGEST_RECALL_CUTOFF if self.metric.startswith("mean_recall") else 0
        # Among so few every query would be a hit.
        self._check("n", not k or self.n > k, f"above {k} for {self.metric}", ": among so few it has no meaning")

    @property
    def condition(self) -> Condition:
        """What another figure must share to be compared with this one."""
        return Condition(*(getattr(self, name) for name in Condition._fields))

    @property
    def is_rank(self) -> bool:
        """Whether the value is a rank from 1, the lower the better, and no share."""
        return self.metric in RANK_METRICS

    @property
    def is_gain(self) -> bool:
        """Whether the value is a difference of two models."""
        return self.metric == GAIN_METRIC

    def _check(self, name: str, is_valid: bool, rule: str, suffix: str = "") -> None:
        if not is_valid:
            raise ValueError(f"{name} must be {rule}, got {reprlib.repr(getattr(self, name))}{suffix}")


@dataclass(frozen=True)
class ResultFile:
    """A result file that has the right form."""

    name: str  # path of the file within the folder that was read
    records: tuple[Record, ...]  # its figures, at least one
    content: dict[str, Any]  # the whole JSON object, as `write_records` has it


def write_records(
    path: Path, records: list[Record], *, dataset: str, fingerprint: str | None, model: str, name: str | None = None,
    skipped: dict[Any, str] | None = None, **metadata: Any,
) -> None:  # fmt: skip
    """Write a result file in one piece: what its figures depend on, the records, and further `parts` of the file.

    `dataset` is a folder, pattern of files, or Hub id of the images, `name` what the records call it where that is
    another, `skipped` says of a row why it is not in the figures. Parts are `device`, in words; `precision`, "float32"
    or the type of autocast; `seconds` of the measurement alone.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module, skipped = spec.name if spec else Path(sys.argv[0]).stem, skipped or {}
    listed = [asdict(record) | {"model_folder": hide_paths(record.model_folder)} for record in records]
    content = {
        "schema_version": SCHEMA_VERSION,
        "dataset": short_name(name or dataset),
        "dataset_revision": find_hub_revision(dataset, "dataset"),
        "dataset_fingerprint": fingerprint,
        "model": hide_paths(model),
        "model_revision": find_hub_revision(model, "model"),
        "versions": package_versions(),
        "seconds": None,
        "skipped_rows": len(skipped),
        "command": " ".join(["python", "-m", module, *hide_paths(sys.argv[1:])]),
        "records": listed,
        "skipped": skipped,
    }
    write_json(path, content | metadata)


def read_records(path: Path) -> list[Record]:
    """The records of a result file; ValueError names file, place, value and rule where it has another form."""
    try:
        content, _ = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from error
    try:
        return list(parse_result(content, str(path)).records)
    except ValueError as error:
        raise ValueError(f"{path}#/{error}.") from error


def parse_result(content: dict[str, Any], name: str) -> ResultFile:
    """A result file out of its JSON object; a ValueError begins with the place in it, such as `records/3/value`."""
    version, listed, records = content.get("schema_version"), content.get("records"), []
    if version != SCHEMA_VERSION:
        found = f"{reprlib.repr(version)}: measure it again with this package"
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {found}")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"records must be a list of at least one figure, got {reprlib.repr(listed)}")
    for number, entry in enumerate(listed):
        if not isinstance(entry, dict):
            raise ValueError(f"records/{number} must be an object, got {reprlib.repr(entry)}")
        if missing := [field.name for field in fields(Record) if field.default is MISSING and field.name not in entry]:
            raise ValueError(f"records/{number} has no {missing[0]!r}")
        try:
            records.append(Record(**{field.name: entry[field.name] for field in fields(Record) if field.name in entry}))
        except ValueError as error:
            raise ValueError(f"records/{number}/{error}") from None
    return ResultFile(name, tuple(records), content)


def read_json_object(path: Path) -> tuple[dict[str, Any], bytes]:
    """A JSON object out of a file that may be anybody's, and the file's bytes, for a digest or a search in them.

    ValueError, to follow the file's name, where it is no regular file, too large or no JSON object in UTF-8, a number
    is NaN or infinite, or a key stands twice.
    """
    if not path.is_file():  # to read a pipe would wait for ever
        raise ValueError("is no regular file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"is larger than {MAX_JSON_BYTES // 2**20} MiB")
    data = path.read_bytes()
    try:
        content = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_check_distinct_keys
        )
    except RecursionError as error:
        raise ValueError("is no JSON that can be read: it nests too deep") from error
    except ValueError as error:  # also text that is not UTF-8
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("must hold a JSON object")
    return content, data


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that can be computed with: no truth value, NaN or infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def find_hub_revision(name: str, repo_type: str) -> str | None:
    """Commit of a model or data set that was loaded from the Hub, as its cache tells; None for a local one."""
    if Path(name).exists() or name.count("/") != 1:
        return None
    owner, repository = name.split("/")
    reference = Path(HF_HUB_CACHE) / f"{repo_type}s--{owner}--{repository}" / "refs" / "main"
    return reference.read_text(encoding="ascii").strip() if reference.is_file() else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _check_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return content

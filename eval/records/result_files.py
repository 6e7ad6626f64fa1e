"""Read, validate and write result files. Tables, plots, HTML pages and model cards are made from these JSON files.

    records = read_records(Path("results/retrieval_pt.json"))
    records[0].value, records[0].interval_95

A `Record` is one measured value with the conditions of its measurement. It validates itself, so a value that is out of
range is neither written nor read.
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
from capivara_common.privacy import get_publishable_model_or_dataset_name, shorten_absolute_paths

SCHEMA_VERSION = 2  # version of the format of result files and of run.json
# Size limit of JSON files that are read. The largest content of a result file, an indented confusion matrix of 1000
# classes, takes 12 MB.
MAX_JSON_BYTES = 64 * 2**20
ROLE_NAMES = {"baseline": "Baseline", "capivara": "CAPIVARA"}  # {role of a model: its name in tables}
TASKS = ("retrieval", "classification", "linear_probe")
DIRECTIONS = ("text_to_image", "image_to_text")
# Metrics whose values are ranks: they start at 1, and lower is better. Gains are from -1 to 1, all other metrics from 0
# to 1.
RANK_METRICS = ("median_rank",)
GAIN_METRIC = "mean_recall_gain"  # mean recall of the model minus that of the baseline, from -1 to 1
# {metric: task that it belongs to}. The task is "retrieval", or "classes" for both classification and linear probe.
# `recall@k` is not listed, because k can be any number.
METRIC_TASKS = {
    **dict.fromkeys(("mean_recall", "median_rank", GAIN_METRIC), "retrieval"),
    **dict.fromkeys(("accuracy", "mean_per_class_accuracy", "top_5_accuracy", "11point_mAP", "roc_auc"), "classes"),
}
# The mean recall is the mean of recall@1, recall@5 and recall@10. This is the largest k in it.
LARGEST_RECALL_CUTOFF = 10
# Metrics are valid from 0 to 1, and gains (differences of two metrics) from -1 to 1. A rounding error may move a value
# out of this range by this much.
ROUNDING_TOLERANCE = 1e-9

# Two records are comparable only if all of these fields of `Record` are equal.
Condition = namedtuple("Condition", "task dataset split language protocol direction metric dim", defaults=(None,))


@dataclass(frozen=True)
class Record:
    """One measured value, with the conditions of the measurement.

    Raises:
        ValueError: If a field has the wrong type or is out of range. The message starts with the name of the field.
    """

    # What was measured: "retrieval" (between images and captions), "classification" (zero-shot, with prompts) or
    # "linear_probe" (a linear classifier trained on image embeddings).
    task: str
    dataset: str
    split: str
    language: str  # language code of the captions or prompts, such as "pt"; "" for the linear probe
    protocol: str  # how the value was measured; records of different protocols are not comparable
    # For retrieval, what is searched with what: "text_to_image" (images with a text) or "image_to_text" (texts with an
    # image). "" for the other tasks.
    direction: str
    metric: str  # such as "recall@1", "mean_recall", "accuracy", or "mean_recall_gain" (model minus baseline)
    value: float  # from 0 to 1, such as a recall; for "median_rank" a rank from 1; for a gain a difference from -1 to 1
    n: int  # number of queries (retrieval) or images (other tasks) from which the value was computed
    model: str  # role of the model: "baseline" (before training) or "capivara" (after training)
    model_folder: str  # folder or Hub id of the model; "." in the results that a training run writes about itself
    seed: int | None = None  # seed of the training run; None if unknown, or if the model was not fine-tuned
    chance: float | None = None  # expected value for random scores; None if it is not defined
    interval_95: tuple[float, float] | None = None  # for a gain: low and high end of the 95 % confidence interval
    dim: int | None = None  # dimensions of truncated embeddings (`protocol` names them, too); None: not truncated

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
        is_pair = isinstance(ends, tuple) and len(ends) == 2 and all(map(is_number, ends)) and ends[0] <= ends[1]
        self._check("interval_95", ends is None or is_pair, "two numbers, the lower one first")
        self._check("task", self.task in TASKS, f"one of {', '.join(TASKS)}")
        self._check("model", self.model in ROLE_NAMES, f"one of {', '.join(ROLE_NAMES)}")
        rule = f"one of {', '.join(DIRECTIONS)}" if is_retrieval else "empty"
        self._check("direction", self.direction in (DIRECTIONS if is_retrieval else ("",)), f"{rule} for {self.task}")
        recall = re.fullmatch(r"recall@([1-9]\d{0,8})", self.metric)
        kind = "retrieval" if recall else METRIC_TASKS.get(self.metric)
        rule = f"a metric of {self.task}"
        self._check("metric", kind is not None and (kind == "retrieval") == is_retrieval, rule)
        low = -1 if self.is_gain else 0
        is_share = low - ROUNDING_TOLERANCE <= self.value <= 1 + ROUNDING_TOLERANCE
        rule = "a rank of at least 1" if self.is_rank else f"a share from {low} to 1"
        self._check("value", self.value >= 1 if self.is_rank else is_share, rule, f" for {self.metric}")
        is_share = self.chance is None or -ROUNDING_TOLERANCE <= self.chance <= 1 + ROUNDING_TOLERANCE
        self._check("chance", is_share, "a share from 0 to 1")
        for name in ("n", "dim"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        k = int(recall[1]) if recall else 0
        if self.metric.startswith("mean_recall"):
            k = LARGEST_RECALL_CUTOFF
        # With at most k queries, recall@k is always 1: the first k results contain the item of each query.
        self._check("n", not k or self.n > k, f"greater than {k} for {self.metric}")

    @property
    def condition(self) -> Condition:
        """The conditions of the measurement, as a named tuple of task, dataset, language, metric and so on.

        Two records are comparable only if their conditions are equal.
        """
        return Condition(*(getattr(self, name) for name in Condition._fields))

    @property
    def is_rank(self) -> bool:
        """Whether the value is a rank (from 1, lower is better) instead of a number from 0 to 1."""
        return self.metric in RANK_METRICS

    @property
    def is_gain(self) -> bool:
        """Whether the value is a gain: the mean recall of a model minus the mean recall of its baseline."""
        return self.metric == GAIN_METRIC

    def _check(self, name: str, is_valid: bool, rule: str, suffix: str = "") -> None:
        """Raise ValueError unless a field is valid.

        Args:
            name: Name of the field.
            is_valid: Whether the value of the field is valid.
            rule: What the value must be, such as "at least 1". It is part of the message, after "must be".
            suffix: End of the message.
        """
        if not is_valid:
            raise ValueError(f"{name} must be {rule}, got {reprlib.repr(getattr(self, name))}{suffix}")


@dataclass(frozen=True)
class ResultFile:
    """A result file that was read and found valid: its records (measured values) and its whole JSON content."""

    name: str  # path of the file; in a report, relative to the folder of all results
    records: tuple[Record, ...]  # the measured values, at least one
    content: dict[str, Any]  # the whole JSON object, with the keys that `write_records_to_result_file` writes


def write_records_to_result_file(
    path: Path, records: list[Record], *, dataset: str, fingerprint: str | None, model: str, name: str | None = None,
    skipped: dict[Any, str] | None = None, **metadata: Any,
) -> None:  # fmt: skip
    """Write measured values to a result file, a JSON file that also says how they were measured.

    The write is atomic. Command line, package versions and Hub revisions are added.

    Args:
        path: JSON file to write.
        records: The measured values.
        dataset: Folder, file pattern or Hub id of the images.
        fingerprint: Digest of the measured data, or None.
        model: Folder or Hub id of the model.
        name: Name of the dataset in the records, if it differs from `dataset`.
        skipped: `{row number: reason}` for rows that were not measured, for example unreadable images.
        metadata: Further keys of the file, such as `device`, `precision` and `seconds`.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module, skipped = spec.name if spec else Path(sys.argv[0]).stem, skipped or {}
    listed = [asdict(record) | {"model_folder": shorten_absolute_paths(record.model_folder)} for record in records]
    content = {
        "schema_version": SCHEMA_VERSION,
        "dataset": get_publishable_model_or_dataset_name(name or dataset),
        "dataset_revision": _find_cached_hub_revision(dataset, "dataset"),
        "dataset_fingerprint": fingerprint,
        "model": shorten_absolute_paths(model),
        "model_revision": _find_cached_hub_revision(model, "model"),
        "versions": package_versions(),
        "seconds": None,  # duration of the measurement
        "skipped_rows": len(skipped),
        "command": " ".join(["python", "-m", module, *shorten_absolute_paths(sys.argv[1:])]),
        "records": listed,
        "skipped": skipped,
    }
    write_json(path, content | metadata)


def read_records(path: Path) -> list[Record]:
    """Read the measured values of a result file, and check that they are valid.

    Raises:
        ValueError: If the content of the file is invalid. The message names the file, the JSON path of the wrong value,
            the value and the rule that it breaks.
    """
    try:
        content, _ = read_untrusted_json_object_and_bytes(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from error
    try:
        return list(parse_result(content, str(path)).records)
    except ValueError as error:
        raise ValueError(f"{path}#/{error}.") from error


def parse_result(content: dict[str, Any], name: str) -> ResultFile:
    """Validate the JSON object of a result file, and convert it to a `ResultFile`.

    Args:
        content: The JSON object.
        name: Path of the file. It becomes `ResultFile.name`.

    Raises:
        ValueError: If the object is invalid. The message starts with the JSON path of the wrong value, such as
            `records/3/value`.
    """
    version, listed, records = content.get("schema_version"), content.get("records"), []
    if version != SCHEMA_VERSION:
        hint = "Measure again with this version of the package"
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {reprlib.repr(version)}. {hint}")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"records must be a list with at least one record, got {reprlib.repr(listed)}")
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


def read_untrusted_json_object_and_bytes(path: Path) -> tuple[dict[str, Any], bytes]:
    """Read a JSON object from a file that another person may have written, and refuse unsafe or ambiguous content.

    Returns:
        A tuple (object, bytes): the JSON object as a dict, and the content of the file, for example to compute a
        digest.

    Raises:
        ValueError: If the file is not a regular file or too large (`MAX_JSON_BYTES`), or holds no valid JSON object.
            Duplicate keys, NaN and infinity are invalid. The message begins with a verb, as in "is not valid JSON", so
            that a caller can put the file name before it.
    """
    # Only regular files are read, because reading a named pipe could wait forever for data.
    if not path.is_file():
        raise ValueError("is not a regular file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"is larger than {MAX_JSON_BYTES // 2**20} MiB")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_build_dict_refusing_duplicates)
    except RecursionError as error:
        raise ValueError("is not readable JSON: it is nested too deeply") from error
    except ValueError as error:
        # This also catches JSONDecodeError and UnicodeDecodeError, which are subclasses of ValueError.
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("must contain a JSON object")
    return content, data


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number, not a bool, whose absolute value is below 1e18.

    The limit excludes NaN, infinity and integers that are too large for float arithmetic.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def _find_cached_hub_revision(name: str, repo_type: str) -> str | None:
    """Look up in the local Hub cache which commit of a model or dataset was downloaded.

    Args:
        name: Hub id, or a path.
        repo_type: "model" or "dataset".

    Returns:
        The commit hash. None for a local path, or if the cache does not have the repository.
    """
    if Path(name).exists() or name.count("/") != 1:
        return None
    owner, repository = name.split("/")
    reference = Path(HF_HUB_CACHE) / f"{repo_type}s--{owner}--{repository}" / "refs" / "main"
    return reference.read_text(encoding="ascii").strip() if reference.is_file() else None


def _refuse_constant(name: str) -> None:
    """Raise ValueError. `json.loads` calls this function for NaN and Infinity, which JSON does not allow."""
    raise ValueError(f"it contains {name}")


def _build_dict_refusing_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from the (key, value) pairs of a JSON object. Raises ValueError if a key occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return content

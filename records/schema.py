"""Result files: what was measured, and on what, in the one form that tables, plots and the model card read."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from common.environment import package_versions
from common.files import read_json, write_json
from common.privacy import hide_paths, short_name

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Record:
    """One measured figure.

    Attributes:
        task: "retrieval", "classification" or "linear_probe".
        dataset: name of the data set.
        split: "test" and so on.
        language: code of the captions' or prompts' language, such as "pt".
        protocol: what was compared with what; figures of different protocols are not comparable.
        direction: "text_to_image" or "image_to_text" of retrieval, else "".
        metric: such as "recall@1", "mean_recall", "accuracy", or "mean_recall_gain" (model minus baseline).
        value: a share from 0 to 1; of "median_rank" a rank from 1.
        n: queries or images averaged over.
        model: "baseline" or "capivara".
        model_folder: the model's folder, relative to the run's.
        seed: of the training run, None for a model that was not trained in it.
        chance: expected value of random scores; None where it has no meaning.
        interval_95: low and high end of a 95 % interval, for a gain.
    """

    task: str
    dataset: str
    split: str
    language: str
    protocol: str
    direction: str
    metric: str
    value: float
    n: int
    model: str
    model_folder: str
    seed: int | None = None
    chance: float | None = None
    interval_95: tuple[float, float] | None = None


def header(
    *,
    dataset: str,
    dataset_fingerprint: str | None,
    model: str,
    device: str,
    precision: str,
    seconds: float | None = None,
    dataset_revision: str | None = None,
    model_revision: str | None = None,
    skipped: int = 0,
) -> dict[str, Any]:
    """What the figures of a file depend on.

    Args:
        dataset: folder, pattern of files, or Hub id of the images; `short_name` of it is kept, as records of retrieval
            have it. Those of classification name the benchmark.
        dataset_fingerprint: digest of its images and captions.
        model: folder, relative where it lies under the current one, or Hub id.
        device: in words.
        precision: "float32", or the type of autocast.
        seconds: of the measurement; None where other work is in them.
        dataset_revision: commit on the Hub; None for a local one.
        model_revision: commit on the Hub; None for a local one.
        skipped: rows that could not be used and are not in the figures.
    """
    command = " ".join(["python", "-m", _module_name(), *hide_paths(sys.argv[1:])])
    return {
        "dataset": short_name(dataset),
        "dataset_revision": dataset_revision,
        "dataset_fingerprint": dataset_fingerprint,
        "model": hide_paths(model),
        "model_revision": model_revision,
        "versions": package_versions(),
        "device": device,
        "precision": precision,
        "seconds": seconds,
        "skipped_rows": skipped,
        "command": command,
    }


def write_records(path: Path, records: list[Record], facts: dict[str, Any], **parts: Any) -> None:
    """Write a result file in one piece: the header `facts`, the records, and further `parts` such as a matrix."""
    listed = [asdict(record) | {"model_folder": hide_paths(record.model_folder)} for record in records]
    content = {"schema_version": SCHEMA_VERSION, **facts, "records": listed, **parts}
    write_json(path, content)


def read_records(path: Path) -> list[Record]:
    """The records of a result file.

    Raises:
        ValueError: the file has another form.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} is no result file of schema version {SCHEMA_VERSION}.")
    names = {field.name for field in fields(Record)}
    return [Record(**{key: value for key, value in record.items() if key in names}) for record in content["records"]]


def digest_of(value: Any) -> str:
    """Hex digest of a JSON value."""
    return hashlib.blake2b(json.dumps(value, ensure_ascii=True).encode(), digest_size=16).hexdigest()


def hub_revision(name: str, repo_type: str) -> str | None:
    """Commit of a model or data set that was loaded from the Hub, as its cache tells; None for a local one."""
    if Path(name).exists() or name.count("/") != 1:
        return None
    owner, repository = name.split("/")
    reference = Path(HF_HUB_CACHE) / f"{repo_type}s--{owner}--{repository}" / "refs" / "main"
    return reference.read_text(encoding="ascii").strip() if reference.is_file() else None


def one_line(error: Exception) -> str:
    """What an error says, on one line and without the folders of this machine."""
    return " ".join(hide_paths(str(error)).split())


def _module_name() -> str:
    module = sys.modules.get("__main__")
    spec = getattr(module, "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem

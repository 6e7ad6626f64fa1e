"""Result records: what was measured, in the one form that tables, plots and the model card read."""

from dataclasses import asdict, dataclass
from pathlib import Path

from artifacts import write_json


@dataclass(frozen=True)
class Record:
    """One measured figure.

    Attributes:
        task: "retrieval".
        dataset: name of the data set.
        split: "test" and so on.
        language: code of the captions' language, such as "pt".
        protocol: what was compared with what; figures of different protocols are not comparable.
        direction: "text_to_image" or "image_to_text".
        metric: "recall@1", "recall@5", "recall@10", "mean_recall", or "mean_recall_gain" (model minus baseline).
        value: a share from 0 to 1.
        n: queries averaged over.
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


def write_records(path: Path, records: list[Record]) -> None:
    """Write records as a JSON list, in one piece."""
    write_json(path, [asdict(record) for record in records])

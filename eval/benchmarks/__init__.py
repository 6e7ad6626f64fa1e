"""Benchmarks as data: a JSON file each says where the data come from, how they are measured and what was published.

    flickr = load_benchmarks()["flickr30k-pt"]
    flickr.published_figure("baseline", "text_to_image")  # {"mean": 76.23}, per cent

Published figures are those of CAPIVARA's model card and paper, and of a benchmark's own authors where `protocol_note`
says so, in per cent; what was not published is absent. A Hub id that was not looked up is null: such data are taken
from a local path alone.
"""

import json
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from capivara_common.cli import WrongUse
from capivara_common.files import read_json
from eval.records.schema import DIRECTIONS

FOLDER = Path(__file__).resolve().parent
SUITES = ("paper", "elevater", "beyond", "retrieval", "classification")  # "paper" has all of them
METRICS = {  # of records, with the task that has them; all are shares but the median rank
    **dict.fromkeys(("mean_recall", "recall@1", "recall@5", "recall@10", "median_rank"), "retrieval"),
    **dict.fromkeys(
        ("accuracy", "mean_per_class_accuracy", "top_5_accuracy", "11point_mAP", "roc_auc"), "classification"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is measured on which data; or, of the task "average", a published mean over others."""

    key: str  # name of the file, and of the data with --data
    title: str  # as tables show it
    task: str  # "retrieval", "classification" or "average"
    suite: tuple[str, ...]  # the suites that it belongs to, of `SUITES`
    metric: str  # of `METRICS`, that the published figures are in; "average"
    protocol_note: str  # what a reader of the figures must know
    # "baseline", "capivara" or "capivara_opt" -> `mean` and `std` in per cent, of retrieval by direction
    published: dict[str, dict[str, Any]]
    language: str = "pt"  # that the published figures are of
    # `hub_id` (None where it was not looked up), `local_layout` in words, `url` of where people get it, and `reader` of
    # `eval.layouts` for a layout of its own
    source: dict[str, str | None] = field(default_factory=dict)
    split: str = ""  # that is measured
    protocol: str = ""  # "ours" or "babel" for names and prompts; "captions" for retrieval
    # of the published split, None where unknown; on other numbers figures are not like for like
    test_images: int | None = None
    image_column: str | None = None  # None for the only column of images
    label_column: str | None = None  # None for one of the usual names
    caption_column: str = ""  # of retrieval, a pattern with `{language}`
    caption_positions: str = "all"  # of retrieval, as `eval.retrieval` takes them
    prompts: str | None = None  # of classification, key in `eval/prompts/pt`
    other_languages: tuple[str, ...] = ()  # that are measured, too
    known_languages: tuple[str, ...] = ()  # that may be asked for; those above where empty
    data_of: str | None = None  # key of the benchmark whose local data serve where there are none of this key
    like_for_like: bool = True  # whether the published figures are of the same texts and images
    of: str | None = None  # of an average: the suite whose `count` benchmarks must all have been measured
    count: int = 0

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that are measured where none are asked for."""
        return (self.language, *self.other_languages)

    @property
    def all_languages(self) -> tuple[str, ...]:
        """Codes of the languages that may be asked for."""
        return self.known_languages or self.languages

    @property
    def directions(self) -> tuple[str, ...]:
        """Of retrieval both, else an empty one, as in records."""
        return DIRECTIONS if self.task == "retrieval" else ("",)

    def published_figure(self, model: str, direction: str = "") -> dict[str, float] | None:
        """`mean`, and `std` where it was published, in per cent, of the benchmark's metric and language."""
        figure = self.published.get(model)
        return figure.get(direction) if figure and self.task == "retrieval" else figure


def load_benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by key, in the order of tables: retrieval, ELEVATER, ImageNet, and those beyond the paper.

    Raises:
        ValueError: a file has another form than this module describes.
    """

    def order(benchmark: Benchmark) -> tuple:
        suite = benchmark.suite
        return "beyond" in suite, benchmark.task != "retrieval", "elevater" not in suite, benchmark.title.casefold()

    return {benchmark.key: benchmark for benchmark in sorted(_read_all(averages=False), key=order)}


def load_averages() -> list[Benchmark]:
    """Every published average. Raises as `load_benchmarks`."""
    return _read_all(averages=True)


def _read_all(averages: bool) -> list[Benchmark]:
    found = [read_benchmark(path) for path in sorted(FOLDER.glob("*.json"))]
    return [benchmark for benchmark in found if (benchmark.task == "average") == averages]


def read_benchmark(path: Path) -> Benchmark:
    """The benchmark, or average, of a file. Raises ValueError where it has other keys than the class here."""
    try:
        data = read_json(path)
        return Benchmark(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
    except (json.JSONDecodeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path.name} is no benchmark: {error}.") from error


def must_be_known(what: str, names: list[str], known: list[str]) -> None:
    """Raise WrongUse for the first of `names` that is not `known`; the known ones are listed, nearest first."""
    for name in names:
        if name not in known:
            ranked = sorted(known, key=lambda other: -SequenceMatcher(None, name.casefold(), other.casefold()).ratio())
            raise WrongUse(f"Unknown {what} {name!r}. Known, nearest first: {', '.join(ranked)}.")

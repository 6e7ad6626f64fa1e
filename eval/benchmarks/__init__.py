"""Benchmarks as data: a JSON file each says where the data come from, how they are measured and what was published.

    flickr = load_benchmarks()["flickr30k-pt"]
    flickr.get_published_figure("baseline", "text_to_image")  # {"mean": 76.23}, per cent

Published figures are those of CAPIVARA's model card and paper, and of others where `protocol_note` says so, in per
cent; what was not published is absent. A Hub id that was not looked up is null: such data are taken from a local path
alone.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from capivara_common.files import read_json
from eval.records.schema import DIRECTIONS

BENCHMARKS_FOLDER = Path(__file__).resolve().parent
CAPIVARA_CLASSES = ("CapivaraModel", "CustomTextCLIP")  # CAPIVARA's, and open_clip's of the same towers
SUITES = ("paper", "elevater", "beyond", "retrieval", "classification")  # "paper" has all of them


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is measured on which data; or, of the task "average", a published mean over others."""

    key: str  # name of the file, and of the data in --data_dir
    title: str  # as tables show it
    task: str  # "retrieval", "classification" or "average"
    suite: tuple[str, ...]  # the suites that it belongs to, of `SUITES`
    metric: str  # of records, that the published figures are in; "average"
    protocol_note: str  # what a reader of the figures must know
    # "baseline", "capivara" or "capivara_opt" -> `mean` and `std` in per cent, of retrieval by direction
    published: dict[str, dict[str, Any]]
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)  # last part of a base's Hub id -> the same of it
    bases_from: str = ""  # address of their source
    language: str = "pt"  # that the published figures are of
    # `hub_id` (None where it was not looked up), `local_layout` in words, and `url` of where people get it
    source: dict[str, str | None] = field(default_factory=dict)
    split: str = ""  # that is measured
    protocol: str = ""  # "ours" or "babel" for names and prompts; "captions" for retrieval
    test_images: int | None = None  # of the published split where known; on other numbers figures are not like for like
    image_column: str | None = None  # None for the only column of images
    label_column: str | None = None  # None for one of the usual names
    caption_column: str = ""  # of retrieval, a pattern with `{language}`
    caption_positions: str = "all"  # of retrieval, as `eval.retrieval` takes them
    prompts: str | None = None  # of classification, key in `eval/prompts/pt`
    other_languages: tuple[str, ...] = ()  # that are measured, too
    known_languages: tuple[str, ...] = ()  # that may be asked for; those above where empty
    data_of: str | None = None  # key of the benchmark whose local data serve where there are none of this key
    like_for_like: bool = True  # whether the published figures are of the same texts and images
    count: int = 0  # of an average: how many benchmarks of the suite of its key must have been measured

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that are measured where none are asked for."""
        return (self.language, *self.other_languages)

    @property
    def available_languages(self) -> tuple[str, ...]:
        """Codes of the languages that may be asked for."""
        return self.known_languages or self.languages

    @property
    def directions(self) -> tuple[str, ...]:
        """Of retrieval both, else an empty one, as in records."""
        return DIRECTIONS if self.task == "retrieval" else ("",)

    def get_published_figure(self, model: str, direction: str = "") -> dict[str, float] | None:
        """`mean`, and `std` where it was published, in per cent, of the benchmark's metric and language."""
        figure = (self.published | self.bases).get(model)
        return figure.get(direction) if figure and self.task == "retrieval" else figure


@cache
def load_benchmarks() -> dict[str, Benchmark]:
    """All but the average, in the order of tables: retrieval, ELEVATER, ImageNet, those beyond the paper."""

    def order(benchmark: Benchmark) -> tuple:
        suite = benchmark.suite
        return "beyond" in suite, benchmark.task != "retrieval", "elevater" not in suite, benchmark.title.casefold()

    found = sorted(map(read_benchmark, BENCHMARKS_FOLDER.glob("*.json")), key=order)
    return {benchmark.key: benchmark for benchmark in found if benchmark.task != "average"}


def find_published_name(name: str, role: str, model_class: str, loss: str) -> str | None:
    """What `get_published_figure` knows a model by: a base's own name, else its role if it is of CAPIVARA's kind."""
    base = Path(name).name.casefold()
    if any(base in benchmark.bases for benchmark in load_benchmarks().values()):
        return base
    return role if (model_class in CAPIVARA_CLASSES and loss == "contrastive") else None


def get_published_base(pair: dict[str, Any]) -> tuple[float, str] | None:
    """What was published of a pair's base, a share, and its source; None where that is not what was measured.

    `pair` is of `eval.records.tables.pair_with_baselines`.
    """
    value, benchmark = pair["baseline"], load_benchmarks().get(pair["dataset"])
    if not value or not benchmark or pair["dim"]:
        return None
    name = Path(str(value.measured[0].file.content.get("model"))).name.casefold()
    measured = pair["language"], pair["metric"], pair["n"]
    same = measured == (benchmark.language, benchmark.metric, benchmark.test_images)
    figure = benchmark.get_published_figure(name, pair["direction"]) if same and name in benchmark.bases else None
    return figure and (figure["mean"] / 100, benchmark.bases_from)


def read_benchmark(path: Path) -> Benchmark:
    """The benchmark, or average, of a file. Raises ValueError where it has other keys than the class here."""
    try:
        data = read_json(path)
        return Benchmark(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path.name} is no benchmark: {error}.") from error


def locate_data(benchmark: Benchmark, folder: Path | None) -> dict[str, Any]:
    """Where the data of a benchmark are: in `folder` under its key, or on the Hub.

    That is `data`, a path or Hub id, whether it is `local`, and the `reason` why there are none, or "".
    """
    for key in filter(None, (benchmark.key, benchmark.data_of)):
        if folder and (folder / key).exists():
            return {"data": str(folder / key), "local": True, "reason": ""}
    identity, url = benchmark.source["hub_id"] or "", benchmark.source["url"]
    way = f"put them into --data_dir as {benchmark.key}{f', from {url}' if url else ''}"
    reason = "" if identity else f"no local data, and no Hub id is known; {way}"
    return {"data": identity, "local": False, "reason": reason}

"""Load benchmarks from the JSON files of this folder.

Each file says where the dataset comes from, how it is measured, and which results were published for it.

    flickr = load_benchmarks()["flickr30k-pt"]
    flickr.get_published_figure("baseline", "text_to_image")  # {"mean": 76.23}: mean of recall@1, 5 and 10 in percent

Published results ("figures") are in percent, from CAPIVARA's model card and paper unless `protocol_note` names another
source. A dataset whose `hub_id` is null is only read from a local folder.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from capivara_common.files import read_json
from eval.records.result_files import DIRECTIONS

BENCHMARKS_FOLDER = Path(__file__).resolve().parent
# Names of the model classes that have CAPIVARA's architecture, to which its published results apply: the class of this
# project, and the class that open_clip uses for the same text and image encoder.
CAPIVARA_CLASSES = ("CapivaraModel", "CustomTextCLIP")
# Names of the suites (sets of benchmarks) that `eval.suite` can run. The suite "paper" includes all benchmarks.
SUITES = ("paper", "elevater", "beyond", "retrieval", "classification")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A dataset, how to measure a model on it, and the results that were published for it.

    If `task` is "average", there is no dataset: the benchmark is the published mean over several other benchmarks.
    """

    key: str  # such as "cifar-10": name of this benchmark's JSON file, and of its folder in --data_dir
    title: str  # name that tables show
    # "retrieval" (between images and captions), "classification" (zero-shot) or "average" (mean over other benchmarks)
    task: str
    suite: tuple[str, ...]  # suites that include the benchmark, from `SUITES`
    metric: str  # metric of the published results, as in `Record.metric`; "average" for a mean over benchmarks
    protocol_note: str  # remark that tables show with the results, for example on their source
    # Published results. The keys are the models "baseline", "capivara" and "capivara_opt". For classification, the
    # value is a dict with `mean` and, if it was published, `std` (standard deviation), both in percent. For retrieval,
    # the value is a dict that maps each direction ("text_to_image", "image_to_text") to such a dict.
    published: dict[str, dict[str, Any]]
    # Published results of other pretrained models, such as SigLIP 2. Key: repository name of the model (the last part
    # of its Hub id) in lowercase. Value: a dict with the same structure as a value of `published`.
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    bases_from: str = ""  # URL of the source of `bases`
    language: str = "pt"  # language code of the published results
    # Source of the data: {"hub_id": Hub id or None, "local_layout": description of the local folder, "url": web page}
    source: dict[str, str | None] = field(default_factory=dict)
    split: str = ""  # split to measure
    # Source of class names and prompts: "ours" (this project's files) or "babel" (Babel-ImageNet's names, with
    # clip-benchmark's templates). For retrieval, which has no prompts, it is "captions".
    protocol: str = ""
    test_images: int | None = None  # size of the published split; None if unknown
    image_column: str | None = None  # name of the column with images; None: the only such column
    # Name of the column with labels. None: the first column with a usual name, such as "label".
    label_column: str | None = None
    # Only for retrieval: name of the column with captions. In a name such as "captions-{language}", the language code
    # is inserted.
    caption_column: str = ""
    # Only for retrieval: which captions of an image count, as in --caption_positions of `eval.retrieval`.
    caption_positions: str = "all"
    prompts: str | None = None  # only for classification: name of the prompt file in `eval/prompts/pt`
    other_languages: tuple[str, ...] = ()  # languages that are measured by default, in addition to `language`
    # Languages that --languages of `eval.suite` accepts. Empty: only the languages that are measured by default.
    known_languages: tuple[str, ...] = ()
    # Key of another benchmark with the same images. Its local folder is used if this benchmark has none.
    data_of: str | None = None
    like_for_like: bool = True  # whether the published results were measured on the same texts and images
    # Only for the task "average": number of benchmarks in the average, which is computed only if all were measured.
    count: int = 0

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages in which the benchmark is measured by default, beginning with `language`."""
        return (self.language, *self.other_languages)

    @property
    def available_languages(self) -> tuple[str, ...]:
        """Codes of all languages in which the benchmark can be measured; --languages of `eval.suite` accepts them."""
        return self.known_languages or self.languages

    @property
    def directions(self) -> tuple[str, ...]:
        """Search directions for which the benchmark has results.

        For retrieval, these are "text_to_image" and "image_to_text". Other tasks have no direction, so the tuple has
        only the empty text "".
        """
        return DIRECTIONS if self.task == "retrieval" else ("",)

    def get_published_figure(self, model: str, direction: str = "") -> dict[str, float] | None:
        """Return the result that was published for a model on this benchmark, in the benchmark's metric and language.

        Args:
            model: "baseline", "capivara", "capivara_opt", or a key of `bases` (the name of another pretrained model).
            direction: "text_to_image" or "image_to_text" for retrieval; ignored for classification.

        Returns:
            A dict with "mean" and, if it was published, "std" (standard deviation), both in percent. None if no result
            was published.
        """
        figure = (self.published | self.bases).get(model)
        return figure.get(direction) if figure and self.task == "retrieval" else figure

    def find_data(self, folder: Path | None) -> dict[str, Any]:
        """Find the data of the benchmark: first in a local folder, then on the Hub.

        Args:
            folder: Folder with one entry per benchmark key (--data_dir), or None.

        Returns:
            A dict with three keys:

            - "data": path or Hub id, or "".
            - "local": True if "data" is a path.
            - "reason": why no data were found, or "".
        """
        for key in filter(None, (self.key, self.data_of)):
            if folder and (folder / key).exists():
                return {"data": str(folder / key), "local": True, "reason": ""}
        identity, url = self.source["hub_id"] or "", self.source["url"]
        source = f" (download: {url})" if url else ""
        hint = f"there are no local data, and no Hub id is known. Put the data into --data_dir/{self.key}{source}"
        return {"data": identity, "local": False, "reason": "" if identity else hint}


@cache
def load_benchmarks() -> dict[str, Benchmark]:
    """Read the descriptions of all benchmarks, in the order in which tables show them.

    The benchmarks of CAPIVARA's paper come first: retrieval, then the 20 classification datasets of ELEVATER, then
    ImageNet. All other benchmarks follow.

    Returns:
        A dict `{key of the benchmark: benchmark}`. The published mean over the ELEVATER datasets (`elevater.json`) is
        not included.
    """

    def table_order(benchmark: Benchmark) -> tuple:
        suite = benchmark.suite
        return "beyond" in suite, benchmark.task != "retrieval", "elevater" not in suite, benchmark.title.casefold()

    benchmarks = sorted(map(read_benchmark, BENCHMARKS_FOLDER.glob("*.json")), key=table_order)
    return {benchmark.key: benchmark for benchmark in benchmarks if benchmark.task != "average"}


def find_published_name(name: str, role: str, model_class: str, loss: str) -> str | None:
    """Find the name under which results of a model were published, to compare them with measured results.

    Args:
        name: Folder or Hub id of the model.
        role: Role of the model in tables: "baseline", or "capivara" for a model that is compared with the baseline.
        model_class: Class of the model, for example "CapivaraModel".
        loss: "contrastive" or "sigmoid".

    Returns:
        A name for `Benchmark.get_published_figure`, or None. For a base model in `Benchmark.bases`, it is the last part
        of `name` in lowercase, such as "siglip2-base". For any other model with CAPIVARA's architecture and a
        contrastive loss, it is `role`.
    """
    base = Path(name).name.casefold()
    if any(base in benchmark.bases for benchmark in load_benchmarks().values()):
        return base
    return role if (model_class in CAPIVARA_CLASSES and loss == "contrastive") else None


def get_published_baseline_result(pair: dict[str, Any]) -> tuple[float, str] | None:
    """Return the result that was published for a baseline model, to show it next to the measured one.

    Args:
        pair: A measured baseline and the model that is compared with it, from
            `eval.records.tables.pair_with_baselines`.

    Returns:
        A tuple (value, URL): the published value, from 0 to 1, and its source. None if no result was published for this
        model in the same language, metric, number of images and embedding width.
    """
    value, benchmark = pair["baseline"], load_benchmarks().get(pair["dataset"])
    if not value or not benchmark or pair["dim"]:
        return None
    name = Path(str(value.measured[0].file.content.get("model"))).name.casefold()
    measured = pair["language"], pair["metric"], pair["n"]
    if name not in benchmark.bases or measured != (benchmark.language, benchmark.metric, benchmark.test_images):
        return None
    figure = benchmark.get_published_figure(name, pair["direction"])
    return figure and (figure["mean"] / 100, benchmark.bases_from)


def read_benchmark(path: Path) -> Benchmark:
    """Read the description of one benchmark from its JSON file.

    Args:
        path: JSON file in this folder, with the fields of `Benchmark`. Most files describe a dataset; `elevater.json`
            describes the published mean over several datasets.

    Raises:
        ValueError: If the file is not JSON, lacks a required field of `Benchmark`, or has an unknown field.
    """
    try:
        data = read_json(path)
        return Benchmark(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path.name} is not a valid benchmark file: {error}.") from error

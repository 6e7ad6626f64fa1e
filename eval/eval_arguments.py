"""Arguments of the evaluation's commands: light, so that `--help` answers before torch is imported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from capivara_common.cli import at_least, flag
from capivara_common.image_files import (
    DATASET_HELP,
    FORM_HELP,
    LABEL_COLUMNS,
    CaptionDataArguments,
    ImageFileArguments,
)
from eval.benchmarks import METRICS, SUITES

LAUNCHED = "`accelerate launch --multi_gpu -m eval.retrieval` shares the work out to processes, see docs/cluster.md"
GONE = {  # flags of earlier versions -> what there is instead
    **dict.fromkeys(("executor", "tasks", "workers", "partition", "time", "sbatch", "logging_dir"), LAUNCHED),
    **dict.fromkeys(("cpus_per_task", "mem_per_cpu_gb", "gpus_per_task"), LAUNCHED),
    "gallery": "the best and the worst queries are drawn beside the result, OUTPUT.queries.png",
}


@dataclass(kw_only=True)
class EmbeddingArguments(ImageFileArguments):
    """How images and texts are embedded."""

    batch_size: int = flag(32, "Images that go through at once; twice as many captions.")
    precision: Literal["float32", "bf16"] = flag("float32", "bf16 is faster; its figures differ a little.")
    cache_dir: str = flag(
        "auto", "Folder of embeddings; auto = $CAPIVARA_CACHE or ~/.cache/capivara, off = none are kept."
    )
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")


@dataclass(kw_only=True)
class ModelArguments(EmbeddingArguments):
    """What every measurement of a model takes."""

    role: Literal["baseline", "capivara"] = flag(
        "capivara",
        "What the records call the model. A baseline may also be open_clip:NAME:PRETRAINED, "
        "open_clip:local-dir:FOLDER, or clip:FOLDER_OR_HUB_ID of transformers.",
    )
    split: str = flag("test", "Split that is measured.")
    trust_remote_code: bool = flag(False, "Execute code that a clip: model brings along.")

    def __post_init__(self) -> None:
        self.check_image_files()
        at_least(self, 1, "batch_size")


@dataclass
class RetrievalArguments(CaptionDataArguments, ModelArguments):
    """Flags of `eval.retrieval`."""

    gone = GONE
    model: str = flag(..., "Folder or Hub id of a CAPIVARA model; other kinds with --role baseline.")
    dataset: str = flag(..., DATASET_HELP)
    output: Path = flag(..., "JSON file for the result records.")
    language: str = flag("pt", "Language of the captions.")
    caption_column: str = flag("captions-{language}", "Name of the column of a caption or a list of captions an image.")
    caption_positions: str = flag(
        "all",
        "Which captions of an image: all, first, even, odd or numbers from 0 such as 0,2. In the paper's "
        "files of ten captions, Marian's are even and Google's odd.",
    )
    recall_at: list[int] = flag([1, 5, 10], "The k of recall@k; their mean comes, too.")  # `metrics.RECALL_CUTOFFS`
    dim: int | None = flag(
        None, "Compare the first so many numbers of the embeddings, scaled to unit length; all where none is given."
    )
    seed: int | None = flag(None, "Seed of the training run, for the records.")
    dataset_name: str | None = flag(None, "What records call the data set; its last parts.")

    def __post_init__(self) -> None:
        super().__post_init__()
        caption_positions(self.caption_positions, 10)
        if not self.recall_at or min(self.recall_at) < 1:
            raise ValueError(f"recall_at must be numbers of at least 1, got {self.recall_at}.")
        at_least(self, 1, "dim")


@dataclass
class ImageArguments(ModelArguments):
    """What classification and linear probe have in common."""

    model: str = flag(..., "Folder or Hub id of a CAPIVARA model; other kinds with --role baseline.")
    benchmark: str = flag(
        ...,
        "Key of the data set in eval/prompts/pt, such as cifar-10, or a JSON file of your own: language, classes, "
        "templates with {} for the class (docs/evaluation.md has one).",
    )
    images: str = flag(
        ...,
        "Folder with a sub-folder of images a class, a saved HF data set, a folder of parquet files or "
        "WebDataset tars (with classnames.txt, a name a line), or a Hub id.",
    )
    output: Path = flag(..., "JSON file for the result.")
    form: Literal["auto", "images"] = flag("auto", FORM_HELP)
    image_column: str | None = flag(None, "Name of the image column; the only one of images where none is given.")
    label_column: str | None = flag(None, f"Name of the column of a label or a list of labels; one of {LABEL_COLUMNS}.")


@dataclass
class ClassificationArguments(ImageArguments):
    """Flags of `eval.classification`."""

    protocol: Literal["ours", "authors", "babel"] = flag(
        "ours", "Names and templates: ours, the paper's authors', Babel-ImageNet's."
    )
    language: str | None = flag(None, "Language of the protocol babel; else it is that of the benchmark's prompts.")
    authors_file: str | None = flag(None, "Path or https address, for protocol authors.")
    seed: int | None = flag(None, "Seed of the training run, for the records.")


@dataclass
class LinearProbeArguments(ImageArguments):
    """Flags of `eval.linear_probe`."""

    shots: list[int] = flag([], "Images of each class; all where none is given.")
    draws: int = flag(3, "Draws of the few images, averaged.")
    seed: int = flag(0, "Seed of the draws and of the validation part.")
    train_split: str = flag("train", "Split that is fitted to.")
    validation_split: str | None = flag(None, "Split that the penalty is chosen on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(shots < 1 for shots in self.shots) or self.draws < 1:
            raise ValueError(f"shots and draws must be at least 1, got {self.shots} and {self.draws}.")


@dataclass
class SuiteArguments(EmbeddingArguments):
    """Flags of `eval.suite`."""

    gone = {"gallery": "`python -m eval.retrieval` draws the best and the worst queries beside its result"}
    suite: str = flag("paper", f"Which benchmarks: {', '.join(SUITES)}.", positional=True, nargs="?")
    model: str | None = flag(None, "Folder or Hub id of a CAPIVARA model; the first run.")
    runs: list[str] = flag([], "Models of one recipe and several seeds, or the folder of them: mean ± deviation.")
    baseline: str | None = flag(
        None, "CAPIVARA model, open_clip:NAME:PRETRAINED, open_clip:local-dir:FOLDER or clip:FOLDER."
    )
    output: Path = flag(Path("results/suite"), "Folder of result files, suite.json and table.md.")
    data: list[str] = flag([], "Local data, any number of KEY=PATH.")
    data_dir: Path | None = flag(None, "Folder with local data, each under its key.")
    only: list[str] = flag([], "Keys of the benchmarks to measure, of any suite.")
    languages: list[str] = flag([], "Codes, for benchmarks that have several; --list shows them.")
    metrics: list[str] = flag([], f"Further rows of the table: {', '.join(METRICS)}.")
    protocol: Literal["ours", "authors"] = flag(
        "ours", "Names and prompts: this project's, or those of the published figures."
    )
    authors_file: str | None = flag(None, "Path or https address, for protocol authors.")
    published: Literal["capivara", "capivara_opt"] = flag(
        "capivara", "Published model to compare with: fine-tuned, or with LoRA (Opt.)."
    )
    offline: bool = flag(False, "Take local data alone.")
    list_benchmarks: bool = flag(False, "Show the suite's benchmarks and where their data are.", aliases=["--list"])


@dataclass
class ReportArguments:
    """Arguments of `eval.report`."""

    results: Path = field(metadata={"positional": True, "help": "Folder of result files, those of folders in it too."})
    output: Path = field(metadata={"help": "Folder of the report: index.html and PNGs. Must be missing or empty."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the output folder."})


def caption_positions(text: str, captions: int) -> Sequence[int]:
    """Which of an image's captions are meant."""
    named = {"all": range(captions), "first": range(1), "even": range(0, captions, 2), "odd": range(1, captions, 2)}
    if text in named:
        return named[text]
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"caption_positions must be {', '.join(named)} or numbers from 0 such as 0,2; got {text!r}.")
    return [int(position) for position in text.split(",")]

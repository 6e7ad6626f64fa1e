"""Arguments of the evaluation's commands: light, so that `--help` answers before torch is imported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from caption_data.image_files import FORM_HELP, ImageFileArguments
from eval.benchmarks import METRICS, SUITES

LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")  # where none is named; cls is WebDataset's


@dataclass
class RetrievalArguments(ImageFileArguments):
    model: str = field(metadata={"help": "Folder or Hub id of a CAPIVARA model; other kinds with --role baseline."})
    dataset: str = field(
        metadata={
            "help": "Saved HF data set, folder or pattern of parquet files or WebDataset tars, folder of images with "
            "metadata.jsonl, or Hub id."
        }
    )
    output: Path = field(metadata={"help": "JSON file for the result records."})
    role: Literal["baseline", "capivara"] = field(
        default="capivara",
        metadata={
            "help": "What the records call the model. A baseline may also be open_clip:NAME:PRETRAINED, "
            "open_clip:local-dir:FOLDER, or clip:FOLDER_OR_HUB_ID of transformers."
        },
    )
    split: str = field(default="test", metadata={"help": "Split that is searched."})
    language: str = field(default="pt", metadata={"help": "Language of the captions."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    caption_column: str = field(
        default="captions-{language}", metadata={"help": "Column of a caption or a list of captions an image."}
    )
    caption_positions: str = field(
        default="all",
        metadata={
            "help": "Which captions of an image: all, first, even, odd or numbers from 0 such as 0,2. In the paper's "
            "files of ten captions, Marian's are even and Google's odd."
        },
    )
    recall_at: list[int] = field(
        default_factory=lambda: [1, 5, 10],  # `eval.metrics.RECALL_CUTOFFS`, which this file is too light to import
        metadata={"help": "The k of recall@k; their mean comes, too."},
    )
    batch_size: int = field(default=32, metadata={"help": "Images that go through at once; twice as many captions."})
    precision: Literal["float32", "bf16"] = field(
        default="float32", metadata={"help": "bf16 is faster; its effect on recall is measured on a part and printed."}
    )
    cache_dir: str = field(
        default="auto",
        metadata={"help": "Folder of embeddings; auto = $CAPIVARA_CACHE or ~/.cache/capivara, off = none are kept."},
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; the GPU where there is one."})
    gallery: int = field(default=8, metadata={"help": "Queries for the report, half of them misses."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the training run, for the records."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Execute code that a clip: model brings along."})
    dataset_name: str | None = field(default=None, metadata={"help": "What records call the data set; its last parts."})

    def __post_init__(self) -> None:
        self.check_image_files()
        caption_positions(self.caption_positions, 10)
        if not self.recall_at or min(self.recall_at) < 1:
            raise ValueError(f"recall_at must be numbers of at least 1, got {self.recall_at}.")
        if self.batch_size < 1 or self.gallery < 0:
            raise ValueError(
                f"batch_size must be at least 1, gallery at least 0, got {self.batch_size}, {self.gallery}."
            )


@dataclass
class ImageArguments(ImageFileArguments):
    """What classification and linear probe have in common."""

    model: str = field(metadata={"help": "Folder or Hub id of a CAPIVARA model; other kinds with --role baseline."})
    benchmark: str = field(
        metadata={"help": "Key of the data set in eval/prompts/pt, such as cifar-10, or a JSON file of that form."}
    )
    images: str = field(
        metadata={
            "help": "Folder with a sub-folder of images a class, a saved HF data set, a folder of parquet files or "
            "WebDataset tars (with classnames.txt, a name a line), or a Hub id."
        }
    )
    output: Path = field(metadata={"help": "JSON file for the result."})
    split: str = field(default="test", metadata={"help": "Split that is measured."})
    form: Literal["auto", "images"] = field(default="auto", metadata={"help": FORM_HELP})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; the only one of images."})
    label_column: str | None = field(
        default=None, metadata={"help": f"Column of the label, or of a list of labels; one of {LABEL_COLUMNS}."}
    )
    role: Literal["baseline", "capivara"] = field(
        default="capivara",
        metadata={
            "help": "What the records call the model. A baseline may also be open_clip:NAME:PRETRAINED, "
            "open_clip:local-dir:FOLDER, or clip:FOLDER_OR_HUB_ID of transformers."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Images that go through at once."})
    precision: Literal["float32", "bf16"] = field(default="float32", metadata={"help": "bf16 is faster."})
    cache_dir: str = field(
        default="auto",
        metadata={"help": "Folder of embeddings; auto = $CAPIVARA_CACHE or ~/.cache/capivara, off = none are kept."},
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; the GPU where there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Execute code that a clip: model brings along."})

    def __post_init__(self) -> None:
        self.check_image_files()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")


@dataclass
class ClassificationArguments(ImageArguments):
    protocol: Literal["ours", "authors", "babel"] = field(
        default="ours",
        metadata={"help": "Names and templates: ours, the paper's authors', Babel-ImageNet's."},
    )
    language: str = field(default="pt", metadata={"help": "Language of the protocol babel."})
    authors_file: str | None = field(default=None, metadata={"help": "Path or https address, for protocol authors."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the training run, for the records."})


@dataclass
class LinearProbeArguments(ImageArguments):
    shots: list[int] = field(default_factory=list, metadata={"help": "Images of each class; all where none is given."})
    draws: int = field(default=3, metadata={"help": "Draws of the few images, averaged."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws and of the validation part."})
    train_split: str = field(default="train", metadata={"help": "Split that is fitted to."})
    validation_split: str | None = field(default=None, metadata={"help": "Split that the penalty is chosen on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(shots < 1 for shots in self.shots) or self.draws < 1:
            raise ValueError(f"shots and draws must be at least 1, got {self.shots} and {self.draws}.")


@dataclass
class SuiteArguments(ImageFileArguments):
    suite: str = field(
        default="paper",
        metadata={"positional": True, "nargs": "?", "help": f"Which benchmarks: {', '.join(SUITES)}."},
    )
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a CAPIVARA model; the first run."})
    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "Models of one recipe and several seeds, or the folder of them: mean ± standard deviation."},
    )
    baseline: str | None = field(
        default=None,
        metadata={"help": "CAPIVARA model, open_clip:NAME:PRETRAINED, open_clip:local-dir:FOLDER or clip:FOLDER."},
    )
    output: Path = field(
        default=Path("results/suite"), metadata={"help": "Folder of result files, suite.json and table.md."}
    )
    data: list[str] = field(default_factory=list, metadata={"help": "Local data, KEY=PATH, as many as there are."})
    data_dir: Path | None = field(default=None, metadata={"help": "Folder with local data, each under its key."})
    only: list[str] = field(default_factory=list, metadata={"help": "Keys of the benchmarks to measure, of any suite."})
    languages: list[str] = field(
        default_factory=list, metadata={"help": "Codes, for benchmarks that have several; --list shows them."}
    )
    metrics: list[str] = field(
        default_factory=list, metadata={"help": f"Further rows of the table: {', '.join(METRICS)}."}
    )
    protocol: Literal["ours", "authors"] = field(
        default="ours", metadata={"help": "Names and prompts: this project's, or those of the published figures."}
    )
    authors_file: str | None = field(default=None, metadata={"help": "Path or https address, for protocol authors."})
    published: Literal["capivara", "capivara_opt"] = field(
        default="capivara", metadata={"help": "Published model to compare with: fine-tuned, or with LoRA (Opt.)."}
    )
    offline: bool = field(default=False, metadata={"help": "Take local data alone."})
    overwrite: bool = field(default=False, metadata={"help": "Measure again what the output folder has already."})
    batch_size: int = field(default=32, metadata={"help": "Images that go through at once."})
    precision: Literal["float32", "bf16"] = field(default="float32", metadata={"help": "bf16 is faster."})
    cache_dir: str = field(default="auto", metadata={"help": "Folder of embeddings; off = none are kept."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; the GPU where there is one."})
    gallery: int = field(default=0, metadata={"help": "Queries with small copies of pictures to keep for a report."})
    list_benchmarks: bool = field(
        default=False,
        metadata={"aliases": ["--list"], "help": "Show the suite's benchmarks and where their data are."},
    )


# Help where the locale is Portuguese: the description, and the text of every flag.
REPORT_HELP_PT = {
    "": """Uma página para quem lê: todos os resultados de uma pasta em um único arquivo HTML, que não precisa de
mais nada, e suas figuras em PNG.

    python -m eval.report results/ --output report/
    python -m eval.report runs/openmoji-pt-001/ --output report/ --overwrite_output_dir

A pasta de um treinamento contém `results/` e `run.json`, de onde vêm as curvas do treinamento.
""",
    "results": "Pasta com arquivos de resultados; as pastas dentro dela também são lidas.",
    "output": "Pasta do relatório: index.html e PNGs. Não pode existir, ou precisa estar vazia.",
    "overwrite_output_dir": "Substitui a pasta do relatório.",
}


@dataclass
class ReportArguments:
    help_pt: ClassVar[dict[str, str]] = REPORT_HELP_PT

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
    return [int(place) for place in text.split(",")]

"""Arguments of the stages and of the build."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capivara_common.cli import at_least, flag
from capivara_common.image_files import DATASET_HELP, CaptionDataArguments
from capivara_common.tasks import SHARED_BY_TASKS, ExecutorArguments
from caption_data.selection import WITH_SIMILARITIES, CaptionChoice

SPLIT = r"\w+([.-]\w+)*"  # names of files begin with it
PREFIXES = Path(__file__).parent / "prefixes.json"
PAPER_MODEL = "Helsinki-NLP/opus-mt-tc-big-en-pt"  # arXiv 2310.13683; English to Portuguese alone
KINDS = ("captions", "generated-captions")  # the authors' names, before the language
GONE = {  # flags of earlier versions
    "shard": f"{SHARED_BY_TASKS} (docs/cluster.md)",
    "wait_s": "no task waits for another one any more: a stage starts when the one before is complete",
    "source_prefix": "models without codes of languages are not taken",
    **dict.fromkeys(("sampling", "temperature", "top_p", "seed"), "a caption is the model's likeliest text"),
    **dict.fromkeys(
        ("price_per_million", "max_cost"),
        "a quota of characters, in the service's console, limits what it costs; --backend file --export counts them",
    ),
    **dict.fromkeys(
        ("characters_per_second", "max_tries", "first_wait_s", "timeout_s"),
        "the service's own limit is kept: a request that it refuses for now is sent again, after pauses that double",
    ),
}
GOOGLE_MODULES = ("google.auth", "google.cloud.translate_v2")  # of the extra `google`
GOOGLE_CHARACTERS = 5_000  # of a request, as Google advises


@dataclass
class StageArguments(CaptionDataArguments, ExecutorArguments):
    """The flags of every stage. Raises ValueError where a value breaks its rule."""

    gone = GONE
    module = "captions.stages"  # that `python -m` runs it by
    import_file = None  # a flag of `captions.translate` alone
    dataset: str = flag(..., f"{DATASET_HELP} The output of another stage is such a folder.")
    output: Path = flag(..., "Folder of the parts; the same command finishes an unfinished one.")
    split: str = flag("train", "Split that is read, and that the parts are named by.")
    rename: list[str] = flag([], "Columns that get another name, as OLD=NEW: caption=captions-en for most data sets.")
    batch_rows: int = flag(16, "Rows that are worked on at once.")
    rows_per_part: int = flag(500, "Rows of a file: at most what a kill loses, at least what a task takes.")

    def __post_init__(self) -> None:
        self.dataset, self.output = self.dataset.rstrip("/") or self.dataset, Path(self.output)
        at_least(self, 1, "batch_rows", "rows_per_part")
        if not re.fullmatch(SPLIT, self.split):
            raise ValueError(f"split must be a name such as train, got {self.split!r}.")
        folder, output = Path(self.dataset).resolve(), self.output.resolve()
        if Path(self.dataset).exists() and folder in (output, output.parent):  # its parts would be rows of the data set
            raise ValueError(f"The output folder {self.output} is the data set or lies in it. Choose another one.")
        self.renamed()
        self.check_image_files()
        self.check_executor()

    def renamed(self) -> dict[str, str]:
        """Old name -> new name, of `rename`."""
        pairs = [pair.split("=") for pair in self.rename]
        names = dict(pair for pair in pairs if len(pair) == 2 and all(pair))
        if len(names) < len(pairs) or len(set(names.values())) < len(names) or self.image_column in names:
            raise ValueError(
                f"rename must be different OLD=NEW such as caption=captions-en, none of the images, got {self.rename}."
            )
        return names

    def needed_columns(self) -> list[str]:
        """Of which the data set must have one, by their names in the output."""
        return []

    @property
    def title(self) -> str:
        """Stage and split of a build, for messages."""
        return f"{self.output.parent.name}, {self.split}"


@dataclass
class GenerateArguments(StageArguments):
    """Arguments of `captions.generate`."""

    module = "captions.generate"
    max_new_tokens: int = flag(50, "Tokens of a generated text at most.")
    micro_batch_size: int = flag(160, "Captions that are generated at once; fewer need less memory and more time.")
    model: str = flag("Salesforce/blip2-opt-2.7b-coco", "Folder or Hub id of a BLIP-2 of transformers.")
    revision: str | None = flag(None, "Branch, tag or commit of a Hub id.")
    prefixes: Path = flag(PREFIXES, "JSON file of the form of captions/prefixes.json.")
    precision: Literal["float32", "bf16", "fp16"] = flag(
        "float32", "Of weights and activations; the authors had fp16, with BLIP-2's Q-Former in float32."
    )
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_new_tokens", "micro_batch_size")
        self.prefixes = Path(self.prefixes)


@dataclass(kw_only=True)
class TranslateArguments(StageArguments):
    """Arguments of `captions.translate`."""

    module = "captions.translate"
    language: str = flag(..., "To translate into: pt, hi, xh, es, yo, zh-Hant, …; also the ending of the new columns.")
    source_language: str = flag("en", "Of the captions that are there.")
    backend: Literal["transformers", "google", "file"] = flag(
        "transformers",
        "transformers: a model, here. google: Google's service, for money; the key is read from "
        "GOOGLE_API_KEY, or an account from GOOGLE_APPLICATION_CREDENTIALS. file: a table, translated elsewhere.",
    )
    memory: Path | None = flag(
        None,
        "Folder of translations that are never made again, for any number of tasks and builds; else OUTPUT.memory.",
    )
    existing: Literal["refuse", "append", "replace"] = flag(
        "refuse",
        "What to do with columns of the language that the data set has already. append puts translations "
        "behind them: the authors have Marian's and Google's of each caption.",
    )
    drop_flagged: bool = flag(
        False, "Leave out translations that look wrong; the others close up, so positions change."
    )
    batch_size: int | None = flag(None, "Sentences that are translated at once: 32 by a model, 128 otherwise.")
    batch_rows: int = flag(
        256, "Rows that are worked on at once; after eight times as many sentences, what is translated is kept."
    )
    rows_per_part: int = flag(1024, "Rows of a file: at least what a task takes.")

    model: str | None = flag(
        None,
        "transformers: folder or Hub id of a Marian, NLLB, M2M100, mBART-50 or MADLAD model; "
        f"{PAPER_MODEL}, the paper's, for en to pt where none is given.",
    )
    revision: str | None = flag(None, "transformers: branch, tag or commit of a Hub id.")
    num_beams: int | None = flag(None, "transformers: of the search; as the model's generation_config says.")
    max_new_tokens: int | None = flag(None, "transformers: tokens of a translation at most; 512 or what the model has.")
    precision: Literal["float32", "bf16", "fp16"] = flag("float32", "transformers: of weights and activations.")
    device: str | None = flag(None, "transformers: cpu or cuda; the GPU where there is one.")

    google_endpoint: str | None = flag(None, "google: another address of the service.")

    export: Path | None = flag(None, "file: write the distinct sentences of all rows to this TSV, and end.")
    import_file: Path | None = flag(
        None, "file: the TSV with its last column filled, rows as they were.", aliases=["--import"]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("language", "source_language"):
            if not re.fullmatch(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]+)*", getattr(self, name)):
                raise ValueError(f"{name} must be a code such as pt or zh-Hant, got {getattr(self, name)!r}.")
        if self.language == self.source_language:
            raise ValueError(f"language and source_language are both {self.language!r}; there is nothing to translate.")
        at_least(self, 1, "batch_size", "num_beams", "max_new_tokens")
        languages = (self.source_language, self.language)
        if self.backend == "transformers" and self.model is None and languages != ("en", "pt"):
            way_out = f"such as facebook/nllb-200-distilled-600M; {PAPER_MODEL} is for en to pt"
            raise ValueError(f"--model is needed for {self.source_language} to {self.language}, {way_out}.")
        tables = [self.export, self.import_file]
        if self.backend == "file" and tables.count(None) != 1:
            raise ValueError("--backend file needs --export FILE.tsv, and later --import FILE.tsv: one of the two.")
        if self.backend != "file" and tables.count(None) != 2:
            raise ValueError("--export and --import are of --backend file.")

    @property
    def memory_folder(self) -> Path:
        """Where translations are kept for later builds."""
        return self.memory or self.output.with_name(self.output.name + ".memory")

    def needed_columns(self) -> list[str]:
        """Columns of captions in the source language, of which one must be there."""
        return [f"{kind}-{self.source_language}" for kind in KINDS]


@dataclass
class ScoreArguments(StageArguments):
    """Arguments of `captions.score`."""

    module = "captions.score"
    language: str = flag("pt", "Language of the captions, the end of their columns' names.")
    model: str | None = flag(
        None,
        "Required: folder or Hub id of a CAPIVARA, SigLIP, CLIP … or open_clip:NAME:PRETRAINED, or "
        "open_clip:local-dir:FOLDER. It must know the language.",
    )
    embedding_batch_size: int = flag(32, "Images that go through at once; twice as many captions.")
    precision: Literal["float32", "bf16"] = flag("float32", "bf16 is faster on most GPUs.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("model is missing: give the model whose similarities are wanted, such as the base model.")
        at_least(self, 1, "embedding_batch_size")

    def needed_columns(self) -> list[str]:
        """Columns of captions, of which one must be there."""
        return [f"captions-{self.language}", f"generated-captions-{self.language}"]


@dataclass
class SelectArguments(CaptionChoice, StageArguments):
    """Arguments of `captions.select`."""

    module = "captions.select"
    language: str = flag("pt", "Language of the captions, the end of their columns' names.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice()

    def columns(self) -> list[str]:
        """What the choice looks at: captions, generated ones, similarities."""
        return [f"{name}-{self.language}" for name in ("captions", "generated-captions", "similarities")]

    def needed_columns(self) -> list[str]:
        """Columns of captions, and of similarities where they decide, of which one must be there."""
        scored = self.caption_strategy in WITH_SIMILARITIES or self.min_pair_similarity is not None
        return self.columns()[2:] if scored else self.columns()[:2]


@dataclass
class BuildArguments(ExecutorArguments):
    """Arguments of `captions.build`."""

    gone = GONE
    config: Path = flag(..., "YAML file of the stages, such as configs/captions_pt.yaml.")
    dataset: str | None = flag(None, "The images, in any form that a stage takes; goes before the config's.")
    output: Path | None = flag(None, "Folder of all that is made; goes before the config's.")
    language: str | None = flag(None, "Code of the language of the captions; goes before the config's.")
    dry_run: bool = flag(False, "Check the config, say what would be done, and end.")

    def __post_init__(self) -> None:
        self.check_executor()


@dataclass(frozen=True)
class Plan:
    """A whole build."""

    steps: dict[str, list[StageArguments]]  # split -> its stages in order
    output: Path  # folder of all
    language: str  # of the captions
    card: dict[str, Any]  # facts of the card that only people know

    def all_steps(self) -> list[StageArguments]:
        """The stages of all splits, in the order in which they run."""
        return [step for steps in self.steps.values() for step in steps]

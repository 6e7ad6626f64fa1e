"""Arguments of the stages and of the build: light, so that `--help` answers before torch is imported."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from capivara_common.cli import at_least, flag
from capivara_common.image_files import DATASET_HELP, CaptionDataArguments
from capivara_common.tasks import SHARED_BY_TASKS, ExecutorArguments
from caption_data.selection import WITH_SIMILARITIES, CaptionChoice
from caption_data.stage_record import SPLIT

PREFIXES = Path(__file__).parent / "prefixes.json"
GONE = {  # flags of earlier versions
    "shard": f"{SHARED_BY_TASKS} (docs/cluster.md)",
    "wait_s": "no task waits for another one any more: a stage starts when the one before is complete",
}


@dataclass
class StageArguments(CaptionDataArguments, ExecutorArguments):
    """The flags of every stage. Raises ValueError where a value breaks its rule."""

    gone = GONE
    module = "captions.stages"  # that `python -m` runs it by
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


@dataclass(kw_only=True)
class Decoding:
    """How texts are written: flags of `captions.generate`. Raises ValueError where a number is out of its range."""

    max_new_tokens: int = flag(50, "Tokens of a generated text at most.")
    micro_batch_size: int = flag(160, "Captions that are generated at once; fewer need less memory and more time.")
    sampling: bool = flag(False, "Draw every token at random, instead of the likeliest.")
    temperature: float = flag(1.0, "With --sampling: above 1 is wilder, below 1 tamer.")
    top_p: float = flag(1.0, "With --sampling: share of the probability drawn from.")
    seed: int = flag(0, "With --sampling: seed, image and prefix determine the text.")

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens", "micro_batch_size")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; leave out --sampling for none.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")

    def uniforms(self, key: bytes, prefix: str) -> np.ndarray:
        """(max_new_tokens,) in [0, 1): of seed, key and prefix alone, whatever batch, task or machine they are on."""
        digest = hashlib.sha256(f"{self.seed}\0{prefix}\0".encode() + key).digest()
        return np.random.default_rng(int.from_bytes(digest, "big")).random(self.max_new_tokens, dtype=np.float32)


@dataclass
class GenerateArguments(Decoding, StageArguments):
    """Arguments of `captions.generate`."""

    module = "captions.generate"
    model: str = flag(
        "Salesforce/blip2-opt-2.7b-coco",
        "Folder or Hub id of a BLIP-2, BLIP, GIT or vision-encoder-decoder model of transformers.",
    )
    revision: str | None = flag(None, "Branch, tag or commit of a Hub id.")
    prefixes: Path = flag(PREFIXES, "JSON file of the form of captions/prefixes.json.")
    precision: Literal["float32", "bf16", "fp16"] = flag(
        "float32", "Of weights and activations; the authors had fp16, with BLIP-2's Q-Former in float32."
    )
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        StageArguments.__post_init__(self)
        Decoding.__post_init__(self)
        self.prefixes = Path(self.prefixes)


@dataclass
class ScoreArguments(StageArguments):
    """Arguments of `captions.score`."""

    module = "captions.score"
    language: str = flag("pt", "Language of the captions, the end of their columns' names.")
    model: str | None = flag(
        None,
        "Required: folder or Hub id of a CAPIVARA model; open_clip:NAME:PRETRAINED or "
        "open_clip:local-dir:FOLDER; or clip:FOLDER_OR_HUB_ID of transformers. It must know the language.",
    )
    embedding_batch_size: int = flag(32, "Images that go through at once; twice as many captions.")
    precision: Literal["float32", "bf16"] = flag("float32", "bf16 is faster on most GPUs.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")
    trust_remote_code: bool = flag(False, "Execute code that a clip: model brings along.")

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

"""Arguments of `captions.translate`; see `captions.stage_arguments`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from capivara_common.cli import at_least, between, flag
from captions.stage_arguments import StageArguments
from captions.translators.google_cloud import GoogleArguments

PAPER_MODEL = "Helsinki-NLP/opus-mt-tc-big-en-pt"  # arXiv 2310.13683; English to Portuguese alone
KINDS = ("captions", "generated-captions")  # the authors' names, before the language


@dataclass(kw_only=True)
class TranslateArguments(GoogleArguments, StageArguments):
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
        "Folder of translations that are never made again; OUTPUT.memory where none is given. "
        "Any number of tasks and builds may share it.",
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
        256, "Rows that are worked on at once; sentences are translated 8 for a row, sorted by length."
    )
    rows_per_part: int = flag(1024, "Rows of a file, or an eighth of its sentences: at least what a task takes.")

    model: str | None = flag(
        None,
        f"transformers: folder or Hub id of a Marian, NLLB, M2M100, mBART-50, MADLAD or another seq2seq "
        f"model; {PAPER_MODEL}, the paper's, for en to pt where none is given.",
    )
    revision: str | None = flag(None, "transformers: branch, tag or commit of a Hub id.")
    source_prefix: str | None = flag(
        None, "transformers: goes before every sentence, for models without language codes."
    )
    num_beams: int | None = flag(None, "transformers: of the search; as the model's generation_config says.")
    max_new_tokens: int | None = flag(None, "transformers: tokens of a translation at most; 512 or what the model has.")
    precision: Literal["float32", "bf16", "fp16"] = flag("float32", "transformers: of weights and activations.")
    device: str | None = flag(None, "transformers: cpu or cuda; the GPU where there is one.")

    price_per_million: float | None = flag(
        None,
        "google: price of a million characters, as cloud.google.com/translate/pricing or your contract "
        "says. The page has named 20 US dollars for version 2, which is used here.",
    )
    max_cost: float | None = flag(
        None,
        "google: what all tasks of this command may cost together, in the currency of the price. Where it "
        "does not cover the estimate, nothing is sent. A task may spend its share of it.",
    )
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
        at_least(self, 1, "batch_size", "num_beams", "max_new_tokens", "max_tries")
        at_least(self, 0.001, "characters_per_second", "timeout_s")
        between(self, 0, 1e12, "price_per_million", "max_cost", "first_wait_s")
        self._check_backend()

    def _check_backend(self) -> None:
        languages = (self.source_language, self.language)
        if self.backend == "transformers" and self.model is None and languages != ("en", "pt"):
            raise ValueError(
                f"--model is needed for {self.source_language} to {self.language}, such as "
                f"facebook/nllb-200-distilled-600M; {PAPER_MODEL} is for en to pt."
            )
        if self.backend == "google" and self.price_per_million is None:
            raise ValueError(
                "--backend google needs --price_per_million, to know what this will cost: see "
                "cloud.google.com/translate/pricing, or your contract. Nothing was sent."
            )
        tables = [self.export, self.import_file]
        if self.backend == "file" and tables.count(None) != 1:
            raise ValueError("--backend file needs --export FILE.tsv, and later --import FILE.tsv: one of the two.")
        if self.backend != "file" and tables.count(None) != 2:
            raise ValueError("--export and --import are of --backend file.")

    @property
    def sentences_at_once(self) -> int:
        """Sentences in one call of the translator."""
        return self.batch_size or (32 if self.backend == "transformers" else 128)

    @property
    def memory_folder(self) -> Path:
        """Where translations are kept for later builds."""
        return self.memory or self.output.with_name(self.output.name + ".memory")

    @property
    def work_folder(self) -> Path:
        """Of the sentences and their translations."""
        return self.output.with_name(self.output.name + ".translations")

    @property
    def parts_folder(self) -> Path:
        """Of the parts of translated sentences."""
        return self.work_folder / "parts"

    def needed_columns(self) -> list[str]:
        """Columns of captions in the source language, of which one must be there."""
        return [f"{kind}-{self.source_language}" for kind in KINDS]

r"""Translate captions into another language with a model, with Google's service, or with a table that people fill.

    python -m captions.translate --dataset data/generated --output data/pt --language pt
    python -m captions.translate --dataset data/generated --output data/xh --language xh --workers 4 \
        --model facebook/nllb-200-distilled-600M --precision bf16
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend google
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --import yo.tsv

With the language pt, the column `captions-en` is translated to `captions-pt`, and `generated-captions-en` to
`generated-captions-pt`. The order of the captions stays the same.

Each distinct sentence is translated only once. Finished translations are stored in the folder `--memory`, as parquet
files that never change, and any later run with the same settings uses them. A sentence is translated twice only if two
tasks need it at the same moment.

Translations that look wrong are listed in the column `quality-pt` and counted in OUTPUT/quality.json. To finish an
interrupted run, run the same command again.
"""

import hashlib
import itertools
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import List, Value
from tqdm.auto import tqdm

from capivara_common.cli import check_at_least, flag, run_command
from capivara_common.environment import require_packages
from capivara_common.files import json_digest, read_json, write_json
from capivara_common.image_files import BadRow
from capivara_common.tasks import split_rows
from caption_data.rows import CAPTIONS_FEATURE, normalize_captions
from caption_data.sources import STAGE_FILE, Split, open_parquet
from captions.quality import QUALITY_FLAGS, find_quality_flags
from captions.stages import (
    Corrections,
    RowStage,
    StageArguments,
    atomic_parquet,
    batch_by_length,
    describe_differences,
    read_skipped_rows,
    read_stage_record,
    run_stage_command,
)
from captions.translation_tables import (
    TABLE_COLUMNS,
    check_table_rows,
    describe_untranslated,
    read_table,
    read_translation_table,
    write_translation_table,
)
from captions.translators import (
    GOOGLE_MAX_CHARACTERS,
    GOOGLE_MODULES,
    GoogleTranslator,
    Seq2SeqTranslator,
    check_languages,
    parse_language,
)

PAPER_MODEL = "Helsinki-NLP/opus-mt-tc-big-en-pt"  # English-Portuguese model of the CAPIVARA paper, arXiv 2310.13683
CAPTION_KINDS = ("captions", "generated-captions")  # names of caption columns, without the language code at the end
# Columns of the parquet files of a translation memory: a sentence and its translation.
PAIR_SCHEMA = pa.schema({"source": pa.string(), "translation": pa.string()})
MEMORY_BATCH_ROWS = 10_000  # sentences of a translation memory that are read at the same time
SENTENCES_PER_ROW = 8  # translations are saved after every `SENTENCES_PER_ROW * batch_rows` sentences

QUALITY_FILE = "quality.json"
EXAMPLES_PER_FLAG = 5  # examples per flag in quality.json
MAX_EXAMPLE_CHARACTERS = 200  # longer examples are shortened, because a sentence may be very long
# Type of the column `quality-<language>`. `captions` is the number of translated captions of the row. `flagged` lists
# the translations that look wrong. In an entry of `flagged`, `column` is the column of the translation, `position` is
# the index of the caption in the column that was translated, and `flags` says what looks wrong.
_FLAGGED_FEATURES = {"column": Value("string"), "position": Value("int32"), "flags": List(Value("string"))}
_FLAGGED_FEATURES |= {"source": Value("string"), "translation": Value("string")}
QUALITY_FEATURES = {"captions": Value("int32"), "flagged": List(_FLAGGED_FEATURES)}

logger = logging.getLogger("capivara")


@dataclass(kw_only=True)
class TranslateArguments(StageArguments):
    """Command-line flags of `captions.translate`, the stage that translates captions into another language."""

    uses_model = True
    language: str = flag(
        ..., "Code of the target language, such as pt, hi or zh-Hant; also the end of the names of the new columns."
    )
    source_language: str = flag("en", "Code of the language of the existing captions.")
    backend: Literal["transformers", "google", "file"] = flag(
        "transformers",
        "What translates. transformers: a model on this machine. google: Google Cloud Translation, which costs money; "
        "the key comes from the environment variable GOOGLE_API_KEY. file: a table that people fill.",
    )
    memory: Path | None = flag(
        None, "Folder of finished translations; several builds can share it. Default: OUTPUT.memory."
    )
    drop_flagged: bool = flag(
        False, "Drop translations that look wrong. The captions after them then move to lower positions."
    )
    batch_size: int | None = flag(
        None, "Sentences to translate at the same time. Default: 32 (transformers), 128 (google)."
    )
    batch_rows: int = flag(
        256, "Rows to process at the same time. Translations are saved after eight sentences per row."
    )
    rows_per_part: int = flag(1024, "Rows per output file.")

    model: str | None = flag(
        None,
        "Folder or Hub id of a Marian, NLLB, M2M100 or mBART-50 model (transformers). "
        f"Default for en to pt: {PAPER_MODEL}, the model of the CAPIVARA authors; required for other languages.",
    )
    revision: str | None = flag(None, "Branch, tag or commit on the Hub (transformers). Default: the main branch.")
    max_new_tokens: int | None = flag(
        None, "Largest number of tokens of a translation (transformers). Default: 512, or the limit of the model."
    )
    precision: Literal["float32", "bf16", "fp16"] = flag(
        "float32", "Data type of weights and activations (transformers)."
    )
    device: str | None = flag(None, "cpu or cuda (transformers). Default: cuda if a GPU is available, otherwise cpu.")

    google_endpoint: str | None = flag(None, "Address of the service (google). Default: Google's address.")

    import_file: Path | None = flag(
        None, "TSV table of sentences (file). If it does not exist, it is written, to be filled.", aliases=["--import"]
    )
    translated_by: Literal["human", "machine"] = flag(
        "human", "Who fills the table (file); dataset card and model cards state it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("language", "source_language"):
            if not re.fullmatch(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]+)*", getattr(self, name)):
                raise ValueError(f"{name} must be a code such as pt or zh-Hant, got {getattr(self, name)!r}.")
            parsed = parse_language(getattr(self, name))
            if parsed is None or not parsed.is_valid():
                raise ValueError(
                    f"{name} must be an ISO 639 language code, such as sw for Swahili, optionally with script or "
                    f"region, such as zh-Hant, got {getattr(self, name)!r}."
                )
        if self.language == self.source_language:
            raise ValueError(f"language and source_language must differ, got {self.language!r} for both.")
        check_at_least(self, 1, "batch_size", "max_new_tokens")
        languages = (self.source_language, self.language)
        if self.backend == "transformers" and self.model is None and languages != ("en", "pt"):
            raise ValueError(
                f"--model is required to translate {self.source_language} to {self.language}, for example "
                f"facebook/nllb-200-distilled-600M. The default model only translates en to pt."
            )
        if (self.backend == "file") != (self.import_file is not None):
            raise ValueError("--backend file requires --import FILE.tsv; other backends do not use --import.")
        if self.backend == "google":
            require_packages("--backend google", "google", *GOOGLE_MODULES)

    def required_columns(self) -> list[str]:
        """Return the names of the caption columns in the source language.

        The dataset must have at least one of these columns.
        """
        return [f"{kind}-{self.source_language}" for kind in CAPTION_KINDS]

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Check the columns of the dataset.

        Args:
            columns: Names of the columns of the dataset, after the flag `rename`.
            where: Name of the dataset, with which error messages begin.

        Returns:
            The names of the columns that the stage adds: translations and `quality-<language>`.

        Raises:
            ValueError: If the dataset has no captions in the source language, or already has a column of translations.
        """
        added = super().check_columns(columns, where)
        return [*added, *translated_columns(columns, where, self).values(), f"quality-{self.language}"]

    def known_settings(self) -> dict[str, Any]:
        """Return the settings for `stage.json` that are known before a translator is loaded.

        Returns:
            With a translation table, a dict with the single key "translator". Its value is a dict with the keys
            "backend" ("file"), "target" (code of the target language) and "sha256" (SHA-256 hex digest of the table).
            Without a translation table, an empty dict.
        """
        if self.backend != "file":
            return {}
        digest = hashlib.sha256(self.import_file.read_bytes()).hexdigest()
        return {"translator": {"backend": "file", "target": self.language, "sha256": digest}}

    def settings(self, translator: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of the stage for `stage.json`.

        Args:
            translator: Fingerprint of the translator: everything that affects a translation, except the sentence
                itself.
        """
        settings = {"translator": translator, "language": self.language, "source_language": self.source_language}
        # `existing` was a flag of earlier versions of the program. The key keeps existing output folders valid.
        return settings | {"existing": "refuse", "drop_flagged": self.drop_flagged}

    def pending_manual_step(self) -> str:
        """Describe which sentences of the translation table have no translation yet; "" if all have a translation.

        Also returns "" if the stage uses no table. Raises ValueError if the languages in the table differ from the
        flags.
        """
        if self.import_file is None:
            return ""
        if not self.import_file.is_file():
            return "the table does not exist yet"
        self.check_table()
        return describe_untranslated(self.import_file)

    @property
    def translations(self) -> dict[str, str]:
        """Dict with one entry for dataset and model cards: code of the target language -> "human" or "machine"."""
        return {self.language: self.translated_by if self.backend == "file" else "machine"}

    def check_translator(self) -> None:
        """Raise ValueError if the translation model does not know the source or target language.

        A model that is not on this machine yet is not checked.
        """
        if self.backend == "transformers":
            check_languages(self.model or PAPER_MODEL, self.revision, self.language, self.source_language)

    def check_table(self) -> None:
        """Check that the first line of the translation table states the source and target languages of the flags.

        Earlier versions of the program wrote tables without languages. Such a table is accepted if a stage in the same
        folder as the output (for example the same stage of another split) was made from a table for the target
        language.

        Raises:
            ValueError: If the table states other languages, or does not state the language of the translations.
        """
        stated, _ = read_table(self.import_file)
        hint = "Use the path of a new table, which is then written, or correct the language."
        for column, language in (("source", self.source_language), ("translation", self.language)):
            if stated.get(column) and stated[column] != language:
                raise ValueError(
                    f"{self.import_file} must have its {column} column in the language {language!r}, but its first "
                    f"line states {stated[column]!r}. {hint}"
                )
        records = (read_stage_record(path.parent)["settings"] for path in self.output.parent.glob(f"*/{STAGE_FILE}"))
        expected = {"backend": "file", "target": self.language}.items()
        if not stated["translation"] and not any(
            expected <= (settings.get("translator") or {}).items() for settings in records
        ):
            raise ValueError(
                f"{self.import_file} does not state the language of its translations. Its first line must name the "
                f"column translation:{self.language}. {hint}"
            )

    def request_manual_step(self) -> str:
        """Write the translation table if it does not exist, and return a message that asks a person to fill it.

        Raises ValueError if the table exists, but does not have the sentences of the dataset.
        """
        stage = RowStage(self)
        if not self.import_file.is_file():
            sentences = self.sentences(stage)
            write_translation_table(self.import_file, sentences, self.table_header(stage))
            counts = f"{len(sentences):,} sentences, {sum(map(len, sentences)):,} characters"
            logger.info("Wrote %s with %s. Do not add, remove or reorder rows.", self.import_file, counts)
            translators = {"human": "by people (to change this, set translated_by: machine)", "machine": "by machine"}
            logger.info("The cards will state that it was translated %s.", translators[self.translated_by])
        elif read_table(self.import_file)[0]["id"] != stage.record["source"]["fingerprint"]:
            self.check_source_rows(stage)  # raises an error before somebody fills a table of another dataset
        return f"{self.import_file} (stage {self.title}) is incomplete: {self.pending_manual_step()}"

    def table_header(self, stage: RowStage) -> list[str]:
        """Return the column names for the first line of the translation table, for example "translation:pt".

        The name `id` is followed by the fingerprint of the dataset. The names `source` and `translation` are followed
        by the code of the source language and the code of the target language.
        """
        stated = (stage.record["source"]["fingerprint"], self.source_language, self.language)
        return [f"{column}:{text}" for column, text in zip(TABLE_COLUMNS, stated, strict=True)]

    def sentences(self, stage: RowStage) -> list[str]:
        """Return the distinct captions of all rows, in the order in which the translation table lists them."""
        return list(distinct_sentences(self, stage.source, [range(len(stage.source))]))

    def check_source_rows(self, stage: RowStage) -> list[str]:
        """Return the distinct captions of the dataset, after a check that the translation table has the same sentences.

        Raises ValueError if the table has other sentences or another order, or states other languages.
        """
        self.check_table()
        sentences, source_digest = self.sentences(stage), stage.record["source"]["fingerprint"]
        try:
            check_table_rows(self.import_file, sentences)
        except ValueError as error:
            table_digest = read_table(self.import_file)[0]["id"]
            if not table_digest or table_digest == source_digest:
                raise
            raise ValueError(
                f"{error} The table was written for other data (digest {table_digest}; the data has {source_digest}). "
                "Move it to another place; a new table is then written."
            ) from error
        return sentences

    def is_corrected(self) -> bool:
        """Return True if the translation table has changed after the output of the stage was written from it."""
        if self.backend != "file" or not (self.output / STAGE_FILE).is_file():
            return False
        return self.known_settings()["translator"] != read_stage_record(self.output)["settings"].get("translator")

    def corrections(self) -> Corrections | None:
        """Find the written rows whose translations differ from the translation table.

        Returns:
            The changed rows and the files that hold them. None if the table has not changed, or if other settings have
            changed as well, so that the output folder is not valid for the current settings.

        Raises:
            ValueError: If the table does not have the sentences of the dataset, or a sentence has no translation.
        """
        if not self.is_corrected():
            return None
        recorded, table, stage = read_stage_record(self.output), self.known_settings(), RowStage(self)
        current = {
            "settings": self.settings(table["translator"]) | self.image_settings(),
            "columns": recorded["columns"],
        }
        record = recorded | {"settings": recorded["settings"] | table}
        if describe_differences(record, stage.record | current):
            return None  # `claim_folder` will raise an error that names the differences
        translations = read_translation_table(self.import_file, self.check_source_rows(stage))
        columns, rows, parts, written = translated_columns(stage.features, stage.source.display_name, self), [], [], 0
        new_columns = [*columns.values(), f"quality-{self.language}"]
        for part in split_rows(len(stage.source), self.rows_per_part):
            path, count_before = stage.path(part), len(rows)
            if path.is_file():
                for number, row in enumerate(
                    pq.read_table(path, columns=[*columns, *new_columns]).to_pylist(), written
                ):
                    if any(
                        row[name] != value for name, value in translate_row(self, row, columns, translations).items()
                    ):
                        rows.append(number)
                if len(rows) > count_before:
                    parts.append(path)
            written += len(part) - len(read_skipped_rows(path))
        return Corrections(self.output, record, parts, rows)

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Load the translator, or read the translation table.

        Args:
            stage: The opened rows.

        Returns:
            A tuple with the arguments of `RowStage.run`: `columns`, a dict from the name of each new column to its
            feature (column type of `datasets`); `settings`, a dict with the settings for `stage.json`; `process`, the
            function that returns the new columns of a list of rows; and `prepare`, the function that translates the
            sentences of the next parts before these parts are written.

        Raises:
            ValueError, OSError, ImportError: If the translator cannot be loaded, or the table is incomplete.
        """
        columns = translated_columns(stage.features, stage.source.display_name, self)
        # Sentence -> translation. With a table, the dict has all sentences; otherwise, only those of the next parts.
        translations: dict[str, str] = {}
        if self.backend == "file":
            identity = self.known_settings()["translator"]
            translations.update(read_translation_table(self.import_file, self.check_source_rows(stage)))
        else:
            translator = self.load_translator()
            identity = translator.fingerprint

        def prepare(parts: list[range]) -> None:
            if self.backend != "file":
                sentences = set(distinct_sentences(self, stage.source, parts))
                translations.clear()
                translations.update(translate_sentences(self, translator, sentences, shows_bar=stage.rank == 0))

        def process(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [translate_row(self, row, columns, translations) for row in rows]

        new_columns = dict.fromkeys(columns.values(), CAPTIONS_FEATURE) | {f"quality-{self.language}": QUALITY_FEATURES}
        return new_columns, self.settings(identity), process, prepare

    def load_translator(self) -> Seq2SeqTranslator | GoogleTranslator:
        """Load the translation model, or connect to Google's service, as the flag `backend` says.

        Raises ValueError, OSError or ImportError if the translator cannot be used.
        """
        languages = (self.language, self.source_language)
        if self.backend == "google":
            return GoogleTranslator(*languages, self.google_endpoint)
        return Seq2SeqTranslator(
            self.model or PAPER_MODEL,
            *languages,
            revision=self.revision,
            precision=self.precision,
            device=self.device,
            batch_size=self.batch_size or 32,
            max_new_tokens=self.max_new_tokens,
        )

    def report(self, rank: int = 0, world_size: int = 1) -> None:
        """Write `quality.json`, with the numbers of flagged translations and a few examples for each quality flag.

        Args:
            rank: Number of the task; not used, because a single task writes the file.
            world_size: Number of tasks; not used.
        """
        column = f"quality-{self.language}"
        flag_reports = {name: {"captions": 0, "examples": []} for name in QUALITY_FLAGS}
        report = {"language": self.language, "rows": 0, "captions": 0, "flagged": 0, "flags": flag_reports}
        for path in sorted(self.output.glob("*.parquet")):
            for quality in pq.read_table(path, columns=[column])[column].to_pylist():
                report["rows"] += 1
                report["captions"] += quality["captions"]
                report["flagged"] += len(quality["flagged"])
                for caption in quality["flagged"]:
                    example = {name: caption[name][:MAX_EXAMPLE_CHARACTERS] for name in ("source", "translation")}
                    for flag_report in (flag_reports[name] for name in caption["flags"]):
                        flag_report["captions"] += 1
                        if len(flag_report["examples"]) < EXAMPLES_PER_FLAG:
                            flag_report["examples"].append(example)
        write_json(self.output / QUALITY_FILE, report)


# Sentences


def translated_columns(present: Collection[str], where: str, args: TranslateArguments) -> dict[str, str]:
    """Return the caption columns to translate and the columns of their translations.

    Args:
        present: Names of the columns of the dataset, after the flag `rename`.
        where: Name of the dataset, with which the error message begins.
        args: Flags of the command.

    Returns:
        A dict from the name of each caption column to the name of the new column, for example from "captions-en" to
        "captions-pt".

    Raises:
        ValueError: If the dataset already has a column of translations, or the column of similarities of the target
            language.
    """
    columns = {f"{kind}-{args.source_language}": f"{kind}-{args.language}" for kind in CAPTION_KINDS}
    columns = {column: target for column, target in columns.items() if column in present}
    for name in (*columns.values(), f"similarities-{args.language}"):
        if name in present:
            raise ValueError(
                f"{where} must not have the column {name} yet. Rename it with --rename {name}=old-{name}; similarities "
                "are computed after translation."
            )
    return columns


def distinct_sentences(args: TranslateArguments, source: Split, parts: Iterable[range]) -> Iterator[str]:
    """Iterate over the distinct captions in ranges of rows, without blank captions, in the order of the rows.

    Only the caption columns are requested from the source, so that most datasets do not read the images.

    Args:
        args: Flags of the command.
        source: The rows.
        parts: Ranges of row numbers.

    Raises:
        ValueError: If the dataset already has a column of translations.
    """
    names = {args.column_renames().get(name, name): name for name in source.columns}
    columns = [names[column] for column in translated_columns(names, source.display_name, args)]
    seen: set[bytes] = set()  # digests of sentences; the sentences would need ten times the memory
    for part in parts:
        rows = itertools.islice(source.rows(part.start, column_names=columns), len(part))
        for row, column in ((row, column) for row in rows for column in columns):
            texts: list[str] = []
            with suppress(BadRow):  # a row with invalid captions is skipped when the parts are written
                texts = normalize_captions(row.get(column), column)
            for sentence in filter(str.strip, texts):
                digest = hashlib.blake2b(sentence.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield sentence


# Translations


class TranslationMemory:
    """Store of finished translations of one translator on disk, shared by all runs and tasks.

    Args:
        folder: Folder with the translation memories of all translators. Each translator has a sub-folder.
        fingerprint: Everything that affects a translation (translator, languages, options), except the sentence itself,
            as a dict of JSON values. The digest of this dict is the name of the translator's sub-folder.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder, self.fingerprint = folder / json_digest(fingerprint, sort_keys=True), fingerprint

    def find(self, sentences: Iterable[str]) -> dict[str, str]:
        """Return the stored translations of sentences, as a dict: sentence -> translation.

        Sentences without a stored translation are not in the dict.

        Each call reads all files of the memory, so a single call with many sentences is faster than many calls.
        """
        wanted, known = set(sentences), {}
        for path in sorted(self.folder.glob("*.parquet")) if wanted else ():
            with open_parquet(path, ". Remove it; its sentences are then translated again") as file:
                for batch in file.iter_batches(MEMORY_BATCH_ROWS, columns=list(PAIR_SCHEMA.names)):
                    pairs = zip(batch["source"].to_pylist(), batch["translation"].to_pylist(), strict=True)
                    known |= {source: translation for source, translation in pairs if source in wanted}
        return known

    def add(self, translations: dict[str, str]) -> None:
        """Store translations, given by sentence, in a new file. The file is written completely or not at all.

        Raises OSError if the disk is full.
        """
        if not (self.folder / "translator.json").is_file():
            write_json(self.folder / "translator.json", self.fingerprint)
        columns = {"source": list(translations), "translation": list(translations.values())}
        name = hashlib.blake2b("\0".join(translations).encode(), digest_size=16).hexdigest()
        with atomic_parquet(self.folder / f"{name}.parquet", PAIR_SCHEMA) as parquet:
            parquet.write_table(pa.table(columns, schema=PAIR_SCHEMA))


def translate_sentences(
    args: TranslateArguments, translator: Any, sentences: set[str], shows_bar: bool
) -> dict[str, str]:
    """Translate sentences, and use the translation memory for sentences that have been translated before.

    New translations are stored in the memory after each batch, so that they are not lost if a later batch fails.

    Args:
        args: Flags of the command.
        translator: A `Seq2SeqTranslator` or `GoogleTranslator`.
        sentences: Sentences to translate; none may be blank.
        shows_bar: Show a progress bar.

    Returns:
        A dict from each sentence to its translation.
    """
    folder = args.memory or args.output.with_name(args.output.name + ".memory")
    memory = TranslationMemory(folder, translator.fingerprint)
    translations = memory.find(sentences)
    # The longest sentences come first, so that an out-of-memory error appears at the start.
    missing = sorted(sentences - translations.keys(), key=lambda text: (-len(text), text))
    max_characters, max_sentences = sys.maxsize, SENTENCES_PER_ROW * args.batch_rows
    # Save after each request, so that paid translations are not lost if the next request fails.
    if args.backend == "google":
        max_characters, max_sentences = GOOGLE_MAX_CHARACTERS, args.batch_size or 128
    title = f"Translating with {translator.name}"
    with tqdm(total=len(missing), desc=title, unit="sentence", leave=False, disable=not shows_bar) as bar:
        for batch in batch_by_length(missing, max_characters, max_sentences):
            new_translations = dict(zip(batch, translator.translate(batch), strict=True))
            memory.add(new_translations)
            translations |= new_translations
            bar.update(len(batch))
    return translations


def translate_row(
    args: TranslateArguments, row: dict[str, Any], columns: dict[str, str], translations: dict[str, str]
) -> dict[str, Any]:
    """Return the new columns of a row: its translated captions, and `quality-<language>`.

    Args:
        args: Flags of the command.
        row: A row with captions.
        columns: Dict from the name of each caption column to the name of the column of its translations.
        translations: Dict from each sentence to its translation.

    Returns:
        A dict from column name to value. The value of `quality-<language>` holds the number of translated captions and
        the list of translations that look wrong.
    """
    new_columns, caption_count, flagged = {}, 0, []
    for column, target in columns.items():
        new_columns[target] = []
        for position, source in enumerate(row.get(column) or []):
            translation = translations[source] if source.strip() else ""
            flags = find_quality_flags(source, translation, args.language)
            caption_count += 1
            if flags:
                entry = {"column": target, "position": position, "flags": flags}
                flagged.append(entry | {"source": source, "translation": translation})
            if not (flags and args.drop_flagged):
                new_columns[target].append(translation)
    return new_columns | {f"quality-{args.language}": {"captions": caption_count, "flagged": flagged}}


# The command


def main(argv: list[str] | None = None) -> None:
    """Run the command `captions.translate`, and print how many translations have each quality flag.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = run_stage_command(TranslateArguments, __doc__, argv)
    if args is not None:
        report = read_json(args.output / QUALITY_FILE)
        counts = {name: flag_report["captions"] for name, flag_report in report["flags"].items()}
        lines = "".join(f"\n{count:12,}  {name}" for name, count in counts.items() if count)
        path = args.output / QUALITY_FILE
        print(f"{report['flagged']:,} of {report['captions']:,} translations look wrong, see {path}.{lines}")


if __name__ == "__main__":
    # Import this file as a named module, so that other processes can unpickle its classes.
    from captions import translate

    run_command(translate.main, resumable=True)

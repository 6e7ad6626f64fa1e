"""Take translations from a translation table, a TSV file that people fill (`--backend file`).

The first run of `captions.translate` writes the table, with one row for each sentence to translate. People fill its
last column with translations. The next run reads the table.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow.parquet as pq

from capivara_common.cli import flag
from caption_data.sources import STAGE_FILE
from captions.chat.answers import Answer
from captions.sentences import build_translation_and_quality_columns, iter_distinct_captions, map_columns_to_translate
from captions.stages import Corrections, RowStage, describe_record_differences, read_skipped_rows, read_stage_record
from captions.translation_tables import TABLE_COLUMNS, TranslationTable, write_blank_translation_table
from captions.translators.base import Translator

logger = logging.getLogger("capivara")


@dataclass(kw_only=True)
class FileFlags:
    """Flags of `captions.translate` for translations from a table that people fill (`--backend file`).

    A translation table is a TSV file with a column of sentences and a column for their translations. The methods of
    this class write, check and read the table. If `import_file` is None, there is no table.
    """

    import_file: Path | None = flag(
        None,
        "Only for --backend file: TSV file of translations. If it does not exist yet, the command writes it with all "
        "sentences to translate and an empty column, which people fill with translations.",
        aliases=["--import"],
    )
    translated_by: Literal["human", "machine"] = flag(
        "human", "Only for --backend file: who fills the table. The dataset card and model cards state this."
    )

    def known_settings(self) -> dict[str, Any]:
        """Return the settings that identify the content of the translation table, to detect changes of the table.

        Returns:
            A dict `{"translator": identity}`; empty if there is no table. The identity is a dict with the keys
            "backend" (always "file"), "target" (code of the target language) and "sha256" (SHA-256 hex digest of the
            table).
        """
        if self.import_file is None:
            return {}
        digest = hashlib.sha256(self.import_file.read_bytes()).hexdigest()
        return {"translator": {"backend": "file", "target": self.language, "sha256": digest}}

    def pending_manual_step(self) -> str:
        """Describe why the stage must wait for people: the table does not exist yet, or sentences are not translated.

        Returns "" if all sentences have a translation, or if the stage uses no table. Raises ValueError if the
        languages in the table differ from the flags.
        """
        if self.import_file is None:
            return ""
        if not self.import_file.is_file():
            return "the table does not exist yet"
        return self.read_table().describe_untranslated_rows()

    def read_table(self) -> TranslationTable:
        """Read the translation table, and check that it is for the source and target languages of the flags.

        The first line of the table states its languages. Tables without languages, from earlier versions of this
        program, are accepted only if the output folder, or a folder next to it, was made from a table for the same
        target language.

        Raises:
            ValueError: If the table states other languages, or does not state the language of the translations.
        """
        table = TranslationTable(self.import_file)
        stated = table.header
        hint = "Correct the language, or set --import to a file that does not exist yet, to get a new table."
        for column, language in (("source", self.source_language), ("translation", self.language)):
            if stated.get(column) and stated[column] != language:
                raise ValueError(
                    f"The {column} column of {self.import_file} must be in the language {language!r}, but the first "
                    f"line of the file says {stated[column]!r}. {hint}"
                )
        paths = self.output.parent.glob(f"*/{STAGE_FILE}")
        translators = (read_stage_record(path.parent)["settings"].get("translator") or {} for path in paths)
        expected = {"backend": "file", "target": self.language}.items()
        if not stated["translation"] and not any(expected <= translator.items() for translator in translators):
            raise ValueError(
                f"{self.import_file} does not state the language of its translations. Its first line must name the "
                f"column translation:{self.language}. {hint}"
            )
        return table

    def request_manual_step(self) -> str:
        """Write the translation table if it does not exist, and return a message that asks people to fill it.

        Raises ValueError if a table exists but has other sentences than the dataset.
        """
        stage = RowStage(self)
        if not self.import_file.is_file():
            sentences = list(iter_distinct_captions(self, stage.source))
            # The first line of the table has a value after each column name, for example "translation:pt". When the
            # table is read later, these values are compared with the data and the flags.
            values = (stage.record["source"]["fingerprint"], self.source_language, self.language)
            header = [f"{column}:{value}" for column, value in zip(TABLE_COLUMNS, values, strict=True)]
            write_blank_translation_table(self.import_file, sentences, header)
            counts = f"{len(sentences):,} sentences, {sum(map(len, sentences)):,} characters"
            logger.info(f"Wrote {self.import_file} with {counts}. Do not add, remove or reorder rows.")
            translators = {"human": "by people (to change this, set translated_by: machine)", "machine": "by machine"}
            logger.info(
                "The dataset card and model cards will say that the captions were translated "
                f"{translators[self.translated_by]}."
            )
        elif TranslationTable(self.import_file).header["id"] != stage.record["source"]["fingerprint"]:
            # The table may have been written for other data. Check its sentences now, before people translate sentences
            # that are not needed.
            self.check_source_rows(stage)
        return f"{self.import_file} (stage {self.title}) is incomplete: {self.pending_manual_step()}"

    def check_source_rows(self, stage: RowStage) -> list[str]:
        """Check that the translation table has the sentences of the dataset, and return these sentences in order.

        Args:
            stage: Access to the rows whose captions are translated.

        Raises:
            ValueError: If the table has other sentences or another order, or states other languages.
        """
        table, sentences = self.read_table(), list(iter_distinct_captions(self, stage.source))
        try:
            table.check_sentences(sentences)
        except ValueError as error:
            source_digest, table_digest = stage.record["source"]["fingerprint"], table.header["id"]
            if not table_digest or table_digest == source_digest:
                raise
            raise ValueError(
                f"{error} The table was written for other data (digest {table_digest}; the data has {source_digest}). "
                "Move it to another place, and run the command again to write a new table."
            ) from error
        return sentences

    def is_corrected(self) -> bool:
        """Return True if the output contains old translations, because the translation table was changed afterwards.

        The current digest of the table is compared with the digest in the file `stage.json` of the output folder.
        """
        if self.import_file is None or not (self.output / STAGE_FILE).is_file():
            return False
        return self.known_settings()["translator"] != read_stage_record(self.output)["settings"].get("translator")

    def corrections(self) -> Corrections | None:
        """Find the output rows that must be written again because a person corrected the translation table.

        Returns:
            The changed rows and the output files that hold them. None if the table has not changed since the last run.
            Also None if a flag or the dataset has changed since then; the stage itself then raises an error.

        Raises:
            ValueError: If the table does not have the sentences of the dataset, or a sentence has no translation.
        """
        if not self.is_corrected():
            return None
        recorded, table, stage = read_stage_record(self.output), self.known_settings(), RowStage(self)
        settings = self.settings(table["translator"]) | self.image_settings()
        current = {"settings": settings, "columns": recorded["columns"]}
        record = recorded | {"settings": recorded["settings"] | table}
        if describe_record_differences(record, stage.record | current):
            # Besides the table, a flag or the dataset has changed, so the output can't be corrected. When the stage
            # runs, `write_or_check_stage_record` raises an error that lists the changes.
            return None
        # `check_source_rows` also reads the whole table, and frees its memory when it returns. The table is therefore
        # never in memory twice, although the line after it reads the table again.
        sentences = self.check_source_rows(stage)
        translations = self.read_table().translations(sentences)
        answers = {sentence: Answer(translation) for sentence, translation in translations.items()}
        columns = map_columns_to_translate(self, stage.features)
        names = [*columns, *columns.values(), f"quality-{self.language}"]
        rows, parts, written = [], [], 0
        for part in stage.parts:
            path = stage.path(part)
            old_rows = pq.read_table(path, columns=names).to_pylist() if path.is_file() else []
            new_rows = [row | build_translation_and_quality_columns(self, row, answers) for row in old_rows]
            changed = [number for number, row in enumerate(new_rows) if row != old_rows[number]]
            rows += [written + number for number in changed]
            parts += [path] if changed else []
            written += len(part) - len(read_skipped_rows(path))
        return Corrections(self.output, record, parts, rows)


class FileTranslator(Translator):
    """Translator that looks up each sentence in a translation table, a TSV file that people have filled.

    Args:
        translations: Dict `{sentence: translation}` with all sentences that may be looked up.
        fingerprint: Dict with the keys "backend" ("file"), "target" (language code) and "sha256" (digest of the table).
    """

    flags = FileFlags
    needs_table = True
    name = "a table"

    def __init__(self, translations: dict[str, str], fingerprint: dict[str, Any]):
        self.translations, self.fingerprint = translations, fingerprint

    @classmethod
    def load(cls, args: Any, stage: RowStage) -> Self:
        """Read the translation table.

        Args:
            args: Flags of `captions.translate`.
            stage: Access to the rows. The table must contain their captions.

        Returns:
            The translator, ready to translate.

        Raises:
            ValueError: If the sentences of the table are not exactly the captions of the rows, or a sentence has no
                translation.
        """
        identity, sentences = args.known_settings()["translator"], args.check_source_rows(stage)
        return cls(args.read_table().translations(sentences), identity)

    def translate(self, sentences: list[str]) -> list[str]:
        """Look up the translations of sentences, and return one translation per sentence, in order."""
        return [self.translations[sentence] for sentence in sentences]

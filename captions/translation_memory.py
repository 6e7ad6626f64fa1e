"""Store finished translations on disk, so that later runs reuse them instead of translating again."""

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from capivara_common.files import json_digest, write_json
from caption_data.sources import open_parquet
from captions.chat.answers import USAGE_FIELDS, Answer
from captions.journal import append_to_journal, read_journal
from captions.stages import atomic_parquet

# Columns of the parquet files of a translation memory: a sentence and its translation.
PAIR_SCHEMA = pa.schema({"source": pa.string(), "translation": pa.string()})
# Columns for translators such as language models, which also report the problem and the token counts of each answer.
ANSWER_SCHEMA = pa.schema([*PAIR_SCHEMA, ("fault", pa.string()), *((name, pa.int32()) for name in USAGE_FIELDS)])
MEMORY_BATCH_ROWS = 10_000  # number of sentences that are read from a file at a time, to limit the memory


class TranslationMemory:
    """Store of finished translations on disk. Several runs and processes can share it.

    `add` stores a batch of translations. While a batch is incomplete, `append` can store single answers, so that a
    killed run does not lose them.

    Args:
        folder: Folder with the translations of all translators. Each translator has a subfolder.
        fingerprint: Everything that affects a translation (translator, languages, options), except the sentence itself,
            as a dict of JSON values. It selects the subfolder.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        # Parquet files in this folder never change: `add` stores each batch as a new file.
        self.folder, self.fingerprint = folder / json_digest(fingerprint, sort_keys=True), fingerprint
        # Sentence -> answer, for answers that are stored only in the journal, and not in a parquet file yet.
        self._answers: dict[str, Answer] = {}
        # Temporary file of this process, to which `append` writes single answers until `add` stores their batch.
        self._journal = self.folder / f"{uuid.uuid4().hex}.jsonl"

    def find(self, sentences: set[str]) -> dict[str, Answer]:
        """Look up sentences, and return their stored answers as a dict `{sentence: answer}`, without token counts.

        The dict contains only sentences with a stored answer. Each call reads all files of the translator, so one call
        with many sentences is faster than many calls.
        """
        records = (record for record in self._records() if record["source"] in sentences) if sentences else ()
        return {record["source"]: Answer(record["translation"], record.get("fault")) for record in records}

    def append(self, sentence: str, answer: Answer) -> None:
        """Store a single answer at once, so that it is not lost if the process is killed.

        A later call of `add` stores the whole batch. Raises OSError if the disk is full.

        Args:
            sentence: Sentence that was translated.
            answer: The translation, with its problem and its number of tokens.
        """
        self._write_fingerprint()
        self._answers[sentence] = answer
        append_to_journal(self._journal, _build_answer_row(sentence, answer))

    def add(self, translations: dict[str, str]) -> dict[str, Answer]:
        """Store a batch of translations in a new parquet file, which is written completely or not at all.

        Args:
            translations: Dict `{sentence: translation}`.

        Returns:
            A dict `{sentence: answer}` for the given sentences. If the method `append` has stored an answer to a
            sentence before, the dict has this stored answer, with its token counts. Otherwise, the answer has only the
            given translation.

        Raises:
            OSError: If the disk is full.
        """
        self._write_fingerprint()
        schema = ANSWER_SCHEMA if self._answers else PAIR_SCHEMA
        answers = {text: self._answers.get(text, Answer(translation)) for text, translation in translations.items()}
        rows = [_build_answer_row(text, answer) for text, answer in answers.items()]
        name = hashlib.blake2b("\0".join(translations).encode(), digest_size=16).hexdigest()
        with atomic_parquet(self.folder / f"{name}.parquet", schema) as parquet:
            parquet.write_table(pa.Table.from_pylist(rows, schema=schema))
        self._answers.clear()
        self._journal.unlink(missing_ok=True)
        return answers

    def count_usage(self) -> dict[str, int]:
        """Sum up the token counts of all stored translations, over all runs that used the store.

        Returns:
            A dict with the keys "answers" (number of stored answers), "retried" (number of answers that were requested
            twice), "prompt_tokens" (number of tokens that the model has read) and "completion_tokens" (number of tokens
            that it has written).
        """
        usage = dict.fromkeys(("answers", *USAGE_FIELDS), 0)
        for record in self._records():
            usage["answers"] += 1
            for name in USAGE_FIELDS:
                usage[name] += int(record.get(name) or 0)
        return usage

    def _write_fingerprint(self) -> None:
        """Write the fingerprint of the translator to the file `translator.json`, unless this file exists."""
        if not (self.folder / "translator.json").is_file():
            write_json(self.folder / "translator.json", self.fingerprint)

    def _records(self) -> Iterator[dict[str, Any]]:
        """Iterate over all stored answers, as dicts with the keys of `PAIR_SCHEMA` or `ANSWER_SCHEMA`."""
        # Read the journals before the parquet files. If another task meanwhile replaces its journal by a parquet file,
        # its answers are then still found.
        for path in sorted(self.folder.glob("*.jsonl")):
            with suppress(FileNotFoundError):
                yield from read_journal(path)
        for path in sorted(self.folder.glob("*.parquet")):
            with open_parquet(path, ". Remove it; its sentences are then translated again") as file:
                names = [name for name in ANSWER_SCHEMA.names if name in file.schema_arrow.names]
                for batch in file.iter_batches(MEMORY_BATCH_ROWS, columns=names):
                    yield from batch.to_pylist()


def _build_answer_row(sentence: str, answer: Answer) -> dict[str, Any]:
    """Return the answer to a sentence as a dict with the keys of `ANSWER_SCHEMA`."""
    record = {"source": sentence, "translation": answer.text, "fault": answer.fault}
    return record | {name: int(getattr(answer, name)) for name in USAGE_FIELDS}

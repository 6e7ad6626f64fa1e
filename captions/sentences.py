"""The sentences of a data set, its captions each once, and their translations: in this run, and in earlier ones.

The distinct sentences of a source are one parquet file; `captions.translate` shares its rows out like those of any
other stage. What was translated joins the folder --memory, in plain parquet files that are written whole and never
changed: any number of tasks and builds add to it, without locks. What a translation was made with (back end, model,
languages, settings) names the folder inside.
"""

import contextlib
import hashlib
import io
import itertools
import logging
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capivara_common.files import write_bytes, write_json
from capivara_common.image_files import BadRow
from caption_data.rows import caption_texts, digest_of
from caption_data.sources import Split
from captions.in_place import fingerprint
from captions.stage_folder import whole_parquet

SENTENCES = "sentences.parquet"
SENTENCES_VERSION = 1
SOURCE_KEY = b"capivara_sentences"  # in the schema of the file: what it was made from
SCHEMA = pa.schema({"source": pa.string()})
PAIR_SCHEMA = pa.schema({"source": pa.string(), "translation": pa.string()})
READ_AT_ONCE = 10_000  # sentences

logger = logging.getLogger("capivara")


def distinct_sentences(source: Split, columns: list[str], parts: Iterable[range]) -> Iterator[str]:
    """The captions of some rows in their order, each once; images are not read where the form of the data allows."""
    seen: set[bytes] = set()  # digests: of tens of millions of sentences they need a tenth of the memory
    for part in parts:
        rows = itertools.islice(source.rows(part.start, only=columns), len(part))
        for row, column in ((row, column) for row in rows for column in columns):
            texts: list[str] = []
            with contextlib.suppress(BadRow):  # which every stage refuses
                texts = caption_texts(row.get(column), column)
            for sentence in filter(str.strip, texts):
                digest = hashlib.blake2b(sentence.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield sentence


class SentenceFile:
    """The distinct sentences of a source, one a row: its rows are shared out as those of a `Split`."""

    split = "sentences"

    def __init__(self, path: Path, source: Split, columns: list[str]):
        self.path, self.name, self.columns, self.damaged, self._source = path, str(path), columns, [], source
        self._fingerprint = digest_of([SENTENCES_VERSION, len(source), fingerprint(source), columns])

    def fingerprint(self) -> str:
        """Of what the sentences were collected from."""
        return self._fingerprint

    def is_there(self) -> bool:
        """Whether the file is whole and of this source."""
        return self.path.is_file() and pq.read_schema(self.path).metadata.get(SOURCE_KEY) == self._fingerprint.encode()

    def write(self, rows_per_group: int) -> None:
        """Make it, unless it is there, with so many rows in a row group."""
        for leftover in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # of a kill: one task alone writes it
            leftover.unlink()
        if self.is_there():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        schema = SCHEMA.with_metadata({SOURCE_KEY: self._fingerprint.encode()})
        found = distinct_sentences(self._source, self.columns, [range(len(self._source))])
        with whole_parquet(self.path, schema) as parquet:
            while some := list(itertools.islice(found, rows_per_group)):
                parquet.write_table(pa.table({"source": some}, schema=schema))

    def __len__(self) -> int:
        return pq.read_metadata(self.path).num_rows

    def read(self, part: range) -> list[str]:
        """Some sentences, read as the row groups that they are in."""
        with pq.ParquetFile(self.path) as file:
            ends = list(itertools.accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
            groups = [i for i, end in enumerate(ends) if end > part.start and (ends[i - 1] if i else 0) < part.stop]
            if not groups:
                return []
            first = ends[groups[0] - 1] if groups[0] else 0
            column = file.read_row_groups(groups)["source"]
        return column.slice(part.start - first, len(part)).to_pylist()


class TranslationMemory:
    """The translations of one translator, in a folder of all, that earlier runs and other tasks have made."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder, self._fingerprint = folder / digest_of(fingerprint, sort_keys=True), fingerprint

    def find(self, sentences: Iterable[str]) -> dict[str, str]:
        """Sentence -> translation, of those that are known. All files are read, so ask for many at once."""
        wanted = set(sentences)
        if not wanted:
            return {}
        return translations_in(sorted(self.folder.glob("*.parquet")), wanted)

    def add(self, translations: dict[str, str]) -> None:
        """Keep translations in a file of their own, all or none of them. Raises OSError where the disk is full."""
        if not (self.folder / "translator.json").is_file():
            write_json(self.folder / "translator.json", self._fingerprint)
        file = io.BytesIO()
        columns = {"source": list(translations), "translation": list(translations.values())}
        pq.write_table(pa.table(columns, schema=PAIR_SCHEMA), file)
        name = hashlib.blake2b("\0".join(translations).encode(), digest_size=16).hexdigest()
        write_bytes(self.folder / f"{name}.parquet", file.getvalue())


def translations_in(
    paths: Iterable[Path], wanted: Container[str] | None, damaged_are_fatal: bool = False
) -> dict[str, str]:
    """Sentence -> translation, of those that some parquet files have, all where none are named; a damaged file is left
    out with a warning, or a ValueError where that is fatal."""
    found: dict[str, str] = {}
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(READ_AT_ONCE, columns=list(PAIR_SCHEMA.names)):
                    pairs = zip(batch["source"].to_pylist(), batch["translation"].to_pylist(), strict=True)
                    found |= {
                        source: translation for source, translation in pairs if wanted is None or source in wanted
                    }
        except (pa.ArrowException, OSError, KeyError) as error:
            if damaged_are_fatal:
                raise ValueError(f"{path} can't be read: {error}. Remove it, and run again.") from error
            logger.warning("The translations in %s can't be read (%s); it is done without them.", path, error)
    return found

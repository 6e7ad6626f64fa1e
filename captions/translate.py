"""Captions translated into another language, each distinct sentence once: by a model, by Google, or elsewhere.

    python -m captions.translate --dataset data/generated --output data/pt --language pt
    python -m captions.translate --dataset data/generated --output data/xh --language xh --workers 4 \\
        --model facebook/nllb-200-distilled-600M --precision bf16
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend google
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --import yo.tsv

`captions-en` gives `captions-pt`, `generated-captions-en` gives `generated-captions-pt`, in the same order. What is
translated stays in the folder --memory and is never translated again with the same settings, whichever data set, run or
machine meets it: parquet files that are written whole and never changed; only a sentence that two tasks meet at the
same moment is translated by both. Translations that look wrong by their letters are counted and shown in
OUTPUT/quality.json, and listed in the column `quality-pt`. The same command does what is missing.
"""

import csv
import hashlib
import itertools
import json
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import regex
from datasets import List, Value
from tqdm.auto import tqdm

from capivara_common.cli import check_at_least, flag, run_command
from capivara_common.environment import require_packages
from capivara_common.files import read_json, write_json, write_text
from capivara_common.image_files import BadRow
from capivara_common.tasks import split_rows
from caption_data.rows import CAPTIONS_FEATURE, TOKEN_PATTERN, json_digest, normalize_captions
from caption_data.sources import STAGE_FILE, Split, open_parquet
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
from captions.translators import (
    GOOGLE_MAX_CHARACTERS,
    GOOGLE_MODULES,
    GoogleTranslator,
    Seq2SeqTranslator,
    check_languages,
    parse_language,
)

PAPER_MODEL = "Helsinki-NLP/opus-mt-tc-big-en-pt"  # arXiv 2310.13683; English to Portuguese alone
CAPTION_KINDS = ("captions", "generated-captions")  # the authors' names, before the language
PAIR_SCHEMA = pa.schema({"source": pa.string(), "translation": pa.string()})
MEMORY_BATCH_ROWS = 10_000  # sentences
SENTENCES_PER_ROW = 8  # that are translated between two writes, for each of `batch_rows`

TABLE_COLUMNS = ("id", "source", "translation")  # each followed by `:` and what the first line states, see `header`
MAX_NAMED_ROWS = 5  # rows without a translation that a message names; it gives the number of all
BLANK_CHARACTERS = " \xa0\u3000"  # a cell of these alone is empty to who sees it
MAX_QUOTED_CHARACTERS = 40  # letters of a sentence in an error
UNCHANGED_ROWS_HINT = (
    "The rows must be those that were written: put back what is missing, sort them by the number in the id, and open "
    "the file without a quoting sign, by which spreadsheets change a source."
)
# Beside what JSON escapes: the start of a formula, which may fetch an address or start a program; line ends of other
# systems, marks that editors drop or take for the start of a file, halves of a letter, which UTF-8 has no bytes for.
UNSAFE_CELL_RE = re.compile("^[=+@-]|[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")

QUALITY_FLAGS = ("empty", "copy", "wrong script", "length", "markup")
MAX_NAME_WORDS = 3  # so much may be a name: "Rio de Janeiro" is right in every language
MIN_SCRIPT_SHARE = 0.3  # of the letters; brands and names keep theirs, so that a Hindi caption may be half Latin
TWO_SCRIPT_LANGUAGES = ("az", "kk", "ku", "pa", "sr", "tk", "ug", "uz")  # languages that may be written in either
SCRIPT_PATTERNS = {
    "Hans": r"\p{Hani}",
    "Hant": r"\p{Hani}",
    "Jpan": r"\p{Hani}\p{Hira}\p{Kana}",
    "Kore": r"\p{Hang}\p{Hani}",
}
LETTER_RE, DENSE_SCRIPT_RE = regex.compile(r"\p{L}"), regex.compile(r"[\p{Hani}\p{Hira}\p{Kana}\p{Hang}]")
# Three times the letters, and a long word beside, say something else, and so does a third of them; "isilwane sasekhaya"
# for "cat" stays below. One sign of a dense script stands for about three letters of an alphabet.
MAX_LENGTH_RATIO, LENGTH_SLACK_LETTERS, LETTERS_PER_DENSE_SIGN = 3, 20, 3
# Character references and tags, and what translation models write when they have no word: the sign of sentencepiece for
# unknown, its mark for a blank, a letter that could not be decoded, and codes of languages.
MARKUP_RE = re.compile(
    r"&(?:[a-zA-Z][a-zA-Z0-9]{1,9}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});|</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|<!--"
    r"|\u2047|\u2581|\ufffd|>>[\w-]+<<|__[a-z]{2,3}__"
)
QUALITY_FILE = "quality.json"
EXAMPLES_PER_FLAG, MAX_EXAMPLE_CHARACTERS = 5, 200  # of a flag; letters of a sentence, which can be a book
# The column `quality-<language>`: how many captions were translated, and those that look wrong by their place in the
# source's captions.
_FLAGGED_FEATURES = {"column": Value("string"), "position": Value("int32"), "flags": List(Value("string"))}
_FLAGGED_FEATURES |= {"source": Value("string"), "translation": Value("string")}
QUALITY_FEATURES = {"captions": Value("int32"), "flagged": List(_FLAGGED_FEATURES)}

logger = logging.getLogger("capivara")


@dataclass(kw_only=True)
class TranslateArguments(StageArguments):
    """Arguments of `captions.translate`."""

    uses_model = True
    language: str = flag(..., "To translate into: pt, hi, xh, es, yo, zh-Hant, …; also the ending of the new columns.")
    source_language: str = flag("en", "Of the captions that are there.")
    backend: Literal["transformers", "google", "file"] = flag(
        "transformers",
        "transformers: a model, here. google: Google's service, for money; the key is read from GOOGLE_API_KEY. "
        "file: a table, translated elsewhere.",
    )
    memory: Path | None = flag(
        None, "Folder of translations that are never made again, of all builds; else OUTPUT.memory."
    )
    drop_flagged: bool = flag(False, "Leave out translations that look wrong; the others close up: positions change.")
    batch_size: int | None = flag(None, "Sentences that are translated at once: 32 by a model, 128 otherwise.")
    batch_rows: int = flag(
        256, "Rows that are worked on at once; after eight times as many sentences, what is translated is kept."
    )
    rows_per_part: int = flag(1024, "Rows of a file: at least what a task takes.")

    model: str | None = flag(
        None,
        "transformers: folder or Hub id of a Marian, NLLB, M2M100 or mBART-50 model; "
        f"{PAPER_MODEL}, the paper's, for en to pt where none is given.",
    )
    revision: str | None = flag(None, "transformers: branch, tag or commit of a Hub id.")
    max_new_tokens: int | None = flag(None, "transformers: tokens of a translation at most; 512 or what the model has.")
    precision: Literal["float32", "bf16", "fp16"] = flag("float32", "transformers: of weights and activations.")
    device: str | None = flag(None, "transformers: cpu or cuda; the GPU where there is one.")

    google_endpoint: str | None = flag(None, "google: another address of the service.")

    import_file: Path | None = flag(
        None, "file: the TSV of sentences; it is written where it is not there, to be filled.", aliases=["--import"]
    )
    translated_by: Literal["human", "machine"] = flag(
        "human", "file: who fills the table. The dataset card and the model card state it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("language", "source_language"):
            if not re.fullmatch(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]+)*", getattr(self, name)):
                raise ValueError(f"{name} must be a code such as pt or zh-Hant, got {getattr(self, name)!r}.")
            if (known := parse_language(getattr(self, name))) is None or not known.is_valid():
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is no code of a language. Codes are those of ISO 639, such as sw "
                    "for Swahili; a script or region may follow, as in zh-Hant."
                )
        if self.language == self.source_language:
            raise ValueError(f"language and source_language are both {self.language!r}; there is nothing to translate.")
        check_at_least(self, 1, "batch_size", "max_new_tokens")
        languages = (self.source_language, self.language)
        if self.backend == "transformers" and self.model is None and languages != ("en", "pt"):
            way_out = f"such as facebook/nllb-200-distilled-600M; {PAPER_MODEL} is for en to pt"
            raise ValueError(f"--model is needed for {self.source_language} to {self.language}, {way_out}.")
        if (self.backend == "file") != (self.import_file is not None):
            raise ValueError("--backend file needs --import FILE.tsv, which is written first; the others have none.")
        if self.backend == "google":
            require_packages("--backend google", "google", *GOOGLE_MODULES)

    def required_columns(self) -> list[str]:
        """Columns of captions in the source language, of which one must be there."""
        return [f"{kind}-{self.source_language}" for kind in CAPTION_KINDS]

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Return the columns of translations and of their quality. Raises ValueError if one is there already."""
        added = super().check_columns(columns, where)
        return [*added, *translated_columns(columns, where, self).values(), f"quality-{self.language}"]

    def known_settings(self) -> dict[str, Any]:
        """The digest of a table, with which a stage that is done is compared."""
        if self.backend != "file":
            return {}
        digest = hashlib.sha256(self.import_file.read_bytes()).hexdigest()
        return {"translator": {"backend": "file", "target": self.language, "sha256": digest}}

    def settings(self, translator: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that `stage.json` holds, given what identifies the translator."""
        settings = {"translator": translator, "language": self.language, "source_language": self.source_language}
        # `existing` is the only value that is left of a flag of earlier versions.
        return settings | {"existing": "refuse", "drop_flagged": self.drop_flagged}

    def pending_manual_step(self) -> str:
        """Say which sentences of its table have no translation yet. Raises ValueError as `check_table` does."""
        if self.import_file is None:
            return ""
        if not self.import_file.is_file():
            return "it is not there yet"
        self.check_table()
        return describe_untranslated(self.import_file)

    @property
    def translations(self) -> dict[str, str]:
        """Map the language to who translates into it, human or machine, as cards state it."""
        return {self.language: self.translated_by if self.backend == "file" else "machine"}

    def check_translator(self) -> None:
        """Raise ValueError if a model that is on this machine already does not know the languages."""
        if self.backend == "transformers":
            check_languages(self.model or PAPER_MODEL, self.revision, self.language, self.source_language)

    def check_table(self) -> None:
        """Raise ValueError if the table states other languages than these, or does not state its language.

        Tables of earlier versions state none. They are accepted if a stage beside this one was made from such a table.
        """
        stated, _ = _read_table(self.import_file)
        way_out = "Name another table, which is then written to be filled, or correct the language."
        for column, language in (("source", self.source_language), ("translation", self.language)):
            if stated.get(column) and stated[column] != language:
                raise ValueError(
                    f"{self.import_file} has its {column} in the language {stated[column]!r}, not {language!r}. "
                    f"{way_out}"
                )
        made = (read_stage_record(path.parent)["settings"] for path in self.output.parent.glob(f"*/{STAGE_FILE}"))
        expected = {"backend": "file", "target": self.language}.items()
        if not stated["translation"] and not any(expected <= (one.get("translator") or {}).items() for one in made):
            raise ValueError(
                f"{self.import_file} does not state the language of its translations: its first line must name the "
                f"column translation:{self.language}. {way_out}"
            )

    def request_manual_step(self) -> str:
        """Say what a person has to do; write the table if it does not exist.

        Raises ValueError if the table exists and holds other sentences than the source.
        """
        stage = RowStage(self)
        if not self.import_file.is_file():
            sentences = self.sentences(stage)
            write_translation_table(self.import_file, sentences, self.table_header(stage))
            counts = f"{len(sentences):,} sentences, {sum(map(len, sentences)):,} characters"
            logger.info("%s has %s. Leave its rows as they are.", self.import_file, counts)
            who = {"human": "by people (translated_by: machine says otherwise)", "machine": "by machine"}
            logger.info("The cards will say that it was translated %s.", who[self.translated_by])
        elif _read_table(self.import_file)[0]["id"] != stage.record["source"]["fingerprint"]:
            self.check_source_rows(stage)  # before somebody fills the table of another dataset
        return f"{self.import_file} has the sentences of {self.title}: {self.pending_manual_step()}"

    def table_header(self, stage: RowStage) -> list[str]:
        """Return the first line of a table: its columns, with the digest of the source and both languages."""
        stated = (stage.record["source"]["fingerprint"], self.source_language, self.language)
        return [f"{column}:{text}" for column, text in zip(TABLE_COLUMNS, stated, strict=True)]

    def sentences(self, stage: RowStage) -> list[str]:
        """Return the distinct sentences of all rows, in the order of the table."""
        return list(distinct_sentences(self, stage.source, [range(len(stage.source))]))

    def check_source_rows(self, stage: RowStage) -> list[str]:
        """Return the sentences of the source. Raises ValueError unless the rows of the table are the same ones."""
        self.check_table()
        sentences, now = self.sentences(stage), stage.record["source"]["fingerprint"]
        try:
            check_table_rows(self.import_file, sentences)
        except ValueError as error:
            there = _read_table(self.import_file)[0]["id"]
            if not there or there == now:
                raise
            raise ValueError(
                f"{error} The table was written for other data (digest {there}; the data has {now}): move it away, and "
                "a new one is written."
            ) from error
        return sentences

    def is_corrected(self) -> bool:
        """Tell whether the table is another than the one that the parts were made from."""
        if self.backend != "file" or not (self.output / STAGE_FILE).is_file():
            return False
        return self.known_settings()["translator"] != read_stage_record(self.output)["settings"].get("translator")

    def corrections(self) -> Corrections | None:
        """Compare the parts of this stage with its table; None unless the table alone has changed since.

        Raises ValueError as `read_translations` does.
        """
        if not self.is_corrected():
            return None
        there, table, stage = read_stage_record(self.output), self.known_settings(), RowStage(self)
        now = {"settings": self.settings(table["translator"]) | self.image_settings(), "columns": there["columns"]}
        record = there | {"settings": there["settings"] | table}
        if describe_differences(record, stage.record | now):
            return None  # `claim` refuses the folder and names what differs
        known = read_translation_table(self.import_file, self.check_source_rows(stage))
        columns, rows, parts, written = translated_columns(stage.features, stage.source.display_name, self), [], [], 0
        made = [*columns.values(), f"quality-{self.language}"]
        for part in split_rows(len(stage.source), self.rows_per_part):
            path, before = stage.path(part), len(rows)
            if path.is_file():
                for number, row in enumerate(pq.read_table(path, columns=[*columns, *made]).to_pylist(), written):
                    if any(row[name] != value for name, value in translate_row(self, row, columns, known).items()):
                        rows.append(number)
                parts += [path] * (len(rows) > before)
            written += len(part) - len(read_skipped_rows(path))
        return Corrections(self.output, record, parts, rows)

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Captions with their translations beside them. Raises as `read_translations` and the translators do."""
        columns, known = (
            translated_columns(stage.features, stage.source.display_name, self),
            {},
        )  # known: sentence -> translation
        sentences_of = partial(distinct_sentences, self, stage.source)
        if self.backend == "file":
            identity = self.known_settings()["translator"]
            known.update(read_translation_table(self.import_file, self.check_source_rows(stage)))
        else:
            translator = self.load_translator()
            identity = translator.fingerprint

        def prepare(parts: list[range]) -> None:
            if self.backend != "file":
                known.clear()
                known.update(translate_sentences(self, translator, set(sentences_of(parts)), shows_bar=stage.rank == 0))

        new = dict.fromkeys(columns.values(), CAPTIONS_FEATURE) | {f"quality-{self.language}": QUALITY_FEATURES}
        process = lambda rows: [translate_row(self, row, columns, known) for row in rows]  # noqa: E731
        return new, self.settings(identity), process, prepare

    def load_translator(self) -> Seq2SeqTranslator | GoogleTranslator:
        """What translates; both have `translate`, of sentences that are not blank, in order, and `fingerprint`: all
        that a translation depends on beside the sentence."""
        languages = (self.language, self.source_language)
        if self.backend == "google":
            return GoogleTranslator(*languages, self.google_endpoint)
        where, sizes = (self.revision, self.precision, self.device), (self.batch_size or 32, self.max_new_tokens)
        return Seq2SeqTranslator(self.model or PAPER_MODEL, *languages, *where, *sizes)

    def report(self, rank: int = 0, world_size: int = 1) -> None:
        """Write `quality.json`: counts over all parts, and the first examples of each flag."""
        column, kinds = f"quality-{self.language}", {name: {"captions": 0, "examples": []} for name in QUALITY_FLAGS}
        report = {"language": self.language, "rows": 0, "captions": 0, "flagged": 0, "flags": kinds}
        for path in sorted(self.output.glob("*.parquet")):
            for quality in pq.read_table(path, columns=[column])[column].to_pylist():
                report["rows"] += 1
                report["captions"] += quality["captions"]
                report["flagged"] += len(quality["flagged"])
                for one in quality["flagged"]:
                    for kind in (kinds[name] for name in one["flags"]):
                        kind["captions"] += 1
                        example = {name: one[name][:MAX_EXAMPLE_CHARACTERS] for name in ("source", "translation")}
                        kind["examples"] += [example][: EXAMPLES_PER_FLAG - len(kind["examples"])]
        write_json(self.output / QUALITY_FILE, report)


# Sentences


def translated_columns(there: Collection[str], where: str, args: TranslateArguments) -> dict[str, str]:
    """Map each column of captions to the column of its translations, by their names in the output.

    Raises ValueError if a column of translations is among the columns that are `there`.
    """
    columns = {f"{kind}-{args.source_language}": f"{kind}-{args.language}" for kind in CAPTION_KINDS}
    columns = {column: target for column, target in columns.items() if column in there}
    for name in (*columns.values(), f"similarities-{args.language}"):
        if name in there:
            raise ValueError(
                f"{where} has {name} already. Give it another name, --rename {name}=old-{name}; similarities "
                "are computed after a translation."
            )
    return columns


def distinct_sentences(args: TranslateArguments, source: Split, parts: Iterable[range]) -> Iterator[str]:
    """The captions of some rows in their order, each once; images are not read where the form of the data allows.

    Raises ValueError as `translated_columns` does.
    """
    names = {args.column_renames().get(name, name): name for name in source.columns}
    columns = [names[column] for column in translated_columns(names, source.display_name, args)]
    seen: set[bytes] = set()  # digests: of tens of millions of sentences they need a tenth of the memory
    for part in parts:
        rows = itertools.islice(source.rows(part.start, column_names=columns), len(part))
        for row, column in ((row, column) for row in rows for column in columns):
            texts: list[str] = []
            with suppress(BadRow):  # which every stage refuses
                texts = normalize_captions(row.get(column), column)
            for sentence in filter(str.strip, texts):
                digest = hashlib.blake2b(sentence.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield sentence


# Tables: sentences on their way to a translation made elsewhere, and back


def escape_cell(text: str) -> str:
    """`text` as within a string of JSON, with bare quotes: on one line, without a tab, no formula to a spreadsheet."""
    text = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    return UNSAFE_CELL_RE.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)  # all have at most four digits


def unescape_cell(text: str) -> str:
    """What `escape` was given. Raises ValueError where a backslash begins none of JSON's escapes."""
    try:
        return json.loads('"' + text.replace('"', '\\"') + '"', strict=False)
    except ValueError as error:
        raise ValueError(
            f"{text[:MAX_QUOTED_CHARACTERS]!r} has a backslash that begins no escape of JSON; write it twice"
        ) from error


def sentence_id(number: int, sentence: str) -> str:
    """Of the `number`-th sentence, from 1. It begins with a letter: spreadsheets make dates and times of the rest."""
    return f"s{number}_{hashlib.sha256(sentence.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def write_translation_table(path: Path, sentences: list[str], header: Sequence[str] = TABLE_COLUMNS) -> None:
    """Write the table to be translated, its last column empty: UTF-8, one line per sentence, nothing quoted.

    The id has the number of the sentence and a digest of its text, so that a translation can't reach another sentence.
    """
    lines = [f"{sentence_id(number, text)}\t{escape_cell(text)}\t" for number, text in enumerate(sentences, 1)]
    write_text(path, "\n".join(["\t".join(header), *lines]) + "\n")


def read_translation_table(path: Path, sentences: list[str]) -> dict[str, str]:
    """Map each sentence to its translation in a table that came back: UTF-8, byte-order mark or not, any line ends.

    Raises ValueError as `check_rows` does, or if a row has no translation.
    """
    check_table_rows(path, sentences)
    if missing := describe_untranslated(path):
        raise ValueError(f"{path}: {missing} Fill their last column.")
    return {source: row["translation"] for source, row in zip(sentences, _read_table(path)[1], strict=True)}


def check_table_rows(path: Path, sentences: list[str]) -> None:
    """Raise ValueError if a file is not a table of these sentences, each in its place, with its id and source."""
    _, rows = _read_table(path)
    for number, (row, text) in enumerate(itertools.zip_longest(rows, sentences), 1):
        expected = {"id": sentence_id(number, text), "source": text} if text is not None else {}
        if row is None or not expected or any(row.get(name, value) != value for name, value in expected.items()):
            there, wanted = (
                one and f"{one['id']} ({one.get('source', '')[:MAX_QUOTED_CHARACTERS]!r})" for one in (row, expected)
            )
            raise ValueError(
                f"{path}, line {number + 1}: {there or 'nothing'} in place of {wanted or 'nothing'}. {UNCHANGED_ROWS_HINT}"
            )


def describe_untranslated(path: Path) -> str:
    """Which rows of a table have no translation yet, in a sentence; empty where all have one.

    Raises ValueError where the file is no such table.
    """
    _, rows = _read_table(path)
    names = [
        f"line {line} ({row['id'][:MAX_QUOTED_CHARACTERS]})"
        for line, row in enumerate(rows, 2)
        if not row["translation"].strip(BLANK_CHARACTERS)
    ]
    more = f", and {len(names) - MAX_NAMED_ROWS} more" if len(names) > MAX_NAMED_ROWS else ""
    said = f"{len(names)} of {len(rows)} sentences have no translation yet: {', '.join(names[:MAX_NAMED_ROWS])}{more}."
    return said if names else ""


def _read_table(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return what the first line states for each column, and the rows. Raises ValueError if the file is no table."""
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, quoting=csv.QUOTE_NONE, na_filter=False, encoding="utf-8-sig")
        stated = {name.strip(): text.strip() for name, _, text in (str(column).partition(":") for column in table)}
        table.columns = list(stated) if len(stated) == len(table.columns) else table.columns
        rows = [
            {name: unescape_cell(cell) for name, cell in row.items()} for row in table.fillna("").to_dict("records")
        ]
    except ValueError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} can't be read: {said}. It must be UTF-8, columns apart by tabs.") from error
    if not {"id", "translation"} <= set(table):
        rule = "must name the columns id and translation, and may name source, apart by tabs"
        raise ValueError(f"The first line of {path} {rule}; it is {' '.join(map(str, table))[:80]!r}.")
    return stated, rows


# Translations


class TranslationMemory:
    """The translations of one translator, in a folder of all, that earlier runs and other tasks have made."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder, self.fingerprint = folder / json_digest(fingerprint, sort_keys=True), fingerprint

    def find(self, sentences: Iterable[str]) -> dict[str, str]:
        """Sentence -> translation, of those that are known. All files are read, so ask for many at once."""
        wanted, found = set(sentences), {}
        for path in sorted(self.folder.glob("*.parquet")) if wanted else ():
            with open_parquet(path, ". Remove it: its sentences are translated again") as file:
                for batch in file.iter_batches(MEMORY_BATCH_ROWS, columns=list(PAIR_SCHEMA.names)):
                    pairs = zip(batch["source"].to_pylist(), batch["translation"].to_pylist(), strict=True)
                    found |= {source: made for source, made in pairs if source in wanted}
        return found

    def add(self, translations: dict[str, str]) -> None:
        """Keep translations in a file of their own, all or none of them. Raises OSError where the disk is full."""
        if not (self.folder / "translator.json").is_file():
            write_json(self.folder / "translator.json", self.fingerprint)
        columns = {"source": list(translations), "translation": list(translations.values())}
        name = hashlib.blake2b("\0".join(translations).encode(), digest_size=16).hexdigest()
        with atomic_parquet(self.folder / f"{name}.parquet", PAIR_SCHEMA) as parquet:
            parquet.write_table(pa.table(columns, schema=PAIR_SCHEMA))


def translate_sentences(
    args: TranslateArguments, translator: Any, sentences: set[str], shows_bar: bool
) -> dict[str, str]:
    """Sentence -> translation. Those that are made are in the memory, however it ends."""
    folder = args.memory or args.output.with_name(args.output.name + ".memory")
    memory = TranslationMemory(folder, translator.fingerprint)
    found = memory.find(sentences)
    # The longest come first: where the memory of the device does not suffice, it shows at once.
    left = sorted(sentences - found.keys(), key=lambda text: (-len(text), text))
    limits = (sys.maxsize, SENTENCES_PER_ROW * args.batch_rows)
    if args.backend == "google":  # a request at a time, so that what was paid for is not lost when the next one fails
        limits = (GOOGLE_MAX_CHARACTERS, args.batch_size or 128)
    title = f"Translating with {translator.name}"
    with tqdm(total=len(left), desc=title, unit="sentence", leave=False, disable=not shows_bar) as bar:
        for some in batch_by_length(left, *limits):
            made = dict(zip(some, translator.translate(some), strict=True))
            memory.add(made)
            found |= made
            bar.update(len(some))
    return found


def translate_row(
    args: TranslateArguments, row: dict[str, Any], columns: dict[str, str], translations: dict[str, str]
) -> dict[str, Any]:
    """`captions-<language>`, `generated-captions-<language>` and `quality-<language>` of a row."""
    new, number, flagged = {}, 0, []
    for column, target in columns.items():
        new[target] = []
        for position, source in enumerate(row.get(column) or []):
            translation = translations[source] if source.strip() else ""
            found = find_quality_flags(source, translation, args.language)
            number += 1
            if found:
                where = {"column": target, "position": position, "flags": found}
                flagged.append(where | {"source": source, "translation": translation})
            if not (found and args.drop_flagged):
                new[target].append(translation)
    return new | {f"quality-{args.language}": {"captions": number, "flagged": flagged}}


# What looks wrong: a suspicion, not a verdict. Thresholds leave what people write alone, and catch what translators do
# when they fail; of loops they see the length.


def find_quality_flags(source: str, translation: str, language: str) -> list[str]:
    """Which of `FLAGS` a translation into `language` gets; none for one that looks right, or for a blank source."""
    if not source.strip():
        return []
    if not translation.strip() or (_has_letters(source) and not _has_letters(translation)):
        return ["empty"]
    words, letters = _split_words(source), "".join(LETTER_RE.findall(translation))
    short, long = sorted(
        len(text) + (LETTERS_PER_DENSE_SIGN - 1) * len(DENSE_SCRIPT_RE.findall(text)) for text in (source, translation)
    )
    found = {
        "copy": len(words) > MAX_NAME_WORDS and words == _split_words(translation),
        "wrong script": len(_script_pattern(language).findall(letters)) < MIN_SCRIPT_SHARE * len(letters),
        "length": long > MAX_LENGTH_RATIO * short + LENGTH_SLACK_LETTERS,
        "markup": bool(MARKUP_RE.search(translation)),
    }
    return [name for name, is_so in found.items() if is_so]


def _split_words(text: str) -> list[str]:
    return re.findall(TOKEN_PATTERN, text.lower())


def _has_letters(text: str) -> bool:
    return any(map(str.isalnum, text))


@lru_cache
def _script_pattern(language: str) -> regex.Pattern:
    """The letters of a language; all where it has none of its own."""
    known = parse_language(language)
    if known is None or (known.language in TWO_SCRIPT_LANGUAGES and not known.script):
        return LETTER_RE
    script = known.maximize().script
    letters = SCRIPT_PATTERNS.get(script, rf"\p{{{script}}}")
    return regex.compile(f"[{letters}]")


# The command


def main(argv: list[str] | None = None) -> None:
    """The command; prints what the quality report says."""
    args = run_stage_command(TranslateArguments, __doc__, argv)
    if args is not None:
        report = read_json(args.output / QUALITY_FILE)
        counts = "".join(
            f"\n{kind['captions']:12,}  {name}" for name, kind in report["flags"].items() if kind["captions"]
        )
        where = args.output / QUALITY_FILE
        print(f"{report['flagged']:,} of {report['captions']:,} translations look wrong, see {where}.{counts}")


if __name__ == "__main__":
    from captions import translate  # by its name, as other machines find it

    run_command(translate.main, resumable=True)

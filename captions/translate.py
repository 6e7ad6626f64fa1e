"""Captions translated into another language, each distinct sentence once: by a model, by Google, or elsewhere.

    python -m captions.translate --dataset data/generated --output data/pt --language pt
    python -m captions.translate --dataset data/generated --output data/xh --language xh --workers 4 \\
        --model facebook/nllb-200-distilled-600M --precision bf16
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend google
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --export yo.tsv
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --import yo.tsv

`captions-en` gives `captions-pt`, `generated-captions-en` gives `generated-captions-pt`, in the same order. What is
translated stays in the folder --memory and is never translated again with the same settings, whichever data set, run or
machine meets it: plain parquet files that are written whole and never changed, so that any number of tasks and builds
add to it; only a sentence that two tasks meet at the same moment is translated by both. Translations that look wrong
(`captions.quality`) are counted and shown in OUTPUT/quality.json, and listed in the column `quality-pt`; --drop_flagged
leaves them out. The same command does what is missing; docs/cluster.md says how to run it on a cluster.
"""

import contextlib
import hashlib
import itertools
import logging
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from capivara_common.cli import at_least, flag, run_command
from capivara_common.files import write_json, write_text
from capivara_common.image_files import BadRow
from capivara_common.tasks import Phase
from caption_data.rows import CAPTIONS, caption_texts, digest_of
from caption_data.sources import Split
from captions.quality import QUALITY, flags, quality_summary, write_quality_report
from captions.stages import RowStage, StageArguments, StageReport, groups, stage_main, stage_record, whole_parquet
from captions.translators import GOOGLE_CHARACTERS, GoogleTranslator, load

PAPER_MODEL = "Helsinki-NLP/opus-mt-tc-big-en-pt"  # arXiv 2310.13683; English to Portuguese alone
KINDS = ("captions", "generated-captions")  # the authors' names, before the language
PAIR_SCHEMA = pa.schema({"source": pa.string(), "translation": pa.string()})
READ_AT_ONCE = 10_000  # sentences
SENTENCES_PER_ROW = 8  # that are translated between two writes, for each of `batch_rows`

COLUMNS = ("id", "source", "translation")
MAX_NAMED = 5  # rows without a translation that a message names; it gives the number of all
BLANKS = " \xa0\u3000"  # a cell of these alone is empty to who sees it
SHOWN = 40  # letters of a sentence in an error
UNQUOTED = "Spreadsheets that quote a column change it: open the file without a quoting sign."
AS_THEY_WENT = "The rows must be those that were written: put back what is missing, sort them by the number in the id."
_SHORT = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_LONG = {short: text for text, short in _SHORT.items()}
# Line ends of other systems, marks that editors drop or take for the start of a file, and halves of a letter, which
# UTF-8 has no bytes for.
_RISKY = ("Cc", "Zl", "Zp", "Cs")
_FORMULA = "=+-@"  # a cell that begins so is computed, and may fetch an address or start a program

logger = logging.getLogger("capivara")


@dataclass(kw_only=True)
class TranslateArguments(StageArguments):
    """Arguments of `captions.translate`."""

    language: str = flag(..., "To translate into: pt, hi, xh, es, yo, zh-Hant, …; also the ending of the new columns.")
    source_language: str = flag("en", "Of the captions that are there.")
    backend: Literal["transformers", "google", "file"] = flag(
        "transformers",
        "transformers: a model, here. google: Google's service, for money; the key is read from "
        "GOOGLE_API_KEY, or an account from GOOGLE_APPLICATION_CREDENTIALS. file: a table, translated elsewhere.",
    )
    memory: Path | None = flag(
        None, "Folder of translations that are never made again, of all builds; else OUTPUT.memory."
    )
    existing: Literal["refuse", "append", "replace"] = flag(
        "refuse",
        "What to do with columns of the language that are there. append puts translations behind what they hold.",
    )
    drop_flagged: bool = flag(False, "Leave out translations that look wrong; the others close up: positions change.")
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
    import_file: Path | None = flag(None, "file: the TSV with its last column filled.", aliases=["--import"])

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


# Sentences


def translated_columns(source: Split, args: TranslateArguments) -> dict[str, str]:
    """Column of captions, by its name in the output -> the new one. Raises ValueError where that is there already."""
    there = [args.renamed().get(name, name) for name in source.columns]
    columns = {f"{kind}-{args.source_language}": f"{kind}-{args.language}" for kind in KINDS}
    columns = {column: target for column, target in columns.items() if column in there}
    taken = [target for target in columns.values() if target in there]
    if taken and args.existing == "refuse":
        raise ValueError(
            f"{source.where} has {', '.join(taken)} already. Say --existing append, or --existing replace."
        )
    if f"similarities-{args.language}" in there:
        raise ValueError(
            f"{source.where} has similarities-{args.language}, which would not be those of the new captions. Translate "
            "first, then score."
        )
    return columns


def distinct_sentences(args: TranslateArguments, source: Split, parts: Iterable[range]) -> Iterator[str]:
    """The captions of some rows in their order, each once; images are not read where the form of the data allows.

    Raises ValueError as `translated_columns` does.
    """
    old_names = {new: old for old, new in args.renamed().items()}
    columns = [old_names.get(column, column) for column in translated_columns(source, args)]
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


def export(args: TranslateArguments, path: Path) -> list[str]:
    """Write the table for a translation elsewhere; returns its sentences. Raises ValueError where it is there."""
    if path.exists():
        raise ValueError(f"{path} is there already, and may hold translations. Choose another --export.")
    source = RowStage(args).source
    sentences = list(distinct_sentences(args, source, [range(len(source))]))
    write_sentences(path, sentences)
    return sentences


# Tables: sentences on their way to a translation made elsewhere, and back


def escape(text: str) -> str:
    """`text` on one line, without a tab, no formula to a spreadsheet; `unescape` gives it back exactly."""

    def escaped(place: int, letter: str) -> str:
        risky = letter == "\ufeff" or unicodedata.category(letter) in _RISKY or (place == 0 and letter in _FORMULA)
        return _SHORT.get(letter) or (f"\\u{ord(letter):04x}" if risky else letter)  # all have at most four digits

    return "".join(itertools.starmap(escaped, enumerate(text)))


def unescape(text: str) -> str:
    """What `escape` was given. Raises ValueError where a backslash begins none of the five signs."""

    def unescaped(found: re.Match) -> str:
        if found[1]:
            return chr(int(found[1], 16))
        if found[0] not in _LONG:
            raise ValueError(rf"'\{found[2]}' is none of \t, \n, \r, \\ and \u with four hex digits")
        return _LONG[found[0]]

    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.?))", unescaped, text, flags=re.DOTALL)


def sentence_id(number: int, sentence: str) -> str:
    """Of the `number`-th sentence, from 1. It begins with a letter: spreadsheets make dates and times of the rest."""
    return f"s{number}_{hashlib.sha256(sentence.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def write_sentences(path: Path, sentences: list[str]) -> None:
    """The table to be translated, its last column empty: a TSV that nothing inside a caption can break.

    One line a sentence, UTF-8, and no quoting: a tab, a line break, a backslash and whatever an editor may take for one
    of them is escaped; so is the first sign of a sentence that a spreadsheet would take for a formula. The id has the
    number of the sentence and a digest of its text, so that a translation can't reach another sentence.
    """
    lines = [f"{sentence_id(number, text)}\t{escape(text)}\t" for number, text in enumerate(sentences, 1)]
    write_text(path, "\n".join(["\t".join(COLUMNS), *lines]) + "\n")


def read_translations(path: Path, sentences: list[str]) -> dict[str, str]:
    """Sentence -> translation, of a table of `sentences` that came back: UTF-8, byte-order mark or not, any line ends.

    Raises ValueError where the file is no such table, a row is not the one that stood there, or has another source, or
    rows are missing, or without a translation.
    """
    rows, ids = _rows(path), [sentence_id(number, text) for number, text in enumerate(sentences, 1)]
    for place, (line, row) in enumerate(rows):
        name, source = (ids[place], sentences[place]) if place < len(ids) else ("nothing", "")
        if row["id"] != name:
            said = f"{row['id'][:SHOWN]!r} in place of {name} ({source[:SHOWN]!r}). {AS_THEY_WENT}"
            raise ValueError(f"{path}, line {line}: {said}")
        if row.get("source", source) != source:
            said = f"the source {row['source'][:SHOWN]!r} in place of {source[:SHOWN]!r}. {UNQUOTED}"
            raise ValueError(f"{path}, line {line}: {said}")
    if len(rows) < len(ids):
        raise ValueError(f"{path} ends before {ids[len(rows)]} ({sentences[len(rows)][:SHOWN]!r}). {AS_THEY_WENT}")
    if missing := untranslated(path):
        raise ValueError(f"{path}: {missing} Fill their last column.")
    return {source: row["translation"] for source, (_, row) in zip(sentences, rows, strict=True)}


def untranslated(path: Path) -> str:
    """Which rows of a table have no translation yet, in a sentence; empty where all have one.

    Raises ValueError where the file is no such table.
    """
    rows = _rows(path)
    names = [f"line {line} ({row['id'][:SHOWN]})" for line, row in rows if not row["translation"].strip(BLANKS)]
    more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    said = f"{len(names)} of {len(rows)} sentences have no translation yet: {', '.join(names[:MAX_NAMED])}{more}."
    return said if names else ""


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line numbers, from 1, and their columns. Raises ValueError where the file or a line is broken."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is no UTF-8, line {line}: {error.reason}. Save it as UTF-8.") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    header = lines[0].split("\t")
    if len(set(header)) < len(header) or not {"id", "translation"} <= set(header):
        rule = "must name the columns id and translation, and may name source, apart by tabs"
        raise ValueError(f"The first line of {path} {rule}; it is {lines[0][:80]!r}.")
    rows = []
    for number, line in ((number, line) for number, line in enumerate(lines[1:], 2) if line):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns, the first line has {len(header)}.")
        try:
            rows.append((number, dict(zip(header, map(unescape, cells), strict=True))))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
    return rows


# Translations


class TranslationMemory:
    """The translations of one translator, in a folder of all, that earlier runs and other tasks have made."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder, self.fingerprint = folder / digest_of(fingerprint, sort_keys=True), fingerprint

    def find(self, sentences: Iterable[str]) -> dict[str, str]:
        """Sentence -> translation, of those that are known. All files are read, so ask for many at once; a damaged one
        is left out with a warning."""
        wanted, found = set(sentences), {}
        for path in sorted(self.folder.glob("*.parquet")) if wanted else ():
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(READ_AT_ONCE, columns=list(PAIR_SCHEMA.names)):
                        pairs = zip(batch["source"].to_pylist(), batch["translation"].to_pylist(), strict=True)
                        found |= {source: made for source, made in pairs if source in wanted}
            except (pa.ArrowException, OSError, KeyError) as error:
                logger.warning("The translations in %s can't be read (%s); it is done without them.", path, error)
        return found

    def add(self, translations: dict[str, str]) -> None:
        """Keep translations in a file of their own, all or none of them. Raises OSError where the disk is full."""
        if not (self.folder / "translator.json").is_file():
            write_json(self.folder / "translator.json", self.fingerprint)
        columns = {"source": list(translations), "translation": list(translations.values())}
        name = hashlib.blake2b("\0".join(translations).encode(), digest_size=16).hexdigest()
        with whole_parquet(self.folder / f"{name}.parquet", PAIR_SCHEMA) as parquet:
            parquet.write_table(pa.table(columns, schema=PAIR_SCHEMA))


class RememberingTranslator:
    """The model or the service, asked for what the memory does not know.

    Either has `translate`, of sentences that are not blank, in order, and `fingerprint`: all that a translation depends
    on beside the sentence, which the memory keeps apart.
    """

    def __init__(self, args: TranslateArguments, shows_bar: bool):
        options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
        languages = (args.language, args.source_language)
        # For Google a batch is a request, so that what was paid for is not lost when the next one fails.
        self.characters, self.at_once, self.shows_bar = GOOGLE_CHARACTERS, args.batch_size or 128, shows_bar
        if args.backend == "google":
            self.translator = GoogleTranslator(*languages, args.google_endpoint)
        else:
            self.characters, self.at_once = sys.maxsize, SENTENCES_PER_ROW * args.batch_rows
            self.translator = load(
                args.model or PAPER_MODEL, *languages, args.revision, args.precision, args.device,
                batch_size=args.batch_size or 32,
                options={name: value for name, value in options.items() if value is not None},
            )  # fmt: skip
        self.memory = TranslationMemory(args.memory_folder, self.translator.fingerprint)

    def find(self, sentences: set[str]) -> dict[str, str]:
        """Sentence -> translation. Those that are made are in the memory, however it ends."""
        found = self.memory.find(sentences)
        # The longest come first: where the memory of the device does not suffice, it shows at once.
        left = sorted(sentences - found.keys(), key=lambda text: (-len(text), text))
        title = f"Translating with {self.translator.name}"
        with tqdm(total=len(left), desc=title, unit="sentence", leave=False, disable=not self.shows_bar) as bar:
            for some in groups(left, self.characters, self.at_once):
                made = dict(zip(some, self.translator.translate(some), strict=True))
                self.memory.add(made)
                found |= made
                bar.update(len(some))
        return found


# Rows


@dataclass
class CaptionJoin:
    """Captions of some rows with their translations beside them: a `Process`."""

    args: TranslateArguments
    source: Split
    find: Callable[[set[str]], dict[str, str]] | None = None  # sentences -> all of them with their translations
    translations: dict[str, str] = field(default_factory=dict)  # of the sentences that are needed next

    def __post_init__(self) -> None:
        self.columns = translated_columns(self.source, self.args)
        self.quality = f"quality-{self.args.language}"

    def prepare(self, parts: list[range]) -> None:
        """Find the translations of some parts."""
        self.translations = self.find(set(distinct_sentences(self.args, self.source, parts)))

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`captions-<language>`, `generated-captions-<language>` and `quality-<language>` of each row."""
        return [self._new_columns(row) for row in rows]

    def _new_columns(self, row: dict[str, Any]) -> dict[str, Any]:
        new, number, flagged = {}, 0, []
        for column, target in self.columns.items():
            new[target] = list(row.get(target) or []) if self.args.existing == "append" else []
            for position, source in enumerate(row.get(column) or []):
                translation = self.translations[source] if source.strip() else ""
                found = flags(source, translation, self.args.language)
                number += 1
                if found:
                    where = {"column": target, "position": position, "flags": found}
                    flagged.append(where | {"source": source, "translation": translation})
                if not (found and self.args.drop_flagged):
                    new[target].append(translation)
        return new | {self.quality: {"captions": number, "flagged": flagged}}


def translate(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """Write the parts of one task that are missing. Raises as `RowStage`, `read_translations` and the translators."""
    stage = RowStage(args, rank, world_size)  # before the model: what is wrong with the data is said at once
    identity, digest = {"backend": "file", "target": args.language}, ""
    if args.backend == "file":
        identity["sha256"] = digest = hashlib.sha256(args.import_file.read_bytes()).hexdigest()
    if report := stage.done:
        if stage_record(args.output)["settings"]["translator"].get("sha256", digest) != digest:
            raise ValueError(
                f"{args.import_file} has changed since {args.output} was made of it. Put it back; or remove that "
                "folder and what was made from it, and run again."
            )
        return report
    join = CaptionJoin(args, stage.source)
    if args.backend == "file":
        sentences = distinct_sentences(args, stage.source, [range(len(stage.source))])
        table = read_translations(args.import_file, list(sentences))
        join.find = lambda wanted: table
    else:
        translator = RememberingTranslator(args, shows_bar=rank == 0)
        join.find, identity = translator.find, translator.memory.fingerprint
    new = dict.fromkeys(join.columns.values(), CAPTIONS) | {join.quality: QUALITY}
    settings = {"translator": identity}
    settings |= {name: getattr(args, name) for name in ("language", "source_language", "existing", "drop_flagged")}
    return stage.run(new, settings, join, "Translations of the captions", join.prepare)


def write_report(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> str:
    """Count what looks wrong."""
    return write_quality_report(args.output, args.language)


PHASES = {"rows": Phase(translate, shared=True, uses_model=True), "report": Phase(write_report)}


def ready(args: TranslateArguments) -> bool:
    """Whether there is something to run; the table for a translation elsewhere is written, or what it lacks is said."""
    if args.export:
        sentences = export(args, args.export)
        counts = f"{len(sentences):,} sentences, {sum(map(len, sentences)):,} characters"
        way_on = "Fill its last column, leave the rows as they are, and say --import in place of --export."
        logger.info("%s has %s. %s", args.export, counts, way_on)
        return False
    if args.import_file and (missing := untranslated(args.import_file)):
        logger.info("waiting: %s: %s Fill these cells, then run the same command again.", args.import_file, missing)
        return False
    return True


def main(argv: list[str] | None = None) -> None:
    """The command; prints what the quality report says."""
    args = stage_main(TranslateArguments, __doc__, argv, PHASES, ready)
    if args is not None:
        print(quality_summary(args.output))


if __name__ == "__main__":
    from captions import translate  # by its name, as other machines find it

    run_command(translate.main, resumes=True)

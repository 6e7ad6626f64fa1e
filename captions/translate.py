"""Captions translated into another language, each distinct sentence once: by a model, by Google, or elsewhere.

    python -m captions.translate --dataset data/generated --output data/pt --language pt
    python -m captions.translate --dataset data/generated --output data/xh --language xh --workers 4 \\
        --model facebook/nllb-200-distilled-600M --precision bf16
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend google \\
        --price_per_million 20 --max_cost 5
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --export yo.tsv
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --import yo.tsv

`captions-en` gives `captions-pt`, `generated-captions-en` gives `generated-captions-pt`, in the same order. First the
distinct sentences are collected and translated in OUTPUT.translations, where they are shared out like the rows of any
stage; then they are joined with the rows. Sentences that are translated stay in the folder --memory and are never
translated again with the same settings, whichever data set, run or machine meets them: plain parquet files that are
written whole and never changed, so that any number of tasks and builds add to it. Translations that look wrong
(`captions.quality`) are counted and shown in OUTPUT/quality.json, and listed in the column `quality-pt`; --drop_flagged
leaves them out. The same command does what is missing; docs/cluster.md says how to run it on a cluster.
"""

import contextlib
import hashlib
import io
import itertools
import logging
import shutil
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from capivara_common.cli import run_command
from capivara_common.environment import package_versions
from capivara_common.files import read_json, write_bytes, write_json
from capivara_common.image_files import BadRow
from capivara_common.tasks import Phase, all_parts, share
from caption_data.rows import CAPTIONS, Skipped, caption_texts, digest_of
from caption_data.sources import STAGE_FILE, Split, refuse_unfinished
from captions.in_place import fingerprint
from captions.languages import groups
from captions.quality import QUALITY, flags, quality_summary, write_quality_report
from captions.stage_arguments import GOOGLE_CHARACTERS, KINDS, PAPER_MODEL, TranslateArguments
from captions.stages import (
    PREPARED_ROWS,
    RowStage,
    StageReport,
    finished_ranks,
    finished_row_tasks,
    part_path,
    plain_record,
    remove_leftovers,
    run_stage_here,
    stage_main,
    stage_record,
    stage_source,
    whole_parquet,
    write_parts,
)
from captions.tsv import FileTranslator, read_translations, untranslated, write_sentences

SENTENCES, COST = "sentences.parquet", "cost.json"  # in OUTPUT.translations
SENTENCES_VERSION = 1
SOURCE_KEY = b"capivara_sentences"  # in the schema of the file: what it was made from
SCHEMA = pa.schema({"source": pa.string()})
PAIR_SCHEMA = pa.schema({"source": pa.string(), "translation": pa.string()})
READ_AT_ONCE = 10_000  # sentences
SENTENCES_PER_ROW = 8  # of a part and of a batch of sentences, for each row of those of the data set

logger = logging.getLogger("capivara")


def translate(args: TranslateArguments) -> bool:
    """Run all phases, or write the table for a translation elsewhere; returns whether the stage is complete."""
    if args.export:
        sentences = export(args, args.export)
        logger.info(
            "%s has %s sentences, %s characters. Fill its last column, leave the rows as they are, and run the command "
            "with --import in place of --export.",
            args.export,
            f"{len(sentences):,}",
            f"{sum(map(len, sentences)):,}",
        )
        return False
    if args.import_file:
        if missing := untranslated(args.import_file):
            logger.info("waiting: %s: %s Fill these cells, then run the same command again.", args.import_file, missing)
            return False
        if corrected_sentences(args):
            remove_made([args])
    return run_stage_here(args)


def export(args: TranslateArguments, path: Path) -> list[str]:
    """Write the table for a translation elsewhere; returns its sentences. Raises ValueError where it is there."""
    if path.exists():
        raise ValueError(f"{path} is there already, and may hold translations. Choose another --export.")
    source = RowStage(args).source
    columns = sentence_file(args, source).columns
    sentences = list(distinct_sentences(source, columns, [range(len(source))]))
    write_sentences(path, sentences)
    return sentences


# Sentences: collected by one task


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

    def __init__(self, path: Path, source: Split, columns: list[str], rows_per_part: int):
        self.path, self.name, self.columns, self.damaged, self._source = path, str(path), columns, [], source
        self.rows_per_part = rows_per_part  # of the stage, and rows of a row group here
        self._fingerprint = digest_of([SENTENCES_VERSION, len(source), fingerprint(source), columns])

    def fingerprint(self) -> str:
        """Of what the sentences were collected from."""
        return self._fingerprint

    def is_there(self) -> bool:
        """Whether the file is whole and of this source."""
        if not self.path.is_file():
            return False
        there = pq.read_metadata(self.path)
        same_size = not there.num_rows or there.row_group(0).num_rows == min(self.rows_per_part, there.num_rows)
        return same_size and (there.metadata or {}).get(SOURCE_KEY) == self._fingerprint.encode()

    def write(self) -> None:
        """Make it, unless it is there."""
        for leftover in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # of a kill: one task alone writes it
            leftover.unlink()
        if self.is_there():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        schema = SCHEMA.with_metadata({SOURCE_KEY: self._fingerprint.encode()})
        found = distinct_sentences(self._source, self.columns, [range(len(self._source))])
        with whole_parquet(self.path, schema) as parquet:
            while some := list(itertools.islice(found, self.rows_per_part)):
                parquet.write_table(pa.table({"source": some}, schema=schema))

    def __len__(self) -> int:
        return pq.read_metadata(self.path).num_rows

    def read(self, part: range | None = None) -> list[str]:
        """The sentences of a part, or all."""
        with pq.ParquetFile(self.path) as file:
            table = file.read_row_group(part.start // self.rows_per_part) if part else file.read()
        return table["source"].to_pylist()


def sentence_file(args: TranslateArguments, source: Split) -> SentenceFile:
    """The distinct sentences of the columns that are translated. Raises ValueError as `translated_columns` does."""
    old_names = {new: old for old, new in args.renamed().items()}
    columns = [old_names.get(column, column) for column in translated_columns(source, args)]
    return SentenceFile(args.work_folder / SENTENCES, source, columns, SENTENCES_PER_ROW * args.rows_per_part)


def collect_sentences(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> None:
    """The first phase, one task: write the file of distinct sentences. For Google, check key, languages and cost."""
    sentences = sentence_file(args, RowStage(args).source)
    translator = open_translator(args, sentences) if args.backend == "google" else None
    sentences.write()
    if translator is not None:
        memory = TranslationMemory(args.memory_folder, translator.fingerprint)
        texts = _missing_texts(args, sentences, 0, 1)
        characters = sum(map(len, set(texts) - memory.find(texts).keys()))
        check_cost(args, characters)
        write_json(args.work_folder / COST, {"characters": characters})


def check_cost(args: TranslateArguments, characters: int) -> None:
    """Log what the run will cost. Raises ValueError where it is more than allowed."""
    cost = characters / 1e6 * args.price_per_million
    estimate = f"{characters:,} characters to translate, about {cost:,.2f} at {args.price_per_million:g} a million"
    if cost > (args.max_cost or 0.0):
        allowed = "no --max_cost is given" if args.max_cost is None else f"--max_cost allows {args.max_cost:,.2f}"
        raise ValueError(f"{estimate}; {allowed}. Nothing was sent.")
    logger.info("%s.", estimate)


def task_characters(args: TranslateArguments, own: int, world_size: int) -> int:
    """That a task may send: its own, and its share of what --max_cost leaves over for repeated requests."""
    if not args.price_per_million:
        return sys.maxsize
    allowed = int((args.max_cost or 0.0) / args.price_per_million * 1e6)
    left = allowed - read_json(args.work_folder / COST, characters=int)["characters"]
    return own + left // world_size


# Translations: made by all tasks


class TranslationMemory:
    """The translations of one translator, in a folder of all, that earlier runs and other tasks have made."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        self.folder, self._fingerprint = folder / digest_of(fingerprint, sort_keys=True), fingerprint

    def find(self, sentences: Iterable[str]) -> dict[str, str]:
        """Sentence -> translation, of those that are known. All files are read, so ask for many at once."""
        wanted = set(sentences)
        return translations_in(sorted(self.folder.glob("*.parquet")), wanted) if wanted else {}

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
                    found |= {source: made for source, made in pairs if wanted is None or source in wanted}
        except (pa.ArrowException, OSError, KeyError) as error:
            if damaged_are_fatal:
                raise ValueError(f"{path} can't be read: {error}. Remove it, and run again.") from error
            logger.warning("The translations in %s can't be read (%s); it is done without them.", path, error)
    return found


def open_translator(args: TranslateArguments, sentences: SentenceFile) -> Any:
    """The model, the service or the table, which must have all the sentences.

    All have `translate`, of sentences that are not blank, in order, and `fingerprint`: all that a translation depends
    on beside the sentence, which the memory keeps apart.
    """
    if args.backend == "file":
        return FileTranslator(args.import_file, sentences.read(), args.language)
    from captions.translators import GoogleTranslator, load  # here: torch comes with them

    if args.backend == "google":
        return GoogleTranslator(args.language, args.source_language, args)
    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    return load(
        args.model or PAPER_MODEL,
        args.language,
        args.source_language,
        args.revision,
        args.precision,
        args.device,
        source_prefix=args.source_prefix,
        batch_size=args.sentences_at_once,
        options={name: value for name, value in options.items() if value is not None},
    )


def translate_sentences(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """The second phase: translate a share of the distinct sentences, those apart that the memory knows."""
    sentences = sentence_file(args, stage_source(args))
    texts = _missing_texts(args, sentences, rank, world_size)
    translator = open_translator(args, sentences)
    memory = TranslationMemory(args.memory_folder, translator.fingerprint)
    known, at_once, number = memory.find(texts), SENTENCES_PER_ROW * args.batch_rows, 0
    if args.backend == "google":
        translator.max_characters = task_characters(args, sum(map(len, set(texts) - known.keys())), world_size)

    def rows(part: range, skipped: list[Skipped], bar: tqdm) -> Iterator[dict[str, str]]:
        nonlocal number
        texts = sentences.read(part)
        for start in range(0, len(texts), at_once):
            batch = texts[start : start + at_once]
            made = new_translations(args, translator, memory, [text for text in batch if text not in known])
            number += len(made)
            for text in batch:
                yield {"source": text, "translation": known[text] if text in known else made[text]}
            bar.update(len(batch))

    record = _sentence_record(args, sentences) | {
        "settings": {"translator": translator.fingerprint | _earlier_table(args)},
        "columns": {name: "string" for name in PAIR_SCHEMA.names},
        "versions": package_versions(),
    }
    title = f"Translating with {translator.name}"
    report = write_parts(args.parts_folder, record, PAIR_SCHEMA, rows, title, rank, world_size)
    logger.info("%s sentences were translated now; %s has them.", f"{number:,}", args.parts_folder)
    return report


def new_translations(
    args: TranslateArguments, translator: Any, memory: TranslationMemory, sentences: list[str]
) -> dict[str, str]:
    """Sentence -> translation; they join the memory."""
    # The longest come first: where the memory of the device does not suffice, it shows at once.
    sentences, made = sorted(sentences, key=lambda sentence: (-len(sentence), sentence)), {}
    paid = args.backend == "google"
    # For Google a batch is a request, so that what was paid for is not lost when the next one fails.
    for batch in groups(sentences, GOOGLE_CHARACTERS if paid else sys.maxsize, args.sentences_at_once):
        new = dict(zip(batch, translator.translate(batch), strict=True))
        if paid:
            memory.add(new)
        made |= new
    if made and args.backend == "transformers":  # a table is kept by its owner
        memory.add(made)
    return made


def finished_sentence_tasks(args: TranslateArguments, world_size: int) -> list[int]:
    """`Phase.finished` of `translate_sentences`; removes what kills have left of parts that are there."""
    remove_leftovers(args.parts_folder)
    sentences = _collected(args)
    if sentences is None:
        return []
    return finished_ranks(args.parts_folder, _sentence_record(args, sentences), world_size)


def _collected(args: TranslateArguments) -> SentenceFile | None:
    """The sentences, where the first phase is complete."""
    try:
        sentences = sentence_file(args, stage_source(args))
    except (ValueError, OSError):  # the stage before is unfinished; any other fault is for the tasks to report
        return None
    return sentences if sentences.is_there() else None


def _sentence_record(args: TranslateArguments, sentences: SentenceFile) -> dict[str, Any]:
    return plain_record(sentences, args, sentences.rows_per_part)


def _earlier_table(args: TranslateArguments) -> dict[str, str]:
    """The digest of a table that `stage.json` has from when a corrected table was another translator."""
    if args.backend != "file" or not (args.parts_folder / STAGE_FILE).is_file():
        return {}
    there = stage_record(args.parts_folder)["settings"]["translator"]
    return {name: there[name] for name in ("sha256",) if name in there}


def _missing_texts(args: TranslateArguments, sentences: SentenceFile, rank: int, world_size: int) -> list[str]:
    """Of the parts of a task that are not there yet."""
    parts = share(all_parts(len(sentences), sentences.rows_per_part), rank, world_size)
    missing = (part for part in parts if not part_path(args.parts_folder, sentences.split, part).is_file())
    return [text for part in missing for text in sentences.read(part)]


# Corrections of a table


def corrected_sentences(args: TranslateArguments) -> int:
    """How many of the translations that were made the table has otherwise now.

    Raises ValueError where the table does not fit the sentences.
    """
    sentences = _collected(args)
    if sentences is None:
        return 0
    table = read_translations(args.import_file, sentences.read())
    made = translations_in(sorted(args.parts_folder.glob("*.parquet")), None, damaged_are_fatal=True)
    return sum(made.get(text, translation) != translation for text, translation in table.items())


def remove_made(stages: list[Any]) -> None:
    """Remove what a translation and the stages after it have made, in their order, so that it is made again.

    The translations of the first go last: a start after a kill finds the same corrections.
    """
    for args in reversed(stages):
        for folder in (args.output, getattr(args, "parts_folder", args.output)):
            if folder.is_dir():
                logger.info("Translations have changed; %s will be made again.", folder)
            for part in folder.glob("*.parquet"):
                part.unlink()
            shutil.rmtree(folder, ignore_errors=True)


# Rows: joined with their translations by all tasks


@dataclass
class CaptionJoin:
    """Captions of some rows with their translations beside them: a `Process`."""

    args: TranslateArguments
    source: Split
    columns: dict[str, str]  # of the source, by their names in the output -> new column
    translations: dict[str, str] = field(default_factory=dict)  # of the sentences that are needed next

    def prepare(self, parts: list[range]) -> None:
        """Load the translations of some parts, or of all, where they are few."""
        sentences, wanted = sentence_file(self.args, self.source), None
        if len(sentences) > PREPARED_ROWS:
            wanted = set(distinct_sentences(self.source, sentences.columns, parts))
        paths = sorted(self.args.parts_folder.glob("*.parquet"))
        self.translations = translations_in(paths, wanted, damaged_are_fatal=True)

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
        return new | {f"quality-{self.args.language}": {"captions": number, "flagged": flagged}}


def join_translations(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """The third phase: a share of the rows, with the translations of their sentences."""
    refuse_unfinished(args.parts_folder)
    stage = RowStage(args, read=False)
    columns = translated_columns(stage.source, args)
    process = CaptionJoin(args, stage.source, columns)
    new = {target: CAPTIONS for target in columns.values()} | {f"quality-{args.language}": QUALITY}
    settings = {"translator": stage_record(args.parts_folder)["settings"]["translator"]}
    settings |= {name: getattr(args, name) for name in ("language", "source_language", "existing", "drop_flagged")}
    return stage.run(new, settings, process, "Translations of the captions", rank, world_size, process.prepare)


def write_report(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> str:
    """The last phase, one task: count what looks wrong."""
    return write_quality_report(args.output, args.language)


PHASES = {
    "sentences": Phase(collect_sentences),
    "translations": Phase(translate_sentences, finished_sentence_tasks, uses_model=True),
    "rows": Phase(join_translations, finished_row_tasks),
    "report": Phase(write_report),
}


def main(argv: list[str] | None = None) -> None:
    """The command; prints what the quality report says."""
    args = stage_main(TranslateArguments, __doc__, argv, translate)
    if args is not None:
        print(quality_summary(args.output))


if __name__ == "__main__":
    run_command(main, resumes=True)

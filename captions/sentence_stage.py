"""The sentences of a translation: collected once, shared out like the rows of any stage, and kept in the memory.

`captions.translate` runs `collect_sentences` in one task and `translate_sentences` in many, then joins the translations
with the rows. All of it is in OUTPUT.translations. `remove_corrected` makes room where cells of a table have changed.
"""

import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from capivara_common.environment import package_versions
from capivara_common.files import read_json, write_json
from capivara_common.tasks import all_parts, share
from caption_data.rows import Skipped
from caption_data.sources import STAGE_FILE, Split
from captions.sentences import (
    PAIR_SCHEMA,
    SENTENCES,
    SentenceFile,
    TranslationMemory,
    distinct_sentences,
    translations_in,
)
from captions.stage_arguments import KINDS, PAPER_MODEL, StageArguments, TranslateArguments
from captions.stage_folder import (
    StageReport,
    finished_ranks,
    part_path,
    remove_leftovers,
    source_changes,
    stage_record,
)
from captions.stages import RowStage, plain_record, stage_source, write_parts
from captions.translators.google_cloud import ENDPOINT, MAX_CHARACTERS, GoogleTranslator
from captions.translators.pieces import groups
from captions.tsv import FileTranslator, read_translations

logger = logging.getLogger("capivara")

SENTENCES_PER_ROW = 8  # of a part and of a batch of sentences, for each row of those of the data set
COST = "cost.json"


class Translator(Protocol):
    """Turns sentences of one language into another."""

    name: str  # for people
    code: str  # what the translator calls the target language
    fingerprint: dict[str, Any]  # all that a translation depends on beside the sentence; the memory keeps these apart

    def translate(self, sentences: list[str]) -> list[str]:
        """One translation a sentence, in order. No sentence is blank."""
        ...


def collect_sentences(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> None:
    """The first phase, one task: write the file of distinct sentences. For Google, check key, languages and cost."""
    sentences = sentence_file(args, RowStage(args).source)
    translator = open_translator(args, sentences) if args.backend == "google" else None
    sentences.write(SENTENCES_PER_ROW * args.rows_per_part)
    if translator is not None:
        memory = TranslationMemory(args.memory_folder, translator.fingerprint)
        texts = _missing_texts(args, sentences, 0, 1)
        characters = sum(map(len, set(texts) - memory.find(texts).keys()))
        check_cost(args, characters)
        write_json(args.work_folder / COST, {"characters": characters})


def translate_sentences(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """The second phase: translate a share of the distinct sentences, those apart that the memory knows."""
    sentences = sentence_file(args, stage_source(args))
    texts = _missing_texts(args, sentences, rank, world_size)
    translator = open_translator(args, sentences)
    memory = TranslationMemory(args.memory_folder, translator.fingerprint)
    known = memory.find(texts)
    if isinstance(translator, GoogleTranslator):
        translator.max_characters = task_characters(args, sum(map(len, set(texts) - known.keys())), world_size)
    record = _sentence_record(args, sentences) | {
        "settings": {"translator": translator.fingerprint | _first_table(args)},
        "columns": {name: "string" for name in PAIR_SCHEMA.names},
        "versions": package_versions(),
    }
    process = SentenceTranslator(args, sentences, translator, memory, known)
    title = f"Translating with {translator.name}"
    report = write_parts(args.parts_folder, record, PAIR_SCHEMA, process.rows, title, rank, world_size)
    logger.info("%s sentences were translated now; %s has them.", f"{process.translated:,}", args.parts_folder)
    return report


def finished_sentence_tasks(args: TranslateArguments, world_size: int) -> list[int]:
    """`Phase.finished` of `translate_sentences`; removes what kills have left of parts that are there."""
    remove_leftovers(args.parts_folder)
    try:
        sentences = sentence_file(args, stage_source(args))
    except (ValueError, OSError):
        return []
    if not sentences.is_there():
        return []
    return finished_ranks(args.parts_folder, _sentence_record(args, sentences), world_size)


def _first_table(args: TranslateArguments) -> dict[str, str]:
    """The digest of a table that `stage.json` has from when a corrected table was another translator."""
    if args.backend != "file" or not (args.parts_folder / STAGE_FILE).is_file():
        return {}
    there = stage_record(args.parts_folder)["settings"]["translator"]
    return {name: there[name] for name in ("sha256",) if name in there}


def corrected_sentences(args: TranslateArguments) -> dict[str, str]:
    """Sentence -> its translation so far, "" for none, of those that the table has otherwise now.

    Raises ValueError where the table does not fit the sentences.
    """
    try:
        sentences = sentence_file(args, stage_source(args))
    except (ValueError, OSError):  # the stage before is unfinished; any other fault is for the tasks to report
        return {}
    if not sentences.is_there():
        return {}
    table = read_translations(args.import_file, sentences.read(range(len(sentences))))
    made = translations_in(sorted(args.parts_folder.glob("*.parquet")), None, damaged_are_fatal=True)
    return {text: made.get(text, "") for text, translation in table.items() if translation != made.get(text)}


def remove_corrected(args: TranslateArguments, corrected: dict[str, str], later: Sequence[StageArguments] = ()) -> None:
    """Remove the parts that use a corrected sentence, of this stage and of those after it: the tasks make them again.

    The translations themselves go last: a start after a kill finds the same sentences.

    Args:
        corrected: of `corrected_sentences`.
        later: the stages after this one in their order, each of which reads the one before it.
    """
    if not corrected:
        return
    columns = [f"{kind}-{args.source_language}" for kind in KINDS]
    # A stage may leave out rows without a caption. Where others are without one now, the next one's rows move up.
    moved = args.drop_flagged or not all(map(str.strip, corrected.values()))
    for number, stage in reversed(list(enumerate(later))):
        for folder in (stage.output, getattr(stage, "parts_folder", stage.output)):
            if (folder / STAGE_FILE).is_file():
                source_changes(folder)
        parts = None if moved and number else _parts_with(corrected, stage, columns)
        if parts is None:
            shutil.rmtree(stage.output, ignore_errors=True)
        elif parts:
            _remove(parts)
            shutil.rmtree(stage.output / "report", ignore_errors=True)  # of a selection
    _remove(_parts_with(corrected, args, sentence_file(args, stage_source(args)).columns) or [])
    _remove([path for path in args.parts_folder.glob("*.parquet") if translations_in([path], corrected)])


def _parts_with(corrected: dict[str, str], stage: StageArguments, columns: list[str]) -> list[Path] | None:
    """The parts of a stage that are of rows with such a sentence; None where the stage before has not all rows."""
    if not (stage.output / STAGE_FILE).is_file():
        return []
    try:
        source = stage_source(stage)
    except (ValueError, OSError):
        return None
    record, there = stage_record(stage.output), [name for name in columns if name in source.columns]
    parts = all_parts(record["source"]["rows"], record["rows_per_part"])
    found = (part for part in parts if not corrected.keys().isdisjoint(distinct_sentences(source, there, [part])))
    return [part_path(stage.output, stage.split, part) for part in found]


def _remove(parts: list[Path]) -> None:
    if parts:
        logger.info("Translations have changed; %d of the parts of %s will be made again.", len(parts), parts[0].parent)
    for path in parts:
        path.unlink(missing_ok=True)


@dataclass
class SentenceTranslator:
    """Translates the sentences of parts, but for those that are known."""

    args: TranslateArguments
    sentences: SentenceFile
    translator: Translator  # for what is not known
    memory: TranslationMemory  # of that translator; what is new joins it batch by batch
    known: dict[str, str]  # sentence -> translation
    translated: int = 0

    def rows(self, part: range, skipped: list[Skipped], bar: tqdm) -> Iterator[dict[str, str]]:
        """Of `write_parts`; no sentence is left out."""
        texts, at_once = self.sentences.read(part), SENTENCES_PER_ROW * self.args.batch_rows
        for start in range(0, len(texts), at_once):
            batch = texts[start : start + at_once]
            made = self.translations([text for text in batch if text not in self.known])
            for text in batch:
                yield {"source": text, "translation": self.known[text] if text in self.known else made[text]}
            bar.update(len(batch))

    def translations(self, missing: list[str]) -> dict[str, str]:
        """Sentence -> translation; what is new joins the memory."""
        # The longest come first: where the memory of the device does not suffice, it shows at once.
        missing, made = sorted(missing, key=lambda sentence: (-len(sentence), sentence)), {}
        paid = self.args.backend == "google"
        # For Google a batch is a request, so that what was paid for is not lost when the next one fails.
        for batch in groups(missing, MAX_CHARACTERS if paid else sys.maxsize, self.args.sentences_at_once):
            new = dict(zip(batch, self.translator.translate(batch), strict=True))
            if paid:
                self.memory.add(new)
            made |= new
            self.translated += len(batch)
        if made and self.args.backend == "transformers":  # a table is kept by its owner
            self.memory.add(made)
        return made


def sentence_file(args: TranslateArguments, source: Split) -> SentenceFile:
    """The distinct sentences of the columns that are translated. Raises ValueError as `translated_columns` does."""
    old_names = {new: old for old, new in args.renamed().items()}
    columns = [old_names.get(column, column) for column in translated_columns(source, args)]
    return SentenceFile(args.work_folder / SENTENCES, source, columns)


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


def open_translator(args: TranslateArguments, sentences: SentenceFile) -> Translator:
    """The model, the service or the table, which must have all the sentences."""
    if args.backend == "file":
        return FileTranslator(args.import_file, sentences.read(range(len(sentences))), args.language)
    if args.backend == "google":
        return GoogleTranslator(args.language, args.source_language, args, args.google_endpoint or ENDPOINT)
    from captions.translators.local import load  # here: torch comes with it

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


def _sentence_record(args: TranslateArguments, sentences: SentenceFile) -> dict[str, Any]:
    return plain_record(sentences, args, SENTENCES_PER_ROW * args.rows_per_part)


def _missing_texts(args: TranslateArguments, sentences: SentenceFile, rank: int, world_size: int) -> list[str]:
    """Of the parts of a task that are not there yet."""
    parts = share(all_parts(len(sentences), SENTENCES_PER_ROW * args.rows_per_part), rank, world_size)
    missing = (part for part in parts if not part_path(args.parts_folder, sentences.split, part).is_file())
    return [text for part in missing for text in sentences.read(part)]

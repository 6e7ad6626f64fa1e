"""Captions translated into another language, each distinct sentence once: by a model, by Google, or elsewhere.

    python -m captions.translate --dataset data/generated --output data/pt --language pt
    python -m captions.translate --dataset data/generated --output data/xh --language xh --workers 4 \\
        --model facebook/nllb-200-distilled-600M --precision bf16
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend google \\
        --price_per_million 20 --max_cost 5
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --export yo.tsv
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --import yo.tsv

`captions-en` gives `captions-pt`, `generated-captions-en` gives `generated-captions-pt`, in the same order. First the
distinct sentences are collected in OUTPUT.translations and shared out to be translated; then they are joined with the
rows. What is translated stays in the folder --memory and is never translated again with the same settings, whichever
data set, run or machine meets it: plain parquet files that are written whole and never changed, so that any number of
tasks and builds add to it. Translations that look wrong (`captions.quality`) are counted and shown in
OUTPUT/quality.json, and listed in the column `quality-pt`; --drop_flagged leaves them out. The same command does what
is missing; docs/cluster.md says how to run it on a cluster.
"""

import contextlib
import hashlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from capivara_common.cli import run_command
from capivara_common.files import read_json, write_json
from capivara_common.image_files import BadRow
from capivara_common.tasks import Phase, all_parts, share
from caption_data.rows import CAPTIONS, caption_texts, digest_of
from caption_data.sources import Split
from captions.in_place import fingerprint
from captions.languages import groups
from captions.quality import QUALITY, flags, quality_summary, write_quality_report
from captions.stage_arguments import GOOGLE_CHARACTERS, KINDS, PAPER_MODEL, TranslateArguments
from captions.stages import RowStage, StageReport, run_stage, stage_main, stage_source, whole_parquet
from captions.tsv import read_translations, untranslated, write_sentences

SENTENCES, TRANSLATOR, COST = "sentences.parquet", "translator.json", "cost.json"  # in OUTPUT.translations
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
        for path in outdated_parts(args):
            path.unlink()
    return run_stage(args, PHASES)


# Tables: what is translated elsewhere


def export(args: TranslateArguments, path: Path) -> list[str]:
    """Write the table for a translation elsewhere; returns its sentences. Raises ValueError where it is there."""
    if path.exists():
        raise ValueError(f"{path} is there already, and may hold translations. Choose another --export.")
    sentences = all_sentences(args, RowStage(args).source)
    write_sentences(path, sentences)
    return sentences


def outdated_parts(args: TranslateArguments) -> list[Path]:
    """The parts with translations that the table has otherwise now.

    Raises ValueError where the table does not fit the sentences.
    """
    if not (parts := sorted(args.output.glob("*.parquet"))):
        return []
    join = CaptionJoin.of_table(args, stage_source(args))
    return [path for path in parts if not join.agrees(path)]


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


def source_columns(args: TranslateArguments, source: Split) -> list[str]:
    """The columns that are translated, as the source names them. Raises ValueError as `translated_columns` does."""
    old_names = {new: old for old, new in args.renamed().items()}
    return [old_names.get(column, column) for column in translated_columns(source, args)]


def all_sentences(args: TranslateArguments, source: Split) -> list[str]:
    """The distinct sentences of a source, in order."""
    return list(distinct_sentences(source, source_columns(args, source), [range(len(source))]))


def collect_sentences(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> None:
    """The first phase, one task: write the file of distinct sentences. For Google, check key, languages and cost; of a
    table, whether it fits."""
    source = RowStage(args).source
    if args.backend == "file":
        read_translations(args.import_file, all_sentences(args, source))
        return
    translator = open_translator(args) if args.backend == "google" else None
    write_sentence_file(args, source)
    if translator is not None:
        texts = read_sentences(args, 0, 1)
        known = TranslationMemory(args.memory_folder, translator.fingerprint).find(texts)
        characters = sum(map(len, set(texts) - known.keys()))
        check_cost(args, characters)
        write_json(args.work_folder / COST, {"characters": characters})


def write_sentence_file(args: TranslateArguments, source: Split) -> None:
    """The distinct sentences, one a row; what tasks share out are its row groups. One of this source stays."""
    path, columns = args.work_folder / SENTENCES, source_columns(args, source)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a kill: one task alone writes it
        leftover.unlink()
    made_from = digest_of([SENTENCES_VERSION, len(source), fingerprint(source), columns]).encode()
    if path.is_file() and (pq.read_metadata(path).metadata or {}).get(SOURCE_KEY) == made_from:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = SCHEMA.with_metadata({SOURCE_KEY: made_from})
    found = distinct_sentences(source, columns, [range(len(source))])
    with whole_parquet(path, schema) as parquet:
        while some := list(itertools.islice(found, SENTENCES_PER_ROW * args.rows_per_part)):
            parquet.write_table(pa.table({"source": some}, schema=schema))


def read_sentences(args: TranslateArguments, rank: int, world_size: int) -> list[str]:
    """The sentences of a task: some neighbouring row groups."""
    with pq.ParquetFile(args.work_folder / SENTENCES) as file:
        parts = share(all_parts(file.num_row_groups, 1), rank, world_size)
        return file.read_row_groups([part.start for part in parts])["source"].to_pylist() if parts else []


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


def open_translator(args: TranslateArguments) -> Any:
    """The model or the service.

    Both have `translate`, of sentences that are not blank, in order, and `fingerprint`: all that a translation depends
    on beside the sentence, which the memory keeps apart.
    """
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
        batch_size=args.sentences_at_once,
        options={name: value for name, value in options.items() if value is not None},
    )


def noted_memory(args: TranslateArguments) -> TranslationMemory | None:
    """That of the translator which this command has opened before, without opening it."""
    path = args.work_folder / TRANSLATOR
    note = read_json(path, command=str, fingerprint=dict) if path.is_file() else {}
    same = note.get("command") == args.command()
    return TranslationMemory(args.memory_folder, note["fingerprint"]) if same else None


def translate_sentences(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> str:
    """The second phase: translate a share of the distinct sentences, those apart that the memory knows."""
    if args.backend == "file" or RowStage(args).done:
        return "nothing to do"
    texts, memory = read_sentences(args, rank, world_size), noted_memory(args)
    if memory is not None and memory.find(texts).keys() == set(texts):
        return "all is translated"
    translator = open_translator(args)
    memory = TranslationMemory(args.memory_folder, translator.fingerprint)
    write_json(args.work_folder / TRANSLATOR, {"command": args.command(), "fingerprint": translator.fingerprint})
    known = memory.find(texts)
    texts = [text for text in texts if text not in known]
    if args.backend == "google":
        translator.max_characters = task_characters(args, sum(map(len, texts)), world_size)
    at_once, paid = SENTENCES_PER_ROW * args.batch_rows, args.backend == "google"
    title = f"Translating with {translator.name}"
    with tqdm(total=len(texts), desc=title, unit="sentence", disable=rank > 0) as bar:
        for start in range(0, len(texts), at_once):
            # The longest come first: where the memory of the device does not suffice, it shows at once.
            some, made = sorted(texts[start : start + at_once], key=lambda text: (-len(text), text)), {}
            # For Google a batch is a request, so that what was paid for is not lost when the next one fails.
            for batch in groups(some, GOOGLE_CHARACTERS if paid else sys.maxsize, args.sentences_at_once):
                made |= zip(batch, translator.translate(batch), strict=True)
                if paid:
                    memory.add(made)
                    made = {}
            if made:
                memory.add(made)
            bar.update(len(some))
    return f"{len(texts):,} sentences were translated; {memory.folder} has them"


# Rows: joined with their translations by all tasks


@dataclass
class CaptionJoin:
    """Captions of some rows with their translations beside them: a `Process`."""

    args: TranslateArguments
    source: Split
    find: Callable[[Iterable[str]], dict[str, str]]  # sentences -> those with a translation
    translations: dict[str, str] = field(default_factory=dict)  # of the sentences that are needed next

    def __post_init__(self) -> None:
        self.columns = translated_columns(self.source, self.args)
        self.quality = f"quality-{self.args.language}"

    @classmethod
    def of_table(cls, args: TranslateArguments, source: Split) -> "CaptionJoin":
        """With the translations of a table. Raises ValueError where it does not fit the sentences."""
        table = read_translations(args.import_file, all_sentences(args, source))
        return cls(args, source, lambda wanted: table, table)

    def prepare(self, parts: list[range]) -> None:
        """Load the translations of some parts."""
        wanted = set(distinct_sentences(self.source, source_columns(self.args, self.source), parts))
        self.translations = self.find(wanted)
        if missing := wanted - self.translations.keys():
            raise ValueError(f"{len(missing):,} sentences have lost their translation. Run the same command again.")

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

    def agrees(self, part: Path) -> bool:
        """Whether a part has the translations that it would be given now, behind those that it was given before."""
        targets = [*self.columns.values()]
        for row in pq.read_table(part, columns=[*self.columns, *targets, self.quality]).to_pylist():
            new = self._new_columns({name: row[name] for name in self.columns})
            ends = all(row[name][len(row[name]) - len(new[name]) :] == new[name] for name in targets)
            if not ends or row[self.quality] != new[self.quality]:
                return False
        return True


def join_translations(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """The third phase: a share of the rows, with the translations of their sentences."""
    stage = RowStage(args, rank, world_size)
    if report := stage.done:
        return report
    if args.backend == "file":  # its cells are no setting: any of them may be corrected
        join, translator = CaptionJoin.of_table(args, stage.source), {"backend": "file", "target": args.language}
    else:
        memory = noted_memory(args)
        join, translator = CaptionJoin(args, stage.source, memory.find), memory.fingerprint
    new = dict.fromkeys(join.columns.values(), CAPTIONS) | {join.quality: QUALITY}
    settings = {"translator": translator}
    settings |= {name: getattr(args, name) for name in ("language", "source_language", "existing", "drop_flagged")}
    return stage.run(new, settings, join, "Translations of the captions", join.prepare)


def write_report(args: TranslateArguments, rank: int = 0, world_size: int = 1) -> str:
    """The last phase, one task: count what looks wrong."""
    return write_quality_report(args.output, args.language)


PHASES = {
    "sentences": Phase(collect_sentences),
    "translations": Phase(translate_sentences, shared=True, uses_model=True),
    "rows": Phase(join_translations, shared=True),
    "report": Phase(write_report),
}


def main(argv: list[str] | None = None) -> None:
    """The command; prints what the quality report says."""
    args = stage_main(TranslateArguments, __doc__, argv, translate)
    if args is not None:
        print(quality_summary(args.output))


if __name__ == "__main__":
    from captions import translate  # by its name, as other machines find it

    run_command(translate.main, resumes=True)

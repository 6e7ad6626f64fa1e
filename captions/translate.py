"""Captions translated into another language, each distinct sentence once: by a model, by Google, or elsewhere.

    python -m captions.translate --dataset data/generated --output data/pt --language pt
    python -m captions.translate --dataset data/generated --output data/xh --language xh \\
        --model facebook/nllb-200-distilled-600M --precision bf16 --shard 0/4
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend google \\
        --price_per_million 20 --max_cost 5
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --export yo.tsv
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --import yo.tsv

`captions-en` gives `captions-pt`, `generated-captions-en` gives `generated-captions-pt`, in the same order. Sentences
that are translated stay in the folder --memory and are never translated again with the same settings, whichever
data set, run or machine meets them. Translations that look wrong (`captions.quality`) are counted and shown in
OUTPUT/quality.json, and listed in the column `quality-pt`; --drop_flagged leaves them out. The same command goes on
where it ended.
"""

from common.start import start_command

if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
    start_command("captions.translate_arguments:TranslateArguments", __doc__)

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from caption_data.columns import CAPTIONS
from caption_data.sources import Source
from caption_data.stage_folder import all_parts, part_path, unfinished
from captions.memory import TranslationMemory, merge
from captions.quality import flags
from captions.quality_report import QUALITY, write_quality_report
from captions.sentences import distinct_sentences, sentences_of, unknown_characters
from captions.stages import Shard, StageReport, run_stage, stage_source
from captions.translate_arguments import PAPER_MODEL, TranslateArguments
from captions.translators import Translator
from captions.translators.google_cloud import ENDPOINT, MAX_CHARACTERS, GoogleTranslator, Limits
from captions.translators.pieces import groups
from captions.translators.tsv_file import FileTranslator
from captions.tsv import write_sentences
from common.cli import parse, run_command

logger = logging.getLogger("capivara")

KINDS = ("captions", "generated-captions")  # the authors' names, before the language


class CaptionTranslator:
    """The `process` of `run_stage`: captions of some rows, looked up in the memory, the rest translated.

    Args:
        args: of the command.
        columns: column of the source -> new column.
        translator: for what the memory does not know.
        memory: of that translator.
    """

    def __init__(
        self, args: TranslateArguments, columns: dict[str, str], translator: Translator, memory: TranslationMemory
    ):
        self.args, self.columns, self.translator, self.memory = args, columns, translator, memory
        self.translated = 0  # sentences

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`captions-<language>`, `generated-captions-<language>` and `quality-<language>` of each row."""
        sentences = itertools.chain.from_iterable(sentences_of(row, list(self.columns)) for row in rows)
        translations = self.translations(sentences)
        return [self._new_columns(row, translations) for row in rows]

    def translations(self, sentences: Iterable[str]) -> dict[str, str]:
        """Sentence -> translation; what is new joins the memory batch by batch.

        The longest come first: where the memory of the device does not suffice, it shows at once.
        """
        distinct = dict.fromkeys(sentences)
        known = self.memory.find(distinct)
        missing = sorted(distinct.keys() - known.keys(), key=lambda sentence: (-len(sentence), sentence))
        # For Google a batch is a request, so that what was paid for is not lost when the next one fails.
        characters = MAX_CHARACTERS if self.args.backend == "google" else sys.maxsize
        for batch in groups(missing, self.args.sentences_at_once, characters):
            made = dict(zip(batch, self.translator.translate(batch), strict=True))
            self.memory.add(made)
            known |= made
            self.translated += len(batch)
        return known

    def _new_columns(self, row: dict[str, Any], translations: dict[str, str]) -> dict[str, Any]:
        new, number, flagged = {}, 0, []
        for column, target in self.columns.items():
            new[target] = list(row.get(target) or []) if self.args.existing == "append" else []
            for position, source in enumerate(row.get(column) or []):
                translation = translations[source] if source.strip() else ""
                found = flags(source, translation, self.args.language)
                number += 1
                if found:
                    place = {"column": target, "position": position, "flags": found}
                    flagged.append(place | {"source": source, "translation": translation})
                if not (found and self.args.drop_flagged):
                    new[target].append(translation)
        return new | {f"quality-{self.args.language}": {"captions": number, "flagged": flagged}}


def translate(args: TranslateArguments) -> StageReport | None:
    """Write the parts of this shard, or the table for a translation elsewhere.

    Raises:
        ValueError: the data set lacks the captions or has what would be written, the translator does not know a
            language, the table or the allowed cost does not suffice, or the folders are of something else.
        OSError: the disk is full, or Google can't be reached; what is done stays, and the same command goes on.
    """
    source = stage_source(args)
    columns = translated_columns(source, args)
    old_names = {new: old for old, new in args.renamed().items()}
    in_source = [old_names.get(column, column) for column in columns]
    every_part, shard = all_parts(len(source), args.rows_per_part), Shard.of(args.shard)
    if args.export:
        export(args.export, distinct_sentences(source, in_source, every_part))
        return None
    if args.import_file:  # a table has the sentences of all shards
        sentences = list(distinct_sentences(source, in_source, every_part))
        translator = FileTranslator(args.import_file, sentences, args.language)
    else:
        translator = open_translator(args, shard)
    with TranslationMemory(args.memory_folder, shard.index, shard.count, translator.fingerprint) as memory:
        process = CaptionTranslator(args, columns, translator, memory)
        if isinstance(translator, GoogleTranslator):
            mine = shard.of_parts(every_part)
            parts = [part for part in mine if not part_path(args.output, args.split, part).is_file()]
            check_cost(args, shard, unknown_characters(distinct_sentences(source, in_source, parts), memory))
        new = {target: CAPTIONS for target in columns.values()} | {f"quality-{args.language}": QUALITY}
        names = ("language", "source_language", "existing", "drop_flagged")
        settings = {"translator": translator.fingerprint} | {name: getattr(args, name) for name in names}
        report = run_stage(args, new, settings, process, f"Translating with {translator.name}")
    logger.info("%s sentences were translated now; %s has them.", f"{process.translated:,}", args.memory_folder)
    if shard.count > 1:
        merge_if_last(args)
    return report


def translated_columns(source: Source, args: TranslateArguments) -> dict[str, str]:
    """Column of captions, by its name in the output -> the new one.

    Raises:
        ValueError: there is none, or a new one is there already and `existing` does not say what to do.
    """
    there = [args.renamed().get(name, name) for name in source.columns]
    columns = {f"{kind}-{args.source_language}": f"{kind}-{args.language}" for kind in KINDS}
    columns = {column: target for column, target in columns.items() if column in there}
    if not columns:
        raise ValueError(
            f"{source.where} has none of {', '.join(kind + '-' + args.source_language for kind in KINDS)}; there are "
            f"{there}. --rename caption=captions-{args.source_language} gives a column that name."
        )
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


def open_translator(args: TranslateArguments, shard: Shard) -> Translator:
    """The model or the service."""
    if args.backend == "google":
        # Of several shards none may spend what another needs; without a price there is nothing to spend.
        share = (args.max_cost or 0.0) / shard.count
        characters = int(share / args.price_per_million * 1e6) if args.price_per_million else sys.maxsize
        limits = Limits(characters, args.characters_per_second, args.max_tries, args.first_wait_s, args.timeout_s)
        return GoogleTranslator(args.language, args.source_language, limits, args.google_endpoint or ENDPOINT)
    from captions.translators.local import load

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


def export(path: Path, sentences: Iterable[str]) -> None:
    """The table for a translation elsewhere.

    Raises:
        ValueError: the file is there: it may hold translations.
    """
    if path.exists():
        raise ValueError(f"{path} is there already, and may hold translations. Choose another --export.")
    sentences = list(sentences)
    write_sentences(path, sentences)
    logger.info(
        "%s has %s sentences, %s characters. Fill its last column, leave the rows as they are, and run the command "
        "with --import in place of --export.",
        path,
        f"{len(sentences):,}",
        f"{sum(map(len, sentences)):,}",
    )


def check_cost(args: TranslateArguments, shard: Shard, characters: int) -> None:
    """Say what the run will cost.

    Raises:
        ValueError: it is more than allowed.
    """
    cost, share = characters / 1e6 * args.price_per_million, (args.max_cost or 0.0) / shard.count
    of_shard = f" for shard {shard.index} of {shard.count}" if shard.count > 1 else ""
    estimate = (
        f"{characters:,} characters to translate{of_shard}, about {cost:,.2f} at {args.price_per_million:g} a million"
    )
    if cost > share:
        allowed = "no --max_cost is given" if args.max_cost is None else f"--max_cost allows {share:,.2f}{of_shard}"
        raise ValueError(f"{estimate}; {allowed}. Nothing was sent.")
    logger.info("%s.", estimate)


def merge_if_last(args: TranslateArguments) -> None:
    """Merge the memory's files where no shard has anything left to do; else say how."""
    if not unfinished(args.output):
        with contextlib.suppress(ValueError):  # another shard is at its end, too, and will do it
            merged = merge(args.memory_folder)
            logger.info("%d files of the memory are merged: %s translations.", merged.files, f"{merged.translations:,}")
            return
    logger.info("Other shards are at work. After the last: python -m captions.memory %s", args.memory_folder)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        args = parse(TranslateArguments, __doc__, argv)
        report = translate(args)
        summary = report and write_quality_report(args.output, args.language)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    if report:
        print(f"{args.output}: {report}")
        print(summary)


if __name__ == "__main__":
    run_command(main, resumes=True)

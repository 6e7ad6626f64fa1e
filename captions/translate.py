"""Captions translated into another language, each distinct sentence once: by a model, by Google, or elsewhere.

    python -m captions.translate --dataset data/generated --output data/pt --language pt
    python -m captions.translate --dataset data/generated --output data/xh --language xh --workers 4 \\
        --model facebook/nllb-200-distilled-600M --precision bf16
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend google \\
        --price_per_million 20 --max_cost 5
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --export yo.tsv
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --import yo.tsv

`captions-en` gives `captions-pt`, `generated-captions-en` gives `generated-captions-pt`, in the same order. First the
distinct sentences are collected and translated in OUTPUT.translations, then they are joined with the rows. Sentences
that are translated stay in the folder --memory and are never translated again with the same settings, whichever
data set, run or machine meets them. Translations that look wrong (`captions.quality`) are counted and shown in
OUTPUT/quality.json, and listed in the column `quality-pt`; --drop_flagged leaves them out. The same command does what
is missing; docs/cluster.md says how to run it on a cluster.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capivara_common.cli import run_command
from caption_data.rows import CAPTIONS
from caption_data.sources import Split, refuse_unfinished
from captions.quality import QUALITY, flags, quality_summary, write_quality_report
from captions.sentence_stage import (
    collect_sentences,
    corrected_sentences,
    finished_sentence_tasks,
    remove_corrected,
    sentence_file,
    translate_sentences,
    translated_columns,
)
from captions.sentences import distinct_sentences, translations_in
from captions.stage_arguments import TranslateArguments
from captions.stage_folder import StageReport, stage_record
from captions.stages import PREPARED_ROWS, Phase, RowStage, finished_row_tasks, run_stage_here, stage_main
from captions.tsv import untranslated, write_sentences

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
        remove_corrected(args, corrected_sentences(args))
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

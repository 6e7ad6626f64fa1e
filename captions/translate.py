r"""Translate captions with a model on this machine, Google's service, a language model on a server, or people.

    python -m captions.translate --dataset data/generated --output data/pt --language pt
    python -m captions.translate --dataset data/generated --output data/xh --language xh --workers 4 \
        --model facebook/nllb-200-distilled-600M --precision bf16
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend google
    python -m captions.translate --dataset data/generated --output data/hi --language hi --backend chat \
        --base_url http://localhost:8000/v1 --model Qwen/Qwen3-8B
    python -m captions.translate --dataset data/generated --output data/yo --language yo --backend file --import yo.tsv

With `--language pt`, the column `captions-en` is translated to `captions-pt`, and `generated-captions-en` to
`generated-captions-pt`. The order of the captions stays the same. Translations that look wrong are listed in the column
`quality-pt` and counted in OUTPUT/quality.json.

Finished translations are stored in the folder `--memory`, and later runs with the same settings reuse them. To finish
an interrupted run, run the same command again.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from capivara_common.cli import check_at_least, flag, run_main_and_report_user_errors
from capivara_common.files import write_json
from caption_data.rows import CAPTIONS_FEATURE
from captions.chat.answers import Answer
from captions.languages import parse_language
from captions.quality import QUALITY_FILE, QUALITY_FLAGS, count_and_iter_row_qualities, summarize_quality_file
from captions.sentences import (
    CAPTION_KINDS,
    QUALITY_FEATURES,
    build_translation_and_quality_columns,
    iter_distinct_captions,
    map_columns_to_translate,
)
from captions.stages import RowStage, StageArguments, iter_length_limited_batches, read_stage_record, run_stage_command
from captions.translation_memory import TranslationMemory
from captions.translators import TRANSLATORS
from captions.translators.base import Translator
from captions.translators.seq2seq import PAPER_MODEL

EXAMPLES_PER_FLAG = 5  # number of example translations in quality.json for each quality flag (kind of problem)
MAX_EXAMPLE_CHARACTERS = 200  # longer sentences are shortened in the examples of quality.json


@dataclass(kw_only=True)
class TranslateArguments(*(translator.flags for translator in TRANSLATORS.values()), StageArguments):
    """Command-line arguments of `captions.translate`, which translates the captions of a dataset.

    The class also has the methods that run the command, which is one stage (step) of building a caption dataset.
    """

    uses_model = True
    language: str = flag(
        ..., "Code of the target language, such as pt, hi or zh-Hant; also the end of the names of the new columns."
    )
    source_language: str = flag("en", "Code of the language of the existing captions.")
    backend: str = flag(
        "transformers",
        "Translator. transformers: a model on this machine. google: Google Cloud Translation, which costs money; "
        "the key comes from the environment variable GOOGLE_API_KEY. file: a table that people fill. chat: a language "
        "model on a server that speaks OpenAI's protocol.",
        choices=list(TRANSLATORS),
    )
    model: str | None = flag(
        None,
        "With --backend transformers: folder or Hub id of a Marian, NLLB, M2M100 or mBART-50 model. For en to pt, the "
        f"default is {PAPER_MODEL}, the model of the CAPIVARA authors. With chat: name of the model on the server.",
    )
    memory: Path | None = flag(
        None, "Folder of finished translations; several builds can share it. Default: OUTPUT.memory."
    )
    drop_flagged: bool = flag(
        False,
        "Drop translations that look wrong. The n-th translation of an image may then not belong to its n-th caption.",
    )
    batch_size: int | None = flag(
        None, "Sentences to translate at the same time. Default: 32 with --backend transformers, 128 with google."
    )
    batch_rows: int = flag(
        256,
        "Rows to process at the same time. New translations are saved after eight times this number of captions. "
        "With --backend google, they are saved after --batch_size captions. With chat, each answer is saved at once.",
    )
    rows_per_part: int = flag(1024, "Rows per output file.")

    @property
    def backend_type(self) -> type[Translator]:
        """Class of the translator: the model, service or table that translates, as the flag `backend` says."""
        return TRANSLATORS[self.backend]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("language", "source_language"):
            if not re.fullmatch(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]+)*", getattr(self, name)):
                raise ValueError(f"{name} must be a code such as pt or zh-Hant, got {getattr(self, name)!r}.")
            parsed = parse_language(getattr(self, name))
            if parsed is None or not parsed.is_valid():
                raise ValueError(
                    f"{name} must be an ISO 639 language code, such as sw for Swahili, optionally with script or "
                    f"region, such as zh-Hant, got {getattr(self, name)!r}."
                )
        if self.language == self.source_language:
            raise ValueError(f"language and source_language must differ, got {self.language!r} for both.")
        check_at_least(self, 1, "batch_size", "max_new_tokens")
        if self.backend_type.needs_table != (self.import_file is not None):
            raise ValueError("--backend file requires --import FILE.tsv. With another --backend, remove --import.")
        self.backend_type.check_flags(self)

    def required_columns(self) -> list[str]:
        """Return the names of the columns with captions in the source language, for example "captions-en".

        The dataset must have at least one of these columns.
        """
        return [f"{kind}-{self.source_language}" for kind in CAPTION_KINDS]

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Check that the dataset has captions to translate and no translations yet, and return the new columns.

        Args:
            columns: Names of the columns of the dataset, after the renaming with the flag `rename`.
            where: Name of the dataset, for error messages.

        Returns:
            The names of the new columns: the translations, and `quality-<language>`, which lists translations that look
            wrong.

        Raises:
            ValueError: If the dataset has no captions in the source language, or already has translations or
                similarities in the target language.
        """
        added = super().check_columns(columns, where)
        translated = map_columns_to_translate(self, columns).values()
        for name in (*translated, f"similarities-{self.language}"):
            if name in columns:
                raise ValueError(
                    f"{where} already has the column {name}, but the translation or a later stage creates this column. "
                    f"Rename the old column with --rename {name}=old-{name}."
                )
        return [*added, *translated, f"quality-{self.language}"]

    def settings(self, translator: dict[str, Any]) -> dict[str, Any]:
        """Return everything that determines the translations, as a dict `{"name": value}`.

        A later run continues an output folder only if its settings are equal to this dict.

        Args:
            translator: Fingerprint of the translator: a dict with everything that affects a translation, except the
                sentence itself.
        """
        settings = {"translator": translator, "language": self.language, "source_language": self.source_language}
        # The key `existing` has no effect any more. Without it, output folders of earlier versions, which have the key,
        # would count as written with other settings.
        return settings | {"existing": "refuse", "drop_flagged": self.drop_flagged}

    @property
    def translations(self) -> dict[str, str]:
        """Who translates the captions, as a dict `{target language: "human" or "machine"}`.

        The dataset card, and the cards of models that are trained on the dataset, contain this information.
        """
        return {self.language: "machine" if self.import_file is None else self.translated_by}

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Load the translator, for example a model or a table of translations that people have filled.

        Args:
            stage: Access to the rows whose captions are translated.

        Returns:
            The tuple (columns, settings, process, prepare) for the method `RowStage.run`: the types of the new columns,
            the settings to record, a function that returns the new columns of a list of rows, and a function that
            translates the captions of several output files in advance.

        Raises:
            ValueError, OSError, ImportError: If the translator can't be loaded, or the table is incomplete.
        """
        translator = self.backend_type.load(self, stage)
        answers: dict[str, Answer] = {}  # sentence -> its translation, only for the rows that are processed next

        def prepare(parts: list[range]) -> None:
            sentences = set(iter_distinct_captions(self, stage.source, parts))
            answers.clear()
            answers.update(self._translate_with_memory(translator, sentences, shows_bar=stage.rank == 0))

        def process(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [build_translation_and_quality_columns(self, row, answers) for row in rows]

        columns = dict.fromkeys(map_columns_to_translate(self, stage.features).values(), CAPTIONS_FEATURE)
        columns[f"quality-{self.language}"] = QUALITY_FEATURES
        return columns, self.settings(translator.fingerprint), process, prepare

    def _open_memory(self, fingerprint: dict[str, Any]) -> TranslationMemory:
        """Open the translation memory (stored translations) of a translator.

        Args:
            fingerprint: Everything that affects a translation, except the sentence itself, as a dict.
        """
        return TranslationMemory(self.memory or self.output.with_name(self.output.name + ".memory"), fingerprint)

    def _translate_with_memory(self, translator: Translator, sentences: set[str], shows_bar: bool) -> dict[str, Answer]:
        """Return the translations of sentences. A sentence without a stored translation is translated now.

        New translations are stored in the translation memory after each batch, so that they are not lost if a later
        batch fails.

        Args:
            translator: The translator.
            sentences: Sentences to translate; none may be blank.
            shows_bar: Show a progress bar.

        Returns:
            A dict `{sentence: answer}`. An answer holds the translation, and its fault if it is not usable.
        """
        # Translate the longest sentences first, because they need the most memory. If the memory is insufficient, the
        # error then appears at the start instead of after hours.
        missing = sorted(sentences, key=lambda text: (-len(text), text))
        if translator.needs_table:
            return dict(zip(missing, map(Answer, translator.translate(missing)), strict=True))
        memory = self._open_memory(translator.fingerprint)
        # A sentence is translated twice only if two tasks need it at the same moment.
        answers = memory.find(sentences)
        missing = [sentence for sentence in missing if sentence not in answers]
        max_sentences, max_characters = translator.batch_limits(self)
        title = f"Translating with {translator.name}"
        with tqdm(total=len(missing), desc=title, unit="sentence", leave=False, disable=not shows_bar) as bar:

            def save(sentence: str, answer: Answer) -> None:
                # Store each answer at once, so that a killed run loses only unanswered requests.
                memory.append(sentence, answer)
                bar.update()
                bar.set_postfix_str(translator.describe_usage(), refresh=False)

            translator.on_answer, done = save, 0
            for batch in iter_length_limited_batches(missing, max_characters, max_sentences):
                answers |= memory.add(dict(zip(batch, translator.translate(batch), strict=True)))
                done += len(batch)
                bar.update(done - bar.n)
        return answers

    def report(self, rank: int = 0, world_size: int = 1) -> None:
        """Write the file `quality.json`: how many translations look wrong, and a few examples of each problem.

        Args:
            rank: Index of the task (process). It is not used, because a single task writes the file.
            world_size: Number of tasks. It is not used.
        """
        flag_reports = {name: {"captions": 0, "examples": []} for name in QUALITY_FLAGS}
        report = {"language": self.language, "rows": 0, "captions": 0, "flagged": 0, "flags": flag_reports}
        for quality in count_and_iter_row_qualities(report, self.output, f"quality-{self.language}"):
            for caption in quality["flagged"]:
                example = {name: caption[name][:MAX_EXAMPLE_CHARACTERS] for name in ("source", "translation")}
                for flag_report in (flag_reports[name] for name in caption["flags"]):
                    flag_report["captions"] += 1
                    if len(flag_report["examples"]) < EXAMPLES_PER_FLAG:
                        flag_report["examples"].append(example)
        if self.backend_type.counts_tokens:
            fingerprint = read_stage_record(self.output)["settings"]["translator"]
            report |= {"translator": fingerprint, "usage": self._open_memory(fingerprint).count_usage()}
        write_json(self.output / QUALITY_FILE, report)


def main(argv: list[str] | None = None) -> None:
    """Run the command: translate the captions of a dataset.

    After a complete run, the command prints how many translations look wrong, for each kind of problem.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = run_stage_command(TranslateArguments, __doc__, argv)
    if args is not None:
        print(summarize_quality_file(args.output / QUALITY_FILE, "translations"))


if __name__ == "__main__":
    # When this file runs as a command, its classes belong to the module `__main__`, and other processes can't unpickle
    # them. Import the file again under its own name to avoid this.
    from captions import translate

    run_main_and_report_user_errors(translate.main, resumable=True)

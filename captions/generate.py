"""Generate captions of images, with BLIP-2 on this machine or with a model on a server.

    python -m captions.generate --dataset data/images --output data/generated
    python -m captions.generate --dataset data/images --output data/generated --precision fp16 --workers 4
    python -m captions.generate --dataset data/images --output data/generated --captioner chat \
        --base_url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct --caption_language pt

BLIP-2 (`--captioner blip2`) writes English captions to the column `generated-captions-en`, one per prefix. A model on a
server (`--captioner chat`) writes captions directly in the language `--caption_language`, one per prompt, for example
to the column `generated-captions-pt`; docs/how-to/captions_server.md describes it.

Rows whose image cannot be used are skipped, and listed in *.skipped.jsonl files. To finish an interrupted run, run the
same command again; finished captions do not change.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capivara_common.cli import check_at_least, flag, run_command
from capivara_common.tasks import Phase
from captions.captioners import CAPTIONERS
from captions.captioners.blip2 import DEFAULT_MODEL
from captions.quality import QUALITY_FILE, summarize_quality
from captions.stages import RowStage, StageArguments, run_stage_command


@dataclass
class GenerateArguments(*(captioner.flags for captioner in CAPTIONERS.values()), StageArguments):
    """Command-line flags of `captions.generate`, the stage that generates captions of images."""

    uses_model = decodes_images = True
    accepts_embeds = False
    captioner: str = flag(
        "blip2",
        "What generates the captions. blip2: BLIP-2 on this machine. chat: a vision-language model on a server that "
        "speaks OpenAI's protocol.",
        choices=list(CAPTIONERS),
    )
    model: str = flag(
        DEFAULT_MODEL,
        "Folder or Hub id of a BLIP-2 model of transformers (blip2), or the name of the model on the server (chat).",
    )
    caption_language: str = flag("en", "Code of the language of the captions: en (blip2), or any language (chat).")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "max_new_tokens", "micro_batch_size")
        self.prefixes = Path(self.prefixes)
        CAPTIONERS[self.captioner].check_flags(self)

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Return the names of the columns that the stage adds. The stage requires no column except the image column.

        Args:
            columns: Names of the columns of the dataset.
            where: Name of the dataset; not used, because no check can fail.
        """
        return [*super().check_columns(columns, where), *CAPTIONERS[self.captioner].columns(self)]

    def check_backend(self) -> None:
        """Check, before any stage of a build runs, that the captioner can be used.

        Raises ValueError or OSError if the captioner cannot be used.
        """
        CAPTIONERS[self.captioner].check(self)

    def describe_work(self, stage: RowStage) -> list[str]:
        """Return lines for a dry run that say what will be requested from a server, such as requests and tokens.

        Args:
            stage: The opened rows.
        """
        return CAPTIONERS[self.captioner].describe_work(self, stage)

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Load the captioner.

        Args:
            stage: The opened rows.

        Returns:
            The positional arguments of `RowStage.run`: columns, settings, the function that captions rows, and the
            function that is called before each part.

        Raises:
            ValueError, OSError, ImportError: If the captioner cannot be used.
        """
        captioner = CAPTIONERS[self.captioner].load(self, stage)

        def prepare(parts: list[range]) -> None:
            captioner.start_part(parts[0])

        return captioner.columns(self), captioner.settings, captioner.caption_rows, prepare, 1

    @property
    def phases(self) -> dict[str, Phase]:
        """Phases of the stage by name. The phase "report" exists only if the captioner writes a report."""
        phases = super().phases
        return phases if CAPTIONERS[self.captioner].has_report else {"rows": phases["rows"]}

    def report(self, rank: int = 0, world_size: int = 1) -> None:
        """Write `quality.json`, with the faults of the captions.

        Args:
            rank: Number of the task; not used, because a single task writes the file.
            world_size: Number of tasks; not used.
        """
        CAPTIONERS[self.captioner].report(self)


def main(argv: list[str] | None = None) -> None:
    """Run the command `captions.generate`.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = run_stage_command(GenerateArguments, __doc__, argv)
    if args is not None and CAPTIONERS[args.captioner].has_report:
        print(summarize_quality(args.output / QUALITY_FILE, "captions"))


if __name__ == "__main__":
    # Import this file as a named module, so that other processes can unpickle its classes.
    from captions import generate

    run_command(generate.main, resumable=True)

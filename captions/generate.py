"""Generate captions of images, with BLIP-2 on this machine or with a model on a server.

    python -m captions.generate --dataset data/images --output data/generated
    python -m captions.generate --dataset data/images --output data/generated --precision fp16 --workers 4
    python -m captions.generate --dataset data/images --output data/generated --captioner chat \
        --base_url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct --caption_language pt

BLIP-2 writes English captions to the column `generated-captions-en`. Each caption completes a prefix such as "a photo
of". A model on a server (`--captioner chat`) writes captions in any language, for example to the column
`generated-captions-pt` (see docs/how-to/captions_server.md).

Rows whose image can't be used are skipped, and listed in *.skipped.jsonl files. To finish an interrupted run, run the
same command again.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capivara_common.cli import check_at_least, flag, run_main_and_report_user_errors
from capivara_common.tasks import Phase
from captions.captioners import CAPTIONERS
from captions.captioners.base import Captioner
from captions.captioners.blip2 import DEFAULT_MODEL
from captions.quality import QUALITY_FILE, summarize_quality_file
from captions.stages import RowStage, StageArguments, run_stage_command


@dataclass
class GenerateArguments(*(captioner.flags for captioner in CAPTIONERS.values()), StageArguments):
    """Command-line arguments of `captions.generate`, which generates captions of the images of a dataset.

    The class also has the methods that run the command, which is one stage (step) of building a caption dataset.
    """

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
        "With --captioner blip2: folder or Hub id of a BLIP-2 model. With chat: name of the model on the server.",
    )
    caption_language: str = flag("en", "Language code of the captions. blip2 writes only en, chat any language.")

    @property
    def backend_type(self) -> type[Captioner]:
        """Class of the captioner: the model or service that generates the captions, as the flag `captioner` says."""
        return CAPTIONERS[self.captioner]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "max_new_tokens", "micro_batch_size")
        self.prefixes = Path(self.prefixes)
        self.backend_type.check_flags(self)

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Return the names of the columns that the stage adds to the dataset.

        The check itself always passes, because this stage needs no column besides the image.

        Args:
            columns: Names of the columns of the dataset.
            where: Name of the dataset; has no effect here.
        """
        return [*super().check_columns(columns, where), *self.backend_type.columns(self)]

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Load the captioner: the model or the connection to a server that generates the captions.

        Args:
            stage: Access to the rows to caption.

        Returns:
            The arguments of `RowStage.run`, as a tuple: the types of the new columns, the settings to record, a
            function that captions a list of rows, a function that is called before each output file is written, and the
            number of rows that this function prepares together (always 1).

        Raises:
            ValueError, OSError, ImportError: If the captioner can't be used.
        """
        captioner = self.backend_type.load(self, stage)
        columns, settings = captioner.columns(self), captioner.settings
        # With the number 1 of prepared rows, `start_part` is called before each output file.
        return columns, settings, captioner.caption_rows, lambda parts: captioner.start_part(parts[0]), 1

    @property
    def phases(self) -> dict[str, Phase]:
        """The phases of the stage, that is, the steps in which it runs, as a dict `{name: phase}` in order.

        The phase "rows" generates the captions. If the captioner writes a report, the phase "report" counts the
        captions that look wrong.
        """
        phases = super().phases
        return phases if self.backend_type.has_report else {"rows": phases["rows"]}

    def report(self, rank: int = 0, world_size: int = 1) -> None:
        """Write the file `quality.json`, which counts the generated captions that look wrong.

        Args:
            rank: Index of the task (process). It is not used, because a single task writes the file.
            world_size: Number of tasks. It is not used.
        """
        self.backend_type.report(self)


def main(argv: list[str] | None = None) -> None:
    """Run the command: generate captions of the images of a dataset.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = run_stage_command(GenerateArguments, __doc__, argv)
    if args is not None and args.backend_type.has_report:
        print(summarize_quality_file(args.output / QUALITY_FILE, "captions"))


if __name__ == "__main__":
    # When this file runs as a command, its classes belong to the module `__main__`, and other processes can't unpickle
    # them. Import the file again under its own name to avoid this.
    from captions import generate

    run_main_and_report_user_errors(generate.main, resumable=True)

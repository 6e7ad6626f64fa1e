"""The model card of a run or repository: README.md and .eval_results/*.yaml, with no figure but those of its files.

    python -m hub_upload.card --model runs/openmoji-pt-001
    python -m hub_upload.card --model runs/openmoji-pt-001 --repo_id my-name/my-model --language pt
    python -m hub_upload.card --check runs/openmoji-pt-001

The first takes `run.json`, `results/*.json` and the model's config, and replaces the README.md that the run has
written. Where a figure is missing it is left out; nothing is guessed. `--check` compares every figure of a card, of its
front matter and of `.eval_results` with those files and names each one that differs. Sentences without figures may be
added to a card by hand; whoever makes the card anew adds them again. Make it last: of a repository's folder after
`hub_upload.export`, which writes those files anew, and before `hub_upload.push`.
"""

from common.start import start_command

if __name__ == "__main__":
    start_command()

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from common.cli import parse, run_command
from common.files import write_text
from hub_upload.card_check import check
from hub_upload.card_facts import CardFacts, card_facts
from hub_upload.card_metadata import eval_results
from hub_upload.card_render import LANGUAGES, marked_card
from hub_upload.card_schema import card_faults
from hub_upload.card_text import plain


@dataclass
class CardArguments:
    model: Path | None = field(
        default=None, metadata={"help": "Folder of a finished run, or a repository made from it; its card is written."}
    )
    repo_id: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, owner/name, that the code in the card loads; where none is given, it loads the folder by "
            "its name, from the folder above."
        },
    )
    language: Literal["en", "pt"] = field(default="en", metadata={"help": "Language of the card's text."})
    output: Path | None = field(
        default=None, metadata={"help": "File of the card, in place of README.md in the folder; it alone is written."}
    )
    check: Path | None = field(
        default=None, metadata={"help": "Folder whose card is compared with its files; nothing is written."}
    )

    def __post_init__(self) -> None:
        if (self.model is None) == (self.check is None):
            raise ValueError("Give --model FOLDER to write its card, or --check FOLDER to verify the one there.")
        if self.check and (self.repo_id or self.output):
            raise ValueError("--check takes what a card was made with from the card: no --repo_id, no --output.")
        check_repo_id(self.repo_id)


def check_repo_id(repo_id: str | None) -> None:
    """Raise ValueError unless `repo_id` is None, or owner/name in letters that the Hub takes."""
    try:
        if repo_id is not None:
            validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--repo_id: {error}") from error
    if repo_id is not None and repo_id.count("/") != 1:
        raise ValueError(f"--repo_id must be owner/name, got {repo_id!r}.")


def render(
    facts: CardFacts, language: str = "en", repo_id: str | None = None, formats: frozenset[str] | None = None
) -> ModelCard:
    """The card of a folder.

    Args:
        facts: of `card_facts`.
        language: of the text, "en" or "pt".
        repo_id: that code in the card loads; the folder by its name where None.
        formats: keys of `card_facts.FORMATS`, loaders that the card has code for; those whose files are there if None.

    Raises:
        ValueError: a figure is missing that the card needs, or a value breaks a rule of the Hub.
    """
    check_repo_id(repo_id)
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}.")
    data, _, body = marked_card(facts, language, repo_id, facts.formats if formats is None else formats)
    card = ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n\n{{ body }}\n", body=plain(body))
    if faults := card_faults(str(card)):
        raise ValueError(f"The card would break these rules: {' '.join(faults)}")
    again = ModelCardData(**data.to_dict())
    if again.to_dict() != data.to_dict():
        raise ValueError("The front matter changes when it is read again; a value has a form that YAML cannot hold.")
    return card


def write_card(
    folder: Path,
    repo_id: str | None = None,
    language: str = "en",
    output: Path | None = None,
    name: str | None = None,
) -> Path:
    """Write the card of a folder, each file in one piece, and return the card's path.

    Args:
        folder: of a run, or a repository made from it.
        repo_id: see `render`.
        language: see `render`.
        output: file that alone is written; where None, README.md and `.eval_results` in the folder.
        name: how code names the folder where there is no repo_id; its own name where None.

    Raises:
        ValueError: as `card_facts` and `render`.
    """
    facts = card_facts(folder, name)
    card = render(facts, language, repo_id)
    if output is None:
        for file, entries in eval_results(facts).items():
            write_text(folder / file, yaml_dump(entries, sort_keys=False))
    path = output or folder / "README.md"
    write_text(path, str(card))
    return path


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(CardArguments, __doc__, argv)
        if args.check is None:
            path = write_card(args.model, args.repo_id, args.language, args.output)
            print(f"{path} states what the files of {args.model} say. Verify it with --check {args.model}.")
            return
        faults = check(args.check)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if faults:
        sys.exit("\n".join([*faults, f"error: {len(faults)} faults in the card of {args.check}."]))
    print(f"Every figure of the card of {args.check} is that of its files.")


if __name__ == "__main__":
    run_command(main)

"""The model card of a run or repository: README.md and .eval_results/*.yaml, with no figure but those of its files.

    python -m hub_upload.card --model runs/openmoji-pt-001
    python -m hub_upload.card --model runs/openmoji-pt-001 --repo_id my-name/my-model --language pt
    python -m hub_upload.card --model runs/mine --license cc-by-4.0    # where none follows from base and data
    python -m hub_upload.card --check runs/openmoji-pt-001

The first takes `run.json`, `results/*.json` and the model's config, and replaces the README.md that the run has
written. Where a figure is missing it is left out; nothing is guessed. `--check` renders the card again, compares it
and `.eval_results` line by line, and names each line that differs. Sentences without figures may be added to a card by
hand, and must be added again after it is rewritten. Make the card last: of a repository's folder after
`hub_upload.export`, which rewrites those files, and before `hub_upload.push`.
"""

import difflib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard

from capivara_common.cli import flag, parse, run_command, user_errors
from capivara_common.files import write_text
from capivara_common.privacy import machine_path_in, secret_in
from hub_upload.card_facts import CardFacts, card_facts
from hub_upload.card_metadata import eval_results, metadata, with_licence
from hub_upload.card_parts import card_parts
from hub_upload.card_text import LANGUAGES, Words, escaped, one_line
from hub_upload.remote import check_repo_id

CARD = "README.md"
# What a card was made with, for `--check`; a comment, so that it is not seen.
OPTIONS = "<!-- made by hub_upload.card with {options} -->"
MADE_WITH = re.compile(re.escape(OPTIONS).replace(r"\{options\}", r"(\{[^\n]*\})"))
# What could hide or reframe the lines around it: comments, code, tables, headings, links to anything but pages.
FRAMES = re.compile(r"<|^\s*(```|~~~|\||#|=+$|-+$)|\]\((?!https?://)")
SHOWN = 120  # letters of a line in a message


@dataclass
class CardArguments:
    """Arguments of `hub_upload.card`."""

    model: Path | None = flag(None, "Folder of a finished run, or a repository made from it; its card is written.")
    repo_id: str | None = flag(
        None, "Hub id, owner/name, that the card's code loads; without it, the folder by its name, from the one above."
    )
    language: Literal["en", "pt"] = flag("en", "Language of the card's text.")
    license: str | None = flag(
        None, "Licence of the model, an identifier of the Hub, where none follows from what base and data state."
    )
    output: Path | None = flag(None, "File of the card, in place of README.md in the folder; it alone is written.")
    check: Path | None = flag(None, "Folder whose card is compared with its files; nothing is written.")

    def __post_init__(self) -> None:
        if (self.model is None) == (self.check is None):
            raise ValueError("Give --model FOLDER to write its card, or --check FOLDER to verify the one there.")
        if self.check and (self.repo_id or self.output or self.license):
            raise ValueError(
                "--check takes from the card what it was made with: no --repo_id, no --output, no --license."
            )
        if self.repo_id is not None:
            check_repo_id(self.repo_id)


def render(facts: CardFacts, language: str = "en", repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a folder, in "en" or "pt"; its code loads `repo_id`, or the folder by its name where there is none.

    A `license` is for a model whose base and data leave it open. Raises ValueError where it is none of the Hub's or
    differs from what follows from them, where a figure is missing, or the card would hold a path of a machine or a
    secret.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}.")
    if repo_id is not None:
        check_repo_id(repo_id)
    is_whole = facts.model == facts.folder
    if repo_id and not is_whole:
        raise ValueError(
            f"{facts.folder} holds a model in each of its folders seed-*, and a repository has one. Make it of one of "
            "them first, with `python -m hub_upload.export`."
        )
    if license is not None:
        facts = with_licence(facts, license)
    title = repo_id.split("/")[1] if repo_id else f"CAPIVARA ({facts.language})"
    options = {"language": language, "repo_id": repo_id, "name": None if repo_id else facts.name}
    options |= {"license": license} if license else {}
    words = Words(language)
    try:
        data = metadata(facts, one_line(title))
        body = words.render(
            title=escaped(title),
            name=repo_id or (facts.name if is_whole else f"{facts.name}/{facts.model.name}"),
            is_repository=repo_id is not None,
            formats=facts.formats,
            **card_parts(facts, words),
        )
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"A file of {facts.folder} has another form than the card needs: {error!r:.100}.") from error
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n\n{OPTIONS.format(options=json.dumps(options))}")
    if path := machine_path_in(str(card)):
        raise ValueError(f"The card would hold a path of a machine, {path[:60]!r}. Take it out of the files.")
    if secret := secret_in(str(card)):
        raise ValueError(f"The card would hold {secret[0]}. Revoke it, and take it out of the files.")
    return card


def write_card(
    folder: Path,
    repo_id: str | None = None,
    language: str = "en",
    output: Path | None = None,
    license: str | None = None,
) -> Path:
    """Write the card of a run or of a repository made from it, each file in one piece, and return the card's path.

    Where an `output` is named it alone is written, else README.md and `.eval_results` in the folder. ValueError as of
    `card_facts` and `render`.
    """
    facts = card_facts(folder)
    card = render(facts, language, repo_id, license)
    for file, text in eval_results(facts).items() if output is None else ():
        write_text(folder / file, text)
    path = output or folder / CARD
    write_text(path, str(card))
    return path


# --- Comparison of a card with its files -----------------------------------------------------------------------------


def check(folder: Path) -> list[str]:
    """The faults of a folder's card, each naming the line; empty where card and files agree.

    The card is rendered again with the options that it names, and compared line by line. Lines may be added to its
    text, if they hold no number, and nothing that could hide or reframe the lines around them. As the card lists the
    digests of its files, a changed digit that it does not show is noticed, too. ValueError where there is no card.
    """
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}. Make it with `python -m hub_upload.card --model {folder}`.")
    text = _read(folder / CARD)
    if not (options := made_with(text)):
        return [f"{CARD}: it was not made by `python -m hub_upload.card`, so its figures have no known source."]
    try:
        facts = card_facts(folder, options["name"])
        expected = str(render(facts, options["language"], options["repo_id"], options.get("license")))
        wanted = eval_results(facts)
    except ValueError as error:
        return [f"{CARD}: {error}"]
    faults = [f"{CARD}, {fault}" for fault in _line_faults(expected, text, may_add=True)]
    there = {path.relative_to(folder).as_posix(): path for path in (folder / ".eval_results").glob("*.y*ml")}
    for name in sorted({*wanted, *there}):
        if name not in there:
            faults.append(f"{name} is missing; write the card again.")
        elif name not in wanted:
            faults.append(f"{name}: no result file of a data set on the Hub has these figures.")
        elif not there[name].is_file():
            faults.append(f"{name} is no regular file.")
        else:
            faults += [f"{name}, {fault}" for fault in _line_faults(wanted[name], _read(there[name]))]
    return faults


def outdated(folder: Path) -> list[str]:
    """The faults of a folder's card, if there is one and `hub_upload.card` made it; others are their writers' word."""
    return check(folder) if (folder / CARD).is_file() and made_with(_read(folder / CARD)) else []


def made_with(text: str) -> dict[str, Any] | None:
    """The options that a card was made with; None where it does not say so."""
    with suppress(ValueError, TypeError, IndexError):
        options = json.loads(MADE_WITH.findall(text)[-1])
        if set(options) - {"license"} == {"language", "repo_id", "name"} and options["language"] in LANGUAGES:
            if options["repo_id"] is not None:
                check_repo_id(options["repo_id"])
            return options
    return None


def _line_faults(expected: str, text: str, may_add: bool = False) -> Iterator[str]:
    """How a text differs from the expected one, line by line; sentences below a front matter if they `may_add` some."""
    wanted = [line for line in expected.split("\n") if line.strip()]
    there = [(number, line.rstrip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    front = expected.count("\n", 0, expected.find("\n---\n", 1)) if may_add else 0
    matcher = difflib.SequenceMatcher(None, wanted, [line for _, line in there], autojunk=False)
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        if kind == "equal":
            continue
        for line, other in zip_longest(wanted[start:end], there[other_start:other_end]):
            if other is None:
                yield f"the line {line[:SHOWN]!r} is missing."
            elif line is not None:
                yield f"line {other[0]}: it says {other[1][:SHOWN]!r}, the files give {line[:SHOWN]!r}."
            elif not may_add or other[0] <= front or any(letter.isnumeric() for letter in other[1]):
                yield f"line {other[0]}: no file says what is added here: {other[1][:SHOWN]!r}."
            elif FRAMES.search(other[1]):
                yield f"line {other[0]}: only sentences and lists may be added, not {other[1][:SHOWN]!r}."


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(CardArguments, __doc__, argv)
    if args.check is None:
        path = write_card(args.model, args.repo_id, args.language, args.output, args.license)
        print(f"{path} states what the files of {args.model} say. Verify it with --check {args.model}.")
        return
    if faults := check(args.check):
        sys.exit("\n".join([*faults, f"error: {len(faults)} faults in the card of {args.check}."]))
    print(f"Every figure of the card of {args.check} is that of its files.")


if __name__ == "__main__":
    run_command(main)

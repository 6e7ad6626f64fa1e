"""Whether a card states what its files say: it is rendered anew, and compared figure by figure.

No line of the rendered text may be missing or changed. Lines may be added, if they hold no number, and nothing that
could hide or reframe what is around them. The front matter and `.eval_results` must be those of the files. As the card
lists the digests of its files, a digit that it does not show is noticed, too.
"""

import difflib
import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump

from hub_upload.card_facts import HUB_ID, CardFacts, card_facts
from hub_upload.card_metadata import eval_results
from hub_upload.card_render import LANGUAGES, OPTIONS, marked_card
from hub_upload.card_schema import FRONT_MATTER, card_faults, read_yaml, split_card
from hub_upload.card_text import END, MARK, figures, plain

CARD = "README.md"
MADE_WITH = re.compile(re.escape(OPTIONS).replace(r"\{options\}", r"(\{[^\n]*\})"))
FRAMES = re.compile(r"<|^\s*(```|~~~|\||#|=+$|-+$)")  # comments, code, tables, headings
SHOWN = 120  # letters of a line in a message


def check(folder: Path) -> list[str]:
    """The faults of a folder's card, each naming the figure; empty where card and files agree.

    Raises:
        ValueError: there is no card.
        OSError: it can't be read.
    """
    path = folder / CARD
    if not path.is_file():
        raise ValueError(f"{folder} has no {CARD}. Make it with `python -m hub_upload.card --model {folder}`.")
    text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
    try:
        data, body = split_card(text)
        options = made_with(body)
        facts = card_facts(folder, options["name"])
        expected, sources, marked = marked_card(facts, options["language"], options["repo_id"], facts.formats)
    except ValueError as error:
        return [f"{CARD}: {error}"]
    faults = [f"{CARD}, {fault}" for fault in card_faults(text)]
    said = list(_data_faults(expected.to_dict(), data, sources))
    said = said or list(_line_by_line(expected.to_yaml(), FRONT_MATTER.match(text)[1], 2))
    faults += [f"{CARD}, front matter, {fault}" for fault in said]
    first_line = text.count("\n", 0, len(text) - len(body)) + 1
    faults += [f"{CARD}, {fault}" for fault in text_faults(marked, body, first_line)]
    return faults + list(_eval_results_faults(folder, facts))


def outdated(folder: Path) -> list[str]:
    """The faults of a folder's card, if there is one and `hub_upload.card` made it; others are their writers' word."""
    if not (folder / CARD).is_file():
        return []
    try:
        made_with(split_card((folder / CARD).read_text(encoding="utf-8"))[1])
    except (ValueError, OSError):
        return []
    return check(folder)


def made_with(body: str) -> dict[str, Any]:
    """The options that a card was made with. Raises ValueError where it does not say so."""
    found = MADE_WITH.findall(body)
    try:
        options = json.loads(found[-1]) if found else {}
    except ValueError:
        options = {}
    repo_id, name = options.get("repo_id"), options.get("name")
    right = options.get("language") in LANGUAGES and set(options) == {"language", "repo_id", "name"}
    right = right and (repo_id is None or (isinstance(repo_id, str) and HUB_ID.fullmatch(repo_id)))
    if not right or not isinstance(name, str | None):
        raise ValueError("it was not made by `python -m hub_upload.card`, so its figures have no known source.")
    return options


def text_faults(marked: str, body: str, first_line: int = 1) -> list[str]:
    """How a text differs from the rendered one.

    Args:
        marked: the rendered text, its figures marked with their sources.
        body: the card's text.
        first_line: number of its first line in the file.
    """
    wanted = [line for line in marked.split("\n") if line.strip()]
    there = [(number, line.rstrip()) for number, line in enumerate(body.split("\n"), first_line) if line.strip()]
    matcher = difflib.SequenceMatcher(None, [plain(line) for line in wanted], [line for _, line in there], False)
    faults = []
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        if kind != "equal":
            faults += _block_faults(wanted[start:end], there[other_start:other_end])
    return faults


def _block_faults(wanted: list[str], there: list[tuple[int, str]]) -> Iterator[str]:
    """Faults of a stretch of lines that are not equal; each rendered line is held against the one most like it."""
    left = dict(there)
    for line in wanted:
        text = plain(line)
        near = difflib.get_close_matches(text, left.values(), n=1, cutoff=0.5)
        number = next((number for number, other in left.items() if near and other == near[0]), None)
        if number is None:
            named = "".join(f" {figure} ({source})," for figure, source in figures(line)[:3])
            yield f"the line {text[:SHOWN]!r} is missing{', with' if named else ''}{named.rstrip(',')}."
            continue
        yield from _line_faults(line, left.pop(number), number)
    for number, line in left.items():
        if any(letter.isnumeric() for letter in line):
            yield f"line {number}: no file says what is added here: {line[:SHOWN]!r}."
        elif FRAMES.search(line):
            yield f"line {number}: only sentences and lists may be added, not {line[:SHOWN]!r}."


def _line_faults(marked: str, line: str, number: int) -> Iterator[str]:
    """Which figures of a changed line differ; the line as a whole where its words do."""
    pattern = "(.*?)".join(re.escape(part) for part in MARK.sub(END, marked).split(END))
    found = re.fullmatch(pattern, line)
    if not found:
        yield f"line {number}: {line[:SHOWN]!r} should be {plain(marked)[:SHOWN]!r}."
        return
    for (figure, source), said in zip(figures(marked), found.groups(), strict=True):
        if figure != said:
            yield f"line {number}: the card says {said[:SHOWN]!r}, {source} gives {figure[:SHOWN]!r}."


def _data_faults(wanted: dict[str, Any], there: dict[str, Any], sources: list[str]) -> Iterator[str]:
    """How a front matter differs, value by value; values of the model index are named with their source."""
    expected, found = dict(_flat(wanted)), dict(_flat(there))
    values = [path for path in expected if path.startswith("model-index/") and path.endswith("/value")]
    source_of = dict(zip(values, sources, strict=True))
    for path in dict.fromkeys([*expected, *found]):
        if path not in found:
            yield f"{path} is missing: {expected[path]!r} ({source_of.get(path, 'of the files')})."
        elif path not in expected:
            yield f"{path}: no file says {found[path]!r}."
        elif (type(found[path]), found[path]) != (type(expected[path]), expected[path]):
            yield f"{path}: the card says {found[path]!r}, {source_of.get(path, 'the files')} gives {expected[path]!r}."


def _line_by_line(wanted: str, there: str, first_line: int) -> Iterator[str]:
    """The first line that is written otherwise, though its values are read as the same: a last digit, say."""
    lines = zip_longest(wanted.strip().split("\n"), there.strip().split("\n"), fillvalue="")
    for number, (line, other) in enumerate(lines, first_line):
        if line != other.rstrip():
            yield f"line {number}: {other[:SHOWN]!r} should be {line[:SHOWN]!r}."
            return  # what follows may only be shifted


def _flat(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict | list) and data:
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _flat(value, f"{path}/{key}" if path else str(key))
    else:
        yield path, data


def _eval_results_faults(folder: Path, facts: CardFacts) -> Iterator[str]:
    """Files of `.eval_results` that are missing, that no result file backs, or that say something else."""
    wanted = eval_results(facts)
    there = {path.relative_to(folder).as_posix(): path for path in (folder / ".eval_results").glob("*.y*ml")}
    for name in dict.fromkeys([*wanted, *sorted(there)]):
        if name not in there:
            yield f"{name} is missing; make the card anew."
            continue
        if name not in wanted:
            yield f"{name}: no result file of a data set on the Hub has these figures."
            continue
        if not there[name].is_file():
            yield f"{name} is no regular file."
            continue
        text = there[name].read_text(encoding="utf-8", errors="replace")
        try:
            faults = list(_data_faults({"entries": wanted[name]}, {"entries": read_yaml(text)}, []))
        except ValueError as error:
            faults = [str(error)]
        faults = faults or list(_line_by_line(yaml_dump(wanted[name], sort_keys=False), text, 1))
        yield from (f"{name}, {fault}" for fault in faults)

"""Text of the documentation site that is generated from the code, and links between the pages of the repository.

A line `<!-- site: NAME -->` on a page is replaced by the text that the function NAME in `GENERATED` returns. GitHub
shows such a page without the generated text.
"""

import argparse
import os
import pydoc
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import click

from capivara_search.command import capivara
from capivara_search.command_line import describe_parameter
from capivara_search.messages import COMMAND_NAMES, Messages

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site whose text is a file outside `docs`.
OUTSIDE_PAGES = {
    "leiame": "LEIAME.md",
    "explanation/security": "SECURITY.md",
    "reference/changelog": "CHANGELOG.md",
    "reference/contributing": "CONTRIBUTING.md",
    "reference/portuguese_prompts": "eval/prompts/pt/README.md",
}
# Folders with commands, in the order of the page.
COMMAND_FOLDERS = {
    "train_accelerate.py": "Train",
    "training": "Change a trained model",
    "captions": "Build a dataset",
    "eval": "Measure",
    "hub_upload": "Publish",
    "modeling_capivara": "Convert a model",
    "capivara_search/workers.py": "Index on many machines",
    "examples": "Examples",
    "benchmarks": "Benchmarks",
}
LINK_RE = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
IS_COMMAND_RE = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)


class Parsed(BaseException):
    """Raised with the parser of a command, so that the command does not start."""


def command_parser(module: str) -> argparse.ArgumentParser:
    """Return the parser of a command by starting its `main` function up to the point where it parses its flags."""

    def stop(parser: argparse.ArgumentParser, *args: object, **options: object) -> None:
        raise Parsed(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            pydoc.locate(module).main([])
        except Parsed as parsed:
            return parsed.args[0]
    raise ValueError(f"{module}.main must parse its flags before it does anything else.")


def escape(text: str) -> str:
    """Replace `<` in text by its HTML entity, except in code between backticks."""
    return re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", text)


def to_markdown(text: str) -> str:
    """Return the description of a command as Markdown: indented paragraphs are code, the others are text."""
    paragraphs = []
    for paragraph in re.split(r"\n{2,}", textwrap.dedent(text).strip("\n")):
        is_code = paragraph.startswith(" ")
        paragraphs.append(f"```text\n{textwrap.dedent(paragraph)}\n```" if is_code else escape(paragraph))
    return "\n\n".join(paragraphs)


def command_modules(folder: str) -> list[str]:
    """Return the names of the modules in a folder that are commands, in alphabetical order."""
    paths = sorted((ROOT / folder).rglob("*.py")) if (ROOT / folder).is_dir() else [ROOT / folder]
    commands = [path for path in paths if IS_COMMAND_RE.search(path.read_text(encoding="utf-8"))]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in commands]


def to_table(rows: Iterable[tuple[str, ...]], *columns: str) -> str:
    """Return a Markdown table. Line breaks and vertical bars in cells are made harmless."""
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_action(action: argparse.Action) -> tuple[str, str, str, str]:
    """Return flag, type, default and meaning of an argument of a command."""
    name = action.option_strings[0] if action.option_strings else action.dest
    value_type = getattr(action.type, "__name__", "") if action.type else "switch" * (action.nargs == 0)
    if action.choices:
        value_type = ", ".join(f"`{choice}`" for choice in action.choices)
    elif value_type == "wrapper" or not value_type.isidentifier():
        value_type = "value"
    default = "required" if action.required else "" if action.default in (None, []) else f"`{action.default}`"
    text = escape((action.help or "").replace("%%", "%"))
    return f"`{name}`", value_type + " …" * (action.nargs in ("*", "+")), default, text


def commands() -> str:
    """Return the reference of all commands that run with `python`, from their parsers."""
    text = []
    for folder, title in COMMAND_FOLDERS.items():
        text.append(f"## {title}")
        for module in command_modules(folder):
            parser, name = command_parser(module), module.removesuffix(".__main__")
            start = "python train_accelerate.py" if module == "train_accelerate" else f"python -m {name}"
            text.append(f"### {name}\n\n`{start}`\n\n{to_markdown(parser.description or '')}")
            actions = [action for action in parser._actions if action.dest != "help"]
            actions.sort(key=lambda action: not action.required)  # as `--help` lists them
            text.append(to_table(map(describe_action, actions), "Flag", "Type", "Default", "Meaning"))
    return "\n\n".join(text)


def search_commands(language: str = "en") -> str:
    """Return the reference of the commands of `capivara`, from their click parameters and translated messages."""
    messages, text = Messages(language), []
    group = capivara.make_context("capivara", [], obj=messages, resilient_parsing=True)
    for english, portuguese in COMMAND_NAMES.items():
        command = capivara.get_command(group, english)
        context = click.Context(command, group, english, obj=messages)
        name = f"{english} ({portuguese})" if portuguese != english else english
        text.append(f"### capivara {name}\n\n{to_markdown(messages(f'about.{english}'))}")
        rows = [describe_parameter(param, context) for param in command.get_params(context)]
        text.append(to_table([(f"`{flag}`", escape(meaning)) for flag, meaning in rows], "Flag", "Meaning"))
    return "\n\n".join(text)


def configs() -> str:
    """Return the reference of the config files: each file in a code block, the comments included."""
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    blocks = [f"## {path.relative_to(ROOT)}\n\n```yaml\n{path.read_text(encoding='utf-8')}```" for path in paths]
    return "\n\n".join(blocks)


GENERATED: dict[str, Callable[[], str]] = {"commands": commands, "search_commands": search_commands, "configs": configs}


def site_text(page: str, text: str) -> str:
    """Return the text of a page as the site shows it.

    Args:
        page: Name of the page below `docs`, without the suffix, such as "how-to/search".
        text: Text of the page in the repository.

    Returns:
        The text with generated parts. Links to files outside `docs` that are pages of the site lead to these pages.
    """
    source = Path(OUTSIDE_PAGES.get(page, f"docs/{page}.md"))
    if page in OUTSIDE_PAGES:
        text = (ROOT / source).read_text(encoding="utf-8")
    text = re.sub(r"^<!-- site: (\w+) -->$", lambda match: GENERATED[match[1]](), text, flags=re.MULTILINE)
    site_pages = {file: f"docs/{name}.md" for name, file in OUTSIDE_PAGES.items()} | {"README.md": "docs/index.md"}
    here = os.path.dirname(f"docs/{page}.md")

    def follow(match: re.Match) -> str:
        start, target, end = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        file = os.path.normpath(os.path.join(source.parent, target))
        file = site_pages.get(file, file)
        return f"{start}{os.path.relpath(file, here)}{end}"

    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.lstrip().startswith("```") else LINK_RE.sub(follow, part) for part in parts)

"""Prepare the repository's Markdown pages for the documentation site: insert generated text, and rewrite links.

A page may contain a line `<!-- site: NAME -->`. On the site, generated text replaces this line. The dict `GENERATED`
has the function that generates the text for each NAME.
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
from capivara_search.command_line import get_localized_help_record
from capivara_search.messages import COMMAND_NAMES, Messages

ROOT = Path(__file__).resolve().parent.parent
# Files outside `docs` that are pages of the site, by the name of the page.
OUTSIDE_PAGES = {
    "leiame": "LEIAME.md",
    "explanation/security": "SECURITY.md",
    "reference/changelog": "CHANGELOG.md",
    "reference/contributing": "CONTRIBUTING.md",
    "reference/portuguese_prompts": "eval/prompts/pt/README.md",
}
# Titles of the sections of the command reference, in their order. The key is the folder or file with the commands.
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
# Target of a Markdown link to a file, without the anchor. A target with a colon is a URL, which is not matched.
LINK_TARGET_RE = re.compile(r"(?<=\]\()[^)\s#:]+(?=(?:#[^)\s]*)?\))")
IS_COMMAND_RE = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)


class Parsed(BaseException):
    """Exception that carries the argument parser of a command to the code that writes the command reference.

    It is raised when the command begins to parse its flags, so the command itself does not run. It is a BaseException,
    because commands may catch ordinary exceptions and report them as errors of the user.
    """


def _capture_command_parser(module: str) -> argparse.ArgumentParser:
    """Return the argument parser of a command, without running the command.

    The command's function `main` is called, and stopped when it parses its flags.

    Args:
        module: Name of the command's module, such as "eval.retrieval".

    Raises:
        ValueError: If `main` returns without parsing flags.
    """

    def stop(parser: argparse.ArgumentParser, *args: object, **options: object) -> None:
        raise Parsed(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            pydoc.locate(module).main([])
        except Parsed as parsed:
            return parsed.args[0]
    raise ValueError(f"{module}.main must parse its flags before it does anything else.")


def escape(text: str) -> str:
    """Escape `<` in a Markdown text, so that it does not begin an HTML tag. Code between backticks stays unchanged."""
    return re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", text)


def _convert_description_to_markdown(text: str) -> str:
    """Convert the description of a command (its `--help` text) to Markdown. Indented paragraphs become code blocks."""
    paragraphs = []
    for paragraph in re.split(r"\n{2,}", textwrap.dedent(text).strip("\n")):
        is_code = paragraph.startswith(" ")
        paragraphs.append(f"```text\n{textwrap.dedent(paragraph)}\n```" if is_code else escape(paragraph))
    return "\n\n".join(paragraphs)


def find_command_modules(folder: str) -> list[str]:
    """Find the modules of a folder that can be run as commands with `python -m`.

    Args:
        folder: Folder or Python file, relative to the checkout, such as "eval".

    Returns:
        Names of the modules, such as "eval.retrieval", in alphabetical order of their paths.
    """
    paths = sorted((ROOT / folder).rglob("*.py")) if (ROOT / folder).is_dir() else [ROOT / folder]
    command_files = [path for path in paths if IS_COMMAND_RE.search(path.read_text(encoding="utf-8"))]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in command_files]


def _build_markdown_table(rows: Iterable[tuple[str, ...]], *columns: str) -> str:
    """Return a Markdown table. In its cells, line breaks become spaces, and vertical bars are escaped.

    Args:
        rows: Cells of each row.
        *columns: Titles of the columns.
    """
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _build_command_argument_row(action: argparse.Action) -> tuple[str, str, str, str]:
    """Return the row for one argument of a command in the command reference: flag, type, default and meaning."""
    name = action.option_strings[0] if action.option_strings else action.dest
    value_type = getattr(action.type, "__name__", "") if action.type else "switch" * (action.nargs == 0)
    if action.choices:
        value_type = ", ".join(f"`{choice}`" for choice in action.choices)
    elif value_type == "wrapper" or not value_type.isidentifier():
        value_type = "value"
    default = "required" if action.required else "" if action.default in (None, []) else f"`{action.default}`"
    text = escape((action.help or "").replace("%%", "%"))
    return f"`{name}`", value_type + " …" * (action.nargs in ("*", "+")), default, text


def render_command_reference() -> str:
    """Generate the Markdown reference of all commands that run with `python`, from their argument parsers.

    Returns:
        Markdown with one section per command: its description and a table of its flags.
    """
    text = []
    for folder, title in COMMAND_FOLDERS.items():
        text.append(f"## {title}")
        for module in find_command_modules(folder):
            parser, name = _capture_command_parser(module), module.removesuffix(".__main__")
            start = "python train_accelerate.py" if module == "train_accelerate" else f"python -m {name}"
            text.append(f"### {name}\n\n`{start}`\n\n{_convert_description_to_markdown(parser.description or '')}")
            actions = [action for action in parser._actions if action.dest != "help"]
            actions.sort(key=lambda action: not action.required)  # required flags come first, as in `--help`
            rows = map(_build_command_argument_row, actions)
            text.append(_build_markdown_table(rows, "Flag", "Type", "Default", "Meaning"))
    return "\n\n".join(text)


def render_search_command_reference(language: str = "en") -> str:
    """Generate the Markdown reference of the subcommands of `capivara`, the command of the picture search.

    Args:
        language: Language of the descriptions, "en" or "pt".

    Returns:
        Markdown with one section per subcommand: its description and a table of its flags.
    """
    messages, text = Messages(language), []
    group = capivara.make_context("capivara", [], obj=messages, resilient_parsing=True)
    for english, portuguese in COMMAND_NAMES.items():
        command = capivara.get_command(group, english)
        context = click.Context(command, group, english, obj=messages)
        name = f"{english} ({portuguese})" if portuguese != english else english
        text.append(f"### capivara {name}\n\n{_convert_description_to_markdown(messages(f'about.{english}'))}")
        records = [get_localized_help_record(param, context) for param in command.get_params(context)]
        rows = [(f"`{flag}`", escape(meaning)) for flag, meaning in records]
        text.append(_build_markdown_table(rows, "Flag", "Meaning"))
    return "\n\n".join(text)


def render_config_files_as_code_blocks() -> str:
    """Generate Markdown that shows all YAML files of the folder `configs`, each in a code block under its path."""
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    blocks = [f"## {path.relative_to(ROOT)}\n\n```yaml\n{path.read_text(encoding='utf-8')}```" for path in paths]
    return "\n\n".join(blocks)


GENERATED: dict[str, Callable[[], str]] = {
    "commands": render_command_reference,
    "search_commands": render_search_command_reference,
    "configs": render_config_files_as_code_blocks,
}


def insert_generated_parts_and_rewrite_links(page: str, text: str) -> str:
    """Convert the text of a repository page to the text that the documentation site shows.

    Each line `<!-- site: NAME -->` is replaced by generated text, and links lead to pages of the site.

    Args:
        page: Name of the page below `docs`, without the suffix, such as "how-to/search".
        text: Text of the page in `docs`. Not used for the pages in `OUTSIDE_PAGES`, which are files outside `docs`.

    Returns:
        The Markdown text for the site.
    """
    source = Path(OUTSIDE_PAGES.get(page, f"docs/{page}.md"))
    if page in OUTSIDE_PAGES:
        text = (ROOT / source).read_text(encoding="utf-8")
    # On GitHub, such a line is an invisible comment.
    text = re.sub(r"^<!-- site: (\w+) -->$", lambda match: GENERATED[match[1]](), text, flags=re.MULTILINE)
    site_pages = {file: f"docs/{name}.md" for name, file in OUTSIDE_PAGES.items()} | {"README.md": "docs/index.md"}
    here = os.path.dirname(f"docs/{page}.md")

    def follow(match: re.Match) -> str:
        file = os.path.normpath(os.path.join(source.parent, match[0]))
        return os.path.relpath(site_pages.get(file, file), here)

    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.lstrip().startswith("```") else LINK_TARGET_RE.sub(follow, part) for part in parts)

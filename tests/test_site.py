"""The documentation site: generated reference pages, and links to files outside `docs`. `make docs` builds the site."""

import re
from pathlib import Path

import pytest

from site_pages import (
    COMMAND_FOLDERS,
    IS_COMMAND_RE,
    OUTSIDE_PAGES,
    command_modules,
    commands,
    configs,
    search_commands,
    site_text,
)

ROOT = Path(__file__).resolve().parent.parent


def test_every_command_of_the_repository_is_on_the_page():
    files = [
        path.relative_to(ROOT) for path in ROOT.glob("*/**/*.py") if not {".venv", "tests", "build"} & set(path.parts)
    ]
    found = {".".join(path.with_suffix("").parts) for path in files if IS_COMMAND_RE.search((ROOT / path).read_text())}
    listed = {name for folder in COMMAND_FOLDERS for name in command_modules(folder)}
    assert listed == found - {"capivara_search.__main__"} | {"train_accelerate"}


@pytest.mark.slow
def test_the_reference_of_commands_has_flags_types_defaults_and_help():
    text = commands()
    assert "| `--model` | str | required |" in text
    assert re.search(r"\| `--learning_rate` \| float \| `\S+` \| \w+", text)
    assert re.search(r"\| `--caption_strategy` \| `\w+`, `\w+`", text)
    assert len(re.findall(r"^### ", text, re.MULTILINE)) > 35


def test_the_reference_of_the_search_names_commands_in_both_languages():
    text = search_commands()
    assert "### capivara search (buscar)" in text and "`--since" in text
    assert "<" not in re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


def test_every_config_is_shown():
    assert configs().count("```yaml") == len(list((ROOT / "configs").rglob("*.yaml")))


def test_links_to_files_outside_docs_lead_to_their_pages():
    text = site_text("how-to/x", "[a](../../SECURITY.md#the-page) [b](search.md) [c](https://a.b/SECURITY.md)")
    assert text == "[a](../explanation/security.md#the-page) [b](search.md) [c](https://a.b/SECURITY.md)"
    assert site_text("x", "```\n[a](../SECURITY.md)\n```") == "```\n[a](../SECURITY.md)\n```"


@pytest.mark.parametrize("page", OUTSIDE_PAGES)
def test_a_page_for_a_file_outside_docs_has_its_text(page):
    title = (ROOT / OUTSIDE_PAGES[page]).read_text(encoding="utf-8").splitlines()[0]
    assert site_text(page, "stub").startswith(title)

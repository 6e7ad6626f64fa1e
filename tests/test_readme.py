"""Checks of the documentation: figures equal the committed JSON, code and commands run, links and names exist."""

import argparse
import importlib
import re
import shlex
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import click
import pytest
from parsed_command import parsed
from PIL import Image

from benchmarks import documentation_tables as tables
from capivara_common.cli import UsageError
from capivara_common.files import write_json
from capivara_search.messages import COMMAND_NAMES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "LEIAME.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!http)([^)\s]+)\)")


def code_with(page: str, word: str) -> str:
    """Return the only Python block of a page that contains a word."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL) if word in block)
    return code


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub builds them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", tables.find_pages_with_generated_blocks())
def test_figures_equal_the_committed_json(page):
    assert tables.replace_generated_blocks_in_text(page, TEXTS[page]) == TEXTS[page], (
        "run `python -m benchmarks.documentation_tables`"
    )


def test_every_table_macro_is_used_on_a_page():
    macros = {name for name in vars(tables.load_block_macros().module) if not name.startswith("_")} - {"on"}
    assert macros == {name for text in TEXTS.values() for _, name, _ in tables.BLOCK_RE.findall(text)}
    page = "docs/reference/benchmarks.md"
    with pytest.raises(ValueError, match=r"benchmarks\.md.*'no_such'"):
        tables.replace_generated_blocks_in_text(page, TEXTS[page].replace("demo_summary", "no_such"))


def test_the_memory_of_a_step_is_measured_extrapolated_or_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS_FOLDER", tmp_path)
    measured = {"pairs": 2816, "peak_memory_bytes": 2**31}
    extrapolated = {"pairs": 512, "peak_memory_bytes": 2**31, "extrapolated": {"peak_memory_bytes": 3 * 2**30}}
    write_json(tmp_path / "measured.json", {"recipe": measured})
    write_json(tmp_path / "extrapolated.json", {"recipe": extrapolated})
    assert [
        tables.format_recorded_training_step_peak_memory(name) for name in ("measured", "extrapolated", "none")
    ] == [
        "2.0",
        "2.0–3.0",
        "–",
    ]


@pytest.mark.slow
def test_a_changed_figure_is_detected_and_a_new_commit_is_shown(monkeypatch, tmp_path):
    for name in tables.find_pages_with_generated_blocks():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        changed = re.sub(r"(captions per second, float32 \|) \d", r"\1 x", TEXTS[name])
        (tmp_path / name).write_text(changed, encoding="utf-8")
    monkeypatch.setattr(tables, "CODE_ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"docs/reference/benchmarks\.md"):
        tables.main(["--check"])
    tables.main([])
    assert all(
        (tmp_path / name).read_text(encoding="utf-8") == TEXTS[name]
        for name in tables.find_pages_with_generated_blocks()
    )
    tables.main(["--check"])
    results = tables.load_results("recipe") | {"commit": "0123abc", "date": "2026-11-28"}
    monkeypatch.setattr(tables, "load_results", lambda name: results)
    assert "commit 0123abc, 2026-11-28" in tables.load_block_macros().module.demo_summary(False)


def test_demo_results_are_not_copied_by_a_check(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS_FOLDER", tmp_path)
    with pytest.raises(UsageError, match=r"--demo.*--check"):
        tables.main(["--check", "--demo", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_images_of_the_documentation_are_small():
    for path in (ROOT / "docs").glob("*.png"):
        assert path.stat().st_size < 400_000, (
            f"{path.name}: save it by benchmarks.documentation_tables.save_small_image"
        )


def test_the_readme_is_short():
    for page in ("README.md", "LEIAME.md"):
        assert len(TEXTS[page].splitlines()) <= 120, "details belong into docs/"
        assert all(code.count("\n") <= 12 for _, code in FENCE.findall(TEXTS[page]))


@pytest.mark.slow
def test_the_miniature_example_of_the_readme_prints_the_answer(capsys):
    exec(compile(code_with("README.md", "get_or_build_miniature_folder"), "README.md", "exec"), {})
    assert "{'score': 0.74" in capsys.readouterr().out


@pytest.mark.slow
def test_the_search_example_of_the_readme_runs_offline(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CAPIVARA_MODEL", raising=False)
    (tmp_path / "Fotos").mkdir()
    Image.new("RGB", (320, 240), "red").save(tmp_path / "Fotos" / "gato.jpg")
    exec(compile(code_with("README.md", "PictureIndex"), "README.md", "exec"), {})
    assert str(tmp_path / "Fotos" / "gato.jpg") in capsys.readouterr().out


@pytest.mark.slow
def test_the_code_of_the_search_tutorial_finds_the_coffee(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for word in ("load_example_photo", "PictureIndex"):
        exec(compile(code_with("docs/tutorials/first_search.md", word), "first_search.md", "exec"), {})
    assert "fotos/coffee.jpg" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.slow
def test_the_trainer_example_runs(tiny_model, tiny_processor, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    captions = ["um gato", "a casa azul", "o carro", "pão"]
    pairs = [{"caption": text, "image": Image.new("RGB", (40, 37), (40 * i, 9, 9))} for i, text in enumerate(captions)]
    names = {"model": tiny_model, "processor": tiny_processor, "pairs": pairs}
    exec(compile(code_with("docs/how-to/training.md", "ExactBatchTrainer"), "training.md", "exec"), names)
    assert names["trainer"].state.global_step == 3


def test_the_metric_example_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code_with("docs/how-to/evaluation.md", "evaluate.load"), "evaluation.md", "exec"), {})
    assert "{'recall_at_k': 0.5}" in capsys.readouterr().out


# ---- commands ----

LANGUAGES = {
    "LEIAME.md": "pt",
    "docs/how-to/busca.md": "pt",
    "docs/how-to/seu_idioma.md": "pt",
    "docs/how-to/immich.md": "pt",
    "docs/how-to/servidor_de_legendas.md": "pt",
}
FOREIGN_MODULES = ("http.server", "pip", "pytest", "venv")  # modules after `python -m` that are not of this project
COMMAND_STARTS = (
    "capivara ",
    "python -m ",
    "python train_accelerate.py ",
    "accelerate launch ",
    "make ",
    "pip install ",
)
ELLIPSIS = "…"  # a command with an ellipsis is text, not a complete command


class Parsed(BaseException):
    """Raised when a command line has been parsed, so that the command does not start."""


def commands_of(text: str) -> list[list[str]]:
    """Return the words of each command on a page: lines of shell blocks, and inline code with flags."""
    blocks = [code for kind, code in FENCE.findall(text) if kind in ("bash", "sh")]
    lines = [line.strip() for code in blocks for line in code.replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    lines += [code for code in inline if " -" in code.removeprefix("python -m ")]
    commands = (re.sub(r"^([A-Z_]+=\S* +)+", "", command) for line in lines for command in re.split(r"\s&&\s", line))
    words = [shlex.split(command, comments=True) for command in commands if command.startswith(COMMAND_STARTS)]
    return [command for command in words if ELLIPSIS not in command]


def parse_command(words: list[str], language: str, parse_known_args: Callable) -> None:
    """Parse a command with its own parser. Raises SystemExit, ValueError or AssertionError if it is refused."""
    if words[:1] == ["capivara"] or words[:3] == ["python", "-m", "capivara_search"]:
        parsed(words[1 if words[0] == "capivara" else 3 :], language)
    elif words[:2] == ["python", "-m"] and words[2] not in FOREIGN_MODULES:
        run_until_parsed(words[2], words[3:])
    elif words[:2] in (["python", "train_accelerate.py"], ["accelerate", "launch"]):
        start = words.index("-m") + 1 if "-m" in words else words.index("train_accelerate.py")
        run_until_parsed(words[start].removesuffix(".py"), words[start + 1 :])
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["pip", "install"]:
        setup = ConfigParser(interpolation=None)
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        extras = {extra for word in words for names in re.findall(r"\[(.+)\]", word) for extra in names.split(",")}
        assert extras <= set(setup["options.extras_require"]) | {"image"}


def run_until_parsed(module: str, words: list[str]) -> None:
    """Run `main` of a module until its flags are parsed; config files of the project must exist."""
    configs = [ROOT / words[words.index("--config") + 1]] if "--config" in words else []
    assert all(path.is_file() for path in configs if path.parent != ROOT), configs  # my.yaml is a file of the reader
    main = importlib.import_module(
        module + ("" if (ROOT / f"{module.replace('.', '/')}.py").is_file() else ".__main__")
    )
    with pytest.raises(Parsed):
        main.main(words)


@pytest.fixture
def stops_when_parsed(monkeypatch, tmp_path):
    """Make every parser raise Parsed after it has accepted all words."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parsed_all(parser, *args, **options):
        _, unknown = parse_known_args(parser, *args, **options)
        assert not unknown, unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed_all)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # a home folder with pictures
    (tmp_path / "Fotos" / "2023").mkdir(parents=True)
    (tmp_path / "foto.jpg").touch()
    (tmp_path / "fotos").mkdir()
    (tmp_path / "fotos" / "chelsea.jpg").touch()
    return parse_known_args


@pytest.mark.slow
@pytest.mark.parametrize("page", TEXTS)
def test_commands_on_pages_can_be_parsed(page, stops_when_parsed):
    wrong = []
    for words in commands_of(TEXTS[page]):
        try:
            parse_command(words, LANGUAGES.get(page, "en"), stops_when_parsed)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            if "--help" in words and (isinstance(error, click.exceptions.Exit) or getattr(error, "code", 1) == 0):
                continue
            wrong.append(f"{shlex.join(words)}: {type(error).__name__} {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [*TEXTS, "CHANGELOG.md"])
def test_modules_named_on_pages_exist(page):
    for name in re.findall(r"python -m ([\w.]+)", (ROOT / page).read_text(encoding="utf-8")):
        path = ROOT / name.rstrip(".").replace(".", "/")
        assert name in FOREIGN_MODULES or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


@pytest.mark.parametrize("page", sorted(set(TEXTS) - {"docs/how-to/training.md"}))  # which explains the difference
def test_training_on_a_single_device_is_started_with_python(page):
    """Without these flags, `accelerate launch` trains the same, but prints warnings."""
    launches = [line for line in TEXTS[page].splitlines() if re.search(r"accelerate launch.*\btrain_accelerate", line)]
    assert all("--config_file" in line or "--multi_gpu" in line for line in launches), launches


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_anchors_exist(page):
    for target in LINK.findall(re.sub(r"`[^`]+`", "", FENCE.sub("", TEXTS[page]))):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def test_the_architecture_page_names_existing_files_and_functions():
    text = TEXTS["docs/explanation/architecture.md"]
    for path in set(re.findall(r"`([\w./]+(?:\.py|/))`", text)):
        assert (ROOT / path).exists(), path
    steps = re.findall(r"^\| \d+ \| `([^`]+)` \| `(\w+)` \|", text, re.MULTILINE)
    assert len(steps) == len(re.findall(r"^\| \d", text, re.MULTILINE)) > 20
    for path, name in steps:
        code = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b", code, re.MULTILINE), f"{path}: {name}"


# ---- translations ----

TRANSLATIONS = {"README.md": "LEIAME.md", "docs/how-to/search.md": "docs/how-to/busca.md"}
TRANSLATIONS |= {"docs/how-to/your_language.md": "docs/how-to/seu_idioma.md"}
TRANSLATIONS |= {"docs/how-to/captions_server.md": "docs/how-to/servidor_de_legendas.md"}
ENGLISH = {  # Portuguese -> English in code: placeholders, flags with two names, and commands
    **{"ARQUIVO": "FILE", "MODELO": "MODEL", "NOME": "NAME", "PASTA": "FOLDER", "meu_modelo": "mine"},
    **{"--mais": "--more", "--menos": "--less"},
    **{portuguese: english for english, portuguese in COMMAND_NAMES.items()},
}
OTHER_PAGE = {Path(name).name: Path(other).name for name, other in TRANSLATIONS.items()}
OTHER_PAGE |= {other: name for name, other in OTHER_PAGE.items()}


def in_english(code: str) -> str:
    """Replace Portuguese names in code by the English ones; a name within a longer word stays."""
    return re.sub(rf"(?<![\w-])(?:{'|'.join(ENGLISH)})(?!\w)", lambda match: ENGLISH[match[0]], code)


def parts(text: str, swap: bool) -> dict[str, list]:
    """Extract the parts of a page that must be equal in both languages.

    Args:
        text: Text of the page.
        swap: Whether to replace links to translated pages by links to the page in the other language.
    """
    prose = FENCE.sub("", text)
    links = [re.sub(r"[\w.]+$", lambda match: OTHER_PAGE.get(match[0], match[0]), link) if swap else link
             for link in re.findall(r"\]\(([^)\s]+)\)", prose)]  # fmt: skip
    code = [in_english(" ".join(code.split())) for code in re.findall(r"`[^`]+`", prose)]
    plain = re.sub(r"\]\([^)\s]+\)", "]", re.sub(r"`[^`]+`", "", prose))
    return {
        "levels of the headings": [len(level) for level in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "code": [(kind, in_english(re.sub(r"(^|\s+)#.*", "", code))) for kind, code in FENCE.findall(text)],
        "code in the text": sorted(code),
        "links": sorted(links),
        "figures": sorted(number.replace(",", ".") for number in re.findall(r"\d+(?:[.,]\d+)*", plain)),
        "columns of the tables": [line.count("|") for line in prose.splitlines() if line.startswith("|")],
        "list items": [len(re.findall(r"^\s*(?:-|\d\.) ", prose, re.MULTILINE))],
    }


def test_the_portuguese_guides_name_commands_in_portuguese():
    for page in ("LEIAME.md", "docs/how-to/busca.md"):
        named = re.findall(r"(?<=capivara )\w+|--more|--less", " ".join(TEXTS[page].split()))
        assert not {"--more", "--less", *COMMAND_NAMES} & set(named), page


@pytest.mark.parametrize("page", TRANSLATIONS)
def test_translations_have_the_same_structure(page):
    english, portuguese = parts(TEXTS[page], swap=False), parts(TEXTS[TRANSLATIONS[page]], swap=True)
    for part, expected in english.items():
        assert portuguese[part] == expected, f"{part} of {page} and {TRANSLATIONS[page]}"

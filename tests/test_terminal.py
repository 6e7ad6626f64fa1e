"""A terminal is shown nothing that it would obey by a stranger's will, and pictures where it says that it can."""

import io
import os
import re
import sys
import unicodedata
from pathlib import Path

import click
import numpy as np
import PIL.Image

from capivara_common.privacy import escape_control_characters
from capivara_search.command import capivara
from capivara_search.messages import Messages
from capivara_search.terminal import (
    display_width,
    escape_csv_cell,
    fit_to_columns,
    format_link,
    format_table,
    render_contact_sheet,
    shorten_path,
    supports_pictures,
    supports_true_color,
)

ROOT = Path(__file__).resolve().parent.parent
COLOURS = [(255, 0, 0), (0, 160, 0), (0, 0, 255)]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no file")


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_what_a_terminal_obeys_is_shown_as_an_escape():
    for name, shown in (("a\nb\r\x07\x9b31m", r"a\nb\r\x07\x9b31m"), (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png")):
        assert escape_control_characters(name) == escape_control_characters(shown) == shown
    for name in (
        "\u0645\u06cc\u200c\u062e \u0600\u0660.jpg",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 ção 日本.jpg",
    ):
        assert escape_control_characters(name) == name, "joiners and signs that names need"


def test_every_character_that_is_not_seen_is_an_escape_but_for_those_that_names_need():
    seen = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
    for code in range(sys.maxunicode + 1):
        hidden = unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        if hidden and code not in seen | {0x200C, 0x200D}:
            assert escape_control_characters(chr(code)) != chr(code), hex(code)


def test_a_cell_begins_as_no_formula():
    for text in ("=1+1", "+55", "-a.jpg", "@SUM(A1)", "=cmd|' /C calc'!A0"):
        assert (escape_csv_cell(text), escape_csv_cell(f"a{text}")) == ("'" + text, f"a{text}")


def test_a_link_holds_nothing_that_would_end_it():
    assert format_link("/a b;/ç.png", "t") == "\x1b]8;;file:///a%20b%3B/%C3%A7.png\x1b\\t\x1b]8;;\x1b\\"
    assert format_link("/a/\x1b]8;;x\x1b\\.png", "t") == "t"


def test_a_path_is_shown_from_where_its_user_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Fotos" / "2024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Fotos")
    assert shorten_path(f"{tmp_path}/Fotos/2024/a.jpg") == "2024/a.jpg"
    assert shorten_path(f"{tmp_path}/Outras/a.jpg") == "~/Outras/a.jpg"
    assert shorten_path(f"{tmp_path}-2/a.jpg") == f"{tmp_path}-2/a.jpg"
    monkeypatch.chdir("/")
    assert shorten_path("/srv/a.jpg") == "/srv/a.jpg"


def test_columns_stand_below_each_other_whatever_the_letters():
    assert (display_width("日本"), display_width("e\u0301"), display_width("👨‍👩‍👧")) == (4, 1, 6)
    assert (
        fit_to_columns("abcdef", 4) == "abc…"
        and fit_to_columns("日本語", 4) == "日… "
        and fit_to_columns("ab", 4) == "ab  "
    )
    assert list(format_table([["nº", "é", "x"], ["1", "日本", "y"]], right_aligned=(0,))) == [
        "nº  é     x",
        " 1  日本  y",
    ]


def test_numbers_are_written_as_the_language_does():
    pt, en = Messages("pt"), Messages("en")
    assert (pt.number(1234.5, 1), en.number(1234.5, 1)) == ("1.234,5", "1,234.5")
    assert (pt.count("new", 1), pt.count("new", 2000)) == ("1 imagem nova", "2.000 imagens novas")
    assert [pt.size(n) for n in (300, 2_500_000, 3_100_000_000)] == ["0,0 MB", "2,5 MB", "3,1 GB"]


def test_every_text_is_there_in_both_languages_with_the_same_places():
    for key, entry in Messages("pt")._messages.items():
        if entry.keys() == {"pt"}:  # its English is the library's own
            assert key.startswith(("error.", "note.", "reason.")), key
            continue
        assert entry.keys() == {"pt", "en"}, key
        assert isinstance(entry["pt"], list) == isinstance(entry["en"], list), key
        found = [set(re.findall(r"\{(\w*)[^}]*\}", str(entry[language]))) for language in ("pt", "en")]
        assert found[0] == found[1] or (key.startswith("error.") and found[0] < found[1]), key


class Recording(Messages):
    """Words that know which of them were asked for."""

    asked: set[str] = set()

    def raw(self, key: str) -> str | list[str]:
        self.asked.add(key)
        return super().raw(key)


def test_no_text_is_stale_and_none_is_missing():
    context = click.Context(capivara, info_name="capivara", obj=Recording("pt"))
    for one in (capivara, *capivara.commands.values()):
        one.get_help(click.Context(one, parent=context))
    rooms = ("capivara_search", "capivara_common", "modeling_capivara")
    code = "".join(path.read_text(encoding="utf-8") for room in rooms for path in (ROOT / room).rglob("*.py"))
    named = set(re.findall(r"[\"']([\w.]+)[\"']", code))
    known = Messages("pt")._messages.keys()
    coded = {key for key in known if key.startswith(("error.", "note.")) and key.partition(".")[2] in named}
    made = {key for key in known if key.startswith(("column.", "status.", "reason.", "gone.", "skipped.", "bad."))}
    assert not known - Recording.asked - named - coded - made
    assert set(re.findall(r"(?:words|say)(?:\.count|\.raw)?\(\"([\w.]+)\"", code)) <= known
    for kind, start in (("note", r"note\("), ("error", r"failure\([^\n]+?, ")):
        assert {f"{kind}.{key}" for key in re.findall(rf"\b{start}\"(\w+)\"", code)} <= known


STYLE = re.compile(r"\x1b\[(?:38;2;(\d+);(\d+);(\d+);48;2;\d+;\d+;\d+|0)m")


def test_pictures_are_drawn_in_their_places():
    pictures, captions = [*map(picture, COLOURS[:2]), b"broken", None], ["1 a.png", "2 b.png", "3 c.png", "4 d.png"]
    lines = render_contact_sheet(pictures, captions, 80).split("\n")
    caption = next(number for number, line in enumerate(lines) if "a.png" in line)
    middle, place = lines[caption // 2], (80 - 1) // 2
    seen = STYLE.sub("", middle)
    assert len(seen) == 2 * place and all(set(seen[at + 1 : at + 37]) == {"▀"} for at in (0, place)), seen
    cells = np.array([found for found in STYLE.findall(middle) if found[0]], int)  # without what ends a style
    for found, colour in zip(np.split(cells, 2), COLOURS[:2], strict=True):
        assert np.abs(found - colour).max() < 12
    assert lines[caption].startswith(" 1 a.png") and lines[caption].index("2 b.png") == place + 1
    assert not "".join(lines[caption + 1 : -2]).strip() and lines[-2].startswith(" 3 c.png"), "two of no picture"
    assert render_contact_sheet(pictures, captions, 80, 1).rstrip().endswith("2 b.png"), "no more lines than there are"


COLOURED = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


def test_a_terminal_gets_the_pictures_that_its_variables_speak_of_and_a_pipe_none():
    for environment, shown in (
        ({"TERM": "xterm-256color"}, False),
        (COLOURED, True),
        (COLOURED | {"NO_COLOR": "1"}, False),
        (COLOURED | {"TERM": "dumb"}, False),
    ):
        assert supports_pictures(Terminal(), environment) == shown
    assert not supports_pictures(io.StringIO(), COLOURED) and not supports_true_color(io.StringIO(), COLOURED)

"""Terminal output: control characters in names of files are escaped, and pictures are drawn if the terminal can."""

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
from capivara_search.csv_output import escape_csv_cell
from capivara_search.messages import Messages
from capivara_search.terminal import (
    align_columns,
    display_width,
    fit_to_columns,
    format_link,
    render_contact_sheet,
    shorten_and_escape_path,
    supports_pictures,
    supports_true_color,
)

ROOT = Path(__file__).resolve().parent.parent
COLORS = [(255, 0, 0), (0, 160, 0), (0, 0, 255)]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no file")


def picture(color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def test_control_characters_are_shown_as_escapes():
    for name, shown in (("a\nb\r\x07\x9b31m", r"a\nb\r\x07\x9b31m"), (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png")):
        assert escape_control_characters(name) == escape_control_characters(shown) == shown
    for name in (
        "\u0645\u06cc\u200c\u062e \u0600\u0660.jpg",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 ção 日本.jpg",
    ):
        assert escape_control_characters(name) == name, "joiners and marks that names need stay"


def test_every_invisible_character_is_escaped_except_those_that_names_need():
    visible = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
    for code in range(sys.maxunicode + 1):
        hidden = unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        if hidden and code not in visible | {0x200C, 0x200D}:
            assert escape_control_characters(chr(code)) != chr(code), hex(code)


def test_a_csv_cell_is_never_a_formula():
    for text in ("=1+1", "+55", "-a.jpg", "@SUM(A1)", "=cmd|' /C calc'!A0"):
        assert (escape_csv_cell(text), escape_csv_cell(f"a{text}")) == ("'" + text, f"a{text}")


def test_a_link_with_control_characters_is_plain_text():
    assert format_link("/a b;/ç.png", "t") == "\x1b]8;;file:///a%20b%3B/%C3%A7.png\x1b\\t\x1b]8;;\x1b\\"
    assert format_link("/a/\x1b]8;;x\x1b\\.png", "t") == "t"


def test_a_path_is_shown_relative_to_the_current_folder_or_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Fotos" / "2024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Fotos")
    assert shorten_and_escape_path(f"{tmp_path}/Fotos/2024/a.jpg") == "2024/a.jpg"
    assert shorten_and_escape_path(f"{tmp_path}/Outras/a.jpg") == "~/Outras/a.jpg"
    assert shorten_and_escape_path(f"{tmp_path}-2/a.jpg") == f"{tmp_path}-2/a.jpg"
    monkeypatch.chdir("/")
    assert shorten_and_escape_path("/srv/a.jpg") == "/srv/a.jpg"


def test_columns_are_aligned_for_wide_and_combining_characters():
    assert (display_width("日本"), display_width("e\u0301"), display_width("👨‍👩‍👧")) == (4, 1, 6)
    assert (
        fit_to_columns("abcdef", 4) == "abc…"
        and fit_to_columns("日本語", 4) == "日… "
        and fit_to_columns("ab", 4) == "ab  "
    )
    assert list(align_columns([["nº", "é", "x"], ["1", "日本", "y"]], right_aligned=(0,))) == [
        "nº  é     x",
        " 1  日本  y",
    ]


def test_numbers_are_formatted_for_the_language():
    pt, en = Messages("pt"), Messages("en")
    assert (pt.format_number(1234.5, 1), en.format_number(1234.5, 1)) == ("1.234,5", "1,234.5")
    assert (pt.format_count("new", 1), pt.format_count("new", 2000)) == ("1 imagem nova", "2.000 imagens novas")
    assert [pt.format_size(n) for n in (300, 2_500_000, 3_100_000_000)] == ["0,0 MB", "2,5 MB", "3,1 GB"]


def test_every_message_is_in_both_languages_with_the_same_placeholders():
    for key, texts in Messages("pt")._messages.items():
        if texts.keys() == {"pt"}:  # its English text is in the code that raises the error
            assert key.startswith(("error.", "note.", "reason.")), key
            continue
        assert texts.keys() == {"pt", "en"}, key
        assert isinstance(texts["pt"], list) == isinstance(texts["en"], list), key
        portuguese, english = (set(re.findall(r"\{(\w*)[^}]*\}", str(texts[language]))) for language in ("pt", "en"))
        assert portuguese == english, key


def test_errors_begin_with_a_capital_letter_and_end_with_a_full_stop_in_both_languages():
    """They may begin with a value or a flag, and end with a command to copy or the message of another error."""
    for key, texts in Messages("pt")._messages.items():
        if not key.startswith(("error.", "bad.")):
            continue
        for text in texts.values():
            assert re.match(r"[A-ZÀ-Ú]|\{|--", text), (key, text)
            command = r": (?:capivara|pip install|--include) [^.]*"
            assert re.search(rf"(?:\.|: \{{(?:reason|error|text|command)\}}|{command})$", text), (key, text)


class RecordingMessages(Messages):
    """Messages that record which of their texts were used."""

    used_keys: set[str] = set()

    def raw(self, key: str) -> str | list[str]:
        self.used_keys.add(key)
        return super().raw(key)


def test_every_message_is_used_and_every_used_message_exists():
    context = click.Context(capivara, info_name="capivara", obj=RecordingMessages("pt"))
    for command in (capivara, *capivara.commands.values()):
        command.get_help(click.Context(command, parent=context))
    packages = ("capivara_search", "capivara_common", "modeling_capivara")
    code = "".join(path.read_text(encoding="utf-8") for package in packages for path in (ROOT / package).rglob("*.py"))
    quoted_words = set(re.findall(r"[\"']([\w.]+)[\"']", code))
    keys = Messages("pt")._messages.keys()
    coded = {key for key in keys if key.startswith(("error.", "note.")) and key.partition(".")[2] in quoted_words}
    composed = {key for key in keys if key.startswith(("column.", "status.", "reason.", "ignored.", "bad."))}
    assert not keys - RecordingMessages.used_keys - quoted_words - coded - composed
    assert set(re.findall(r"messages(?:\.format_count|\.raw)?\(\"([\w.]+)\"", code)) <= keys
    for prefix, function in (("note", r"log_message_from_code\("), ("error", r"make_error_from_code\([^\n]+?, ")):
        codes = re.findall(rf"\b{function}\"(\w+)\"", code)
        assert codes and {f"{prefix}.{code}" for code in codes} <= keys


STYLE = re.compile(r"\x1b\[(?:38;2;(\d+);(\d+);(\d+);48;2;\d+;\d+;\d+|0)m")


def test_pictures_are_drawn_above_their_captions():
    pictures, captions = [*map(picture, COLORS[:2]), b"broken", None], ["1 a.png", "2 b.png", "3 c.png", "4 d.png"]
    lines = render_contact_sheet(pictures, captions, 80, max_lines=1000).split("\n")
    caption = next(number for number, line in enumerate(lines) if "a.png" in line)
    middle, place = lines[caption // 2], (80 - 1) // 2
    characters = STYLE.sub("", middle)
    assert len(characters) == 2 * place
    assert all(set(characters[start + 1 : start + 37]) == {"▀"} for start in (0, place)), characters
    cells = np.array([style for style in STYLE.findall(middle) if style[0]], int)  # without the resets of the style
    for drawn, color in zip(np.split(cells, 2), COLORS[:2], strict=True):
        assert np.abs(drawn - color).max() < 12
    assert lines[caption].startswith(" 1 a.png") and lines[caption].index("2 b.png") == place + 1
    assert not "".join(lines[caption + 1 : -2]).strip() and lines[-2].startswith(" 3 c.png"), (
        "the places of a broken and a missing picture are empty"
    )
    assert render_contact_sheet(pictures, captions, 80, 1).rstrip().endswith("2 b.png"), "further rows are left out"


TRUE_COLOR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


def test_pictures_are_shown_on_true_color_terminals_only(monkeypatch):
    for environment, is_supported in (
        ({"TERM": "xterm-256color"}, False),
        (TRUE_COLOR, True),
        (TRUE_COLOR | {"NO_COLOR": "1"}, False),
        (TRUE_COLOR | {"TERM": "dumb"}, False),
    ):
        monkeypatch.setattr(os, "environ", environment)
        assert supports_pictures(Terminal()) == is_supported
    monkeypatch.setattr(os, "environ", TRUE_COLOR)
    assert not supports_pictures(io.StringIO()) and not supports_true_color(io.StringIO())

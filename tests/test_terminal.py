"""A terminal is shown nothing that it would obey by a stranger's will, and pictures where it says that it can."""

import base64
import io
import os
import pty
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from capivara_search.command_flags import parser
from capivara_search.terminal import (
    KINDS,
    Screen,
    Words,
    contact_sheet,
    cut,
    harmless,
    link,
    screen,
    shown_path,
    table,
    text_cell,
    width,
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


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[2Jb.png", r"a\x1b[2Jb.png"),
        ("a\nb\r\x07\x9b31m", r"a\x0ab\x0d\x07\x9b31m"),
        ("gpj\u202e.exe", r"gpj\u202e.exe"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("\ud83d", r"\ud83d"),
        ("pra\xadia\u180e.jpg", r"pra\xadia\u180e.jpg"),
        ("a\U000e0041\U000e007f.jpg", r"a\U000e0041\U000e007f.jpg"),
        ("می‌خواهم क्‍ष ܏٠.jpg".replace("܏", "\u0600"), "می‌خواهم क्‍ष \u0600٠.jpg"),
        ("família 👨‍👩‍👧 ção 日本.jpg", "família 👨‍👩‍👧 ção 日本.jpg"),
    ],
)
def test_what_a_terminal_obeys_is_shown_as_an_escape(name, shown):
    assert harmless(name) == shown
    assert harmless(shown) == shown


def test_every_character_that_is_not_seen_is_an_escape_but_for_those_that_names_need():
    seen = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
    for code in range(sys.maxunicode + 1):
        hidden = unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        if hidden and code not in seen | {0x200C, 0x200D}:
            assert harmless(chr(code)) != chr(code), hex(code)


@pytest.mark.parametrize("text", ["=1+1", "+55", "-a.jpg", "@SUM(A1)", "=cmd|' /C calc'!A0"])
def test_a_cell_begins_as_no_formula(text):
    assert text_cell(text) == "'" + text
    assert text_cell(f"a{text}") == f"a{text}"


def test_a_link_holds_nothing_that_would_end_it():
    assert link("/a b;/ç.png", "t") == "\x1b]8;;file:///a%20b%3B/%C3%A7.png\x1b\\t\x1b]8;;\x1b\\"
    assert link("/a/\x1b]8;;x\x1b\\.png", "t") == "t"


def test_a_path_is_shown_from_where_its_user_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Fotos" / "2024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Fotos")
    assert shown_path(f"{tmp_path}/Fotos/2024/a.jpg") == "2024/a.jpg"
    assert shown_path(f"{tmp_path}/Outras/a.jpg") == "~/Outras/a.jpg"
    assert shown_path(f"{tmp_path}-2/a.jpg") == f"{tmp_path}-2/a.jpg"
    monkeypatch.chdir("/")
    assert shown_path("/srv/a.jpg") == "/srv/a.jpg"


def test_columns_stand_below_each_other_whatever_the_letters():
    assert (width("日本"), width("e\u0301"), width("👨‍👩‍👧")) == (4, 1, 6)
    assert cut("abcdef", 4) == "abc…" and cut("日本語", 4) == "日… " and cut("ab", 4) == "ab  "
    assert list(table([["nº", "é", "x"], ["1", "日本", "y"]], right=(0,))) == ["nº  é     x", " 1  日本  y"]


def test_numbers_are_written_as_the_language_does():
    pt, en = Words("pt"), Words("en")
    assert (pt.number(1234.5, 1), en.number(1234.5, 1)) == ("1.234,5", "1,234.5")
    assert (pt.count("new", 1), pt.count("new", 2000)) == ("1 imagem nova", "2.000 imagens novas")
    assert [en.duration(s) for s in (1.25, 42, 61, 3700)] == ["1.2 s", "42 s", "1 min", "1 h 2 min"]
    assert [pt.size(n) for n in (300, 2_500_000, 3_100_000_000)] == ["0,3 kB", "2,5 MB", "3,1 GB"]


def test_every_text_is_there_in_both_languages_with_the_same_places():
    texts = Words("pt")._texts
    for key, entry in texts.items():
        if key.startswith("library."):  # its English is the library's own
            places = set(re.findall(r"\?P<(\w+)>", entry["match"]))
            assert (
                entry.keys() - {"code"} == {"match", "pt"} and set(re.findall(r"\{(\w+)\}", entry["pt"])) <= places
            ), key
            continue
        assert entry.keys() == {"pt", "en"}, key
        assert isinstance(entry["pt"], list) == isinstance(entry["en"], list), key
        found = [set(re.findall(r"\{(\w*)[^}]*\}", str(entry[language]))) for language in ("pt", "en")]
        assert found[0] == found[1], key


class Recording(Words):
    """Words that know which of them were asked for."""

    asked: set[str] = set()

    def raw(self, key: str) -> str | list[str]:
        self.asked.add(key)
        return super().raw(key)


def test_no_text_is_stale_and_none_is_missing():
    main = parser(Recording("pt"))
    for one in (main, *main.by_name.values()):
        one.format_help()
    paths = (ROOT / "capivara_search").glob("*.py")
    code = "".join(path.read_text(encoding="utf-8") for path in paths)
    named = set(re.findall(r"\"([\w.]+)\"", code))
    known = Words("pt")._texts.keys()
    left = {
        key
        for key in known - Recording.asked - named
        if not key.startswith(("column.", "status.", "library.", "reason."))
    }
    assert not left
    assert set(re.findall(r"(?:words|say)(?:\.count|\.raw)?\(\"([\w.]+)\"", code)) <= known


def sixel_pixels(text: str) -> np.ndarray:
    """The picture (height, width, RGBA) that a sixel sequence draws; none of our own code."""
    body = re.fullmatch(r'\x1bP0;1;0q"1;1;(\d+);(\d+)(.*)\x1b\\', text.strip("\n"), re.DOTALL)
    image = np.zeros((int(body[2]) + 6, int(body[1]), 4), np.uint8)
    palette, colour, x, y = {}, 0, 0, 0
    for token in re.findall(r"#\d+(?:;\d+){4}|#\d+|!\d+.|[$-]|[?-~]", body[3]):
        if token[0] == "#":
            number, *rest = map(int, token[1:].split(";"))
            if rest:
                palette[number] = [round(value * 2.55) for value in rest[1:]]
            colour = number
        elif token == "$":
            x = 0
        elif token == "-":
            x, y = 0, y + 6
        else:
            times, letter = (int(token[1:-1]), token[-1]) if token[0] == "!" else (1, token)
            for bit in range(6):
                if (ord(letter) - 63) >> bit & 1:
                    image[y + bit, x : x + times] = [*palette[colour], 255]
            x += times
    return image[: int(body[2])]


def drawn(kind: str, text: str) -> np.ndarray:
    """The first picture of a text for the terminal, (height, width, RGBA)."""
    if kind == "sixel":
        return sixel_pixels(text[: text.index("\x1b\\") + 2])
    if kind == "blocks":
        rows = []
        for line in text.split("\n")[: -1 if "▀" in text else 0]:
            cells = re.findall(r"(?:\x1b\[0(?:;38;2;(\d+);(\d+);(\d+))?(?:;48;2;(\d+);(\d+);(\d+))?m)?([ ▀▄])", line)
            if len(cells) < 60:
                break
            style, halves = ("",) * 6, ([], [])
            for cell in cells:
                style = cell[:6] if any(cell[:6]) or cell[6] == " " else style
                front, back = (
                    [int(v) for v in part] + [255] if part[0] else [0] * 4 for part in (style[:3], style[3:])
                )
                halves[0].append(front if cell[6] == "▀" else [0] * 4)
                halves[1].append(front if cell[6] == "▄" else back if cell[6] == "▀" else [0] * 4)
            rows += halves
        return np.array(rows, np.uint8)
    pattern = r"\x1b\]1337;File=[^:]*:(.*?)\x07" if kind == "iterm" else r"\x1b_G[^;]*;(.*?)\x1b\\"
    data = "".join(re.findall(pattern, text.partition("\n")[0], re.DOTALL))
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_drawn_in_their_places(kind):
    terminal = Screen(kind, columns=80, lines=40, cell=(5, 10))
    pictures, captions = [*map(picture, COLOURS[:2]), b"broken", None], ["1 a.png", "2 b.png", "3 c.png", "4 d.png"]
    text = contact_sheet(pictures, captions, terminal)
    image = drawn(kind, text)
    height, wide = image.shape[:2]
    across = 2 if kind == "blocks" else 3
    for number, colour in enumerate(COLOURS[:2]):
        place = image[:, number * wide // across : (number + 1) * wide // across]
        middle = place[height * 3 // 4, place.shape[1] // 2].astype(int)
        assert abs(middle[:3] - colour).max() < 12 and middle[3] == 255
    assert (image[..., 3] == 0).any(), "beside the pictures the terminal's own ground is seen"
    lines = [line for line in text.split("\n") if "a.png" in line or "d.png" in line]
    assert lines[0].startswith(" 1 a.png") and lines[0].index("2 b.png") == (80 - 1) // across + 1


def test_what_is_sent_of_a_picture_is_sent_in_pieces_that_the_terminal_takes():
    text = contact_sheet([picture(c, (250, 200)) for c in COLOURS], ["1", "2", "3"], Screen("kitty", 80, 40, (9, 18)))
    pieces = re.findall(r"\x1b_G([^;]*);(.*?)\x1b\\", text)
    assert all(len(data) <= 4096 for _, data in pieces)
    assert [head.endswith("m=0") for head, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    assert re.match(r"a=T,f=100,q=2,c=78,r=10,m=\d", pieces[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sheet_takes_no_more_lines_than_it_may(kind):
    pictures, captions = [picture(COLOURS[0])] * 12, [str(number) for number in range(1, 13)]
    terminal = Screen(kind, columns=80, lines=24)
    assert contact_sheet(pictures, captions, Screen(None)) == ""
    assert re.findall(r"\d+$", contact_sheet(pictures, captions, terminal).rstrip())[0] == "12"
    assert int(re.findall(r"\d+$", contact_sheet(pictures, captions, terminal, 1).rstrip())[0]) == (
        2 if kind == "blocks" else 3
    )


XTERM = {"TERM": "xterm-256color"}
COLOURED = XTERM | {"COLORTERM": "truecolor"}


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        (XTERM, None),
        (COLOURED, "blocks"),
        (COLOURED | {"NO_COLOR": "1"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        (COLOURED | {"KITTY_WINDOW_ID": "1"}, "kitty"),
        (XTERM | {"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        (XTERM | {"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, None),
    ],
)
def test_a_terminal_gets_the_pictures_that_its_variables_speak_of(environment, kind):
    assert screen(Terminal(), environment=environment).kind == kind
    assert screen(Terminal(), "no", environment).kind is None
    assert screen(Terminal(), "sixel", environment).kind == "sixel"


def test_a_pipe_gets_no_pictures_unless_they_are_asked_for():
    pipe = io.StringIO()
    assert screen(pipe, environment={"TERM": "xterm-kitty"}).kind is None
    assert screen(pipe, "blocks", {}).kind == "blocks"
    assert not screen(pipe, "blocks", COLOURED).links


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(b"\x1b[?62;4;22c", "sixel"), (b"\x1b[?64;14;22c", "blocks"), pytest.param(b"", "blocks", marks=pytest.mark.slow)],
)
def test_a_terminal_is_asked_for_sixel_and_its_answer_is_not_left_for_the_shell(answer, kind):
    code = (
        "import sys, select\n"
        "from capivara_search.terminal import screen\n"
        "found = screen(sys.stdout)\n"
        "left = select.select([0], [], [], 0.1)[0]\n"
        "print(found.kind, found.cell, bool(left))\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | COLOURED | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, env=environment, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    said = b""
    while b"c" not in said:
        said += os.read(ours, 1)
    os.write(ours, answer)
    process.wait(timeout=20)
    said = os.read(ours, 1000).decode()
    os.close(ours), os.close(theirs)
    assert said.replace("\r\n", "\n").endswith(f"{kind} (10, 20) False\n")

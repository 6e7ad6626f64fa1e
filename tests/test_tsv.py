"""Translation tables: any sentence survives the round trip, and errors name every wrong row."""

import random
import re

import pytest

from captions.translation_tables import TranslationTable, escape_cell, unescape_cell, write_blank_translation_table

NASTY = ["a cat\ton a mat", "she said \"hello\", and 'bye'", '"all of it is quoted"', "two\nlines", "  blanks around  "]
NASTY += ["Windows\r\nline\rends", "back\\slash \\t \\n \\u0041 \\", "\ufeffa mark at the start", "=HYPERLINK(1)"]
NASTY += ["\u2028 \u2029 \x85 \x0b \x0c \x00 \x1c", "नमस्ते, 世界, ẹ̀kọ́, 🦫", "half a letter \ud83e", "\t", "\\"]
NASTY.append("x" * 10_000)


def test_escaped_texts_are_restored_and_fit_on_one_line():
    letters = ["\t", "\n", "\r", "\\", "t", "n", "u", "0041", '"', "a", " ", "\u2028", "\x00", "é", "🦫", "\ufeff"]
    generator = random.Random(0)
    texts = NASTY + ["".join(generator.choices(letters, k=generator.randrange(12))) for _ in range(3000)]
    for text in texts:
        assert unescape_cell(escape_cell(text)) == text
        assert "\t" not in escape_cell(text) and len(escape_cell(text).splitlines()) <= 1, repr(text)
    for text in ("plain text, “quoted”: ção", "a =1 + 1"):
        assert escape_cell(text) == text, "harmless texts do not change"
    assert {escape_cell(sign)[0] for sign in "=+-@"} == {"\\"}, "a spreadsheet takes no sentence for a formula"


@pytest.mark.parametrize(
    "order", [None, [0, 2], [2, 0, 1]]
)  # as Windows writes it; without the source; columns in another order
def test_a_table_round_trips(tmp_path, order):
    path, translations = tmp_path / "sentences.tsv", [text[::-1] for text in NASTY]
    write_blank_translation_table(path, NASTY)
    fill(path, translations)
    data = path.read_bytes()
    if order is None:
        path.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    else:
        cells = [line.split(b"\t") for line in data.split(b"\n") if line]
        path.write_bytes(b"\n".join(b"\t".join(line[i] for i in order) for line in cells))
    assert TranslationTable(path).translations(NASTY) == dict(zip(NASTY, translations, strict=True))


SENTENCES = ["a cat", "a dog", "two men", "a red car", "the sea"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: lines[:2] + lines[3:],
            r", line 3: .*\bs2_\w+ \('a dog'\).*\bs3_\w+ \('two men'\)",
        ),
        (lambda lines: lines[:-1], r", line 6: .*\bs5_\w+ \('the sea'\)"),
        (lambda lines: [*lines[:3], lines[1], *lines[3:]], r", line 4: .*\bs3_\w+.*\bs1_\w+ \('a cat'\)"),
        (lambda lines: [*lines, "s9_00000000\tnew\tnovo"], r", line 7: .*\bs9_00000000 \('new'\)"),
        (
            lambda lines: [lines[0], lines[1].replace("a cat", "A cat"), *lines[2:]],
            r", line 2: .*\bs1_\w+ \('a cat'\).*\bs1_\w+ \('A cat'\)",
        ),
        (lambda lines: [*lines[:5], lines[5] + "\tmore"], r"\b3 .*line 6.*\b4\b"),
        (lambda lines: [*lines[:5], lines[5] + "\\q"], r"'the sea.+q'"),
        (lambda lines: lines[1:], r"sentences\.tsv.*s1_"),
        (lambda lines: [], r"sentences\.tsv"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, message):
    path = tmp_path / "sentences.tsv"
    write_blank_translation_table(path, SENTENCES)
    fill(path, SENTENCES)
    path.write_text("\n".join(change(path.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        TranslationTable(path).translations(SENTENCES)


def test_an_empty_cell_counts_as_untranslated(tmp_path):
    path = tmp_path / "sentences.tsv"
    write_blank_translation_table(path, SENTENCES)
    assert re.match(r"5 of 5 .*: line 2 \(s1_", TranslationTable(path).describe_untranslated_rows())
    fill(path, ["um gato", "", "  ", "um carro", "o mar"])
    with pytest.raises(ValueError, match=r"2 of 5 .*line 3 .*line 4 "):
        TranslationTable(path).translations(SENTENCES)
    write_blank_translation_table(path, SENTENCES)
    fill(path, ["um gato", "-", "dois homens", "um carro", "o mar"])
    table = TranslationTable(path)
    assert table.describe_untranslated_rows() == "" and table.translations(SENTENCES)["a dog"] == "-"


def test_a_table_must_be_utf_8(tmp_path):
    path = tmp_path / "sentences.tsv"
    path.write_bytes("id\ttranslation\ns1_0\tção\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        TranslationTable(path).translations([])
    path.write_bytes("id\ttranslation\n".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-8"):
        TranslationTable(path).translations([])


def fill(path, translations: list[str]) -> None:
    """Fill the last column of the table."""
    head, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    filled = [line + escape_cell(text) for line, text in zip(lines, translations, strict=True)]
    path.write_text("\n".join([head, *filled]) + "\n", encoding="utf-8")

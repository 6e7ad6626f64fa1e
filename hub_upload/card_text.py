"""Texts, numbers and names of a card in its language, and texts of others as Markdown that renders as itself."""

import html
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from eval.records.schema import RANK_METRICS, is_number

TEMPLATES = Path(__file__).parent / "templates"
LANGUAGES = ("en", "pt")
# Not HTML but Markdown: texts of others are escaped where they come in. What a template needs and lacks is an error.
MARKDOWN_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=False, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
MAX_TEXT = 300
PLAIN_CODE = re.compile(r"[A-Za-z0-9][\w./@:+=,() -]*", re.ASCII)
# Absolute paths of Unix, of a home and of Windows, up to their last part; not the slashes of an address.
PATHS = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"<>]+/)+|\b[A-Za-z]:\\(?:[^\s\\]+\\)+")


# Of the code on a card: two texts for its red and its blue picture, two others, and labels.
EXAMPLES = {
    "texts": ["um quadrado vermelho", "um céu azul"],
    "sentences": ["um gato dormindo no sofá", "uma praia ao pôr do sol"],
    "labels": ["vermelho", "azul", "verde"],
}


def one_line(value: Any) -> str:
    """A text of others on one line, without invisible characters and folders of a machine, whatever the current one."""
    line = " ".join(str(value).split())
    line = "".join(letter for letter in line if unicodedata.category(letter)[0] != "C")  # controls, bidi, private use
    line = PATHS.sub("", line)
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def escaped(value: Any) -> str:
    """Text of a config or of data as Markdown that renders as itself: no markup, no HTML."""
    line = re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", one_line(value))
    line = re.sub(r"^([-+=]|\d+(?=[.)](\s|$)))", r"\\\1" if line[:1] in "-+=" else r"\1\\", line)  # no list, no heading
    return html.escape(line, quote=False)


def code(value: Any) -> str:
    """A JSON value as code, where it consists of the characters of names; else as text."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = one_line(written)
    return f"`{text}`" if text == PATHS.sub("", written) and PLAIN_CODE.fullmatch(text) else escaped(written)


class Words:
    """The texts of a card in one language, `templates/<language>.json`: `words("gain", what="R@1", …)`.

    `texts` is their key -> text, its lines, or further keys and texts.
    """

    def __init__(self, language: str):
        self.language = language
        self.texts = json.loads((TEMPLATES / f"{language}.json").read_text(encoding="utf-8"))

    def __call__(self, *keys: str, **values: Any) -> str:
        """The texts of those keys that are not empty, one after the other, their `{names}` filled in."""
        texts = [self.texts[key] for key in keys if key]
        return "\n".join(text if isinstance(text, str) else "\n".join(text) for text in texts).format_map(values)

    def render(self, **values: Any) -> str:
        """The card's body; a value that the template or a text needs and `values` lack is an error."""

        @jinja2.pass_context
        def words(context: jinja2.runtime.Context, *keys: str, **more: Any) -> str:
            return self(*keys, **{**context.get_all(), **more})

        return _tidy(MARKDOWN_TEMPLATES.get_template("model_card.md.j2").render(words=words, **values))

    def language_name(self, code: str) -> str:
        """Name of a language in the card's one; where it is unknown, the code."""
        return self.texts["languages"].get(code) or escaped(code)

    def name(self, metric_or_direction: str) -> str:
        """Name of a metric or of a direction of retrieval; an unknown one as it is, escaped."""
        if re.fullmatch(r"recall@\d+", metric_or_direction):
            return f"R@{metric_or_direction[7:]}"
        return self.texts.get(metric_or_direction) or escaped(metric_or_direction)

    def phrase(self, text: str) -> str:
        """A text that the project itself writes into its files, in the card's language as far as it is known."""
        for english, translated in self.texts["phrases"].items():
            text = text.replace(english, translated)
        return escaped(text)

    def number(self, value: Any, digits: int = 0, sign: bool = False, kind: str = "f") -> str:
        """A number of the files, as format's `kind` "f" or "e" writes it. Raises ValueError where it is none."""
        if not is_number(value):
            raise ValueError(f"A figure of the card must be a number, got {value!r:.60}.")
        text = f"{value:{'+' if sign else ''},.{digits}{kind}}"
        return text.translate(str.maketrans(",.", ".,")) if self.language == "pt" else text

    def percent(self, share: Any, sign: bool = False) -> str:
        """A share in per cent, or a difference of shares in points; without the unit."""
        return self.number(100 * share if is_number(share) else share, 2, sign)

    def quantity(self, value: float, units: tuple[str, str]) -> str:
        """`value` to three digits, in the first unit or, where it is small, in the second, a thousandth of it."""
        unit, scaled = (units[0], value) if value >= 1 else (units[1], 1000 * value)
        digits = max(0, 2 - math.floor(math.log10(scaled))) if scaled else 0
        return f"{self.number(scaled, digits)} {unit}"

    def duration(self, seconds: Any) -> str:
        """Seconds, as hours or minutes where there are many."""
        if not is_number(seconds) or seconds < 90:
            return f"{self.number(seconds, 1 if is_number(seconds) and seconds >= 1 else 2)} {self('seconds')}"
        unit, part = ("hours", 3600) if seconds >= 5400 else ("minutes", 60)
        return f"{self.number(seconds / part, 1)} {self(unit)}"

    def measure(self, value: float, is_rank: bool, sign: bool = False) -> str:
        """A rank, or a share in per cent."""
        return self.number(value, 1, sign) if is_rank else self.percent(value, sign)

    def figure(self, value: Any, sign: bool = False) -> str:
        """Mean of the seeds, ± their standard deviation where there are several; of a row of `values_of`."""
        is_rank = value.metric in RANK_METRICS
        text = self.measure(value.mean, is_rank, sign)
        return text if value.deviation is None else f"{text} ± {self.measure(value.deviation, is_rank)}"


def is_portuguese(language: str) -> bool:
    """Whether the code of a language is that of Portuguese, such as "pt" or "pt-BR"."""
    return re.split("[-_]", language)[0] in ("pt", "por")


def code_examples(language: str, words: Words, names: Sequence[str] = ()) -> dict[str, str]:
    """Texts for the code of a card in its model's language: Portuguese ones, else `names`, else words to replace."""
    if is_portuguese(language):
        texts, template, picture = EXAMPLES, "uma imagem de cor {}", "foto.jpg"
    else:
        names = names or words("examples", language=words.language_name(language)).split("\n")
        texts, template, picture = {key: names[: len(value)] for key, value in EXAMPLES.items()}, "{}", "photo.jpg"
    lists = {key: json.dumps(value, ensure_ascii=False) for key, value in texts.items()}
    return {**lists, "template": template, "picture": picture}


def _tidy(body: str) -> str:
    """One blank line where there are several, and none between the items of a list."""
    lines: list[str] = []
    for line in (line.rstrip() for line in body.strip().split("\n")):
        if line.startswith("- ") and len(lines) > 1 and not lines[-1] and lines[-2].startswith(("- ", "  ")):
            lines.pop()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines)

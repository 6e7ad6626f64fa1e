"""How a card writes: numbers as a language writes them, texts of others as text, and every figure with its source.

A figure is written as BEGIN figure SEP source END; `plain` takes the marks out, `figures` reads them. So a card can be
compared with its files figure by figure, and nothing of it is seen.
"""

import html
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from hub_upload.card_facts import RANK_METRICS, Fact, Measured, Series
from hub_upload.card_words import LANGUAGE_NAMES, PHRASES, WORDS

BEGIN, SEP, END = "\ue000", "\ue001", "\ue002"  # for private use: texts of others lose them
MARK = re.compile(f"{BEGIN}([^{BEGIN}{SEP}{END}]*){SEP}([^{BEGIN}{SEP}{END}]*){END}")
MAX_TEXT = 300
PLAIN_CODE = re.compile(r"[A-Za-z0-9][\w./@:+=,() -]*", re.ASCII)
# Absolute paths of Unix, of a home and of Windows, up to their last part; not the slashes of an address.
PATHS = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"<>]+/)+|\b[A-Za-z]:\\(?:[^\s\\]+\\)+")


def plain(marked: str) -> str:
    """The text without sources."""
    return MARK.sub(r"\1", marked)


def figures(marked: str) -> list[tuple[str, str]]:
    """(figure, source) of a text, in its order."""
    return MARK.findall(marked)


def mark(figure: str, source: str) -> str:
    return f"{BEGIN}{figure}{SEP}{source}{END}"


def one_line(value: Any) -> str:
    """A text of others on one line, without invisible signs and paths of a machine."""
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
    """A name in a code span, where it has only signs of names; else as text."""
    text = one_line(value)
    return f"`{text}`" if text == PATHS.sub("", str(value)) and PLAIN_CODE.fullmatch(text) else escaped(value)


@dataclass(frozen=True)
class Writer:
    """Writes in one language, "en" or "pt"."""

    language: str

    def word(self, key: str) -> str:
        return WORDS[self.language][key]

    def language_name(self, code: str) -> str:
        """Name of a language in the card's one; where it is unknown, the code."""
        return LANGUAGE_NAMES.get(code, {}).get(self.language) or escaped(code)

    def number(self, value: float, digits: int = 0, sign: bool = False) -> str:
        text = f"{value:{'+' if sign else ''},.{digits}f}"
        return text.translate(str.maketrans(",.", ".,")) if self.language == "pt" else text

    def of(self, fact: Fact, digits: int = 0) -> str:
        """A number of the files."""
        return mark(self.number(fact.number(), digits), fact.source)

    def scientific(self, fact: Fact) -> str:
        """A very small number of the files."""
        text = f"{fact.number():.1e}"
        return mark(text.replace(".", ",") if self.language == "pt" else text, fact.source)

    def text(self, fact: Fact) -> str:
        """A text of the files, as text."""
        return mark(escaped(fact.value), fact.source)

    def phrase(self, fact: Fact) -> str:
        """A text that the project itself writes into its files, in the card's language as far as it is known."""
        text = str(fact.value)
        for english, portuguese in PHRASES if self.language == "pt" else ():
            text = text.replace(english, portuguese)
        return mark(escaped(text), fact.source)

    def code(self, fact: Fact) -> str:
        """A value of the files as JSON writes it, but for the quotes of a text, as code."""
        value = fact.value if isinstance(fact.value, str) else json.dumps(fact.value, ensure_ascii=False)
        return mark(code(value), fact.source)

    def codes(self, facts: list[Fact]) -> str:
        return ", ".join(self.code(fact) for fact in facts)

    def quantity(self, value: float, units: tuple[str, str], source: str) -> str:
        """`value` to three digits, in the first unit or, where it is small, in the second, a thousandth of it."""
        unit, scaled = (units[0], value) if value >= 1 else (units[1], 1000 * value)
        digits = max(0, 2 - math.floor(math.log10(scaled))) if scaled else 0
        return mark(f"{self.number(scaled, digits)} {unit}", source)

    def duration(self, fact: Fact) -> str:
        seconds = fact.number()
        for limit, unit in ((5400, "hours"), (90, "minutes")):
            if seconds >= limit:
                part = 3600 if unit == "hours" else 60
                return mark(f"{self.number(seconds / part, 1)} {self.word(unit)}", fact.source)
        return mark(f"{self.number(seconds, 1 if seconds >= 1 else 2)} {self.word('seconds')}", fact.source)

    def metric(self, name: str) -> str:
        if name.startswith("recall@") and name[7:].isdigit():
            return f"R@{name[7:]}"
        return WORDS[self.language].get(name) or escaped(name)

    def direction(self, name: str) -> str:
        return WORDS[self.language].get(name) or escaped(name)

    def figure(self, series: Series) -> str:
        """Per cent, or a rank; mean ± standard deviation where there are several seeds."""
        rank = series.first.metric in RANK_METRICS
        digits, factor = (1, 1) if rank else (2, 100)
        text = self.number(factor * series.mean, digits)
        if series.deviation is not None:
            text += f" ± {self.number(factor * series.deviation, digits)}"
        return mark(text, series.source)

    def difference(self, model: Series, baseline: Series) -> str:
        """Model minus baseline, in points or ranks."""
        rank = model.first.metric in RANK_METRICS
        value = (1 if rank else 100) * (model.mean - baseline.mean)
        return mark(self.number(value, 1 if rank else 2, sign=True), f"{model.source} - {baseline.source}")

    def chance(self, record: Measured) -> str:
        return mark(self.number(100 * record.chance.value, 2), record.chance.source)

    def interval(self, record: Measured) -> str:
        """A gain's 95 % interval, in points."""
        low, high = (100 * end.value for end in record.interval)
        text = f"{self.number(low, 2, sign=True)} {self.word('to')} {self.number(high, 2, sign=True)}"
        return mark(text, record.interval.source)

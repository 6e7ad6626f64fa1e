"""What is said to people, in Portuguese or English: the texts of `words.yaml`, by their keys.

Names of files are other people's: whatever in them a terminal would obey is shown as an escape such as `\\x1b`.
"""

import logging
import math
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from capivara_common.cli import coded_error
from capivara_common.privacy import escape_control_characters, redact

# English name of a command -> its Portuguese name; both work in both languages.
COMMAND_NAMES = dict(
    index="indexar", watch="seguir", search="buscar", classify="classificar", app="abrir", status="estado",
    forget="esquecer", move="mover", export="exportar", duplicates="duplicatas", completion="completar",
)  # fmt: skip


class Messages:
    """The texts of `words.yaml` in one language, with its numbers and dates."""

    def __init__(self, language: str):
        self.language = language  # "pt" or "en"
        self._messages = _load_messages()

    def raw(self, key: str) -> str | list[str]:
        """The text as it stands in the file; a list is its singular and plural."""
        return self._messages[key][self.language]

    def has(self, key: str) -> bool:
        """Whether there is such a text."""
        return key in self._messages

    def reason(self, code: str | None, text: object = None) -> str:
        """Why a file was left out: in English as it was said, or its code; in other languages by its code."""
        key = f"reason.{code}"
        return (
            self(key)
            if self.language != "en" and self.has(key)
            else escape_control_characters(str(code if text is None else text))
        )

    def __call__(self, key: str, *places: object, **values: object) -> str:
        """The text with its `{0}` or `{name}` filled in."""
        return self.raw(key).format(*places, **values)

    def count(self, key: str, number: int, **values: Any) -> str:
        """The singular or plural of a text, with `{n}` filled in."""
        return self.raw(key)[number != 1].format(n=self.number(number), **values)

    def number(self, value: float, digits: int = 0) -> str:
        """1,234.5 or 1.234,5."""
        text = f"{value:,.{digits}f}"
        return text if self.language == "en" else text.translate(str.maketrans(",.", ".,"))

    def score(self, value: float) -> str:
        """With three digits behind the point; one near 0, as SigLIP's probabilities are, with its first two digits."""
        return self.number(value, 1 - math.floor(math.log10(value)) if 1e-12 < value < 0.01 else 3)

    def size(self, number: int) -> str:
        """Bytes, as 1.2 MB."""
        unit, divisor = ("GB", 1e9) if number >= 1e9 else ("MB", 1e6)
        return f"{self.number(number / divisor, 1)} {unit}"

    def date(self, moment: datetime) -> str:
        """The day, as it is written in the language."""
        return moment.strftime("%d/%m/%Y" if self.language == "pt" else "%Y-%m-%d")


@cache
def _load_messages() -> dict[str, dict[str, str | list[str]]]:
    import yaml

    # The C loader takes a tenth of the time.
    content = Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
    return yaml.load(content, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))


def localized_error(error_type: Callable[[str], Exception], code: str, **values: object) -> Exception:
    """Return an error with words in each language, `error.CODE`, and no secret; its own text is the English one."""
    return coded_error(
        error_type, code, Messages("en").raw(f"error.{code}"), **{name: _redacted(one) for name, one in values.items()}
    )


def log_message(code: str, *values: object, level: int = logging.INFO) -> None:
    """Log something for people: `note.CODE` with its values in their order, which the command says in its language."""
    values = tuple(map(_redacted, values))
    text, extra = Messages("en")(f"note.{code}", *values), {"code": code, "values": values}
    logging.getLogger("capivara").log(level, "%s", text, extra=extra)


def _redacted(value: object) -> object:
    """Return a text without secrets, such as the password in the address of an index; other values as they are."""
    return redact(value) if isinstance(value, str) else value

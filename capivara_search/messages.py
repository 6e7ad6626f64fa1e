r"""Texts for users, in Brazilian Portuguese and English: the entries of `messages.yaml`, looked up by their keys.

Names of files come from other people. Characters in them that a terminal would act on are shown as an escape such as
`\x1b`.
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
    """The texts of `messages.yaml` in one language, with numbers and dates as that language writes them.

    Args:
        language: "pt" or "en".
    """

    def __init__(self, language: str):
        self.language = language
        self._messages = _load_messages()

    def raw(self, key: str) -> str | list[str]:
        """Return an unformatted text of the file. A list holds the singular and the plural."""
        return self._messages[key][self.language]

    def has(self, key: str) -> bool:
        """Return whether the file has a text with this key."""
        return key in self._messages

    def skip_reason(self, code: str | None, text: object = None) -> str:
        """Describe why a file was skipped.

        Args:
            code: Code of the reason, such as "read error"; Portuguese texts are found by it.
            text: English description. It is used in English, and if the code has no Portuguese text.

        Returns:
            The description, or the code if there is no description.
        """
        key = f"reason.{code}"
        return (
            self(key)
            if self.language != "en" and self.has(key)
            else escape_control_characters(str(code if text is None else text))
        )

    def __call__(self, key: str, *places: object, **values: object) -> str:
        """Return a text with its `{0}` or `{name}` placeholders filled in.

        Args:
            key: Key of the text in `messages.yaml`.
            *places: Values of the numbered placeholders.
            **values: Values of the named placeholders.

        Returns:
            The formatted text.
        """
        return self.raw(key).format(*places, **values)

    def format_count(self, key: str, number: int, **values: Any) -> str:
        """Return the singular or plural of a text.

        Args:
            key: Key of a text with two forms.
            number: Number that chooses the form and replaces `{n}`.
            **values: Values of the other placeholders.

        Returns:
            The formatted text.
        """
        return self.raw(key)[number != 1].format(n=self.format_number(number), **values)

    def format_number(self, value: float, digits: int = 0) -> str:
        """Format a number as 1,234.5 (English) or 1.234,5 (Portuguese).

        Args:
            value: The number.
            digits: Digits after the decimal separator.

        Returns:
            The formatted number.
        """
        text = f"{value:,.{digits}f}"
        return text if self.language == "en" else text.translate(str.maketrans(",.", ".,"))

    def format_score(self, value: float) -> str:
        """Format a score with three decimals, or a very small probability of SigLIP with two significant digits."""
        return self.format_number(value, 1 - math.floor(math.log10(value)) if 1e-12 < value < 0.01 else 3)

    def format_size(self, number: int) -> str:
        """Format a number of bytes in megabytes or gigabytes, such as 1.2 MB."""
        unit, divisor = ("GB", 1e9) if number >= 1e9 else ("MB", 1e6)
        return f"{self.format_number(number / divisor, 1)} {unit}"

    def format_date(self, moment: datetime) -> str:
        """Format the day of a date as 24/06/2024 (Portuguese) or 2024-06-24 (English)."""
        return moment.strftime("%d/%m/%Y" if self.language == "pt" else "%Y-%m-%d")


@cache
def _load_messages() -> dict[str, dict[str, str | list[str]]]:
    import yaml

    # PyYAML's C loader takes a tenth of the time of the Python one.
    content = Path(__file__).with_name("messages.yaml").read_text(encoding="utf-8")
    return yaml.load(content, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))


def localized_error(error_type: Callable[[str], Exception], code: str, **values: object) -> Exception:
    """Create an error whose message the command can show in both languages.

    Args:
        error_type: Class of the error, such as ValueError.
        code: The text is `error.CODE` of `messages.yaml`; the error's own message is the English text.
        **values: Values of the placeholders. Secrets in them are redacted in the message.

    Returns:
        The error, with the attributes `code` and `values`. The values are not redacted, because code compares them with
        paths, which may look like secrets.
    """

    def create_redacted(text: str) -> Exception:
        return error_type(redact(text))

    return coded_error(create_redacted, code, Messages("en").raw(f"error.{code}"), **values)


def log_message(code: str, *values: object, level: int = logging.INFO) -> None:
    """Log a message for users, which the command `capivara` shows in the user's language.

    Args:
        code: The text is `note.CODE` of `messages.yaml`; the log record holds the English text.
        *values: Values of the numbered placeholders. Secrets in them are redacted.
        level: Level of the log record.
    """
    values = tuple(redact(value) if isinstance(value, str) else value for value in values)
    text, extra = Messages("en")(f"note.{code}", *values), {"code": code, "values": values}
    logging.getLogger("capivara").log(level, "%s", text, extra=extra)

r"""Look up the texts for users in `messages.yaml`, in Brazilian Portuguese and English, and format their values.

File names may come from other people and may contain control characters, which a terminal would act on. Such characters
are shown as an escape such as `\x1b`.
"""

import logging
import math
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from capivara_common.cli import make_coded_error
from capivara_common.privacy import escape_control_characters, redact_secrets

# {English name of a command: its Portuguese name}. Both names work, whatever the user's language.
COMMAND_NAMES = dict(
    index="indexar", watch="seguir", search="buscar", classify="classificar", app="abrir", status="estado",
    forget="esquecer", move="mover", export="exportar", duplicates="duplicatas", completion="completar",
)  # fmt: skip


class Messages:
    """The texts of `messages.yaml` in one language, and the number and date formats of this language.

    Example:
        Messages("en")("port_in_use")  # "The port is in use. Choose another port with --port."

    Args:
        language: "pt" or "en".
    """

    def __init__(self, language: str):
        self.language = language
        self._messages = _load_messages()

    def raw(self, key: str) -> str | list[str]:
        """Return a text of `messages.yaml` without formatting it.

        Args:
            key: Key of the text.

        Returns:
            The text, which can contain placeholders such as `{path}`. For a text that depends on a number, a list of
            two texts: singular and plural.
        """
        return self._messages[key][self.language]

    def has(self, key: str) -> bool:
        """Return whether `messages.yaml` has a text with the given key."""
        return key in self._messages

    def skip_reason(self, code: str | None, text: object = None) -> str:
        """Return a text that says why a file could not be indexed, in the language of this object.

        Args:
            code: Code of the reason, such as "read error".
            text: English description, or an object whose `str` is the description. It is used if there is no
                translation.

        Returns:
            The description, or the code if there is none.
        """
        key = f"reason.{code}"
        if self.language != "en" and self.has(key):
            return self(key)
        return escape_control_characters(str(code if text is None else text))

    def __call__(self, key: str, *places: object, **values: object) -> str:
        """Return a text of `messages.yaml` and fill in its placeholders.

        Args:
            key: Key of the text in `messages.yaml`.
            *places: Values of the numbered placeholders, such as `{0}`.
            **values: Values of the named placeholders, such as `{path}`.

        Returns:
            The formatted text.
        """
        return self.raw(key).format(*places, **values)

    def format_count(self, key: str, number: int, **values: Any) -> str:
        """Return the singular or the plural of a text and fill in its placeholders.

        Args:
            key: Key of a text that has a singular and a plural.
            number: Selects the singular (1) or the plural (any other number), and replaces the placeholder `{n}`.
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
        """Format a score with three decimals.

        A score between 1e-12 and 0.01 is formatted with two significant digits instead, because the probabilities of
        SigLIP models are often very small.

        Args:
            value: Cosine similarity, or probability of a SigLIP model.

        Returns:
            The formatted score.
        """
        return self.format_number(value, 1 - math.floor(math.log10(value)) if 1e-12 < value < 0.01 else 3)

    def format_size(self, number: int) -> str:
        """Format a number of bytes in megabytes (below 1e9 bytes) or gigabytes, such as "1.2 MB"."""
        unit, divisor = ("GB", 1e9) if number >= 1e9 else ("MB", 1e6)
        return f"{self.format_number(number / divisor, 1)} {unit}"

    def format_date(self, moment: datetime) -> str:
        """Format a date and time as a date only: "24/06/2024" in Portuguese, "2024-06-24" in English."""
        return moment.strftime("%d/%m/%Y" if self.language == "pt" else "%Y-%m-%d")


@cache
def _load_messages() -> dict[str, dict[str, str | list[str]]]:
    import yaml

    # The C loader of PyYAML is ten times as fast as its Python loader, but is missing in some builds.
    content = Path(__file__).with_name("messages.yaml").read_text(encoding="utf-8")
    return yaml.load(content, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))


def make_error_from_code(error_type: Callable[[str], Exception], code: str, **values: object) -> Exception:
    """Create an error whose message the command `capivara` can show in Portuguese or English.

    Args:
        error_type: Class of the error, such as ValueError, or a function that creates the error from a text.
        code: Code of the error. `messages.yaml` has its text under the key `error.CODE`.
        **values: Values of the placeholders. Secrets in them, such as API keys, are redacted in the message.

    Returns:
        The error, for the caller to raise. Its text is English. Its attributes are `code` and `values` (not redacted).
    """
    # `values` is not redacted, because callers compare the values with paths, and a path may look like a secret.
    template = Messages("en").raw(f"error.{code}")
    return make_coded_error(lambda text: error_type(redact_secrets(text)), code, template, **values)


def log_message_from_code(code: str, *values: object, level: int = logging.INFO) -> None:
    """Log a message in English with the logger "capivara". The command `capivara` shows it in the user's language.

    Args:
        code: Code of the message. `messages.yaml` has its text under the key `note.CODE`.
        *values: Values of the placeholders `{0}`, `{1}` and so on. Secrets in strings, such as API keys, are redacted.
        level: Level of the log record, such as `logging.WARNING`.
    """
    values = tuple(redact_secrets(value) if isinstance(value, str) else value for value in values)
    text, extra = Messages("en")(f"note.{code}", *values), {"code": code, "values": values}
    logging.getLogger("capivara").log(level, "%s", text, extra=extra)

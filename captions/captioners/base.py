"""Define the interface of the backends that generate captions."""

from typing import Any, ClassVar, Protocol, Self

from capivara_common.image_files import BadRow
from captions.stages import RowStage


class Captioner(Protocol):
    """Interface of the backends of `captions.generate`. A backend is a subclass in a module of its own.

    The methods of the class are called in this order: `check_flags`, `check`, `load`, then `start_part` and
    `caption_rows` for each part. Only `columns`, `load` and `caption_rows` have no default.

    Attributes:
        flags: Dataclass with the flags of the backend, which become flags of `captions.generate`.
        has_report: Whether `report` does anything.
        settings: Everything that affects a caption, except the image, as a dict of JSON values for `stage.json`.
    """

    flags: ClassVar[type]
    has_report: ClassVar[bool] = False
    settings: dict[str, Any]

    @classmethod
    def check_flags(cls, args: Any) -> None:
        """Check the flags, without a network and without loading anything. Raise ValueError or ImportError if wrong."""

    @classmethod
    def check(cls, args: Any) -> None:
        """Check, before any stage of a build runs, that the captioner can be used.

        Raises ValueError or OSError if the captioner cannot be used.
        """

    @classmethod
    def describe_work(cls, args: Any, stage: RowStage) -> list[str]:
        """Return lines for a dry run that say what will be requested from a server, such as requests and tokens.

        Args:
            args: Flags of `captions.generate`.
            stage: The task, with the rows that it processes.
        """
        return []

    @classmethod
    def columns(cls, args: Any) -> dict[str, Any]:
        """Return the feature (column type of `datasets`) of each new column, by name."""
        ...

    @classmethod
    def load(cls, args: Any, stage: RowStage) -> Self:
        """Load the captioner.

        Args:
            args: Flags of `captions.generate` (`GenerateArguments`).
            stage: The task, with the rows that it processes.

        Returns:
            The captioner, ready to caption rows.

        Raises:
            ValueError, OSError, ImportError: If the captioner cannot be used.
        """
        ...

    @classmethod
    def report(cls, args: Any) -> None:
        """Write `quality.json` into the output folder, after all rows have been written."""

    def start_part(self, part: range) -> None:
        """Prepare for the rows of the next part. All earlier parts have been written.

        Args:
            part: Row range of the part.
        """

    def caption_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        """Generate the captions of rows.

        Args:
            rows: Rows with a decoded image under the key `captions.stages.DECODED_KEY`.

        Returns:
            For each row, a dict with the new columns, or a BadRow if the row must be skipped.
        """
        ...

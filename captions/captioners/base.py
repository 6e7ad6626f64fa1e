"""Define the interface of the backends that generate captions, such as BLIP-2 or a model on a server."""

from typing import Any, ClassVar

from capivara_common.image_files import BadRow
from captions.stages import Backend, Row


class Captioner(Backend):
    """Interface of the backends of `captions.generate`, which generate captions of images.

    The methods are called in this order: `check_flags`, `check`, `load`, then for each output file `start_part` and
    `caption_rows`. A subclass must implement `columns` and `caption_rows`.

    Attributes:
        has_report: True if the backend implements the method `report`, which counts the problems of its captions.
        settings: Everything that affects a caption, except the image, as a dict of JSON values. It is recorded with the
            output.
    """

    has_report: ClassVar[bool] = False
    settings: dict[str, Any]

    @classmethod
    def columns(cls, args: Any) -> dict[str, Any]:
        """Return the columns that the backend adds to the dataset, as a dict `{"column name": feature}`.

        A feature is a column type of `datasets`.

        Args:
            args: Flags of `captions.generate`.
        """

    @classmethod
    def report(cls, args: Any) -> None:
        """Write the file `quality.json`, which counts the problems of the generated captions, such as refusals.

        The method is called after all rows have been written, and only if `has_report` is True.

        Args:
            args: Flags of `captions.generate`.
        """

    def start_part(self, part: range) -> None:
        """Prepare for the rows of the next output file. The previous file, if any, is complete now.

        Args:
            part: Range of the row indices in the file, counted from 0 over the whole split.
        """

    def caption_rows(self, rows: list[Row]) -> list[Row | BadRow]:
        """Generate captions of the images in dataset rows.

        Args:
            rows: Rows with a decoded image under the key `captions.stages.DECODED_KEY`.

        Returns:
            For each row, a dict `{"column name": value}` with the new columns. If the row must be skipped, a `BadRow`
            that holds the reason; it is returned, not raised.
        """

"""Dataclasses that the methods of `PictureIndex` return, such as hits of a search and the report of an update."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

# Default sentence for zero-shot classification, Portuguese for "a picture of {}". The label replaces `{}`.
DEFAULT_LABEL_TEMPLATE = "uma imagem de {}"
# Pictures with at least this similarity (`duplicates.compute_duplicate_similarity`, at most 1) are near-duplicates. The
# value was chosen with `python -m benchmarks.duplicates`. Its measurements are in docs/reference/benchmarks.md.
DUPLICATE_MIN_SIMILARITY = 0.84


@dataclass(frozen=True)
class Hit:
    """A picture that a search found, with its score and metadata.

    The score is the cosine similarity to the query. If the query is a sentence and the model is a SigLIP model, the
    score is a probability instead.
    """

    path: str  # absolute path of the file
    # Cosine similarity to the query, from -1 to 1. If the query is a sentence and the model is a SigLIP model, the
    # score is the probability, from 0 to 1, that sentence and picture match.
    score: float
    width: int  # in pixels, of the picture rotated upright
    height: int
    taken: datetime | None = None  # when the picture was taken, from the EXIF data, in the camera's local time
    latitude: float | None = None  # degrees, from the EXIF data; south is negative
    longitude: float | None = None  # degrees, from the EXIF data; west is negative
    size: int = 0  # size of the file in bytes
    modified: datetime | None = None  # modification time of the file, in this machine's local time
    # Whether the picture counts as relevant to the sentence, because the score reaches the relevance threshold. None if
    # the search applied no threshold.
    above_threshold: bool | None = None
    date: datetime | None = None  # for display, sorting and date filters: `taken`, or `modified` if `taken` is None
    date_source: str = ""  # where `date` comes from: "camera" (`taken`) or "file" (`modified`)
    copies: int = 0  # number of near-duplicates of this hit, if the search groups them; otherwise 0


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder that could not be read for the index, with the reason.

    For example, the file is damaged, or there is no permission to read it.
    """

    path: str  # absolute path of the file, or of a folder that could not be read
    code: str  # the reason in a few words, such as "no permission"; messages.yaml translates it (`reason.CODE`)
    detail: str  # explanation of the reason, in English

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "SkippedFile":
        """Create a skipped file from a row of the table of skipped files (`left_out` on disk).

        Args:
            row: Values of the row by column name: `path`, and `reason` in the form "code: detail".

        Returns:
            The skipped file.
        """
        code, _, detail = row["reason"].partition(": ")
        return cls(row["path"], code, detail)

    @property
    def reason(self) -> str:
        """The reason in the form "code: detail", as the index stores it and messages show it."""
        return f"{self.code}: {self.detail}"

    def __str__(self) -> str:
        return self.reason


@dataclass
class IndexReport:
    """Result of an index update: what `PictureIndex.add` has done to the index.

    Each integer field is a number of pictures, for example of new, changed, moved and removed pictures. Other fields
    contain the skipped files (which could not be read), the numbers of files that rules ignore, and the duration.
    """

    embedded: int = 0  # pictures that the image encoder processed
    new: int = 0  # pictures that were added to the index, including copies of pictures that are already in it
    changed: int = 0  # pictures whose file content has changed since the last update
    moved: int = 0  # pictures whose files have moved to another path
    reembedded: int = 0  # pictures with the same content that were embedded again because the model has changed
    unchanged: int = 0  # pictures that were not embedded again, because their content has not changed
    removed: int = 0  # rows that were removed because the file is gone, can't be decoded any more, or is now ignored
    skipped_files: list[SkippedFile] = field(default_factory=list)  # unreadable files of this and earlier updates
    # Number of ignored files and folders, by reason. "forgotten" (removed by the user) and "excluded" (matched a
    # pattern) count pictures. "hidden" and "system" count pictures and folders. "link" counts symbolic links to
    # pictures and folders. "video" counts video files.
    ignored_counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0  # duration of the update, in seconds


@dataclass(frozen=True)
class Classification:
    """Result of the zero-shot classification of one picture: the best label and the probability of each label.

    The best label is None if a neutral sentence such as "uma imagem" ("an image") fits the picture better than every
    label.
    """

    path: str  # path of the picture; empty if the picture was given as an image
    label: str | None  # the best label; None if a neutral sentence such as "uma imagem" fits better than every label
    # {label: its probability, from 0 to 1}. The probabilities sum to 1 (softmax). With a SigLIP model, they need not
    # sum to 1, because each label is rated on its own (sigmoid).
    shares: dict[str, float]


@dataclass(frozen=True)
class IndexStatus:
    """Summary of an index, as `capivara status` prints it.

    It contains the location, the number of pictures, the folders, the model, the range of dates, the rules for ignoring
    files, and the files that could not be read.
    """

    where: str  # folder or address of the index
    pictures: int  # number of indexed pictures
    skipped_files: list[SkippedFile]  # files that could not be indexed
    folders: dict[str, int]  # {path of an indexed folder: number of pictures in the folder and its subfolders}
    model: str | None  # name of the model of the latest run of `PictureIndex.add`
    bytes: int | None = None  # size on disk in bytes; None on object storage
    approximate: bool = False  # whether searches use an approximate vector index (`table.MAX_EXACT_ROWS`)
    first: datetime | None = None  # earliest EXIF date of all pictures; pictures without an EXIF date do not count
    last: datetime | None = None  # latest EXIF date of all pictures
    exclude: list[str] = field(default_factory=list)  # patterns of ignored files and folders, in .gitignore syntax
    forgotten: list[str] = field(default_factory=list)  # paths that the user removed from the index (`forget`)
    # Numbers of ignored files and folders by reason, as in `IndexReport`. They come from the latest update of each
    # whole folder. Updates of single files do not change them.
    ignored_counts: dict[str, int] = field(default_factory=dict)

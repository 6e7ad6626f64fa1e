"""Records that an index returns: plain dataclasses, used by the command, the page and callers of `PictureIndex`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

# Sentence around a label in zero-shot classification; `{}` stands for the label.
DEFAULT_LABEL_TEMPLATE = "uma imagem de {}"
# Pictures with at least this similarity (`duplicates.pairwise_similarity`, at most 1) are near-duplicates. Chosen by
# `python -m benchmarks.duplicates`; docs/benchmarks.md has the table.
DUPLICATE_MIN_SIMILARITY = 0.84


@dataclass(frozen=True)
class Hit:
    """A picture in the answer of a search."""

    path: str  # absolute path of the file
    # Cosine similarity to the query, from -1 to 1. For a sentence and a SigLIP model: the probability, from 0 to 1,
    # that sentence and picture belong together.
    score: float
    width: int  # pixels, after rotating the picture upright
    height: int
    taken: datetime | None = None  # from the EXIF data, in the camera's local time
    latitude: float | None = None  # degrees, from the EXIF data
    longitude: float | None = None
    size: int = 0  # bytes of the file
    modified: datetime | None = None  # last change of the file
    # Whether the score reaches the relevance threshold of the sentence. None if no threshold was applied.
    above_threshold: bool | None = None
    date: datetime | None = None  # the date to show and to compare: `taken`, otherwise `modified`
    date_source: str = ""  # where `date` comes from: "camera" (`taken`) or "file" (`modified`)
    copies: int = 0  # number of near-duplicates that this hit stands for if duplicates are grouped


@dataclass(frozen=True)
class SkippedFile:
    """A file that could not be indexed, with the reason."""

    path: str
    code: str  # the reason in short; messages.yaml translates it under the key `reason.CODE`
    detail: str  # the reason in full, in English

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "SkippedFile":
        """Create a skipped file from a row of the table `left_out`, whose `reason` is the text "code: detail"."""
        code, _, detail = row["reason"].partition(": ")
        return cls(row["path"], code, detail)

    @property
    def reason(self) -> str:
        """The reason as the table stores it and messages show it: "code: detail"."""
        return f"{self.code}: {self.detail}"

    def __str__(self) -> str:
        return self.reason


@dataclass
class IndexReport:
    """What `PictureIndex.add` has done, as numbers of pictures."""

    embedded: int = 0  # processed by the image encoder
    new: int = 0  # added to the index, including copies of pictures that it had already
    changed: int = 0  # the content of the file has changed
    moved: int = 0  # same content under another path; the vector was reused
    reembedded: int = 0  # same content, embedded again because the index had a vector of another model
    unchanged: int = 0  # not read again
    removed: int = 0  # removed from the index: the file is gone, became unreadable or is now ignored by a rule
    skipped_files: list[SkippedFile] = field(default_factory=list)  # unreadable files, found in this run or earlier
    # Number of ignored entries by reason. "forgotten" and "excluded" count pictures, "hidden" and "system" count
    # pictures and folders, "link" counts symbolic links and "video" counts video files.
    ignored_counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0  # duration of the call


@dataclass(frozen=True)
class Classification:
    """A picture with its best label."""

    path: str
    label: str | None  # None if a sentence without content fits better than every label
    # Share of each label, from 0 to 1. The shares sum to 1, except for SigLIP models, which rate each label on its own.
    shares: dict[str, float]


@dataclass(frozen=True)
class IndexStatus:
    """Summary of an index."""

    where: str  # folder or address of the index
    pictures: int
    skipped_files: list[SkippedFile]
    folders: dict[str, int]  # indexed folder -> number of pictures in it and its subfolders
    model: str | None  # name of the model of the latest run of `PictureIndex.add`
    bytes: int | None = None  # size on disk; None on object storage
    approximate: bool = False  # whether searches use an approximate vector index (`table.MAX_EXACT_ROWS`)
    first: datetime | None = None  # date of the oldest picture; pictures without an EXIF date do not count
    last: datetime | None = None  # date of the newest picture, likewise
    exclude: list[str] = field(default_factory=list)  # patterns of ignored files and folders
    forgotten: list[str] = field(default_factory=list)  # paths that the user removed from the index
    ignored_counts: dict[str, int] = field(default_factory=dict)  # ignored entries by reason, from the latest full run

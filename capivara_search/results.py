"""What the index answers: plain records, for the command, the page and your own programs alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

DEFAULT_LABEL_TEMPLATE = "uma imagem de {}"  # of a label, where none is given
DUPLICATE_MIN_SIMILARITY = (
    0.84  # least similarity (`duplicates.compared`) of what is nearly the same, docs/benchmarks.md has its table
)


@dataclass(frozen=True)
class Hit:
    """A picture that was found."""

    path: str  # of its file, absolute
    # Cosine similarity to the query, -1 to 1; of a sentence and a model of SigLIP's kind, how probable it is that the
    # two belong together, 0 to 1.
    score: float
    width: int  # pixels, upright
    height: int
    taken: datetime | None = None  # by its EXIF data, in the camera's local time
    latitude: float | None = None  # degrees, by its EXIF data
    longitude: float | None = None
    size: int = 0  # bytes of the file
    modified: datetime | None = None  # when the file was changed last
    above_threshold: bool | None = (
        None  # False: no better than the index's background for the sentence; None: not asked
    )
    date: datetime | None = None  # wherever one is shown or compared: `taken`, else `modified`
    date_source: str = ""  # "camera" or "file", which of the two that is
    copies: int = 0  # other pictures, nearly the same, that it stands for in an answer that is `stacked`


@dataclass(frozen=True)
class SkippedFile:
    """A file that has no row in the index, and why."""

    path: str
    code: str  # of its words in `words.yaml`
    detail: str  # what is wrong, in English

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "SkippedFile":
        """As a row of the table `left_out` has it, whose `reason` is code and detail in one text."""
        code, _, detail = row["reason"].partition(": ")
        return cls(row["path"], code, detail)

    @property
    def reason(self) -> str:
        """Both, as they are kept and shown."""
        return f"{self.code}: {self.detail}"

    def __str__(self) -> str:
        return self.reason


@dataclass
class IndexReport:
    """What `PictureIndex.add` has done, in numbers of pictures."""

    embedded: int = 0  # went through the image tower
    new: int = 0  # are in the index for the first time; copies of known pictures among them
    changed: int = 0  # had another content before
    moved: int = 0  # have another path now; their vector was kept
    reembedded: int = 0  # have the content of before, and a vector of another model now
    unchanged: int = 0  # were not read again
    removed: int = 0  # are no longer there, can't be read any more, or are left out by a rule from now on
    skipped_files: list[SkippedFile] = field(default_factory=list)  # can't be read, of this time and of earlier ones
    # What is left out: pictures that are "forgotten" or "excluded", pictures and folders that are "hidden" or of a
    # "system", and each "link" and "video".
    ignored_counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Classification:
    """A picture with the label that fits it best."""

    path: str
    label: str | None  # None where none fits better than a sentence that says nothing
    shares: dict[str, float]  # by label, 0 to 1; they sum to 1, but of SigLIP's kind, where each stands for itself


@dataclass(frozen=True)
class IndexStatus:
    """What an index is."""

    where: str  # folder or address
    pictures: int
    skipped_files: list[SkippedFile]
    folders: dict[str, int]  # folder that was indexed -> pictures below it
    model: str | None  # name of the one that has embedded pictures last
    bytes: int | None = None  # on the disk; None where that can't be asked
    approximate: bool = False  # whether an approximate index answers (`capivara_search.table.EXACT_ROWS`)
    first: datetime | None = None  # when the oldest picture was taken, as far as pictures say so
    last: datetime | None = None
    exclude: list[str] = field(default_factory=list)  # patterns of what is left out
    forgotten: list[str] = field(default_factory=list)  # paths that stay out
    ignored_counts: dict[str, int] = field(default_factory=dict)  # as `Added.skipped`, when all folders were added last

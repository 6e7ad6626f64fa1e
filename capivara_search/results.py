"""What the index answers: plain records, for the command, the page and your own programs alike."""

from dataclasses import dataclass, field
from datetime import datetime

TEMPLATE = "uma imagem de {}"  # of a label, where none is given
SAME = (
    0.84  # least similarity of pictures that are nearly the same (`duplicates.compared`), by benchmarks/duplicates.py
)


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        path: of its file, absolute.
        score: cosine similarity to the query, -1 to 1; of a sentence and a model of SigLIP's kind, how probable it is
            that the two belong together, 0 to 1.
        width: pixels, upright.
        height: pixels, upright.
        taken: when, by its EXIF data, in the camera's local time; None where that is not known.
        latitude: degrees, by its EXIF data; None where that is not known.
        longitude: degrees.
        size: bytes of the file.
        modified: when the file was changed last.
        fits: False where it is no better than the index's background for the sentence (`capivara_search.asking`); None
            where that was not asked.
        date: of the picture wherever one is shown or compared: `taken`, else `modified`.
        date_source: "camera" or "file", which of the two that is.
        copies: how many other pictures, nearly the same, it stands for; 0 in an answer that is not `stacked`.
    """

    path: str
    score: float
    width: int
    height: int
    taken: datetime | None = None
    latitude: float | None = None
    longitude: float | None = None
    size: int = 0
    modified: datetime | None = None
    fits: bool | None = None
    date: datetime | None = None
    date_source: str = ""
    copies: int = 0


@dataclass(frozen=True)
class LeftOut:
    """A file that has no row in the index, and why."""

    path: str
    reason: str


@dataclass
class Added:
    """What `PictureIndex.add` has done, in numbers of pictures.

    Attributes:
        embedded: went through the image tower.
        new: are in the index for the first time; copies of known pictures among them.
        changed: had another content before.
        moved: have another path now; their vector was kept.
        unchanged: were not read again.
        removed: are no longer there, or left out by a rule from now on.
        left_out: files that are no pictures that can be read, of this time and of earlier ones.
        skipped: number of folders and pictures that rules left out, by "forgotten", "hidden", "system" and
            "excluded", and of each "video".
        seconds: that it took.
    """

    embedded: int = 0
    new: int = 0
    changed: int = 0
    moved: int = 0
    unchanged: int = 0
    removed: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Classified:
    """A picture with the label that fits it best.

    Attributes:
        path: of its file.
        label: the best one; None where none fits better than a sentence that says nothing.
        shares: label -> share, 0 to 1; they sum to 1, but with a model of SigLIP's kind, where each stands for itself.
    """

    path: str
    label: str | None
    shares: dict[str, float]


@dataclass(frozen=True)
class Status:
    """What an index is.

    Attributes:
        where: folder or address of it.
        pictures: rows.
        left_out: files that could not be read.
        folders: folder that was indexed -> pictures below it.
        model: name of the model that has embedded the pictures last.
        bytes: on the disk; None where that can't be asked.
        approximate: whether an approximate index answers (`capivara_search.table.EXACT_ROWS`).
        first: when the oldest picture was taken; None where no picture says so.
        last: when the newest one was.
        exclude: patterns of what is left out.
        forgotten: paths that stay out.
        skipped: as `Added.skipped`, of all folders when they were added last.
    """

    where: str
    pictures: int
    left_out: list[LeftOut]
    folders: dict[str, int]
    model: str | None
    bytes: int | None = None
    approximate: bool = False
    first: datetime | None = None
    last: datetime | None = None
    exclude: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

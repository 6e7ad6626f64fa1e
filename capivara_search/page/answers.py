"""Answers of the page, from a question to plain values for JSON.

Answers(index).search(Question.read({"text": "um gato", "k": 12}), None)["hits"]
"""

import contextlib
import dataclasses
import os
from dataclasses import dataclass, fields
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from capivara_search.asking import checked_labels
from capivara_search.page.guard import Refusal
from capivara_search.results import TEMPLATE, Hit

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

MAX_LETTERS = 10_000  # of a text; the model reads some 400 of them
READ_LETTERS = 400  # beyond which 77 tokens do not reach
MAX_PICTURES = 240  # of an answer
MAX_LABELS, MIN_LABELS = 50, 2
MAX_PULLS = 20  # pictures, a way
LAST_YEAR = 9999  # of dates; it has a day that none follows


@dataclass(frozen=True)
class Question:
    """What a visitor asks; every field may be left out."""

    text: str = ""  # that is searched for
    like: str = ""  # path of a picture of the index that is searched for, or whose copies are
    k: int = 48  # pictures of the answer
    folder: str = ""  # that pictures must lie in; "" for all
    since: date | None = None  # first day
    until: date | None = None  # last day
    labels: tuple[str, ...] = ()  # of a classification
    template: str = TEMPLATE  # sentence of a classification, with {} for the label
    more: tuple[str, ...] = ()  # paths of pictures of the index that the search is pulled towards
    less: tuple[str, ...] = ()  # those that it is pulled away from
    language: str = "pt"  # of what is said of the model

    @classmethod
    def read(cls, values: object) -> "Question":
        """Check what a visitor has sent. Raises Refusal."""
        if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
            raise Refusal("bad_question")
        question = cls(**{name: _checked(name, value) for name, value in values.items()})
        if len(question.text) > MAX_LETTERS:
            raise Refusal("long_text", letters=MAX_LETTERS)
        if question.since and question.until and question.since > question.until:
            raise Refusal("dates")
        return question

    def where(self) -> dict[str, Any]:
        """The folder and the days, as the searches of the index take them."""
        return {"folder": self.folder or None, "since": self.since, "until": self.until}

    def labels_and_template(self) -> tuple[list[str], str]:
        """The labels, each once, and the sentence, by default the label alone. Raises Refusal."""
        names = list(dict.fromkeys(name for label in self.labels if (name := " ".join(label.split()))))
        if len(names) < MIN_LABELS:
            raise Refusal("few_labels")
        if len(names) > MAX_LABELS:
            raise Refusal("many_labels", labels=len(names), limit=MAX_LABELS)
        template = self.template.strip() or "{}"
        try:
            return checked_labels(names, template), template
        except ValueError:
            raise Refusal("template") from None


def _checked(name: str, value: object) -> Any:
    """A value of a question in the type of its field. Raises Refusal."""
    match name, value:
        case (("text" | "like" | "template" | "folder"), str()) if _is_text(value):
            # A folder as the index names it: "~ana" would say who has a home here, ".." how deep it lies.
            if name != "folder" or not value or (os.path.isabs(value) and ".." not in Path(value).parts):
                return value
        case "k", int() if not isinstance(value, bool) and 1 <= value <= MAX_PICTURES:
            return value
        case (("since" | "until"), ""):
            return None
        case (("since" | "until"), str()):
            with contextlib.suppress(ValueError):
                if (day := date.fromisoformat(value)).year < LAST_YEAR:
                    return day
        case (("labels" | "more" | "less"), list()) if all(isinstance(one, str) and _is_text(one) for one in value):
            if name == "labels" or len(value) <= MAX_PULLS:
                return tuple(value)
        case "language", str():
            return "pt" if value.startswith("pt") else "en"
    raise Refusal("bad_question")


def _is_text(text: str) -> bool:
    """Whether a text can be written: JSON may hold half a character, which nothing can store or look for."""
    return text.isprintable() or text.encode("utf-8", "ignore").decode() == text


class Answers:
    """All questions of the page to an index. Called in one thread at a time."""

    def __init__(self, index: "PictureIndex"):
        self.index = index
        self._videos = (-1, 0)  # version of the index, how many are left out

    def search(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """The pictures that are nearest to what is asked for, or the newest where nothing is. Raises Refusal."""
        where = question.where() | {"stacked": True}
        vector = self._vector(question, image) if len(self.index) else None
        if vector is None:
            found = self.index.newest(question.k, **where)
        else:
            where["of_text"] = image is None and not (question.like or question.more or question.less)
            found = self.index.search_vector(vector, question.k + bool(question.like), **where)
        towards = vector is not None and (question.text.strip() or image is not None or question.like or question.more)
        hits = [picture(hit, bool(towards)) for hit in found if hit.path != question.like][: question.k]
        return self._state() | {"hits": hits, "cut": len(question.text) > READ_LETTERS}

    def copies(self, question: Question, image: object = None) -> dict[str, Any]:
        """The other pictures that are nearly the same as one of the index. Raises Refusal."""
        self._known_vectors([question.like])
        found = self.index.copies(question.like, MAX_PICTURES, **question.where())
        return {"hits": [picture(hit, scored=False) for hit in found]}

    def folders(self, question: Question, image: object = None) -> dict[str, Any]:
        """Every folder, with the number of pictures in it and below."""
        return {"folders": self.index.all_folders()}

    def classify(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """The labels' shares for a picture. Raises Refusal."""
        labels, template = question.labels_and_template()
        if image is None:
            raise Refusal("nothing_given")
        one = self.index.classify(image, labels, template)[0]
        shares = sorted(one.shares.items(), key=lambda share: -share[1])
        return {"label": one.label, "shares": [[label, float(share)] for label, share in shares]}

    def prepare_images(self) -> None:
        """Load what pictures of visitors need."""
        self.index.model.images([PIL.Image.new("RGB", (8, 8))])

    def status(self, question: Question) -> dict[str, Any]:
        """What the index holds by now, and how far an indexing is."""
        state, model = self._state(), self.index.model
        if self._videos[0] != state["version"]:
            self._videos = state["version"], self.index.status().skipped.get("video", 0)
        facts = {"model": model.name, "note": model.note_in(question.language), "progress": self.index.progress()}
        return state | facts | {"videos": self._videos[1]}

    def _state(self) -> dict[str, int]:
        return {"version": self.index.version(), "count": len(self.index)}

    def _vector(self, question: Question, image: PIL.Image.Image | None) -> np.ndarray | None:
        """(width,): the mean of all that is asked for; None where nothing is. Raises Refusal."""
        vectors = []
        if question.text.strip():
            vectors.append(self.index.model.texts([question.text])[0])
        if image is not None:
            vectors.append(self.index.model.images([image])[0])
        if question.like:
            vectors.append(self._known_vectors([question.like])[0])
        pulls = [(1.0, self._known_vectors([path])[0]) for path in question.more]
        pulls += [(-1.0, self._known_vectors([path])[0]) for path in question.less]
        if question.more and not vectors:  # what is looked for, by which a pull away counts half
            vectors = [pulls.pop(0)[1]]
        vector = np.mean(vectors, axis=0) if vectors else None
        return self.index.steered(vector, pulls) if pulls else vector

    def _known_vectors(self, paths: list[str]) -> np.ndarray:
        """Vectors of rows. Raises Refusal where the first is gone, or the model has not seen all of them."""
        try:
            return self.index.vectors(paths)
        except KeyError:
            gone = self.index.row(paths[0]) is None
            raise (Refusal("gone", 404) if gone else Refusal("not_ready", 503)) from None


def picture(hit: Hit, scored: bool) -> dict[str, Any]:
    """What the page shows of a picture: its row, its name, and a number that changes with its file."""
    values = dataclasses.asdict(hit) | {"name": Path(hit.path).stem}
    times = ("taken", "modified", "date")
    values |= {key: value.isoformat() for key in times if isinstance(value := values[key], datetime)}
    values["v"] = int(hit.modified.timestamp()) if hit.modified else 0
    values["score"] = float(hit.score) if scored else None
    return values

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

from capivara_search.page.guard import RequestRefusedError
from capivara_search.query import check_labels
from capivara_search.results import DEFAULT_LABEL_TEMPLATE, Hit

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

MAX_TEXT_CHARACTERS = 10_000  # of a text; the model reads some 400 of them
MODEL_TEXT_CHARACTERS = 400  # beyond which 77 tokens do not reach
MAX_ANSWER_PICTURES = 240  # of an answer
MAX_LABELS, MIN_LABELS = 50, 2
MAX_FEEDBACK_PICTURES = 20  # pictures, a way
YEAR_LIMIT = 9999  # of dates; it has a day that none follows


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
    template: str = DEFAULT_LABEL_TEMPLATE  # sentence of a classification, with {} for the label
    more: tuple[str, ...] = ()  # paths of pictures of the index that the search is pulled towards
    less: tuple[str, ...] = ()  # those that it is pulled away from
    language: str = "pt"  # of what is said of the model

    @classmethod
    def parse(cls, values: object) -> "Question":
        """Check what a visitor has sent. Raises Refusal."""
        if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
            raise RequestRefusedError("bad_question")
        question = cls(**{name: _check_value(name, value) for name, value in values.items()})
        if len(question.text) > MAX_TEXT_CHARACTERS:
            raise RequestRefusedError("long_text", letters=MAX_TEXT_CHARACTERS)
        if question.since and question.until and question.since > question.until:
            raise RequestRefusedError("dates")
        return question

    def filters(self) -> dict[str, Any]:
        """The folder and the days, as the searches of the index take them."""
        return {"folder": self.folder or None, "since": self.since, "until": self.until}

    def check_labels_and_template(self) -> tuple[list[str], str]:
        """The labels, each once, and the sentence, by default the label alone. Raises Refusal."""
        names = list(dict.fromkeys(name for label in self.labels if (name := " ".join(label.split()))))
        if len(names) < MIN_LABELS:
            raise RequestRefusedError("few_labels")
        if len(names) > MAX_LABELS:
            raise RequestRefusedError("many_labels", labels=len(names), limit=MAX_LABELS)
        template = self.template.strip() or "{}"
        try:
            return check_labels(names, template), template
        except ValueError:
            raise RequestRefusedError("template") from None


def _check_value(name: str, value: object) -> Any:
    """A value of a question in the type of its field. Raises Refusal."""
    match name, value:
        case (("text" | "like" | "template" | "folder"), str()) if _is_encodable(value):
            # A folder as the index names it: "~ana" would say who has a home here, ".." how deep it lies.
            if name != "folder" or not value or (os.path.isabs(value) and ".." not in Path(value).parts):
                return value
        case "k", int() if not isinstance(value, bool) and 1 <= value <= MAX_ANSWER_PICTURES:
            return value
        case (("since" | "until"), ""):
            return None
        case (("since" | "until"), str()):
            with contextlib.suppress(ValueError):
                if (day := date.fromisoformat(value)).year < YEAR_LIMIT:
                    return day
        case (("labels" | "more" | "less"), list()) if all(
            isinstance(one, str) and _is_encodable(one) for one in value
        ):
            if name == "labels" or len(value) <= MAX_FEEDBACK_PICTURES:
                return tuple(value)
        case "language", str():
            return "pt" if value.startswith("pt") else "en"
    raise RequestRefusedError("bad_question")


def _is_encodable(text: str) -> bool:
    """Whether a text can be written: JSON may hold half a character, which nothing can store or look for."""
    return text.isprintable() or text.encode("utf-8", "ignore").decode() == text


class PageAnswers:
    """All questions of the page to an index. Called in one thread at a time."""

    def __init__(self, index: "PictureIndex"):
        self.index = index
        self._video_count = (-1, 0)  # version of the index, how many are left out

    def search(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """The pictures that are nearest to what is asked for, or the newest where nothing is. Raises Refusal."""
        where = question.filters() | {"stacked": True}
        vector = self._query_vector(question, image) if len(self.index) else None
        if vector is None:
            found = self.index.newest(question.k, **where)
        else:
            where["of_text"] = image is None and not (question.like or question.more or question.less)
            found = self.index.search_vector(vector, question.k + bool(question.like), **where)
        towards = vector is not None and (question.text.strip() or image is not None or question.like or question.more)
        hits = [hit_to_dict(hit, bool(towards)) for hit in found if hit.path != question.like][: question.k]
        return self._index_state() | {"hits": hits, "cut": len(question.text) > MODEL_TEXT_CHARACTERS}

    def copies(self, question: Question, image: object = None) -> dict[str, Any]:
        """The other pictures that are nearly the same as one of the index. Raises Refusal."""
        self._require_vectors([question.like])
        found = self.index.copies(question.like, MAX_ANSWER_PICTURES, **question.filters())
        return {"hits": [hit_to_dict(hit, with_score=False) for hit in found]}

    def folders(self, question: Question, image: object = None) -> dict[str, Any]:
        """Every folder, with the number of pictures in it and below."""
        return {"folders": self.index.all_folders()}

    def classify(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """The labels' shares for a picture. Raises Refusal."""
        labels, template = question.check_labels_and_template()
        if image is None:
            raise RequestRefusedError("nothing_given")
        one = self.index.classify(image, labels, template)[0]
        shares = sorted(one.shares.items(), key=lambda share: -share[1])
        return {"label": one.label, "shares": [[label, float(share)] for label, share in shares]}

    def prepare_images(self) -> None:
        """Load what pictures of visitors need."""
        self.index.model.embed_images([PIL.Image.new("RGB", (8, 8))])

    def status(self, question: Question) -> dict[str, Any]:
        """What the index holds by now, and how far an indexing is."""
        state, model = self._index_state(), self.index.model
        if self._video_count[0] != state["version"]:
            self._video_count = state["version"], self.index.status().ignored_counts.get("video", 0)
        facts = {"model": model.name, "note": model.get_notice(question.language), "progress": self.index.progress()}
        return state | facts | {"videos": self._video_count[1]}

    def _index_state(self) -> dict[str, int]:
        return {"version": self.index.version(), "count": len(self.index)}

    def _query_vector(self, question: Question, image: PIL.Image.Image | None) -> np.ndarray | None:
        """(width,): the mean of all that is asked for; None where nothing is. Raises Refusal."""
        vectors = []
        if question.text.strip():
            vectors.append(self.index.model.embed_texts([question.text])[0])
        if image is not None:
            vectors.append(self.index.model.embed_images([image])[0])
        if question.like:
            vectors.append(self._require_vectors([question.like])[0])
        pulls = [(1.0, self._require_vectors([path])[0]) for path in question.more]
        pulls += [(-1.0, self._require_vectors([path])[0]) for path in question.less]
        if question.more and not vectors:  # what is looked for, by which a pull away counts half
            vectors = [pulls.pop(0)[1]]
        vector = np.mean(vectors, axis=0) if vectors else None
        return self.index.apply_feedback(vector, pulls) if pulls else vector

    def _require_vectors(self, paths: list[str]) -> np.ndarray:
        """Vectors of rows. Raises Refusal where the first is gone, or the model has not seen all of them."""
        try:
            return self.index.vectors(paths)
        except KeyError:
            gone = self.index.get_picture(paths[0]) is None
            raise (RequestRefusedError("gone", 404) if gone else RequestRefusedError("not_ready", 503)) from None


def hit_to_dict(hit: Hit, with_score: bool) -> dict[str, Any]:
    """What the page shows of a picture: its row, its name, and a number that changes with its file."""
    values = dataclasses.asdict(hit) | {"name": Path(hit.path).stem}
    times = ("taken", "modified", "date")
    values |= {key: value.isoformat() for key in times if isinstance(value := values[key], datetime)}
    values["v"] = int(hit.modified.timestamp()) if hit.modified else 0
    values["score"] = float(hit.score) if with_score else None
    return values

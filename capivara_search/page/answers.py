"""Answers of the page: from a question to plain values for JSON, of one index or of two with different models.

answers = Answers(index)
answers.search(Question.read({"text": "um gato", "k": 12}), None)["models"][0]["hits"]
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from capivara_common.image_files import BadImage
from capivara_search.labelling import checked_labels, classify_vectors
from capivara_search.page.suggestions import Suggestions
from capivara_search.page.turns import Refusal
from capivara_search.results import TEMPLATE, Classified, Hit

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

MAX_LETTERS = 10_000  # of a text; the model reads some 400 of them
READ_LETTERS = 400  # beyond which 77 tokens do not reach
MAX_PICTURES = 240  # of an answer
MAX_LABELS, MIN_LABELS = 50, 2
MAX_CLASSIFIED = 20_000  # pictures of a folder
LAST_YEAR = 9999  # of dates; it has a day that none follows
GROUP_PICTURES = 24  # of a label, shown of a folder that is classified
LANGUAGES = ("pt", "en")


@dataclass(frozen=True)
class Question:
    """What a visitor asks; every field may be left out.

    Attributes:
        text: that is searched for.
        like: path of a picture of the index that is searched for, or asked about.
        k: pictures of the answer.
        folder: that pictures must lie in, or that is classified; "" for all.
        since: first day.
        until: last day.
        labels: of a classification.
        template: sentence of a classification, with {} for the label.
        language: of the suggestions.
    """

    text: str = ""
    like: str = ""
    k: int = 48
    folder: str = ""
    since: date | None = None
    until: date | None = None
    labels: tuple[str, ...] = ()
    template: str = TEMPLATE
    language: str = "pt"

    @classmethod
    def read(cls, values: object) -> "Question":
        """Check what a visitor has sent. Raises Refusal."""
        if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
            raise Refusal("bad_question")
        known = {name: _checked(name, value) for name, value in values.items()}
        question = cls(**known)
        if len(question.text) > MAX_LETTERS:
            raise Refusal("long_text", letters=MAX_LETTERS)
        if question.since and question.until and question.since > question.until:
            raise Refusal("dates")
        return question

    def labels_and_template(self) -> tuple[list[str], str]:
        """The labels, without blanks and repetitions, and the sentence, which is the label alone where there is none.

        Raises:
            Refusal: there are too few labels or too many, or the sentence does not have {} once.
        """
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
        case (("text" | "like" | "template"), str()) if _is_text(value):
            return value
        case "folder", str() if _is_text(value) and (not value or _is_plain(value)):
            return value
        case "k", int() if not isinstance(value, bool) and 1 <= value <= MAX_PICTURES:
            return value
        case (("since" | "until"), ""):
            return None
        case (("since" | "until"), str()):
            with contextlib.suppress(ValueError):
                if (day := date.fromisoformat(value)).year < LAST_YEAR:
                    return day
        case "labels", list() if all(isinstance(label, str) and _is_text(label) for label in value):
            return tuple(value)
        case "language", str():
            return "pt" if value.startswith("pt") else "en"
    raise Refusal("bad_question")


def _is_plain(folder: str) -> bool:
    """Whether a folder is named as the index names it; "~ana" would say who has a home here, ".." how deep it lies."""
    return os.path.isabs(folder) and ".." not in Path(folder).parts


def _is_text(text: str) -> bool:
    """Whether a text can be written: JSON may hold half a character, which nothing can store or look for."""
    return text.isprintable() or text.encode("utf-8", "ignore").decode() == text


class Answers:
    """All questions of the page. Called in one thread at a time.

    Args:
        index: what is searched.
        compare: the same pictures with another model, whose answers are shown beside.
    """

    def __init__(self, index: "PictureIndex", compare: "PictureIndex | None" = None):
        self.indexes = [index, *([compare] if compare is not None else [])]
        self.suggestions = Suggestions(index)
        self._facts: tuple[int, dict[str, int], int] | None = None  # version, folders, pictures

    def search(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """The pictures that are nearest to a text, a picture or both, or the newest where neither is given.

        Raises:
            Refusal: the picture that is asked about is no longer in the index.
        """
        models = [{"name": index.model.name, "hits": self._hits(index, question, image)} for index in self.indexes]
        return self._state() | {"models": models, "cut": len(question.text) > READ_LETTERS}

    def classify(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """The labels' shares for a picture, or the pictures of a folder by their labels.

        Raises:
            Refusal: there is neither picture nor folder, or the labels or the template break their rules.
        """
        labels, template = question.labels_and_template()
        if image is not None:
            models = [_shares(index.model.name, *index.classify(image, labels, template)) for index in self.indexes]
        elif question.folder:  # of the index alone: `PictureIndex.classify` reads other files, too
            found = [
                classify_vectors(index.model, *_of_folder(index, question), labels, template) for index in self.indexes
            ]
            other = [{one.path: one.label for one in answers} for answers in found[::-1]] if len(found) > 1 else [{}]
            models = [
                {"name": index.model.name, **_groups(index, labels, answers, theirs)}
                for index, answers, theirs in zip(self.indexes, found, other, strict=True)
            ]
        else:
            raise Refusal("nothing_given")
        return self._state() | {"models": models}

    def prepare_images(self) -> None:
        """Load what pictures of visitors need."""
        for index in self.indexes:
            index.model.images([PIL.Image.new("RGB", (8, 8))])

    def status(self, question: Question) -> dict[str, Any]:
        """What the index holds by now, and words that are worth searching for."""
        words = self.suggestions.best(question.language)
        names = [index.model.name for index in self.indexes]
        notes = [note for index in self.indexes if (note := index.model.note_in(question.language))]
        return self._state() | {
            "folders": self._facts[1],
            "models": names,
            "note": notes[0] if notes else None,  # there is one model that has any
            "suggestions": words or [],
            "suggesting": words is None,
        }

    def _state(self) -> dict[str, int]:
        index = self.indexes[0]
        if self._facts is None or self._facts[0] != index.version():
            self._facts = (index.version(), index.folders(), len(index))
        return {"version": self._facts[0], "count": self._facts[2]}

    def _hits(self, index: "PictureIndex", question: Question, image: PIL.Image.Image | None) -> list[dict[str, Any]]:
        where = {"folder": question.folder or None, "since": question.since, "until": question.until}
        if not len(index):
            return []
        vector = _vector(index, question, image)
        if vector is None:
            return [picture(hit, scored=False) for hit in index.newest(question.k, **where)]
        hits = index.search_vector(vector, question.k + bool(question.like), **where)
        return [picture(hit) for hit in hits if hit.path != question.like][: question.k]


def _of_folder(index: "PictureIndex", question: Question) -> tuple[list[str], np.ndarray]:
    """Paths and vectors of a folder's newest pictures. Raises Refusal where the model has not seen all of them."""
    where = {"folder": question.folder, "since": question.since, "until": question.until}
    paths = [hit.path for hit in index.newest(MAX_CLASSIFIED, **where)]
    return paths, _known_vectors(index, paths)


def _known_vectors(index: "PictureIndex", paths: list[str]) -> np.ndarray:
    try:
        return index.vectors(paths)
    except KeyError:
        raise Refusal("not_ready", 503) from None


def _vector(index: "PictureIndex", question: Question, image: PIL.Image.Image | None) -> np.ndarray | None:
    """(width,), unit length: the mean of all that is asked for; None where nothing is. Raises Refusal."""
    vectors = []
    if question.text.strip():
        vectors.append(index.model.texts([question.text])[0])
    if image is not None:
        vectors.append(index.model.images([image])[0])
    if question.like:
        if index.row(question.like) is None:
            raise Refusal("gone", 404)
        vectors.append(_known_vectors(index, [question.like])[0])
    if not vectors:
        return None
    mean = np.mean(vectors, axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def picture(hit: Hit, scored: bool = True) -> dict[str, Any]:
    """What the page shows of a picture: its row, its name, and a number that changes with its file."""
    values = dataclasses.asdict(hit) | {"name": Path(hit.path).stem}
    values |= {key: value.isoformat() for key in ("taken", "modified") if isinstance(value := values[key], datetime)}
    values["v"] = int(hit.modified.timestamp()) if hit.modified else 0
    values["score"] = float(hit.score) if scored else None
    return values


def decoded(upload: bytes, decode: Callable[[bytes], PIL.Image.Image]) -> PIL.Image.Image:
    """The picture that came with a question. Raises Refusal where it can't be read."""
    try:
        return decode(upload)
    except BadImage as bad:
        raise Refusal("too_many_pixels" if bad.reason == "absurd image size" else "no_picture") from bad


def _shares(name: str, one: Classified) -> dict[str, Any]:
    shares = sorted(one.shares.items(), key=lambda share: -share[1])
    return {"name": name, "label": one.label, "shares": [[label, float(share)] for label, share in shares]}


def _groups(
    index: "PictureIndex", labels: Sequence[str], found: Sequence[Classified], other: dict[str, str | None]
) -> dict[str, Any]:
    """The pictures of each label, surest first, with what the other model says of them; those of no label last."""
    groups = []
    for label in [*labels, None]:
        members = sorted((one for one in found if one.label == label), key=lambda one: -max(one.shares.values()))
        hits = []
        for one in members[:GROUP_PICTURES]:
            if (row := index.row(one.path)) is not None:
                theirs = {"other": other[one.path]} if one.path in other else {}
                hits.append(picture(row, scored=False) | {"share": float(max(one.shares.values()))} | theirs)
        if members:
            groups.append({"label": label, "n": len(members), "hits": hits})
    differ = sum(one.path in other and other[one.path] != one.label for one in found)
    return {"groups": groups, "pictures": len(found), "differ": differ}

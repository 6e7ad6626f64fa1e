"""Answer the questions of the search page with plain values for JSON.

Example:
    answers = PageAnswers(index)
    hits = answers.search(Question.parse({"text": "um gato", "k": 12}), None)["hits"]

Every question is a POST request of the page; `server.py` receives it and `guard.py` protects it. A question that is not
answered raises RequestRefusedError, whose code has a text in `page/words`.
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

MAX_TEXT_CHARACTERS = 10_000  # a longer text is refused
MODEL_TEXT_CHARACTERS = 400  # about 77 tokens; the model does not read what follows
MAX_ANSWER_PICTURES = 240
MAX_LABELS, MIN_LABELS = 50, 2
MAX_FEEDBACK_PICTURES = 20  # in each of `more` and `less`
YEAR_LIMIT = 9999  # dates must be before this year, because its last day has no next day in Python


@dataclass(frozen=True)
class Question:
    """What a visitor asks. Every field is optional.

    Attributes:
        text: Text of the query.
        like: Path of a picture of the index: the query, or the picture whose near-duplicates are wanted.
        k: Number of pictures of the answer.
        folder: Folder that pictures must be in; "" for all folders.
        since: First day; None for no limit.
        until: Last day; None for no limit.
        labels: Labels of a classification.
        template: Sentence of a classification, with {} in place of the label.
        more: Paths of pictures of the index that the search is moved towards.
        less: Paths of pictures of the index that the search is moved away from.
        language: "pt" or "en", for the notice about the model.
    """

    text: str = ""
    like: str = ""
    k: int = 48
    folder: str = ""
    since: date | None = None
    until: date | None = None
    labels: tuple[str, ...] = ()
    template: str = DEFAULT_LABEL_TEMPLATE
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()
    language: str = "pt"

    @classmethod
    def parse(cls, values: object) -> "Question":
        """Check the JSON value that a visitor has sent, and convert it to a question.

        Raises:
            RequestRefusedError: If a name or value is not allowed, the text is too long, or `since` is after `until`.
        """
        if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
            raise RequestRefusedError("bad_question")
        question = cls(**{name: _check_value(name, value) for name, value in values.items()})
        if len(question.text) > MAX_TEXT_CHARACTERS:
            raise RequestRefusedError("long_text", letters=MAX_TEXT_CHARACTERS)
        if question.since and question.until and question.since > question.until:
            raise RequestRefusedError("dates")
        return question

    def filters(self) -> dict[str, Any]:
        """Return the folder and the dates as keyword arguments of the searches of `PictureIndex`."""
        return {"folder": self.folder or None, "since": self.since, "until": self.until}

    def check_labels_and_template(self) -> tuple[list[str], str]:
        """Return the distinct labels and the sentence of a classification; an empty sentence becomes "{}".

        Raises:
            RequestRefusedError: If there are fewer than `MIN_LABELS` or more than `MAX_LABELS` labels, or the sentence
                does not have exactly one {}.
        """
        names = [" ".join(label.split()) for label in self.labels]
        labels = list(dict.fromkeys(filter(None, names)))
        if len(labels) < MIN_LABELS:
            raise RequestRefusedError("few_labels")
        if len(labels) > MAX_LABELS:
            raise RequestRefusedError("many_labels", labels=len(labels), limit=MAX_LABELS)
        template = self.template.strip() or "{}"
        try:
            return check_labels(labels, template), template
        except ValueError:
            raise RequestRefusedError("template") from None


def _check_value(name: str, value: object) -> Any:
    """Convert a JSON value to the type of a field of `Question`.

    Raises:
        RequestRefusedError: If the value is not allowed for this field.
    """
    match name, value:
        case (("text" | "like" | "template" | "folder"), str()) if _is_encodable(value):
            # Only absolute folders without "..": answers to "~ana" or ".." would tell a visitor which users and folders
            # this machine has.
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
            isinstance(text, str) and _is_encodable(text) for text in value
        ):
            if name == "labels" or len(value) <= MAX_FEEDBACK_PICTURES:
                return tuple(value)
        case "language", str():
            return "pt" if value.startswith("pt") else "en"
    raise RequestRefusedError("bad_question")


def _is_encodable(text: str) -> bool:
    """Return whether a text is valid UTF-8. JSON can hold half a surrogate pair, which can't be stored or searched."""
    return text.isprintable() or text.encode("utf-8", "ignore").decode() == text


class PageAnswers:
    """The answers of an index to all questions of the page.

    Its methods may run in any thread, but only one at a time.

    Args:
        index: The index.
    """

    def __init__(self, index: "PictureIndex"):
        self.index = index
        self._video_count = (-1, 0)  # version of the index, number of videos that are left out

    def search(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """Find the pictures that are most similar to the query, or the newest pictures if the query is empty.

        Args:
            question: Text, picture of the index, feedback and filters.
            image: Picture that the visitor has sent; None for none.

        Returns:
            `hits` (`hit_to_dict`), `version` and `count` of the index, and `cut`: whether the text is longer than what
            the model reads. The scores of hits are None if the query is empty or has only `less`.

        Raises:
            RequestRefusedError: If a picture of the query is not in the index, or has no vector of the model yet.
        """
        filters = question.filters()
        vector = self._query_vector(question, image) if len(self.index) else None
        if vector is None:
            hits = self.index.newest(question.k, group_duplicates=True, **filters)
        else:
            is_text_query = image is None and not (question.like or question.more or question.less)
            k = question.k + bool(question.like)  # the query picture is found as well, and left out below
            hits = self.index.search_vector(vector, k, is_text_query=is_text_query, group_duplicates=True, **filters)
        has_target = question.text.strip() or image is not None or question.like or question.more
        with_score = vector is not None and bool(has_target)
        shown_hits = [hit for hit in hits if hit.path != question.like][: question.k]
        answer = {"hits": [hit_to_dict(hit, with_score) for hit in shown_hits]}
        return self._index_state() | answer | {"cut": len(question.text) > MODEL_TEXT_CHARACTERS}

    def copies(self, question: Question, image: object = None) -> dict[str, Any]:
        """Find the near-duplicates of the picture `question.like`.

        Args:
            question: Picture of the index, and filters.
            image: Not used.

        Returns:
            `hits` without scores, at most `MAX_ANSWER_PICTURES`.

        Raises:
            RequestRefusedError: If the picture is not in the index, or has no vector of the model yet.
        """
        self._require_vectors([question.like])
        hits = self.index.copies(question.like, MAX_ANSWER_PICTURES, **question.filters())
        return {"hits": [hit_to_dict(hit, with_score=False) for hit in hits]}

    def folders(self, question: Question, image: object = None) -> dict[str, Any]:
        """List all folders of the index.

        Args:
            question: Not used.
            image: Not used.

        Returns:
            `folders`: path -> number of pictures in the folder and its subfolders.
        """
        return {"folders": self.index.all_folders()}

    def classify(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """Classify a picture that the visitor has sent.

        Args:
            question: Labels and sentence.
            image: The picture.

        Returns:
            `label`, the best one or None if none fits, and `shares`: pairs of label and share, the largest share first.

        Raises:
            RequestRefusedError: If labels or sentence are not allowed, or there is no picture.
        """
        labels, template = question.check_labels_and_template()
        if image is None:
            raise RequestRefusedError("nothing_given")
        result = self.index.classify(image, labels, template)[0]
        shares = sorted(result.shares.items(), key=lambda share: -share[1])
        return {"label": result.label, "shares": [[label, float(share)] for label, share in shares]}

    def prepare_images(self) -> None:
        """Load the model and embed a small image, so that the first picture of a visitor is embedded quickly."""
        self.index.model.embed_images([PIL.Image.new("RGB", (8, 8))])

    def status(self, question: Question) -> dict[str, Any]:
        """Describe the index: version, number of pictures and videos, model, and progress of a running update."""
        state, model = self._index_state(), self.index.model
        if self._video_count[0] != state["version"]:
            self._video_count = state["version"], self.index.status().ignored_counts.get("video", 0)
        values = {"model": model.name, "note": model.get_notice(question.language), "videos": self._video_count[1]}
        return state | values | {"progress": self.index.progress()}

    def _index_state(self) -> dict[str, int]:
        return {"version": self.index.version(), "count": len(self.index)}

    def _query_vector(self, question: Question, image: PIL.Image.Image | None) -> np.ndarray | None:
        """Return the mean vector (width,) of text, pictures and feedback; None if the query is empty.

        Raises:
            RequestRefusedError: If a picture of the query is not in the index, or has no vector of the model yet.
        """
        vectors = []
        if question.text.strip():
            vectors.append(self.index.model.embed_texts([question.text])[0])
        if image is not None:
            vectors.append(self.index.model.embed_images([image])[0])
        if question.like:
            vectors.append(self._require_vectors([question.like])[0])
        feedback = [(1.0, self._require_vectors([path])[0]) for path in question.more]
        feedback += [(-1.0, self._require_vectors([path])[0]) for path in question.less]
        if question.more and not vectors:
            # The first picture of `more` becomes the query itself, relative to which `less` has half the weight.
            vectors = [feedback.pop(0)[1]]
        vector = np.mean(vectors, axis=0) if vectors else None
        return self.index.apply_feedback(vector, feedback) if feedback else vector

    def _require_vectors(self, paths: list[str]) -> np.ndarray:
        """Return the vectors (paths, width) of pictures of the index.

        Raises:
            RequestRefusedError: If the first picture is not in the index ("gone"), or the model has not embedded all of
                them yet ("not_ready").
        """
        try:
            return self.index.vectors(paths)
        except KeyError:
            is_gone = self.index.get_picture(paths[0]) is None
            raise (RequestRefusedError("gone", 404) if is_gone else RequestRefusedError("not_ready", 503)) from None


def hit_to_dict(hit: Hit, with_score: bool) -> dict[str, Any]:
    """Convert a hit to the JSON values that the page shows.

    Args:
        hit: The hit.
        with_score: Whether the score has a meaning for the visitor; otherwise it becomes None.

    Returns:
        The fields of `Hit` with times in ISO 8601, the `name` of the file, and `v`: a number that changes with the
        file, so that browsers do not show an outdated picture.
    """
    values = dataclasses.asdict(hit) | {"name": Path(hit.path).stem}
    times = ("taken", "modified", "date")
    values |= {key: value.isoformat() for key in times if isinstance(value := values[key], datetime)}
    values["v"] = int(hit.modified.timestamp()) if hit.modified else 0
    values["score"] = float(hit.score) if with_score else None
    return values

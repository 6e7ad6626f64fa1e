"""Compute the responses to the requests of the search page, as dictionaries that are sent as JSON.

Example:
    answers = PageAnswers(index, is_local=True)
    hits = answers.search(Question.parse({"text": "um gato", "k": 12}), None)["hits"]

A question is a POST request of the page, such as a search. If it is refused, RequestRefusedError is raised. The JSON
files in `page/words` have a text for each code of this error.
"""

import contextlib
import os
from dataclasses import asdict, dataclass, fields
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from capivara_search.page.guard import RequestRefusedError
from capivara_search.query import clean_and_check_labels
from capivara_search.results import DEFAULT_LABEL_TEMPLATE, Hit

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

MAX_TEXT_CHARACTERS = 10_000  # a question with a longer text is refused
# The model reads 77 tokens, which is about this many characters, and ignores the rest. The page tells the user if a
# text is longer.
MODEL_TEXT_CHARACTERS = 400
MAX_ANSWER_PICTURES = 240  # maximum number of pictures in a response
MAX_LABELS, MIN_LABELS = 50, 2
MAX_FEEDBACK_PICTURES = 20  # limit for each of the lists `Question.more` and `Question.less`
YEAR_LIMIT = 9999  # dates must be before this year, because Python has no date after the end of the year 9999


@dataclass(frozen=True)
class Question:
    """The checked values of a request of the search page. Each type of request uses some of the fields.

    Attributes:
        text: Text of the query.
        like: Path of a picture of the index: the query picture of a search, or the picture whose near-duplicates are
            wanted.
        k: Maximum number of pictures in the response.
        folder: Only pictures in this folder and its subfolders are returned; "" for all folders.
        since: First day of the pictures; None for no limit.
        until: Last day of the pictures, included; None for no limit.
        labels: Labels for classification.
        template: Sentence for classification, with {} in place of the label.
        more: Paths of pictures of the index that the hits should resemble.
        less: Paths of pictures of the index that the hits should not resemble.
        language: Language of the notice about the model, "pt" or "en".
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
        """Check the JSON value of a request and convert it to a `Question`.

        Args:
            values: Parsed JSON. It must be a dictionary `{name of a field of this class: value}`.

        Returns:
            The checked values.

        Raises:
            RequestRefusedError: If a key or value is not allowed, the text is too long, or `since` is after `until`.
        """
        if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
            raise RequestRefusedError("bad_question")
        question = cls(**{name: _parse_question_field_value(name, value) for name, value in values.items()})
        if len(question.text) > MAX_TEXT_CHARACTERS:
            raise RequestRefusedError("long_text", letters=MAX_TEXT_CHARACTERS)
        if question.since and question.until and question.since > question.until:
            raise RequestRefusedError("dates")
        return question

    def filters(self) -> dict[str, Any]:
        """Return the filters of the request as keyword arguments for the search methods of `PictureIndex`.

        Returns:
            Dictionary `{"folder": only pictures in this folder, "since": only pictures from this day on, "until": only
            pictures up to this day}`. The value None stands for no filter.
        """
        return {"folder": self.folder or None, "since": self.since, "until": self.until}

    def check_labels_and_template(self) -> tuple[list[str], str]:
        """Check the labels and the sentence template of a classification.

        Returns:
            Tuple (labels, template). Of labels that differ only in case, the first is kept. An empty template becomes
            "{}".

        Raises:
            RequestRefusedError: If there are fewer than `MIN_LABELS` or more than `MAX_LABELS` labels, or the template
                does not have exactly one {}.
        """
        spellings: dict[str, str] = {}
        for name in filter(None, (" ".join(label.split()) for label in self.labels)):
            spellings.setdefault(name.casefold(), name)
        labels = list(spellings.values())
        if len(labels) < MIN_LABELS:
            raise RequestRefusedError("few_labels")
        if len(labels) > MAX_LABELS:
            raise RequestRefusedError("many_labels", labels=len(labels), limit=MAX_LABELS)
        template = self.template.strip() or "{}"
        try:
            return clean_and_check_labels(labels, template), template
        except ValueError:
            raise RequestRefusedError("template") from None


def _parse_question_field_value(name: str, value: object) -> Any:
    """Check a JSON value and convert it to the type of a field of `Question`.

    Args:
        name: Name of the field.
        value: Value from the request.

    Returns:
        The value of the field.

    Raises:
        RequestRefusedError: If the value is not allowed for this field.
    """
    match name, value:
        case (("text" | "like" | "template" | "folder"), str()) if _is_encodable(value):
            # A folder must be an absolute path without "..", because the responses for "~ana" or ".." would tell a
            # client which users and folders this machine has.
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
        case (("labels" | "more" | "less"), list()) if name == "labels" or len(value) <= MAX_FEEDBACK_PICTURES:
            if all(isinstance(text, str) and _is_encodable(text) for text in value):
                return tuple(value)
        case "language", str():
            return "pt" if value.startswith("pt") else "en"
    raise RequestRefusedError("bad_question")


def _is_encodable(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8.

    A string in JSON can contain half of a surrogate pair, which has no UTF-8 encoding.
    """
    return text.isprintable() or text.encode("utf-8", "ignore").decode() == text


class PageAnswers:
    """Computes the responses to the requests of the search page, with one public method per type of request.

    The methods may be called from any thread, but only one at a time. The server ensures this with
    `guard.QuestionQueue`.

    Args:
        index: Index that is searched.
        is_local: Whether only this machine can reach the page.
    """

    def __init__(self, index: "PictureIndex", is_local: bool):
        self.index, self.is_local = index, is_local
        # (Version of the index, number of ignored video files at this version). The page requests the number every few
        # seconds, so the number is cached until the version changes. The version -1 means that nothing is cached yet.
        self._video_count = (-1, 0)

    def search(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """Find the pictures that are most similar to the query, or the newest pictures if the query is empty.

        Args:
            question: `text`, `like`, `more` and `less` are the query. `folder`, `since` and `until` are filters. `k` is
                the maximum number of hits.
            image: Uploaded picture as a part of the query, or None.

        Returns:
            Dictionary with these keys:

            - "hits": list of pictures, best first, each with the fields of `Hit`, the file name without extension
              ("name") and the modification time in seconds since 1970 ("v"). The scores are None if there is no query,
              or only `less`.
            - "version": version of the index, a number that grows with each change.
            - "count": number of pictures in the index.
            - "cut": whether the model ignores the end of the text because it is too long.

        Raises:
            RequestRefusedError: If a picture of the query is not in the index or was not embedded by the model yet.
        """
        filters = question.filters()
        vector = self._query_vector(question, image) if len(self.index) else None
        if vector is None:
            hits = self.index.newest(question.k, group_duplicates=True, **filters)
        else:
            is_text_query = image is None and not (question.like or question.more or question.less)
            # A search for pictures similar to `question.like` always finds this picture itself. It is removed below, so
            # one more hit is requested.
            k = question.k + bool(question.like)
            hits = self.index.search_vector(vector, k, is_text_query=is_text_query, group_duplicates=True, **filters)
        with_score = vector is not None and bool(question.text.strip() or question.like or question.more or image)
        shown_hits = [_hit_to_dict(hit, with_score) for hit in hits if hit.path != question.like][: question.k]
        return self._index_state() | {"hits": shown_hits, "cut": len(question.text) > MODEL_TEXT_CHARACTERS}

    def copies(self, question: Question, image: object = None) -> dict[str, Any]:
        """Find the near-duplicates of a picture of the index: resized, re-encoded or slightly edited copies.

        Args:
            question: `like` is the path of the picture. `folder`, `since` and `until` are filters.
            image: Not used.

        Returns:
            Dictionary with the list "hits" of at most `MAX_ANSWER_PICTURES` pictures. Each has the fields of `Hit` (the
            score is None), the file name without extension ("name") and the modification time in seconds since 1970
            ("v").

        Raises:
            RequestRefusedError: If the picture is not in the index or was not embedded by the model yet.
        """
        self._require_vector(question.like)
        hits = self.index.copies(question.like, MAX_ANSWER_PICTURES, **question.filters())
        return {"hits": [_hit_to_dict(hit, with_score=False) for hit in hits]}

    def folders(self, question: Question, image: object = None) -> dict[str, Any]:
        """Return all folders and subfolders of the index, each with its number of pictures.

        Args:
            question: Not used.
            image: Not used.

        Returns:
            Dictionary `{"folders": {path of a folder: number of pictures in the folder and its subfolders}}`.
        """
        return {"folders": self.index.all_folders()}

    def classify(self, question: Question, image: PIL.Image.Image | None) -> dict[str, Any]:
        """Find the label that describes an uploaded picture best.

        Args:
            question: `labels` to choose from, and `template`, a sentence with the placeholder {} for the label.
            image: Uploaded picture.

        Returns:
            Dictionary with these keys:

            - "label": the best label. None if a neutral sentence such as "uma imagem" fits the picture better than
              every label.
            - "shares": list of pairs [label, probability from 0 to 1], most probable first.

        Raises:
            RequestRefusedError: If the labels or the template are not allowed, or `image` is None.
        """
        labels, template = question.check_labels_and_template()
        if image is None:
            raise RequestRefusedError("nothing_given")
        result = self.index.classify(image, labels, template)[0]
        shares = sorted(result.shares.items(), key=lambda share: -share[1])
        return {"label": result.label, "shares": [[label, float(share)] for label, share in shares]}

    def prepare_images(self) -> None:
        """Load the model and embed a small image, so that the first uploaded picture is embedded quickly."""
        self.index.model.embed_images([PIL.Image.new("RGB", (8, 8))])

    def status(self, question: Question, image: object = None) -> dict[str, Any]:
        """Return the state of the index for the page.

        Args:
            question: `language` selects the language of the notice about the model.
            image: Not used.

        Returns:
            Dictionary with the keys "version" and "count" (number of pictures) of the index, "model" (its name), "note"
            (notice about the model or None), "videos" (number of ignored video files), "progress" (result of
            `PictureIndex.progress`) and "local" (whether only this machine can reach the page).
        """
        # This import is not at the top of the file, because it imports pyarrow, too. The decoder process imports this
        # file but does not need pyarrow, which would delay its start.
        from capivara_search.folders import load_ignored_counts_by_reason

        state, model = self._index_state(), self.index.model
        if self._video_count[0] != state["version"]:
            self._video_count = state["version"], load_ignored_counts_by_reason(self.index._table)["video"]
        values = {"model": model.name, "note": model.get_notice(question.language), "videos": self._video_count[1]}
        return state | values | {"progress": self.index.progress(), "local": self.is_local}

    def _index_state(self) -> dict[str, int]:
        return {"version": self.index.version(), "count": len(self.index)}

    def _query_vector(self, question: Question, image: PIL.Image.Image | None) -> np.ndarray | None:
        """Compute the query vector: the mean of the vectors of the text and the query pictures, moved by feedback.

        Args:
            question: `text`, `like`, and the feedback `more` and `less`.
            image: Uploaded picture of the query, or None.

        Returns:
            Query vector (width,), not always of unit length. None if the query is empty.

        Raises:
            RequestRefusedError: If a picture of the query is not in the index or was not embedded by the model yet.
        """
        vectors = []
        if question.text.strip():
            vectors.append(self.index.model.embed_texts([question.text])[0])
        if image is not None:
            vectors.append(self.index.model.embed_images([image])[0])
        if question.like:
            vectors.append(self._require_vector(question.like))
        feedback = [(1.0, self._require_vector(path)) for path in question.more]
        feedback += [(-1.0, self._require_vector(path)) for path in question.less]
        if question.more and not vectors:
            # Without another query, the first picture of `more` becomes the query, whose weight is twice the weight of
            # feedback (`query.FEEDBACK_STRENGTH`). If it were feedback, a picture of `less` would count as much as the
            # wanted picture.
            vectors = [feedback.pop(0)[1]]
        vector = np.mean(vectors, axis=0) if vectors else None
        return self.index.apply_feedback(vector, feedback) if feedback else vector

    def _require_vector(self, path: str) -> np.ndarray:
        """Return the stored embedding of a picture of the index, and refuse the request if it is missing.

        Args:
            path: Path of the picture.

        Returns:
            Embedding (width,), float32, of unit length.

        Raises:
            RequestRefusedError: With the code "gone" if the picture is not in the index. With the code "not_ready" if
                the model has not embedded the picture yet.
        """
        try:
            return self.index.vectors([path])[0]
        except KeyError:
            is_gone = self.index.get_picture(path) is None
            raise (RequestRefusedError("gone", 404) if is_gone else RequestRefusedError("not_ready", 503)) from None


def _hit_to_dict(hit: Hit, with_score: bool) -> dict[str, Any]:
    """Convert a search hit to a dictionary for JSON.

    Args:
        hit: The hit.
        with_score: Whether the score is returned. If False, the score is None.

    Returns:
        Dictionary with the fields of `Hit` and two more keys. "name" is the file name without the extension. "v" is the
        modification time of the file in seconds since 1970, or 0 if it is not known. Times are texts in ISO 8601.
    """
    times = {key: value.isoformat() for key, value in vars(hit).items() if isinstance(value, datetime)}
    # The page adds this time to the URL of the picture, so that browsers show no outdated picture from their cache.
    modified_s = int(hit.modified.timestamp()) if hit.modified else 0
    score = float(hit.score) if with_score else None
    return asdict(hit) | times | {"name": Path(hit.path).stem, "v": modified_s, "score": score}

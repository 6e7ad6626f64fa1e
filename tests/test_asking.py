"""What pulls at a question, and the line below which nothing fits: the arithmetic, and in an index."""

import numpy as np
import pytest
from made_index import make_pictures
from tiny import save_model

from capivara_common.files import write_json
from capivara_search import query
from capivara_search.index import PictureIndex, l2_normalize
from capivara_search.query import apply_feedback, parse_feedback


@pytest.fixture(scope="module")
def index(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("asking")
    make_pictures(folder / "fotos", 30)
    found = PictureIndex.open(folder / "i.lance", model=str(save_model(folder / "model", tiny_processor)))
    found.add(folder / "fotos")
    return found


@pytest.mark.parametrize(
    ("text", "weight", "words"),
    [
        ("pessoas", 1, "pessoas"),
        ("0.5:pôr do sol", 0.5, "pôr do sol"),
        (" 0,5 : mar ", 0.5, "mar"),
        ("1:12:30", 1, "12:30"),
        ("às: 12", 1, "às: 12"),
        ("5", 1, "5"),
    ],
)
def test_a_weight_stands_before_the_words(text, weight, words):
    assert parse_feedback(text) == (weight, words)


@pytest.mark.parametrize("text", ["", "  ", "0:mar", "9:mar", "0.5:", "12:30", "-1:mar", "nan:mar", "1e3:mar"])
def test_a_weight_that_breaks_its_rule_is_named(text, index, monkeypatch):
    monkeypatch.setattr(type(index.model), "texts", lambda *_: pytest.fail("work begins before the words are read"))
    with pytest.raises(ValueError, match="must be above 0 and at most 4"):
        index.search("gato", less=[text])


def test_what_is_asked_for_less_of_sinks_and_stays(index):
    """As a plain computation has it: all pictures are still found, in another order."""
    paths = sorted(hit.path for hit in index.newest(30))
    images = index.vectors(paths)
    query, pull = index.model.embed_texts(["gato", "cachorro"])
    expected = images @ l2_normalize(apply_feedback(query, [(-0.5, pull)], images))
    hits = index.search("gato", less=["0.5:cachorro"], k=30)
    assert [hit.path for hit in hits] == [paths[place] for place in np.argsort(-expected)]
    assert [hit.score for hit in hits] == pytest.approx(sorted(expected, reverse=True), abs=1e-3)
    means = []
    for pulls in ({"less": "4:cachorro"}, {}, {"more": ["4:cachorro"]}):
        found = [paths.index(hit.path) for hit in index.search("gato", k=5, **pulls)]
        means.append((images[found] @ pull).mean())
    assert means[0] < means[1] <= means[2]


def test_less_of_something_alone_begins_with_what_differs_most(index):
    paths = sorted(hit.path for hit in index.newest(30))
    scores = index.vectors(paths) @ index.model.embed_texts(["cachorro"])[0]
    assert [hit.path for hit in index.search(less="cachorro", k=30)] == [paths[place] for place in np.argsort(scores)]
    with pytest.raises(ValueError, match="The query is empty"):
        index.search(" ")


def test_the_line_is_where_neutral_sentences_end(index):
    images = index.vectors([hit.path for hit in index.newest(30)])
    scores = index.model.embed_texts(query.NEUTRAL_SENTENCES) @ images.T
    best = (scores.max(axis=1) - scores.mean(axis=1)) / scores.std(axis=1)
    text = index.model.embed_texts(["gato"])[0]
    own, line = images @ text, index._compute_relevance_threshold(text)
    assert (line - own.mean()) / own.std() == pytest.approx(np.quantile(best, query.BACKGROUND_QUANTILE), abs=0.02)
    index.relevance_threshold = True
    try:
        hits = index.search("gato", k=30)
        assert [hit.above_threshold for hit in hits] == [hit.score >= line for hit in hits] and not hits[
            -1
        ].above_threshold
        assert index.search("gato", like=hits[0].path)[0].above_threshold is None, "of sentences alone"
        assert index.search("gato", less=["mar"])[0].above_threshold is None
    finally:
        del index.relevance_threshold
    assert index.search("gato")[0].above_threshold is None, "a model that was not measured draws no line"


def test_a_model_draws_the_line_where_it_was_measured_to_tell(index, tmp_path):
    for auc, draws in ((0.79, False), (0.8, True), (1, True)):
        write_json(tmp_path / query.RELEVANCE_AUC_FILE, {"auc": auc})
        assert query.supports_relevance_threshold(tmp_path) == draws
    assert not query.supports_relevance_threshold(index.model.folder)
    for damaged in ('{"auc": "high"}', '{"auc": null}', "{}", "[]", "{", "\0"):
        (tmp_path / query.RELEVANCE_AUC_FILE).write_text(damaged)
        assert not query.supports_relevance_threshold(tmp_path), "and searches go on"


def test_the_background_is_of_the_models_own_vectors(index):
    whole, others = (index._table.sample(index.model.width, of, 7) for of in (index.model.image_digest, "another"))
    assert whole.shape == (7, index.model.width) and len(np.unique(whole, axis=0)) == 7 and not len(others)

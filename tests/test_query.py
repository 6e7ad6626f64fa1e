"""Relevance feedback and the relevance threshold: their arithmetic, and their effect on searches of an index."""

from types import SimpleNamespace

import numpy as np
import pytest
from made_index import make_pictures
from tiny import save_model

from capivara_common.files import write_json
from capivara_search import query
from capivara_search.index import PictureIndex
from capivara_search.query import apply_feedback, parse_weighted_feedback
from capivara_search.table import l2_normalize


@pytest.fixture(scope="module")
def index(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("query")
    make_pictures(folder / "fotos", 30)
    pictures = PictureIndex.open(folder / "i.lance", model=str(save_model(folder / "model", tiny_processor)))
    pictures.add(folder / "fotos")
    return pictures


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
def test_a_weight_may_precede_the_words_of_feedback(text, weight, words):
    assert parse_weighted_feedback(text) == (weight, words)


@pytest.mark.parametrize("text", ["", "  ", "0:mar", "9:mar", "0.5:", "12:30", "-1:mar", "nan:mar", "1e3:mar"])
def test_an_invalid_weight_is_refused_before_any_text_is_embedded(text, index, monkeypatch):
    monkeypatch.setattr(type(index.model), "embed_texts", lambda *_: pytest.fail("a text was embedded"))
    with pytest.raises(ValueError) as caught:
        index.search("gato", less=[text])
    if text.strip():
        assert caught.value.code == "bad_feedback" and caught.value.values == {"text": text, "most": 4}
    else:
        assert caught.value.code == "empty_feedback"


def test_pictures_of_less_rank_lower_but_are_still_found(index):
    paths = sorted(hit.path for hit in index.newest(30))
    images = index.vectors(paths)
    text, less = index.model.embed_texts(["gato", "cachorro"])
    expected = images @ l2_normalize(apply_feedback(text, [(-0.5, less)], images))
    hits = index.search("gato", less=["0.5:cachorro"], k=30)
    assert [hit.path for hit in hits] == [paths[row] for row in np.argsort(-expected)]
    assert [hit.score for hit in hits] == pytest.approx(sorted(expected, reverse=True), abs=1e-3)
    means = []
    for feedback in ({"less": "4:cachorro"}, {}, {"more": ["4:cachorro"]}):
        rows = [paths.index(hit.path) for hit in index.search("gato", k=5, **feedback)]
        means.append((images[rows] @ less).mean())
    assert means[0] < means[1] <= means[2]


def test_a_search_with_less_alone_begins_with_the_least_similar_pictures(index):
    paths = sorted(hit.path for hit in index.newest(30))
    scores = index.vectors(paths) @ index.model.embed_texts(["cachorro"])[0]
    assert [hit.path for hit in index.search(less="cachorro", k=30)] == [paths[row] for row in np.argsort(scores)]
    with pytest.raises(ValueError) as caught:
        index.search(" ")
    assert caught.value.code == "empty_query"


def test_the_relevance_threshold_is_a_quantile_of_neutral_sentences(index):
    images = index.vectors([hit.path for hit in index.newest(30)])
    scores = index.model.embed_texts(query.NEUTRAL_SENTENCES) @ images.T
    best_z_scores = (scores.max(axis=1) - scores.mean(axis=1)) / scores.std(axis=1)
    text = index.model.embed_texts(["gato"])[0]
    text_scores, threshold = images @ text, index._compute_relevance_threshold(text)
    expected = np.quantile(best_z_scores, query.BACKGROUND_QUANTILE)
    assert (threshold - text_scores.mean()) / text_scores.std() == pytest.approx(expected, abs=0.02)
    index.relevance_threshold = True
    try:
        hits = index.search("gato", k=30)
        assert [hit.above_threshold for hit in hits] == [hit.score >= threshold for hit in hits]
        assert not hits[-1].above_threshold
        with_picture = index.search("gato", like=hits[0].path)
        assert with_picture[0].above_threshold is None, "the threshold is for sentences only"
        assert index.search("gato", less=["mar"])[0].above_threshold is None
    finally:
        del index.relevance_threshold
    assert index.search("gato")[0].above_threshold is None, "a model that was not measured uses no threshold"


def test_a_model_uses_the_threshold_if_its_measured_auc_is_high_enough(index, tmp_path):
    for auc, is_supported in ((0.79, False), (0.8, True), (1, True)):
        write_json(tmp_path / query.RELEVANCE_AUC_FILE, {"auc": auc})
        assert query.is_relevance_auc_of_model_high_enough(tmp_path) == is_supported
    assert not query.is_relevance_auc_of_model_high_enough(index.model.folder)
    for damaged in ('{"auc": "high"}', '{"auc": null}', "{}", "[]", "{", "\0"):
        (tmp_path / query.RELEVANCE_AUC_FILE).write_text(damaged)
        assert not query.is_relevance_auc_of_model_high_enough(tmp_path), "a damaged file raises no error"


def test_the_sample_holds_only_vectors_of_the_same_model(index):
    another = SimpleNamespace(width=index.model.width, image_digest="another")
    sample, others = (index._table.sample(model, 7) for model in (index.model, another))
    assert sample.shape == (7, index.model.width) and len(np.unique(sample, axis=0)) == 7 and not len(others)

"""What the search benchmark measures with: right answers, rows as the index has them."""

import numpy as np

from benchmarks import search
from capivara_search.table_columns import schema


def test_recall_is_the_share_of_the_nearest_rows():
    nearest = [[number for number in range(search.K)]] * 2
    assert search.recall([[*range(5), *range(90, 95)], list(range(search.K))], nearest) == 0.75


def test_the_answers_are_the_nearest_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "QUERIES", 3)
    search.make_vectors(tmp_path, 50)
    vectors = np.load(tmp_path / "vectors-50.npy").astype(np.float32)
    queries, nearest = search.answers(tmp_path, 50)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3) and nearest.shape == (3, search.K)
    for query, rows in zip(queries, nearest, strict=True):
        scores = vectors @ query
        assert set(rows) == set(np.argsort(-scores)[: search.K])


def test_made_rows_are_rows_of_the_index():
    rows = search.made_rows(np.zeros((3, search.WIDTH), np.float16), 7, "0" * 32)
    assert rows.schema == schema(search.WIDTH) and rows["path"][0].as_py() == search.path_of(7)

"""What the search benchmark measures with: right answers, rows as the index has them, tables of its results."""

import numpy as np

from benchmarks import search, search_tables
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


def test_the_tables_name_every_size_and_program():
    one = {
        **{"approximate": True, "vector_ms": {"p50": 1.0, "p95": 2.0}, "text_ms": {"p50": 3.0, "p95": 4.0}},
        **{"recall": 0.9, "memory_bytes": 10**9, "bytes": 10**9, "optimised_s": 5.0, "built_s": 6.0},
        "added_s": {"1": {"seconds": 0.5, "image_tower_s": 0.1, "first_s": 0.9}},
    }
    results = {
        **{"index": {"1000": one}, "peers": {"faiss_flat": one}, "peer_rows": 1000, "first_search_s": [2.0]},
        **{"width": 512, "queries": 200, "k": 10, "runs": 5, "device": "cpu", "threads": 2},
        "versions": dict.fromkeys(("lancedb", "faiss-cpu", "sentence-transformers", "torch"), "1"),
    }
    assert search_tables.search_table(results).count("\n|") >= 3
    assert "| 1,000 | approximate |" in search_tables.growth_table(results)

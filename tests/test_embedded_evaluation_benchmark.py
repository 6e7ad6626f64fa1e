"""`benchmarks.embedded_evaluation`: retrieval from images compared with retrieval from their stored embeddings."""

import pytest

from benchmarks import embedded_evaluation
from capivara_common.files import read_json


@pytest.mark.slow
def test_both_sources_and_their_differences_are_measured(saved_tiny_folder, tiny_dataset_folder, tmp_path):
    words = {"model": saved_tiny_folder, "dataset": tiny_dataset_folder, "output": tmp_path / "results.json"}
    embedded_evaluation.main([f"--{name}={value}" for name, value in words.items()])
    measured = read_json(tmp_path / "results.json")["measured"]
    assert [*measured] == ["pt", "en"]
    for values in measured.values():
        for name, value in values["images"].items():
            assert values["difference"][name] == values["embeddings"][name] - value
        assert 0 < values["images"]["text_to_image recall@5"] <= 1
        assert abs(values["difference"]["text_to_image recall@5"]) < 0.1

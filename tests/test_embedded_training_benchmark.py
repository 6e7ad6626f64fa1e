"""The benchmark of training on a large dataset of embeddings, with few rows and a tiny model."""

import shutil

import pytest

from benchmarks import embedded_training
from capivara_common.files import read_json


@pytest.mark.slow
def test_memory_start_and_disk_use_are_measured(saved_tiny_folder, tmp_path):
    """The work folder is removed at the end."""
    shutil.copytree(saved_tiny_folder, tmp_path / "work" / "model")
    words = {"work": tmp_path / "work", "output": tmp_path / "results.json", "rows": 300, "small_rows": 100, "steps": 1}
    embedded_training.main([f"--{name}={value}" for name, value in words.items()])
    results = read_json(tmp_path / "results.json")
    assert [*results["runs"]] == ["small", "large", "large, again"] and (results["rows"], results["steps"]) == (300, 1)
    for run in results["runs"].values():
        assert run["peak_anonymous_bytes"] > 1e7 and 0 < run["first_step_s"] < run["seconds"]
    assert all(size > 0 for sizes in results["disk"].values() for size in sizes.values())
    assert not (tmp_path / "work").exists()

"""Timings that users were promised, measured small."""

import pytest

from benchmarks.import_time import measure


@pytest.mark.slow
def test_import_costs_little_over_transformers():
    assert measure(runs=3)["extra_s"] < 0.3


@pytest.mark.slow
def test_encode_embeds_the_same_as_open_clip(tmp_path):
    import json

    from benchmarks.encode import main

    flags = ["--images", "2", "--captions", "4", "--runs", "1", "--output", str(tmp_path / "encode.json")]
    main(flags)
    measured = json.loads((tmp_path / "encode.json").read_text())["measured"]
    assert set(measured) == {f"{what}_{p}" for what in ("images", "captions") for p in ("float32", "bfloat16")}
    assert all(measured[f"{what}_float32"]["largest_difference"] < 1e-5 for what in ("images", "captions"))

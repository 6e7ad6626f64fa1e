"""The figures of the export, measured small."""

import json

import pytest

from benchmarks import export


@pytest.mark.slow
def test_export_at_small_size(tmp_path, capsys):
    flags = ["--layers", "1", "--runs", "1", "--output", str(tmp_path / "export.json")]
    export.main(flags)
    found = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["export"]["written_bytes"] > 2 * found["weights_bytes"] > 8 * found["parameters"]
    assert 0 < found["export"]["after_imports_bytes"] <= found["export"]["peak_bytes"]
    for part in ("load", "load_and_read"):
        assert found["load"][part]["ratio"] > 0
        assert all(found["load"][part][name]["median_s"] > 0 for name in ("ours", "open_clip"))
    assert found["load"]["load_and_read"]["ours"]["median_s"] >= found["load"]["load"]["ours"]["median_s"]
    assert {"device", "versions", "runs"} <= found.keys()


def test_ratio_is_over_the_imports(monkeypatch, tmp_path):
    found = {"after_imports_bytes": 500, "peak_bytes": 1600}
    monkeypatch.setattr(export, "save_random_model", lambda *_: {"weights_bytes": 1000})
    monkeypatch.setattr(export, "measured", lambda worker, args: found)
    monkeypatch.setattr(export, "compare_loads", lambda args: {})
    measured = export.measure(export.ExportBenchmarkArguments(folder=tmp_path))["export"]
    assert (measured["peak_over_imports_bytes"], measured["ratio_to_weights"]) == (1100, 1.1)


def test_dropping_a_file_from_the_cache_keeps_it(tmp_path):
    (tmp_path / "file").write_bytes(b"as it was")
    export.drop_from_page_cache(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"as it was"

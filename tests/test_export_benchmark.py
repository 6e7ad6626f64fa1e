"""The figures of the export, measured small."""

import json

import pytest

from benchmarks import export


@pytest.mark.slow
def test_export_at_small_size(tmp_path, capsys):
    export.main(["--layers", "1", "--output", str(tmp_path / "export.json")])
    found = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found and {"device", "versions"} <= found.keys()
    exported = found["export"]
    assert exported["written_bytes"] > 2 * found["weights_bytes"] > 8 * found["parameters"]
    assert 0 < exported["after_imports_bytes"] <= exported["peak_bytes"]
    over = exported["peak_bytes"] - exported["after_imports_bytes"]
    assert exported["ratio_to_weights"] == over / found["weights_bytes"]

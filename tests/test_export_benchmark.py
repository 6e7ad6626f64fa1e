"""The figures of the export, measured small."""

import json
import shutil

import pytest

from benchmarks import export


@pytest.mark.slow
def test_export_at_small_size(tiny_folder, tmp_path, capsys, monkeypatch):
    def saved(folder, layers):
        weights = shutil.copytree(tiny_folder, folder) / "model.safetensors"
        return {"parameters": layers, "weights_bytes": weights.stat().st_size}

    monkeypatch.setattr(export, "save_random_model", saved)
    export.main(["--output", str(tmp_path / "export.json")])
    found = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found and {"device", "versions"} <= found.keys()
    exported = found["export"]
    assert exported["written_bytes"] > 2 * found["weights_bytes"] > 0
    assert 0 < exported["after_imports_bytes"] <= exported["peak_bytes"]
    over = exported["peak_bytes"] - exported["after_imports_bytes"]
    assert exported["ratio_to_weights"] == over / found["weights_bytes"]

"""The benchmark of the main job: both commands of both trees, and what the runs have measured."""

import subprocess
from pathlib import Path

from benchmarks import main_job
from capivara_common.files import read_json, write_json


def test_both_trees_run_twice(tmp_path, monkeypatch):
    """The old one in its own folder and with its own modules, before the new one; the second run keeps what is made."""
    (tmp_path / "train_accelerate.py").touch()
    calls, record = [], {"metric": "mean_recall", "value": 0.25}

    def run(command, cwd, env, check):
        assert check and env["OMP_NUM_THREADS"] == "2" and env["ATEN_CPU_CAPABILITY"] == "avx2"
        calls.append((command[3], cwd, env["PYTHONPATH"], env["CAPIVARA_CACHE"]))
        if "train_accelerate" in command:
            write_json(Path(command[-1]) / "results" / "r.json", {"records": [record]})

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        patch.setattr(main_job.timing, "conditions", dict)
        main_job.main(["--old_tree", str(tmp_path), "--without_bf16", "true", "--output", str(tmp_path / "o.json")])
    assert [call[:3] for call in calls] == [
        (name, tree, str(tree))
        for tree in (tmp_path, main_job.timing.ROOT)
        for name in ("examples.openmoji.prepare", "train_accelerate") * 2
    ]
    assert calls[0][3] == calls[3][3] != calls[4][3]
    found = read_json(tmp_path / "o.json")
    first = found["measured"]["old"]["first"]
    assert first["records"] == [record] and found["without_bf16"] is True
    assert first["seconds"].keys() == {"prepare", "train", "total"}

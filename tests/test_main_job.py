"""The benchmark of the main job: phases by the signs of their bars, and figures out of the run's own files."""

import os
import sys

import pytest

from benchmarks import main_job
from benchmarks.main_job import MainJobArguments, phases_of
from capivara_common.files import write_json

JOB = """
import sys, time
print("Preparing", file=sys.stderr)
for _ in range(3):
    sys.stderr.write("\\rDrawing emoji: 1/3"); sys.stderr.flush(); time.sleep(0.1)
print("\\nTraining, seed 0: 100%", file=sys.stderr)
sys.exit(len(sys.argv) - 1)
"""


def test_seconds_of_the_phases_that_are_seen(tmp_path):
    seconds = phases_of([sys.executable, "-c", JOB], tmp_path, dict(os.environ))
    assert seconds.keys() == {"drawing", "training", "total"}
    assert 0.1 < seconds["drawing"] < seconds["total"] and seconds["training"] < 0.1


def test_a_job_that_fails_is_shown(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1:.*Training, seed 0: 100%"):
        phases_of([sys.executable, "-c", JOB, "1"], tmp_path, dict(os.environ))


def test_both_trees_run_twice(tmp_path, monkeypatch):
    """The old one in its own folder and with its own modules, before the new one; the second run keeps what is made."""
    (tmp_path / "train_accelerate.py").touch()
    calls = []

    def run(command, folder, environment):
        if "examples.openmoji.prepare" in command:
            return {"drawing": 5.0, "total": 20.0}
        output = main_job.Path(command[-1])
        calls.append((folder, environment["PYTHONPATH"], output.name, environment["CAPIVARA_CACHE"]))
        record = {"metric": "mean_recall", "model": "capivara", "language": "pt", "direction": "text_to_image"}
        write_json(output / "run.json", {"steps": 30})
        write_json(output / "results" / "r.json", {"records": [record | {"value": 0.25}]})
        return {"alignment": 60.0, "total": 100.0}

    monkeypatch.setattr(main_job, "phases_of", run)
    main_job.main(["--old_tree", str(tmp_path), "--without_bf16", "true", "--output", str(tmp_path / "o.json")])
    found = main_job.read_json(tmp_path / "o.json")
    assert [call[:3] for call in calls] == [
        (tree, str(tree), run) for tree in (tmp_path, main_job.timing.ROOT) for run in ("first", "second")
    ]
    assert calls[0][3] == calls[1][3] != calls[2][3]
    first = found["measured"]["old"]["first"]
    assert first["mean_recall"] == {"capivara_pt_text_to_image": 0.25} and first["steps"] == 30
    assert first["seconds"] == {"drawing": 5.0, "alignment": 60.0, "total": 120.0}
    assert found["without_bf16"] is True


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="old_tree must be a checkout of this project"):
        MainJobArguments(old_tree=tmp_path)

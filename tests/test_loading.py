"""A model that is not there, on a machine without network: one line within seconds, whichever command asks."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = textwrap.dedent(
    """
    import json, time
    from captions.generate import GenerateArguments, load_captioner
    from captions.translators import load as load_translator
    from modeling_capivara.embedder import load_embedder
    from modeling_capivara.loading import load_model, load_processor

    loaders = {
        "processor": lambda: load_processor("no/such"),
        "model": lambda: load_model("no/such"),
        "embedder": lambda: load_embedder("no/such", "cpu"),
        "clip": lambda: load_embedder("clip:no/such", "cpu", baseline=True),
        "open_clip": lambda: load_embedder("open_clip:hf-hub:no/such", "cpu", baseline=True),
        "open_clip tag": lambda: load_embedder("open_clip:ViT-B-32:laion2b_s34b_b79k", "cpu", baseline=True),
        "captioner": lambda: load_captioner(GenerateArguments("d", "o", model="no/such")),
        "translator": lambda: load_translator("no/such", "pt"),
    }
    said = {}
    for name, load in loaders.items():
        started = time.perf_counter()
        try:
            load()
        except ValueError as error:
            said[name] = (time.perf_counter() - started, str(error))
    print(json.dumps(said))
    """
)


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody answers at the port of discard
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


@pytest.mark.slow
def test_without_network_every_loader_says_so_within_seconds(tmp_path):
    done = run(["-c", PROGRAM], tmp_path)
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 8, done.stderr
    for name, (seconds, message) in said.items():
        assert seconds < 10, name  # the libraries alone try for half a minute a file
        assert "Hub can't be reached (ConnectError)" in message and "\n" not in message, name
    assert "Retrying" not in done.stderr


@pytest.mark.slow
def test_a_run_of_no_model_speaks_of_no_resuming(tmp_path, tiny_dataset_folder):
    words = [str(ROOT / "train_accelerate.py"), "--model", "no/such", "--dataset", str(tiny_dataset_folder)]
    done = run([*words, "--warmup_steps", "1", "--max_steps", "9", "--effective_batch_size", "4"], tmp_path)
    assert done.returncode == 1 and "resume" not in done.stderr
    assert "The model no/such is no folder here" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "runs").iterdir())

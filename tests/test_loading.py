"""Loading models: without network a missing model is a quick error of one line, and loading prints nothing."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = textwrap.dedent(
    """
    import json, time
    from captions.captioners.blip2 import load_captioner
    from captions.generate import GenerateArguments
    from captions.translate import TranslateArguments
    from captions.translators.seq2seq import Seq2SeqTranslator
    from modeling_capivara.two_towers import load_embedder
    from modeling_capivara.loading import load_model, load_processor

    loaders = {
        "processor": lambda: load_processor("no/such"),
        "model": lambda: load_model("no/such"),
        "embedder": lambda: load_embedder("no/such", "cpu"),
        "open_clip": lambda: load_embedder("open_clip:hf-hub:no/such", "cpu", baseline=True),
        "open_clip tag": lambda: load_embedder("open_clip:ViT-B-32:laion2b_s34b_b79k", "cpu", baseline=True),
        "captioner": lambda: load_captioner(GenerateArguments("d", "o", model="no/such")),
        "translator": lambda: Seq2SeqTranslator(TranslateArguments("d", "o", language="pt", model="no/such")),
    }
    errors = {}
    for name, load in loaders.items():
        started = time.perf_counter()
        try:
            load()
        except ValueError as error:
            errors[name] = (time.perf_counter() - started, str(error))
    print(json.dumps(errors))
    """
)


@pytest.mark.slow
def test_without_network_every_loader_fails_within_seconds(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # no server listens on this port
    command = [sys.executable, "-c", PROGRAM]
    completed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    errors = json.loads(completed.stdout.splitlines()[-1])
    assert len(errors) == 7, completed.stderr
    for name, (seconds, message) in errors.items():
        assert seconds < 10, name  # the libraries alone retry for half a minute per file
        assert "ConnectError" in message and "\n" not in message, name
    assert "Retrying" not in completed.stderr


@pytest.mark.slow
def test_loading_a_model_prints_no_report_of_transformers(tiny_folder):
    """A subprocess, because pytest replaces the streams that the loggers of transformers write to."""
    program = f"from modeling_capivara.loading import load_model; load_model({str(tiny_folder)!r})"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert completed.returncode == 0, completed.stderr
    assert "sharded" not in completed.stderr and "|" not in completed.stdout

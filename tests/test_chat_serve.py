"""Chat backends against a real server: `transformers serve`, with tiny models whose weights are random."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from caption_tars import picture, saved_train
from chat_models import IMAGE_TOKENS, WORDS, save_text_model, save_vision_language_model
from datasets import Image, Value

from capivara_common.files import read_json
from caption_data.rows import CAPTIONS_FEATURE
from caption_data.sources import open_split
from captions.generate import main as generate
from captions.journal import read_journal
from captions.stages import check_complete
from captions.translate import main as translate

ROOT = Path(__file__).resolve().parent.parent
ROWS, CONCURRENCY = 30, 2
COMMANDS = {"translate": translate, "generate": generate}
pytestmark = pytest.mark.slow
pytest.importorskip("fastapi", reason="transformers serve needs it")


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A running server with two models. Its log has a line for each request."""
    folder = tmp_path_factory.mktemp("serve")
    text, vision = save_text_model(folder / "text"), save_vision_language_model(folder / "vision")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words],
            stdout=output,
            stderr=output,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_until(lambda: is_ready(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/v1", text=text, vision=vision, log=log)
    finally:
        process.kill()
        process.wait()


def wait_until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "the condition has not become true"
        time.sleep(0.005)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    features = {"image": Image(), "id": Value("int32"), "captions-en": CAPTIONS_FEATURE}
    captions = [[f"the cat number {i}", f"a {WORDS[i % len(WORDS)]} on the table in house {i}"] for i in range(ROWS)]
    return saved_train(
        tmp_path_factory.mktemp("data") / "data", features, map(picture, range(ROWS)), range(ROWS), captions
    )


def flags(serve, dataset: str, output: Path, command: str) -> list[str]:
    words = ["--dataset", dataset, "--output", str(output), "--base_url", serve.url, "--max_tokens", "40"]
    words += ["--concurrency", str(CONCURRENCY), "--batch_rows", "4", "--rows_per_part", "10"]
    if command == "translate":
        return [*words, "--backend", "chat", "--model", str(serve.text), "--language", "pt"]
    return [*words, "--captioner", "chat", "--model", str(serve.vision), "--caption_language", "pt"]


def request_count(serve) -> int:
    return serve.log.read_text().count("POST /v1/chat/completions")


def journal_records(output: Path) -> list[dict]:
    paths = [*output.glob("*.answers.jsonl"), *output.parent.glob(f"{output.name}.memory/*/*.jsonl")]
    return [record for path in paths for record in read_journal(path)]


@pytest.mark.parametrize(("command", "answers"), [("translate", 2 * ROWS), ("generate", 4 * ROWS)])
def test_a_killed_run_against_a_real_server_continues(serve, dataset, tmp_path, command, answers):
    output, before = tmp_path / "out", request_count(serve)
    words = flags(serve, dataset, output, command)
    with subprocess.Popen([sys.executable, "-m", f"captions.{command}", *words], cwd=ROOT, stderr=-3) as process:
        wait_until(lambda: len(journal_records(output)) >= 5 or process.poll() is not None)
        process.kill()
    saved = journal_records(output)
    assert process.returncode == -9 and 5 <= len(saved) < answers
    COMMANDS[command](words)
    assert check_complete(output).rows == ROWS
    rows = list(open_split(str(output), "train", "image").rows())
    assert [row["id"] for row in rows] == list(range(ROWS))
    column = "captions-pt" if command == "translate" else "generated-captions-pt"
    texts = {text for row in rows for text in row[column]}
    assert texts and all(set(text.split()) <= set(WORDS) for text in texts)
    if command == "translate":
        assert all(len(row[column]) == 2 for row in rows)
        assert texts >= {record["translation"] for record in saved}
    usage = read_json(output / "quality.json")["usage"]
    # Each run begins with a request for a single token. Bad answers are requested twice.
    sent = request_count(serve) - before
    assert 0 <= sent - 2 - answers - usage["retried"] <= 2 * CONCURRENCY, "only requests in flight were lost"
    assert usage["completion_tokens"] >= 3 * answers
    if command == "generate":
        assert usage["prompt_tokens"] > answers * IMAGE_TOKENS, "the server has read the images"
        assert len({json.dumps(row[column]) for row in rows}) > 1, "captions differ between images"


def test_a_text_model_is_refused_as_a_captioner(serve, dataset, tmp_path):
    words = flags(serve, dataset, tmp_path / "out", "generate")
    with pytest.raises(ValueError, match="image"):
        generate([*words, "--model", str(serve.text), "--dry_run"])
    assert not (tmp_path / "out").exists()

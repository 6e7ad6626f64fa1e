"""docs/explanation/architecture.md lists the files that a value passes through, as measured in runs with tiny models.

WRITE_WALKS=1 pytest tests/test_walks.py    # update the page with the measured files
"""

import json
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from caption_build import write_config
from card_run import trained_run
from hub_client import hub_commands
from made_index import make_pictures
from test_train_accelerate import flags
from walks import ROOT, trace_files

import train_accelerate
from capivara_search.command import main as capivara
from captions.build import main as build
from eval.retrieval import main as retrieval

pytestmark = pytest.mark.slow
MAX_FILES = {  # a path may become shorter, never longer; lower the number if it does
    "From a caption row to the loss": 9,
    "From pixels to a score": 5,
    "From a run folder to the Hub": 9,
    "From a caption row through build": 11,
    "From a folder of pictures to a hit": 13,
}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """Use an empty cache, because cached results would shorten a path."""
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "capivara-cache"))


def check(walk: str, files: Iterable[str]) -> None:
    """Assert that the page lists exactly these files under the heading `walk`, and that they are not too many."""
    page = ROOT / "docs/explanation/architecture.md"
    text, line = page.read_text(encoding="utf-8"), ", ".join(f"`{file}`" for file in sorted(files))
    line = textwrap.fill(f"Measured, {len(set(files))} files: {line}.", 120, break_on_hyphens=False)
    assert len(set(files)) <= MAX_FILES[walk], line
    head, section = text.split(f"\n## {walk}\n")
    section = re.sub(r"^Measured, .*?\.$", line, section, count=1, flags=re.MULTILINE | re.DOTALL)
    if os.environ.get("WRITE_WALKS"):
        page.write_text(f"{head}\n## {walk}\n{section}", encoding="utf-8")
    assert page.read_text(encoding="utf-8") == f"{head}\n## {walk}\n{section}", line


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)


def test_from_a_caption_row_to_the_loss(tiny_folder, tiny_dataset_folder, tmp_path):
    def is_value(value: object) -> bool:
        """Return whether it is a caption, its token ids, its embedding, or the logits."""
        is_caption = isinstance(value, str) and re.fullmatch(r"(foto \d+ )?azul \w+", value)
        return bool(is_caption) or (is_tensor(value) and value.ndim == 2 and len(value) <= 12)

    argv = flags(tiny_folder, tiny_dataset_folder, tmp_path / "out", max_steps=1, warmup_steps=0)
    last, excluded = "training/whole_batch.py:contrastive_loss", ["_measure_validation", "embed_images"]
    files = trace_files(lambda: train_accelerate.main(argv), is_value, "train_accelerate.py:main", last, excluded)
    check("From a caption row to the loss", files)


def test_from_pixels_to_a_score(tiny_folder, tiny_dataset_folder, tmp_path):
    def is_value(value: object) -> bool:
        """Return whether it is an image, its pixels, its embedding, or ranks."""
        return isinstance(value, PIL.Image.Image | np.ndarray) or is_tensor(value)

    argv = ["--model", str(tiny_folder), "--dataset", str(tiny_dataset_folder), "--output", str(tmp_path / "r.json")]
    first, last = "capivara_common/image_files.py:decode_image", "eval/capivara_metrics/metrics.py:recall_at_k"
    check("From pixels to a score", trace_files(lambda: retrieval(argv), is_value, first, last, ["embed_texts"]))


def test_from_a_folder_of_pictures_to_a_hit(tiny_folder, tmp_path):
    def is_value(value: object) -> bool:
        """Return whether it is the path of a picture, its pixels, its vector, or its row."""
        path = isinstance(value, str | Path) and str(value).endswith(".png")
        return path or isinstance(value, PIL.Image.Image | np.ndarray | pa.Table | pa.RecordBatch) or is_tensor(value)

    def run() -> None:
        for words in (["index", str(tmp_path / "fotos")], ["search", "gato"]):
            with pytest.raises(SystemExit):
                capivara([*words, "--model", str(tiny_folder), "--index", str(tmp_path / "i"), "--lang", "en"])

    make_pictures(tmp_path / "fotos", 5)
    first, last = "capivara_search/command.py:main", "capivara_search/table.py:to_hits"
    check("From a folder of pictures to a hit", trace_files(run, is_value, first, last))


def test_from_a_caption_row_through_build(tiny_folder, tmp_path, monkeypatch):
    def is_value(value: object) -> bool:
        """Return whether it is a caption in one of the two languages."""
        return isinstance(value, str) and bool(re.fullmatch(r"(a cat|ikati) \d+", value))

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = write_config(tmp_path, tiny_folder)
    first, last = "captions/build.py:main", "captions/build.py:write_dataset"
    files = trace_files(lambda: build(["--config", str(config)]), is_value, first, last)
    check("From a caption row through build", files)


def test_from_a_run_folder_to_the_hub(tmp_path_factory, tiny_dataset_folder, tiny_processor, tmp_path):
    run = trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor)
    with hub_commands(tmp_path) as commands:
        done = commands(run, "us/run", call="walks:publish")
    assert done.code == 0 and "README.md" in commands.hub.files("us/run"), done.err
    check("From a run folder to the Hub", json.loads(done.out.splitlines()[-1]))

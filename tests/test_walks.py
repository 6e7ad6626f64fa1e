"""docs/architecture.md lists the files that a value goes through on each way: those of a real run at toy width.

WRITE_WALKS=1 pytest tests/test_walks.py    # writes what was measured on the page
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
from walks import ROOT, walked

import train_accelerate
from capivara_search.command import main as capivara
from captions.build import main as build
from eval.retrieval import main as retrieval

pytestmark = pytest.mark.slow
MOST_FILES = {  # a walk may become shorter, never longer: lower its number then
    "From a caption row to the loss": 7,
    "From pixels to a score": 5,
    "From a run folder to the Hub": 8,
    "From a caption row through build": 8,
    "From a folder of pictures to a hit": 9,
}


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch, tmp_path):
    """What another test has left in the caches would shorten a walk."""
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "capivara-cache"))


def check(walk: str, found: Iterable[str]) -> None:
    """That the page lists these files, and no others, under the heading of a walk, and that they are not too many."""
    page = ROOT / "docs/architecture.md"
    text, line = page.read_text(encoding="utf-8"), ", ".join(f"`{file}`" for file in sorted(found))
    line = textwrap.fill(f"Measured, {len(set(found))} files: {line}.", 120, break_on_hyphens=False)
    assert len(set(found)) <= MOST_FILES[walk], line
    head, section = text.split(f"\n## {walk}\n")
    section = re.sub(r"^Measured, .*?\.$", line, section, count=1, flags=re.MULTILINE | re.DOTALL)
    if os.environ.get("WRITE_WALKS"):
        page.write_text(f"{head}\n## {walk}\n{section}", encoding="utf-8")
    assert page.read_text(encoding="utf-8") == f"{head}\n## {walk}\n{section}", line


def is_tensor(thing: object) -> bool:
    return isinstance(thing, torch.Tensor) and not isinstance(thing, torch.nn.Parameter)


def test_from_a_caption_row_to_the_loss(tiny_folder, tiny_dataset_folder, tmp_path):
    def is_value(thing: object) -> bool:
        """A caption, its token ids, its embedding, the logits."""
        is_caption = isinstance(thing, str) and re.fullmatch(r"(foto \d+ )?azul \w+", thing)
        return bool(is_caption) or (is_tensor(thing) and thing.ndim == 2 and len(thing) <= 12)

    argv = flags(tiny_folder, tiny_dataset_folder, tmp_path / "out", max_steps=1, warmup_steps=0)
    last, beside = "training/whole_batch.py:contrastive_loss", ["_measured", "embed_images"]
    found = walked(lambda: train_accelerate.main(argv), is_value, "train_accelerate.py:main", last, beside)
    check("From a caption row to the loss", found)


def test_from_pixels_to_a_score(tiny_folder, tiny_dataset_folder, tmp_path):
    def is_value(thing: object) -> bool:
        """A picture, its pixels, its embedding, ranks."""
        return isinstance(thing, PIL.Image.Image | np.ndarray) or is_tensor(thing)

    argv = ["--model", str(tiny_folder), "--dataset", str(tiny_dataset_folder), "--output", str(tmp_path / "r.json")]
    first, last = "capivara_common/image_files.py:decode_image", "eval/capivara_metrics/metrics.py:recall_at_k"
    check("From pixels to a score", walked(lambda: retrieval(argv), is_value, first, last, ["embed_texts"]))


def test_from_a_folder_of_pictures_to_a_hit(tiny_folder, tmp_path):
    def is_value(thing: object) -> bool:
        """The path of a picture, its pixels, its vector, its row."""
        path = isinstance(thing, str | Path) and str(thing).endswith(".png")
        return path or isinstance(thing, PIL.Image.Image | np.ndarray | pa.Table | pa.RecordBatch) or is_tensor(thing)

    def run() -> None:
        for words in (["index", str(tmp_path / "fotos")], ["search", "gato"]):
            with pytest.raises(SystemExit):
                capivara([*words, "--model", str(tiny_folder), "--index", str(tmp_path / "i"), "--lang", "en"])

    make_pictures(tmp_path / "fotos", 5)
    first, last = "capivara_search/command.py:main", "capivara_search/table.py:to_hits"
    check("From a folder of pictures to a hit", walked(run, is_value, first, last))


def test_from_a_caption_row_through_build(tiny_folder, tmp_path, monkeypatch):
    def is_value(thing: object) -> bool:
        """A caption in either language."""
        return isinstance(thing, str) and bool(re.fullmatch(r"(a cat|ikati) \d+", thing))

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = write_config(tmp_path, tiny_folder)
    first, last = "captions/build.py:main", "captions/build.py:write_dataset"
    found = walked(lambda: build(["--config", str(config)]), is_value, first, last)
    check("From a caption row through build", found)


def test_from_a_run_folder_to_the_hub(tmp_path_factory, tiny_dataset_folder, tiny_processor, tmp_path):
    run = trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor)
    with hub_commands(tmp_path) as commands:
        done = commands(run, "us/run", call="walks:publish")
    assert done.code == 0 and "README.md" in commands.hub.files("us/run"), done.err
    check("From a run folder to the Hub", json.loads(done.out.splitlines()[-1]))

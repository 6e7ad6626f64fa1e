"""`benchmarks.published`: published models are fetched, converted, compared with open_clip, and measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from hub_server import HubServer
from made_benchmarks import IMAGES, make_image
from test_from_open_clip import WEIGHTS, published
from tiny import tiny_config, tiny_tokenizer

from benchmarks import published as command
from capivara_common.files import read_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG
from caption_data.sources import open_split
from eval.benchmarks import load_benchmarks
from eval.prompts import load_prompts
from eval.retrieval import RetrievalArguments, load_retrieval_data

ROOT = Path(__file__).resolve().parent.parent
BASE = "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k"
SETS = ("flickr30k-pt", "mnist", "pracegover")  # pracegover is given on request only


def store_dataset(hub: HubServer, folder: Path, key: str, column: str, feature: object, values: list) -> None:
    """Store a dataset with an image for each value in the repository that the benchmark's file names."""
    rows = {"image": list(map(make_image, range(len(values)))), column: values}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), column: feature}))
    (folder / key / "data").mkdir(parents=True)
    data.to_parquet(folder / key / "data" / "test-00000-of-00001.parquet")
    hub.store(load_benchmarks()[key].source["hub_id"], folder / key, "datasets")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local Hub with both models, which share the image encoder, and the sets that can be downloaded."""
    folder = tmp_path_factory.mktemp("published")
    tiny_config().text_config.save_pretrained(folder / "text")
    with HubServer(folder / "hub") as server:
        model = published(folder / "model", tiny_config(), tiny_tokenizer(), str(folder / "text"))
        # open_clip would fetch xlm-roberta-base, which is not on this Hub.
        config = (model / OPEN_CLIP_CONFIG).read_text(encoding="utf-8")
        (model / OPEN_CLIP_CONFIG).write_text(config.replace('"xlm-roberta-base"', json.dumps(str(folder / "text"))))
        tiny_tokenizer().save_pretrained(folder / "text")
        server.store("hiaac-nlp/CAPIVARA", model)
        state = torch.load(model / WEIGHTS, weights_only=True)
        state |= {name: tensor * 0.9 for name, tensor in state.items() if name.startswith("text.proj")}
        torch.save(state, model / WEIGHTS)
        server.store(BASE, model)
        texts = [[f"foto {row} azul {i}" for i in range(5)] for row in range(IMAGES)]
        store_dataset(server, folder, "flickr30k-pt", "caption", List(Value("string")), texts)
        names = load_prompts("mnist").english_names
        store_dataset(server, folder, "mnist", "label", ClassLabel(names=names), [n % 10 for n in range(30)])
        yield server


def run(hub: HubServer, folder: Path, *flags: object) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        **hub.environment(folder / "home", token=None),
        "CAPIVARA_CACHE": str(folder / "cache"),
    }
    words = [sys.executable, "-m", "benchmarks.published", "--output", folder / "out", *flags]
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_published_models_are_fetched_compared_and_measured(hub, tmp_path):
    process = run(hub, tmp_path, "--only", *SETS)
    assert process.returncode == 0, process.stderr
    result = read_json(tmp_path / "out" / "published.json")
    for role, source in (("capivara", "hiaac-nlp/CAPIVARA"), ("baseline", BASE)):
        model = result["models"][role]
        assert model["source"] == source and model["passed"] and model["equal_tokens"] and model["equal_pixels"]
        assert model["revision"] == hub.repo(source).at("main").oid
    assert set(result["downloads"]) == {
        "hiaac-nlp/CAPIVARA",
        BASE,
        "laicsiifes/flickr30k-pt-br",
        "clip-benchmark/wds_mnist",
    }
    assert all(size > 1000 for size in result["downloads"].values())
    # 1,000 images of Flickr30k and 10,000 of MNIST as published; both models have the same image encoder.
    assert result["estimate"]["images"] == 11_000 and result["estimate"]["seconds"] > 0
    statuses = {(entry["benchmark"], entry["status"]) for entry in result["measurements"]}
    assert statuses == {("flickr30k-pt", "measured"), ("mnist", "measured"), ("pracegover", "not run")}
    rows = {(row["benchmark"], row["direction"]): row for row in result["rows"]}
    for role, mean in (("capivara", 79.56), ("baseline", 76.23)):
        cell = rows["flickr30k-pt", "text_to_image"][role]
        assert cell["published"]["mean"] == mean and 0 <= cell["measured"]["mean"] <= 100
        assert cell["difference"] == pytest.approx(cell["measured"]["mean"] - mean)
    assert rows["mnist", ""]["images"] == 30 and not rows["mnist", ""]["like_for_like"]
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "hiaac-nlp/CAPIVARA" in report and "zenodo.org" in report and str(tmp_path) not in report
    assert "zenodo.org" in process.stdout.partition("hiaac-nlp")[0], "the set is listed before the long work"

    # A second run takes everything from the caches, and --limit measures some of the images.
    fetched = len(hub.fetched)
    process = run(hub, tmp_path, "--only", "mnist", "--limit", 20)
    assert process.returncode == 0, process.stderr
    result = read_json(tmp_path / "out" / "published.json")
    assert (result["limit"], [row["images"] for row in result["rows"]]) == (20, [20])
    assert not [name for name in hub.fetched[fetched:] if name.endswith((".bin", ".parquet"))]


def test_a_model_that_differs_from_open_clip_is_an_error(monkeypatch, tmp_path, capsys):
    difference = {"equal_tokens": True, "equal_pixels": False, "text_embeds": 0.0, "image_embeds": 0.1, "passed": False}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "conversion.json").write_text('{"revision": "a"}')
    summary = {"models": [], "protocol": "ours", "measurements": [], "rows": []}
    for name, value in {
        "fetch_download_sizes_from_hub": {},
        "estimate_embedding_time": {"seconds": 1, "unknown": []},
        "run_suite": summary,
        "find_download_or_convert_model_folder": tmp_path / "model",
        "compare_converted_model_with_open_clip": difference,
        "render_suite_table": "table",
    }.items():
        monkeypatch.setattr(command, name, lambda *_, value=value: value)
    with pytest.raises(SystemExit) as ended:
        command.main(["--output", str(tmp_path / "out"), "--only", "mnist"])
    assert "hiaac-nlp/CAPIVARA" in str(ended.value.code)
    assert "**different**" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert not read_json(tmp_path / "out" / "published.json")["models"]["capivara"]["passed"]


def test_limit_measures_evenly_spaced_rows(tiny_dataset_folder):
    split = open_split(str(tiny_dataset_folder), "train", "image")
    captions = split.data["captions-pt"][:]
    assert len(captions) == 12 and split.limited(None) is split.limited(12) is split
    assert split.limited(5).data["captions-pt"][:] == [captions[row] for row in (0, 2, 4, 7, 9)]
    arguments = {"model": "m", "dataset": str(tiny_dataset_folder), "output": Path("x"), "split": "train"}
    data = load_retrieval_data(RetrievalArguments(**arguments, limit=5))
    assert len(data.images) == len(data.captions) == 5
    assert len(load_retrieval_data(RetrievalArguments(**arguments)).captions) == 12


def test_the_runs_of_a_training_are_not_published_models():
    with pytest.raises(ValueError, match="runs"):
        command.main(["--runs", "a", "b"])

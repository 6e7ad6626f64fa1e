"""mteb's own evaluator on an exported folder: its figures are those of `eval.retrieval`, but for what is explained."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, Features, List, Value
from hub_server import HubServer

from capivara_common.files import read_json
from capivara_search.miniature import miniature_folder
from eval.capivara_metrics.metrics import recall_at_k
from eval.eval_arguments import MiebArguments, RetrievalArguments
from eval.measurement import open_store
from eval.mieb import check_data, find_tasks, main, model_meta, open_model
from eval.retrieval import evaluate, load_data
from examples.openmoji.concepts import concept_rows, split_concepts
from examples.openmoji.dataset import render_png
from hub_upload.export import export
from hub_upload.loader_files import write_sentence_transformers
from records.schema import Record

ROOT = Path(__file__).resolve().parent.parent
T2I, I2T = "XM3600T2IRetrieval", "XM3600I2TRetrieval"
PICTURES = 200
TEXT = Value("string")
FEATURES = Features(  # as the data set has them
    {
        **{"image_id": TEXT, "captions": List(TEXT), "captions_tokenized": List(TEXT)},
        **{"captions_tokenized_lowercase": List(TEXT), "image_locale": TEXT},
        "image": {"bytes": Value("binary"), "path": TEXT},
    }
)
CARD = """---
configs:
- config_name: default
  data_files:
  - split: pt
    path: data/pt-*
---
"""
MODEL_CARD = """---
license: cc-by-sa-4.0
language: [pt, en]
base_model: us/base
---
"""


def write_xm3600(folder: Path, pictures: list[bytes], captions: list[list[str]]) -> Path:
    """A copy of XM3600, Portuguese alone, in its published form: parquet files, a split a language."""
    names = [f"{number:016x}" for number in range(len(pictures))]
    columns = {
        "image_id": names,
        **dict.fromkeys(("captions", "captions_tokenized", "captions_tokenized_lowercase"), captions),
        "image_locale": ["pt"] * len(pictures),
        "image": [{"bytes": png, "path": f"{name}.png"} for name, png in zip(names, pictures, strict=True)],
    }
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(columns, features=FEATURES).to_parquet(folder / "data" / "pt-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def xm3600(tmp_path_factory) -> Path:
    """Pictures of OpenMoji that have a name of their own, by two Portuguese captions each."""
    found = {}
    for picture in split_concepts(concept_rows(), 0)["test"]:
        found.setdefault(picture.captions_pt[0], picture.emoji)
    named = list(found.items())[:PICTURES]
    captions = [[name, f"um desenho que mostra {name}"] for name, _ in named]
    folder = tmp_path_factory.mktemp("xm3600") / "data set"
    return write_xm3600(folder, [render_png(emoji) for _, emoji in named], captions)


@pytest.fixture(scope="module")
def tiny_repository(saved_tiny_folder, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("exported") / "repository"
    export(saved_tiny_folder, made, ["transformers", "sentence_transformers"])
    return made


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The miniature, a model that finds things, with the files of sentence-transformers; not another copy of it."""
    made = tmp_path_factory.mktemp("miniature")
    for path in miniature_folder().iterdir():
        (made / path.name).symlink_to(path)
    write_sentence_transformers(made)
    return made


def stored(hub: HubServer, task: str, folder: Path) -> None:
    """Put a copy of a task's data on the server, at the commit that the task names."""
    data = find_tasks([task], ["por"])[0].metadata.dataset
    if ("datasets", data["path"]) in hub.storage.repos:
        return
    repo = hub.store(data["path"], folder, "datasets")
    oid = data["revision"]
    repo.commits_by_oid[oid] = dataclasses.replace(repo.at("main"), oid=oid)
    repo.branches["main"] = oid


def command(*words, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "eval.mieb", *map(str, words)], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def scores_of(output: Path, task: str) -> dict[str, float]:
    """Of the one result file of a task."""
    (file,) = output.glob(f"results/*/*/{task}.json")
    (scores,) = read_json(file)["scores"]["test"]
    assert scores["hf_subset"] == "pt" and scores["languages"] == ["por-Latn"]
    return scores


def arguments(model: Path, data: Path, output: Path, **options) -> RetrievalArguments:
    return RetrievalArguments(
        str(model), str(data), output, split="pt", caption_column="captions", gallery=0, device="cpu", **options
    )


def ours(*args, **options) -> dict[tuple[str, str], Record]:
    """The figures of `eval.retrieval` on the same file."""
    return {(record.direction, record.metric): record for record in evaluate(arguments(*args, **options))}


@pytest.mark.slow
def test_mteb_measures_what_we_measure(repository, tiny_repository, xm3600, tmp_path, monkeypatch, capsys):
    """By its own loading over HTTP, from the data set's published form; then from the cache, without network."""
    with HubServer(tmp_path / "hub") as hub:
        for task in (T2I, I2T):
            stored(hub, task, xm3600)
        words = ["--model", repository, "--output", tmp_path / "out", "--device", "cpu"]
        words += ["--repo_id", "us/miniature", "--revision", "0123abc"]
        done = command(*words, **hub.environment(tmp_path / "home", token=None))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"[1/2] {T2I} test pt: main_score" in done.stdout and f"[2/2] {I2T} test pt: main_score" in done.stdout
    theirs = {task: scores_of(tmp_path / "out", task) for task in (T2I, I2T)}
    found = ours(repository, xm3600, tmp_path / "ours.json")
    for task, direction in ((T2I, "text_to_image"), (I2T, "image_to_text")):
        for k in (1, 5, 10):
            record = found[direction, f"recall@{k}"]
            assert theirs[task][f"hit_rate_at_{k}"] == pytest.approx(record.value, abs=1e-6), (task, k)
    assert found["text_to_image", "recall@1"].n == 2 * PICTURES
    assert 0.1 < found["text_to_image", "recall@10"].value < 0.9, "a model that finds all or nothing proves little"
    # What it calls recall is the share of an image's captions that are found: ours with one, half of ours with two.
    assert theirs[T2I]["recall_at_1"] == pytest.approx(theirs[T2I]["hit_rate_at_1"], abs=1e-6)
    assert theirs[I2T]["recall_at_1"] == pytest.approx(theirs[I2T]["hit_rate_at_1"] / 2, abs=1e-5)
    folder = tmp_path / "out" / "results" / "us__miniature" / "0123abc"
    names = sorted(path.name for path in folder.glob("*.json"))
    assert names == [f"{I2T}.json", f"{T2I}.json", "model_meta.json"]
    for path in folder.iterdir():
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), f"{path.name} names a path of this machine"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    _without_network(tiny_repository, xm3600, tmp_path, capsys)


def _without_network(model: Path, data: Path, tmp_path: Path, capsys) -> None:
    """From the cache of the Hub; a task whose data are not in it is named, and the other is measured."""
    absent = "STSBenchmarkMultilingualVisualSTS"
    words = ["--model", model, "--output", tmp_path / "offline", "--device", "cpu", "--tasks", absent, T2I]
    with pytest.raises(SystemExit, match=f"error: {absent} could not be measured; see above."):
        main([*map(str, words)])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if absent in line)
    assert line.startswith(f"[1/2] {absent} not run: its data, ") and "HF_HUB_OFFLINE is set" in line
    args = arguments(model, data, tmp_path / "tiny.json")
    ranks = load_data(args).embedded(open_store(args))[0].ranks("text_to_image")
    theirs = scores_of(tmp_path / "offline", T2I)
    assert theirs["hit_rate_at_10"] == pytest.approx(recall_at_k(ranks, 10), abs=1e-6)
    gains = torch.where(ranks < 10, 1 / torch.log2(ranks + 2), 0)  # of the one right item
    assert theirs["ndcg_at_10"] == theirs["main_score"] == pytest.approx(gains.mean().item(), abs=1e-5)
    (file,) = (tmp_path / "offline").glob(f"results/*/weights-*/{T2I}.json")
    before = file.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "home")
    main([*map(str, words[:-2]), T2I])  # of what is there the data are not asked for
    assert file.stat().st_mtime_ns == before


@pytest.mark.slow
def test_ties_count_against_us_alone(tiny_repository, tiny_folder, tmp_path, monkeypatch):
    """Two images with the very same caption: ours says that it finds neither, mteb takes whichever comes first."""
    from mteb import evaluate as theirs

    pictures = [render_png(emoji) for emoji in ("1F408", "1F415", "1F697", "1F333", "1F3E0", "1F41F")]
    captions = [["gato"], ["gato"], ["carro"], ["árvore"], ["casa"], ["peixe"]]
    data = write_xm3600(tmp_path / "data", pictures, captions)
    (task,) = find_tasks([I2T], ["por"])
    monkeypatch.setitem(task.metadata.dataset, "path", str(data))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # which knows a folder by its name
    model = open_model(MiebArguments(tiny_repository, device="cpu"))
    (result,) = theirs(model, task, co2_tracker=False, cache=None).task_results
    hits = result.scores["test"][0]
    found = ours(tiny_folder, data, tmp_path / "ours.json", recall_at=[1, 2, 3])
    recalls = {k: found["image_to_text", f"recall@{k}"].value for k in (1, 2, 3)}
    assert all(hits[f"hit_rate_at_{k}"] >= recalls[k] for k in (1, 3))
    assert hits["hit_rate_at_1"] + hits["hit_rate_at_3"] > recalls[1] + recalls[3]


@pytest.mark.slow
def test_mock_tasks_pass(tiny_repository):
    """mteb's own check of a model: texts and images through every kind of task."""
    import mteb
    from mteb import TaskResult

    model = open_model(MiebArguments(tiny_repository, device="cpu"))
    outcome = mteb.mock_run(model)
    ran = {name: result for name, result in outcome.items() if result is not None}
    failed = {name: result.exception for name, result in ran.items() if not isinstance(result, TaskResult)}
    assert len(ran) - len(failed) > 30 and {"MockVisualSTS", "MockSTSTask", "MockImageClassification"} <= ran.keys()
    # A text and a picture in one query: CLIP has no embedding of the two together.
    assert set(failed) == {"MockVisionCentricQA", "MockMultilingualVisionCentricQA"}, failed
    assert all("cannot combine them in a single input" in said for said in failed.values())


@pytest.mark.slow
def test_what_is_known_of_a_model_is_that_of_its_folder(tiny_repository, tmp_path):
    bare = model_meta(tiny_repository, None, "weights-0")
    known = {"embed_dim": 24, "max_tokens": 77, "n_embedding_parameters": 300 * 40, "modalities": ["image", "text"]}
    assert {key: getattr(bare, key) for key in known} == known
    weights = (tiny_repository / "model.safetensors").stat().st_size
    assert bare.n_parameters * 4 == pytest.approx(weights, rel=0.1) and bare.memory_usage_mb == weights / 2**20
    unknown = ("license", "languages", "adapted_from", "training_datasets", "public_training_data", "release_date")
    assert [getattr(bare, key) for key in unknown] == [None] * len(unknown)
    (tmp_path / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    for path in tiny_repository.iterdir():
        if path.is_file() and path.name != "README.md":
            (tmp_path / path.name).symlink_to(path)
    told = model_meta(tmp_path, "us/model", "0123abc")
    assert (told.license, told.languages, told.adapted_from) == ("cc-by-sa-4.0", ["por-Latn", "eng-Latn"], "us/base")
    assert (told.name, told.revision) == ("us/model", "0123abc")
    for old, new in (("cc-by-sa-4.0", "mine"), ("[pt, en]", "[pt, tlh]"), ("us/base", "[us/a, us/b]")):
        (tmp_path / "README.md").write_text(MODEL_CARD.replace(old, new), encoding="utf-8")
        told = model_meta(tmp_path, None, "x")
        assert None in (told.license, told.languages, told.adapted_from), new
    json.dumps(told.to_dict())


@pytest.mark.slow
def test_the_cache_must_hold_the_revision_of_the_task(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (task,) = find_tasks([T2I], ["por"])
    path, revision = task.metadata.dataset["path"], task.metadata.dataset["revision"]
    with pytest.raises(ValueError, match=f"its data, {path}, are not in the cache"):
        check_data(task)
    kept = tmp_path / path.replace("/", "___") / "default" / "0.0.0"
    (kept / revision).mkdir(parents=True)
    (kept / f"{revision}.incomplete").mkdir()
    check_data(task)
    (kept / "0123abc").mkdir()
    with pytest.raises(ValueError, match=f"the cache has {path} at 0123abc, .*the task is about {revision} alone"):
        check_data(task)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    check_data(task)


WRONG = [
    ({"--tasks": "XM3600T2IRetrieva"}, "mteb has no task 'XM3600T2IRetrieva'"),
    ({"--languages": "xho"}, "XM3600T2IRetrieval.* xho"),
    ({"--repo_id": "model"}, "repo_id must be OWNER/NAME, got 'model'"),
    ({"--revision": "../x"}, "revision must be a commit"),
    ({"--model": "missing"}, "missing"),
    ({"--batch_size": "0"}, "batch_size must be at least 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_wrong_input_is_one_line(tiny_repository, tmp_path, changed, message):
    given = {"--model": tiny_repository, "--tasks": T2I, "--output": tmp_path / "out", **changed}
    with pytest.raises(SystemExit, match=message) as ended:
        main([str(word) for pair in given.items() for word in pair])
    assert "\n" not in str(ended.value) and not (tmp_path / "out").exists()


def test_a_folder_without_modules_says_how_to_make_one(tiny_folder, tmp_path):
    with pytest.raises(SystemExit, match=r"has no modules.json.*python -m hub_upload.export"):
        main(["--model", str(tiny_folder), "--output", str(tmp_path / "out")])

"""Datasets with embeddings instead of images: written, read by all commands, and refused if they fit another model."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from test_train_accelerate import error_of, flags
from tiny import save_model
from towers import as_open_clip
from tqdm.auto import tqdm

import train_accelerate
from capivara_common.files import acquire_folder_lock
from capivara_common.image_encoder_digest import image_encoder_digest
from caption_data.embedded import (
    DIGEST_COLUMN,
    EMBEDS_COLUMN,
    ENCODER_COLUMN,
    INVALID_EMBEDDING,
    embeds_feature,
    find_invalid_embeds,
    has_unit_length,
)
from caption_data.parquet_split import open_in_place
from caption_data.sources import list_splits, open_split
from captions import embed, embedding_stage, score, select
from captions.generate import GenerateArguments
from captions.stages import RowStage
from eval import retrieval
from eval.linear_probe import main as probe
from hub_upload import push
from hub_upload.upload_checks import list_and_check_files_to_send
from modeling_capivara.loading import load_model
from modeling_capivara.two_towers import load_embedder

BROKEN_ROW = 3  # of the training split
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache_home(no_pictures, tmp_path, monkeypatch) -> None:
    """Start every test with empty caches."""
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def embed_flags(model, dataset, output, **overrides) -> list[str]:
    values = {"model": model, "dataset": dataset, "output": output, "device": "cpu", "split": "all"}
    values |= {"license": "cc-by-4.0", "batch_rows": 4, "rows_per_part": 8, **overrides}
    return [str(word) for name, value in values.items() if value is not None for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def embedded(saved_tiny_folder, tiny_dataset_folder, tmp_path_factory) -> Path:
    """The tiny dataset without its images. Tests must not change it."""
    folder = tmp_path_factory.mktemp("embedded") / "data"
    embed.main(embed_flags(saved_tiny_folder, tiny_dataset_folder, folder))
    return folder


@pytest.fixture
def copy(embedded, tmp_path) -> Path:
    return shutil.copytree(embedded, tmp_path / "copy")


def change_rows(folder: Path, split: str = "train", **columns) -> Path:
    """Write a split of a dataset again with other columns: a function of the old values, or None to remove a column."""
    (path,) = folder.glob(f"data/{split}-*")
    data = Dataset.from_parquet(str(path))
    features = dict(data.features)
    rows = data.to_list()
    for name, change in columns.items():
        if change is None:
            features.pop(name)
        else:
            for number, row in enumerate(rows):
                row[name] = change(number, row[name])
    pq.write_table(pa.Table.from_pylist(rows, schema=Features(features).arrow_schema), path)
    return folder


# ---- writing ----


def test_a_dataset_of_embeddings_has_all_columns_but_the_image(embedded, saved_tiny_folder, tiny_dataset_folder):
    data = datasets.load_dataset(str(embedded))
    assert {name: len(split) for name, split in data.items()} == {"train": 12, "validation": 6, "test": 8}
    assert data["train"].column_names == ["captions-pt", "captions-en", EMBEDS_COLUMN, DIGEST_COLUMN, ENCODER_COLUMN]
    assert data["train"].features[EMBEDS_COLUMN] == embeds_feature(24) == List(Value("float16"), length=24)
    images = open_split(str(tiny_dataset_folder), "train", "image")
    assert data["train"][DIGEST_COLUMN][:] == images.image_digests
    assert set(data["train"][ENCODER_COLUMN][:]) == {image_encoder_digest(saved_tiny_folder)}
    expected = load_embedder(str(saved_tiny_folder), "cpu").embed_images([images.load_image(row) for row in range(12)])
    assert np.array_equal(np.array(data["train"][EMBEDS_COLUMN][:], np.float16), expected.numpy().astype(np.float16))
    assert data["train"]["captions-pt"][:] == load_from_disk(tiny_dataset_folder)["train"]["captions-pt"][:]
    card = (embedded / "README.md").read_text(encoding="utf-8")
    for text in ("license: cc-by-4.0", image_encoder_digest(saved_tiny_folder), "images are not included", "| 24 |"):
        assert text in card
    assert not (embedded / "skipped.jsonl").exists() and "image" not in pq.read_schema(next(embedded.glob("data/*")))


@pytest.mark.slow
def test_views_are_those_of_training_and_skipped_rows_are_listed(saved_tiny_folder, tiny_dataset_folder, tmp_path):
    from test_images import BROKEN, altered, pairs_of, with_cache

    from modeling_capivara.loading import load_processor

    dataset = altered(tiny_dataset_folder, tmp_path / "data", {BROKEN_ROW: BROKEN})
    out = tmp_path / "views"
    embed.main(embed_flags(saved_tiny_folder, dataset, out, split="train", views=3, seed=5))
    data = datasets.load_dataset(str(out), split="train")
    assert data.features[EMBEDS_COLUMN] == List(List(Value("float16"), length=24), length=3) and len(data) == 11
    (line,) = (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert (json.loads(line)["row"], json.loads(line)["reason"]) == (BROKEN_ROW, "unreadable image")
    assert str(tmp_path) not in line, "a published list has no private paths"
    pairs = pairs_of(dataset, load_processor(saved_tiny_folder), 3, 5)
    cached = with_cache(load_model(saved_tiny_folder).eval(), pairs, tmp_path / "cache").table
    expected = [row for row in cached["vectors"][:] if row]
    views = np.array(data[EMBEDS_COLUMN][:], np.float16).reshape(11, -1)
    np.testing.assert_allclose(views, np.array(expected, np.float16), atol=2e-3)


@pytest.mark.slow
def test_the_license_is_inherited_or_stated_but_never_guessed(saved_tiny_folder, tiny_dataset_folder, tmp_path):
    dataset = shutil.copytree(tiny_dataset_folder, tmp_path / "data")
    flags = embed_flags(saved_tiny_folder, dataset, tmp_path / "out", license=None, split="test")
    with pytest.raises(ValueError, match="--license"):
        embed.main(flags)
    with pytest.raises(ValueError, match=r"none.*--dataset"):
        embed.main(embed_flags(saved_tiny_folder, tmp_path / "none", tmp_path / "out", license=None, split="test"))
    assert not (tmp_path / "out.parts").exists()
    (dataset / "README.md").write_text("---\nlicense: odbl\npretty_name: Praças\n---\n", encoding="utf-8")
    embed.main(flags)
    assert re.search(r"^license: odbl$", (tmp_path / "out" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("model", ["no/such/folder", "clip:tests", "open_clip:foo:bar", "open_clip:local-dir:no"])
def test_a_model_that_does_not_exist_leaves_no_folder(tiny_dataset_folder, tmp_path, model):
    with pytest.raises(ValueError, match=model.partition(":")[2] or model):
        embed.main(embed_flags(model, tiny_dataset_folder, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_dry_run_writes_nothing(saved_tiny_folder, tiny_dataset_folder, tmp_path):
    embed.main([*embed_flags(saved_tiny_folder, tiny_dataset_folder, tmp_path / "out"), "--dry_run"])
    assert not list(tmp_path.glob("out*"))


def test_the_progress_bar_has_the_name_of_the_stage(saved_tiny_folder, tiny_dataset_folder, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("captions.stages.tqdm", lambda **options: titles.append(options["desc"]) or tqdm(**options))
    assert embedding_stage.EmbedArguments(
        str(tiny_dataset_folder), tmp_path / "out", model=str(saved_tiny_folder), device="cpu"
    ).write_rows()
    assert titles == ["Embed"]


@pytest.mark.slow
def test_a_full_disk_loses_nothing(saved_tiny_folder, tiny_dataset_folder, tmp_path, embedded, monkeypatch):
    arguments = embed_flags(saved_tiny_folder, tiny_dataset_folder, tmp_path / "out")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("captions.build.write_json", fail)  # writes the last file
        with pytest.raises(OSError, match="No space left on the disk while writing"):
            embed.main(arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("captions.embedding_stage.embed_images_of_rows", lambda *_: pytest.fail("embedded again"))
    embed.main(arguments)
    assert read_data(tmp_path / "out") == read_data(embedded)


def read_data(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()}


KILLED_PROGRAM = """
import os, signal, sys
from captions import embed, embedding_stage
calls, embed_images_of_rows = [], embedding_stage.embed_images_of_rows
def count(*args):
    calls.append(1)
    if len(calls) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed_images_of_rows(*args)
embedding_stage.embed_images_of_rows = count
embed.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_and_simultaneous_runs_lose_nothing(saved_tiny_folder, tiny_dataset_folder, tmp_path, embedded):
    arguments = embed_flags(saved_tiny_folder, tiny_dataset_folder, tmp_path / "out")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = [sys.executable, "-c", KILLED_PROGRAM, *arguments]
    assert subprocess.run(killed, env=environment, cwd=tmp_path, check=False).returncode < 0
    assert len(list(tmp_path.glob("out.parts/**/*.parquet"))) == 1 and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"unfinished: 4 rows.*--output [^ ]*out "):
        open_split(str(tmp_path / "out.parts" / "1-embed" / "train"), "train", "image")
    other_process = acquire_folder_lock(tmp_path / "out.parts")
    with pytest.raises(ValueError, match="Another process is writing"):
        embed.main(arguments)
    os.close(other_process)
    embed.main(arguments)
    assert read_data(tmp_path / "out") == read_data(embedded)


@pytest.mark.slow
def test_a_build_without_images_can_be_pushed(saved_tiny_folder, tiny_dataset_folder, tmp_path, capsys):
    from captions import build

    config = {"dataset": str(tiny_dataset_folder), "output": str(tmp_path / "built"), "language": "pt"}
    config |= {"evaluation_splits": ["test"], "score": {"model": str(saved_tiny_folder), "device": "cpu"}}
    config["card"] = {"license": "cc-by-4.0", "sources": [{"name": "Squares", "license": "CC BY 4.0"}]}
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    build.main(["--config", str(tmp_path / "config.yaml"), "--without_images"])
    folder = tmp_path / "built" / "dataset"
    assert f"python -m hub_upload.push --model {folder}" in capsys.readouterr().out
    data = datasets.load_dataset(str(folder))
    assert data["train"].column_names[-3:] == [EMBEDS_COLUMN, DIGEST_COLUMN, ENCODER_COLUMN]
    assert "image" not in data["test"].column_names and len(data["test"]) == 8
    assert "similarities-pt" in data["train"].column_names
    push.main(["--model", str(folder), "--repo_id", "me/squares", "--repo_type", "dataset"])
    preview = capsys.readouterr().out
    assert "data/train-00000-of-00001.parquet" in preview and "note: license: cc-by-4.0" in preview
    (tmp_path / "built" / "dataset" / "notes.py").write_text("x = 1", encoding="utf-8")
    assert "notes.py" not in str(list_and_check_files_to_send(folder, "dataset"))
    secret = "hf_" + "aB3dE6gH9j" * 4
    change_rows(folder, **{"captions-pt": lambda number, texts: [*texts, secret] if number == 7 else texts})
    with pytest.raises(ValueError, match="'captions-pt', row 7"):
        list_and_check_files_to_send(folder, "dataset")
    config |= {"score": None, "embed": {"model": str(saved_tiny_folder), "views": 2}}
    config.pop("score")
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"embed\.views"):
        build.main(["--config", str(tmp_path / "config.yaml")])


# ---- reading ----


def train(*args, **overrides) -> tuple[dict[str, torch.Tensor], dict]:
    folder = train_accelerate.main(
        flags(*args, **{"max_steps": 2, "warmup_steps": 1, "mixed_precision": "no"} | overrides)
    )
    return load_model(folder).state_dict(), json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_training_from_embeddings_equals_training_from_images(
    saved_tiny_folder, tiny_dataset_folder, embedded, tmp_path
):
    expected, run = train(saved_tiny_folder, tiny_dataset_folder, tmp_path / "images")
    weights, other = train(saved_tiny_folder, embedded, tmp_path / "embeds", image_embedding_cache="off")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert any(not torch.equal(expected[name], w) for name, w in load_model(saved_tiny_folder).state_dict().items())
    assert [point["loss"] for point in run["curve"][1:]] == [point["loss"] for point in other["curve"][1:]]
    assert list(run["dataset_fingerprints"].values()) == list(other["dataset_fingerprints"].values())
    (result,) = (tmp_path / "embeds" / "results").glob("*_pt.json")
    encoder = image_encoder_digest(saved_tiny_folder)
    assert json.loads(result.read_text("utf-8"))["image_embeds"] == {"dtype": "float16", "encoder": encoder}


@pytest.mark.slow
def test_training_uses_the_views_in_the_dataset(saved_tiny_folder, tiny_dataset_folder, embedded, tmp_path):
    options = {"evaluation_dataset": tiny_dataset_folder, "augmented_views": 3}
    expected, _ = train(saved_tiny_folder, tiny_dataset_folder, tmp_path / "images", **options)
    views = tmp_path / "views"
    embed.main(embed_flags(saved_tiny_folder, tiny_dataset_folder, views, split="train", views=4, batch_rows=64))
    weights, _ = train(saved_tiny_folder, views, tmp_path / "embeds", **options)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_evaluation_gives_the_same_figures(saved_tiny_folder, tiny_dataset_folder, embedded, tmp_path):
    results = []
    for number, dataset in enumerate((tiny_dataset_folder, embedded)):
        arguments = retrieval.RetrievalArguments(str(saved_tiny_folder), str(dataset), tmp_path / f"{number}.json")
        arguments.cache_dir = "off"
        retrieval.evaluate_retrieval_and_write_result(arguments)
        results.append(json.loads((tmp_path / f"{number}.json").read_text(encoding="utf-8")))
    for first, second in zip(*(result["records"] for result in results), strict=True):
        assert first["value"] == pytest.approx(second["value"], abs=1e-3)
    assert results[0]["dataset_fingerprint"] == results[1]["dataset_fingerprint"]
    assert "image_embeds" not in results[0] and results[1]["image_embeds"]["dtype"] == "float16"


@pytest.mark.slow
def test_linear_probes_take_embeddings(saved_tiny_folder, tiny_dataset_folder, tmp_path):
    values = []
    folder = load_from_disk(tiny_dataset_folder)
    for name in ("train", "test"):
        folder[name] = folder[name].add_column("label", [number % 4 for number in range(len(folder[name]))])
    folder.save_to_disk(tmp_path / "labels")
    embed.main(embed_flags(saved_tiny_folder, tmp_path / "labels", tmp_path / "embeds"))
    for name in ("labels", "embeds"):
        words = ["--model", str(saved_tiny_folder), "--benchmark", "cifar-10", "--images", str(tmp_path / name)]
        probe([*words, "--output", str(tmp_path / f"{name}.json"), "--shots", "2", "--cache_dir", "off"])
        values.append(json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["records"][0]["value"])
    assert values[0] == pytest.approx(values[1], abs=0.13)  # one of eight images


@pytest.mark.slow
def test_scores_and_the_selection_need_no_images(saved_tiny_folder, tiny_dataset_folder, embedded, tmp_path):
    similarities = []
    for number, dataset in enumerate((tiny_dataset_folder, embedded)):
        arguments = score.ScoreArguments(
            str(dataset), tmp_path / f"{number}", model=str(saved_tiny_folder), device="cpu"
        )
        assert arguments.write_rows().rows == 12
        rows = open_in_place(str(tmp_path / f"{number}"), "train", "image").rows()
        similarities.append([row["similarities-pt"] for row in rows])
    for first, second in zip(*similarities, strict=True):
        assert first == pytest.approx(second, abs=2e-3)
    words = ["--dataset", str(tmp_path / "1"), "--output", str(tmp_path / "selected"), "--min_pair_similarity", "0"]
    select.main([*words, "--caption_strategy", "rank"])
    page = (tmp_path / "selected" / "report" / "index.html").read_text(encoding="utf-8")
    assert "embeddings instead of images" in page and not list((tmp_path / "selected" / "report").glob("row-*"))
    assert open_split(str(tmp_path / "selected"), "train", "image").is_embedded


def test_a_split_of_embeddings_survives_the_operations_of_datasets(embedded, saved_tiny_folder, tmp_path):
    data = datasets.load_dataset(str(embedded))
    data["train"] = concatenate_datasets([data["train"], data["test"]]).filter(lambda row: len(row["captions-pt"]) > 1)
    data.save_to_disk(tmp_path / "saved")
    split = open_split(str(tmp_path / "saved"), "train", "image")
    assert list_splits(str(tmp_path / "saved")) == ["train", "validation", "test"]
    assert len(split) == 10 and not split.invalid_embeds
    split.check_embeds(str(saved_tiny_folder), 24)
    for encoders in ({"other"}, {"other", image_encoder_digest(saved_tiny_folder)}):
        split.__dict__["image_encoders"] = encoders
        with pytest.raises(ValueError, match=r"\bother\b.*captions\.embed"):
            split.check_embeds(str(saved_tiny_folder), 24)


# ---- bad input ----


@pytest.mark.slow
def test_embeddings_of_another_encoder_are_refused(copy, saved_tiny_folder, tiny_processor, tmp_path):
    other = save_model(tmp_path / "other", tiny_processor, seed=3)
    digests = image_encoder_digest(saved_tiny_folder), image_encoder_digest(other)
    messages = [error_of(flags(other, copy, tmp_path / "run"))]
    for call in (
        lambda: retrieval.evaluate_retrieval_and_write_result(
            retrieval.RetrievalArguments(str(other), str(copy), tmp_path / "r.json")
        ),
        score.ScoreArguments(str(copy), tmp_path / "out", model=str(other), device="cpu").write_rows,
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    for message in messages:
        assert all(digest in message for digest in digests) and "captions.embed --model" in message
        assert "\n" not in message
    mixed = change_rows(copy, image_encoder=lambda number, digest: digests[1] if number == 5 else digest)
    message = error_of(flags(saved_tiny_folder, mixed, tmp_path / "run"))
    assert all(digest in message for digest in digests) and "\n" not in message


@pytest.mark.slow
def test_invalid_embeddings_are_skipped_and_listed(copy, saved_tiny_folder, tmp_path):
    faults = {2: lambda v: [np.nan] * 24, 4: lambda v: [2 * x for x in v], 6: lambda v: None}
    change_rows(
        copy,
        image_embeds=lambda number, vector: faults.get(number, list)(vector),
        image_digest=lambda number, digest: None if number == 8 else digest,
    )
    split = open_split(str(copy), "train", "image")
    assert list(split.invalid_embeds) == [2, 4, 6]
    _, run = train(saved_tiny_folder, copy, tmp_path / "run", max_bad_share=0.4, effective_batch_size=8)
    assert run["skipped_rows"] == {INVALID_EMBEDDING: 4}
    options = {"effective_batch_size": 8, "mixed_precision": "no"}
    assert re.search(r"4 of 12\b", error_of(flags(saved_tiny_folder, copy, tmp_path / "few", **options)))
    report = score.ScoreArguments(str(copy), tmp_path / "out", model=str(saved_tiny_folder), device="cpu").write_rows()
    assert report.skipped == {INVALID_EMBEDDING: 4}
    arguments = retrieval.RetrievalArguments(str(saved_tiny_folder), str(copy), tmp_path / "r.json", split="train")
    retrieval.evaluate_retrieval_and_write_result(arguments, draw_sheet=False)
    assert list(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["skipped"]) == ["2", "4", "6"]
    change_rows(copy, "validation", image_embeds=lambda number, vector: [0.0] * 24)
    message = error_of(flags(saved_tiny_folder, copy, tmp_path / "bad", max_bad_share=0.4, **options))
    assert "row 0" in message and INVALID_EMBEDDING in message


def test_rows_of_a_chunk_without_any_embedding_are_invalid():
    kind = pa.list_(pa.float16(), 2)
    unit = pa.array([np.array([1, 0], np.float16)], kind)
    chunks = [pa.chunked_array([pa.nulls(2, kind)]), pa.chunked_array([unit])]
    assert list(find_invalid_embeds(chunks, 2)) == [0, 1]


def test_only_finite_vectors_of_unit_length_are_valid():
    vectors = np.zeros((6, 2, 4), np.float16)
    vectors[:, :, 0] = [[1, 1], [1, np.nan], [2, 1], [np.inf, 1], [0, 0], [-1, 1]]
    assert has_unit_length(vectors).tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("column", [DIGEST_COLUMN, ENCODER_COLUMN])
def test_a_missing_column_is_named(copy, column):
    change_rows(copy, **{column: None})
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        open_split(str(copy), "train", "image")


def test_embeddings_of_several_widths_are_refused(copy):
    (path,) = copy.glob("data/train-*")
    rows = pq.read_table(path).drop_columns(EMBEDS_COLUMN)
    for kind in (pa.list_(pa.float16()), pa.list_(pa.float32(), 24)):
        vectors = pa.array([np.ones(24, kind.value_type.to_pandas_dtype())] * len(rows), kind)
        pq.write_table(rows.append_column(EMBEDS_COLUMN, vectors).replace_schema_metadata(), path)
        with pytest.raises(ValueError, match=r"float16 lists of a fixed length"):
            open_split(str(copy), "train", "image")


def test_embeddings_of_a_wrong_width_are_refused(copy, saved_tiny_folder, tmp_path):
    """Their digest says that the encoder of the model made them, so that nothing else finds the fault."""
    for path in copy.glob("data/*.parquet"):
        rows = pq.read_table(path).drop_columns(EMBEDS_COLUMN).replace_schema_metadata()
        vectors = np.eye(len(rows), 16, dtype=np.float16)
        column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), 16)
        pq.write_table(rows.append_column(EMBEDS_COLUMN, column), path)
    messages = [error_of(flags(saved_tiny_folder, copy, tmp_path / "run"))]
    for call in (
        lambda: retrieval.evaluate_retrieval_and_write_result(
            retrieval.RetrievalArguments(str(saved_tiny_folder), str(copy), tmp_path / "r.json")
        ),
        score.ScoreArguments(str(copy), tmp_path / "out", model=str(saved_tiny_folder), device="cpu").write_rows,
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    assert all("16" in message and "24" in message and "\n" not in message for message in messages)


def test_an_open_clip_model_of_another_width_is_refused(copy, saved_tiny_folder, tmp_path):
    as_open_clip(saved_tiny_folder, tmp_path / "open_clip")
    embedder = load_embedder(f"open_clip:local-dir:{tmp_path / 'open_clip'}", "cpu", baseline=True)
    split = open_split(str(change_rows(copy, image_encoder=lambda *_: embedder.fingerprint)), "train", "image")
    split.check_embeds(embedder.name, embedder.width, embedder.fingerprint)
    with pytest.raises(ValueError, match=r"width 24\b.*width 25\b"):
        split.check_embeds(embedder.name, 25, embedder.fingerprint)


def test_views_that_the_dataset_lacks_are_refused(embedded, saved_tiny_folder, tmp_path):
    split = open_split(str(embedded), "train", "image")
    split.check_views(1)
    for views in (0, 2):
        with pytest.raises(ValueError, match=rf"augmented_views must be 1, got {views}"):
            split.check_views(views)
    features = Features(split.features | {EMBEDS_COLUMN: embeds_feature(24, 4)})
    augmented = replace(split, data=Dataset.from_dict({name: [] for name in features}, features=features))
    augmented.check_views(4)
    for views, message in ((0, "2 to 4, got 0"), (5, "2 to 4, got 5"), (1, "--augmented_views 4")):
        with pytest.raises(ValueError, match=message):
            augmented.check_views(views)
    options = {"image_embedding_cache": "off", "augmented_views": 0}
    assert "augmented_views must be 1, got 0" in error_of(
        flags(saved_tiny_folder, embedded, tmp_path / "run", **options)
    )


def test_stages_that_need_images_refuse_embeddings(embedded, saved_tiny_folder, tmp_path):
    for arguments in (
        embedding_stage.EmbedArguments(str(embedded), tmp_path / "out", model=str(saved_tiny_folder)),
        GenerateArguments(str(embedded), tmp_path / "out", model="m"),
    ):
        with pytest.raises(ValueError, match="embeddings instead of images"):
            RowStage(arguments)


def test_a_folder_with_other_files_is_never_replaced(saved_tiny_folder, tiny_dataset_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="not empty") as caught:
        embed.main(embed_flags(saved_tiny_folder, tiny_dataset_folder, tmp_path / "out"))
    assert "--overwrite" not in str(caught.value), "the command has no such flag"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

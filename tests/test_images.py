"""Images in training: the embedding cache is never out of date, and training is the same with and without it."""

import copy
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from caption_tars import encoded
from datasets import Dataset, DatasetDict, Image, load_from_disk
from test_checkpoints import flipped
from test_train_accelerate import ROOT, error_of, flags

import train_accelerate
import training.inputs
from capivara_common.embedding_store import EmbeddingStore, _load_shard, vectors_to_array
from capivara_common.files import DIGEST_HEX_LENGTH
from capivara_common.image_files import BadImage
from caption_data.pairs import build_pair_table, drop_invalid, list_skipped_rows
from caption_data.sources import open_split
from modeling_capivara import CapivaraProcessor
from modeling_capivara.loading import load_model
from modeling_capivara.two_towers import embed_images
from training.batches import StepPlan, batch_indices
from training.inputs import PairDataset, add_vectors, load_cached_embeds, open_image_store
from training.whole_batch import WholeBatch

IMAGES = 12  # of the training split of `tiny_dataset_folder`
# Pillow reads it, but we refuse it.
NEGATIVE = encoded(PIL.Image.fromarray(np.full((40, 36), -1, dtype=np.int32)), "TIFF")
BROKEN = b"\x89PNG\r\n\x1a\n no image data"


@pytest.fixture(autouse=True)
def cache_home(no_pictures, tmp_path, monkeypatch) -> None:
    """Start every test with an empty cache."""
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "home"))


def altered(dataset, folder, images=None, captions=None):
    """Copy a saved dataset with other images (row -> file content) or captions (row -> texts) in the training split."""
    data = load_from_disk(dataset)
    features = data["train"].features
    rows = data["train"].cast_column("image", Image(decode=False)).to_list()
    for row, content in (images or {}).items():
        rows[row]["image"] = {"bytes": content, "path": None}
    for row, texts in (captions or {}).items():
        rows[row]["captions-pt"] = texts
    data["train"] = Dataset.from_list(rows, features=features)
    data.save_to_disk(folder)
    return folder


def image_files(dataset) -> list[bytes]:
    return [row["bytes"] for row in load_from_disk(dataset)["train"].cast_column("image", Image(decode=False))["image"]]


def change_one_pixel(data: bytes) -> bytes:
    image = PIL.Image.open(io.BytesIO(data))
    red, green, blue = image.getpixel((17, 20))
    image.putpixel((17, 20), (red ^ 1, green, blue))
    return encoded(image)


def pairs_of(dataset, processor, augmented_views=1, seed=0) -> PairDataset:
    source = open_split(str(dataset), "train", "image")
    table = build_pair_table(source, ["captions-pt"], lambda row: row["captions-pt"], {"captions": "all"})
    return PairDataset(source, table, processor, augmented_views, seed)


def with_cache(model, pairs, root, precision="no") -> PairDataset:
    AcceleratorState._reset_state()
    return add_vectors(model, pairs, cache_options(root), Accelerator(mixed_precision=precision, cpu=True))


def cache_options(root) -> SimpleNamespace:
    options = {"image_embedding_cache": str(root), "embedding_batch_size": 4, "loading_workers": 0}
    return SimpleNamespace(**options, has_auto_precision=False)


def cache_of(model, pairs, root, precision="no") -> Path:
    with_cache(model, pairs, root, precision)
    return open_image_store(model, pairs, cache_options(root), precision).folder


def read_shards(folder) -> dict[str, bytes]:
    """Return the content of every shard of a cache, keyed by file name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".arrow"}


def train(*args, **overrides) -> tuple[dict[str, torch.Tensor], list[float], Path]:
    """Train, and return the weights, the losses and the folder of the run."""
    out = train_accelerate.main(flags(*args, **overrides))
    curve = json.loads((out / "run.json").read_text(encoding="utf-8"))["curve"]
    return load_model(out).state_dict(), [point["loss"] for point in curve if "loss" in point], out


def largest_difference(first, second, before) -> float:
    """Return the largest distance of a tensor between two results, as a share of how far training moved it.

    Biases of keys are left out: softmax cancels them, so Adam makes whole steps from rounding errors.
    """
    shares = [
        float((first[name] - second[name]).norm() / (first[name] - before[name]).norm())
        for name in first
        if not torch.equal(first[name], before[name]) and not name.endswith("key.bias")
    ]
    assert len(shares) > 10, "a run that changes nothing would prove nothing"
    return max(shares)


# ---- cache key ----


def test_everything_that_embeddings_depend_on_changes_the_cache_folder(
    tiny_model, tiny_processor, tiny_dataset_folder, tmp_path
):
    pairs, names = pairs_of(tiny_dataset_folder, tiny_processor), []

    def name(pairs=pairs, precision="no") -> str:
        return open_image_store(tiny_model, pairs, cache_options(tmp_path), precision).folder.name

    first = name()
    for part in ("text_model.embeddings.word_embeddings.weight", "text_projection.0.weight", "logit_scale"):
        tiny_model.state_dict()[part].add_(1)
    assert name() == first
    image_processor = copy.deepcopy(tiny_processor.image_processor)
    image_processor.image_mean = (0.48, 0.46, 0.41)
    names += [first, name(precision="bf16"), name(replace(pairs, augmented_views=2))]
    names += [name(replace(pairs, augmented_views=2, seed=1))]
    assert name(replace(pairs, seed=1)) == first, "the seed does not change the image itself"
    names.append(name(replace(pairs, processor=CapivaraProcessor(image_processor, tiny_processor.tokenizer))))
    for part in ("vision_model.encoder.layers.1.mlp.fc1.weight", "visual_projection.weight"):
        weights = tiny_model.state_dict()[part].view(-1)
        weights[5] = torch.nextafter(weights[5], torch.tensor(9.0))  # changes the last bit of one weight
        names.append(name())
    assert len(set(names)) == len(names) == 7


def test_augmentations_of_two_seeds_stay_apart_in_one_store(tiny_model, tiny_processor, tiny_dataset_folder, tmp_path):
    """A key without the seed would silently train on the views of another seed."""
    first, other = (pairs_of(tiny_dataset_folder, tiny_processor, 2, seed) for seed in (0, 1))
    embedded = [with_cache(tiny_model, pairs, tmp_path) for pairs in (first, other, first)]
    vectors = [vectors_to_array(pairs.table.data.column("vectors")) for pairs in embedded]
    assert vectors[0].shape == (IMAGES, 2 * 24) and (vectors[0] == vectors[2]).all()
    assert not (vectors[0] == vectors[1]).all(axis=1).any()
    for pairs, stored in zip((first, other), vectors, strict=False):
        pixels = torch.stack([pairs.load_pixels(row, 1) for row in range(4)])
        expected = tiny_model(pixel_values=pixels).image_embeds.detach()
        torch.testing.assert_close(torch.tensor(stored[:4, 24:]).float(), expected, rtol=2**-11, atol=2e-6)


def test_a_changed_image_is_embedded_again(tiny_model, tiny_processor, tiny_dataset_folder, tmp_path, monkeypatch):
    """Its shard is computed again, and only its shard. Other captions change nothing."""
    monkeypatch.setattr(training.inputs, "SHARD_ROWS", 6)
    folder = cache_of(tiny_model, pairs_of(tiny_dataset_folder, tiny_processor), tmp_path)
    before = read_shards(folder)
    caption = altered(tiny_dataset_folder, tmp_path / "caption", captions={3: ["outra foto"]})
    cache_of(tiny_model, pairs_of(caption, tiny_processor), tmp_path)
    assert len(before) == 2 and read_shards(folder) == before
    pixel = {7: change_one_pixel(image_files(tiny_dataset_folder)[7])}
    cache_of(tiny_model, pairs_of(altered(tiny_dataset_folder, tmp_path / "pixel", pixel), tiny_processor), tmp_path)
    assert len(read_shards(folder)) == 3


# ---- computing the cache ----


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flipped(path, path.stat().st_size - DIGEST_HEX_LENGTH - 1),  # in the list of bad images
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.rename(path.with_name("shard-00001.arrow")),  # the name in an earlier version
    ],
)
def test_a_damaged_shard_is_computed_again_with_a_warning(
    tiny_model, tiny_processor, tiny_dataset_folder, tmp_path, monkeypatch, caplog, damage
):
    monkeypatch.setattr(training.inputs, "SHARD_ROWS", 6)
    pairs = pairs_of(tiny_dataset_folder, tiny_processor)
    folder = cache_of(tiny_model, pairs, tmp_path)
    expected, path = read_shards(folder), min(folder.glob("*.arrow"))
    damage(path)
    cache_of(tiny_model, pairs, tmp_path)
    assert {name: data for name, data in read_shards(folder).items() if name in expected} == expected
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]  # other tests show more levels
    assert len([record for record in warnings if str(folder) in record.getMessage()]) == 1
    shutil.copy(path, tmp_path / "other.arrow")
    with pytest.raises(ValueError, match=r"other\.arrow\b.*\b5\b.*\b6\b"):
        _load_shard(tmp_path / "other.arrow", 5)


# ---- bad images ----


@pytest.mark.slow
def test_bad_images_are_listed_and_skipped(tiny_folder, tiny_dataset_folder, tmp_path):
    dataset = altered(tiny_dataset_folder, tmp_path / "data", {0: BROKEN, 7: NEGATIVE})
    weights, losses, out = train(tiny_folder, dataset, tmp_path / "out", max_bad_share=0.2, max_steps=2)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == [0, 7] and {line["source"] for line in lines} == {str(dataset)}
    assert lines[0]["reason"] == "unreadable image" and all(line["reason"] and line["detail"] for line in lines)
    assert all(np.isfinite(losses)) and all(w.isfinite().all() for w in weights.values())
    assert sum(json.loads((out / "run.json").read_text())["skipped_rows"].values()) == 2
    message = error_of(flags(tiny_folder, dataset, tmp_path / "over", max_bad_share=0.1, max_steps=2))
    assert re.search(r"\b2 of 12\b(?s:.*)row 0: unreadable image", message)
    assert not list(tmp_path.glob("over*"))


def test_embeddings_stay_with_their_images_when_rows_are_skipped(
    tiny_model, tiny_processor, tiny_dataset_folder, tmp_path
):
    dataset = altered(tiny_dataset_folder, tmp_path / "data", {3: NEGATIVE}, {5: []})
    pairs = pairs_of(dataset, tiny_processor)
    embedded = with_cache(tiny_model, pairs, tmp_path / "caches")
    skipped = list_skipped_rows(embedded.table, embedded.source)
    assert [(row.row, row.reason) for row in skipped] == [(3, "unreadable image"), (5, "no caption")]
    usable = replace(embedded, table=drop_invalid(embedded.table))
    expected = embed_images(tiny_model, tiny_processor, usable)
    assert len(expected) == IMAGES - 2 and usable.table["row"][:] == [0, 1, 2, 4, *range(6, IMAGES)]
    rows = np.random.default_rng(0).permutation(IMAGES - 2)
    plan = StepPlan(0, np.zeros_like(rows), rows, np.zeros_like(rows), [], [])
    torch.testing.assert_close(load_cached_embeds([usable], plan), expected[rows], rtol=2**-11, atol=2e-6)


def test_augmentation_refuses_bad_images_and_scales_16_bits(tiny_processor, tiny_dataset_folder, tmp_path):
    deep = encoded(PIL.Image.fromarray((np.linspace(0, 65535, 40 * 36).reshape(40, 36)).astype(np.uint16)))
    pairs = pairs_of(altered(tiny_dataset_folder, tmp_path / "data", {0: NEGATIVE, 1: deep}), tiny_processor, 2)
    with pytest.raises(BadImage):
        pairs.load_pixels(0, 0)
    assert pairs.load_pixels(1, 0).std() > 0.3, "the 16-bit image must not be clipped to white"


# ---- training with and without the cache ----


@pytest.mark.slow
def test_training_is_the_same_with_and_without_cache(tiny_folder, tiny_dataset_folder, tmp_path):
    # So that pair numbers differ from row numbers.
    dataset = altered(tiny_dataset_folder, tmp_path / "data", {0: BROKEN})
    options = {"augmented_views": 2, "max_bad_share": 0.2, "mixed_precision": "no", "max_steps": 4}
    cached, losses, _ = train(tiny_folder, dataset, tmp_path / "cached", **options)
    plain, plain_losses, _ = train(tiny_folder, dataset, tmp_path / "plain", image_embedding_cache="off", **options)
    assert losses == pytest.approx(plain_losses, abs=1e-3)
    before = load_model(tiny_folder).state_dict()
    assert largest_difference(cached, plain, before) < 0.05
    other, other_losses, _ = train(tiny_folder, dataset, tmp_path / "other", **options | {"augmented_views": 1})
    assert largest_difference(cached, other, before) > 0.1, "the bound above must be able to tell views apart"
    assert max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)) > 1e-2


@pytest.mark.slow
def test_fresh_augmentations_do_not_depend_on_the_number_of_workers(tiny_folder, tiny_dataset_folder, tmp_path):
    dataset = altered(tiny_dataset_folder, tmp_path / "data", dict.fromkeys((2, 3, 4), NEGATIVE))
    options = {"image_embedding_cache": "off", "max_steps": 2, "warmup_steps": 1, "effective_batch_size": 6}
    options |= {"max_bad_share": 0.3}
    plain, _, _ = train(tiny_folder, dataset, tmp_path / "plain", **options)
    fresh = [
        train(tiny_folder, dataset, tmp_path / str(n), augmented_views=0, loading_workers=n, **options)[0]
        for n in (0, 1)
    ]
    before = load_model(tiny_folder).state_dict()
    assert largest_difference(fresh[0], plain, before) > 0.05
    assert all(torch.equal(fresh[0][name], fresh[1][name]) for name in plain)


@pytest.mark.slow
def test_other_pairs_replace_bad_images(tiny_folder, tiny_dataset_folder, tmp_path, monkeypatch, caplog):
    """Without a cache: every batch is complete, each bad row is listed once, and two processes give the same result."""
    batches, call = [], WholeBatch.__call__

    def recorded_call(self, step, local_batches, pairs, image_embeds):
        batches.append((sum(len(batch.input_ids) for batch in local_batches), len(image_embeds.unique(dim=0))))
        assert torch.allclose(image_embeds.norm(dim=1), torch.ones(pairs))
        return call(self, step, local_batches, pairs, image_embeds)

    monkeypatch.setattr(WholeBatch, "__call__", recorded_call)
    bad = [1, 2, 5, 8]
    dataset = altered(tiny_dataset_folder, tmp_path / "data", dict.fromkeys(bad, NEGATIVE))
    options = {"image_embedding_cache": "off", "max_bad_share": 0.4, "effective_batch_size": 6, "micro_batch_size": 2}
    weights, losses, out = train(tiny_folder, dataset, tmp_path / "one", **options)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["row"] for line in lines) == bad and batches == [(6, 6)] * 6
    assert json.loads((out / "run.json").read_text())["skipped_rows"] == {"unreadable image": 4}
    assert len([line for line in caplog.messages if "unreadable image" in line]) == 4
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train_accelerate.py", *flags(tiny_folder, dataset, tmp_path / "two", **options)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    assert (tmp_path / "two" / "skipped.jsonl").read_bytes() == (out / "skipped.jsonl").read_bytes()
    curve = json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))["curve"]
    assert [point["loss"] for point in curve if "loss" in point] == pytest.approx(losses, rel=1e-4)
    before = load_model(tiny_folder).state_dict()
    assert largest_difference(weights, load_model(tmp_path / "two").state_dict(), before) < 0.02


@pytest.mark.slow
def test_a_run_with_too_many_bad_images_resumes_with_a_larger_share(tiny_folder, tiny_dataset_folder, tmp_path):
    bad = [batch_indices(step, 6, IMAGES, 42)[-1] for step in (0, 1)]  # one image of each of the first two steps
    dataset = altered(tiny_dataset_folder, tmp_path / "data", dict.fromkeys(map(int, bad), NEGATIVE))
    options = {"image_embedding_cache": "off", "effective_batch_size": 6, "micro_batch_size": 2, "seed": 42}
    with pytest.raises(ValueError, match=r"2 of 12\b(?s:.*)Step 1\b.*--max_bad_share"):
        train(tiny_folder, dataset, tmp_path / "out", max_bad_share=0.1, **options)
    resumed, losses, _ = train(tiny_folder, dataset, tmp_path / "out", max_bad_share=0.2, resume="auto", **options)
    uninterrupted, expected, _ = train(tiny_folder, dataset, tmp_path / "whole", max_bad_share=0.2, **options)
    assert losses == expected and all(torch.equal(resumed[name], weight) for name, weight in uninterrupted.items())


@pytest.mark.slow
def test_a_run_ends_with_an_error_if_bad_images_are_too_many_or_evaluated(tiny_folder, tiny_dataset_folder, tmp_path):
    """More bad images than allowed, no pair left to replace them, and a bad image in an evaluation split."""

    def error_for(dataset, **options) -> str:
        message = error_of(flags(tiny_folder, dataset, tmp_path / "out", image_embedding_cache="off", **options))
        assert not list(tmp_path.glob("out*"))
        return message

    dataset = altered(tiny_dataset_folder, tmp_path / "data", dict.fromkeys(range(5), NEGATIVE))
    message = error_for(dataset)
    assert "of 12 rows" in message and "unreadable image (" in message and "--max_bad_share" in message
    assert re.search(r"Step 1\b.*\b10 of 12\b.*effective_batch_size", error_for(dataset, max_bad_share=1))
    data = load_from_disk(dataset)
    DatasetDict(train=data["test"], validation=data["validation"], test=data["train"]).save_to_disk(
        tmp_path / "swapped"
    )
    assert re.search(r"'test'.*row 0\b.*unreadable image \(", error_for(tmp_path / "swapped", effective_batch_size=4))


def test_processes_share_the_shards_and_wait_for_each_other(tmp_path, monkeypatch):
    """Each shard is computed by one process. Batches never span two shards."""
    store, items, computed, waits = EmbeddingStore(tmp_path, {}, 2), [f"{n}" for n in range(12)], [], []
    for rank in (1, 0):
        state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=True)
        state.wait_for_everyone = lambda: waits.append(1)
        monkeypatch.setattr("capivara_common.embedding_store.process_state", lambda state=state: state)
        monkeypatch.setattr(store, "_find_missing", lambda paths: list(range(4)))

        def load(batches):
            for batch in batches:
                computed.append([row for row, _ in batch])
                yield computed[-1]

        def embed(rows):
            return np.array([[row, 1.0] for row in rows])

        if rank:  # the shards of the other process do not exist yet
            with pytest.raises(FileNotFoundError):
                store.load_or_embed(items, load, embed, "", rows_per_shard=3)
    table = store.load_or_embed(items, load, embed, "", rows_per_shard=3)
    assert computed[:4] == [[6, 7], [8], [9, 10], [11]] and computed[4:8] == [[0, 1], [2], [3, 4], [5]]
    assert vectors_to_array(table["vectors"]).tolist() == [[row, 1.0] for row in range(12)] and len(waits) == 3


def test_an_augmentation_depends_only_on_image_seed_and_view(tiny_processor, tiny_dataset_folder):
    first, other = (pairs_of(tiny_dataset_folder, tiny_processor, 0, seed) for seed in (0, 1))
    pixels = []
    for number, (pairs, *view) in enumerate([(first, 3, 5)] * 2 + [(first, 3, 6), (first, 4, 5), (other, 3, 5)]):
        torch.manual_seed(number), np.random.seed(number), random.seed(number)  # must not matter
        pixels.append(pairs.load_pixels(*view))
    assert [torch.equal(pixels[0], other_pixels) for other_pixels in pixels] == [True, True, False, False, False]


@pytest.mark.slow
def test_embeddings_of_two_datasets_are_in_the_order_of_the_plan(
    tiny_model, tiny_processor, tiny_dataset_folder, tmp_path, caplog
):
    caplog.set_level("INFO", "capivara")
    DatasetDict(train=load_from_disk(tiny_dataset_folder)["validation"]).save_to_disk(tmp_path / "small")
    both = [pairs_of(folder, tiny_processor, 2) for folder in (tiny_dataset_folder, tmp_path / "small")]
    both = [with_cache(tiny_model, pairs, tmp_path / "caches") for pairs in both]
    assert "12 images x 2 views, 0.0 MB" in caplog.text, "the size is logged before the work"
    sources, rows, views = np.array([[1, 0, 1, 0, 0], [5, 11, 0, 4, 0], [0, 1, 1, 0, 1]])
    embeds = load_cached_embeds(both, StepPlan(0, sources, rows, views, [], []))
    pixels = [both[source].load_pixels(row, view) for source, row, view in zip(sources, rows, views, strict=True)]
    expected = tiny_model(pixel_values=torch.stack(pixels)).image_embeds.detach()
    torch.testing.assert_close(embeds, expected, rtol=2**-11, atol=2e-6)

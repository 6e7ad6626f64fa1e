"""The image side of training: a cache that is never stale, and training that is the same with it and without."""

import copy
import io
import json
import os
import random
import re
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
from capivara_common.files import DIGEST_HEX_LENGTH
from capivara_common.image_files import BadImage
from capivara_common.tasks import split_rows
from caption_data.pairs import build_pair_table, drop_invalid, list_skipped_rows
from caption_data.sources import open_split
from eval.embeddings import EmbeddingCache
from modeling_capivara import CapivaraProcessor
from modeling_capivara.loading import load_model
from modeling_capivara.two_towers import embed_images
from training.batches import StepPlan, batch_indices
from training.inputs import PairDataset, add_vectors, load_cached_embeds, open_image_cache
from training.whole_batch import WholeBatch

IMAGES = 12  # of the training split of `tiny_dataset_folder`
NEGATIVE = encoded(PIL.Image.fromarray(np.full((40, 36), -1, dtype=np.int32)), "TIFF")  # PIL reads it, we don't
BROKEN = b"\x89PNG\r\n\x1a\n no picture"


@pytest.fixture(autouse=True)
def cache_home(no_pictures, tmp_path, monkeypatch) -> None:
    """Every test starts with no cache."""
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "home"))


def altered(dataset, folder, images=None, captions=None):
    """A copy of a saved data set; row -> file of its image, or its captions, in the training split."""
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


def with_one_pixel_changed(data: bytes) -> bytes:
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
    return add_vectors(model, pairs, root, 4, 0, Accelerator(mixed_precision=precision, cpu=True))


def cache_of(model, pairs, root, precision="no") -> Path:
    with_cache(model, pairs, root, precision)
    return open_image_cache(model, pairs, root, precision).folder


def shards(folder) -> dict[str, bytes]:
    """Name -> bytes of all that a cache holds, but what a kill or an earlier version left."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".arrow"}


def train(*args, **overrides) -> tuple[dict[str, torch.Tensor], list[float], Path]:
    """Weights, losses and folder of a run."""
    out = train_accelerate.main(flags(*args, **overrides))
    curve = json.loads((out / "run.json").read_text(encoding="utf-8"))["curve"]
    return load_model(out).state_dict(), [point["loss"] for point in curve if "loss" in point], out


def largest_difference(one, other, before) -> float:
    """Over all tensors that moved: how far two results are apart, as a share of how far training moved them.

    But the biases of keys: softmax takes them out, and Adam makes whole steps of what rounding leaves of a gradient.
    """
    shares = [
        float((one[name] - other[name]).norm() / (one[name] - before[name]).norm())
        for name in one
        if not torch.equal(one[name], before[name]) and not name.endswith("key.bias")
    ]
    assert len(shares) > 10, "a run that moves nothing would prove nothing"
    return max(shares)


# --- what a cache is of ---


def test_what_another_cache_is_made_for(tiny_model, tiny_processor, tiny_dataset_folder, tmp_path):
    pairs, names = pairs_of(tiny_dataset_folder, tiny_processor), []

    def name(pairs=pairs, precision="no") -> str:
        return open_image_cache(tiny_model, pairs, tmp_path / "caches", precision).folder.name

    first = name()
    for part in ("text_model.embeddings.word_embeddings.weight", "text_projection.0.weight", "logit_scale"):
        tiny_model.state_dict()[part].add_(1)
    other_caption = altered(tiny_dataset_folder, tmp_path / "caption", captions={3: ["outra foto"]})
    assert name() == name(pairs_of(other_caption, tiny_processor)) == first
    image_processor = copy.deepcopy(tiny_processor.image_processor)
    image_processor.image_mean = (0.48, 0.46, 0.41)
    pixel = {7: with_one_pixel_changed(image_files(tiny_dataset_folder)[7])}
    other_pixel = altered(tiny_dataset_folder, tmp_path / "pixel", pixel)
    names += [first, name(precision="bf16"), name(pairs_of(other_pixel, tiny_processor))]
    names += [name(replace(pairs, seed=1)), name(replace(pairs, augmented_views=2))]
    names.append(name(replace(pairs, processor=CapivaraProcessor(image_processor, tiny_processor.tokenizer))))
    for part in ("vision_model.encoder.layers.1.mlp.fc1.weight", "visual_projection.weight"):
        weights = tiny_model.state_dict()[part].view(-1)
        weights[5] = torch.nextafter(weights[5], torch.tensor(9.0))  # the last bit of one number
        names.append(name())
    assert len(set(names)) == len(names) == 8


# --- the pass ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flipped(path, path.stat().st_size - DIGEST_HEX_LENGTH - 1),  # of the list of bad images
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.rename(path.with_suffix(".npy")),  # as an earlier version had them
    ],
)
def test_a_damaged_shard_is_made_anew_and_said(
    tiny_model, tiny_processor, tiny_dataset_folder, tmp_path, monkeypatch, caplog, damage
):
    monkeypatch.setattr(training.inputs, "SHARD_ROWS", 6)
    pairs = pairs_of(tiny_dataset_folder, tiny_processor)
    folder = cache_of(tiny_model, pairs, tmp_path)
    whole = shards(folder)
    damage(folder / "shard-00001.arrow")
    cache_of(tiny_model, pairs, tmp_path)
    assert shards(folder) == whole
    said = ("shard-00001.arrow is damaged; it is made", f"{folder.parent} has embeddings of an earlier version, *.npy")
    assert len([line for line in caplog.messages if any(part in line for part in said)]) == 1
    EmbeddingCache(folder, split_rows(12, 6)).write_shard(1, np.zeros((5, 2), np.float16), {})
    with pytest.raises(ValueError, match=r"shard-00001\.arrow should have 6 rows, it has 5\. Remove it"):
        cache_of(tiny_model, pairs, tmp_path)


# --- bad images ---


@pytest.mark.slow
def test_a_bad_image_is_listed_and_left_out(tiny_folder, tiny_dataset_folder, tmp_path):
    dataset = altered(tiny_dataset_folder, tmp_path / "data", {0: BROKEN, 7: NEGATIVE})
    weights, losses, out = train(tiny_folder, dataset, tmp_path / "out", max_bad_share=0.2, max_steps=2)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == [0, 7] and {line["source"] for line in lines} == {str(dataset)}
    assert lines[0]["reason"] == "unreadable image" and all(line["reason"] and line["detail"] for line in lines)
    assert all(np.isfinite(losses)) and all(w.isfinite().all() for w in weights.values())
    assert sum(json.loads((out / "run.json").read_text())["skipped_rows"].values()) == 2
    message = error_of(flags(tiny_folder, dataset, tmp_path / "over", max_bad_share=0.1, max_steps=2))
    assert re.search(r"2 of 12 rows .* can't be used.*(?s:.*)row 0: unreadable image", message)
    assert not list(tmp_path.glob("over*"))


def test_vectors_stay_with_their_images_where_one_is_left_out(
    tiny_model, tiny_processor, tiny_dataset_folder, tmp_path
):
    dataset = altered(tiny_dataset_folder, tmp_path / "data", {3: NEGATIVE}, {5: []})
    pairs = pairs_of(dataset, tiny_processor)
    whole = with_cache(tiny_model, pairs, tmp_path / "caches")
    bad = list_skipped_rows(whole.table, whole.source)
    assert [(line.row, line.reason) for line in bad] == [(3, "unreadable image"), (5, "no caption")]
    good = replace(whole, table=drop_invalid(whole.table))
    expected = embed_images(tiny_model, tiny_processor, good)
    assert len(expected) == IMAGES - 2 and good.table["row"][:] == [0, 1, 2, 4, *range(6, IMAGES)]
    rows = np.random.default_rng(0).permutation(IMAGES - 2)
    plan = StepPlan(0, np.zeros_like(rows), rows, np.zeros_like(rows), [], [])
    torch.testing.assert_close(load_cached_embeds([good], plan), expected[rows], rtol=2**-11, atol=2e-6)


def test_a_bad_image_does_not_hide_behind_augmentation(tiny_processor, tiny_dataset_folder, tmp_path):
    deep = encoded(PIL.Image.fromarray((np.linspace(0, 65535, 40 * 36).reshape(40, 36)).astype(np.uint16)))
    pairs = pairs_of(altered(tiny_dataset_folder, tmp_path / "data", {0: NEGATIVE, 1: deep}), tiny_processor, 2)
    with pytest.raises(BadImage):
        pairs.load_pixels(0, 0)
    assert pairs.load_pixels(1, 0).std() > 0.3, "16 bits were clipped to white"


# --- training with and without ---


@pytest.mark.slow
def test_training_is_the_same_with_and_without_cache(tiny_folder, tiny_dataset_folder, tmp_path):
    dataset = altered(tiny_dataset_folder, tmp_path / "data", {0: BROKEN})  # places and rows differ
    options = {"augmented_views": 2, "max_bad_share": 0.2, "mixed_precision": "no", "max_steps": 4}
    cached, losses, _ = train(tiny_folder, dataset, tmp_path / "cached", **options)
    plain, plain_losses, _ = train(tiny_folder, dataset, tmp_path / "plain", image_embedding_cache="off", **options)
    assert losses == pytest.approx(plain_losses, abs=1e-3)
    before = load_model(tiny_folder).state_dict()
    assert largest_difference(cached, plain, before) < 0.05
    other, other_losses, _ = train(tiny_folder, dataset, tmp_path / "other", **options | {"augmented_views": 1})
    assert largest_difference(cached, other, before) > 0.1, "the bound above would not tell one view from another"
    assert max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)) > 1e-2


@pytest.mark.slow
def test_fresh_augmentations_and_workers(tiny_folder, tiny_dataset_folder, tmp_path):
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
def test_spares_take_the_places_of_bad_pictures(tiny_folder, tiny_dataset_folder, tmp_path, monkeypatch, caplog):
    """Without a cache: every batch stays exact, each row is listed once, and two processes do as one."""
    batches, call = [], WholeBatch.__call__

    def noted(self, step, own, pairs, image_embeds):
        batches.append((sum(len(batch.input_ids) for batch in own), len(image_embeds.unique(dim=0))))
        assert torch.allclose(image_embeds.norm(dim=1), torch.ones(pairs))
        return call(self, step, own, pairs, image_embeds)

    monkeypatch.setattr(WholeBatch, "__call__", noted)
    bad = [1, 2, 5, 8]
    dataset = altered(tiny_dataset_folder, tmp_path / "data", dict.fromkeys(bad, NEGATIVE))
    options = {"image_embedding_cache": "off", "max_bad_share": 0.4, "effective_batch_size": 6, "micro_batch_size": 2}
    one, losses, out = train(tiny_folder, dataset, tmp_path / "one", **options)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["row"] for line in lines) == bad and batches == [(6, 6)] * 6
    assert json.loads((out / "run.json").read_text())["skipped_rows"] == {"unreadable image": 4}
    assert len([line for line in caplog.messages if "Other pairs take its place" in line]) == 4
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train_accelerate.py", *flags(tiny_folder, dataset, tmp_path / "two", **options)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    assert (tmp_path / "two" / "skipped.jsonl").read_bytes() == (out / "skipped.jsonl").read_bytes()
    curve = json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))["curve"]
    assert [point["loss"] for point in curve if "loss" in point] == pytest.approx(losses, rel=1e-4)
    before = load_model(tiny_folder).state_dict()
    assert largest_difference(one, load_model(tmp_path / "two").state_dict(), before) < 0.02


def test_a_run_with_too_many_bad_pictures_goes_on_with_a_larger_share(tiny_folder, tiny_dataset_folder, tmp_path):
    bad = [batch_indices(step, 6, IMAGES, 42)[-1] for step in (0, 1)]  # of the first step, and of the second
    dataset = altered(tiny_dataset_folder, tmp_path / "data", dict.fromkeys(map(int, bad), NEGATIVE))
    options = {"image_embedding_cache": "off", "effective_batch_size": 6, "micro_batch_size": 2, "seed": 42}
    with pytest.raises(ValueError, match=r"2 of 12 rows (?s:.*) Step 1 is saved, which a larger share goes on from"):
        train(tiny_folder, dataset, tmp_path / "out", max_bad_share=0.1, **options)
    resumed, losses, _ = train(tiny_folder, dataset, tmp_path / "out", max_bad_share=0.2, resume="auto", **options)
    whole, expected, _ = train(tiny_folder, dataset, tmp_path / "whole", max_bad_share=0.2, **options)
    assert losses == expected and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_what_bad_pictures_end_in_one_line(tiny_folder, tiny_dataset_folder, tmp_path):
    """More of them than may be; no pair that is left; one of a split that is measured on, before training."""

    def said(dataset, **options) -> str:
        message = error_of(flags(tiny_folder, dataset, tmp_path / "out", image_embedding_cache="off", **options))
        assert not list(tmp_path.glob("out*"))
        return message

    dataset = altered(tiny_dataset_folder, tmp_path / "data", dict.fromkeys(range(5), NEGATIVE))
    assert "of 12 rows" in (few := said(dataset)) and "unreadable image (" in few and "--max_bad_share" in few
    assert "no pair is left to take the place of one: effective_batch_size takes" in said(dataset, max_bad_share=1)
    data = load_from_disk(dataset)
    DatasetDict(train=data["test"], validation=data["validation"], test=data["train"]).save_to_disk(tmp_path / "turned")
    told = said(tmp_path / "turned", effective_batch_size=4)
    assert "split 'test': row 0 can't be used, unreadable image (" in told and "must be whole" in told


def test_the_processes_of_a_launch_share_the_pass(tmp_path, monkeypatch):
    """Each shard is made by one of them, whoever comes first; all wait for all."""
    cache, made, waited = EmbeddingCache(tmp_path, split_rows(12, 3)), [], []
    for rank in (1, 0):
        state = SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=lambda: waited.append(1))
        monkeypatch.setattr("eval.embeddings.process_state", lambda state=state: state)
        cache.make_shards(range(4), lambda own: made.append(own) or ((np.ones((3, 2), np.float16), {}) for _ in own))
    assert made == [[2, 3], [0, 1]] and len(waited) == 2 and len(cache.load_table()) == 12


def test_an_augmentation_is_a_function_of_image_seed_and_view(tiny_processor, tiny_dataset_folder):
    first, other = (pairs_of(tiny_dataset_folder, tiny_processor, 0, seed) for seed in (0, 1))
    pixels = []
    for number, (pairs, *view) in enumerate([(first, 3, 5)] * 2 + [(first, 3, 6), (first, 4, 5), (other, 3, 5)]):
        torch.manual_seed(number), np.random.seed(number), random.seed(number)  # which have no say
        pixels.append(pairs.load_pixels(*view))
    assert [torch.equal(pixels[0], one) for one in pixels] == [True, True, False, False, False]


@pytest.mark.slow
def test_vectors_of_two_data_sets_meet_their_pairs(tiny_model, tiny_processor, tiny_dataset_folder, tmp_path, caplog):
    caplog.set_level("INFO", "capivara")
    DatasetDict(train=load_from_disk(tiny_dataset_folder)["validation"]).save_to_disk(tmp_path / "small")
    both = [pairs_of(folder, tiny_processor, 2) for folder in (tiny_dataset_folder, tmp_path / "small")]
    both = [with_cache(tiny_model, pairs, tmp_path / "caches") for pairs in both]
    assert "Image-embedding cache: 12 images x 2 views, 0.0 MB in " in caplog.text, "said before the work"
    sources, rows, views = np.array([[1, 0, 1, 0, 0], [5, 11, 0, 4, 0], [0, 1, 1, 0, 1]])
    found = load_cached_embeds(both, StepPlan(0, sources, rows, views, [], []))
    pixels = [both[source].load_pixels(row, view) for source, row, view in zip(sources, rows, views, strict=True)]
    expected = tiny_model(pixel_values=torch.stack(pixels)).image_embeds.detach()
    torch.testing.assert_close(found, expected, rtol=2**-11, atol=2e-6)

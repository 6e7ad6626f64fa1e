"""How many images per forward pass, and which precision, long passes choose on a CPU; with a fake clock."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_images import cache_options, pairs_of, with_cache

import training.inputs
from capivara_common import embedding_speed
from capivara_common.embedding_speed import LONG_PASS_IMAGES, load_or_measure_fastest_setting, with_tuned_chunk_size
from capivara_search import PictureIndex
from caption_data.sources import open_split
from captions import embedding_stage
from eval.embeddings import CachedEmbedder
from modeling_capivara import two_towers
from modeling_capivara.two_towers import load_embedder, random_images

UNIT = np.eye(2, 4, dtype=np.float32)[[0] * 16]  # (16, 4), unit length


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "embedding_speed"


class FakeModel:
    """Embeds images, and advances the clock of `embedding_speed` by the seconds of the used candidate."""

    def __init__(self, monkeypatch, **seconds: float):
        self.now, self.calls = 0.0, []
        self.seconds = {int(name.removeprefix("chunk_")): value for name, value in seconds.items()}
        monkeypatch.setattr(embedding_speed, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def embed(self, images, chunk_images=8):
        self.calls.append(chunk_images)
        self.now += self.seconds.get(chunk_images, 1.0)
        return UNIT[: len(images)]

    def run(self, record=None, count=LONG_PASS_IMAGES, device="cpu", encoder="encoder") -> int:
        """Embed one batch as a new pass, and return the chunk size with which its result was computed."""
        with_tuned_chunk_size(self.embed, count, device, encoder, record)([0] * 5)
        return self.calls[-1]


def programs(model, **vectors) -> dict:
    def run(name):
        model.now += model.seconds[name]
        return vectors[name]

    return {name: lambda name=name: run(name) for name in vectors}


# ---- chunk sizes ----


@pytest.mark.parametrize("fastest", [4, 8, 16])
def test_the_fastest_chunk_size_is_measured_once_and_kept(monkeypatch, cache, fastest):
    model = FakeModel(monkeypatch, **{f"chunk_{fastest}": 0.5})
    assert model.run() == fastest and model.calls == 3 * [8, 4, 16] + [fastest]
    assert model.run() == fastest and len(model.calls) == 11  # the second pass reads the file
    (file,) = cache.glob("*.json")
    content = json.loads(file.read_text())
    assert content["choice"] == fastest and content["seconds"][str(fastest)] == 0.5
    assert content["encoder"] == "encoder" and {"torch", "transformers"} == set(content["versions"])
    model.run(encoder="another")
    assert len(model.calls) == 21 and len([*cache.glob("*.json")]) == 2


def test_the_default_stays_unless_another_size_is_clearly_faster(monkeypatch):
    assert FakeModel(monkeypatch, chunk_4=0.99, chunk_16=1.2).run() == 8


def test_the_faster_of_two_fast_sizes_is_chosen(monkeypatch):
    assert FakeModel(monkeypatch, chunk_4=0.5, chunk_16=0.8).run() == 4


def test_one_slow_round_does_not_decide(monkeypatch):
    model, embed = FakeModel(monkeypatch, chunk_4=0.5), FakeModel.embed

    def slow_at_first(self, images, chunk_images=8):
        self.now += 9 * (self.calls == [8])  # the first call with 4
        return embed(self, images, chunk_images)

    monkeypatch.setattr(FakeModel, "embed", slow_at_first)
    assert model.run() == 4


@pytest.mark.parametrize("options", [{"count": LONG_PASS_IMAGES - 1}, {"device": "cuda:0"}, {"device": "cuda"}])
def test_short_passes_and_gpus_keep_the_default_without_measuring(monkeypatch, cache, options, tmp_path):
    model = FakeModel(monkeypatch, chunk_4=0.5)
    assert model.run(record=tmp_path / "output", **options) == 8 and model.calls == [8]
    assert not cache.exists() and not (tmp_path / "output").exists()


def test_a_resumed_run_keeps_the_recorded_choice(monkeypatch, cache, tmp_path):
    output = tmp_path / "output"
    assert FakeModel(monkeypatch, chunk_4=0.5).run(output) == 4
    for file in cache.iterdir():
        file.unlink()
    other_machine = FakeModel(monkeypatch, chunk_16=0.5)
    assert other_machine.run(output) == 4 and other_machine.calls == [4]
    assert other_machine.run(tmp_path / "another") == 16
    assert other_machine.run(output) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"choice": "4"}', '{"choice": 7}', '{"choice": true}', "\0\xff"])
def test_a_damaged_file_is_measured_again(monkeypatch, cache, damage, tmp_path):
    FakeModel(monkeypatch, chunk_4=0.5).run(tmp_path / "output")
    files = [*cache.glob("*.json"), *(tmp_path / "output").iterdir()]
    assert len(files) == 2
    for file in files:
        file.write_text(damage, encoding="latin-1")
    model = FakeModel(monkeypatch, chunk_16=0.5)
    assert model.run(tmp_path / "output") == 16 and len(model.calls) == 10
    assert {json.loads(file.read_text())["choice"] for file in files} == {16}


def test_a_task_adopts_a_choice_that_was_recorded_while_it_measured(monkeypatch, tmp_path):
    model, output = FakeModel(monkeypatch, chunk_4=0.5), tmp_path / "output"
    embed = model.embed

    def race(images, chunk_images=8):
        output.mkdir(exist_ok=True)
        (output / "fastest-chunk_images.json").write_text('{"choice": 16}')
        return embed(images, chunk_images)

    monkeypatch.setattr(model, "embed", race)
    assert model.run(output) == 16


TASK = """
import sys, time
import numpy as np
from pathlib import Path
from capivara_common.embedding_speed import with_tuned_chunk_size
calls = []
def embed(images, chunk_images=8):
    calls.append(chunk_images)
    time.sleep(0.02 if chunk_images == int(sys.argv[1]) else 0.1)
    return np.eye(1, 8)[[0] * len(images)]
with_tuned_chunk_size(embed, 10**6, "cpu", "encoder", Path(sys.argv[2]))([0])
print(len(calls), calls[-1])
"""


@pytest.mark.slow
def test_tasks_that_start_together_use_one_choice(tmp_path):
    def start(fastest: int) -> subprocess.Popen:
        words = [sys.executable, "-c", TASK, str(fastest), str(tmp_path / "output")]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ)

    outputs = [task.communicate(timeout=120)[0].split() for task in [start(4), start(16), start(16)]]
    calls, choices = zip(*outputs, strict=True)
    assert sorted(calls) == ["1", "1", "10"] and len(set(choices)) == 1


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "file"))
    assert FakeModel(monkeypatch, chunk_4=0.5).run() == 4


# ---- precision ----


@pytest.mark.parametrize(
    ("bf16_seconds", "cosine", "expected"), [(0.5, 0.9995, "bf16"), (2, 1, "float32"), (0.5, 0.9985, "float32")]
)
def test_bf16_is_chosen_only_if_it_is_faster_and_close(monkeypatch, bf16_seconds, cosine, expected):
    model = FakeModel(monkeypatch)
    model.seconds = {"float32": 1, "bf16": bf16_seconds}
    close = UNIT * cosine
    close[:, 1] = np.sqrt(1 - cosine**2)
    candidates = programs(model, float32=UNIT, bf16=close)
    assert load_or_measure_fastest_setting("precision", candidates, "encoder") == expected


@pytest.mark.parametrize("supported", [True, False])
def test_auto_measures_only_where_bf16_is_supported(monkeypatch, cache, saved_tiny_folder, supported, tmp_path):
    monkeypatch.setattr("capivara_common.environment.resolve_mixed_precision", lambda *_: "bf16" if supported else "no")
    embedder = load_embedder(str(saved_tiny_folder), "cpu", precision="auto", record=tmp_path / "output")
    assert len([*cache.glob("*.json")]) == supported == (tmp_path / "output").exists()
    assert embedder.precision in ("bf16", "float32") if supported else embedder.precision == "float32"
    same = load_embedder(str(saved_tiny_folder), "cpu", precision=embedder.precision)
    assert embedder.image_fingerprint == same.image_fingerprint  # the key of the cache has the chosen precision
    other = {"bf16": "float32", "float32": "bf16"}[embedder.precision]
    if supported:
        (tmp_path / "output" / "fastest-precision.json").write_text(json.dumps({"choice": other}))
        resumed = load_embedder(str(saved_tiny_folder), "cpu", precision="auto", record=tmp_path / "output")
        assert resumed.precision == other and resumed.image_fingerprint != embedder.image_fingerprint


# ---- the passes ----


class ScriptedClock:
    """Clock with which each measurement finds one chunk size to be the fastest, whatever it really takes."""

    def __init__(self, fastest: int):
        self.fastest, self.reads, self.now = fastest, 0, 0.0

    def perf_counter(self) -> float:
        number, is_end = divmod(self.reads, 2)
        size = embedding_speed.CHUNK_SIZES[number % len(embedding_speed.CHUNK_SIZES)]
        self.now += is_end * (1 if size == self.fastest else 2)
        self.reads += 1
        return self.now


@pytest.fixture
def sizes(monkeypatch, cache):
    """Makes every pass long. Returns a function that sets the fastest chunk size and returns a list of chunk sizes.

    Each forward pass adds its number of images to the list.
    """
    monkeypatch.setattr(embedding_speed, "LONG_PASS_IMAGES", 8)
    compute, sizes = two_towers.compute_image_embeds, []

    def spy(model, pixel_values):
        sizes.append(len(pixel_values))
        return compute(model, pixel_values)

    monkeypatch.setattr(two_towers, "compute_image_embeds", spy)

    def start(fastest: int) -> list[int]:
        shutil.rmtree(cache, ignore_errors=True)
        monkeypatch.setattr(embedding_speed, "time", ScriptedClock(fastest))
        sizes.clear()
        return sizes

    return start


@pytest.mark.parametrize("size", embedding_speed.CHUNK_SIZES)
def test_every_chunk_size_gives_the_same_embeddings(saved_tiny_folder, size):
    embedder, images = load_embedder(str(saved_tiny_folder), "cpu"), random_images() * 4
    torch.testing.assert_close(
        embedder.embed_images(images, 32, chunk_images=size), embedder.embed_images(images), rtol=0, atol=1e-6
    )


def embed_stage(model, dataset, output, **options) -> dict[str, bytes]:
    """Run the stage of embeddings, and return the content of its parts."""
    values = {"model": model, "dataset": dataset, "output": output, "device": "cpu", "rows_per_part": 6} | options
    embedding_stage.main([f"--{name}={value}" for name, value in values.items()])
    return {path.name: path.read_bytes() for path in output.glob("*.parquet")}


def test_a_resumed_stage_writes_the_same_bytes(sizes, saved_tiny_folder, tiny_dataset_folder, tmp_path):
    used = sizes(8)
    expected = embed_stage(saved_tiny_folder, tiny_dataset_folder, tmp_path / "out")
    assert used[-2:] == [6, 6] and len(expected) == 2  # 6 images per part fit into a chunk of 8
    max((tmp_path / "out").glob("*.parquet")).unlink()
    used = sizes(4)  # now another size would be chosen
    assert embed_stage(saved_tiny_folder, tiny_dataset_folder, tmp_path / "out") == expected
    assert used[-1:] == [6] and 4 not in used
    embed_stage(saved_tiny_folder, tiny_dataset_folder, tmp_path / "other")
    assert used[-2:] == [4, 2]


def test_a_stage_records_the_precision_that_auto_chose(monkeypatch, saved_tiny_folder, tiny_dataset_folder, tmp_path):
    monkeypatch.setattr("capivara_common.environment.resolve_mixed_precision", lambda *_: "bf16")
    for choice in ("float32", "bf16"):
        output = tmp_path / choice
        output.mkdir()
        (output / "fastest-precision.json").write_text(json.dumps({"choice": choice}))
        parts = embed_stage(saved_tiny_folder, tiny_dataset_folder, output, precision="auto")
        assert json.loads((output / "stage.json").read_text())["settings"]["precision"] == choice
        same = embed_stage(saved_tiny_folder, tiny_dataset_folder, tmp_path / f"{choice}-again", precision=choice)
        assert parts == same


@pytest.mark.parametrize("fastest", [4, 16])
def test_evaluation_uses_and_records_the_choice(sizes, saved_tiny_folder, tiny_dataset_folder, tmp_path, fastest):
    used, images = sizes(fastest), open_split(str(tiny_dataset_folder), "train", "image")
    store = CachedEmbedder(load_embedder(str(saved_tiny_folder), "cpu"), tmp_path / "store", 32)
    embeds = store.embed_images(images).embeds
    assert used[-1] == min(fastest, 12) and len(used) > 3
    (record,) = (tmp_path / "store").rglob("fastest-chunk_images.json")
    assert json.loads(record.read_text())["choice"] == fastest
    direct = store.embedder.embed_images([images.load_image(row) for row in range(12)])
    torch.testing.assert_close(embeds, direct, rtol=0, atol=1e-6)


def test_training_uses_and_records_the_choice(sizes, tiny_model, tiny_processor, tiny_dataset_folder, tmp_path):
    pairs = pairs_of(tiny_dataset_folder, tiny_processor)
    used = sizes(16)
    expected = with_cache(tiny_model, pairs, tmp_path).table["vectors"][:]
    assert used[-3:] == [4, 4, 4] and used.count(16) == embedding_speed.ROUNDS  # its batches have 4 images
    assert len([*tmp_path.rglob("fastest-chunk_images.json")]) == 1
    used = sizes(4)
    assert with_cache(tiny_model, pairs, tmp_path).table["vectors"][:] == expected and not used


@pytest.mark.parametrize(
    ("is_auto", "choice", "expected"), [(True, "float32", "no"), (True, "bf16", "bf16"), (False, "float32", "bf16")]
)
def test_training_embeds_in_float32_where_it_is_faster(
    monkeypatch, tiny_model, tiny_processor, tiny_dataset_folder, tmp_path, is_auto, choice, expected
):
    monkeypatch.setattr(training.inputs, "LONG_PASS_IMAGES", 8)
    records = []
    monkeypatch.setattr(two_towers, "choose_fastest_precision", lambda *args: records.append(args[2]) or choice)
    pairs, options = pairs_of(tiny_dataset_folder, tiny_processor), cache_options(tmp_path)
    options.has_auto_precision = is_auto
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    vectors = training.inputs.embed_images_into_column(tiny_model, pairs, options, accelerator).table["vectors"][:]
    (settings,) = tmp_path.glob("*/settings.json")
    assert json.loads(settings.read_text())["precision"] == expected
    assert [tmp_path in record.parents for record in records] == [True] * is_auto
    in_float32 = with_cache(tiny_model, pairs, tmp_path / "float32").table["vectors"][:]
    assert (vectors == in_float32) == (expected == "no")


def test_indexing_uses_the_choice(sizes, saved_tiny_folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        PIL.Image.new("RGB", (32, 32), (6 * number, 90, 30)).save(tmp_path / "pictures" / f"{number}.png")
    used = sizes(16)
    index = PictureIndex.open(tmp_path / "index.lance", str(saved_tiny_folder), device="cpu")
    assert index.add(tmp_path / "pictures", batch_size=32).embedded == 40
    measured = embedding_speed.ROUNDS * (4 + 2 + 1)
    assert sum(used[measured:]) == 40 and max(used[measured:]) == 16


def test_open_clip_embedders_have_no_chunks(tmp_path):
    def embed_images(images, batch_size):
        return UNIT[: len(images)]

    embedder = SimpleNamespace(name="open_clip:ViT-B-32:openai", embed_images=embed_images)
    embed = two_towers.Embedder.tune_image_embedding(embedder, LONG_PASS_IMAGES, 4, tmp_path)
    assert len(embed([0] * 3)) == 3 and not list(tmp_path.iterdir())

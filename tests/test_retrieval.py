"""Retrieval, from the dataset to the result file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from test_checkpoints import flipped

import modeling_capivara.two_towers
from caption_data.pairs import load_or_build_pair_table, load_or_compute_pair_content_digest
from caption_data.sources import open_split
from eval.records.result_files import Record, read_records
from eval.retrieval import (
    RetrievalArguments,
    evaluate_retrieval_and_write_result,
    load_retrieval_data,
    main,
    select_captions_by_position,
)
from modeling_capivara import CapivaraModel

IMAGES = 14


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Folder of images with four captions each in metadata.jsonl."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("made") / "pictures"
    (folder / "test").mkdir(parents=True)
    lines = []
    for i in range(IMAGES):
        pixels = (rng.random((40, 48, 3)) * 80 + rng.random(3) * 170).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "test" / f"{i:02d}.png")
        captions = [f"foto {i} {word}" for word in ("gato", "casa", "céu", "pão")]
        lines.append({"file_name": f"{i:02d}.png", "legendas": captions})
    write_metadata(folder, lines)
    return folder


@pytest.fixture
def dataset_copy(dataset, tmp_path) -> Path:
    """Copy of the dataset that a test may change."""
    return shutil.copytree(dataset, tmp_path / "pictures")


@pytest.fixture(scope="module")
def measured(dataset, saved_tiny_folder, tmp_path_factory) -> Path:
    """Folder with the command's result for the dataset, r.json, and the embedding cache, `cache`."""
    output = tmp_path_factory.mktemp("measured")
    main(make_flags(saved_tiny_folder, dataset, output / "r.json", "--cache_dir", output / "cache"))
    return output


def write_metadata(folder: Path, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "test" / "metadata.jsonl").write_text(text, encoding="utf-8")


def read_metadata(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "test" / "metadata.jsonl").read_text("utf-8").splitlines()]


def make_flags(model, dataset, output, *other_flags) -> list[str]:
    parts = ["--model", model, "--dataset", dataset, "--output", output, "--caption_column", "legendas", *other_flags]
    return [str(part) for part in parts]


def measure(model: Path, dataset: Path, output: Path, **options) -> list[Record]:
    """Measure without drawing the sheet of queries, which takes most of the time, and read the records."""
    values = {"caption_column": "legendas", **options}
    evaluate_retrieval_and_write_result(
        RetrievalArguments(str(model), str(dataset), output, **values), draw_sheet=False
    )
    return read_records(output)


def find_shards(cache: Path) -> set[Path]:
    return set((cache / "evaluation").rglob("*.arrow"))


def test_the_command_writes_a_result_file_and_a_sheet(measured):
    """tests/test_clip_benchmark.py and tests/test_golden.py check the figures themselves."""
    records = {(r.direction, r.metric): r for r in read_records(measured / "r.json")}
    assert {metric for _, metric in records} == {"recall@1", "recall@5", "recall@10", "mean_recall", "median_rank"}
    assert records["text_to_image", "recall@5"].n == 4 * IMAGES and records["image_to_text", "recall@5"].n == IMAGES
    content = json.loads((measured / "r.json").read_text(encoding="utf-8"))
    assert len(content["dataset_fingerprint"]) == 32 and str(measured) not in json.dumps(content["command"])
    sheet = PIL.Image.open(measured / "r.queries.png")
    assert sheet.height > 1.4 * sheet.width and len(sheet.convert("RGB").getcolors(1 << 24)) > 100, (
        "the sheet shows eight queries"
    )


@pytest.mark.slow
def test_truncated_embeddings_use_the_cache_of_full_ones(saved_tiny_folder, dataset, measured, tmp_path):
    options, shards = {"cache_dir": str(measured / "cache")}, find_shards(measured / "cache")
    truncated = measure(saved_tiny_folder, dataset, tmp_path / "r.json", dim=6, **options)
    full = measure(saved_tiny_folder, dataset, tmp_path / "r.json", dim=24, **options)
    assert full == read_records(measured / "r.json") != truncated
    assert {(r.dim, r.protocol.rpartition("; ")[2]) for r in truncated} == {(6, "first 6 of 24 dimensions")}
    assert find_shards(measured / "cache") == shards
    with pytest.raises(ValueError, match=r"dim .*\b24\b.*\b25\b"):
        main(make_flags(saved_tiny_folder, dataset, tmp_path / "r.json", "--dim", 25))


@pytest.mark.slow
def test_a_second_run_embeds_only_damaged_shards(saved_tiny_folder, dataset, measured, tmp_path, monkeypatch, caplog):
    cache = shutil.copytree(measured / "cache", tmp_path / "cache")
    with monkeypatch.context() as patch:
        for kind in ("images", "texts"):
            patch.setattr(f"modeling_capivara.two_towers.embed_{kind}", lambda *_, **__: pytest.fail("embedded again"))
        records = measure(saved_tiny_folder, dataset, tmp_path / "r.json", cache_dir=str(cache))
    assert records == read_records(measured / "r.json")
    contents = {path: path.read_bytes() for path in find_shards(cache)}
    for path, data in contents.items():
        flipped(path, len(data) // 2, 0x40)  # a byte of an embedding
    assert measure(saved_tiny_folder, dataset, tmp_path / "r.json", cache_dir=str(cache)) == records
    assert all(path.read_bytes() == data and f"{path} is damaged" in caplog.text for path, data in contents.items())


@pytest.mark.slow
def test_a_changed_model_or_image_is_embedded_again(tiny_folder, dataset_copy, measured, tmp_path):
    cache = shutil.copytree(measured / "cache", tmp_path / "cache")

    def count_new_shards() -> int:
        before = find_shards(cache)
        measure(tiny_folder, dataset_copy, tmp_path / "r.json", cache_dir=str(cache))
        return len(find_shards(cache) - before)

    PIL.Image.new("RGB", (40, 40), (1, 2, 3)).save(dataset_copy / "test" / "03.png")
    assert count_new_shards() == 1, "the images are embedded again, the captions are not"
    model = CapivaraModel.from_pretrained(tiny_folder)
    for layer, new_shards in ((model.visual_projection, 2), (model.text_projection[0], 1)):
        layer.weight.data.mul_(-1)
        model.save_pretrained(tiny_folder)
        assert count_new_shards() == new_shards, "a model with the same image encoder embeds only texts"


@pytest.mark.slow
def test_an_interrupted_run_continues(saved_tiny_folder, dataset, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.embeddings.IMAGES_PER_SHARD", 4)
    monkeypatch.setattr("eval.embeddings.TEXTS_PER_SHARD", 10)
    embed_images, calls = modeling_capivara.two_towers.embed_images, []

    def interrupt_third_call(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed_images(*args, **kwargs)

    monkeypatch.setattr("modeling_capivara.two_towers.embed_images", interrupt_third_call)
    options = {"output": tmp_path / "r.json", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(KeyboardInterrupt):
        measure(saved_tiny_folder, dataset, **options)
    assert measure(saved_tiny_folder, dataset, **options) == read_records(measured / "r.json")
    assert len(calls) == 3 + 2, "two of the four shards existed already"


def test_captions_are_selected_by_position():
    captions = ["a", "b", "c"]
    positions = ("all", "first", "even", "odd")
    assert {name: select_captions_by_position(captions, "captions-pt", name, 0) for name in positions} == {
        "all": captions,
        "first": ["a"],
        "even": ["a", "c"],
        "odd": ["b"],
    }


@pytest.mark.slow
def test_unreadable_images_are_counted_and_listed_without_private_paths(
    saved_tiny_folder, dataset_copy, tmp_path, capsys, no_pictures
):
    """Images are damaged, missing, oddly named, or outside of the dataset's folder, where nothing may be read."""
    (dataset_copy / "test" / "00.png").write_bytes(b"not an image")
    (dataset_copy / "test" / "01.png").rename(tmp_path / "secret.png")
    (dataset_copy / "test" / "01.png").symlink_to(tmp_path / "secret.png")
    names = dict(enumerate(["../../secret.png", "/etc/passwd", "missing.png", "é\\n.png", "'.png", "x" * 400], 2))
    lines = read_metadata(dataset_copy)
    for row, name in names.items():
        lines[row]["file_name"] = name
    write_metadata(dataset_copy, lines)
    main(make_flags(saved_tiny_folder, dataset_copy, tmp_path / "r.json"))
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    skipped = content["skipped"]
    assert list(skipped) == list(map(str, range(8))) and content["skipped_rows"] == 8
    assert {record["n"] for record in content["records"]} == {IMAGES - 8, 4 * (IMAGES - 8)}
    assert "8 images" in capsys.readouterr().out and str(tmp_path) not in json.dumps(content)
    assert all("outside" in skipped[str(row)] for row in (1, 2, 3))
    assert all(skipped[str(row)].startswith(f"unreadable image: {names[row]!r}"[:200]) for row in range(4, 8))


INVALID_CAPTIONS = [  # (row -> changes, message)
    ({3: {"legendas": []}}, "row 3"),
    ({4: {"legendas": ["a", " "]}}, "row 4"),
    ({row: {"legendas": None, "captions-pt": ["x"]} for row in range(IMAGES)}, "'legendas'"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID_CAPTIONS)
def test_invalid_captions_are_refused_before_the_model_is_loaded(dataset_copy, tmp_path, changes, message):
    lines = [line | changes.get(row, {}) for row, line in enumerate(read_metadata(dataset_copy))]
    write_metadata(dataset_copy, [{name: value for name, value in line.items() if value is not None} for line in lines])
    with pytest.raises(ValueError, match=message):
        main(make_flags("no-model", dataset_copy, tmp_path / "r.json"))
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("argument_text", "message"),
    [
        ("--split dev", r"'dev'.*\['test'\]"),
        ("--output .", "--output|output file"),
    ],
)
def test_invalid_arguments_are_refused_before_the_model_is_loaded(dataset, tmp_path, argument_text, message):
    with pytest.raises(ValueError, match=message):
        main(make_flags("no-model", dataset, tmp_path / "r.json", *argument_text.split()))


def test_training_and_evaluation_agree_on_the_fingerprint_of_data(dataset, tiny_dataset_folder, tmp_path):
    """Otherwise a report doubts that a run's baseline and a model measured later saw the same data."""
    for folder, column in ((dataset, "legendas"), (tiny_dataset_folder, "captions-pt")):
        source = open_split(str(folder), "test", "image")
        table = load_or_build_pair_table(source, [column], lambda row, name=column: row[name], {"captions": column})
        arguments = RetrievalArguments("m", str(folder), tmp_path, caption_column=column)
        assert load_retrieval_data(arguments).fingerprint() == load_or_compute_pair_content_digest(table)
    english = replace(arguments, language="en", caption_column="captions-{language}")
    assert load_retrieval_data(arguments).fingerprint() != load_retrieval_data(english).fingerprint()


def test_odd_captions_bf16_and_image_roots_are_measured(saved_tiny_folder, dataset_copy, tmp_path):
    (dataset_copy / "test" / "01.png").rename(tmp_path / "01.png")
    lines = read_metadata(dataset_copy)[:2]
    write_metadata(dataset_copy, [lines[0], lines[1] | {"file_name": str(tmp_path / "01.png")}])
    with pytest.raises(ValueError, match="two readable images"):
        measure(saved_tiny_folder, dataset_copy, tmp_path / "r.json")
    options = {"caption_positions": "odd", "precision": "bf16", "image_roots": [tmp_path]}
    records = measure(saved_tiny_folder, dataset_copy, tmp_path / "bf16.json", **options)
    assert {r.n for r in records} == {2, 4} and all("captions: odd" in r.protocol for r in records)
    assert json.loads((tmp_path / "bf16.json").read_text(encoding="utf-8"))["precision"] == "bf16"

"""The retrieval task, from data set to result file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from test_checkpoints import flipped

import modeling_capivara.two_towers
from caption_data.pairs import build_pair_table, pairs_fingerprint
from caption_data.sources import open_split
from eval.records.schema import Record, read_records
from eval.retrieval import RetrievalArguments, _select_captions, evaluate, load_retrieval_data, main
from modeling_capivara import CapivaraModel

NUMBER = 14


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Pictures with a metadata.jsonl of four captions each."""
    generator, folder = np.random.default_rng(0), tmp_path_factory.mktemp("made") / "pictures"
    (folder / "test").mkdir(parents=True)
    lines = []
    for i in range(NUMBER):
        pixels = (generator.random((40, 48, 3)) * 80 + generator.random(3) * 170).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "test" / f"{i:02d}.png")
        captions = [f"foto {i} {word}" for word in ("gato", "casa", "céu", "pão")]
        lines.append({"file_name": f"{i:02d}.png", "legendas": captions})
    write_lines(folder, lines)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of them that a test may change."""
    return shutil.copytree(made, tmp_path / "pictures")


@pytest.fixture(scope="module")
def measured(made, saved_tiny_folder, tmp_path_factory) -> Path:
    """The result of the command on them, r.json, and the `cache` of their embeddings."""
    output = tmp_path_factory.mktemp("measured")
    main(flags(saved_tiny_folder, made, output / "r.json", "--cache_dir", output / "cache"))
    return output


def write_lines(folder: Path, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "test" / "metadata.jsonl").write_text(text, encoding="utf-8")


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "test" / "metadata.jsonl").read_text("utf-8").splitlines()]


def flags(model, dataset, output, *more) -> list[str]:
    names = ["--model", model, "--dataset", dataset, "--output", output, "--caption_column", "legendas", *more]
    return [str(part) for part in names]


def measure(model: Path, dataset: Path, output: Path, **more) -> list[Record]:
    """The records, as they are written; without the sheet of queries, which takes most of the time."""
    values = {"caption_column": "legendas", **more}
    evaluate(RetrievalArguments(str(model), str(dataset), output, **values), draw_sheet=False)
    return read_records(output)


def kept(cache: Path) -> set[Path]:
    return set((cache / "evaluation").rglob("*.arrow"))


def test_result_and_sheet(measured):
    """That the figures are right is seen beside clip-benchmark and the records of before."""
    records = {(r.direction, r.metric): r for r in read_records(measured / "r.json")}
    assert {metric for _, metric in records} == {"recall@1", "recall@5", "recall@10", "mean_recall", "median_rank"}
    assert records["text_to_image", "recall@5"].n == 4 * NUMBER and records["image_to_text", "recall@5"].n == NUMBER
    content = json.loads((measured / "r.json").read_text(encoding="utf-8"))
    assert len(content["dataset_fingerprint"]) == 32 and str(measured) not in json.dumps(content["command"])
    sheet = PIL.Image.open(measured / "r.queries.png")
    assert sheet.height > 1.4 * sheet.width and len(sheet.convert("RGB").getcolors(1 << 24)) > 100, "eight queries"


def test_embeddings_are_cut(saved_tiny_folder, made, measured, tmp_path):
    """To their first numbers, whose recall is another figure; all of them are kept once, whole."""
    more, before = {"cache_dir": str(measured / "cache")}, kept(measured / "cache")
    cut = measure(saved_tiny_folder, made, tmp_path / "r.json", dim=6, **more)
    all_numbers = measure(saved_tiny_folder, made, tmp_path / "r.json", dim=24, **more)
    assert all_numbers == read_records(measured / "r.json") != cut
    assert {(r.dim, r.protocol.rpartition("; ")[2]) for r in cut} == {(6, "first 6 of 24 dimensions")}
    assert kept(measured / "cache") == before
    with pytest.raises(ValueError, match="dim must be from 1 to the embedding's width, 24, got 25"):
        main(flags(saved_tiny_folder, made, tmp_path / "r.json", "--dim", 25))


def test_second_run_embeds_nothing_and_a_flipped_byte_is_made_anew(
    saved_tiny_folder, made, measured, tmp_path, monkeypatch, caplog
):
    cache = shutil.copytree(measured / "cache", tmp_path / "cache")
    with monkeypatch.context() as patch:
        for kind in ("images", "texts"):
            patch.setattr(f"modeling_capivara.two_towers.embed_{kind}", lambda *_, **__: pytest.fail("embedded again"))
        again = measure(saved_tiny_folder, made, tmp_path / "r.json", cache_dir=str(cache))
    assert again == read_records(measured / "r.json")
    whole = {path: path.read_bytes() for path in kept(cache)}
    for path, data in whole.items():
        flipped(path, len(data) // 2, 0x40)  # of an embedding
    assert measure(saved_tiny_folder, made, tmp_path / "r.json", cache_dir=str(cache)) == again
    assert all(path.read_bytes() == data and f"{path} is damaged" in caplog.text for path, data in whole.items())


def test_another_model_or_picture_is_another_cache(tiny_folder, folder, measured, tmp_path):
    cache = shutil.copytree(measured / "cache", tmp_path / "cache")

    def made_anew() -> int:
        before = kept(cache)
        measure(tiny_folder, folder, tmp_path / "r.json", cache_dir=str(cache))
        return len(kept(cache) - before)

    PIL.Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "test" / "03.png")
    assert made_anew() == 1, "the pictures' embeddings, not the captions'"
    model = CapivaraModel.from_pretrained(tiny_folder)
    for layer, number in ((model.visual_projection, 2), (model.text_projection[0], 1)):
        layer.weight.data.mul_(-1)
        model.save_pretrained(tiny_folder)
        assert made_anew() == number, "a model with the same image tower embeds texts alone"


def test_an_interrupted_run_goes_on(saved_tiny_folder, made, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.embeddings.IMAGES_PER_SHARD", 4)
    monkeypatch.setattr("eval.embeddings.TEXTS_PER_SHARD", 10)
    real, done = modeling_capivara.two_towers.embed_images, []

    def fails_at_third(*args, **kwargs):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("modeling_capivara.two_towers.embed_images", fails_at_third)
    given = {"output": tmp_path / "r.json", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(KeyboardInterrupt):
        measure(saved_tiny_folder, made, **given)
    assert measure(saved_tiny_folder, made, **given) == read_records(measured / "r.json")
    assert len(done) == 3 + 2, "two of the four shards were there"


def test_positions():
    captions = ["a", "b", "c"]
    found = {name: _select_captions(captions, "captions-pt", name, 0) for name in ("all", "first", "even", "odd")}
    assert found == {"all": captions, "first": ["a"], "even": ["a", "c"], "odd": ["b"]}


def test_bad_pictures_are_counted_and_listed_and_name_no_place_of_the_machine(
    saved_tiny_folder, folder, tmp_path, capsys, no_pictures
):
    """Damaged, missing, of odd names, outside of the folder, which are not read."""
    (folder / "test" / "00.png").write_bytes(b"no picture")
    (folder / "test" / "01.png").rename(tmp_path / "secret.png")
    (folder / "test" / "01.png").symlink_to(tmp_path / "secret.png")
    names = dict(enumerate(["../../secret.png", "/etc/passwd", "gone.png", "é\\n.png", "'.png", "x" * 400], 2))
    lines = lines_of(folder)
    for row, name in names.items():
        lines[row]["file_name"] = name
    write_lines(folder, lines)
    main(flags(saved_tiny_folder, folder, tmp_path / "r.json"))
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    skipped = content["skipped"]
    assert list(skipped) == list(map(str, range(8))) and content["skipped_rows"] == 8
    assert {record["n"] for record in content["records"]} == {NUMBER - 8, 4 * (NUMBER - 8)}
    assert "8 images could not be read" in capsys.readouterr().out and str(tmp_path) not in json.dumps(content)
    assert all("lies outside" in skipped[str(row)] for row in (1, 2, 3))
    assert all(skipped[str(row)].startswith(f"unreadable image: {names[row]!r}"[:200]) for row in range(4, 8))


BAD_DATA = [
    ({3: {"legendas": []}}, "Row 3 has no caption"),
    ({4: {"legendas": ["a", " "]}}, "Row 4 has no caption or an empty one"),
    ({row: {"legendas": None, "captions-pt": ["x"]} for row in range(NUMBER)}, "no column 'legendas'; there are"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_DATA)
def test_bad_data_is_refused_before_the_model_is_loaded(folder, tmp_path, changes, message):
    lines = [line | changes.get(row, {}) for row, line in enumerate(lines_of(folder))]
    write_lines(folder, [{name: value for name, value in line.items() if value is not None} for line in lines])
    with pytest.raises(ValueError, match=message):
        main(flags("no-model", folder, tmp_path / "r.json"))
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--split dev", r"no split 'dev'; there are \['test'\]"),
        ("--output .", r"output file .* is a folder"),
        ("--tasks 2", "`--tasks` is gone: `accelerate launch --multi_gpu -m eval.retrieval` shares"),
    ],
)
def test_slips_are_said_before_any_work(made, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        main(flags("no-model", made, tmp_path / "r.json", *words.split()))


def test_training_gives_the_same_data_the_same_fingerprint(made, tiny_dataset_folder, tmp_path):
    """Otherwise a report doubts that a run's baseline and a model measured later saw the same data."""
    for dataset, column in ((made, "legendas"), (tiny_dataset_folder, "captions-pt")):
        source = open_split(str(dataset), "test", "image")
        table = build_pair_table(source, [column], lambda row, name=column: row[name], {"captions": column})
        arguments = RetrievalArguments("m", str(dataset), tmp_path, caption_column=column)
        assert load_retrieval_data(arguments).fingerprint() == pairs_fingerprint(table)
    first = load_retrieval_data(arguments).fingerprint()
    assert (
        first
        != load_retrieval_data(replace(arguments, language="en", caption_column="captions-{language}")).fingerprint()
    )


def test_googles_captions_in_bf16_of_a_folder_that_the_user_names(saved_tiny_folder, folder, tmp_path):
    (folder / "test" / "01.png").rename(tmp_path / "01.png")
    lines = lines_of(folder)[:2]
    write_lines(folder, [lines[0], lines[1] | {"file_name": str(tmp_path / "01.png")}])
    with pytest.raises(ValueError, match="has one image that can be read: among so few"):
        measure(saved_tiny_folder, folder, tmp_path / "r.json")
    more = {"caption_positions": "odd", "precision": "bf16", "image_roots": [tmp_path]}
    records = measure(saved_tiny_folder, folder, tmp_path / "bf16.json", **more)
    assert {r.n for r in records} == {2, 4} and all("captions: odd" in r.protocol for r in records)
    assert json.loads((tmp_path / "bf16.json").read_text(encoding="utf-8"))["precision"] == "bf16"

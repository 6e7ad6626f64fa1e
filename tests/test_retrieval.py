"""The retrieval task, from data set to result file."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from test_checkpoints import flipped

import modeling_capivara.embedder
from capivara_common.tasks import all_parts
from caption_data.embedding_cache import EmbeddingCache
from caption_data.pairs import pair_table, pairs_fingerprint
from caption_data.sources import open_split
from eval import classification, linear_probe
from eval.records.schema import read_records
from eval.retrieval import RetrievalArguments, _chosen, evaluate, load_data, main
from modeling_capivara import CapivaraModel, CapivaraProcessor

ROOT = Path(__file__).resolve().parent.parent
NUMBER = 14


@pytest.fixture
def folder(tmp_path):
    """Pictures with a metadata.jsonl of four captions each."""
    generator = np.random.default_rng(0)
    made = tmp_path / "pictures" / "test"
    made.mkdir(parents=True)
    lines = []
    for i in range(NUMBER):
        pixels = (generator.random((40, 48, 3)) * 80 + generator.random(3) * 170).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(made / f"{i:02d}.png")
        lines.append(
            {"file_name": f"{i:02d}.png", "legendas": [f"foto {i} {word}" for word in ("gato", "casa", "céu", "pão")]}
        )
    (made / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path / "pictures"


def flags(model, dataset, output, *more) -> list[str]:
    names = ["--model", model, "--dataset", dataset, "--output", output, "--caption_column", "legendas", *more]
    return [str(part) for part in names]


def test_embeddings_are_cut(tiny_folder, folder, tmp_path):
    """To their first numbers, whose recall is another figure; all of them are kept once, whole."""
    found = {}
    for dim in (None, 6, 24):
        more = [] if dim is None else ["--dim", dim]
        main(flags(tiny_folder, folder, tmp_path / "r.json", *more))
        found[dim] = read_records(tmp_path / "r.json")
    assert found[24] == found[None] != found[6]
    assert {(r.dim, r.protocol.rpartition("; ")[2]) for r in found[6]} == {(6, "first 6 of 24 dimensions")}
    assert not {r.condition for r in found[6]} & {r.condition for r in found[None]}


@pytest.mark.parametrize(("dim", "rule"), [(25, "from 1 to the embedding's width, 24"), (0, "at least 1")])
def test_a_width_that_the_model_has_not(tiny_folder, folder, tmp_path, dim, rule, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags(tiny_folder, folder, tmp_path / "r.json", "--dim", dim))
    assert f"dim must be {rule}, got {dim}" in f"{stop.value}{capsys.readouterr().err}"


def test_a_folder_of_images(tiny_folder, folder, tmp_path, capsys):
    main(flags(tiny_folder, folder, tmp_path / "r.json"))
    records = {(r.direction, r.metric): r for r in read_records(tmp_path / "r.json")}
    assert {metric for _, metric in records} == {"recall@1", "recall@5", "recall@10", "mean_recall", "median_rank"}
    assert records["text_to_image", "recall@5"].n == 4 * NUMBER and records["image_to_text", "recall@5"].n == NUMBER
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert len(content["dataset_fingerprint"]) == 32 and str(tmp_path) not in json.dumps(content["command"])
    sheet = PIL.Image.open(tmp_path / "r.queries.png")
    assert sheet.height > 1.4 * sheet.width and len(sheet.convert("RGB").getcolors(1 << 24)) > 100, "eight queries"
    assert "median_rank" in capsys.readouterr().out


def test_values_are_those_of_a_plain_computation(tiny_folder, folder, tmp_path):
    main(flags(tiny_folder, folder, tmp_path / "r.json"))
    model, processor = CapivaraModel.from_pretrained(tiny_folder).eval(), CapivaraProcessor.from_pretrained(tiny_folder)
    lines = [json.loads(line) for line in (folder / "test" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    images = [PIL.Image.open(folder / "test" / line["file_name"]) for line in lines]
    texts = [text for line in lines for text in line["legendas"]]
    with torch.inference_mode():
        output = model(**processor(text=texts, images=images, return_tensors="pt", padding=True))
    right = torch.arange(NUMBER).repeat_interleave(4)
    scores = output.text_embeds @ output.image_embeds.T
    expected = (scores.topk(5).indices == right[:, None]).any(dim=1).float().mean()
    (found,) = [
        r.value for r in read_records(tmp_path / "r.json") if (r.direction, r.metric) == ("text_to_image", "recall@5")
    ]
    assert found == pytest.approx(float(expected))


def test_second_run_embeds_nothing(tiny_folder, folder, tmp_path, monkeypatch):
    more = ("--cache_dir", tmp_path / "cache")
    main(flags(tiny_folder, folder, tmp_path / "a.json", *more))
    monkeypatch.setattr(
        "modeling_capivara.embedder.embed_images", lambda *args, **kwargs: pytest.fail("embedded again")
    )
    monkeypatch.setattr("modeling_capivara.embedder.embed_texts", lambda *args, **kwargs: pytest.fail("embedded again"))
    main(flags(tiny_folder, folder, tmp_path / "b.json", *more))
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "b.json")


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_flipped_byte_of_the_cache_is_noticed_and_made_anew(tiny_folder, folder, tmp_path, kind, caplog):
    more = ("--cache_dir", tmp_path / "cache")
    main(flags(tiny_folder, folder, tmp_path / "a.json", *more))
    (path,) = (tmp_path / "cache").rglob(f"{kind}-*.npy")
    whole = path.read_bytes()
    flipped(path, len(whole) // 2, 0x40)  # of an embedding
    main(flags(tiny_folder, folder, tmp_path / "b.json", *more))
    assert path.read_bytes() == whole and f"{path} is damaged" in caplog.text
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "b.json")


def test_another_model_or_picture_is_another_cache(tiny_folder, folder, tmp_path):
    more = ("--cache_dir", tmp_path / "cache")
    main(flags(tiny_folder, folder, tmp_path / "a.json", *more))
    first = set((tmp_path / "cache" / "evaluation").rglob("*.npy"))
    PIL.Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "test" / "03.png")
    main(flags(tiny_folder, folder, tmp_path / "b.json", *more))
    second = set((tmp_path / "cache" / "evaluation").rglob("*.npy"))
    assert len(second - first) == 1, "the pictures' embeddings, not the captions'"
    model = CapivaraModel.from_pretrained(tiny_folder)
    model.visual_projection.weight.data.mul_(-1)
    model.save_pretrained(tiny_folder)
    main(flags(tiny_folder, folder, tmp_path / "c.json", *more))
    third = set((tmp_path / "cache" / "evaluation").rglob("*.npy"))
    assert len(third - second) == 2
    model.text_projection[0].weight.data.mul_(-1)
    model.save_pretrained(tiny_folder)
    main(flags(tiny_folder, folder, tmp_path / "d.json", *more))
    fourth = set((tmp_path / "cache" / "evaluation").rglob("*.npy"))
    assert len(fourth - third) == 1, "a model with the same image tower embeds texts alone"


def test_an_interrupted_run_goes_on(tiny_folder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.embeddings.IMAGES_PER_SHARD", 4)
    monkeypatch.setattr("eval.embeddings.TEXTS_PER_SHARD", 10)
    real, done = modeling_capivara.embedder.embed_images, []

    def fails_at_third(*args, **kwargs):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("modeling_capivara.embedder.embed_images", fails_at_third)
    arguments = flags(tiny_folder, folder, tmp_path / "r.json", "--cache_dir", tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    main(arguments)
    assert len(done) == 3 + 2, "two of the four shards were there"
    main(flags(tiny_folder, folder, tmp_path / "whole.json", "--cache_dir", "off"))
    assert read_records(tmp_path / "r.json") == read_records(tmp_path / "whole.json")


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tiny_folder, folder, tmp_path):
    (folder / "test" / "05.png").write_bytes(b"no picture")
    script = (
        "import os, sys\nfrom eval import embeddings as e\n"
        "open('process' + os.environ.get('RANK', ''), 'w').close()\n"
        "e.IMAGES_PER_SHARD, e.TEXTS_PER_SHARD = 4, 10\n"
        "from eval.retrieval import main\nmain(sys.argv[1:])\n"
    )
    (tmp_path / "run.py").write_text(script, encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    for name, start in (("one", ["run.py"]), ("two", [*launch, "--main_process_port", "0", "-m", "run"])):
        more = flags(tiny_folder, folder, tmp_path / f"{name}.json", "--cache_dir", tmp_path / name)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *start, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("mean_recall") == 2, "one process prints"
    assert {path.name for path in tmp_path.glob("process*")} == {"process", "process0", "process1"}
    assert read_records(tmp_path / "one.json") == read_records(tmp_path / "two.json")
    for path in sorted((tmp_path / "one").rglob("*.npy")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_many_shards_are_few_open_files(tmp_path):
    cache = EmbeddingCache(tmp_path, all_parts(90, 3))
    arrays = np.arange(360, dtype=np.float32).reshape(30, 3, 4)
    cache.make(cache.missing(), lambda numbers: ((arrays[number], [(1, "bad")]) for number in numbers))
    before = len(list(Path("/proc/self/fd").iterdir()))
    cache.open()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert np.array_equal(np.stack(cache.arrays), arrays) and list(cache.bad) == list(range(1, 90, 3))


def test_the_flag_of_the_gallery_says_what_there_is_instead(tmp_path):
    with pytest.raises(SystemExit, match=r"`--gallery` is gone: the best and the worst queries are drawn beside"):
        main(flags("no-model", tmp_path, tmp_path / "r.json", "--gallery", "2"))


@pytest.mark.parametrize("flag", ["executor", "tasks", "gpus_per_task"])
def test_flags_of_executors_name_accelerate(tmp_path, flag):
    with pytest.raises(
        SystemExit, match=f"`--{flag}` is gone: `accelerate launch --multi_gpu -m eval.retrieval` shares"
    ):
        main(flags("no-model", tmp_path, tmp_path / "r.json", f"--{flag}", "2"))


def test_positions():
    captions = ["a", "b", "c"]
    found = {name: _chosen(captions, "captions-pt", name, 0) for name in ("all", "first", "even", "odd")}
    assert found == {"all": captions, "first": ["a"], "even": ["a", "c"], "odd": ["b"]}
    with pytest.raises(ValueError, match="Row 7 has 1 captions, none at the positions 'odd'"):
        _chosen(["a"], "captions-pt", "odd", 7)


def test_google_captions_only(tiny_folder, folder, tmp_path):
    main(flags(tiny_folder, folder, tmp_path / "r.json", "--caption_positions", "odd"))
    records = read_records(tmp_path / "r.json")
    assert {r.n for r in records} == {NUMBER, 2 * NUMBER} and all("captions: odd" in r.protocol for r in records)


def test_bf16_is_another_cache_and_is_recorded(tiny_folder, folder, tmp_path):
    for precision in ("float32", "bf16"):
        more = ("--precision", precision, "--cache_dir", tmp_path / "cache")
        main(flags(tiny_folder, folder, tmp_path / "r.json", *more))
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["precision"] == "bf16"
    one, other = (np.load(path) for path in (tmp_path / "cache").rglob("images-*.npy"))
    assert 0 < abs(one - other).max() < 0.05


def test_corrupt_images_are_counted_and_listed(tiny_folder, folder, tmp_path, capsys):
    (folder / "test" / "05.png").write_bytes(b"no picture")
    main(flags(tiny_folder, folder, tmp_path / "r.json"))
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert content["skipped_rows"] == 1 and list(content["skipped"]) == ["5"]
    assert {record["n"] for record in content["records"]} == {NUMBER - 1, 4 * (NUMBER - 1)}
    assert "1 images could not be read" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gone.png", "a\0b.png", "é\\n.png", "'.png", "x" * 400])
def test_faults_of_odd_names_name_no_place_of_the_machine(tiny_folder, folder, tmp_path, name):
    edit(folder, lambda lines: lines[5].update(file_name=name))
    main(flags(tiny_folder, folder, tmp_path / "r.json"))
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    said = content["skipped"]["5"]
    assert said.startswith(f"unreadable image: {name!r}"[:200]) and str(tmp_path) not in json.dumps(content)


def edit(folder: Path, change) -> None:
    path = folder / "test" / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[3].update(legendas=[]), "Row 3 has no caption"),
        (lambda lines: lines[4].update(legendas=["a", " "]), "Row 4 has no caption or an empty one"),
        (lambda lines: [line.pop("legendas") for line in lines], "no column 'legendas'; there are"),
    ],
)
def test_bad_data_is_refused_before_the_model_is_loaded(folder, tmp_path, change, message):
    edit(folder, change)
    with pytest.raises(SystemExit, match=message):
        main(flags("no-model", folder, tmp_path / "r.json"))
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("command", [main, classification.main, linear_probe.main])
def test_a_result_that_cannot_be_written_is_said_before_any_work(command, tmp_path):
    where = ["--dataset", "no-data"] if command is main else ["--benchmark", "cifar-10", "--images", "no-data"]
    with pytest.raises(SystemExit, match=r"output file .* is a folder"):
        command(["--model", "no-model", *where, "--output", str(tmp_path)])


def test_pictures_outside_of_the_folder_are_listed_and_not_read(tiny_folder, folder, tmp_path):
    (folder / "test" / "03.png").rename(tmp_path / "secret.png")
    (folder / "test" / "03.png").symlink_to(tmp_path / "secret.png")
    edit(folder, lambda lines: lines[1].update(file_name="../../secret.png"))
    edit(folder, lambda lines: lines[2].update(file_name="/etc/passwd"))
    command = [*flags(tiny_folder, folder, tmp_path / "r.json")]
    main(command)
    skipped = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["skipped"]
    assert skipped.keys() == {"1", "2", "3"} and all("lies outside" in reason for reason in skipped.values())
    main([*command, "--image_roots", str(tmp_path)])
    skipped = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["skipped"]
    assert skipped.keys() == {"2"} and "lies outside" in skipped["2"]


def test_no_capivara_model(folder, tmp_path, tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    (tiny_folder / "config.json").write_text(json.dumps({**config, "model_type": "clip"}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"is of no CAPIVARA model.*clip:"):
        main(flags(tiny_folder, folder, tmp_path / "r.json"))


def test_nan_embeddings(tiny_folder, folder, tmp_path):
    model = CapivaraModel.from_pretrained(tiny_folder)
    model.visual_projection.weight.data.fill_(float("nan"))
    model.save_pretrained(tiny_folder)
    with pytest.raises(SystemExit, match="embedding is NaN or infinite"):
        main(flags(tiny_folder, folder, tmp_path / "r.json"))


def test_columns_and_splits_that_are_missing(tiny_dataset_folder, tmp_path):
    arguments = RetrievalArguments("m", str(tiny_dataset_folder), tmp_path / "r.json", language="hi")
    with pytest.raises(ValueError, match=r"no column 'captions-hi'; there are \["):
        load_data(arguments)
    arguments.split = "dev"
    with pytest.raises(ValueError, match=r"no split 'dev'; there are \["):
        load_data(arguments)


def test_a_saved_data_set(tiny_folder, tiny_dataset_folder, tmp_path):
    arguments = RetrievalArguments(
        str(tiny_folder), str(tiny_dataset_folder), tmp_path / "r.json", language="en", seed=3
    )
    records = evaluate(arguments)
    assert {r.language for r in records} == {"en"} and {r.seed for r in records} == {3}
    assert {r.n for r in records} == {8}
    assert {r.metric for r in records} == {"recall@1", "recall@5", "median_rank"}, "among 8 images recall@10 is sure"


def test_one_image_is_too_few(tiny_folder, folder, tmp_path):
    edit(folder, lambda lines: lines.__delitem__(slice(1, None)))
    with pytest.raises(SystemExit, match="has one image that can be read"):
        main(flags(tiny_folder, folder, tmp_path / "r.json"))


def test_training_gives_the_same_data_the_same_fingerprint(folder, tiny_dataset_folder, tmp_path):
    """Otherwise a report doubts that a run's baseline and a model measured later saw the same data."""
    for dataset, column in ((folder, "legendas"), (tiny_dataset_folder, "captions-pt")):
        source = open_split(str(dataset), "test", "image")
        table = pair_table(source, [column], lambda row, name=column: row[name], {"captions": column})
        arguments = RetrievalArguments("m", str(dataset), tmp_path, caption_column=column)
        assert load_data(arguments).fingerprint() == pairs_fingerprint(table)
    first = load_data(arguments).fingerprint()
    assert first != load_data(replace(arguments, language="en", caption_column="captions-{language}")).fingerprint()


def test_parquet(tiny_folder, tiny_dataset_folder, tmp_path):
    rows = datasets.load_from_disk(str(tiny_dataset_folder))["test"]
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "test-0.parquet")
    same = [
        evaluate(RetrievalArguments(str(tiny_folder), str(source), tmp_path / "r.json"))
        for source in (tmp_path / "parquet", tiny_dataset_folder)
    ]
    assert [r.value for r in same[0]] == [r.value for r in same[1]]

"""Files that an earlier version wrote still open, and give the same figures.

Commit a876dd5 made the files in `tests/golden/` (its README says how). They are never made again to fit a change. The
tests use what users use: commands, the Python interface and files. Only a training checkpoint may be refused, with an
error of one line.
"""

import contextlib
import csv
import io
import json
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
HOME = "/home/ana"  # folder in which the files were made; the paths in the index start with it
TEXTS = ["azul em cima", "SÃ£o JoÃ£o &amp; cia", "", "um gato vermelho na esquerda de uma casa " * 5]
VECTOR_PICTURES = ["Fotos/azul/azul-em-cima.jpg", "Fotos/pequena.jpg", "Outras/y.png"]
MODELS = ["modelos/a", "modelos/b", "runs/demo", "runs/lora", "runs/seeds/seed-1", "runs/rotated"]
RUNS = ["demo", "lora", "seeds", "rotated"]
MAX_GOLDEN_BYTES = 10_000_000
LABELS = "--labels azul verde vermelho branco --template {}_inteiro"
COMMANDS = {  # name of the files in golden/outputs -> arguments of `capivara`
    **{f"search_{model}": f"buscar azul em cima -k 3 --all --model modelos/{model}" for model in ("a", "b")},
    "like": "buscar --all --like Fotos/verde/verde-inteiro.jpg -k 2 --since 2024-02 --until 2024-12 --model modelos/b",
    "duplicates": "duplicatas --threshold 0.95 --model modelos/b",
    "classify": f"classificar Outras {LABELS} --model modelos/a",
}


@pytest.fixture(scope="module")
def golden_copy(tmp_path_factory) -> Path:
    """Copy of all golden files, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("golden") / "ana"
    return shutil.copytree(GOLDEN, folder)


@pytest.fixture
def home(golden_copy, monkeypatch) -> Iterator[Path]:
    """Copy of the golden files as the current folder, in the time zone UTC."""
    for name in ("LC_ALL", "LC_MESSAGES", "CAPIVARA_INDEX", "CAPIVARA_MODEL", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(golden_copy)
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield golden_copy
    time.tzset()


@pytest.fixture
def changeable_home(home, tmp_path, monkeypatch) -> Path:
    """Copy of the golden files that a test may change, as the current folder."""
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "ana"))
    return tmp_path / "ana"


@pytest.fixture
def index_path(home, tmp_path) -> Path:
    """Path of a copy of the index."""
    return shutil.copytree(home / "fotos.lance", tmp_path / "fotos.lance")


@pytest.fixture
def capivara(home, index_path, capsys, monkeypatch) -> Iterator[Callable[[str], tuple[int, str]]]:
    """Function that runs the console script on the index and returns exit code and stdout, with paths in /home/ana."""
    handler = signal.getsignal(signal.SIGINT)
    from capivara_search.__main__ import run

    def call(argument_text: str) -> tuple[int, str]:
        arguments = [argument.replace("_inteiro", " inteiro") for argument in argument_text.split()]
        monkeypatch.setattr(sys, "argv", ["capivara", *arguments, "--lang", "pt", "--index", str(index_path)])
        with pytest.raises(SystemExit) as exit_info:
            run()
        return exit_info.value.code, capsys.readouterr().out.replace(str(home), HOME)

    yield call
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def open_index(home, index_path) -> Callable[[str], Any]:
    """Function that opens the index with one of the models in the Python interface."""
    from capivara_search.index import PictureIndex

    return lambda model: PictureIndex.open(index_path, model=str(home / "modelos" / model))


def assert_equal(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Check that JSON values are equal, with numbers equal within a tolerance."""
    if isinstance(expected, float) and isinstance(actual, int | float):
        assert math.isclose(actual, expected, rel_tol=0, abs_tol=tolerance), (actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_equal(actual[key], expected[key], tolerance)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), (actual, expected)
        for actual_item, expected_item in zip(actual, expected, strict=True):
            assert_equal(actual_item, expected_item, tolerance)
    else:
        assert actual == expected


def drop_new_fields(rows: Any, expected: Any) -> Any:
    """Remove the fields that a later version has added; these must be the last ones."""
    if isinstance(rows, list):
        return [drop_new_fields(row, expected[0]) for row in rows]
    assert list(rows)[: len(expected)] == list(expected)
    return {name: rows[name] for name in expected}


def parse_csv(text: str) -> list[dict[str, str | float]]:
    """Return the rows of a CSV text, with numbers as floats."""

    def parse_cell(value: str) -> str | float:
        with contextlib.suppress(ValueError):
            return float(value)
        return value

    return [{name: parse_cell(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def load_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_files(folder: str) -> dict[Path, bytes]:
    """Return the contents of all files in a folder and its subfolders."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def get_error(command: Callable[[], object]) -> str | None:
    """Run a command and return its error message, which must be a single line; None if it succeeds."""
    try:
        command()
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def embed(folder: Path | str) -> tuple[Any, Any]:
    """Embed `TEXTS` and `VECTOR_PICTURES` with transformers' Auto classes."""
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    import modeling_capivara  # noqa: F401 - registers the model with the Auto classes

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in VECTOR_PICTURES]
    with torch.no_grad():
        outputs = model(**processor(text=TEXTS, images=images, return_tensors="pt"))
    return outputs.text_embeds.contiguous(), outputs.image_embeds.contiguous()


def get_image_digest(model: Path | str) -> str:
    """Return the digest of a model's image encoder, by which an index recognizes the model of its vectors."""
    from capivara_search.models import resolve_search_model

    return resolve_search_model(str(model)).image_digest


def make_demo_image_encoder(folder: Path) -> Path:
    """Write the image encoder of the demo's base: the image tower of the miniature and a golden projection."""
    from safetensors.torch import load_file, save_file

    from capivara_search.models import resolve_search_model

    shutil.copytree(GOLDEN / "demo_image_side", folder)
    tower = load_file(resolve_search_model("miniature").folder / "model.safetensors")
    tower = {name: tensor for name, tensor in tower.items() if name.startswith("vision_model.")}
    save_file({**tower, **load_file(folder / "visual_projection.safetensors")}, folder / "model.safetensors")
    (folder / "visual_projection.safetensors").unlink()
    return folder


def make_full_size_image_encoder(folder: Path) -> Path:
    """Write the image encoder of a model of the default configuration, with weights that are equal on every machine."""
    import torch
    from safetensors.numpy import save_file

    from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel

    with torch.device("meta"):
        state = CapivaraModel(CapivaraConfig()).state_dict()
    rng, tensors = np.random.Generator(np.random.PCG64(2024)), {}
    for name in sorted(name for name in state if name.startswith(("vision_model.", "visual_projection."))):
        integers = rng.integers(-(2**23), 2**23, tuple(state[name].shape))  # float32 represents these exactly
        tensors[name] = integers.astype(np.float32) / 2**28
    CapivaraConfig().save_pretrained(folder)
    processor_config = {"image_processor": CapivaraImageProcessor().to_dict()}
    (folder / "processor_config.json").write_text(json.dumps(processor_config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


# --- The index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["a", "b"])
def test_an_index_returns_the_same_hits(open_index, model):
    """An index works with both models that share its image encoder: the same pictures in the same order, scores within
    1e-6, and thumbnails, although the pictures themselves are elsewhere."""
    index = open_index(model)
    hits = index.search("azul em cima", k=3)
    for hit, expected in zip(hits, load_json(f"outputs/search_{model}.json"), strict=True):
        assert (hit.path, hit.width, hit.height) == (expected["path"], expected["width"], expected["height"])
        assert hit.score == pytest.approx(expected["score"], abs=1e-6)
        assert index.thumbnail(hit.path)[8:12] == b"WEBP"
    assert len({hit.score for hit in hits}) == 3, "with equal scores, the order would prove nothing"
    other = {"a": "b", "b": "a"}[model]
    difference = abs(hits[0].score - load_json(f"outputs/search_{other}.json")[0]["score"])
    assert difference > 1e-4, "the models have different text encoders"


def test_a_forgotten_folder_stays_forgotten(open_index):
    """No search returns its pictures, and no count includes them."""
    index = open_index("a")
    assert index.folders() == {f"{HOME}/Fotos": 13} and len(index) == 13
    assert index.status().skipped_files[0].path == f"{HOME}/Fotos/quebrada.jpg"
    hits = index.search("preto inteiro", k=100)
    assert len(hits) == 13 and all(hit.path.startswith(f"{HOME}/Fotos/") for hit in hits)


@pytest.mark.parametrize("model", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_folders_are_added_to_an_index_and_forgotten(home, open_index, model):
    """Pictures with known content are not embedded again, with either model, so the digests of files and of the image
    encoder are unchanged."""
    index = open_index(model)
    report = index.add(home / "Fotos")
    assert (report.embedded, report.new, len(report.skipped_files)) == (0, 13, 1) and len(index) == 26
    hits = index.search("azul em cima", k=2)
    assert {hit.path.replace(str(home), HOME) for hit in hits} == {load_json(f"outputs/search_{model}.json")[0]["path"]}
    assert hits[0].score == hits[1].score
    assert index.forget(f"{HOME}/Fotos") == 13 and len(index) == 13
    assert index.add(home / "Outras").embedded == 2


@pytest.mark.parametrize("form", ["json", "csv"])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_the_same_json_and_csv(capivara, home, name, form):
    """Programs that read the output of `capivara` get the same fields, order and figures."""
    code, text = capivara(f"{COMMANDS[name]} --{form}")
    expected = (home / "outputs" / f"{name}.{form}").read_text(encoding="utf-8")
    parse = json.loads if form == "json" else parse_csv
    assert code == 0 and parse(expected)
    assert_equal(drop_new_fields(parse(text), parse(expected)), parse(expected))


def test_status_prints_the_same_fields(capivara, home):
    """The path and the size of the index may differ. Newer fields follow the known ones."""
    code, text = capivara("status --json --model modelos/b")
    actual, expected = json.loads(text), load_json(home / "outputs" / "status.json")
    assert code == 0 and actual["bytes"] > 0 and actual["where"].endswith("fotos.lance")
    known = dict(list(actual.items())[: len(expected)])
    assert_equal(known | {"bytes": expected["bytes"], "where": expected["where"]}, expected)
    assert not any(actual[name] for name in actual.keys() - known.keys()), "newer fields are empty for an old index"


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_export_writes_the_same_table(capivara, home, tmp_path, form):
    """The columns, the rows and, in parquet files, the vectors are equal."""
    import pyarrow.parquet as pq

    assert capivara(f"exportar {tmp_path}/x.{form}")[0] == 0
    tables = []
    for path in (tmp_path / f"x.{form}", home / "outputs" / f"export.{form}"):
        rows = pq.read_table(path).to_pylist() if form == "parquet" else parse_csv(path.read_text(encoding="utf-8"))
        tables.append(sorted(rows, key=lambda row: row["path"]))
    actual, expected = tables
    assert len(expected) == 13
    assert_equal(drop_new_fields(actual, expected), expected)


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_the_same_embeddings(home, name):
    """Models, also those of runs, load with `AutoModel.from_pretrained` and embed texts and pictures as before."""
    import torch
    from safetensors.torch import load_file

    expected = load_file("vectors.safetensors")
    for embeds, kind in zip(embed(name), ("texts", "images"), strict=True):
        torch.testing.assert_close(embeds, expected[f"{name}/{kind}"], atol=1e-5, rtol=0)


def test_a_rotated_model_can_be_truncated_and_its_rotation_applied(home):
    """A model with a rotated embedding space loads. Its first 12 dimensions are embeddings, too. The matrix in
    `rotation.safetensors` converts stored vectors of its base into its space."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoProcessor

    import modeling_capivara  # noqa: F401

    expected, rotation = load_file("vectors.safetensors"), load_file("runs/rotated/rotation.safetensors")["rotation"]
    model, processor = AutoModel.from_pretrained("runs/rotated").eval(), AutoProcessor.from_pretrained("runs/rotated")
    assert model.config.matryoshka_dims == [12, 8]
    with torch.no_grad():
        inputs = processor(text=TEXTS, return_tensors="pt")
        truncated = model.get_text_features(**inputs, truncate_dim=12).pooler_output
    first_dims = torch.nn.functional.normalize(expected["runs/rotated/texts"][:, :12], dim=-1)
    torch.testing.assert_close(torch.nn.functional.normalize(truncated, dim=-1), first_dims, atol=1e-5, rtol=0)
    before, after = expected["modelos/a/images"], expected["runs/rotated/images"]
    torch.testing.assert_close(before @ rotation.T, after, atol=1e-5, rtol=0)
    assert (before - after).abs().max() > 0.1, "the rotation must change the vectors"


@pytest.mark.slow
def test_lora_adapters_load_into_their_base(home):
    """The base with the adapters of a LoRA run gives the embeddings of the run's model."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoProcessor

    import modeling_capivara  # noqa: F401

    pytest.importorskip("peft")
    model, processor = AutoModel.from_pretrained("modelos/a"), AutoProcessor.from_pretrained("modelos/a")
    model.load_adapter(str(home / "runs" / "lora" / "adapter"))
    with torch.no_grad():
        texts = model.eval().get_text_features(**processor(text=TEXTS, return_tensors="pt")).pooler_output
    texts, expected = torch.nn.functional.normalize(texts, dim=-1), load_file("vectors.safetensors")
    torch.testing.assert_close(texts, expected["runs/lora/texts"], atol=1e-5, rtol=0)
    assert (texts - expected["modelos/a/texts"]).abs().max() > 1e-4, "the adapters must change the embeddings"


@pytest.mark.parametrize("name", ["modelos/a", "modelos/b", "runs/demo", "runs/rotated"])
def test_the_digest_of_an_image_encoder_is_unchanged(home, name):
    """Indexes store it. With another digest for the same model, every picture would be embedded again."""
    digests = load_json("digests.json")
    assert get_image_digest(name) == digests[name]
    assert digests["modelos/a"] == digests["modelos/b"] == digests["runs/demo"] != digests["runs/rotated"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["miniature", "demo", "full_size"])
def test_the_digest_of_a_larger_image_encoder_is_unchanged(tmp_path, name):
    """This includes timm's towers, which miniature and demo have, and a tower of full size."""
    makers = {"demo": make_demo_image_encoder, "full_size": make_full_size_image_encoder}
    model = makers[name](tmp_path / name) if name in makers else name
    assert get_image_digest(model) == load_json(GOLDEN / "digests.json")[name]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["from_open_clip", "convert"])
def test_a_model_of_open_clip_gives_the_vectors_of_open_clip(home, tmp_path, method):
    """A folder of open_clip can be opened and converted. Its embeddings agree with open_clip's within 1e-5."""
    import torch
    from safetensors.torch import load_file

    from modeling_capivara import CapivaraModel
    from modeling_capivara.convert_open_clip import main as convert

    if method == "convert":
        pytest.importorskip("open_clip")
        folder = str(tmp_path / "converted")
        convert(["local-dir:open_clip", folder])
    else:
        folder = CapivaraModel.from_open_clip("open_clip").name_or_path
    expected = load_file("open_clip_vectors.safetensors")
    for embeds, kind in zip(embed(folder), ("texts", "images"), strict=True):
        torch.testing.assert_close(embeds, expected[kind], atol=1e-5, rtol=0)


# --- Runs and their cards --------------------------------------------------------------------------------------------


@pytest.fixture
def copy_run(home, tmp_path) -> Callable[[str, str], Path]:
    """Function that copies the folder of a run, with its card in one language as README.md."""

    def copy(run: str, language: str) -> Path:
        folder = shutil.copytree(home / "runs" / run, tmp_path / run)
        if language == "pt":
            (folder / "README.pt.md").replace(folder / "README.md")
        return folder

    return copy


@pytest.mark.parametrize("language", ["pt", "en"])
@pytest.mark.parametrize("run", RUNS)
def test_the_check_accepts_a_card_of_an_older_template(copy_run, run, language):
    """`hub_upload.card --check` checks an old card by its values and the digests of its files, not by its wording."""
    from hub_upload.card import main

    main(["--check", str(copy_run(run, language))])


@pytest.mark.parametrize(
    ("fault", "language"),
    [("value of the card", "pt"), ("value of the card", "en"), ("digest in the card", "pt"), ("value of a file", "en")],
)
def test_the_check_refuses_a_changed_digit(copy_run, fault, language):
    """The digit is changed in the card or in a result file."""
    from hub_upload.card import main

    folder = copy_run("demo", language)
    text, results = (folder / "README.md").read_text(encoding="utf-8"), folder / "results"
    if fault == "value of a file":
        path = next(results.glob("*_pt.json"))
        content = load_json(path)
        content["records"][0]["value"] += 0.01
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        pattern = r"^\|.*\d[.,]\d(\d)" if fault == "value of the card" else r"^\| `run.json` \| `[a-f]*(\d)"
        position = re.search(pattern, text, re.MULTILINE).start(1)
        text = text[:position] + str((int(text[position]) + 1) % 10) + text[position + 1 :]
        (folder / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises((SystemExit, ValueError)):
        main(["--check", str(folder)])


@pytest.mark.parametrize("run", RUNS)
def test_a_new_card_of_an_old_run_shows_its_recalls(home, tmp_path, run):
    from hub_upload.card import main

    main(["--model", f"runs/{run}", "--output", str(tmp_path / "new.md")])
    text, recalls = (tmp_path / "new.md").read_text(encoding="utf-8"), 0
    for path in Path("runs", run, "results").glob("*.json"):
        for record in load_json(path)["records"]:
            if record["metric"] == "recall@5" and record["model"] == "baseline" and not record.get("dim"):
                assert f"{100 * record['value']:.2f}" in text, record
                recalls += 1
    assert recalls == 4


@pytest.mark.slow
def test_a_stopped_run_resumes_or_is_refused_without_loss(changeable_home):
    """With `--resume auto`, a stopped run ends with the weights of an undisturbed run. Or an error of one line refuses
    it, and no file of it changes."""
    import torch
    from safetensors.torch import load_file

    import train_accelerate

    contents = read_files("runs/stopped.partial/checkpoints")
    first_steps = load_json("runs/stopped.partial/checkpoints/step-00000002/trainer.json")["curve"]
    arguments = ["--config", "demo.yaml", "--output_dir", "runs/stopped", "--resume", "auto"]
    error = get_error(lambda: train_accelerate.main(arguments))
    if error:
        assert "runs/stopped.partial" in error
        assert read_files("runs/stopped.partial/checkpoints") == contents
    else:
        weights, expected = (load_file(f"runs/{name}/model.safetensors") for name in ("stopped", "demo"))
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
        curve = load_json("runs/stopped/run.json")["curve"]
        assert curve[: len(first_steps)] == first_steps, "finished steps are not repeated, so their times are unchanged"
        assert len(curve) == 7


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_resuming_a_finished_run_is_refused_and_changes_nothing(changeable_home, run):
    import train_accelerate

    arguments = ["--config", "demo.yaml", "--output_dir", f"runs/{run}", "--resume", "auto"]
    arguments += ["--lora_rank", "2"] if run == "lora" else []
    contents = read_files(f"runs/{run}")
    error = get_error(lambda: train_accelerate.main(arguments))
    assert ("seed-0, seed-1, seed-2" if run == "seeds" else f"runs/{run}") in error
    assert read_files(f"runs/{run}") == contents and not Path(f"runs/{run}.partial").exists()


# --- Records ---------------------------------------------------------------------------------------------------------


def read_figures(path: Path | str) -> dict[tuple, float]:
    """Return the values of a result file by the fields that identify them."""
    names = ("task", "dataset", "split", "language", "direction", "metric", "n", "dim")
    values = {}
    for record in load_json(path)["records"]:
        key = (*(record.get(name) for name in names), record["protocol"] if record["task"] != "retrieval" else "")
        assert values.setdefault(key, record["value"]) == record["value"]
    assert values
    return values


MEASUREMENTS = {  # golden result file -> (command, its arguments)
    "retrieval_pt": ("retrieval", "--model modelos/a --dataset data/squares --language pt"),
    "retrieval_en": ("retrieval", "--model modelos/a --dataset data/squares --language en"),
    "retrieval_dim_12": ("retrieval", "--model runs/rotated --dataset data/squares --dim 12"),
    "classification": ("classification", "--model modelos/a --benchmark cifar-10 --images data/colours"),
    "linear_probe": (
        "linear_probe",
        "--model modelos/a --benchmark cifar-10 --images data/colours --shots 1 2 --draws 2",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "linear_probe")) for name in MEASUREMENTS]
)
def test_measuring_again_gives_the_same_figures(home, tmp_path, name, no_pictures):
    import importlib

    command, argument_text = MEASUREMENTS[name]
    importlib.import_module(f"eval.{command}").main([*argument_text.split(), "--output", str(tmp_path / "again.json")])
    assert read_figures(tmp_path / "again.json") == pytest.approx(read_figures(f"records/{name}.json"), rel=0, abs=1e-6)


@pytest.mark.slow
def test_the_suite_gives_the_same_figures(changeable_home):
    """This holds in a new folder and in the folder that the earlier version wrote."""
    from eval.suite import main

    arguments = "paper --only flickr30k-pt mnist --data_dir data/benchmarks --model modelos/a --baseline modelos/b"
    expected = shutil.copytree("records/suite", "expected")
    for output in ("again", "records/suite"):
        main([*arguments.split(), "--output", output])
        names = sorted(path.name for path in Path(expected).glob("*.json"))
        assert sorted(path.name for path in Path(output).glob("*.json")) == names and len(names) == 5
        for name in names:
            if name == "suite.json":
                assert_equal(load_json(f"{output}/{name}")["rows"], load_json(f"{expected}/{name}")["rows"])
            else:
                values = [list(read_figures(f"{folder}/{name}").values()) for folder in (output, expected)]
                assert_equal(*values)


@pytest.mark.slow
def test_a_report_reads_all_records(home, tmp_path, capsys):
    """The report reads all old result files and runs, and its page shows their figures."""
    from eval.report import main

    for folder, files in {"records": 9, "runs/demo": 2, "runs/seeds": 2}.items():
        main([folder, "--output", str(tmp_path / folder)])
        output, errors = capsys.readouterr()
        assert output.startswith(f"{files} result files") and not errors, errors
    page = (tmp_path / "records" / "index.html").read_text(encoding="utf-8")
    for record in load_json("records/retrieval_pt.json")["records"]:
        if record["metric"] == "mean_recall":
            assert f"{100 * record['value']:.2f}" in page or f"{100 * record['value']:.1f}" in page


# --- Captions --------------------------------------------------------------------------------------------------------


def read_caption_rows(folder: Path | str, cache: Path) -> dict[str, list[dict]]:
    """Read the rows of a built caption dataset with the library `datasets`."""
    from datasets import Image, load_dataset

    splits = load_dataset(str(folder), cache_dir=str(cache))
    return {name: split.cast_column("image", Image(decode=False)).to_list() for name, split in splits.items()}


def test_a_finished_build_opens(home, tmp_path):
    """A built caption dataset opens with `datasets`, and its card has the license."""
    from huggingface_hub import DatasetCard

    rows = read_caption_rows("captions/built/dataset", tmp_path)
    assert {name: len(split) for name, split in rows.items()} == {"train": 14, "test": 6}
    assert rows["train"][0]["captions-pt"] == ["azul inteiro"] and len(rows["train"][0]["similarities-pt"]) == 1
    assert rows["test"][1]["captions-pt"] == ["azul 1", "azul em cima"]
    assert DatasetCard.load("captions/built/dataset/README.md").data.license == "cc-by-4.0"


@pytest.mark.slow
def test_a_finished_build_is_not_repeated_and_can_be_trained_on(changeable_home):
    import captions.build
    import train_accelerate

    contents = read_files("captions/built")
    captions.build.main(["--config", "captions/config.yaml"])
    finished = [path for path in contents if path.suffix == ".parquet" or path.name == "README.md"]
    assert len(finished) > 5 and all(path.read_bytes() == contents[path] for path in finished)
    datasets = ["--dataset", "captions/built/dataset", "--evaluation_dataset", "data/squares"]
    train_accelerate.main(["--config", "demo.yaml", *datasets, "--output_dir", "runs/new"])
    assert load_json("runs/new/run.json")["steps"] == 6


@pytest.mark.slow
def test_a_killed_build_continues(changeable_home, tmp_path):
    """Repeating the command makes only the missing parts, and gives the rows of an undisturbed build."""
    import captions.build

    parts = {path: path.read_bytes() for path in Path("captions/half").rglob("*.parquet")}
    assert parts and not Path("captions/half/dataset").exists(), "the golden build must be unfinished"
    captions.build.main(["--config", "captions/config.yaml", "--output", "captions/half"])
    assert all(path.read_bytes() == content for path, content in parts.items())
    rows, expected = (read_caption_rows(f"captions/{name}/dataset", tmp_path) for name in ("half", "built"))
    assert_equal(rows, expected)


# --- The files themselves --------------------------------------------------------------------------------------------


def test_golden_files_are_small_and_have_no_private_paths():
    """They are stored in git. The only home folder in them is that of an invented user, Ana."""
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert len(files) > 100 and sum(path.stat().st_size for path in files) < MAX_GOLDEN_BYTES
    names = [name.encode() for name in (str(ROOT), "/tmp/", "/root/")]
    assert not [(path.name, name) for path in files for name in names if name in path.read_bytes()]

"""What lies on people's disks opens in this tree, and gives the figures that it gave.

`tests/golden/` was made by the tree of commit a876dd5 (its README says how); a later tree does not make it anew but is
held to it. The tests see what people see: commands, the Python interface and files. Each says what is promised. A
checkpoint alone may be refused, in one line; all else opens.
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
HOME = "/home/ana"  # where it was made; rows of the index have such paths
TEXTS = ["azul em cima", "SÃ£o JoÃ£o &amp; cia", "", "um gato vermelho na esquerda de uma casa " * 5]
VECTOR_PICTURES = ["Fotos/azul/azul-em-cima.jpg", "Fotos/pequena.jpg", "Outras/y.png"]
MODELS = ["modelos/a", "modelos/b", "runs/demo", "runs/lora", "runs/seeds/seed-1", "runs/rotated"]
RUNS = ["demo", "lora", "seeds", "rotated"]
MOST_BYTES = 10_000_000
LABELS = "--labels azul verde vermelho branco --template {}_inteiro"
COMMANDS = {  # file of golden outputs -> words of `capivara`
    **{f"search_{model}": f"buscar azul em cima -k 3 --all --model modelos/{model}" for model in ("a", "b")},
    "like": "buscar --all --like Fotos/verde/verde-inteiro.jpg -k 2 --since 2024-02 --until 2024-12 --model modelos/b",
    "duplicates": "duplicatas --threshold 0.95 --model modelos/b",
    "classify": f"classificar Outras {LABELS} --model modelos/a",
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A copy of all, for tests that change nothing of it."""
    folder = tmp_path_factory.mktemp("golden") / "ana"
    return shutil.copytree(GOLDEN, folder)


@pytest.fixture
def home(copied, monkeypatch) -> Iterator[Path]:
    """It, as the current folder, at the time of Greenwich."""
    for name in ("LC_ALL", "LC_MESSAGES", "CAPIVARA_INDEX", "CAPIVARA_MODEL", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(copied)  # of the test itself: what it changes afterwards is undone with this
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield copied
    time.tzset()


@pytest.fixture
def own_home(home, tmp_path, monkeypatch) -> Path:
    """A copy of it that a test may change, as the current folder."""
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "ana"))
    return tmp_path / "ana"


@pytest.fixture
def where(home, tmp_path) -> Path:
    """The index, in a copy."""
    return shutil.copytree(home / "fotos.lance", tmp_path / "fotos.lance")


@pytest.fixture
def capivara(home, where, capsys, monkeypatch) -> Iterator[Callable[[str], tuple[int, str]]]:
    """The console script on the index: exit code, and what it wrote to stdout, as it would in /home/ana."""
    handler = signal.getsignal(signal.SIGINT)
    from capivara_search.__main__ import run

    def call(words: str) -> tuple[int, str]:
        parts = [word.replace("_inteiro", " inteiro") for word in words.split()]
        monkeypatch.setattr(sys, "argv", ["capivara", *parts, "--lang", "pt", "--index", str(where)])
        with pytest.raises(SystemExit) as ended:
            run()
        return ended.value.code, capsys.readouterr().out.replace(str(home), HOME)

    yield call
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def pictures(home, where) -> Callable[[str], Any]:
    """The index by its Python interface, with a model."""
    from capivara_search.index import PictureIndex

    return lambda model: PictureIndex.open(where, model=str(home / "modelos" / model))


def check_same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Of JSON values: numbers within a tolerance, all else as it was."""
    if isinstance(expected, float) and isinstance(found, int | float):
        assert math.isclose(found, expected, rel_tol=0, abs_tol=tolerance), (found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            check_same(found[key], expected[key], tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), (found, expected)
        for one, other in zip(found, expected, strict=True):
            check_same(one, other, tolerance)
    else:
        assert found == expected


def without_new(rows: Any, known: Any) -> Any:
    """Values of hits without the fields, the last ones, that a later tree has added."""
    if isinstance(rows, list):
        return [without_new(row, known[0]) for row in rows]
    assert list(rows)[: len(known)] == list(known)
    return {name: rows[name] for name in known}


def table(text: str) -> list[dict[str, str | float]]:
    """The rows of a CSV text, numbers as numbers."""

    def cell(value: str) -> str | float:
        with contextlib.suppress(ValueError):
            return float(value)
        return value

    return [{name: cell(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def read(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def refusal(call: Callable[[], object]) -> str | None:
    """The line that a command ends with; None where it went through. More than a line is a fault."""
    try:
        call()
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def embedded(folder: Path | str) -> tuple[Any, Any]:
    """Embeddings of `TEXTS` and `VECTOR_PICTURES`, by transformers' Auto classes."""
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    import modeling_capivara  # noqa: F401 - makes them known

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in VECTOR_PICTURES]
    with torch.no_grad():
        outputs = model(**processor(text=TEXTS, images=images, return_tensors="pt"))
    return outputs.text_embeds.contiguous(), outputs.image_embeds.contiguous()


def digest_of(model: Path | str) -> str:
    """The digest of a model's image side, by which an index knows whether its vectors are of that model."""
    from capivara_search.models import find_model

    return find_model(str(model)).image_digest


def demo_image_side(folder: Path) -> Path:
    """The image side of the demo's base, in `folder`: the tower of the miniature, and what is frozen of the rest."""
    from safetensors.torch import load_file, save_file

    from capivara_search.models import find_model

    shutil.copytree(GOLDEN / "demo_image_side", folder)
    tower = load_file(find_model("miniature").folder / "model.safetensors")
    tower = {name: tensor for name, tensor in tower.items() if name.startswith("vision_model.")}
    save_file({**tower, **load_file(folder / "visual_projection.safetensors")}, folder / "model.safetensors")
    (folder / "visual_projection.safetensors").unlink()
    return folder


def full_size_image_side(folder: Path) -> Path:
    """The image side of a model of the default configuration, in `folder`, its numbers the same on every machine."""
    import torch
    from safetensors.numpy import save_file

    from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel

    with torch.device("meta"):
        state = CapivaraModel(CapivaraConfig()).state_dict()
    dice, tensors = np.random.Generator(np.random.PCG64(2024)), {}
    for name in sorted(name for name in state if name.startswith(("vision_model.", "visual_projection."))):
        whole = dice.integers(-(2**23), 2**23, tuple(state[name].shape))  # as float32 without rounding
        tensors[name] = whole.astype(np.float32) / 2**28
    CapivaraConfig().save_pretrained(folder)
    steps = {"image_processor": CapivaraImageProcessor().to_dict()}
    (folder / "processor_config.json").write_text(json.dumps(steps), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


# --- The index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["a", "b"])
def test_an_index_finds_what_it_found(pictures, model):
    """An index of before opens and is searched with either text side of its image side: the same pictures in the same
    order, scores to 1e-6, with their thumbnails, though the pictures themselves are elsewhere."""
    index = pictures(model)
    hits = index.search("azul em cima", k=3)
    for hit, expected in zip(hits, read(f"outputs/search_{model}.json"), strict=True):
        assert (hit.path, hit.width, hit.height) == (expected["path"], expected["width"], expected["height"])
        assert hit.score == pytest.approx(expected["score"], abs=1e-6)
        assert index.thumbnail(hit.path)[8:12] == b"WEBP"
    assert len({hit.score for hit in hits}) == 3, "an order of equal scores proves nothing"
    others = {"a": "b", "b": "a"}
    assert abs(hits[0].score - read(f"outputs/search_{others[model]}.json")[0]["score"]) > 1e-4, "one text side"


def test_a_forgotten_folder_stays_forgotten(pictures):
    """What was forgotten is found by no search, and counted nowhere."""
    index = pictures("a")
    assert index.folders() == {f"{HOME}/Fotos": 13} and len(index) == 13
    assert index.status().skipped_files[0].path == f"{HOME}/Fotos/quebrada.jpg"
    hits = index.search("preto inteiro", k=100)
    assert len(hits) == 13 and all(hit.path.startswith(f"{HOME}/Fotos/") for hit in hits)


@pytest.mark.parametrize("model", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_an_index_goes_on(home, pictures, model):
    """Folders are added to an index of before, and taken out of it: pictures that it knows by their content are not
    embedded again, by neither text side, so the digests of files and of the image side are the same."""
    index = pictures(model)
    added = index.add(home / "Fotos")
    assert (added.embedded, added.new, len(added.skipped_files)) == (0, 13, 1) and len(index) == 26
    pairs = index.search("azul em cima", k=2)
    assert {hit.path.replace(str(home), HOME) for hit in pairs} == {read(f"outputs/search_{model}.json")[0]["path"]}
    assert pairs[0].score == pairs[1].score
    assert index.forget(f"{HOME}/Fotos") == 13 and len(index) == 13
    assert index.add(home / "Outras").embedded == 2


@pytest.mark.parametrize("form", ["json", "csv"])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_what_they_printed(capivara, home, name, form):
    """Programs that read the JSON and CSV of `capivara` find the fields, the order and the figures that they know."""
    code, text = capivara(f"{COMMANDS[name]} --{form}")
    expected = (home / "outputs" / f"{name}.{form}").read_text(encoding="utf-8")
    parse = json.loads if form == "json" else table
    assert code == 0 and parse(expected)
    check_same(without_new(parse(text), parse(expected)), parse(expected))


def test_status_prints_what_it_printed(capivara, home):
    """The same fields and values, but for the place and its size; newer fields stand behind them."""
    code, text = capivara("status --json --model modelos/b")
    found, expected = json.loads(text), read(home / "outputs" / "status.json")
    assert code == 0 and found["bytes"] > 0 and found["where"].endswith("fotos.lance")
    known = dict(list(found.items())[: len(expected)])
    check_same(known | {"bytes": expected["bytes"], "where": expected["where"]}, expected)
    assert not any(found[name] for name in found.keys() - known.keys()), "nothing is left out by rule"


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_export_writes_what_it_wrote(capivara, home, tmp_path, form):
    """The exported table has the columns, rows and, as parquet, vectors that it had."""
    import pyarrow.parquet as pq

    assert capivara(f"exportar {tmp_path}/x.{form}")[0] == 0
    rows = []
    for path in (tmp_path / f"x.{form}", home / "outputs" / f"export.{form}"):
        found = pq.read_table(path).to_pylist() if form == "parquet" else table(path.read_text(encoding="utf-8"))
        rows.append(sorted(found, key=lambda row: row["path"]))
    assert len(rows[1]) == 13
    check_same(without_new(*rows), rows[1])


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_what_it_gave(home, name):
    """Models, also those of runs, load by `AutoModel.from_pretrained` and embed texts and pictures as they did."""
    import torch
    from safetensors.torch import load_file

    expected = load_file("vectors.safetensors")
    for found, kind in zip(embedded(name), ("texts", "images"), strict=True):
        torch.testing.assert_close(found, expected[f"{name}/{kind}"], atol=1e-5, rtol=0)


def test_a_rotated_model_is_cut_and_its_rotation_turns_vectors(home):
    """A model whose space was turned loads; its first 12 numbers are embeddings, too; and `rotation.safetensors` turns
    vectors of its base, which people may have stored, into its own."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoProcessor

    import modeling_capivara  # noqa: F401

    expected, rotation = load_file("vectors.safetensors"), load_file("runs/rotated/rotation.safetensors")["rotation"]
    model, processor = AutoModel.from_pretrained("runs/rotated").eval(), AutoProcessor.from_pretrained("runs/rotated")
    assert model.config.matryoshka_dims == [12, 8]
    with torch.no_grad():
        cut = model.get_text_features(**processor(text=TEXTS, return_tensors="pt"), truncate_dim=12).pooler_output
    wanted = torch.nn.functional.normalize(expected["runs/rotated/texts"][:, :12], dim=-1)
    torch.testing.assert_close(torch.nn.functional.normalize(cut, dim=-1), wanted, atol=1e-5, rtol=0)
    before, after = expected["modelos/a/images"], expected["runs/rotated/images"]
    torch.testing.assert_close(before @ rotation.T, after, atol=1e-5, rtol=0)
    assert (before - after).abs().max() > 0.1, "a space that was not turned"


@pytest.mark.slow
def test_adapters_fit_their_base(home):
    """The adapters that a run with LoRA keeps load into the base and give the run's model."""
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
    assert (texts - expected["modelos/a/texts"]).abs().max() > 1e-4, "adapters that change nothing"


@pytest.mark.parametrize("name", ["modelos/a", "modelos/b", "runs/demo", "runs/rotated"])
def test_the_digest_of_an_image_side_is_what_it_was(home, name):
    """Indexes note it: another digest of the same model would have every picture embedded again."""
    digests = read("digests.json")
    assert digest_of(name) == digests[name]
    assert digests["modelos/a"] == digests["modelos/b"] == digests["runs/demo"] != digests["runs/rotated"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["miniature", "demo", "full_size"])
def test_the_digest_of_a_large_image_side_is_what_it_was(tmp_path, name):
    """So it is for towers of timm, the miniature's and the demo's, and for one of full size."""
    makers = {"demo": demo_image_side, "full_size": full_size_image_side}
    model = makers[name](tmp_path / name) if name in makers else name
    assert digest_of(model) == read(GOLDEN / "digests.json")[name]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["from_open_clip", "convert"])
def test_a_model_of_open_clip_gives_open_clips_vectors(home, tmp_path, how):
    """A folder of open_clip's is opened and converted, and embeds texts and pictures as open_clip does, to 1e-5."""
    import torch
    from safetensors.torch import load_file

    from modeling_capivara import CapivaraModel
    from modeling_capivara.convert_open_clip import main as convert

    if how == "convert":
        pytest.importorskip("open_clip")
        folder = str(tmp_path / "converted")
        convert(["local-dir:open_clip", folder])
    else:
        folder = CapivaraModel.from_open_clip("open_clip").name_or_path
    expected = load_file("open_clip_vectors.safetensors")
    for found, kind in zip(embedded(folder), ("texts", "images"), strict=True):
        torch.testing.assert_close(found, expected[kind], atol=1e-5, rtol=0)


# --- Runs and their cards --------------------------------------------------------------------------------------------


@pytest.fixture
def card(home, tmp_path) -> Callable[[str, str], Path]:
    """A copy of the folder of a run with its card in a language."""

    def copy(run: str, language: str) -> Path:
        folder = shutil.copytree(home / "runs" / run, tmp_path / run)
        if language == "pt":
            (folder / "README.pt.md").replace(folder / "README.md")
        return folder

    return copy


@pytest.mark.parametrize("language", ["pt", "en"])
@pytest.mark.parametrize("run", RUNS)
def test_a_card_of_before_agrees_with_its_run(card, run, language):
    """`hub_upload.card --check` finds no fault in a card of before: a card of an older template is checked by its
    values and the digests of its files, and not refused for its words."""
    from hub_upload.card import main

    main(["--check", str(card(run, language))])


@pytest.mark.parametrize(
    ("fault", "language"),
    [("value of the card", "pt"), ("value of the card", "en"), ("digest in the card", "pt"), ("value of a file", "en")],
)
def test_a_card_of_before_that_lies_is_refused(card, fault, language):
    """As it was, `--check` sees a changed digit, in the card or in its files."""
    from hub_upload.card import main

    folder = card("demo", language)
    text, results = (folder / "README.md").read_text(encoding="utf-8"), folder / "results"
    if fault == "value of a file":
        path = next(results.glob("*_pt.json"))
        content = read(path)
        content["records"][0]["value"] += 0.01
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        pattern = r"^\|.*\d[.,]\d(\d)" if fault == "value of the card" else r"^\| `run.json` \| `[a-f]*(\d)"
        place = re.search(pattern, text, re.MULTILINE).start(1)
        text = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        (folder / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises((SystemExit, ValueError)):
        main(["--check", str(folder)])


@pytest.mark.parametrize("run", RUNS)
def test_a_new_card_of_a_run_of_before_has_its_values(home, tmp_path, run):
    """A card is made of the files of a run of before, and shows its recalls."""
    from hub_upload.card import main

    main(["--model", f"runs/{run}", "--output", str(tmp_path / "new.md")])
    text, shown = (tmp_path / "new.md").read_text(encoding="utf-8"), 0
    for path in Path("runs", run, "results").glob("*.json"):
        for record in read(path)["records"]:
            if record["metric"] == "recall@5" and record["model"] == "baseline" and not record.get("dim"):
                assert f"{100 * record['value']:.2f}" in text, record
                shown += 1
    assert shown == 4


@pytest.mark.slow
def test_a_stopped_run_goes_on_or_says_why_not(own_home):
    """A run that was stopped goes on by `--resume auto` and ends as the undisturbed one did; or it is said in one line
    that it can't, and nothing of it is lost."""
    import torch
    from safetensors.torch import load_file

    import train_accelerate

    before = {path: path.read_bytes() for path in Path("runs/stopped.partial/checkpoints").rglob("*") if path.is_file()}
    done = read("runs/stopped.partial/checkpoints/step-00000002/trainer.json")["curve"]
    words = ["--config", "demo.yaml", "--output_dir", "runs/stopped", "--resume", "auto"]
    line = refusal(lambda: train_accelerate.main(words))
    if line:
        assert "runs/stopped.partial" in line
        assert all(path.read_bytes() == content for path, content in before.items())
    else:
        found, expected = (load_file(f"runs/{name}/model.safetensors") for name in ("stopped", "demo"))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        curve = read("runs/stopped/run.json")["curve"]
        assert curve[: len(done)] == done and len(curve) == 7, (
            "what was done is not done again: even its times are there"
        )


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_finished_run_is_left_alone(own_home, run):
    """It is said in one line why a complete run of before does not go on; no file of it changes."""
    import train_accelerate

    words = ["--config", "demo.yaml", "--output_dir", f"runs/{run}", "--resume", "auto"]
    words += ["--lora_rank", "2"] * (run == "lora")
    kept = lambda: {path: path.read_bytes() for path in Path("runs", run).rglob("*") if path.is_file()}  # noqa: E731
    before = kept()
    line = refusal(lambda: train_accelerate.main(words))
    assert ("seed-0, seed-1, seed-2" if run == "seeds" else "of an earlier version of the program") in line
    assert kept() == before and not Path(f"runs/{run}.partial").exists()


# --- Records ---------------------------------------------------------------------------------------------------------


def figures(path: Path | str) -> dict[tuple, float]:
    """What a result file has measured."""
    names = ("task", "dataset", "split", "language", "direction", "metric", "n", "dim")
    found = {}
    for record in read(path)["records"]:
        key = (*(record.get(name) for name in names), record["protocol"] if record["task"] != "retrieval" else "")
        assert found.setdefault(key, record["value"]) == record["value"]
    assert found
    return found


MEASURED = {
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
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "linear_probe")) for name in MEASURED]
)
def test_a_measurement_is_what_it_was(home, tmp_path, name, no_pictures):
    """Model and data of before, measured again, give the figures of the records, to 1e-6."""
    import importlib

    command, words = MEASURED[name]
    importlib.import_module(f"eval.{command}").main([*words.split(), "--output", str(tmp_path / "again.json")])
    found, expected = figures(tmp_path / "again.json"), figures(f"records/{name}.json")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6), key


@pytest.mark.slow
def test_a_suite_is_what_it_was(own_home):
    """The suite measures what it did, and goes on in the folder that it has written before."""
    from eval.suite import main

    words = "paper --only flickr30k-pt mnist --data_dir data/benchmarks --model modelos/a --baseline modelos/b"
    kept = shutil.copytree("records/suite", "kept")
    for output in ("again", "records/suite"):
        main([*words.split(), "--output", output])
        names = sorted(path.name for path in Path(kept).glob("*.json"))
        assert sorted(path.name for path in Path(output).glob("*.json")) == names and len(names) == 5
        for name in names:
            if name == "suite.json":
                check_same(read(f"{output}/{name}")["rows"], read(f"kept/{name}")["rows"])
            else:
                check_same(list(figures(f"{output}/{name}").values()), list(figures(f"kept/{name}").values()))


@pytest.mark.slow
def test_a_report_reads_all_records(home, tmp_path, capsys):
    """Result files and runs of before are read by the report, none is left out, and their figures are on its page."""
    from eval.report import main

    for folder, files in {"records": 9, "runs/demo": 2, "runs/seeds": 2}.items():
        main([folder, "--output", str(tmp_path / folder)])
        output, errors = capsys.readouterr()
        assert output.startswith(f"{files} result files") and not errors, errors
    page = (tmp_path / "records" / "index.html").read_text(encoding="utf-8")
    for record in read("records/retrieval_pt.json")["records"]:
        if record["metric"] == "mean_recall":
            assert f"{100 * record['value']:.2f}" in page or f"{100 * record['value']:.1f}" in page


# --- Captions --------------------------------------------------------------------------------------------------------


def caption_rows(folder: Path | str, cache: Path) -> dict[str, list[dict]]:
    """The rows of a data set that was built, by `datasets` itself."""
    from datasets import Image, load_dataset

    splits = load_dataset(str(folder), cache_dir=str(cache))
    return {name: split.cast_column("image", Image(decode=False)).to_list() for name, split in splits.items()}


def test_a_finished_build_opens(home, tmp_path):
    """A caption data set that was built opens by `datasets`, with its captions, and its card has its licence."""
    from huggingface_hub import DatasetCard

    rows = caption_rows("captions/built/dataset", tmp_path)
    assert {name: len(split) for name, split in rows.items()} == {"train": 14, "test": 6}
    assert rows["train"][0]["captions-pt"] == ["azul inteiro"] and len(rows["train"][0]["similarities-pt"]) == 1
    assert rows["test"][1]["captions-pt"] == ["azul 1", "azul em cima"]
    assert DatasetCard.load("captions/built/dataset/README.md").data.license == "cc-by-4.0"


@pytest.mark.slow
def test_a_finished_build_is_left_alone_and_trained_on(own_home):
    """The build that is done is not done again; a run trains on its data set."""
    import captions.build
    import train_accelerate

    before = {path: path.read_bytes() for path in Path("captions/built").rglob("*") if path.is_file()}
    captions.build.main(["--config", "captions/config.yaml"])
    kept = [path for path in before if path.suffix == ".parquet" or path.name == "README.md"]
    assert len(kept) > 5 and all(path.read_bytes() == before[path] for path in kept)
    words = ["--dataset", "captions/built/dataset", "--evaluation_dataset", "data/squares", "--output_dir", "runs/new"]
    train_accelerate.main(["--config", "demo.yaml", *words])
    assert read("runs/new/run.json")["steps"] == 6


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on(own_home, tmp_path):
    """The same command finishes a build that was killed: its parts are not made again, and it ends in the rows of the
    undisturbed one."""
    import captions.build

    parts = {path: path.read_bytes() for path in Path("captions/half").rglob("*.parquet")}
    assert parts and not Path("captions/half/dataset").exists(), "it was not killed within"
    captions.build.main(["--config", "captions/config.yaml", "--output", "captions/half"])
    assert all(path.read_bytes() == content for path, content in parts.items())
    check_same(caption_rows("captions/half/dataset", tmp_path), caption_rows("captions/built/dataset", tmp_path))


# --- The files themselves --------------------------------------------------------------------------------------------


def test_golden_files_are_small_and_name_no_machine():
    """They are kept in git, so they are small, and hold no folder but that of the Ana who is none."""
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert len(files) > 100 and sum(path.stat().st_size for path in files) < MOST_BYTES
    names = [name.encode() for name in (str(ROOT), "/tmp/", "/root/")]
    assert not [(path.name, name) for path in files for name in names if name in path.read_bytes()]

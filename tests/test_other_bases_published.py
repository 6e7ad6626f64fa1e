"""Card, export, push and figures of a run on SigLIP or CLIP, which have classes of transformers."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from card_run import card_of, short_run, split_card
from hub_client import hub_commands
from made_benchmarks import make_data
from safetensors.torch import load_file, save_file
from tiny import draw_nothing
from towers import MAKERS, gemma_like, siglip2

from capivara_common.files import read_json
from capivara_common.image_encoder_digest import image_encoder_digest
from eval import report, retrieval, suite
from hub_upload.card import find_card_faults, write_card
from hub_upload.export import export_model, main

PUBLISHED_FORMATS = "transformers,open_clip,sentence_transformers"  # formats that a push after a run exports
WORDS = ["um gato azul", "um céu verde", "uma foto vermelha", "um quadrado branco"]
CLASS_AND_LOSS = {"siglip": ("SiglipModel", "sigmoid"), "clip": ("CLIPModel", "contrastive")}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=CLASS_AND_LOSS)
def run(request, tmp_path_factory, tiny_dataset_folder):
    """A short run on SigLIP 2 or CLIP, with relative paths, so that it contains no path of this machine."""
    make = MAKERS[request.param] if request.param == "clip" else lambda base: siglip2(base, gemma_like(WORDS, 320))
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return short_run(tmp_path_factory.mktemp(request.param), tiny_dataset_folder, make, max_steps=2)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """The export that a push makes of the run. Tests must change copies only."""
    folder = tmp_path_factory.mktemp("exported") / "made"
    export_model(run, folder, PUBLISHED_FORMATS.split(","))
    return folder


@pytest.fixture(scope="module")
def graphs(run, tmp_path_factory) -> Path:
    """An export of the run with ONNX graphs and a card."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("graphs") / "made"
    export_model(run, folder, ["transformers", "onnx"])
    write_card(folder)
    return folder


@pytest.fixture
def kind(run) -> str:
    return read_json(run / "config.json")["model_type"]


def printed(code: str, folder: Path) -> str:
    """Run a code block of a card in a folder and return what it prints."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "card", "exec"), {"__name__": "card"})
    return out.getvalue()


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_card_names_class_and_loss_and_its_code_runs(run, exported, kind, language, tmp_path):
    for source, name in ((run, "run"), (exported, "made")):
        folder = shutil.copytree(source, tmp_path / name)
        write_card(folder, language=language)
        assert find_card_faults(folder) == []
    data, body = split_card(card_of(tmp_path / "made"))
    assert kind in data["tags"] and "sentence-transformers" in data["tags"]
    assert not re.search(r"trust_remote_code|modeling_capivara|XLM|examples\.caption|get_text_features|MIT licen", body)
    model_class, loss = CLASS_AND_LOSS[kind]
    if language == "pt":
        loss = {"sigmoid": "sigmoide", "contrastive": "contrastiva"}[loss]
    assert f"`{model_class}`" in body and re.search(rf"\b(the {loss} loss|perda {loss})\b", body)
    assert f"{64 if kind == 'siglip' else 77} tokens" in body and f": {32 if kind == 'siglip' else 24}." in body
    assert ('padding="max_length"' in body) == (kind == "siglip")
    inputs, package, classify, sentences = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    scores = re.findall(r"0\.\d+", printed(inputs + package, tmp_path / "made"))
    assert len(scores) == 4 and (".sigmoid()" if kind == "siglip" else ".softmax(dim=-1)") in package
    assert printed(inputs + classify, tmp_path / "made").count("'score'") == 3
    assert printed(inputs + sentences, tmp_path / "made").startswith("tensor([[")


def test_a_run_and_its_export_are_pushed(run, kind, tmp_path):
    """The folder of the run also has files of open_clip here, which are pushed too."""
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.copyfile(run / "model.safetensors", folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text("{}", encoding="utf-8")
    write_card(folder)  # the files of open_clip add a section to the card
    with hub_commands(tmp_path) as commands:
        done = commands("--model", folder, "--repo-id", "us/run", "--push")
        assert done.code == 0, done.err
        files = set(commands.hub.files("us/run"))
        assert files >= {"open_clip_model.safetensors", "open_clip_config.json", "model.safetensors", "run.json"}
        made = tmp_path / "made"
        done = commands("--model", run, "--output", made, "--formats", PUBLISHED_FORMATS, call="hub_upload.export:main")
        assert done.code == 0 and "open_clip is skipped" in done.err, done.err
        write_card(made, repo_id="us/model")
        assert commands("--model", made, "--repo-id", "us/model", "--push").code == 0
        sent = commands.hub.files("us/model")
    assert {"modules.json", "sentence_bert_config.json", "1_Normalize/config.json", "README.md"} <= set(sent)
    assert not [name for name in sent if name.endswith(".py")]
    ours, theirs = load_file(run / "model.safetensors"), load_file(made / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rule = json.loads(sent["sentence_bert_config.json"]).get("processing_kwargs")
    assert rule == ({"text": {"padding": "max_length", "max_length": 64}} if kind == "siglip" else None)


@pytest.mark.parametrize("alone", ["drop_in", "immich"])
def test_the_text_encoder_of_a_siglip_run_is_exported_and_clip_is_refused(run, kind, alone, tmp_path):
    """If the image encoder of the base differs, the export fails in one line and writes nothing."""
    output, base = tmp_path / "made", shutil.copytree(run.parent / "base", tmp_path / "base")
    words = ["--model", str(run), "--output", str(output), "--formats", alone, "--base"]
    if kind == "clip":
        with pytest.raises(ValueError, match=r"^[^\n]*\bclip\b[^\n]*--formats transformers,onnx[^\n]*$"):
            main([*words, str(base)])
        return
    weights, name = load_file(base / "model.safetensors"), "vision_model.post_layernorm.bias"
    save_file({**weights, name: weights[name] + 1e-6}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(str(base))}[^\n]*$"):
        main([*words, str(base)])
    assert not output.exists()
    main([*words, str(run.parent / "base")])
    made = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    if alone == "immich":
        textual = ("model.onnx", "tokenizer.json", "tokenizer_config.json")
        assert made == {"config.json", *(f"textual/{name}" for name in textual)}
    else:
        assert {"model.safetensors", "onnx/text_model.onnx", "tokenizer.json"} <= made and "modules.json" not in made
        assert read_json(output / "drop_in.json")["image_digest"] == image_encoder_digest(run.parent / "base")


def test_a_text_config_is_refused_for_other_classes(run, tmp_path):
    with pytest.raises(ValueError, match=r"^--text_config [^\n]*$"):
        main(
            [
                "--model",
                str(run),
                "--output",
                str(tmp_path / "made"),
                "--formats",
                PUBLISHED_FORMATS,
                "--text_config",
                str(run),
            ]
        )
    assert not (tmp_path / "made").exists()


def test_results_suite_and_report_name_class_and_loss(run, kind, tmp_path, capsys):
    named, output = dict(zip(("model_class", "loss"), CLASS_AND_LOSS[kind], strict=True)), tmp_path / "results"
    words = ["--model", str(run), "--dataset", str(run.parent / "data/squares"), "--output", str(output / "cut.json")]
    retrieval.main([*words, "--dim", "16"])
    cut = read_json(output / "cut.json")
    assert cut | named == cut and {record["dim"] for record in cut["records"]} == {16}
    with pytest.raises(ValueError, match=rf"\bdim\b.* {32 if kind == 'siglip' else 24}\b.*99"):
        retrieval.main([*words, "--dim", "99"])
    ours = read_json(next((run / "results").glob("*_pt.json")))
    assert ours | named == ours
    make_data(tmp_path / "data" / "mnist", "mnist")
    folders = ["--output", str(output / "suite"), "--data_dir", str(tmp_path / "data"), "--only", "mnist"]
    suite.main(["--model", str(run), "--baseline", str(run.parent / "base"), *folders])
    (table,) = re.findall(r"Models: .*", capsys.readouterr().out)
    assert table.count(f"({named['model_class']}, {named['loss']} loss)") == 2
    shutil.copytree(run, output / "run")
    report.main([str(output), "--output", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert f"model class: {named['model_class']};" in page and f"<td>{named['loss']}</td>" in page


def test_card_and_report_show_the_published_figure_of_the_base(run, kind, tmp_path):
    """Only if the same number of captions in the same language was measured, and only for bases with a figure."""
    folder = shutil.copytree(run, tmp_path / "results" / "run")
    content = read_json(next((run / "results").glob("*_pt.json")))
    content |= {"model": "google/siglip2-base-patch16-224" if kind == "siglip" else "openai/clip-vit-base-patch32"}
    xm3600 = {"dataset": "xm3600-first", "n": 3600}
    content["records"] = [record | xm3600 for record in content["records"] if record["metric"] == "mean_recall"]
    (folder / "results" / "xm3600.json").write_text(json.dumps(content), encoding="utf-8")
    for language, figure in {"en": "published for the base: 77.54", "pt": "publicado do modelo de base: 77,54"}.items():
        write_card(folder, language=language)
        assert find_card_faults(folder) == []
        line = re.search(rf"^\| [^\n]* \|\n(\n?)- [^|\n]*, {figure} \(\[\w+\]\(https://", card_of(folder), re.MULTILINE)
        assert bool(line) == (kind == "siglip")
    report.main([str(tmp_path / "results"), "--output", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    baseline = re.search(r'baseline: <data value="0\.7754\d*">77\.5</data>, <a href="https://', page)
    assert bool(baseline) == (kind == "siglip")


def test_the_onnx_code_of_the_card_runs(graphs, tmp_path):
    folder = shutil.copytree(graphs, tmp_path / "made")
    assert find_card_faults(folder) == []
    example_inputs, *_, block = re.findall(r"```python\n(.*?)```", card_of(folder), re.DOTALL)
    assert "onnxruntime" in block and printed(example_inputs + block, folder).startswith("[[")

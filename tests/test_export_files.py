"""Which files an export writes, what it refuses to publish, and how it reports damaged models and wrong flags."""

import json
import os
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from test_layout import MODEL_FILES

from hub_upload import export as export_module
from hub_upload.export import DEFAULT_FORMATS, export_model, main
from hub_upload.upload_checks import (
    ALLOWED_FILES,
    MODEL_CODE,
    check_model_files,
    list_and_check_files_to_send,
    list_uploadable_model_files,
)

TOKEN = "hf_" + "a1B2c3" * 6
STRAY = [
    *("optimizer.bin", "training_args.bin", "trainer.log", "skipped.jsonl", "records.json", "table.md", "notes.txt"),
    *("checkpoints/step-1/model.safetensors", "checkpoints/step-1/optimizer.bin", "trackers/events.out", "secret.png"),
    *(".cache/huggingface/token", "adapter/adapter_model.safetensors", "results/a.gallery/000001.jpg", "x/config.json"),
    *("a.queries.png", "results/a.queries.png"),
    *("my_capivara.py", "pytorch_model.bin", "model.safetensors.tmp", ".env", "results/deep/b.json"),
]


@pytest.fixture
def run_folder(tiny_folder):
    """A model as a training run leaves it, with many files that must not be published."""
    for name in STRAY:
        (tiny_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny_folder / name).write_bytes(b"private")
    home, current_folder = Path.home(), Path.cwd()
    run = {
        "config": {
            "model": str(current_folder / "data/openmoji/base"),
            "dataset": [f"{home}/my data/squares", "laicsiifes/flickr30k-pt-br"],
            "output_dir": "/srv/runs/mine",
            "image_embedding_cache": "auto",
            "learning_rate": 1e-4,
        },
        "note": f"see {home}/notes.txt, and https://example.org/home/page or 3 images/s",
    }
    (tiny_folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (tiny_folder / "results/a.json").write_text(
        json.dumps(
            {"command": f"python -m eval.retrieval --model={current_folder}/runs/x", "records": [{"text": "ação"}]}
        )
    )
    (tiny_folder / "README.md").write_text("---\nlicense: mit\n---\n\n![Queries](a.queries.png)\n", encoding="utf-8")
    for name in ("curves.png", "retrieval.png"):
        PIL.Image.new("RGB", (2, 2)).save(tiny_folder / name)
    return tiny_folder


def export(folder: Path, output: Path, **arguments) -> list[str]:
    """Export a model for transformers and return the names of the files."""
    return [name for name, _ in export_model(folder, output, ["transformers"], **arguments)]


def test_only_allowed_files_are_written(run_folder, tmp_path):
    save_file({"rotation": torch.eye(24)}, run_folder / "rotation.safetensors")  # written by runs with matryoshka_dims
    names = export(run_folder, tmp_path / "repository")
    assert names == [
        *("README.md", "checks_capivara.py", "config.json", "configuration_capivara.py"),
        "curves.png",
        *("image_processing_capivara.py", "model.safetensors"),
        *("modeling_capivara.py", "processing_capivara.py", "processor_config.json", "results/a.json"),
        *("retrieval.png", "rotation.safetensors", "run.json", "text_cleaning_capivara.py"),
        *("tokenization_capivara.py", "tokenizer.json"),
        "tokenizer_config.json",
    ]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "repository").rglob("*") if path.is_file()} == {0o644}
    assert set(map(str, list_uploadable_model_files(tmp_path / "repository"))) == set(names)
    (run_folder / "special_tokens_map.json").symlink_to(run_folder / "trainer.log")
    for name in (*STRAY, "special_tokens_map.json"):  # even if the folder of the run itself is pushed
        assert Path(name) not in list_uploadable_model_files(run_folder)


def test_paths_in_records_are_made_relative(run_folder, tmp_path):
    export(run_folder, tmp_path / "repository")
    run = json.loads((tmp_path / "repository" / "run.json").read_text(encoding="utf-8"))
    assert run["config"]["model"] == "data/openmoji/base" and run["config"]["output_dir"] == "mine"
    assert run["config"]["dataset"] == ["squares", "laicsiifes/flickr30k-pt-br"]
    assert run["note"] == "see notes.txt, and https://example.org/home/page or 3 images/s"
    result = (tmp_path / "repository" / "results" / "a.json").read_text(encoding="utf-8")
    assert "--model=runs/x" in result and "ação" in result
    for path in (tmp_path / "repository").rglob("*"):
        if path.is_file():
            assert os.getcwd().encode() not in path.read_bytes(), path


def test_an_export_of_one_seed_has_the_results_of_all_seeds(run_folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    run_folder.rename(run / "seed-1")
    (run / "seed-1" / "results").rename(run / "results")
    assert "results/a.json" in export(run / "seed-1", tmp_path / "repository")
    with pytest.raises(ValueError, match=r"config\.json.*seed-1"):
        export(run, tmp_path / "other")


TEXTS = [
    ("README.md", "# A\n\nTrained in {home}/runs.", r"README\.md, line 3, .*'{home}/runs\.'"),
    ("README.md", f"\n\ntoken {TOKEN}", r"README\.md, line 3, .*hf_…"),
    ("run.json", json.dumps({"a": 1, "token": TOKEN}, indent=1), r"run\.json, line 3, .*token"),
    ("results/a.json", json.dumps({"hub": f"Bearer {TOKEN}"}), r"results/a\.json, line 2, .*token"),
]


@pytest.mark.parametrize(("name", "text", "message"), TEXTS)
def test_a_path_or_token_in_a_text_file_is_refused_with_file_and_line(run_folder, tmp_path, name, text, message):
    home = str(Path.home())
    (run_folder / name).write_text(text.replace("{home}", home), encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("{home}", home)) as caught:
        export(run_folder, tmp_path / "repository")
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / "repository").exists()


def test_a_path_of_this_machine_in_an_onnx_graph_is_refused(tiny_folder):
    path = str(Path.cwd() / "modeling.py").encode()
    check_model_files(tiny_folder)
    (tiny_folder / "onnx").mkdir()
    (tiny_folder / "onnx/text_model.onnx").write_bytes(b"\0" * 100 + path)
    with pytest.raises(ValueError, match=rf"onnx/text_model\.onnx .*{re.escape(str(Path.cwd()))}"):
        check_model_files(tiny_folder)


@pytest.mark.parametrize("text", ["ghp_" + "a1B2" * 9, "seen at\n/data1/maria/x"])
def test_texts_in_weights_and_images_are_searched(tiny_folder, text):
    weights = load_file(tiny_folder / "model.safetensors")
    save_file(weights, tiny_folder / "model.safetensors", metadata={"note": text})
    with pytest.raises(ValueError, match=r"model\.safetensors, in its header"):
        check_model_files(tiny_folder)
    save_file(weights, tiny_folder / "model.safetensors")
    for is_compressed in (False, True):
        comment = PngInfo()
        comment.add_text("Comment", text, zip=is_compressed)
        PIL.Image.new("RGB", (2, 2)).save(tiny_folder / "curves.png", pnginfo=comment)
        with pytest.raises(ValueError, match=r"curves\.png, "):
            check_model_files(tiny_folder)


@pytest.mark.parametrize("content", [b"", (2000).to_bytes(8, "little") + b"{}"])
def test_a_damaged_safetensors_header_is_refused(tiny_folder, content):
    (tiny_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        check_model_files(tiny_folder)


def test_all_model_files_of_the_package_are_allowed():
    assert sorted(MODEL_CODE) == sorted(Path(name).name for name in MODEL_FILES)
    assert set(MODEL_CODE) <= set(ALLOWED_FILES)


def test_code_is_copied_from_the_package_and_not_from_the_model_folder(tiny_folder, tmp_path):
    (tiny_folder / "modeling_capivara.py").write_text("raise SystemExit", encoding="utf-8")
    export(tiny_folder, tmp_path / "repository")
    auto_map = json.loads((tmp_path / "repository/config.json").read_text(encoding="utf-8"))["auto_map"]
    assert {reference.partition(".")[0] + ".py" for reference in auto_map.values()} <= set(MODEL_CODE)
    for name in MODEL_CODE:
        source = Path(export_module.__file__).parents[1] / "modeling_capivara" / name
        assert (tmp_path / "repository" / name).read_bytes() == source.read_bytes()


# --- Bad input -------------------------------------------------------------------------------------------------------


BAD_FOLDERS = {
    "missing folder": (shutil.rmtree, "folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "another model type": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "bert"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 1000), r"model\.safetensors"),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "processor"),
    "truncated run.json": (lambda f: (f / "run.json").write_text('{"config":'), r"run\.json"),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_an_incomplete_model_folder_is_refused(tiny_folder, tmp_path, fault):
    change, message = BAD_FOLDERS[fault]
    change(tiny_folder)
    with pytest.raises(ValueError, match=message) as caught:
        export(tiny_folder, tmp_path / "repository")
    assert "\n" not in str(caught.value) and ".tmp-" not in str(caught.value)
    assert not (tmp_path / "repository").exists() and not list(tmp_path.glob(".*.tmp-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "transformers,openclip"], "'openclip'.*transformers, open_clip"),
        (["--formats", " , "], "--formats .*transformers, open_clip"),
        (["--repo_id", "my-model"], "owner/name.*'my-model'"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(tiny_folder, tmp_path, flags, message):
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        main(["--model", str(tiny_folder), "--output", str(tmp_path / "repository"), *flags])
    assert not (tmp_path / "repository").exists()


def test_a_filled_output_folder_is_replaced_only_with_the_flag(tiny_folder, tmp_path, capsys):
    output = tmp_path / "repository"
    output.mkdir()
    (output / "mine").write_text("mine")
    command = ["--model", str(tiny_folder), "--output", str(output), "--formats", "transformers"]
    with pytest.raises(ValueError, match=r"--overwrite_output_dir"):
        main(command)
    assert [path.name for path in output.iterdir()] == ["mine"]
    main([*command, "--overwrite_output_dir"])
    assert not (output / "mine").exists() and (output / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "MB  model.safetensors" in printed and f"MB  in {output}" in printed


def test_the_model_itself_is_not_overwritten(tiny_folder):
    for output in (tiny_folder, tiny_folder.parent):
        with pytest.raises(ValueError, match=re.escape(str(tiny_folder))):
            export(tiny_folder, output, overwrite=True)
    assert (tiny_folder / "model.safetensors").is_file()


def test_a_missing_package_names_the_extra_to_install(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("capivara_common.environment.find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(ImportError, match=r'onnxscript.*pip install -e "\.\[onnx\]"$'):
        export_model(tiny_folder, tmp_path / "repository", DEFAULT_FORMATS)
    assert not (tmp_path / "repository").exists()


def test_a_push_sends_only_allowed_files(tiny_folder, tmp_path):
    names = export(tiny_folder, tmp_path / "repository")
    for name in STRAY:
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(b"private")
    assert set(map(str, list_and_check_files_to_send(tmp_path / "repository", "model"))) == set(names)

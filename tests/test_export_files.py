"""What a repository holds and what stays on the machine; input that is not what it should be."""

import json
import os
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from test_layout import MODEL_FILES

from hub_upload import export as export_module
from hub_upload.allowed_files import (
    ALLOWED_FILES,
    MODEL_CODE,
    check_model_files,
    list_allowed_files,
    list_files_to_send,
)
from hub_upload.export import DEFAULT_FORMATS, export_model, main

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
    """A model as a training run leaves it, with much beside it."""
    for name in STRAY:
        (tiny_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny_folder / name).write_bytes(b"private")
    home, here = Path.home(), Path.cwd()
    run = {
        "config": {
            "model": str(here / "data/openmoji/base"),
            "dataset": [f"{home}/my data/squares", "laicsiifes/flickr30k-pt-br"],
            "output_dir": "/srv/runs/mine",
            "image_embedding_cache": "auto",
            "learning_rate": 1e-4,
        },
        "note": f"see {home}/notes.txt, and https://example.org/home/page or 3 images/s",
    }
    (tiny_folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (tiny_folder / "results/a.json").write_text(
        json.dumps({"command": f"python -m eval.retrieval --model={here}/runs/x", "records": [{"text": "ação"}]})
    )
    (tiny_folder / "README.md").write_text("---\nlicense: mit\n---\n\n![Queries](a.queries.png)\n", encoding="utf-8")
    for name in ("curves.png", "retrieval.png"):
        PIL.Image.new("RGB", (2, 2)).save(tiny_folder / name)
    return tiny_folder


def exported(folder: Path, output: Path, **arguments) -> list[str]:
    return [name for name, _ in export_model(folder, output, ["transformers"], **arguments)]


def test_only_files_of_the_list_are_written(run_folder, tmp_path):
    save_file({"rotation": torch.eye(24)}, run_folder / "rotation.safetensors")  # of a run with matryoshka_dims
    names = exported(run_folder, tmp_path / "repository")
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
    assert set(map(str, list_allowed_files(tmp_path / "repository"))) == set(names)
    (run_folder / "special_tokens_map.json").symlink_to(run_folder / "trainer.log")
    for name in (*STRAY, "special_tokens_map.json"):  # the run's own folder, were it sent as it is
        assert Path(name) not in list_allowed_files(run_folder)


def test_paths_in_records_are_made_relative(run_folder, tmp_path):
    exported(run_folder, tmp_path / "repository")
    run = json.loads((tmp_path / "repository" / "run.json").read_text(encoding="utf-8"))
    assert run["config"]["model"] == "data/openmoji/base" and run["config"]["output_dir"] == "mine"
    assert run["config"]["dataset"] == ["squares", "laicsiifes/flickr30k-pt-br"]
    assert run["note"] == "see notes.txt, and https://example.org/home/page or 3 images/s"
    result = (tmp_path / "repository" / "results" / "a.json").read_text(encoding="utf-8")
    assert "--model=runs/x" in result and "ação" in result
    for path in (tmp_path / "repository").rglob("*"):
        if path.is_file():
            assert os.getcwd().encode() not in path.read_bytes(), path


def test_records_of_a_run_of_several_seeds(run_folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    run_folder.rename(run / "seed-1")
    (run / "seed-1" / "results").rename(run / "results")
    assert "results/a.json" in exported(run / "seed-1", tmp_path / "repository")
    with pytest.raises(ValueError, match=r"several seeds; name one of seed-1 in it"):
        exported(run, tmp_path / "other")


TEXTS = [
    ("README.md", "# A\n\nTrained in {home}/runs.", r"README\.md, line 3, names a place .*'{home}/runs\.'"),
    ("README.md", f"\n\ntoken {TOKEN}", r"README\.md, line 3, holds what looks like an access token or key \(hf_…\)"),
    ("run.json", json.dumps({"a": 1, "token": TOKEN}, indent=1), r"run\.json, line 3, .*token"),
    ("results/a.json", json.dumps({"hub": f"Bearer {TOKEN}"}), r"results/a\.json, line 2, .*token"),
]


@pytest.mark.parametrize(("name", "text", "message"), TEXTS)
def test_a_path_or_a_token_in_a_text_is_refused_by_file_and_line(run_folder, tmp_path, name, text, message):
    home = str(Path.home())
    (run_folder / name).write_text(text.replace("{home}", home), encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("{home}", home)) as caught:
        exported(run_folder, tmp_path / "repository")
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / "repository").exists()


def test_a_path_in_a_binary_file_is_noticed(tiny_folder):
    path = str(Path.cwd() / "modeling.py").encode()
    check_model_files(tiny_folder)
    (tiny_folder / "onnx").mkdir()
    (tiny_folder / "onnx/text_model.onnx").write_bytes(b"\0" * 100 + path)
    with pytest.raises(ValueError, match=r"onnx/text_model\.onnx names a place on this machine"):
        check_model_files(tiny_folder)


@pytest.mark.parametrize("text", ["ghp_" + "a1B2" * 9, "seen at\n/data1/maria/x"])
def test_words_in_a_binary_file_are_searched(tiny_folder, text):
    weights, found = load_file(tiny_folder / "model.safetensors"), "holds|names a place"
    save_file(weights, tiny_folder / "model.safetensors", metadata={"note": text})
    with pytest.raises(ValueError, match=rf"model\.safetensors, its header, ({found})"):
        check_model_files(tiny_folder)
    save_file(weights, tiny_folder / "model.safetensors")
    for is_compressed in (False, True):
        comment = PngInfo()
        comment.add_text("Comment", text, zip=is_compressed)
        PIL.Image.new("RGB", (2, 2)).save(tiny_folder / "curves.png", pnginfo=comment)
        with pytest.raises(ValueError, match=rf"curves\.png, .*({found})"):
            check_model_files(tiny_folder)


@pytest.mark.parametrize("content", [b"", (2000).to_bytes(8, "little") + b"{}"])
def test_a_damaged_header_is_named(tiny_folder, content):
    (tiny_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        check_model_files(tiny_folder)


def test_the_list_names_the_model_files_of_the_package():
    assert sorted(MODEL_CODE) == sorted(Path(name).name for name in MODEL_FILES)
    assert set(MODEL_CODE) <= set(ALLOWED_FILES)


def test_code_is_the_packages_and_not_the_sources(tiny_folder, tmp_path):
    (tiny_folder / "modeling_capivara.py").write_text("raise SystemExit", encoding="utf-8")
    exported(tiny_folder, tmp_path / "repository")
    named = json.loads((tmp_path / "repository/config.json").read_text(encoding="utf-8"))["auto_map"]
    assert {where.partition(".")[0] + ".py" for where in named.values()} <= set(MODEL_CODE)
    for name in MODEL_CODE:
        own = Path(export_module.__file__).parents[1] / "modeling_capivara" / name
        assert (tmp_path / "repository" / name).read_bytes() == own.read_bytes()


# --- Bad input -------------------------------------------------------------------------------------------------------


BAD_FOLDERS = {
    "gone": (shutil.rmtree, "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no model \(config.json is missing\)"),
    "of another kind": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "taken are capivara"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no weights \(model.safetensors is missing\)"),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors can't be read"),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "has no processor"),
    "torn run": (lambda f: (f / "run.json").write_text('{"config":'), "run.json is not JSON"),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_folder_that_is_no_whole_model(tiny_folder, tmp_path, fault):
    change, message = BAD_FOLDERS[fault]
    change(tiny_folder)
    with pytest.raises(ValueError, match=message) as caught:
        exported(tiny_folder, tmp_path / "repository")
    assert "\n" not in str(caught.value) and ".tmp-" not in str(caught.value)
    assert not (tmp_path / "repository").exists() and not list(tmp_path.glob(".*.tmp-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "transformers,openclip"], "no format 'openclip'; there are transformers, open_clip"),
        (["--formats", " , "], "--formats is empty; name some of transformers, open_clip"),
        (["--repo_id", "my-model"], "must be owner/name"),
    ],
)
def test_wrong_flags_are_one_line(tiny_folder, tmp_path, flags, message):
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        main(["--model", str(tiny_folder), "--output", str(tmp_path / "repository"), *flags])
    assert not (tmp_path / "repository").exists()


def test_output_is_replaced_only_when_asked(tiny_folder, tmp_path, capsys):
    output = tmp_path / "repository"
    output.mkdir()
    (output / "mine").write_text("mine")
    command = ["--model", str(tiny_folder), "--output", str(output), "--formats", "transformers"]
    with pytest.raises(ValueError, match=r"is not empty.*--overwrite_output_dir"):
        main(command)
    assert [path.name for path in output.iterdir()] == ["mine"]
    main([*command, "--overwrite_output_dir"])
    assert not (output / "mine").exists() and (output / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "MB  model.safetensors" in printed and f"MB  in {output}" in printed


def test_the_model_itself_is_not_overwritten(tiny_folder):
    for output in (tiny_folder, tiny_folder.parent):
        with pytest.raises(ValueError, match="which would be replaced"):
            exported(tiny_folder, output, overwrite=True)
    assert (tiny_folder / "model.safetensors").is_file()


def test_a_missing_extra_says_how_to_get_it(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("capivara_common.environment.find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(ImportError, match=r'needs onnxscript, .*: pip install -e "\.\[onnx\]"$'):
        export_model(tiny_folder, tmp_path / "repository", DEFAULT_FORMATS)
    assert not (tmp_path / "repository").exists()


def test_a_push_sends_the_files_of_the_list_alone(tiny_folder, tmp_path):
    names = exported(tiny_folder, tmp_path / "repository")
    for name in STRAY:
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(b"private")
    assert set(map(str, list_files_to_send(tmp_path / "repository", "model"))) == set(names)

"""The README's figures are those of the committed JSON, and its code runs."""

import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import readme

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_figures_are_those_of_the_json():
    assert readme.filled(TEXT) == TEXT, "run `python -m benchmarks.readme`"


def test_a_changed_digit_is_noticed(monkeypatch, tmp_path):
    block = re.search(r"<!-- encode: .*?<!-- end encode -->", TEXT, re.DOTALL)[0]
    digit = re.search(r"\d\.\d", block)[0]
    changed = TEXT.replace(block, block.replace(digit, "9" + digit, 1))
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    assert readme.filled(changed) == TEXT != changed


def test_code_runs(tiny_folder, capsys):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    assert code.count("data/openmoji/base") == 1
    exec(compile(code.replace("data/openmoji/base", str(tiny_folder)), "README.md", "exec"), {})
    assert "vermelho" in capsys.readouterr().out


def test_the_trainer_example_runs(tiny_model, tiny_processor, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in BLOCKS if "ExactBatchTrainer" in block)
    captions = ["um gato", "a casa azul", "o carro", "pão"]
    pairs = [{"caption": text, "image": Image.new("RGB", (40, 37), (40 * i, 9, 9))} for i, text in enumerate(captions)]
    names = {"model": tiny_model, "processor": tiny_processor, "pairs": pairs}
    exec(compile(code, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 3


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m ([\w.]+)", TEXT)) - {"pip", "pytest"}))
def test_commands_exist(command):
    path = ROOT / command.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file(), target


def test_the_metric_example_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = (block for block in BLOCKS if "evaluate.load" in block)
    exec(compile(code, "README.md", "exec"), {})
    assert "{'recall_at_k': 0.5}" in capsys.readouterr().out

"""The README's figures are those of the committed JSON, and its code runs."""

import re
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m ([\w.]+)", TEXT)) - {"pip", "pytest"}))
def test_commands_exist(command):
    path = ROOT / command.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file(), target


def test_the_metric_example_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert "{'recall_at_k': 0.5}" in capsys.readouterr().out

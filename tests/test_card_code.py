"""The code examples of a card run as printed, in a process without this project unless the example imports it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from card_run import split_card, trained_run
from hub_client import hub_commands

from hub_upload.card import find_differences_between_card_and_files, write_card
from modeling_capivara import CapivaraConfig

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("open_clip", "sentence_transformers", "onnxruntime", "onnxscript")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
]
BLOCKS = ("package", "pipeline", "open_clip", "sentence-transformers", "ONNX")  # in the order of the card
NUMBER = r"-?\d+\.?\d*(?:e-?\d+)?"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_dataset_folder, tiny_processor):
    return trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor)


def code_blocks(folder: Path) -> dict[str, str]:
    """Return the code examples in the card of a folder, each preceded by the images and texts that all of them use."""
    _, body = split_card((folder / "README.md").read_text(encoding="utf-8"))
    inputs, *examples = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    return {name: inputs + code for name, code in zip(BLOCKS, examples, strict=True)}


# Runs each script in a fork of a process that has already imported the slow libraries, but nothing of this project.
FORKS = """
import json, os, runpy, sys, traceback
import onnxruntime, open_clip, sentence_transformers, transformers.pipelines
for line in sys.stdin:
    script, places = json.loads(line)
    if not (child := os.fork()):
        sys.path[:0] = places
        os.dup2(os.open(script + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        try:
            runpy.run_path(script, run_name="__main__")
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # a normal exit would wait for threads that do not exist in a fork
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def scripts(folder: Path, environment: dict[str, str]) -> Iterator[Callable[[str], list[float]]]:
    """Yield a function that runs code as a script outside the checkout and returns the numbers that it prints."""
    (folder / "elsewhere").mkdir()
    variables = {key: value for key, value in {**os.environ, **environment}.items() if key != "PYTHONPATH"}
    variables |= {"HF_MODULES_CACHE": str(folder / "modules")}
    with (folder / "stderr").open("w") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True, "bufsize": 1}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", FORKS], cwd=folder / "elsewhere", env=variables, **pipes
        )

    def run(code: str) -> list[float]:
        script = folder / "elsewhere" / "block.py"
        script.write_text(code, encoding="utf-8")
        process.stdin.write(json.dumps([str(script), [str(ROOT)] * ("import modeling_capivara" in code)]) + "\n")
        assert process.stdout.readline() == "0\n", f"{code}\n{(folder / 'stderr').read_text()[-3000:]}"
        return [float(number) for number in re.findall(NUMBER, script.with_suffix(".py.out").read_text())]

    with process:
        yield run


def assert_blocks_agree(printed: dict[str, list[float]]) -> None:
    """Assert that all code examples print the same probabilities or the same cosines."""
    assert len(printed["package"]) == 4 and sum(printed["package"]) == pytest.approx(2, abs=1e-3)
    assert printed["open_clip"] == pytest.approx(printed["package"], abs=2e-3)  # examples print four digits
    assert printed["remote code"] == pytest.approx(printed["package"], abs=2e-3)
    assert len(printed["ONNX"]) == 4 and printed["sentence-transformers"] == pytest.approx(printed["ONNX"], abs=2e-3)
    assert sum(printed["pipeline"]) == pytest.approx(1, abs=1e-3)


def test_code_examples_load_a_pushed_model_from_the_hub(run, tmp_path):
    exported = tmp_path / "exported"
    with hub_commands(tmp_path) as commands:
        hub = commands.hub
        CapivaraConfig.from_pretrained(run).text_config.save_pretrained(tmp_path / "text")
        hub.store("us/text-tower", tmp_path / "text")
        flags = ["--output", exported, "--text_config", "us/text-tower", "--repo_id", "us/model"]
        done = commands("--model", run, *flags, call="hub_upload.export:main")
        assert done.code == 0 and "us/text-tower" in done.err, done.err
        write_card(exported, repo_id="us/model", language="pt")
        portuguese = code_blocks(exported)
        write_card(exported, repo_id="us/model")
        assert find_differences_between_card_and_files(exported) == []
        without_comments = [
            re.sub(r"# .*", "", "".join(texts.values())) for texts in (code_blocks(exported), portuguese)
        ]
        assert without_comments[0] == without_comments[1] and code_blocks(exported) != portuguese
        done = commands("--model", exported, "--repo-id", "us/model", "--push")
        assert done.code == 0, done.err
        # The card tells how to change the first example if the package is not installed.
        code = code_blocks(exported)["package"].replace("import modeling_capivara", "")
        examples = {**code_blocks(exported), "remote code": code.replace("(name)", "(name, trust_remote_code=True)")}
        with scripts(tmp_path, hub.environment(tmp_path / "reader")) as run_script:
            printed = {name: run_script(code) for name, code in examples.items()}
    assert {"us/model/model.safetensors", "us/model/open_clip_model.safetensors"} <= {*hub.fetched}
    assert_blocks_agree(printed)

"""The code of a card runs as it is printed, in a process that knows nothing of this project unless the card says so."""

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

from hub_upload.card import find_card_faults, write_card
from modeling_capivara import CapivaraConfig

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("open_clip", "sentence_transformers", "onnxruntime", "onnxscript")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
]
BLOCKS = ("package", "pipeline", "open_clip", "sentence-transformers", "ONNX")  # in the card's order
NUMBER = r"-?\d+\.?\d*(?:e-?\d+)?"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_dataset_folder, tiny_processor):
    return trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor)


def blocks(folder: Path) -> dict[str, str]:
    _, body = split_card((folder / "README.md").read_text(encoding="utf-8"))
    given, *found = re.findall(r"```python\n(.*?)```", body, re.DOTALL)  # the first is for all
    return {name: given + code for name, code in zip(BLOCKS, found, strict=True)}


# Each script in a fork of its own, of a process that has imported what takes long, and nothing of ours.
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
        os._exit(0)  # threads that a fork does not have are not waited for
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def scripts(folder: Path, environment: dict[str, str]) -> Iterator[Callable[[str], list[float]]]:
    """Within it a block of code is run as a script, far from the checkout; returns the numbers that it prints."""
    (folder / "elsewhere").mkdir()
    kept = {key: value for key, value in {**os.environ, **environment}.items() if key != "PYTHONPATH"}
    kept |= {"HF_MODULES_CACHE": str(folder / "modules")}
    with (folder / "stderr").open("w") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True, "bufsize": 1}
        process = subprocess.Popen([sys.executable, "-P", "-c", FORKS], cwd=folder / "elsewhere", env=kept, **pipes)

    def run(code: str) -> list[float]:
        script = folder / "elsewhere" / "block.py"
        script.write_text(code, encoding="utf-8")
        process.stdin.write(json.dumps([str(script), [str(ROOT)] * ("import modeling_capivara" in code)]) + "\n")
        assert process.stdout.readline() == "0\n", f"{code}\n{(folder / 'stderr').read_text()[-3000:]}"
        return [float(number) for number in re.findall(NUMBER, script.with_suffix(".py.out").read_text())]

    with process:
        yield run


def assert_blocks_agree(found: dict[str, list[float]]) -> None:
    """Two loaders' probabilities are equal, and two loaders' cosines; what the others print has its shape."""
    assert len(found["package"]) == 4 and sum(found["package"]) == pytest.approx(2, abs=1e-3)
    assert found["open_clip"] == pytest.approx(found["package"], abs=2e-3)  # printed to four digits
    assert found["remote code"] == pytest.approx(found["package"], abs=2e-3)
    assert len(found["ONNX"]) == 4 and found["sentence-transformers"] == pytest.approx(found["ONNX"], abs=2e-3)
    assert sum(found["pipeline"]) == pytest.approx(1, abs=1e-3)


def test_code_for_a_repository_on_the_hub(run, tmp_path):
    """What was exported for a Hub id and pushed there is what every loader fetches from it."""
    made = tmp_path / "made"
    with hub_commands(tmp_path) as commands:
        hub = commands.hub
        CapivaraConfig.from_pretrained(run).text_config.save_pretrained(tmp_path / "text")
        hub.store("us/text-tower", tmp_path / "text")
        flags = ["--output", made, "--text_config", "us/text-tower", "--repo_id", "us/model"]
        done = commands("--model", run, *flags, call="hub_upload.export:main")
        assert done.code == 0 and "text tower from us/text-tower, tokenizer from us/model." in done.err, done.err
        write_card(made, repo_id="us/model", language="pt")
        portuguese = blocks(made)
        write_card(made, repo_id="us/model")
        assert find_card_faults(made) == []
        without_comments = [re.sub(r"# .*", "", "".join(texts.values())) for texts in (blocks(made), portuguese)]
        assert without_comments[0] == without_comments[1] and blocks(made) != portuguese
        done = commands("--model", made, "--repo-id", "us/model", "--push")
        assert done.code == 0, done.err
        # As the card says of the package's block, where the package is not installed
        code = blocks(made)["package"].replace("import modeling_capivara", "")
        of_hub = {**blocks(made), "remote code": code.replace("(name)", "(name, trust_remote_code=True)")}
        with scripts(tmp_path, hub.environment(tmp_path / "reader")) as run_script:
            found = {name: run_script(code) for name, code in of_hub.items()}
    assert {"us/model/model.safetensors", "us/model/open_clip_model.safetensors"} <= {*hub.fetched}
    assert_blocks_agree(found)

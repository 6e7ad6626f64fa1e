"""The code of a card runs as it is printed, in a process that knows nothing of this project unless the card says so."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from card_run import split_card, trained_run
from hub_client import hub_commands

from hub_upload.card import check, write_card
from modeling_capivara import CapivaraConfig

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("open_clip", "sentence_transformers", "onnxruntime", "onnxscript")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
]
BLOCKS = ("package", "pipeline", "open_clip", "sentence-transformers", "ONNX")  # in the card's order


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_dataset_folder, tiny_processor):
    return trained_run(tmp_path_factory, tiny_dataset_folder, tiny_processor)


def blocks(folder: Path) -> dict[str, str]:
    _, body = split_card((folder / "README.md").read_text(encoding="utf-8"))
    given, *found = re.findall(r"```python\n(.*?)```", body, re.DOTALL)  # the first is for all
    return {name: given + code for name, code in zip(BLOCKS, found, strict=True)}


def numbers_printed(code: str, cwd: Path, folder: Path, **environment: str) -> list[float]:
    """Run a block of code as a script; the numbers that it prints."""
    (folder / "scripts").mkdir(exist_ok=True)
    script = folder / "scripts" / "block.py"
    script.write_text(code, encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules"), **environment}
    if "import modeling_capivara" in code:
        kept["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=cwd, env=kept, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", done.stdout)]


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
        environment = {key: value for key, value in hub.environment(tmp_path / "reader").items() if key != "PYTHONPATH"}
        CapivaraConfig.from_pretrained(run).text_config.save_pretrained(tmp_path / "text")
        hub.store("us/text-tower", tmp_path / "text")
        flags = ["--output", made, "--text_config", "us/text-tower", "--repo_id", "us/model"]
        done = commands("--model", run, *flags, call="hub_upload.export:main")
        assert done.code == 0 and "text tower from us/text-tower, tokenizer from us/model." in done.err, done.err
        write_card(made, repo_id="us/model", language="pt")
        portuguese = blocks(made)
        write_card(made, repo_id="us/model")
        assert check(made) == []
        without_comments = [re.sub(r"# .*", "", "".join(texts.values())) for texts in (blocks(made), portuguese)]
        assert without_comments[0] == without_comments[1] and blocks(made) != portuguese
        done = commands("--model", made, "--repo-id", "us/model", "--push")
        assert done.code == 0, done.err
        (tmp_path / "elsewhere").mkdir()
        found = {
            name: numbers_printed(code, tmp_path / "elsewhere", tmp_path, **environment)
            for name, code in blocks(made).items()
        }
        # As the card says of the package's block, where the package is not installed
        code = blocks(made)["package"].replace("import modeling_capivara", "")
        code = code.replace("(name)", "(name, trust_remote_code=True)")
        found["remote code"] = numbers_printed(code, tmp_path / "elsewhere", tmp_path, **environment)
    assert {"us/model/model.safetensors", "us/model/open_clip_model.safetensors"} <= {*hub.fetched}
    assert_blocks_agree(found)

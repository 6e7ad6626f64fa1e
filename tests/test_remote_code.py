"""A saved model folder works in processes that do not have the package (`trust_remote_code=True`)."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

LABELS = ["um gato", "SÃ£o JoÃ£o &amp;amp; cia", "um <pad> gato " * 40]
# Checks that tests/loader_process.py does not do: the other Auto classes, and saving what was loaded.
WITHOUT_PACKAGE = """
import json, sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer, pipeline
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor
LABELS = json.loads(sys.argv.pop())
folder, copy = sys.argv[1:]
kwargs = {"trust_remote_code": True}
model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **kwargs)
processor = AutoProcessor.from_pretrained(folder, **kwargs)
parts = [model, processor, processor.image_processor, AutoImageProcessor.from_pretrained(folder, **kwargs)]
parts += [AutoTokenizer.from_pretrained(folder, **kwargs), processor.tokenizer]
parts.append(AutoModelForImageClassification.from_pretrained(folder, num_labels=3, **kwargs))
parts.append(AutoModelForZeroShotImageClassification.from_pretrained(folder, **kwargs))
image = Image.new("RGB", (40, 37), (200, 30, 30))
inputs = processor(images=image, text=LABELS, return_tensors="pt")
features = pipeline("image-feature-extraction", folder, **kwargs)(image)
model.save_pretrained(copy)
processor.save_pretrained(copy)
again = AutoModel.from_pretrained(copy, **kwargs)
parts[-1].save_pretrained(copy + "-zero-shot")
print(json.dumps({
    "modules": [type(part).__module__ for part in parts],
    "faults": [str(v) for v in report.values() if v],
    "logits": model(**inputs).logits_per_text.tolist(),
    "classes": list(parts[-2](pixel_values=inputs["pixel_values"]).logits.shape),
    "again": again(**inputs).logits_per_text.tolist(),
    "features": features,
}))
"""


@pytest.mark.slow
def test_without_the_package(tiny_folder, tiny_model, tiny_processor, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # -I and these lines also remove the folder of an editable installation from the path.
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
    hide += f"sys.path = [p for p in sys.path if p not in ({os.getcwd()!r}, '')]\n"
    arguments = [str(tiny_folder), str(tmp_path / "copy"), json.dumps(LABELS)]
    completed = subprocess.run(
        [sys.executable, "-I", "-c", hide + WITHOUT_PACKAGE, *arguments],
        capture_output=True, text=True, timeout=180, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    results = json.loads(completed.stdout.splitlines()[-1])
    assert all(module.startswith("transformers_modules") for module in results["modules"]), results["modules"]
    assert not results["faults"]
    image = Image.new("RGB", (40, 37), (200, 30, 30))
    inputs = tiny_processor(images=image, text=LABELS, return_tensors="pt")
    expected = tiny_model(**inputs)
    torch.testing.assert_close(torch.tensor(results["logits"]), expected.logits_per_text)
    assert results["again"] == results["logits"]
    torch.testing.assert_close(torch.tensor(results["features"]), expected.image_embeds)
    assert results["classes"] == [1, 3]
    # A model that was loaded with `trust_remote_code=True` is saved with its code.
    auto_map = json.loads((tiny_folder / "config.json").read_text())["auto_map"]
    for copy in ("copy", "copy-zero-shot"):
        assert json.loads((tmp_path / copy / "config.json").read_text())["auto_map"] == auto_map
    names = [{path.name for path in folder.iterdir()} for folder in (tiny_folder, tmp_path / "copy")]
    assert names[0] == names[1]
    modeling = {"modeling_capivara.py", "configuration_capivara.py"}
    assert {path.name for path in (tmp_path / "copy-zero-shot").iterdir()} >= modeling


def test_a_folder_has_only_json_code_and_safetensors(tiny_folder):
    assert {path.suffix for path in tiny_folder.iterdir()} == {".json", ".py", ".safetensors"}

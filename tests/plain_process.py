"""Embed images and texts with transformers alone, in a process that can't import this project.

    python -I plain_process.py INPUTS OUTPUT FOLDER...

INPUTS is a JSON file with `texts` and `images` (paths). For each model FOLDER, the .npz file OUTPUT gets the arrays
`FOLDER/texts` and `FOLDER/images`.
"""

import json
import sys
from pathlib import Path

HIDDEN = "editable"  # part of the name of the import hook of an editable installation
sys.meta_path = [finder for finder in sys.meta_path if HIDDEN not in str(finder)]
assert not any((Path(entry) / "modeling_capivara").exists() for entry in sys.path), "the package can be imported"

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

INPUTS, OUTPUT, *FOLDERS = sys.argv[1:]
request = json.loads(Path(INPUTS).read_text(encoding="utf-8"))
images = [Image.open(path) for path in request["images"]]
code, arrays = {"trust_remote_code": True}, {}
for folder in FOLDERS:
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **code)
    assert not [fault for fault in report.values() if fault], report
    processor = AutoProcessor.from_pretrained(folder, **code)
    padding = {"padding": "max_length", "max_length": 64} if model.config.model_type == "siglip" else {"padding": True}
    with torch.no_grad():
        output = model(**processor(text=request["texts"], images=images, return_tensors="pt", **padding))
    arrays |= {f"{folder}/texts": output.text_embeds.numpy(), f"{folder}/images": output.image_embeds.numpy()}
np.savez(OUTPUT, **arrays)

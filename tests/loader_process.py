"""Embed images and texts with the loaders of other libraries, in a process that can't import this project.

    python loader_process.py LOADER,LOADER REPOSITORY INPUTS OUTPUT

INPUTS is a folder with `*.png` and `texts.json`. OUTPUT is an .npz file with `LOADER/images` and `LOADER/texts`.
"""

import json
import sys
from pathlib import Path

HIDDEN = "editable"  # part of the name of the import hook of an editable installation
sys.meta_path = [finder for finder in sys.meta_path if HIDDEN not in str(finder)]

import numpy as np
import torch
from PIL import Image

NAMES, REPOSITORY, INPUTS, OUTPUT = sys.argv[1:]
PICTURES = [Image.open(path) for path in sorted(Path(INPUTS).glob("*.png"))]
TEXTS = json.loads((Path(INPUTS) / "texts.json").read_text(encoding="utf-8"))


def transformers():
    assert not any((Path(entry) / "modeling_capivara").exists() for entry in sys.path), "the package can be imported"
    from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline

    code = {"trust_remote_code": True}
    model, report = AutoModel.from_pretrained(REPOSITORY, output_loading_info=True, **code)
    assert not [fault for fault in report.values() if fault], report
    processor = AutoProcessor.from_pretrained(REPOSITORY, **code)
    output = model(**processor(text=TEXTS, images=PICTURES, return_tensors="pt"))
    classify = pipeline("zero-shot-image-classification", REPOSITORY, **code)
    scores = classify(PICTURES[0].convert("RGB"), candidate_labels=["gato", "carro"], hypothesis_template="um {}")
    assert abs(sum(score["score"] for score in scores) - 1) < 1e-5
    alone = AutoTokenizer.from_pretrained(REPOSITORY, **code)
    assert dict(alone(TEXTS, padding=True)) == dict(processor(text=TEXTS)), "the tokenizer alone gives other ids"
    return output.image_embeds, output.text_embeds


def open_clip():
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(REPOSITORY)
    tokenizer = open_clip.get_tokenizer(REPOSITORY)
    model.eval()
    pixels = torch.stack([preprocess(picture) for picture in PICTURES])
    return model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(TEXTS), normalize=True)


def sentence_transformers():
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(REPOSITORY, trust_remote_code=True, device="cpu")
    images, texts = model.encode(PICTURES), model.encode(TEXTS)
    assert model.similarity(texts, images).shape == (len(texts), len(images))
    truncating_model = SentenceTransformer(REPOSITORY, trust_remote_code=True, device="cpu", truncate_dim=6)
    short = [truncating_model.encode(TEXTS), truncating_model.encode(PICTURES)]
    assert [embeds.shape[1] for embeds in short] == [6, 6]
    expected = [torch.nn.functional.normalize(torch.from_numpy(embeds[:, :6]), dim=-1) for embeds in (texts, images)]
    torch.testing.assert_close(truncating_model.similarity(*short), expected[0] @ expected[1].T)
    return torch.from_numpy(images), torch.from_numpy(texts)


def onnx():
    import onnxruntime
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(REPOSITORY, trust_remote_code=True)
    vision, text = (onnxruntime.InferenceSession(f"{REPOSITORY}/onnx/{kind}_model.onnx") for kind in ("vision", "text"))
    pixels = processor(images=PICTURES, return_tensors="np")["pixel_values"]
    # Batch sizes and lengths that the export did not use.
    batches = [TEXTS[:1], TEXTS[1:]]
    tokens = [dict(processor(text=batch, return_tensors="np")) for batch in batches]
    texts = [text.run(["text_embeds"], batch)[0] for batch in tokens]
    images = [vision.run(["image_embeds"], {"pixel_values": part})[0] for part in (pixels[:1], pixels[1:])]
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(texts))


embeddings = {}
for name in NAMES.split(","):
    with torch.no_grad():
        image_embeds, text_embeds = globals()[name]()
    embeddings |= {f"{name}/images": image_embeds.float().numpy(), f"{name}/texts": text_embeds.float().numpy()}
np.savez(OUTPUT, **embeddings)

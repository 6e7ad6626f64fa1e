"""Export of the text encoder: each program gives the model's embeddings; it is refused if images would not fit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_TEXT, save_model
from tokenizers import normalizers
from towers import TOWER, gemma_like, other_texts, siglip2
from transformers import PreTrainedTokenizerFast, SiglipConfig

from capivara_common.image_encoder_digest import image_encoder_digest
from hub_upload.export import main
from hub_upload.formats import onnx as onnx_files
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.convert_open_clip import new_open_clip_model, to_open_clip_state_dict
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import compute_image_embeds, embed_texts, pad_batch, random_images, tokenize

TEXTS = ["um gato", "uma capivara na água, ao pôr do sol", "SÃ£o JoÃ£o &amp;amp; cia", "", "foto " * 90, "ﬁm ½ ☕"]
# Curly quotes and combining accents, as a phone's keyboard writes them.
TYPED = ["“um gato” no copo d’água", "a\u0301gua e ‘coração’"]
# Texts with the same token ids with and without the code in the folder.
PLAIN = [text for text in TEXTS if "Ã" not in text and text == " ".join(text.split())] + ["foto " * 600 + "verde"]
PLAIN += TYPED
FILES = {
    *("README.md", "drop_in.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("tokenization_capivara.py", "text_cleaning_capivara.py", "checks_capivara.py"),
    *("modules.json", "sentence_bert_config.json"),
    *("config_sentence_transformers.json", "1_Pooling/config.json", "open_clip_text.safetensors"),
    *("onnx/text_model.onnx", "onnx/text_model.onnx_data", "onnx/quantisation.json"),
}
DENSES = {f"{name}/{file}" for name in ("2_Dense", "3_Dense") for file in ("config.json", "model.safetensors")}
# Runs the code blocks of a card, with and without trust_remote_code, in a process without this project.
READER = """
import json, re, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import numpy as np
from transformers import AutoModel

texts, plain = json.loads(sys.argv[1]), json.loads(sys.argv[2])
card = open("README.md", encoding="utf-8").read()
first, *blocks = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
embeddings = {}
for block in blocks:
    if "load_state_dict" in block:
        continue
    for ending, code, inputs in ("", block, texts), ("_without_code", block.replace("=True)", "=False)"), plain):
        names = {}
        exec(first, names)
        names["texts"] = inputs
        exec(code, names)
        if "SentenceTransformer" in names:
            embeddings["sentence_transformers" + ending] = names["model"].encode(inputs)
        elif "graph" in names:
            embeddings["onnx" + ending] = names["graph"].run(["text_embeds"], names["inputs"])[0]
        else:
            embeddings["transformers" + ending] = names["embeds"].numpy()
if "SentenceTransformer" in card:
    _, report = AutoModel.from_pretrained(".", add_pooling_layer=False, output_loading_info=True)
    assert not [fault for fault in report.values() if fault], report
assert "modeling_capivara" not in sys.modules
np.savez(sys.argv[3], **embeddings)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_processor):
    return save_model(tmp_path_factory.mktemp("base") / "base", tiny_processor)


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    return other_texts(base, tmp_path_factory.mktemp("model") / "trained")


def export(model: Path, base: Path, output: Path, *flags: str) -> Path:
    """Export the text encoder of a model and return the folder."""
    main(["--model", str(model), "--base", str(base), "--output", str(output), "--formats", "drop_in", *flags])
    return output


@pytest.fixture(scope="module", params=["capivara", "siglip"])
def exported(request, xlmr, tiny_processor, tmp_path_factory):
    """A base, a model and its exported text encoder.

    CAPIVARA has the real vocabulary. SigLIP has an image tower that open_clip supports and a narrow text tower.
    """
    folder = tmp_path_factory.mktemp("exported")
    if request.param == "siglip":
        tokenizer, vision = gemma_like(TEXTS, 400), TOWER | {"hidden_size": 768, "intermediate_size": 3072}
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Replace(" ", "▁")  # does not lowercase, so lost capitals would show
        kwargs = {name: getattr(tokenizer, name) for name in ("pad_token", "eos_token", "unk_token", "padding_side")}
        kwargs |= {"model_max_length": 64, "model_input_names": ["input_ids"]}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)
        vision |= {"num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 256, "patch_size": 32}
        text = TOWER | {"vocab_size": len(tokenizer), "pad_token_id": 0, "projection_size": 768}
        siglip2(folder / "base", tokenizer, SiglipConfig(text_config=text, vision_config=vision))
    else:
        processor = CapivaraProcessor(tiny_processor.image_processor, xlmr[0].tokenizer)
        save_model(folder / "base", processor, text_config={**TINY_TEXT, "vocab_size": 250002})
    model = other_texts(folder / "base", folder / "model")
    return folder / "base", model, export(model, folder / "base", folder / "text_side")


@pytest.fixture
def no_onnx(monkeypatch):
    """Skip the export to ONNX, which takes seconds."""

    def write_onnx(folder, source, towers):
        (folder / "onnx").mkdir()
        (folder / "onnx/quantisation.json").write_text('{"graphs": {}}')

    monkeypatch.setattr(onnx_files, "write_onnx", write_onnx)


def embeddings(folder: Path, texts: list[str] = TEXTS) -> np.ndarray:
    """Return the text embeddings of a model."""
    return embed_texts(load_model(folder).eval(), load_processor(folder), texts).numpy()


def run_card_code(folder: Path, output: Path) -> dict[str, np.ndarray]:
    """Run the code of a folder's card and return the embeddings of each program."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(output / "modules")}
    words = [json.dumps(TEXTS), json.dumps(PLAIN), str(output / "found.npz")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr
    return dict(np.load(output / "found.npz"))


# --- Embeddings of each program --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_code_of_the_card_gives_the_embeddings_of_the_model(exported, tmp_path):
    base, model, text_side = exported
    actual, expected = run_card_code(text_side, tmp_path), embeddings(model)
    assert np.abs(expected - embeddings(base)).max() > 0.01, "the base has the same embeddings, which proves nothing"
    programs = {"onnx", "sentence_transformers" if (text_side / "modules.json").exists() else "transformers"}
    assert actual.keys() == {*programs, *(f"{program}_without_code" for program in programs)}
    plain = embeddings(model, PLAIN)
    for program, embeds in actual.items():
        expected_embeds = plain if program.endswith("without_code") else expected
        np.testing.assert_allclose(embeds, expected_embeds, rtol=0, atol=1e-5, err_msg=program)


@pytest.mark.slow
@torch.no_grad()
def test_open_clip_loads_the_text_encoder_and_keeps_its_image_embeddings(exported, tmp_path):
    base, model, text_side = exported
    ours, processor = load_model(base).eval(), load_processor(base)
    is_capivara = isinstance(ours, CapivaraModel)
    if is_capivara:
        theirs = new_open_clip_model(ours.config)
        theirs.load_state_dict(to_open_clip_state_dict(ours))
    else:
        main(["--model", str(base), "--output", str(tmp_path / "whole"), "--formats", "transformers,open_clip"])
        theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'whole'}")
    pictures = [image.convert("RGB") for image in random_images()]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    before = theirs.eval().encode_image(pixels, normalize=True)
    (code,) = (block for block in code_blocks(text_side) if "load_state_dict" in block)
    exec(code, {"model": theirs, "folder": str(text_side)})
    if is_capivara:
        ids = processor(text=TEXTS, return_tensors="pt", padding="max_length")["input_ids"]
    else:
        card = (text_side / "README.md").read_text(encoding="utf-8")
        (call,) = re.findall(r"`(open_clip\.tokenizer\.HFTokenizer\(.*?\))`", card)
        texts = ["um gato", "Uma CAPIVARA, na água!"]
        ids = eval(call, {"open_clip": open_clip, "folder": str(text_side)})(texts)
        assert ids.tolist() == pad_batch(processor, tokenize(processor, texts))["input_ids"].tolist()
        ids = pad_batch(processor, tokenize(processor, TEXTS))["input_ids"]
    np.testing.assert_allclose(theirs.encode_text(ids, normalize=True), embeddings(model), rtol=0, atol=1e-5)
    assert torch.equal(theirs.encode_image(pixels, normalize=True), before)
    torch.testing.assert_close(before, compute_image_embeds(ours, pixels), rtol=0, atol=1e-5)
    assert torch.equal(theirs.logit_scale, load_model(model).logit_scale.reshape(()))


def code_blocks(folder: Path) -> list[str]:
    """Return the Python code blocks in the card of a folder."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_a_linear_projection_is_exported_as_one_layer(tiny_processor, no_onnx, tmp_path):
    from sentence_transformers import SentenceTransformer

    base = save_model(tmp_path / "base", tiny_processor, text_projection_type="linear")
    model = other_texts(base, tmp_path / "model")
    folder = export(model, base, tmp_path / "text_side")
    actual = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(actual, embeddings(model), rtol=0, atol=1e-5)
    assert (folder / "2_Dense").exists() and not (folder / "3_Dense").exists()


# --- Written files ---------------------------------------------------------------------------------------------------


def test_the_folder_has_only_the_text_encoder_and_names_its_base(model, base, no_onnx, tmp_path, capsys):
    model = shutil.copytree(model, tmp_path / "x|<b>[y](z)")  # the card must escape this name
    (model / "LICENSE").write_text("MIT")
    (model / "run.json").write_text('{"config": {"language": "es"}}')
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: pt\n---\n")
    folder = export(model, base, tmp_path / "out", "--repo_id", "us/text-side")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == (FILES | DENSES | {"LICENSE"}) - {"onnx/text_model.onnx", "onnx/text_model.onnx_data"}
    assert "MB  open_clip_text.safetensors" in capsys.readouterr().out
    assert {name.split(".")[0] for name in load_file(folder / "open_clip_text.safetensors")} == {"text", "logit_scale"}
    metadata = json.loads((folder / "drop_in.json").read_text())
    assert metadata["image_digest"] == image_encoder_digest(base)
    assert metadata["width"] == 24 and metadata["base"] == "base"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"`{metadata['image_digest']}`" in card and f"`{metadata['base']}`" in card and "license: mit" in card
    assert 'folder = snapshot_download("us/text-side")' in card and str(base) not in card
    assert "<b>" not in card and "[y](z)" not in card and r"x\|&lt;b&gt;\[y\](z)" in card
    assert 'texts = ["a text in es", "another text in es"]' in card and "gato" not in card


def test_open_clip_is_left_out_if_the_base_has_another_vocabulary(base, model, tmp_path, no_onnx, caplog):
    smaller = shutil.copytree(model, tmp_path / "smaller")
    trimmed = CapivaraModel.from_pretrained(model)
    trimmed.text_model.resize_token_embeddings(290)
    trimmed.config.text_config.vocab_size = 290
    trimmed.save_pretrained(smaller)
    caplog.set_level("INFO")
    folder = export(smaller, base, tmp_path / "out")
    assert "open_clip is skipped" in caplog.text and "word_embeddings.weight" in caplog.text
    assert not (folder / "open_clip_text.safetensors").exists()
    assert "open_clip_text" not in (folder / "README.md").read_text(encoding="utf-8")


# --- Errors ----------------------------------------------------------------------------------------------------------


def assert_refused(match: str, model: Path, base: Path, output: Path, *flags: str) -> None:
    """Assert that an export fails with a message that matches, and leaves no files."""
    with pytest.raises((ValueError, ImportError), match=match):
        export(model, base, output, *flags)
    assert not output.exists() and not [path for path in output.parent.iterdir() if ".tmp-" in path.name]


@pytest.mark.parametrize("alone", ["drop_in", pytest.param("immich", marks=pytest.mark.slow)])
def test_a_model_with_a_changed_image_encoder_is_refused(alone, model, base, tmp_path):
    if alone == "immich":  # the unchanged model is exported
        output = export(model, base, tmp_path / "made", "--formats", alone)
        assert {path.name for path in output.iterdir()} == {"config.json", "textual"}
    other, name = shutil.copytree(model, tmp_path / "other"), "vision_model.post_layernorm.bias"
    tensors = load_file(model / "model.safetensors")
    tensors[name].flatten()[0] = torch.nextafter(tensors[name].flatten()[0], torch.tensor(2.0))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert_refused(re.escape(str(other)), other, base, tmp_path / "out", "--formats", alone)


def test_equal_text_encoders_and_wrong_flags_are_refused(model, base, tmp_path):
    assert_refused("bit-identical", base, base, tmp_path / "out")
    assert_refused("no-such", model, tmp_path / "no-such", tmp_path / "out")
    assert_refused("drop_in", model, base, tmp_path / "out", "--formats", "drop_in,onnx")
    assert_refused("--text_config", model, base, tmp_path / "out", "--text_config", "us/text")
    assert_refused("--base .*drop_in", model, base, tmp_path / "out", "--formats", "transformers")
    with pytest.raises(ValueError, match=r"--base .*drop_in"):
        main(["--model", str(model), "--output", str(tmp_path / "out"), "--formats", "drop_in"])

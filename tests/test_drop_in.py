"""The text side alone: each program embeds by it as the model does; it is refused where pictures would not fit."""

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
from modeling_capivara.convert_open_clip import build_open_clip_model, to_open_clip_state_dict
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import compute_image_embeds, embed_texts, pad_batch, random_images, tokenize

TEXTS = ["um gato", "uma capivara na água, ao pôr do sol", "SÃ£o JoÃ£o &amp;amp; cia", "", "foto " * 90, "ﬁm ½ ☕"]
# What a telephone's keyboard types.
TYPED = ["“um gato” no copo d’água", "a\u0301gua e ‘coração’"]
# These are read alike with and without the folder's code.
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
# What a card's reader does: its blocks in their order, each with the model's texts, in a process without this project.
READER = """
import json, re, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import numpy as np
from transformers import AutoModel

texts, plain = json.loads(sys.argv[1]), json.loads(sys.argv[2])
card = open("README.md", encoding="utf-8").read()
first, *blocks = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
found = {}
for block in blocks:
    if "load_state_dict" in block:
        continue
    for ending, code, given in ("", block, texts), ("_without_code", block.replace("=True)", "=False)"), plain):
        names = {}
        exec(first, names)
        names["texts"] = given
        exec(code, names)
        if "SentenceTransformer" in names:
            found["sentence_transformers" + ending] = names["model"].encode(given)
        elif "graph" in names:
            found["onnx" + ending] = names["graph"].run(["text_embeds"], names["inputs"])[0]
        else:
            found["transformers" + ending] = names["embeds"].numpy()
if "SentenceTransformer" in card:
    _, report = AutoModel.from_pretrained(".", add_pooling_layer=False, output_loading_info=True)
    assert not [fault for fault in report.values() if fault], report
assert "modeling_capivara" not in sys.modules
np.savez(sys.argv[3], **found)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_processor):
    return save_model(tmp_path_factory.mktemp("base") / "base", tiny_processor)


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    return other_texts(base, tmp_path_factory.mktemp("model") / "trained")


def export(model: Path, base: Path, output: Path, *flags: str) -> Path:
    flags = ["--model", str(model), "--base", str(base), "--output", str(output), "--formats", "drop_in", *flags]
    main(flags)
    return output


@pytest.fixture(scope="module", params=["capivara", "siglip"])
def exported(request, xlmr, tiny_processor, tmp_path_factory):
    """A base, a model and its text side: CAPIVARA's with the real vocabulary and its rules; SigLIP's with an image
    tower that open_clip has, and a narrow text tower."""
    folder = tmp_path_factory.mktemp("exported")
    if request.param == "siglip":
        tokenizer, vision = gemma_like(TEXTS, 400), TOWER | {"hidden_size": 768, "intermediate_size": 3072}
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Replace(" ", "▁")  # one that reads capitals, which no cleaning may take away
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
    """Without the graphs, which take seconds."""

    def write_onnx(folder, source, towers):
        (folder / "onnx").mkdir()
        (folder / "onnx/quantisation.json").write_text('{"graphs": {}}')

    monkeypatch.setattr(onnx_files, "write_onnx", write_onnx)


def embeddings(folder: Path, texts: list[str] = TEXTS) -> np.ndarray:
    return embed_texts(load_model(folder).eval(), load_processor(folder), texts).numpy()


def as_the_card_says(folder: Path, output: Path) -> dict[str, np.ndarray]:
    """Embeddings of `TEXTS` by the code of a folder's card."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(output / "modules")}
    words = [json.dumps(TEXTS), json.dumps(PLAIN), str(output / "found.npz")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr
    return dict(np.load(output / "found.npz"))


# --- Each program ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cards_code_gives_the_models_embeddings_without_the_package(exported, tmp_path):
    base, model, text_side = exported
    found, expected = as_the_card_says(text_side, tmp_path), embeddings(model)
    assert np.abs(expected - embeddings(base)).max() > 0.01, "the base's text side would do as well"
    programs = {"onnx", "sentence_transformers" if (text_side / "modules.json").exists() else "transformers"}
    assert found.keys() == {*programs, *(f"{program}_without_code" for program in programs)}
    plain = embeddings(model, PLAIN)
    for program, embeds in found.items():
        wanted = plain if program.endswith("without_code") else expected
        np.testing.assert_allclose(embeds, wanted, rtol=0, atol=1e-5, err_msg=program)


@pytest.mark.slow
@torch.no_grad()
def test_open_clip_takes_the_text_side_and_keeps_its_images(exported, tmp_path):
    base, model, text_side = exported
    ours, processor = load_model(base).eval(), load_processor(base)
    if is_own := isinstance(ours, CapivaraModel):
        theirs = build_open_clip_model(ours.config)
        theirs.load_state_dict(to_open_clip_state_dict(ours))
    else:
        main(["--model", str(base), "--output", str(tmp_path / "whole"), "--formats", "transformers,open_clip"])
        theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'whole'}")
    pictures = [image.convert("RGB") for image in random_images()]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    before = theirs.eval().encode_image(pixels, normalize=True)
    (code,) = (block for block in blocks(text_side) if "load_state_dict" in block)
    exec(code, {"model": theirs, "folder": str(text_side)})
    if is_own:
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


def blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_a_linear_projection_is_one_matrix(tiny_processor, no_onnx, tmp_path):
    from sentence_transformers import SentenceTransformer

    base = save_model(tmp_path / "base", tiny_processor, text_projection_type="linear")
    model = other_texts(base, tmp_path / "model")
    folder = export(model, base, tmp_path / "text_side")
    found = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, embeddings(model), rtol=0, atol=1e-5)
    assert (folder / "2_Dense").exists() and not (folder / "3_Dense").exists()


# --- What is written -------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_text_side_alone_and_says_what_it_is_for(model, base, no_onnx, tmp_path, capsys):
    model = shutil.copytree(model, tmp_path / "x|<b>[y](z)")  # a name of others is text on the card
    (model / "LICENSE").write_text("MIT")
    (model / "run.json").write_text('{"config": {"language": "es"}}')
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: pt\n---\n")
    folder = export(model, base, tmp_path / "out", "--repo_id", "us/text-side")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == (FILES | DENSES | {"LICENSE"}) - {"onnx/text_model.onnx", "onnx/text_model.onnx_data"}
    assert "MB  open_clip_text.safetensors" in capsys.readouterr().out
    assert {name.split(".")[0] for name in load_file(folder / "open_clip_text.safetensors")} == {"text", "logit_scale"}
    facts = json.loads((folder / "drop_in.json").read_text())
    assert facts["image_digest"] == image_encoder_digest(base) and facts["width"] == 24 and facts["base"] == "base"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"`{facts['image_digest']}`" in card and f"`{facts['base']}`" in card and "license: mit" in card
    assert 'folder = snapshot_download("us/text-side")' in card and str(base) not in card
    assert "<b>" not in card and "[y](z)" not in card and r"x\|&lt;b&gt;\[y\](z)" in card
    assert 'texts = ["a text in es", "another text in es"]' in card and "gato" not in card


def test_open_clip_is_left_out_where_the_base_has_another_vocabulary(base, model, tmp_path, no_onnx, caplog):
    smaller = shutil.copytree(model, tmp_path / "smaller")
    trimmed = CapivaraModel.from_pretrained(model)
    trimmed.text_model.resize_token_embeddings(290)
    trimmed.config.text_config.vocab_size = 290
    trimmed.save_pretrained(smaller)
    caplog.set_level("INFO")
    folder = export(smaller, base, tmp_path / "out")
    assert "open_clip is left out" in caplog.text and "word_embeddings.weight" in caplog.text
    assert not (folder / "open_clip_text.safetensors").exists()
    assert "open_clip_text" not in (folder / "README.md").read_text(encoding="utf-8")


# --- What is refused -------------------------------------------------------------------------------------------------


def refused(match: str, model: Path, base: Path, output: Path, *flags: str) -> None:
    with pytest.raises((ValueError, ImportError), match=match):
        export(model, base, output, *flags)
    assert not output.exists() and not [path for path in output.parent.iterdir() if ".tmp-" in path.name]


@pytest.mark.parametrize("alone", ["drop_in", "immich"])
def test_a_model_whose_image_side_was_trained_is_refused(alone, model, base, tmp_path):
    if alone == "immich":  # the one that was not: its text side, whose vectors the export compares
        made = export(model, base, tmp_path / "made", "--formats", alone)
        assert {path.name for path in made.iterdir()} == {"config.json", "textual"}
    other, name = shutil.copytree(model, tmp_path / "other"), "vision_model.post_layernorm.bias"
    tensors = load_file(model / "model.safetensors")
    tensors[name].flatten()[0] = torch.nextafter(tensors[name].flatten()[0], torch.tensor(2.0))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused("embeds pictures otherwise than .*embedded anew", other, base, tmp_path / "out", "--formats", alone)


def test_what_is_no_exchange(model, base, tmp_path):
    refused("to the bit: there is nothing to exchange", base, base, tmp_path / "out")
    refused("no-such does not exist", model, tmp_path / "no-such", tmp_path / "out")
    refused("a folder of its own: name no other format", model, base, tmp_path / "out", "--formats", "drop_in,onnx")
    refused("and no --text_config", model, base, tmp_path / "out", "--text_config", "us/text")
    refused("is for --formats drop_in", model, base, tmp_path / "out", "--formats", "transformers")
    with pytest.raises(ValueError, match=r"--base.*which needs it"):
        main(["--model", str(model), "--output", str(tmp_path / "out"), "--formats", "drop_in"])

"""Conversion between open_clip and transformers: equal embeddings, every tensor kept, no code executed."""

import argparse
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file
from sampling import one_in
from test_checkpoints import Malicious
from tiny import TINY_TEXT, TINY_VISION, randomize, tiny_config, tiny_tokenizer
from towers import as_open_clip

from hub_upload.origins import read_origin_card_metadata
from modeling_capivara import CapivaraConfig
from modeling_capivara import convert_open_clip as conversion
from modeling_capivara.convert_open_clip import (
    convert,
    new_open_clip_model,
    to_capivara_config,
    to_open_clip_model_cfg,
    to_preprocess_cfg,
)
from modeling_capivara.loading import MAX_NAMED_KEYS, load_model, load_processor, write_origin_card
from modeling_capivara.two_towers import embed_images, embed_texts, random_images, random_texts

ARCHITECTURES = {
    "vit_mlp": {},
    "vit_linear_bias": {"text_projection_type": "linear", "logit_bias_init_value": -9.0},  # SigLIP's loss
    # 67 / 48 is not exact in floating point, but open_clip's int(width * ratio) must give 67 again.
    "vit_quick_gelu": {"vision_config": {**TINY_VISION, "hidden_act": "quick_gelu", "intermediate_size": 67}},
}


def write_open_clip(folder: Path, config: CapivaraConfig) -> dict[str, torch.Tensor]:
    """Write an open_clip folder with a model of open_clip itself, and return its weights."""
    folder.mkdir()
    state = randomize(new_open_clip_model(config), seed=1).state_dict()
    config.text_config.save_pretrained(folder / "text")
    model_cfg = to_open_clip_model_cfg(config, str(folder / "text"), 32)
    preprocess_cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}), encoding="utf-8"
    )
    save_file(state, folder / "open_clip_model.safetensors")
    tiny_tokenizer().save_pretrained(folder)
    return state


def change_config(folder: Path, section: str | None = None, **fields) -> None:
    path = folder / "open_clip_config.json"
    settings = json.loads(path.read_text())
    target = settings["model_cfg"] if section is None else settings["model_cfg"].get(section) or settings[section]
    target.update(fields)
    path.write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def saved_open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip") / "source"
    write_open_clip(folder, tiny_config())
    return folder


@pytest.fixture
def open_clip_folder(saved_open_clip_folder, tmp_path):
    return shutil.copytree(saved_open_clip_folder, tmp_path / "source")


@pytest.fixture
def tokenizer_folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def refused(tmp_path):
    """Function that returns the error of a failed conversion, after which no files may be left."""

    def run(source, **options) -> str:
        with pytest.raises(ValueError) as caught:
            convert(str(source), tmp_path / "out", **options)
        assert not [path.name for path in tmp_path.iterdir() if path.name == "out" or ".tmp-" in path.name]
        return str(caught.value)

    return run


# --- Same numbers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def embeddings(folder: Path) -> list[torch.Tensor]:
    """Return open_clip's embeddings of random texts and images."""
    import open_clip

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained_text=False)
    pixels = torch.stack([preprocess(image) for image in random_images()])
    texts = model.eval().encode_text(open_clip.get_tokenizer(name)(random_texts()), normalize=True)
    return [texts, model.encode_image(pixels, normalize=True)]


@pytest.mark.parametrize("name", one_in(3, ARCHITECTURES))
def test_open_clip_to_transformers_and_back_gives_the_same_numbers_and_weights(tmp_path, name):
    original = write_open_clip(tmp_path / "source", tiny_config(**ARCHITECTURES[name]))
    assert all(t.float().std() > 0 for t in original.values() if t.numel() > 1 and t.is_floating_point())
    convert(f"local-dir:{tmp_path / 'source'}", tmp_path / "there")
    model, processor = load_model(tmp_path / "there").eval(), load_processor(tmp_path / "there")
    embeds = embed_texts(model, processor, random_texts()), embed_images(model, processor, random_images())
    for ours, theirs in zip(embeds, embeddings(tmp_path / "source"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    back = as_open_clip(tmp_path / "there", tmp_path / "back")
    returned = load_file(back / "open_clip_model.safetensors")
    assert returned.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(returned[key], tensor), key
    for ours, theirs in zip(embeds, embeddings(back), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    images = processor.image_processor
    assert (images.image_mean, images.image_std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (images.size["shortest_edge"], int(images.resample)) == (32, 2)
    # All files have the same permissions.
    assert len({p.stat().st_mode for p in (tmp_path / "there").iterdir() if p.is_file()}) == 1


def test_configuration_that_open_clip_ships_for_the_base_model_is_the_published_one():
    import open_clip

    config = to_capivara_config(open_clip.get_model_config("xlm-roberta-base-ViT-B-32"))
    assert config.to_dict() == CapivaraConfig().to_dict()


def test_the_card_states_source_and_license(open_clip_folder, tmp_path):
    front = "license: mit\nbase_model: [us/base]\nlanguage: pt\nattribution: {no: text}\ntags: [theirs]"
    (open_clip_folder / "README.md").write_text(f"---\n{front}\n---\n# Theirs\n", encoding="utf-8")
    convert(f"local-dir:{open_clip_folder}", tmp_path / "there")
    assert metadata_load(tmp_path / "there/README.md") == {
        "base_model": ["us/base"],
        "license": "mit",
        "language": "pt",
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
    }
    origin = read_origin_card_metadata(str(tmp_path / "there"), "model")
    assert (origin["base_model"], origin["licenses"]) == (["us/base"], ["mit"])


@pytest.mark.parametrize("card", ["# No front matter\n", "---\nlicense: [mit\n---\n", "\xff"])
def test_no_card_is_written_if_the_source_has_no_metadata(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    (tmp_path / "new").mkdir()
    write_origin_card(tmp_path, tmp_path / "new", "Made.")
    assert not list((tmp_path / "new").iterdir())


# --- Checkpoint files ------------------------------------------------------------------------------------------------


def lightning_file(folder: Path, **extra) -> Path:
    """Write a Lightning checkpoint: the model two modules deep, with other tensors of the training program."""
    state = {f"model.model.{n}": t for n, t in randomize(new_open_clip_model(tiny_config())).state_dict().items()}
    state["model.model.text.transformer.embeddings.position_ids"] = torch.arange(82)[None]
    state |= {"train_accuracy.total": torch.tensor(3), "loss.logit_scale": torch.tensor(1.0)}
    torch.save({"state_dict": state, "epoch": 3, **extra}, folder / "epoch.ckpt")
    return folder / "epoch.ckpt"


def test_lightning_file_with_objects_is_refused_with_a_hint_that_works(tmp_path, refused, monkeypatch):
    message = refused(lightning_file(tmp_path, hyper_parameters=argparse.Namespace(lr=5e-7)))
    assert "(argparse.Namespace)" in message and "\n" not in message
    monkeypatch.chdir(tmp_path)
    exec(f"import safetensors.torch, torch; {message.partition('where it was written: ')[2]}", {})
    state, _ = conversion.read_open_clip_tensors_and_notes(tmp_path / "epoch.safetensors")
    expected, _ = conversion.read_open_clip_tensors_and_notes(lightning_file(tmp_path))
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("kind", ["Lightning", ".bin", ".pt"])
def test_checkpoint_files(tmp_path, tokenizer_folder, kind, monkeypatch):
    monkeypatch.setattr(conversion, "CapivaraConfig", tiny_config)  # instead of the published architecture
    if kind == "Lightning":
        path, expected_note = lightning_file(tmp_path), "train_accuracy.total"
    else:
        path, expected_note, prefix = tmp_path / f"weights{kind}", "Weights: ", "module." * (kind == ".pt")
        state = {prefix + k: v.half() for k, v in randomize(new_open_clip_model(tiny_config())).state_dict().items()}
        is_new = kind == ".pt"
        torch.save({"state_dict": state, "epoch": 3} if is_new else state, path, _use_new_zipfile_serialization=is_new)
    notes = " ".join(convert(str(path), tmp_path / "out", tokenizer=str(tokenizer_folder)))
    assert expected_note in notes and "position_ids" not in notes
    assert load_file(tmp_path / "out" / "model.safetensors")["logit_scale"].dtype == torch.float32


@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_file_that_carries_code_is_refused_and_not_run(tmp_path, refused, how):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    checkpoint = {"state_dict": {"a": torch.zeros(1)}, "config": Malicious(trace)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=how == "zip")
    assert re.search(r"evil.*" + (r"\(.*\bpathlib\." if how == "zip" else ""), refused(path))
    assert not trace.exists()
    if how == "zip":
        torch.load(path, weights_only=False)
        assert trace.exists(), "the file must be harmful, otherwise this test proves nothing"


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path, tokenizer_folder, refused, monkeypatch):
    state = randomize(new_open_clip_model(tiny_config())).state_dict()
    del state["visual.conv1.weight"], state["text.proj.2.weight"]
    state |= {"text.transformer.pooler.dense.bias": torch.zeros(3), "logit_bias": torch.zeros(1)}
    state["visual.proj"] = torch.zeros(48, 7)
    path, tokenizer = tmp_path / "weights.safetensors", str(tokenizer_folder)
    save_file(state, path)
    message = refused(path, tokenizer=tokenizer)
    assert "published architecture" in message
    assert len(re.findall(r"\b(?:text|vision)_model\.[\w.]+", message)) <= MAX_NAMED_KEYS, "hundreds do not fit"
    monkeypatch.setattr(conversion, "CapivaraConfig", tiny_config)  # instead of the published architecture
    message = refused(path, tokenizer=tokenizer)
    assert "missing keys: text_projection.2.weight and 1 more;" in message
    assert "unexpected keys: logit_bias and 1 more;" in message
    assert "visual_projection.weight [7, 48], not [24, 48]" in message and "\n" not in message


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}, r"vision_cfg.norm_kwargs .*\{'eps': 1e-06\}"),
        ("vision_cfg", "image_size", [32, 64], r"vision_cfg.image_size .*\[32, 64\]"),
        ("vision_cfg", "timm_model_name", "tf_efficientnet_lite0", "timm_model_name .*'tf_efficientnet_lite0'"),
        ("vision_cfg", "pool_type", "avg", "vision_cfg.pool_type .*'avg'"),
        ("text_cfg", "hf_model_name", "/nowhere/at/all", "text_cfg.hf_model_name .*'/nowhere/at/all'"),
        ("text_cfg", "context_length", 64, "text_cfg.context_length .*64"),
        ("preprocess_cfg", "interpolation", "random", "preprocess_cfg.interpolation .*'random'"),
        (None, "embed_dim", "wide", "'wide'"),
        ("vision_cfg", "layers", [3, 4, 6, 3], r"\[3, 4, 6, 3\]"),  # a ResNet
        ("vision_cfg", "layers", 10**7, "vision_cfg.layers .*1000, got 10000000"),
        ("vision_cfg", "head_width", 0, "vision_cfg.head_width .*1 to 100000, got 0"),
        ("text_cfg", "hf_proj_type", None, "text_projection_type"),
    ],
)
def test_wrong_configuration_is_an_error_of_one_line_before_weights_are_read(
    open_clip_folder, refused, section, field, value, message
):
    change_config(open_clip_folder, section, **{field: value})
    (open_clip_folder / "open_clip_model.safetensors").write_bytes(b"unreadable")
    subject = "" if section == "preprocess_cfg" else r"model_cfg of open_clip_config\.json"
    assert re.fullmatch(rf"{subject}.*{message}.*", refused(f"local-dir:{open_clip_folder}"))


@pytest.mark.parametrize(
    ("name", "value"), [("do_resize", False), ("crop_size", {"height": 32, "width": 24}), ("resample", 1)]
)
def test_unsupported_preprocessing_is_named(tiny_processor, name, value):
    changed = type(tiny_processor.image_processor)(**tiny_processor.image_processor.to_dict() | {name: value})
    with pytest.raises(ValueError, match=rf"image_processor\.{name}"):
        to_preprocess_cfg(changed)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"not a checkpoint", pickle.dumps([1]), b"PK\x03\x04 torn", torch.zeros(2), {"state_dict": [1]}, {}),
        {f"{model}{name}": torch.zeros(2) for model in ("", "model.") for name in ("logit_scale", "visual.proj")},
    ],
)
def test_files_without_an_open_clip_model_are_refused(tmp_path, refused, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert re.search(r"a\.ckpt", refused(path))


def test_missing_and_wrong_sources_are_refused(open_clip_folder, tiny_folder, tmp_path, refused):
    (tmp_path / "a.txt").touch()
    os.truncate(shutil.copytree(open_clip_folder, tmp_path / "theirs") / "open_clip_model.safetensors", 5000)
    write_open_clip(tmp_path / "few", tiny_config(text_config={**TINY_TEXT, "vocab_size": 20}))
    for source, message in [
        (tmp_path / "theirs", "cannot be read"),
        (tmp_path / "few", "the text tower has 20 "),
        ("local-dir:/nowhere", "does not exist"),
        ("hf-hub:nobody/nothing", "could not be fetched"),
        (tmp_path / "a.txt", "a.txt cannot be read"),
        (f"local-dir:{tiny_folder}", "hub_upload.export"),
    ]:
        assert message in refused(source)

"""Conversion between open_clip and transformers: same numbers, every key accounted for, nothing executed or left."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file
from tiny import TINY_TEXT, TINY_VISION, randomise, tiny_config, tiny_tokenizer
from torch.func import functional_call
from transformers import TimmWrapperConfig

from hub_upload.origins import origin
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara import convert_open_clip as conversion
from modeling_capivara.convert_open_clip import (
    build_open_clip,
    capivara_config,
    capivara_state_dict,
    convert,
    open_clip_model_cfg,
)
from modeling_capivara.loading import write_origin_card

ARCHITECTURES = {
    "vit_mlp": {},
    "vit_linear": {"text_projection_type": "linear"},
    # 67 / 48 is no short number: open_clip's int(width * ratio) must come back to 67
    "vit_quick_gelu": {"vision_config": {**TINY_VISION, "hidden_act": "quick_gelu", "intermediate_size": 67}},
}


def write_open_clip(folder: Path, config: CapivaraConfig, **model_fields) -> dict[str, torch.Tensor]:
    """An open_clip folder made by open_clip's own model, as its authors would; returns the weights."""
    folder.mkdir()
    state = randomise(build_open_clip(config), seed=1).state_dict()
    config.text_config.save_pretrained(folder / "text")
    model_cfg = {**open_clip_model_cfg(config, str(folder / "text"), 32), **model_fields}
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


@pytest.fixture(autouse=True)
def one_thread(request):
    """Toy layers take less time than their threads take to meet, on a busy machine three times less."""
    threads = torch.get_num_threads()
    if "slow" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def open_clip_folder(tmp_path):
    write_open_clip(tmp_path / "source", tiny_config())
    return tmp_path / "source"


@pytest.fixture
def tokenizer_folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def nothing_left(output: Path) -> bool:
    return not output.exists() and not [p.name for p in output.parent.iterdir() if ".tmp-" in p.name]


# --- Same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_open_clip_to_transformers_and_back_gives_the_same_numbers_and_weights(tmp_path, name):
    original = write_open_clip(tmp_path / "source", tiny_config(**ARCHITECTURES[name]))
    assert all(t.float().std() > 0 for t in original.values() if t.numel() > 1 and t.is_floating_point())
    there = convert(f"local-dir:{tmp_path / 'source'}", tmp_path / "there")
    back = convert(str(tmp_path / "there"), tmp_path / "back", to_open_clip=True)
    assert 0 < there[0] < 1e-5  # exactly 0 would mean that one model was compared with itself
    assert 0 < back[0] < 1e-5
    returned = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert returned.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(returned[key], tensor), key
    processor = CapivaraProcessor.from_pretrained(tmp_path / "there").image_processor
    assert (processor.image_mean, processor.image_std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (processor.size["shortest_edge"], int(processor.resample)) == (32, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "there", "back"}
    # open_clip repairs texts itself, and asks on the terminal where a folder names code.
    assert "auto_map" not in json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    for folder in ("there", "back"):  # the weights are as readable as their neighbours
        assert len({p.stat().st_mode for p in (tmp_path / folder).iterdir() if p.is_file()}) == 1


def open_clip_tools(folder: Path):
    import open_clip

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained_text=False)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@pytest.mark.slow
@torch.no_grad()
def test_any_two_layers_of_one_shape_swapped_are_noticed(open_clip_folder):
    """Each pair of the mapping in turn, by the same limit as the program's own check; fewer inputs, for time."""
    reference, preprocess, tokenize = open_clip_tools(open_clip_folder)
    state = capivara_state_dict(reference.state_dict())
    model = CapivaraModel(tiny_config()).eval()
    pixels = torch.stack([preprocess(image) for image in conversion.random_images()[:2]])
    ids = tokenize(conversion.random_texts()[2:4])[:, :40]
    expected = {
        "text_embeds": reference.encode_text(ids, normalize=True),
        "image_embeds": reference.encode_image(pixels, normalize=True),
    }

    def difference(changed):
        of_image = {name.startswith("vis") for name in changed}  # the other tower stays as it was
        inputs = {"pixel_values": pixels} if True in of_image else {}
        inputs |= {"input_ids": ids} if False in of_image else {}
        output = functional_call(model, {**state, **changed}, (), inputs)
        return max((output[k] - v).abs().max().item() for k, v in expected.items() if k in output)

    assert difference(state) < 1e-5
    # A key's bias adds the same to every score of a query: the softmax does not see it, in either program.
    names = [n for n in state if not n.endswith(("k_proj.bias", "key.bias"))]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i] if state[a].shape == state[b].shape]
    assert len(pairs) > 300
    unnoticed = [(a, b) for a, b in pairs if difference({a: state[b], b: state[a]}) <= conversion.TOLERANCE]
    assert not unnoticed


def test_a_wrong_line_of_the_table_fails_and_leaves_nothing(open_clip_folder, tmp_path, monkeypatch):
    """Wrong in both directions alike, so that only open_clip itself can tell."""
    pre, post = "visual.ln_pre.", "visual.ln_post."
    names = conversion.NAMES | {pre: conversion.NAMES[post], post: conversion.NAMES[pre]}
    monkeypatch.setattr(conversion, "NAMES", names)
    with pytest.raises(ValueError, match="differs from the original by"):
        convert(f"local-dir:{open_clip_folder}", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


@pytest.mark.slow
def test_published_size_gives_the_same_numbers_both_ways(tmp_path):
    config = CapivaraConfig()
    model = randomise(CapivaraModel(config))
    assert sum(p.numel() for p in model.parameters()) == 366_121_473
    model.save_pretrained(tmp_path / "model")
    CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer()).save_pretrained(tmp_path / "model")
    del model
    there = convert(str(tmp_path / "model"), tmp_path / "open_clip", to_open_clip=True)
    # The bare file: the published architecture is all there is to know about it.
    weights = tmp_path / "open_clip" / "open_clip_model.safetensors"
    back = convert(str(weights), tmp_path / "back", tokenizer=str(tmp_path / "model"))
    assert 0 < there[0] < 1e-4
    assert 0 < back[0] < 1e-4
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_configuration_that_open_clip_ships_for_the_base_model_is_the_published_one():
    import open_clip

    config = capivara_config(open_clip.get_model_config("xlm-roberta-base-ViT-B-32"))
    assert config.to_dict() == CapivaraConfig().to_dict()


@pytest.mark.slow
def test_open_clip_loads_the_written_folder_by_itself_offline(tiny_folder, tmp_path):
    convert(str(tiny_folder), tmp_path / "out", to_open_clip=True)
    code = (
        "import open_clip, sys; name = 'local-dir:' + sys.argv[1]\n"
        "model, _, preprocess = open_clip.create_model_and_transforms(name)\n"
        "text = model.encode_text(open_clip.get_tokenizer(name)(['uma capivara']))\n"
        "print(tuple(text.shape), float(model.logit_scale))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(1, 24) 2.959")
    assert [p.name for p in (tmp_path / "out").iterdir() if p.suffix == ".py"] == []


def test_text_model_name_for_publishing(tiny_folder, tmp_path, capsys):
    name = "FacebookAI/xlm-roberta-base"
    conversion.main([str(tiny_folder), str(tmp_path / "out"), "--to-open-clip", "--hf-model-name", name])
    settings = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert settings["model_cfg"]["text_cfg"]["hf_model_name"] == name
    assert not (tmp_path / "out" / "text_model").exists()
    printed = capsys.readouterr().out
    assert f"configuration from {name} on the Hub" in printed and "not of the size" in printed  # this one is tiny
    assert "Largest difference" in printed


@pytest.mark.slow
def test_both_directions_from_the_hub_fetch_what_they_need(open_clip_folder, tiny_folder, tmp_path):
    """The real client in a process of its own, as it reads its settings at import, against a server here."""
    (open_clip_folder / "text").rename(tmp_path / "text")
    change_config(open_clip_folder, "text_cfg", hf_model_name="them/text")
    (open_clip_folder / "open_clip_model.safetensors").rename(open_clip_folder / "open_clip_pytorch_model.safetensors")
    for folder, name in [
        (open_clip_folder, "open_clip_pytorch_model.bin"),
        (open_clip_folder, "model.safetensors"),
        (tiny_folder, "pytorch_model.bin"),
        (tiny_folder, "photo.png"),
    ]:
        (folder / name).write_bytes(b"not to be fetched")
    code = (
        "import sys; from modeling_capivara.convert_open_clip import main\n"
        "main(['hf-hub:us/open', sys.argv[1] + '/there'])\n"
        "main(['us/model', sys.argv[1] + '/back', '--to-open-clip'])\n"
        "main(['hf-hub:us/none', sys.argv[1] + '/none'])"
    )
    with HubServer(tmp_path / "hub") as server:
        for name, folder in (
            ("us/open", open_clip_folder),
            ("us/model", tiny_folder),
            ("them/text", tmp_path / "text"),
        ):
            server.store(name, folder)
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            env={**os.environ, **server.environment(tmp_path / "hf")},
        )  # fmt: skip
    assert result.stdout.count("Largest difference") == 2, result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("error: us/none could not be fetched"), result.stderr
    assert (tmp_path / "there" / "model.safetensors").exists()
    assert metadata_load(tmp_path / "there" / "README.md")["base_model"] == "us/open"
    assert (tmp_path / "back" / "open_clip_model.safetensors").exists()
    assert set(server.fetched) >= {"us/open/open_clip_pytorch_model.safetensors", "us/model/model.safetensors"}
    assert not [
        name for name in server.fetched if name.endswith((".bin", ".png")) or name == "us/open/model.safetensors"
    ]


def test_the_source_and_its_licence_are_on_the_first_card(open_clip_folder, tmp_path):
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
    of = origin(str(tmp_path / "there"), "model")
    assert (of["base_model"], of["licenses"]) == (["us/base"], ["mit"])


@pytest.mark.parametrize(
    "card", [None, "# No front matter\n", "---\nlicense: [mit\n---\n", "---\n- mit\n---\n", "\xff"]
)
def test_where_the_source_says_nothing_there_is_no_card(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    (tmp_path / "new").mkdir()
    write_origin_card(tmp_path, tmp_path / "new", "Made.")
    assert not list((tmp_path / "new").iterdir())
    write_origin_card(tmp_path, tmp_path / "new", "Made.", "us/open")
    assert metadata_load(tmp_path / "new/README.md")["base_model"] == "us/open"


@pytest.mark.slow
def test_timm_model_that_open_clip_builds_otherwise_is_a_clear_error(tmp_path, tiny_processor):
    config = tiny_config(vision_config=TimmWrapperConfig(architecture="mobilenetv3_small_050"))
    CapivaraModel(config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="open_clip does not build this model"):
        convert(str(tmp_path / "model"), tmp_path / "out", to_open_clip=True)
    assert nothing_left(tmp_path / "out")


# --- Checkpoint files ------------------------------------------------------------------------------------------------


def lightning_file(tmp_path, **extra) -> Path:
    """The model two modules deep, beside tensors of the training program."""
    state = randomise(build_open_clip(tiny_config())).state_dict()
    state = {f"model.model.{name}": tensor for name, tensor in state.items()}
    state["model.model.text.transformer.embeddings.position_ids"] = torch.arange(82)[None]
    state |= {"train_accuracy.total": torch.tensor(3), "loss.logit_scale": torch.tensor(1.0)}
    torch.save({"state_dict": state, "epoch": 3, **extra}, tmp_path / "epoch.ckpt")
    return tmp_path / "epoch.ckpt"


def test_lightning_file(tmp_path, tokenizer_folder):
    path = lightning_file(tmp_path)
    result = convert(str(path), tmp_path / "out", tokenizer=str(tokenizer_folder), config=tiny_config())
    assert 0 < result[0] < 1e-5
    assert any("'model.model.'" in note for note in result[1])
    assert any("train_accuracy.total" in note for note in result[1])
    assert not any("position_ids" in note for note in result[1])


def test_lightning_file_with_objects_is_refused_and_a_way_out_named_that_works(tmp_path, tokenizer_folder):
    path = lightning_file(tmp_path, hyper_parameters=argparse.Namespace(lr=5e-7))
    with pytest.raises(SystemExit, match=r"objects of a program \(argparse\.Namespace\)") as caught:
        conversion.main([str(path), str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder)])
    message = str(caught.value)
    assert "\n" not in message and nothing_left(tmp_path / "out")
    command = message.partition("where it was written: ")[2]
    code = f"import safetensors.torch, torch; {command}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    state, _ = conversion.read_open_clip_state(tmp_path / "epoch.safetensors")
    expected, _ = conversion.read_open_clip_state(lightning_file(tmp_path))
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize(
    ("suffix", "prefix", "wrapped"), [(".bin", "", False), (".pt", "module.", True), (".pth", "model.", True)]
)
def test_other_checkpoint_files(tmp_path, tokenizer_folder, suffix, prefix, wrapped):
    path = tmp_path / f"weights{suffix}"
    state = {prefix + k: v.half() for k, v in randomise(build_open_clip(tiny_config())).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path, _use_new_zipfile_serialization=wrapped)
    result = convert(str(path), tmp_path / "out", tokenizer=str(tokenizer_folder), config=tiny_config())
    assert 0 < result[0] < 1e-5
    assert "float16" in result[1][-1]
    assert load_file(tmp_path / "out" / "model.safetensors")["logit_scale"].dtype == torch.float32


class Code:
    """Unpickled the usual way, it runs `call`."""

    def __init__(self, call, *arguments):
        self.call = (call, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("suffix", [".ckpt", ".bin"])
@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_file_that_carries_code_is_refused_and_not_run(tmp_path, tokenizer_folder, suffix, how):
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "trace"
    checkpoint = {"state_dict": {"a": torch.zeros(1)}, "config": Code(os.system, f"touch {trace}")}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Code(os.system, f"touch {trace}"), protocol=2))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"evil.*" + (r"objects of a program \(\w+\.system\)" if how == "zip" else "")):
        convert(str(path), tmp_path / "out", tokenizer=str(tokenizer_folder))
    assert not trace.exists()
    assert nothing_left(tmp_path / "out")
    if how == "zip":
        torch.load(path, weights_only=False)
        assert trace.exists(), "a harmless file would prove nothing"


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_missing_surplus_and_misshapen_tensors_are_all_named(tmp_path, tokenizer_folder):
    state = randomise(build_open_clip(tiny_config())).state_dict()
    del state["visual.conv1.weight"], state["text.proj.2.weight"]
    state |= {"text.transformer.pooler.dense.bias": torch.zeros(3), "logit_bias": torch.zeros(1)}
    state["visual.proj"] = torch.zeros(48, 7)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError) as caught:
        convert(
            str(tmp_path / "weights.safetensors"),
            tmp_path / "out",
            config=tiny_config(),
            tokenizer=str(tokenizer_folder),
        )
    message = str(caught.value)
    assert 'Missing key(s) in state_dict: "vision_model.embeddings.patch_embedding.weight"' in message
    assert '"text_projection.2.weight"' in message
    assert 'Unexpected key(s) in state_dict: "logit_bias", "text_model.pooler.dense.bias".' in message
    assert "size mismatch for visual_projection.weight" in message and "[7, 48]" in message and "\n" not in message
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_cfg", "final_ln_after_pool", True),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
        ("vision_cfg", "image_size", [32, 64]),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "timm_model_name", "hf-hub:someone/something"),
        ("text_cfg", "hf_pooler_type", "cls_pooler"),
        ("text_cfg", "hf_pooler_type", None),
        ("text_cfg", "hf_model_name", None),
        ("text_cfg", "hf_model_name", "/nowhere/at/all"),
        ("text_cfg", "context_length", 64),
        ("preprocess_cfg", "resize_mode", "squash"),
        ("preprocess_cfg", "interpolation", "random"),
    ],
)
def test_unsupported_field_is_named_before_any_weight_is_read(open_clip_folder, tmp_path, section, field, value):
    change_config(open_clip_folder, section, **{field: value})
    (open_clip_folder / "open_clip_model.safetensors").write_bytes(b"unreadable")
    with pytest.raises(ValueError, match=field) as caught:
        convert(f"local-dir:{open_clip_folder}", tmp_path / "out")
    assert repr(value) in str(caught.value)
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (None, "embed_dim", "wide", "'wide'"),
        (None, "embed_dim", None, "projection_dim"),
        ("vision_cfg", "layers", [3, 4, 6, 3], r"\[3, 4, 6, 3\]"),  # a ResNet
        ("vision_cfg", "layers", 10**7, "vision_cfg.layers must be from 0 to 1000, got 10000000"),
        ("vision_cfg", "layers", True, "vision_cfg.layers must be from 0 to 1000, got True"),
        ("vision_cfg", "width", 50, "50"),
        ("vision_cfg", "head_width", 0, "vision_cfg.head_width must be from 1 to 100000, got 0"),
        ("vision_cfg", "head_width", True, "vision_cfg.head_width must be from 1 to 100000, got True"),
        ("text_cfg", "hf_proj_type", None, "text_projection_type"),
    ],
)
def test_a_configuration_that_can_not_be_is_one_line_before_any_weight_is_read(
    open_clip_folder, tmp_path, section, field, value, message
):
    change_config(open_clip_folder, section, **{field: value})
    (open_clip_folder / "open_clip_model.safetensors").write_bytes(b"unreadable")
    with pytest.raises(ValueError, match=rf"^model_cfg of open_clip_config.json can't be: [^\n]*{message}[^\n]*$"):
        convert(f"local-dir:{open_clip_folder}", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_model_with_the_bias_of_siglips_loss_is_converted(tmp_path, tokenizer_folder):
    state = write_open_clip(tmp_path / "source", tiny_config(logit_bias_init_value=-9.0))
    convert(str(tmp_path / "source"), tmp_path / "out")
    assert torch.equal(CapivaraModel.from_pretrained(tmp_path / "out").logit_bias, state["logit_bias"])


def test_a_field_that_adds_tensors_is_refused_by_their_names(tmp_path, tokenizer_folder):
    """No list of fields is needed for it: what is loaded has to fit, strictly."""
    folder = tmp_path / "source"
    state = write_open_clip(folder, tiny_config())
    extra = "visual.transformer.resblocks.0.attn.ln_q.weight"
    save_file({**state, extra: torch.ones(1)}, folder / "open_clip_model.safetensors")
    change_config(folder, "vision_cfg", qk_norm=True)
    with pytest.raises(ValueError, match=r"Unexpected key\(s\) in state_dict: [^\n]*ln_q"):
        convert(str(folder), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["mlp", "linear"])
def test_a_timm_tower_goes_to_open_clip(tmp_path, tiny_processor, projection):
    vision = TimmWrapperConfig(architecture="tf_efficientnet_lite0")
    model = randomise(CapivaraModel(tiny_config(vision_config=vision, text_projection_type=projection)))
    model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    assert 0 < convert(str(tmp_path / "model"), tmp_path / "back", to_open_clip=True)[0] < 1e-5
    with pytest.raises(ValueError, match=r"timm_model_name of .* is 'tf_efficientnet_lite0'"):
        convert(str(tmp_path / "back"), tmp_path / "there")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_resize", False),
        ("rescale_factor", 1 / 128),
        ("crop_size", {"height": 32, "width": 24}),
        ("resample", 1),
    ],
)
def test_what_open_clip_can_not_do_to_images_is_named_before_any_weight_is_read(tiny_folder, tmp_path, name, value):
    path = tiny_folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"][name] = value
    path.write_text(json.dumps(settings))
    (tiny_folder / "model.safetensors").write_bytes(b"unreadable")
    with pytest.raises(ValueError, match=f"image_processor.{name} of the processor is"):
        convert(str(tiny_folder), tmp_path / "out", to_open_clip=True)
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("to_open_clip", [False, True])
def test_truncated_weights(open_clip_folder, tiny_folder, tmp_path, to_open_clip):
    source = tiny_folder if to_open_clip else open_clip_folder
    cut(next(source.glob("*.safetensors")))
    with pytest.raises(ValueError, match=r"can.t be loaded|cannot be read"):
        convert(str(source) if to_open_clip else f"local-dir:{source}", tmp_path / "out", to_open_clip)
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2]), b"PK\x03\x04 torn", torch.zeros(2),
                                     {"state_dict": {"x": torch.zeros(1)}}, {"state_dict": [1]}, {}])  # fmt: skip
def test_file_that_is_no_checkpoint_or_one_of_something_else(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"a\.ckpt (cannot be read|h(olds|as))"):
        convert(str(path), tmp_path / "out", config=tiny_config())
    assert nothing_left(tmp_path / "out")


def test_two_whole_models_in_one_file(tmp_path):
    state = build_open_clip(tiny_config()).state_dict()
    torch.save({**state, **{"model." + k: v for k, v in state.items()}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="has 2 models of open_clip"):
        conversion.read_open_clip_state(tmp_path / "a.pt")


def test_sources_that_are_not_there_or_of_the_other_kind(open_clip_folder, tiny_folder, tmp_path):
    (tmp_path / "a.txt").touch()
    for source, to_open_clip, message in [
        ("/nowhere", False, "does not exist"),
        ("local-dir:/nowhere", False, "does not exist"),
        ("hf-hub:nobody/nothing", False, "could not be fetched"),
        (str(tmp_path / "a.txt"), False, "cannot be read as a checkpoint"),
        (str(tiny_folder), False, "use --to_open_clip"),
        (f"local-dir:{tiny_folder}", False, "use --to_open_clip"),
        ("/nowhere", True, "does not exist"),
        ("nobody/nothing", True, "no folder here, nor in the cache of the Hub"),
        (str(open_clip_folder), True, "leave out --to_open_clip"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "out", to_open_clip)
        assert nothing_left(tmp_path / "out")


def test_model_folder_without_processor_or_of_another_architecture(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "text_projection_type": "linear"}))
    with pytest.raises(ValueError, match=r"do not fit its config.*text_projection"):
        convert(str(tiny_folder), tmp_path / "out", to_open_clip=True)
    (tiny_folder / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="has no processor"):
        convert(str(tiny_folder), tmp_path / "out", to_open_clip=True)
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 20}, "the text tower has 20"),
        ({"pad_token_id": 5}, "pads with 1, the text tower .* pads with 5"),
    ],
)
def test_tokenizer_must_fit_the_text_tower(tmp_path, change, message):
    write_open_clip(tmp_path / "source", tiny_config(text_config={**TINY_TEXT, **change}))
    with pytest.raises(ValueError, match=message):
        convert(f"local-dir:{tmp_path / 'source'}", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_existing_output_is_not_touched(open_clip_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(SystemExit, match="not an empty folder"):
        conversion.main([f"local-dir:{open_clip_folder}", str(tmp_path / "out")])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    conversion.main([str(open_clip_folder), str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("to_open_clip", [False, True])
def test_really_full_disk(open_clip_folder, tiny_folder, tmp_path, to_open_clip):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        source = str(tiny_folder) if to_open_clip else f"local-dir:{open_clip_folder}"
        with pytest.raises(OSError, match="No space left on the disk while writing"):
            convert(source, disk / "out", to_open_clip)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

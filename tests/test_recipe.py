"""Training follows the paper: it equals a plain PyTorch loop, and the configs hold the published settings."""

import json
import math
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import load_from_disk
from test_train_accelerate import flags
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms
from transformers import MetaClip2Config, MetaClip2Model, SiglipConfig, SiglipModel, XLMRobertaConfig

import train_accelerate
from benchmarks.recipe import TRAINED_SHARES
from capivara_common.cli import parse_arguments, read_yaml_config
from caption_data.augmentation import AUGMENTATION, derive_seed, make_augmented_view
from modeling_capivara import CapivaraConfig, CapivaraModel, convert_open_clip
from modeling_capivara.loading import load_model, load_processor
from training.arguments import RunArguments
from training.trainable import freeze_parameters_and_add_adapters

ROOT = Path(__file__).resolve().parent.parent
STEPS, WARMUP, HIGH, LOW, BATCH = 50, 5, 5e-4, 1e-4, 10
# CAPIVARA (arXiv 2310.13683), section 4 and appendix, and the card of the released model.
PUBLISHED = {
    "optimizer": "adam", "weight_decay": 0.2,
    "caption_strategy": "rank", "caption_count": 5, "min_pair_similarity": 0.2, "augmented_views": 0,
    "image_embedding_cache": "off", "interpolate": 1.0,
}  # fmt: skip
FULL = {
    "effective_batch_size": 2816, "max_steps": 5863, "learning_rate": 5e-7, "min_learning_rate": 1e-7,
    "warmup_steps": 500, "adam_epsilon": 1e-8, "lora_rank": 0,
}  # fmt: skip
OPT = {
    "effective_batch_size": 1000, "max_steps": 1500, "learning_rate": 1e-5, "warmup_steps": 250, "adam_epsilon": 1e-6,
    "lora_rank": 8, "lora_alpha": 8, "lora_targets": r"text_model\..*\.(query|value)",
}  # fmt: skip


@pytest.mark.parametrize(("name", "published"), [("capivara", FULL), ("capivara_opt", OPT)])
def test_configs_hold_the_published_recipe(name, published):
    config = str(ROOT / "configs" / f"{name}.yaml")
    args = parse_arguments(RunArguments, None, ["--config", config, "--model", "m", "--dataset", "d"], config=True)
    assert {key: getattr(args, key) for key in PUBLISHED | published} == PUBLISHED | published


# Config of another base -> (class, config) of this base with one narrow layer in each tower
NARROW = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9}
NARROW_CONFIG = {"text_config": NARROW, "vision_config": NARROW}
OTHER_BASES = {
    **dict.fromkeys(("siglip2_base", "siglip2_large", "siglip2_so400m", "siglip2_opt"), (SiglipModel, SiglipConfig)),
    "metaclip2": (MetaClip2Model, MetaClip2Config),
    "xlmr_large_vit_h": (CapivaraModel, CapivaraConfig),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("_opt")) for name in OTHER_BASES]
)
def test_configs_of_other_bases_train_only_the_text_tower(name):
    config, (model_class, config_class) = ROOT / "configs" / f"{name}.yaml", OTHER_BASES[name]
    args = parse_arguments(RunArguments, None, ["--config", str(config), "--model", "m", "--dataset", "d"], config=True)
    is_sigmoid = model_class is SiglipModel
    assert (args.optimizer, args.weight_decay) == (("adamw", 0.0) if is_sigmoid else ("adam", 0.2))
    assert args.min_pair_similarity is None, "cosines of different bases have different scales"
    assert args.effective_batch_size == (1000 if args.lora_rank else 2816)
    model = model_class(config_class(**NARROW_CONFIG))
    prepared = freeze_parameters_and_add_adapters(model, args)
    trained = [name for name, parameter in prepared.named_parameters() if parameter.requires_grad]
    if args.lora_rank:
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
        assert adapted == {"q_proj", "v_proj"} and any(".head." in name for name in trained)
    assert trained and all("text_" in name or name == "logit_scale" for name in trained)
    assert ("logit_scale" in trained) != is_sigmoid


def test_comments_of_configs_state_cost_and_license():
    for name in OTHER_BASES.keys() - {"siglip2_opt"}:  # its comment refers to siglip2_base.yaml
        comment = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").partition("language:")[0]
        assert re.search(r"Cost: [\d,]+ million parameters.*Memory of a step", comment, re.DOTALL), name
        license = {"metaclip2": "CC-BY-NC-4.0", "xlmr_large_vit_h": "MIT"}.get(name, "Apache-2.0")
        assert f"icense of the base{' is' * (name == 'metaclip2')}" in comment and license in comment, name


@pytest.mark.slow
def test_the_config_of_open_clips_large_model_can_be_converted(monkeypatch):
    """As configs/xlmr_large_vit_h.yaml describes. The full-size models are on the meta device, without memory."""
    import open_clip

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    text = XLMRobertaConfig(**sizes, vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1)
    configs = {"xlm-roberta-large": text}
    monkeypatch.setattr("modeling_capivara.loading.load_transformers_config", configs.__getitem__)
    config = convert_open_clip.to_capivara_config(open_clip.get_model_config("xlm-roberta-large-ViT-H-14"))
    with torch.device("meta"):
        ours = CapivaraModel(config)
        theirs = convert_open_clip.to_capivara_state_dict(convert_open_clip.new_open_clip_model(config).state_dict())
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (ours.state_dict(), theirs)]
    assert shapes[0] == shapes[1]
    assert round(ours.num_parameters() / 1e6) == 1193, "the number in the config's comment"


def test_configs_for_one_device_show_commands_without_a_launcher():
    """On one device, `accelerate launch` only adds warnings, and a traceback after every error."""
    configs = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.yaml")}
    assert configs and not [name for name, text in configs.items() if "accelerate launch" in text]


def test_our_recipe_differs_from_the_paper_only_by_interpolation():
    """At full size and in the demo. docs/explanation/recipe.md explains the choice."""
    for name in ("capivara", "openmoji"):
        paper, plus = (read_yaml_config(ROOT / "configs" / f"{name}{suffix}.yaml") for suffix in ("", "_plus"))
        assert plus == paper | {"interpolate": str(TRAINED_SHARES["interpolate-0.7"])}


def test_the_augmentation_equals_the_published_one_to_the_bit():
    """Bicubic resize to 250 pixels, bicubic crop, AugMix with severity 2 and otherwise its defaults."""
    bicubic, bilinear = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR
    published = transforms.Compose(
        [
            transforms.Resize(250, interpolation=bicubic),
            transforms.RandomResizedCrop(224, scale=(0.9, 1.0), interpolation=bicubic),
            transforms.AugMix(severity=2, mixture_width=3, alpha=1.0, interpolation=bilinear),
        ]
    )
    assert AUGMENTATION == {"resize": 250, "crop": 224, "scale": [0.9, 1.0], "augmix_severity": 2}, (
        "caches depend on it"
    )
    pixels = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels).resize((320, 240), PIL.Image.Resampling.BICUBIC)
    for seed in range(8):  # AugMix draws its operations, and only some of them interpolate
        torch.manual_seed(derive_seed(seed, 255, 1))
        expected = published(image)
        assert make_augmented_view(image, "ff", 1, seed).tobytes() == expected.tobytes(), seed


@pytest.fixture
def model_without_dropout(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tiny_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tiny_folder


def plain_batch(captions: list[list[str]], step: int) -> list[tuple[int, str]]:
    """Return rows and captions of a step with seed 0, drawn independently of the training code, in another order.

    The random streams are fixed: [seed, epoch] shuffles the rows, [seed, step, 1] draws a caption for each row.
    """
    epoch, place = divmod(step, len(captions) // BATCH)
    rows = np.random.default_rng([0, epoch]).permutation(len(captions))[place * BATCH :][:BATCH]
    draws = np.random.default_rng([0, step, 1]).random(BATCH)
    pairs = [(int(row), captions[row][int(draw * len(captions[row]))]) for row, draw in zip(rows, draws, strict=True)]
    return [pairs[i] for i in np.random.default_rng(step).permutation(BATCH)]


def plain_loop(folder, dataset) -> tuple[list[float], dict]:
    """Train in plain PyTorch: one forward pass of the whole batch, captions padded to 77 tokens."""
    model, processor = load_model(folder), load_processor(folder)
    rows = load_from_disk(dataset)["train"]
    captions = rows["captions-pt"][:]
    for part in (model.vision_model, model.visual_projection):
        part.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, lr=1.0, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.2)

    def rate(step: int) -> float:
        if step < WARMUP:
            return LOW + (HIGH - LOW) * step / WARMUP
        return LOW + (HIGH - LOW) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
    losses = []
    for step in range(STEPS):
        places, texts = zip(*plain_batch(captions, step), strict=True)
        ids = processor.tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt").input_ids
        pixels = processor(images=[rows[place]["image"] for place in places], return_tensors="pt")
        hidden = model.text_model(input_ids=ids, attention_mask=(ids != 1).long()).last_hidden_state
        mask = (ids != 1).unsqueeze(-1).float()
        texts = F.normalize(model.text_projection((hidden * mask).sum(1) / mask.sum(1)), dim=-1)
        pooled = model.vision_model(pixel_values=pixels["pixel_values"]).pooler_output
        images = F.normalize(model.visual_projection(pooled), dim=-1)
        logits = model.logit_scale.exp() * texts @ images.T
        loss = (F.cross_entropy(logits, torch.arange(BATCH)) + F.cross_entropy(logits.T, torch.arange(BATCH))) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        losses.append(loss.item())
    return losses, model.state_dict()


def run(folder, dataset, output, **overrides):
    values = {"max_steps": 4, "warmup_steps": 0, "learning_rate": 1e-2, "mixed_precision": "no", "eval_steps": 50}
    return train_accelerate.main(flags(folder, dataset, output, **values | {"eval_languages": "pt"} | overrides))


@pytest.mark.slow
def test_fifty_steps_equal_a_plain_pytorch_loop(model_without_dropout, tiny_dataset_folder, tmp_path):
    expected, weights = plain_loop(model_without_dropout, tiny_dataset_folder)
    values = {"effective_batch_size": BATCH, "micro_batch_size": 3, "max_steps": STEPS, "warmup_steps": WARMUP}
    values |= {"learning_rate": HIGH, "min_learning_rate": LOW, "weight_decay": 0.2, "image_embedding_cache": "off"}
    out = run(model_without_dropout, tiny_dataset_folder, tmp_path / "out", **values)
    curve = json.loads((out / "run.json").read_text(encoding="utf-8"))["curve"]
    assert [point["loss"] for point in curve[1:]] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.7 * expected[0], "a model that learns nothing would prove nothing"
    before, after = load_model(model_without_dropout).state_dict(), load_model(out).state_dict()
    for name, weight in weights.items():
        moved = (weight - before[name]).float().norm()
        assert (after[name] - weight).float().norm() <= 1e-2 * moved, name


@pytest.mark.slow
def test_lora_trains_only_adapters_and_projection_and_merges_them(tiny_folder, tiny_dataset_folder, tmp_path):
    from peft import PeftModel

    out = run(tiny_folder, tiny_dataset_folder, tmp_path / "out", lora_rank=2)
    before, merged = load_model(tiny_folder).state_dict(), load_model(out).state_dict()
    moved = {name for name in before if not torch.equal(before[name], merged[name])}
    assert moved and all(".query.weight" in n or ".value.weight" in n or "text_projection" in n for n in moved)
    assert {n for n in before if "query.weight" in n} <= moved and "text_projection.0.weight" in moved
    files = {path.name for path in (out / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    reloaded = PeftModel.from_pretrained(load_model(tiny_folder), out / "adapter").merge_and_unload().state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(reloaded[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"lora_rank": 2, "lora_targets": "text_model.*q_proj"}, r"lora_targets .*'text_model\.\*q_proj'"),
        ({"lora_rank": 2, "lora_targets": r"vision_model\..*\.q_proj"}, "lora_targets .*'vision_model"),
        ({"lora_rank": 2, "lora_alpha": "nan"}, r"lora_alpha .*\b0\b.*nan"),
        ({"num_threads": 100_000_000}, r"num_threads .*\b1\b.*\b1024\b.*100000000"),
        ({"frozen_parameters": "text_tower.*"}, r"frozen_parameters .*'text_tower\.\*'"),
        ({"frozen_parameters": ".*"}, "frozen_parameters"),
        ({"frozen_parameters": "("}, r"frozen_parameters .*'\('"),
        ({"interpolate": 1.5}, r"interpolate .*\b0\b.*\b1\b.*1\.5"),
    ],
)
def test_invalid_settings_end_the_run_before_training(tiny_folder, tiny_dataset_folder, tmp_path, overrides, named):
    with pytest.raises(ValueError, match=named):
        train_accelerate.main(flags(tiny_folder, tiny_dataset_folder, tmp_path / "out", **overrides))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "frozen", "other_frozen", "trained"),
    [
        (0, r"text_model\.(embeddings|encoder\.layer\.0)\..*", "", ("text_model.encoder.layer.1", "logit_scale")),
        (2, r"text_projection\..*", "logit_scale", ("query.weight", "value.weight")),
    ],
)
def test_frozen_parameters_do_not_change(
    tiny_folder, tiny_dataset_folder, tmp_path, rank, frozen, other_frozen, trained
):
    out = run(tiny_folder, tiny_dataset_folder, tmp_path / "out", lora_rank=rank, frozen_parameters=frozen)
    before, after = load_model(tiny_folder).state_dict(), load_model(out).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if re.fullmatch(frozen, name) or name == other_frozen]
    assert all(any(part in name for name in moved) for part in trained)
    assert not rank or all(any(part in name for part in trained) for name in moved), "only adapters are trained"


@pytest.mark.slow
def test_interpolation_with_share_one_half_is_the_mean_of_the_weights(tiny_folder, tiny_dataset_folder, tmp_path):
    whole = load_model(run(tiny_folder, tiny_dataset_folder, tmp_path / "whole")).state_dict()
    half = load_model(run(tiny_folder, tiny_dataset_folder, tmp_path / "half", interpolate=0.5)).state_dict()
    for name, base in load_model(tiny_folder).state_dict().items():
        if base.is_floating_point():
            torch.testing.assert_close(half[name], (base + whole[name]) / 2, rtol=1e-5, atol=1e-6)

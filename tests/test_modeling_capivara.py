"""The model: outputs, gradients, precision, and towers of other model types."""

import doctest
import inspect

import pytest
import torch
from sampling import one_in
from tiny import randomize, tiny_config
from transformers import CLIPModel

from modeling_capivara import (
    CapivaraConfig,
    CapivaraForImageClassification,
    CapivaraModel,
    CapivaraProcessor,
    clip_loss,
)
from modeling_capivara.modeling_capivara import _check_attention_mask, mean_pooling
from modeling_capivara.two_towers import load_embedder

TEXTS = ["um gato", "uma foto de uma capivara azul", "a casa"]


@pytest.fixture
def batch(tiny_processor):
    inputs = tiny_processor(text=TEXTS, return_tensors="pt")
    pixel_values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "pixel_values": pixel_values}


def test_defaults_are_the_published_base():
    with torch.device("meta"):
        model = CapivaraModel(CapivaraConfig())
    assert sum(p.numel() for p in model.parameters()) == 366_121_473
    assert [layer.weight.shape for layer in (model.text_projection[0], model.text_projection[2])] == [
        (640, 768),
        (512, 640),
    ]


def test_either_modality_alone(tiny_model, batch):
    pixel_values = batch.pop("pixel_values")
    texts, images = tiny_model(**batch), tiny_model(pixel_values=pixel_values)
    both = tiny_model(**batch, pixel_values=pixel_values, return_loss=True)
    assert texts.image_embeds is None and images.text_embeds is None and texts.logits_per_text is None
    torch.testing.assert_close(both.text_embeds, texts.text_embeds)
    torch.testing.assert_close(both.image_embeds, images.image_embeds)
    torch.testing.assert_close(both.text_embeds.norm(dim=-1), torch.ones(3))
    expected = tiny_model.logit_scale.exp() * texts.text_embeds @ images.image_embeds.T
    torch.testing.assert_close(both.logits_per_text, expected)
    torch.testing.assert_close(both.logits_per_image, expected.T)
    loss = (-expected.log_softmax(1).diag().mean() - expected.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(both.loss, loss)


def test_parameters_come_in_the_order_of_clip(tiny_model, batch):
    names = [list(inspect.signature(kind.forward).parameters) for kind in (CapivaraModel, CLIPModel)]
    assert names[0][:6] == names[1][:6] and names[0][1:4] == ["input_ids", "pixel_values", "attention_mask"]
    assert CapivaraModel.main_input_name == CLIPModel.main_input_name == "input_ids"
    expected = tiny_model(**batch).logits_per_text
    actual = tiny_model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    torch.testing.assert_close(actual.logits_per_text, expected)
    text_names = [list(inspect.signature(kind.get_text_features).parameters) for kind in (CapivaraModel, CLIPModel)]
    assert text_names[0][:4] == text_names[1][:4] == ["self", "input_ids", "attention_mask", "position_ids"]


def test_position_ids_reach_the_text_tower_alone(tiny_model, batch):
    positions = torch.arange(2, 2 + batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    output = tiny_model(**batch, position_ids=positions)  # XLM-R's own positions, which start at the padding id plus 1
    torch.testing.assert_close(output.logits_per_text, tiny_model(**batch).logits_per_text)
    shifted = tiny_model(**batch, position_ids=positions + 3)
    assert (shifted.text_embeds - output.text_embeds).abs().max() > 1e-3
    torch.testing.assert_close(shifted.image_embeds, output.image_embeds)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    features = tiny_model.get_text_features(**texts, position_ids=positions + 3).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), shifted.text_embeds)


@pytest.mark.parametrize("masked", [True, False])
def test_text_features_of_embeddings_instead_of_ids(tiny_model, batch, masked):
    """Without a mask every state counts, because embeddings do not show which of them are padding."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert not mask.all(), "without padding the mask would prove nothing"
    # XLM-R skips padding tokens when it counts positions of ids, but counts all positions of embeddings.
    positions = torch.arange(2, 2 + ids.shape[1]).expand_as(ids)
    expected = tiny_model.get_text_features(ids, mask if masked else torch.ones_like(mask), positions).pooler_output
    embeds = tiny_model.get_input_embeddings()(ids)
    actual = tiny_model.get_text_features(inputs_embeds=embeds, attention_mask=mask if masked else None).pooler_output
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["neither", "both", "flat"])
def test_text_features_take_either_ids_or_embeddings(tiny_model, batch, kind):
    embeds = tiny_model.get_input_embeddings()(batch["input_ids"])
    arguments = {"neither": {}, "both": {"input_ids": batch["input_ids"], "inputs_embeds": embeds}}
    arguments["flat"] = {"inputs_embeds": embeds[0]}
    with pytest.raises(ValueError, match=r"inputs_embeds"):
        tiny_model.get_text_features(**arguments[kind])


@pytest.mark.parametrize("bias", [None, -1.0])
def test_loss_of_a_single_pair(batch, bias):
    """CLIP's loss is 0, because there is no wrong answer; SigLIP's loss is that of the single pair."""
    model = randomize(CapivaraModel(tiny_config(logit_bias_init_value=bias))).eval()
    output = model(**{name: values[:1] for name, values in batch.items()}, return_loss=True)
    expected = torch.zeros(()) if bias is None else -torch.nn.functional.logsigmoid(output.logits_per_text).sum()
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    gradients = [parameter.grad.abs().sum() for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and bool(sum(gradients)) == (bias is not None)
    with pytest.raises(ValueError, match=r"\b0\b"):
        clip_loss(output.text_embeds[:0], output.image_embeds[:0], model.logit_scale, model.logit_bias)


def test_padding_does_not_matter(tiny_model, tiny_processor, batch):
    padded = tiny_processor(text=TEXTS, padding="max_length", return_tensors="pt")
    assert padded["input_ids"].shape[1] == 77 > batch["input_ids"].shape[1]
    expected = tiny_model(**batch).text_embeds
    torch.testing.assert_close(tiny_model(**padded).text_embeds, expected, atol=1e-6, rtol=0)
    without_mask = tiny_model(input_ids=padded["input_ids"]).text_embeds
    torch.testing.assert_close(without_mask, expected, atol=1e-6, rtol=0)


def test_gradients_reach_both_towers_or_the_text_side_alone_when_frozen(tiny_model, batch):
    tiny_model(**batch, return_loss=True).loss.backward()
    missing = [n for n, p in tiny_model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not [name for name in missing if not name.endswith(("key.bias", "k_proj.bias"))]
    tiny_model.zero_grad()
    tiny_model.train().freeze_image_encoder()
    assert tiny_model.text_model.training and not tiny_model.vision_model.training, "before the next `train()`, too"
    batch["pixel_values"].requires_grad_()
    tiny_model.train()(**batch, return_loss=True).loss.backward()
    for name, parameter in tiny_model.named_parameters():
        image_side = name.startswith(("vision_model", "visual_projection"))
        has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
        # A key bias adds the same value to all scores of a query, which softmax ignores. Its gradient is a rounding
        # error.
        assert has_gradient != image_side or name.endswith("key.bias"), name
    assert batch["pixel_values"].grad.abs().sum() > 0, "guided image generation needs these gradients"
    assert tiny_model.text_model.training and not tiny_model.vision_model.training


def test_pooling_and_loss_stay_in_float32_under_autocast(tiny_model, batch):
    expected, outputs = tiny_model(**batch, return_loss=True), []
    hidden = 1 + torch.randn(2, 4000, 8, generator=torch.Generator().manual_seed(0)).bfloat16() / 8
    mask = torch.ones(2, 4000, dtype=torch.long)
    embeds = torch.nn.functional.normalize(torch.randn(64, 32), dim=-1)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            actual = tiny_model(**batch, return_loss=True)
            pooled, loss = mean_pooling(hidden, mask), clip_loss(embeds, embeds.flip(0), torch.tensor(4.6))
        assert {actual.loss.dtype, actual.text_embeds.dtype, actual.logits_per_text.dtype} == {torch.float32}
        torch.testing.assert_close(actual.text_embeds, expected.text_embeds, atol=0.03, rtol=0)
        torch.testing.assert_close(pooled, hidden.double().mean(1).float(), rtol=1e-5, atol=0)
        outputs.append(loss)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(tiny_folder, tmp_path, batch, dtype):
    expected = CapivaraModel.from_pretrained(tiny_folder)(**batch)
    model = CapivaraModel.from_pretrained(tiny_folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    actual = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    for side in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(actual[side], expected[side], atol=0.03, rtol=0)
    model.save_pretrained(tmp_path / "half")
    loaded = CapivaraModel.from_pretrained(tmp_path / "half")
    assert all(torch.equal(loaded.get_parameter(name), parameter) for name, parameter in model.named_parameters())
    new_model = CapivaraModel(loaded.config)  # ignores the dtype that is stored in the towers' configurations
    assert {parameter.dtype for parameter in new_model.parameters()} == {torch.float32}


def test_sdpa_equals_eager_and_reaches_both_towers(tiny_folder, batch):
    outputs = []
    for kind in ("sdpa", "eager"):
        model = CapivaraModel.from_pretrained(tiny_folder, attn_implementation=kind)
        assert {tower.config._attn_implementation for tower in (model.text_model, model.vision_model)} == {kind}
        outputs.append(model(**batch).logits_per_text)
    torch.testing.assert_close(*outputs)


@pytest.mark.slow
def test_compiles_in_one_graph_and_exports_both_towers(tiny_model, batch):
    expected = tiny_model(**batch).logits_per_text
    exported = torch.export.export(tiny_model, (), batch).module()
    for model in (torch.compile(tiny_model, backend="eager", fullgraph=True), exported):
        torch.testing.assert_close(model(**batch).logits_per_text, expected)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
VISION_TOWERS = {
    "vit": {"model_type": "vit", **SMALL, "image_size": 32, "patch_size": 16},
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "efficientnet": {  # its width is called hidden_dim instead of hidden_size
        **{"model_type": "efficientnet", "image_size": 32, "hidden_dim": 320},
        **{"width_coefficient": 0.25, "depth_coefficient": 0.1},
    },
    "timm": {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0"},
}
TEXT_TOWERS = {
    "bert": {"model_type": "bert", **SMALL, "vocab_size": 300},
    "distilbert": {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 300},
    "modernbert": {"model_type": "modernbert", **SMALL, "vocab_size": 300, "pad_token_id": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", one_in(4, [*VISION_TOWERS, *TEXT_TOWERS]))
def test_other_towers(kind, tmp_path, batch):
    towers = {"vision_config": VISION_TOWERS[kind]} if kind in VISION_TOWERS else {"text_config": TEXT_TOWERS[kind]}
    model = randomize(CapivaraModel(tiny_config(**towers))).eval()
    expected = model(**batch)
    assert expected.text_embeds.shape == expected.image_embeds.shape == (3, 24)
    model.save_pretrained(tmp_path)
    loaded = CapivaraModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits_per_text, expected.logits_per_text)


def test_new_weights_are_initialized(tmp_path):
    """In a model that is built from a configuration, and for weights that a folder lacks."""
    model = CapivaraModel(tiny_config(logit_scale_init_value=1.25))
    assert model.logit_scale.item() == 1.25 and all(torch.isfinite(weight).all() for weight in model.parameters())
    assert 0.01 < model.text_projection[0].weight.std() < 0.03, "initializer_range is 0.02"
    missing = {"logit_scale", "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if k not in missing})
    loaded, report = CapivaraModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing and loaded.logit_scale.item() == 1.25
    assert 0.01 < loaded.visual_projection.weight.std() < 0.03


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        (
            {"vision_config": {"model_type": "clip", "vision_config": SMALL, "text_config": SMALL}},
            "vision_config.*'clip'.*clip_vision_model",
        ),
        ({"vision_config": {"model_type": "bert", **SMALL}}, "vision_config.*`pixel_values`.*'bert'"),
        ({"text_config": {"model_type": "vit", **SMALL}}, "text_config.*`input_ids`.*'vit'.*xlm-roberta"),
        (
            {"vision_config": {"model_type": "vit_msn", **SMALL, "image_size": 32, "patch_size": 16}},
            "'vit_msn'.*`pooler_output`.*clip_vision_model",
        ),
    ],
)
def test_unsupported_towers_are_refused(towers, message, batch):
    with pytest.raises(ValueError, match=message):
        CapivaraModel(tiny_config(**towers))(pixel_values=batch["pixel_values"])


ONES = torch.ones(3, 7, dtype=torch.long)
PIXELS = torch.zeros(3, 3, 32, 32)
FAULTS = [
    ({}, "`input_ids`.*`pixel_values`"),
    ({"input_ids": ONES, "return_loss": True}, "`return_loss=True`.*`pixel_values`"),
    ({"input_ids": ONES, "attention_mask": ONES * torch.tensor([[1], [0], [1]])}, r"\[1\] of 3"),
    ({"input_ids": ONES, "attention_mask": ONES, "pixel_values": PIXELS[:2], "return_loss": True}, "3 and 2"),
    ({"pixel_values": PIXELS[0]}, r"pixel_values.*CapivaraImageProcessor.*\(3, 32, 32\)"),
    ({"input_ids": ONES[0]}, r"input_ids.*\(texts, tokens\)"),
    ({"input_ids": ONES, "attention_mask": ONES[:1]}, r"attention_mask.*\(3, 7\).*\(1, 7\)"),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"\[0, 1\] of 2"),
]


@pytest.mark.parametrize(("arguments", "message"), FAULTS)
def test_wrong_inputs_are_refused(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


def test_outputs_of_both_towers_reach_the_caller(tiny_model, batch):
    tiny_model.set_attn_implementation("eager")  # the other implementations return no attention weights
    output = tiny_model(**batch, output_hidden_states=True, output_attentions=True)
    text, image = output.text_model_output, output.vision_model_output
    assert [len(text.hidden_states), len(image.hidden_states)] == [3, 3]
    assert [a.shape for a in text.attentions] == [(3, 4, *batch["input_ids"].shape[1:] * 2)] * 2
    assert [a.shape for a in image.attentions] == [(3, 4, 5, 5)] * 2
    torch.testing.assert_close(text.pooler_output, mean_pooling(text.last_hidden_state, batch["attention_mask"]))
    features = tiny_model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    assert features.shape == (3, 24) and (features.norm(dim=-1) - 1).abs().max() > 1e-2
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), output.text_embeds)
    assert output.pooler_output is None, "with two modalities there is no single pooled output"
    assert [type(part) for part in output.to_tuple()] == [torch.Tensor] * 4 + [tuple] * 2


def test_the_check_of_the_mask_does_not_read_values_of_other_devices():
    # Tensors on the device "meta" have no values: reading one, which would synchronize a GPU, fails.
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    _check_attention_mask(ids, ids)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_equals_eager_in_both_towers(tiny_model, batch):
    tiny_model.set_attn_implementation("eager")
    expected = tiny_model(**batch)
    tiny_model.set_attn_implementation("flex_attention")
    kinds = {tower.config._attn_implementation for tower in (tiny_model.text_model, tiny_model.vision_model)}
    with torch.compiler.set_stance("force_eager"):  # compilation would take most of a minute
        actual = tiny_model(**batch)
    assert kinds == {"flex_attention"}
    torch.testing.assert_close(actual.text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.image_embeds, expected.image_embeds, rtol=0, atol=1e-5)


DOCUMENTED = (CapivaraConfig, CapivaraModel, CapivaraProcessor, CapivaraForImageClassification, load_embedder)


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__name__)
def test_examples_in_docstrings_run(documented, tiny_folder):
    names = {"folder": str(tiny_folder), "torch": torch}
    example = doctest.DocTestParser().get_doctest(documented.__doc__, names, documented.__name__, None, 0)
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.summarize(verbose=False) == (0, len(example.examples)) and example.examples

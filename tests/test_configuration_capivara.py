"""The configuration: published defaults, other towers, and refusal of wrong values."""

import math

import pytest
from tiny import tiny_config
from transformers import CLIPVisionConfig, ViTConfig, XLMRobertaConfig

from modeling_capivara import CapivaraConfig

PUBLISHED_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "image_size": 224, "patch_size": 32, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
PUBLISHED_TEXT = {
    "model_type": "xlm-roberta", "vocab_size": 250002, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1,
    "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "hidden_dropout_prob": 0.1,
}  # fmt: skip


def test_defaults_are_the_published_base():
    config = CapivaraConfig()
    assert type(config.vision_config) is CLIPVisionConfig
    assert type(config.text_config) is XLMRobertaConfig
    assert {key: getattr(config.vision_config, key) for key in PUBLISHED_VISION} == PUBLISHED_VISION
    assert {key: getattr(config.text_config, key) for key in PUBLISHED_TEXT} == PUBLISHED_TEXT
    assert (config.projection_dim, config.text_projection_type) == (512, "mlp")
    assert config.logit_scale_init_value == pytest.approx(math.log(1 / 0.07))


def test_missing_keys_of_a_dictionary_have_the_published_values():
    vision, text = {"num_hidden_layers": 3}, {"model_type": "xlm-roberta"}
    config = CapivaraConfig(vision_config=vision, text_config=text)
    assert (vision, text) == ({"num_hidden_layers": 3}, {"model_type": "xlm-roberta"}), "arguments must not be changed"
    assert (config.vision_config.num_hidden_layers, config.vision_config.hidden_act) == (3, "gelu")
    assert config.text_config.vocab_size == 250002
    other = CapivaraConfig(text_config={"model_type": "bert"})
    assert other.text_config.vocab_size == 30522, "another model type keeps its own defaults"
    assert other.text_config.layer_norm_eps == 1e-12


BAD_CONFIGS = [
    ({"projection_dim": 0}, r"projection_dim\b.*\b0\b"),
    ({"text_config": {"model_type": "no_tower"}}, "'no_tower'.*xlm-roberta"),
    ({"text_config": {"model_type": "t5"}}, "text_config.*'xlm-roberta'.*'t5'"),  # encoder and decoder
    ({"text_config": {"num_hidden_layers": 1001}}, r"^text_config.num_hidden_layers .*1000, got 1001"),
    ({"vision_config": ViTConfig(num_hidden_layers=10**7)}, "vision_config.num_hidden_layers .*1000"),
    ({"text_config": {"model_type": "distilbert", "n_layers": 10**7}}, "text_config.n_layers .*1000"),
    ({"vision_config": {"model_type": "vit", "image_size": [224, 10**6]}}, "vision_config.image_size .*10000"),
    ({"vision_config": {"hidden_size": math.nan}}, "vision_config.hidden_size .*nan"),
    (
        {"vision_config": {"model_type": "timm_wrapper", "architecture": "vit_tiny", "model_args": {"depth": 10**9}}},
        "vision_config.model_args.depth .*1000",
    ),
    ({"logit_scale_init_value": math.inf}, "logit_scale_init_value .*-20 to 20, got inf"),
    ({"text_config": {"pad_token_id": True}}, r"^text_config.pad_token_id .*True"),
    ({"text_config": {"pad_token_id": None}}, r"^text_config.pad_token_id .*null"),
    ({"text_config": {"vocab_size": 300, "pad_token_id": 300}}, r"pad_token_id .*vocab_size .*\b300\b"),
    ({"text_config": {"vocab_size": 1}}, r"pad_token_id .*vocab_size .*\b1, got 1\b"),
    ({"text_config": {"layer_norm_eps": -1e-5}}, "text_config.layer_norm_eps .*0 to 1, got -1e-05"),
    ({"vision_config": {"layer_norm_eps": math.nan}}, "vision_config.layer_norm_eps .*0 to 1, got nan"),
    ({"text_config": {"hidden_dropout_prob": math.nan}}, "text_config.hidden_dropout_prob .*0 to 1"),
    ({"projection_dim": "wide"}, "(?s)projection_dim.*wide"),
    ({"text_projection_type": "cubic"}, "(?s)text_projection_type.*cubic"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_CONFIGS)
def test_bad_values_are_refused_by_name(overrides, message):
    with pytest.raises(Exception, match=message) as caught:  # wrong types raise an error of huggingface_hub
        tiny_config(**overrides)
    assert isinstance(caught.value, ValueError) or "Validation" in type(caught.value).__name__

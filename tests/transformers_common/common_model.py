"""transformers' common model tests on `CapivaraModel` and `CapivaraForImageClassification`."""

import unittest

import torch
from tiny import TINY_TEXT, TINY_VISION
from transformers_tests.test_modeling_common import (
    ModelTesterMixin,
    floats_tensor,
    ids_tensor,
    random_attention_mask,
)

from modeling_capivara import CapivaraConfig, CapivaraForImageClassification, CapivaraModel


class ModelTester:
    """Sizes, a config and a batch of inputs, under the names that the common tests expect."""

    batch_size = 4
    seq_length = 7
    is_training = True
    num_channels = 3
    image_size = TINY_VISION["image_size"]
    patch_size = TINY_VISION["patch_size"]
    num_labels = 3

    def __init__(self, config: dict):
        self.num_hidden_layers = config["num_hidden_layers"]
        self.num_attention_heads = config["num_attention_heads"]
        self.hidden_size = config["hidden_size"]

    def get_config(self) -> CapivaraConfig:
        return CapivaraConfig(
            vision_config=TINY_VISION, text_config=TINY_TEXT, projection_dim=24, num_labels=self.num_labels
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[CapivaraConfig, dict]:
        pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        texts = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], TINY_TEXT["vocab_size"]),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
        }
        return self.get_config(), texts | {"pixel_values": pixels, "return_loss": True}


class ClassifierTester(ModelTester):
    """`ModelTester` for a model that takes only images."""

    def __init__(self, config: dict):
        super().__init__(config)
        self.seq_length = (self.image_size // self.patch_size) ** 2 + 1  # tokens of the image tower

    def prepare_config_and_inputs_for_common(self) -> tuple[CapivaraConfig, dict]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {"pixel_values": inputs["pixel_values"]}


class CapivaraModelTest(ModelTesterMixin, unittest.TestCase):
    """The two-tower model."""

    all_model_classes = (CapivaraModel,)
    additional_model_inputs = ["pixel_values"]
    test_resize_embeddings = False
    _is_composite = True

    def setUp(self):
        self.model_tester = ModelTester(TINY_TEXT)


class CapivaraForImageClassificationTest(ModelTesterMixin, unittest.TestCase):
    """The image classifier."""

    all_model_classes = (CapivaraForImageClassification,)
    test_resize_embeddings = False
    _is_composite = True

    def setUp(self):
        self.model_tester = ClassifierTester(TINY_VISION)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        # The common method adds labels for the classes of transformers only.
        labels = {"labels": torch.zeros(self.model_tester.batch_size, dtype=torch.long)} if return_labels else {}
        return super()._prepare_for_class(inputs_dict, model_class) | labels

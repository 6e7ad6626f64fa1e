"""The image classifier: it starts as the zero-shot classifier, trains with `Trainer` and is saved with its code."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, pipeline

from examples import fine_tune_classifier
from modeling_capivara import CapivaraForImageClassification

LABELS = ["gato", "cachorro", "casa"]
TEMPLATES = ["uma foto de {}.", "o {} azul"]


@pytest.fixture
def pixels():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def classifier(tiny_model, tiny_processor):
    return CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, LABELS, TEMPLATES)


@pytest.fixture
def classifier_folder(tmp_path, classifier, tiny_processor):
    classifier.save_pretrained(tmp_path / "classifier")
    tiny_processor.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def zero_shot_logits(model, processor, prompts: list[list[str]], pixels) -> torch.Tensor:
    """Compute zero-shot logits class by class, (images, classes)."""
    image_embeds = model(pixel_values=pixels).image_embeds
    columns = []
    for filled in prompts:
        embeds = model(**processor(text=filled, return_tensors="pt")).text_embeds
        columns.append(image_embeds @ F.normalize(embeds.mean(dim=0), dim=0))
    return model.logit_scale.exp() * torch.stack(columns, dim=1)


def test_starts_as_the_zero_shot_classifier(classifier, tiny_model, tiny_processor, pixels, monkeypatch):
    """Also if labels have several texts, which are embedded in batches."""
    prompts = [[template.replace("{}", label) for template in TEMPLATES] for label in LABELS]
    expected = zero_shot_logits(tiny_model, tiny_processor, prompts, pixels)
    assert expected.softmax(dim=-1).std(dim=0).min() > 0.01, "equal rows would prove nothing"
    actual = classifier(pixels)
    assert actual.loss is None and not classifier.training and not classifier.classifier.bias.any()
    torch.testing.assert_close(actual.logits.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=0)
    assert classifier.config.id2label == {0: "gato", 1: "cachorro", 2: "casa"}
    monkeypatch.setattr("modeling_capivara.modeling_capivara.TEXT_BATCH_SIZE", 4)  # 6 prompts: 4 and 2
    labels = {"cat": ["um gato", "the cat"], "house": "uma casa"}
    with_texts = CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, labels, ["{}", "foto: {}"])
    prompts = [["um gato", "foto: um gato", "the cat", "foto: the cat"], ["uma casa", "foto: uma casa"]]
    expected = zero_shot_logits(tiny_model, tiny_processor, prompts, pixels)
    torch.testing.assert_close(with_texts(pixels).logits, expected, atol=1e-5, rtol=0)
    assert with_texts.config.label2id == {"cat": 0, "house": 1}


def test_class_embeddings_are_made_without_dropout_and_the_model_keeps_its_mode(classifier, tiny_model, tiny_processor):
    tiny_model.train()  # the text tower has dropout of 0.1
    from_training = CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, LABELS, TEMPLATES)
    assert tiny_model.training and tiny_model.text_model.training
    assert torch.equal(from_training.classifier.weight, classifier.classifier.weight)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ({}, TEMPLATES, r"`labels`.* 2 .*\{\}"),
        (["gato", "casa", "gato"], TEMPLATES, "`labels`.*'gato'"),
        (["gato", " "], TEMPLATES, r"`labels`.*\[' '\]"),
        ({"a": [], "b": "casa"}, TEMPLATES, r"`labels`.*\[\] for 'a'"),
        (LABELS, [], r"`templates`.*\[\]"),
        (LABELS, ["uma foto de {}", "uma foto"], r"`templates`.*'uma foto'\]"),
    ],
)
def test_wrong_labels_and_templates_are_refused(tiny_model, tiny_processor, labels, templates, message):
    with pytest.raises(ValueError, match=message):
        CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, labels, templates)


def test_loads_from_a_folder_of_the_whole_model(tiny_folder, tiny_model, pixels):
    loaded, report = CapivaraForImageClassification.from_pretrained(tiny_folder, num_labels=7, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not report["unexpected_keys"]
    expected = tiny_model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, expected[name]), name
    assert loaded(pixels).logits.shape == (6, 7)
    assert 0.01 < loaded.classifier.weight.std() < 0.03, "initializer_range is 0.02"


def test_each_folder_names_its_own_class(tiny_model, tmp_path):
    shared = CapivaraForImageClassification(tiny_model.config)  # shares the configuration object
    classifier = {"AutoConfig", "AutoModelForImageClassification"}
    names = {tiny_model: classifier | {"AutoModel", "AutoModelForZeroShotImageClassification"}, shared: classifier}
    for number, model in enumerate([tiny_model, shared] * 2):
        model.save_pretrained(tmp_path / str(number))
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert set(config["auto_map"]) == names[model] and config["architectures"] == [type(model).__name__]
        for reference in config["auto_map"].values():
            assert (tmp_path / str(number) / f"{reference.split('.')[0]}.py").is_file()
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "3")) is CapivaraForImageClassification


def test_the_dtype_of_labels_selects_the_loss(classifier, pixels):
    """Integers for a single label per image, floats for several labels."""
    single, multiple = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]] * 2).float()
    output = classifier(pixels, labels=single)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, single))
    classifier.config.problem_type = None
    loss = classifier(pixels, labels=multiple).loss
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(output.logits, multiple))
    with pytest.raises(ValueError, match=r"pixel_values.*\(3, 32, 32\)"):
        classifier(pixels[0])


def test_half_precision_keeps_the_head_in_float32(classifier, classifier_folder, pixels):
    expected = classifier(pixels).logits
    loaded = CapivaraForImageClassification.from_pretrained(classifier_folder, dtype=torch.bfloat16)
    assert (loaded.dtype, loaded.classifier.weight.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = classifier(pixels).logits
    for actual in (loaded(pixels.bfloat16()).logits, autocast):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, atol=0.5, rtol=0)
    from_config = AutoModelForImageClassification.from_config(classifier.config, dtype=torch.bfloat16)
    assert (from_config.dtype, from_config.logit_scale.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {parameter.dtype for parameter in from_config.classifier.parameters()} == {torch.float32}
    assert from_config(pixels.bfloat16()).logits.dtype == torch.float32
    image = Image.new("RGB", (40, 37), (200, 30, 30))
    assert len(pipeline("image-classification", str(classifier_folder), dtype=torch.bfloat16)(image)) == 3


@pytest.mark.slow
def test_example_with_the_digits(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    splits = fine_tune_classifier.make_digits_dataset([str(digit) for digit in range(10)], seed=0)
    assert [len(splits["train"]), len(splits["test"])] == [1347, 450]
    assert set(np.bincount(splits["test"]["labels"])) <= {43, 44, 45, 46}, "split evenly"
    fine_tune_classifier.main(["--model", str(tiny_folder), "--output_dir", str(out)])
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    zero_shot, fine_tuned = results["accuracy"]["zero_shot"], results["accuracy"]["fine_tuned"]
    assert f"{100 * zero_shot:.2f} %" in printed and f"{100 * fine_tuned:.2f} %" in printed
    assert zero_shot < 0.3 and fine_tuned > 0.8
    classify = pipeline("image-classification", str(out))
    correct = [classify(row["image"])[0]["label"] == str(row["labels"]) for row in splits["test"].select(range(40))]
    assert sum(correct) > 28, "the saved folder is the fine-tuned model"


def test_with_a_frozen_tower_only_the_head_learns_and_the_source_model_is_not_changed(classifier, tiny_model, pixels):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    classifier.freeze_image_encoder()
    classifier.train()(pixels, labels=torch.tensor([0, 1, 2, 2, 1, 0])).loss.backward()
    trained = {name for name, parameter in classifier.named_parameters() if parameter.grad is not None}
    assert trained == {"classifier.weight", "classifier.bias", "logit_scale"} and not classifier.vision_model.training
    for parameter in classifier.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    assert tiny_model.config.num_labels == 2, "the default of transformers; the shared configuration was not changed"

"""The classifier: equal to zero-shot at the start, trained by transformers' Trainer, saved with its code."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from examples import fine_tune_classifier
from modeling_capivara import CapivaraForImageClassification, CapivaraModel

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
    """(images, classes), one class at a time."""
    image_embeds = model(pixel_values=pixels).image_embeds
    columns = []
    for filled in prompts:
        embeds = model(**processor(text=filled, return_tensors="pt")).text_embeds
        columns.append(image_embeds @ F.normalize(embeds.mean(dim=0), dim=0))
    return model.logit_scale.exp() * torch.stack(columns, dim=1)


# --- From zero-shot --------------------------------------------------------------------------------------------------


def test_starts_as_the_zero_shot_classifier(classifier, tiny_model, tiny_processor, pixels, monkeypatch):
    """Also where labels stand for several texts, which go through in batches."""
    prompts = [[template.replace("{}", label) for template in TEMPLATES] for label in LABELS]
    expected = zero_shot_logits(tiny_model, tiny_processor, prompts, pixels)
    assert expected.softmax(dim=-1).std(dim=0).min() > 0.01, "equal rows would prove nothing"
    actual = classifier(pixels)
    assert actual.loss is None and not classifier.training and not classifier.classifier.bias.any()
    torch.testing.assert_close(actual.logits.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=0)
    assert classifier.config.id2label == {0: "gato", 1: "cachorro", 2: "casa"}
    assert classifier.config.label2id == {"gato": 0, "cachorro": 1, "casa": 2}
    compiled = torch.compile(classifier, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels).logits, actual.logits)
    monkeypatch.setattr("modeling_capivara.modeling_capivara.TEXT_BATCH_SIZE", 4)  # 6 prompts: 4 and 2
    labels = {"cat": ["um gato", "the cat"], "house": "uma casa"}
    several = CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, labels, ["{}", "foto: {}"])
    prompts = [["um gato", "foto: um gato", "the cat", "foto: the cat"], ["uma casa", "foto: uma casa"]]
    expected = zero_shot_logits(tiny_model, tiny_processor, prompts, pixels)
    torch.testing.assert_close(several(pixels).logits, expected, atol=1e-5, rtol=0)
    assert several.config.id2label == {0: "cat", 1: "house"}


def test_the_model_is_left_as_it_was(classifier, tiny_model, tiny_processor, pixels):
    tiny_model.freeze_image_tower()
    tiny_model.train()
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    again = CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, LABELS, TEMPLATES)
    torch.testing.assert_close(again(pixels).logits, classifier(pixels).logits)  # no dropout in the class embeddings
    assert tiny_model.training and tiny_model.config.num_labels == 2
    assert all(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ({}, TEMPLATES, "`labels` must be a list of at least 2"),
        (["gato", "casa", "gato"], TEMPLATES, r"must differ, got \['gato'\] repeatedly"),
        (["gato", " "], TEMPLATES, r"`labels` must be texts that are not blank, .*got \[' '\]"),
        ({"a": [], "b": "casa"}, TEMPLATES, r"at least one each, got \[\] for 'a'"),
        (LABELS, [], r"`templates` must be a list of texts with \{\} where the label goes, got \[\]"),
        (LABELS, ["uma foto de {}", "uma foto"], r"with \{\} where the label goes, got .*'uma foto'\]"),
    ],
)
def test_errors_name_value_rule_and_way_out(tiny_model, tiny_processor, labels, templates, message):
    with pytest.raises(ValueError, match=message):
        CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, labels, templates)


# --- Folders ---------------------------------------------------------------------------------------------------------


def test_save_and_load(classifier, classifier_folder, pixels):
    loaded, report = AutoModelForImageClassification.from_pretrained(classifier_folder, output_loading_info=True)
    assert type(loaded) is CapivaraForImageClassification
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(pixels).logits, classifier(pixels).logits)
    assert loaded.config.id2label == classifier.config.id2label


def test_loads_from_a_folder_of_the_whole_model(tiny_folder, tiny_model, pixels):
    loaded, report = CapivaraForImageClassification.from_pretrained(tiny_folder, num_labels=7, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert not hasattr(loaded, "text_model")
    expected = tiny_model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, expected[name]), name
    assert loaded(pixels).logits.shape == (6, 7)
    assert 0.01 < loaded.classifier.weight.std() < 0.03, "initializer_range is 0.02"


def test_each_folder_names_its_own_class(classifier, tiny_model, tmp_path):
    shared = CapivaraForImageClassification(tiny_model.config)  # the very same configuration object
    names = {
        "model": {
            *("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForZeroShotImageClassification")
        },
        "classifier": {"AutoConfig", "AutoModelForImageClassification"},
    }
    for number, (kind, model) in enumerate([("model", tiny_model), ("classifier", shared)] * 2):
        model.save_pretrained(tmp_path / str(number))
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert set(config["auto_map"]) == names[kind]
        assert config["architectures"] == [type(model).__name__]
        for where in config["auto_map"].values():
            assert (tmp_path / str(number) / f"{where.split('.')[0]}.py").is_file()
    assert type(CapivaraModel.from_pretrained(tmp_path / "2")) is CapivaraModel


# --- Training --------------------------------------------------------------------------------------------------------


def test_losses(classifier, pixels):
    """Of one label an image or several: the type of the labels chooses."""
    single, several = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]] * 2).float()
    output = classifier(pixels, labels=single)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, single))
    classifier.config.problem_type = None
    loss = classifier(pixels, labels=several).loss
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(output.logits, several))
    with pytest.raises(ValueError):
        classifier(pixels, labels=several[:4])
    with pytest.raises(ValueError, match=r"pixel_values.*\(3, 32, 32\)"):
        classifier(pixels[0])


def test_gradients_reach_the_head_alone_where_the_tower_is_frozen(classifier, pixels):
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    classifier.freeze_image_tower()
    classifier.train()(pixels, labels=labels).loss.backward()
    reached = {name for name, parameter in classifier.named_parameters() if parameter.grad is not None}
    assert reached == {"classifier.weight", "classifier.bias", "logit_scale"}
    assert classifier.training and not classifier.vision_model.training


def rows_of(pixels, labels) -> list[dict]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def training_arguments(folder, **changes) -> TrainingArguments:
    plain = {"max_steps": 2, "per_device_train_batch_size": 6, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    plain |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **(plain | changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_accumulated_batches_are_one_batch(tiny_model, tiny_processor, pixels, tmp_path, kind):
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    labels = labels if kind == "single" else F.one_hot(labels).float()
    weights = []
    for size in (6, 2):
        model = CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, LABELS, TEMPLATES)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size, "max_steps": 1}
        arguments = training_arguments(tmp_path, optim="sgd", max_grad_norm=0, **changes)
        Trainer(model, arguments, train_dataset=rows_of(pixels, labels)).train()
        weights.append(model.classifier.weight.detach())
    untouched = CapivaraForImageClassification.from_zero_shot(tiny_model, tiny_processor, LABELS, TEMPLATES)
    assert (weights[0] - untouched.classifier.weight).abs().max() > 1e-4, "no step would prove nothing"
    torch.testing.assert_close(*weights, atol=1e-7, rtol=1e-5)


# --- Precision and ways to call --------------------------------------------------------------------------------------


def test_half_precision_keeps_the_head_in_float32(tiny_model, tiny_processor, classifier, classifier_folder, pixels):
    expected = classifier(pixels).logits
    loaded = CapivaraForImageClassification.from_pretrained(classifier_folder, dtype=torch.bfloat16)
    converted = tiny_model.to(torch.bfloat16)
    converted = CapivaraForImageClassification.from_zero_shot(converted, tiny_processor, LABELS, TEMPLATES)
    for model in (loaded, converted):
        assert (model.dtype, model.classifier.weight.dtype) == (torch.bfloat16, torch.float32)
        actual = model(pixels.to(model.dtype)).logits
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, atol=0.5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        output = classifier(pixels, labels=torch.tensor([0, 1, 2, 2, 1, 0]))
    assert output.logits.dtype == output.loss.dtype == torch.float32
    torch.testing.assert_close(output.logits, expected, atol=0.5, rtol=0)
    image = Image.new("RGB", (40, 37), (200, 30, 30))
    assert len(pipeline("image-classification", str(classifier_folder), dtype=torch.bfloat16)(image)) == 3


# --- The worked example ----------------------------------------------------------------------------------------------


def test_example_refuses_before_long_work(tiny_folder, tmp_path):
    flags = ["--model", str(tiny_folder), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="cifar-10 needs its images"):
        fine_tune_classifier.main([*flags, "--benchmark", "cifar-10"])
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        fine_tune_classifier.main([*flags, "--image_size", "0"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is not empty"):
        fine_tune_classifier.main(["--model", str(tiny_folder), "--output_dir", str(tiny_folder)])


@pytest.mark.slow
def test_example_with_the_digits(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    splits = fine_tune_classifier.digits([str(digit) for digit in range(10)], seed=0)
    assert [len(splits["train"]), len(splits["test"])] == [1347, 450]
    assert set(np.bincount(splits["test"]["labels"])) <= {43, 44, 45, 46}, "split evenly"
    fine_tune_classifier.main(["--model", str(tiny_folder), "--output_dir", str(out)])
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    zero_shot, fine_tuned = results["accuracy"]["zero_shot"], results["accuracy"]["fine_tuned"]
    assert f"{100 * zero_shot:.2f} %" in printed and f"{100 * fine_tuned:.2f} %" in printed
    assert zero_shot < 0.3 and fine_tuned > 0.8
    classify = pipeline("image-classification", str(out))
    right = [classify(row["image"])[0]["label"] == str(row["labels"]) for row in splits["test"].select(range(40))]
    assert sum(right) > 28, "the saved folder is the fine-tuned model"


@pytest.mark.slow
def test_example_with_a_folder_of_images(tiny_folder, tmp_path):
    for split in ("train", "test"):
        for number in range(10):
            (tmp_path / "images" / split / str(number)).mkdir(parents=True)
            for copy in range(2):
                image = Image.new("L", (40, 40), 25 * number + copy)
                image.save(tmp_path / "images" / split / str(number) / f"{copy}.png")
    (tmp_path / "images" / "train" / "3" / "0.png").write_bytes(b"no picture")
    flags = ["--model", str(tiny_folder), "--images", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out")]
    fine_tune_classifier.main([*flags, "--head_only", "--epochs", "1"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["train_images"], results["test_images"]) == (19, 20)
    told = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md", ".bin")]
    assert not [path.name for path in told if str(tmp_path).encode() in path.read_bytes()], "a place of this machine"
    assert f"`{tiny_folder.name}` fine-tuned on the images of images;" in (tmp_path / "out" / "README.md").read_text()
    whole = CapivaraModel.from_pretrained(tiny_folder)
    tuned = CapivaraForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(whole.visual_projection.weight, tuned.visual_projection.weight)

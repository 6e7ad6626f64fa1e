"""Logistic regression on frozen embeddings."""

import json

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from eval import linear_probe
from eval.linear_probe import Features as Embedded
from eval.linear_probe import few_of_each, held_out, main, probe_scores

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def blobs(number: int, seed: int, classes: int = 4) -> Embedded:
    generator = np.random.default_rng(seed)
    labels = np.arange(number) % classes
    centres = np.random.default_rng(99).normal(size=(classes, 8))
    return Embedded((centres[labels] + 0.3 * generator.normal(size=(number, 8))).astype(np.float32), labels)


def test_separable_classes_are_learnt_and_unseen_ones_never_chosen():
    test = blobs(80, 1)
    scores, penalty = probe_scores(blobs(80, 0), None, test, classes=6, generator=np.random.default_rng(0))
    assert (scores.argmax(1).numpy() == test.labels).mean() > 0.9 and penalty > 0
    assert (scores[:, 4:] == -1e9).all()


def test_the_penalty_is_chosen_on_the_validation_split():
    train, test = blobs(40, 0), blobs(40, 1)
    flipped = Embedded(train.embeds, (train.labels + 1) % 4)  # a validation split that no penalty suits
    _, with_good = probe_scores(train, blobs(40, 2), test, 4, np.random.default_rng(0))
    scores, _ = probe_scores(train, flipped, test, 4, np.random.default_rng(0))
    assert with_good in np.logspace(-3, 5, 9) and scores.shape == (40, 4)


def test_two_classes():
    test = blobs(20, 1, classes=2)
    scores, _ = probe_scores(blobs(20, 0, classes=2), None, test, 2, np.random.default_rng(0))
    assert (scores.argmax(1).numpy() == test.labels).mean() > 0.9


def test_one_class_is_refused():
    train = Embedded(np.zeros((3, 2), dtype=np.float32), np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="at least two classes"):
        probe_scores(train, None, train, 2, np.random.default_rng(0))


def test_few_of_each_class():
    labels = np.array([0] * 5 + [1] * 2 + [2])
    rows = few_of_each(labels, 2, np.random.default_rng(0))
    assert sorted(labels[rows]) == [0, 0, 1, 1, 2]
    fit, choose = held_out(labels, np.random.default_rng(0))
    assert sorted([*fit, *choose]) == list(range(8)) and sorted(labels[choose]) == [0, 1]


@pytest.fixture
def colours(tmp_path):
    """Four noisy pictures of each of three colours in training, two in test."""
    generator = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=CIFAR)})

    def split(number: int) -> Dataset:
        rows = {"image": [], "label": []}
        for label, colour in enumerate(((250, 0, 0), (0, 250, 0), (0, 0, 250))):
            for _ in range(number):
                noise = generator.random((32, 32, 3)) * 60
                rows["image"].append(PIL.Image.fromarray((noise + 0.7 * np.array(colour)).astype(np.uint8)))
                rows["label"].append(label)
        return Dataset.from_dict(rows, features=features)

    DatasetDict(train=split(4), test=split(2)).save_to_disk(tmp_path / "colours")
    return tmp_path / "colours"


def test_command(tiny_folder, colours, tmp_path):
    flags = ["--model", str(tiny_folder), "--benchmark", "cifar-10", "--images", str(colours), "--shots", "1", "2"]
    main([*flags, "--draws", "2", "--output", str(tmp_path / "p.json")])
    content = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    protocols = {record["protocol"]: record for record in content["records"] if record["metric"] == "accuracy"}
    assert set(protocols) == {"1-shot", "2-shot"} and protocols["2-shot"]["n"] == 6
    assert len(content["chosen_penalties"]["1-shot"]) == 2
    main([*flags[:6], "--output", str(tmp_path / "full.json")])
    (full,) = [r for r in json.loads((tmp_path / "full.json").read_text())["records"] if r["metric"] == "accuracy"]
    assert full["protocol"] == "full" and full["value"] >= 1 / 3 and full["chance"] == 0.1


def test_a_draw_without_a_value_is_not_left_out_of_the_mean(tiny_folder, colours, tmp_path, monkeypatch):
    values = iter([0.5, float("nan")])
    monkeypatch.setattr(linear_probe, "classification_metrics", lambda *_: {"accuracy": next(values)})
    flags = ["--model", str(tiny_folder), "--benchmark", "cifar-10", "--images", str(colours), "--shots", "1"]
    with pytest.raises(SystemExit, match="value must be a finite number, got nan"):
        main([*flags, "--draws", "2", "--output", str(tmp_path / "p.json")])


def test_slips(tiny_folder, colours, tmp_path):
    flags = ["--model", str(tiny_folder), "--benchmark", "cifar-10", "--images", str(colours)]
    with pytest.raises(SystemExit, match="shots and draws must be at least 1"):
        main([*flags, "--shots", "0", "--output", str(tmp_path / "p.json")])
    with pytest.raises(SystemExit, match=r"no split 'validation'; there are"):
        main([*flags, "--validation_split", "validation", "--output", str(tmp_path / "p.json")])


def test_the_same_images_are_not_fitted_and_measured(tiny_folder, tmp_path):
    for name in CIFAR[:3]:
        (tmp_path / "d" / name).mkdir(parents=True)
        for number in range(3):
            PIL.Image.new("RGB", (40, 40), (60 * number, 9, len(name))).save(tmp_path / "d" / name / f"{number}.png")
    flags = ["--model", str(tiny_folder), "--benchmark", "cifar-10", "--images", str(tmp_path / "d")]
    with pytest.raises(SystemExit, match="splits 'train' and 'test' hold the same images"):
        main([*flags, "--output", str(tmp_path / "p.json")])
    with pytest.raises(SystemExit, match="splits 'test' and 'test' hold the same images"):
        main([*flags, "--train_split", "test", "--output", str(tmp_path / "p.json")])

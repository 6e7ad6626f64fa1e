"""The linear probe: logistic regression on frozen image embeddings."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from eval.linear_probe import (
    LabeledFeatures,
    draw_random_validation_fold,
    main,
    sample_few_shot,
    tune_probe_and_score_images,
)

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def make_blobs(count: int, seed: int, classes: int = 4) -> LabeledFeatures:
    """Draw points around one center per class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centers = np.random.default_rng(99).normal(size=(classes, 8))
    return ((centers[labels] + 0.3 * rng.normal(size=(count, 8))).astype(np.float32), labels)


def test_separable_classes_are_learned_and_unseen_classes_never_predicted():
    """Two classes are enough, one is not."""
    for classes in (4, 2):
        train, test = (make_blobs(20 * classes, seed, classes) for seed in range(2))
        scores, penalty = tune_probe_and_score_images(train, None, test, class_count=6, rng=np.random.default_rng(0))
        assert (scores.argmax(1).numpy() == test[1]).mean() > 0.9 and penalty > 0
        assert (scores[:, classes:] == -1e9).all()
    train = (np.zeros((3, 2), dtype=np.float32), np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match=r"\b1\.$"):
        tune_probe_and_score_images(train, None, train, 2, np.random.default_rng(0))


def test_few_shot_samples_and_validation_folds_are_stratified():
    labels = np.array([0] * 5 + [1] * 2 + [2])
    rows = sample_few_shot(labels, 2, np.random.default_rng(0))
    assert sorted(labels[rows]) == [0, 0, 1, 1, 2]
    fold = draw_random_validation_fold(labels, np.random.default_rng(0))
    assert set(fold) == {-1, 0} and sorted(labels[fold == 0]) == [0, 1]


@pytest.fixture(scope="module")
def flags(tmp_path_factory, saved_tiny_folder) -> list[str]:
    """Flags of the command for a dataset of three colors with four training and two test images of each."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("colors")
    for split, count in (("train", 4), ("test", 2)):
        for name, color in zip(CIFAR, ((250, 0, 0), (0, 250, 0), (0, 0, 250)), strict=False):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.random((32, 32, 3)) * 60 + 0.7 * np.array(color)
                PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return ["--model", str(saved_tiny_folder), "--benchmark", "cifar-10", "--images", str(folder)]


def test_the_command_measures_a_probe_on_all_training_images(flags, tmp_path):
    """tests/test_golden.py measures few-shot probes."""
    main([*flags, "--output", str(tmp_path / "full.json")])
    content = json.loads((tmp_path / "full.json").read_text(encoding="utf-8"))
    (full,) = [record for record in content["records"] if record["metric"] == "accuracy"]
    assert (full["protocol"], full["n"], full["chance"]) == ("full", 6, 0.1) and full["value"] >= 1 / 3
    assert len(content["chosen_penalties"]["full"]) == 1


def test_few_shot_probes_ignore_the_validation_split(flags, tmp_path):
    """With one image per class there are no images to select C on, so it stays 1 in every draw."""
    folder = shutil.copytree(flags[-1], tmp_path / "colors")
    for path in (folder / "train").glob("*/3.png"):
        (folder / "validation" / path.parent.name).mkdir(parents=True)
        path.rename(folder / "validation" / path.parent.name / path.name)
    argv = [*flags[:-1], str(folder), "--validation_split", "validation", "--output", str(tmp_path / "p.json")]
    main([*argv, "--shots", "1", "--draws", "2"])
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))["chosen_penalties"] == {"1-shot": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("argument_text", "message"),
    [
        ("--shots 0", r"--shots .*\[0\]"),
        ("--images no-data --output .", r"output file .* is a folder"),  # refused before the dataset is opened
        ("--validation_split validation", r"'validation'"),
        ("--train_split test", "'test' and 'test'"),  # test images must not be trained on
    ],
)
def test_invalid_arguments_are_refused(flags, tmp_path, argument_text, message):
    with pytest.raises(ValueError, match=message):
        main([*flags, "--output", str(tmp_path / "p.json"), *argument_text.split()])

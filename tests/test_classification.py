"""Zero-shot classification, from the dataset to the result file."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Sequence
from towers import as_open_clip

from capivara_common.image_files import BadImage
from caption_data.labeled_images import _map_labels_to_prompt_classes, load_images_with_prompt_class_labels
from eval.classification import compute_chance_level, compute_classification_metrics, main
from eval.prompts import load_prompts

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CLASS_LABEL = ClassLabel(names=CIFAR)
SHUFFLED = sorted(CIFAR, reverse=True)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """Folder with a subfolder of three noisy images for each class of CIFAR-10."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("made") / "images"
    for number, name in enumerate(CIFAR):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            color = np.array([number * 25, 255 - number * 25, number * 13])
            pixels = (rng.random((40, 40, 3)) * 40 + color * 0.8).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def images_copy(image_folder, tmp_path) -> Path:
    """Copy of the image folder that a test may change."""
    return shutil.copytree(image_folder, tmp_path / "images")


def make_flags(model_folder, images_folder, output_file, **other_flags) -> list[str]:
    values = {
        "model": model_folder,
        "benchmark": "cifar-10",
        "images": images_folder,
        "output": output_file,
        **other_flags,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def read_result(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def save_dataset(folder: Path, files: list[Path], labels: list, feature=None) -> str:
    """Save the image files with labels as a Hugging Face dataset and return its path."""
    rows = Dataset.from_dict({"image": list(map(str, files)), "label": labels}).cast_column("image", Image())
    DatasetDict(test=rows.cast_column("label", feature) if feature else rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def test_a_folder_of_images_is_classified_without_its_damaged_image(saved_tiny_folder, images_copy, tmp_path, capsys):
    (images_copy / "cat" / "1.png").write_bytes(b"not an image")
    main(make_flags(saved_tiny_folder, images_copy, tmp_path / "r.json"))
    content = read_result(tmp_path / "r.json")
    assert content["skipped_rows"] == 1 and len(content["skipped"]) == 1
    values = {record["metric"]: record for record in content["records"]}
    assert set(values) == {"accuracy", "top_5_accuracy"} and values["accuracy"]["n"] == 29
    matrix = torch.tensor(content["confusion_matrix"])
    assert matrix.sum() == 29 and matrix.trace() / 29 == pytest.approx(values["accuracy"]["value"])
    assert content["classes"][0] == "avião" and values["accuracy"]["chance"] == 0.1
    assert "accuracy" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(content) and values["accuracy"]["model_folder"] == "model"


def test_classes_are_matched_by_name(image_folder, tmp_path):
    files = [image_folder / name / "0.png" for name in SHUFFLED]
    folder = save_dataset(tmp_path, files, list(range(10)), ClassLabel(names=SHUFFLED))
    assert load_images_with_prompt_class_labels(folder, "test", CIFAR).labels == [
        CIFAR.index(name) for name in SHUFFLED
    ]
    for split, names, options, message in (
        ("test", ["avião", *CIFAR[1:]], {}, "'airplane'"),
        ("train", CIFAR, {}, "'train'"),
        ("test", CIFAR, {"label_column": "class"}, "'class'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images_with_prompt_class_labels(folder, split, names, **options)


def test_an_image_may_have_several_labels_but_none_out_of_range(image_folder, tmp_path):
    files = [image_folder / "cat" / "0.png"] * 2
    with pytest.raises(ValueError, match=r"\[10\]"):
        load_images_with_prompt_class_labels(save_dataset(tmp_path / "outside", files, [3, 10]), "test", CIFAR)
    images = load_images_with_prompt_class_labels(
        save_dataset(tmp_path, files, [[0, 3], [2]], Sequence(CLASS_LABEL)), "test", CIFAR
    )
    assert images.labels == [[0, 3], [2]]


def test_chance_equals_the_metrics_of_random_scores():
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.rand(5000, 8, generator=generator), torch.arange(5000) % 8
    for metric, classes in (("accuracy", 8), ("mean-per-class", 8), ("roc_auc", 2)):
        values = compute_classification_metrics(scores[:, :classes], (labels % classes).tolist(), metric)
        for name, value in values.items():
            assert compute_chance_level(name, labels.tolist(), classes) == pytest.approx(value, abs=0.03), name
    label_lists = [[row % 8, (row + 1) % 8] for row in range(800)]
    value = compute_classification_metrics(scores[:800], label_lists, "11point_mAP")["11point_mAP"]
    assert compute_chance_level("11point_mAP", label_lists, 8) == pytest.approx(value, abs=0.03)


def test_each_metric_is_computed_by_its_name():
    scores, labels = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), [1, 0, 0]
    multilabel_scores = torch.zeros(2, 10)
    multilabel_scores[0, [0, 3]] = multilabel_scores[1, 2] = 1.0
    assert compute_classification_metrics(multilabel_scores, [[0, 3], [2]], "11point_mAP") == {"11point_mAP": 1.0}
    assert compute_classification_metrics(scores, labels, "roc_auc") == {
        "roc_auc": 1.0,
        "accuracy": pytest.approx(2 / 3),
    }
    values = compute_classification_metrics(scores, labels, "mean-per-class")
    assert values == {"mean_per_class_accuracy": 0.75, "accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("other_flags", "message"),
    [
        ({"benchmark": "cifar-11"}, "`cifar-11`.*`cifar-10`"),
        ({"model": "open_clip:ViT-B-32"}, "--role baseline"),
        ({"model": "open_clip:ViT-B-32", "role": "baseline"}, "open_clip:ViT-B-32:"),
        ({"model": "open_clip:foo:bar", "role": "baseline"}, "foo:bar"),
        ({"model": "clip:tests"}, "clip:tests"),
        ({"device": "tpuu"}, "tpuu"),
    ],
)
def test_invalid_arguments_are_refused_before_measuring(
    saved_tiny_folder, image_folder, tmp_path, other_flags, message
):
    with pytest.raises(ValueError, match=message):
        main(make_flags(saved_tiny_folder, image_folder, tmp_path / "r.json", **other_flags))
    assert not (tmp_path / "r.json").exists()


def test_the_same_weights_in_open_clips_format_give_the_same_figures(saved_tiny_folder, image_folder, tmp_path):
    as_open_clip(saved_tiny_folder, tmp_path / "open_clip")
    main(make_flags(saved_tiny_folder, image_folder, tmp_path / "ours.json"))
    name = f"open_clip:local-dir:{tmp_path / 'open_clip'}"
    main(make_flags(name, image_folder, tmp_path / "theirs.json", role="baseline"))
    ours, theirs = (read_result(tmp_path / f"{name}.json")["records"] for name in ("ours", "theirs"))
    values = [record["value"] for record in theirs]
    assert [record["value"] for record in ours] == pytest.approx(values, abs=1e-6)


def test_repeated_names_are_matched_in_order_and_slashes_as_underscores():
    """ImageNet has two classes called "missile". A folder can't have a slash in its name."""
    assert load_prompts("imagenet-1k").english_names.count("missile") == 2
    class_names = ["missile", "cat", "missile"]
    assert _map_labels_to_prompt_classes(["cat", "missile", "Missile"], class_names, "d") == {0: 1, 1: 0, 2: 2}
    with pytest.raises(ValueError, match=r"\['cat'\]"):
        _map_labels_to_prompt_classes(["cat", "cat"], class_names, "d")
    assert _map_labels_to_prompt_classes(["F-16A_B", "Boeing 737-200"], ["Boeing 737-200", "F-16A/B"], "d") == {
        0: 1,
        1: 0,
    }


def test_images_of_classes_without_prompts_are_left_out(image_folder):
    images = load_images_with_prompt_class_labels(str(image_folder), "test", CIFAR, class_indices=[3, 0])
    assert sorted(images.labels) == [0] * 3 + [1] * 3 and len(images.images) == 6


def test_a_listed_file_outside_of_the_folder_is_refused(images_copy):
    shutil.copy(images_copy / "cat/1.png", images_copy.parent / "secret.png")
    (images_copy / "metadata.jsonl").write_text(json.dumps({"file_name": "../secret.png", "label": 0}))
    with pytest.raises(BadImage, match="outside"):
        load_images_with_prompt_class_labels(str(images_copy), "train", CIFAR).images.load_image(0)


@pytest.mark.parametrize("name", ["cat/1.png", "cat"])
def test_links_out_of_the_folder_are_refused(images_copy, tmp_path, name):
    (images_copy / name).rename(tmp_path / "elsewhere")
    (images_copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"\['{name}'\]"):
        load_images_with_prompt_class_labels(str(images_copy), "test", CIFAR)


def test_tars_of_clip_benchmark_are_read(saved_tiny_folder, image_folder, tmp_path):
    """The tars have images and class numbers; classnames.txt has the names, here in another order."""
    (tmp_path / "wds" / "test").mkdir(parents=True)
    (tmp_path / "wds" / "classnames.txt").write_text("\n".join(SHUFFLED) + "\n", encoding="utf-8")
    with tarfile.open(tmp_path / "wds" / "test" / "0.tar", "w") as tar:
        for number, name in enumerate(SHUFFLED):
            PIL.Image.open(image_folder / name / "0.png").save(webp := io.BytesIO(), "WEBP", lossless=True)
            for ending, data in (("webp", webp.getvalue()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"s{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    images = load_images_with_prompt_class_labels(str(tmp_path / "wds"), "test", CIFAR)
    assert images.labels == [CIFAR.index(name) for name in SHUFFLED]
    main(make_flags(saved_tiny_folder, tmp_path / "wds", tmp_path / "r.json"))
    content = read_result(tmp_path / "r.json")
    assert content["records"][0]["n"] == 10 and [sum(row) for row in content["confusion_matrix"]] == [1] * 10


def test_a_folder_called_train_may_be_a_class_but_is_no_test_split(images_copy, tmp_path):
    """CIFAR-100 has a class called train. A split for training must not be measured as test."""
    (images_copy / "truck").rename(images_copy / "train")
    names = ["train" if name == "truck" else name for name in CIFAR]
    assert sorted(load_images_with_prompt_class_labels(str(images_copy), "test", names).labels) == sorted(
        list(range(10)) * 3
    )
    (tmp_path / "splits").mkdir()
    images_copy.rename(tmp_path / "splits" / "train")
    with pytest.raises(ValueError, match=r"'test'.*\['train'\]"):
        main(make_flags("no-model", tmp_path / "splits", tmp_path / "r.json"))

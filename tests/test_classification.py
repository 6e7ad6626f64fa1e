"""Zero-shot classification, from folder to result file."""

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
from caption_data.labeled_images import _match_class_names, load_labeled_images
from eval.classification import compute_chance, compute_classification_metrics, main
from eval.prompts import load_prompts

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CLASS = ClassLabel(names=CIFAR)
SHUFFLED = sorted(CIFAR, reverse=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three noisy pictures a class of CIFAR-10, a sub-folder a class."""
    generator, folder = np.random.default_rng(0), tmp_path_factory.mktemp("made") / "images"
    for number, name in enumerate(CIFAR):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            colour = np.array([number * 25, 255 - number * 25, number * 13])
            pixels = (generator.random((40, 40, 3)) * 40 + colour * 0.8).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def own_pictures(pictures, tmp_path) -> Path:
    """A copy of them that a test may change."""
    return shutil.copytree(pictures, tmp_path / "images")


def flags(folder, pictures, result, **more) -> list[str]:
    values = {"model": folder, "benchmark": "cifar-10", "images": pictures, "output": result, **more}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def result_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def saved(folder: Path, files: list[Path], labels: list, feature=None) -> str:
    """A saved data set of these files."""
    rows = Dataset.from_dict({"image": list(map(str, files)), "label": labels}).cast_column("image", Image())
    DatasetDict(test=rows.cast_column("label", feature) if feature else rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def test_a_folder_of_images(saved_tiny_folder, own_pictures, tmp_path, capsys):
    (own_pictures / "cat" / "1.png").write_bytes(b"no picture")
    main(flags(saved_tiny_folder, own_pictures, tmp_path / "r.json"))
    content = result_of(tmp_path / "r.json")
    assert content["skipped_rows"] == 1 and len(content["skipped"]) == 1
    values = {record["metric"]: record for record in content["records"]}
    assert set(values) == {"accuracy", "top_5_accuracy"} and values["accuracy"]["n"] == 29
    matrix = torch.tensor(content["confusion_matrix"])
    assert matrix.sum() == 29 and matrix.trace() / 29 == pytest.approx(values["accuracy"]["value"])
    assert content["classes"][0] == "avião" and values["accuracy"]["chance"] == 0.1
    assert "accuracy" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(content) and values["accuracy"]["model_folder"] == "model"


def test_classes_are_matched_by_name(pictures, tmp_path):
    files = [pictures / name / "0.png" for name in SHUFFLED]
    folder = saved(tmp_path, files, list(range(10)), ClassLabel(names=SHUFFLED))
    assert load_labeled_images(folder, "test", CIFAR).labels == [CIFAR.index(name) for name in SHUFFLED]
    for split, names, more, message in (
        ("test", ["avião", *CIFAR[1:]], {}, r"don't match by name: \['airplane'.*'avião' are missing|are unknown"),
        ("train", CIFAR, {}, "no split 'train'"),
        ("test", CIFAR, {"label_column": "class"}, "no column 'class'; there are"),
    ):
        with pytest.raises(ValueError, match=message):
            load_labeled_images(folder, split, names, **more)


def test_labels_several_an_image_or_without_a_name(pictures, tmp_path):
    files = [pictures / "cat" / "0.png"] * 2
    with pytest.raises(ValueError, match=r"labels \[10\] are outside the 10 classes"):
        load_labeled_images(saved(tmp_path / "outside", files, [3, 10]), "test", CIFAR)
    images = load_labeled_images(saved(tmp_path, files, [[0, 3], [2]], Sequence(CLASS)), "test", CIFAR)
    assert images.labels == [[0, 3], [2]]


def test_chance_is_what_random_scores_reach():
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.rand(5000, 8, generator=generator), torch.arange(5000) % 8
    for metric, few in (("accuracy", 8), ("mean-per-class", 8), ("roc_auc", 2)):
        found = compute_classification_metrics(scores[:, :few], (labels % few).tolist(), metric)
        for name, value in found.items():
            assert compute_chance(name, labels.tolist(), few) == pytest.approx(value, abs=0.03), name
    several = [[row % 8, (row + 1) % 8] for row in range(800)]
    value = compute_classification_metrics(scores[:800], several, "11point_mAP")["11point_mAP"]
    assert compute_chance("11point_mAP", several, 8) == pytest.approx(value, abs=0.03)


def test_metrics_of_a_data_set():
    scores, labels = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), [1, 0, 0]
    several = torch.zeros(2, 10)
    several[0, [0, 3]] = several[1, 2] = 1.0
    assert compute_classification_metrics(several, [[0, 3], [2]], "11point_mAP") == {"11point_mAP": 1.0}
    assert compute_classification_metrics(scores, labels, "roc_auc") == {
        "roc_auc": 1.0,
        "accuracy": pytest.approx(2 / 3),
    }
    found = compute_classification_metrics(scores, labels, "mean-per-class")
    assert found == {"mean_per_class_accuracy": 0.75, "accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"benchmark": "cifar-11"}, "Unknown benchmark: `cifar-11`. Did you mean `cifar-10`"),
        ({"model": "open_clip:ViT-B-32"}, "--role baseline"),
        ({"model": "open_clip:ViT-B-32", "role": "baseline"}, "names no weights; say open_clip:ViT-B-32:TAG"),
        ({"model": "open_clip:foo:bar", "role": "baseline"}, "open_clip can't load 'foo:bar'"),
        ({"model": "clip:tests"}, "clip:tests: models of transformers are named as they are, tests"),
        ({"device": "tpuu"}, "device must be cpu, cuda or one GPU of several such as cuda:1; 'tpuu'"),
    ],
)
def test_slips_end_early(saved_tiny_folder, pictures, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(flags(saved_tiny_folder, pictures, tmp_path / "r.json", **more))
    assert not (tmp_path / "r.json").exists()


def test_an_open_clip_baseline(saved_tiny_folder, pictures, tmp_path):
    """The same weights in open_clip's format give the same figures."""
    as_open_clip(saved_tiny_folder, tmp_path / "open_clip")
    main(flags(saved_tiny_folder, pictures, tmp_path / "ours.json"))
    name = f"open_clip:local-dir:{tmp_path / 'open_clip'}"
    main(flags(name, pictures, tmp_path / "theirs.json", role="baseline"))
    ours, theirs = (result_of(tmp_path / f"{name}.json")["records"] for name in ("ours", "theirs"))
    assert [r["value"] for r in ours] == pytest.approx([r["value"] for r in theirs], abs=1e-6)


def test_names_are_matched_as_folders_can_have_them_and_in_their_order():
    """ImageNet has two classes called "missile", and two called "sunglasses"."""
    assert load_prompts("imagenet-1k").english_names.count("missile") == 2
    wanted = ["missile", "cat", "missile"]
    assert _match_class_names(["cat", "missile", "Missile"], wanted, "d") == {0: 1, 1: 0, 2: 2}
    with pytest.raises(ValueError, match=r"more often than the prompts do: \['cat'\]"):
        _match_class_names(["cat", "cat"], wanted, "d")
    assert _match_class_names(["F-16A_B", "Boeing 737-200"], ["Boeing 737-200", "F-16A/B"], "d") == {0: 1, 1: 0}


def test_images_of_classes_without_a_name_are_left_out(pictures):
    images = load_labeled_images(str(pictures), "test", CIFAR, class_indices=[3, 0])
    assert sorted(images.labels) == [0] * 3 + [1] * 3 and len(images.images) == 6


def test_a_file_outside_its_folder_that_a_list_names_is_refused(own_pictures):
    shutil.copy(own_pictures / "cat/1.png", own_pictures.parent / "secret.png")
    (own_pictures / "metadata.jsonl").write_text(json.dumps({"file_name": "../secret.png", "label": 0}))
    with pytest.raises(BadImage, match="lies outside"):
        load_labeled_images(str(own_pictures), "train", CIFAR).images.load_image(0)


@pytest.mark.parametrize("name", ["cat/1.png", "cat"])
def test_links_out_of_the_folder_are_refused(own_pictures, tmp_path, name):
    (own_pictures / name).rename(tmp_path / "elsewhere")
    (own_pictures / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"links to files outside of it, refused: \['{name}'\]"):
        load_labeled_images(str(own_pictures), "test", CIFAR)


def test_clip_benchmarks_tars(saved_tiny_folder, pictures, tmp_path):
    """WebDataset tars of image and class number, with the names in a file of their own, in another order."""
    (tmp_path / "wds" / "test").mkdir(parents=True)
    (tmp_path / "wds" / "classnames.txt").write_text("\n".join(SHUFFLED) + "\n", encoding="utf-8")
    with tarfile.open(tmp_path / "wds" / "test" / "0.tar", "w") as tar:
        for number, name in enumerate(SHUFFLED):
            PIL.Image.open(pictures / name / "0.png").save(webp := io.BytesIO(), "WEBP", lossless=True)
            for ending, data in (("webp", webp.getvalue()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"s{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    images = load_labeled_images(str(tmp_path / "wds"), "test", CIFAR)
    assert images.labels == [CIFAR.index(name) for name in SHUFFLED]
    main(flags(saved_tiny_folder, tmp_path / "wds", tmp_path / "r.json"))
    content = result_of(tmp_path / "r.json")
    assert content["records"][0]["n"] == 10 and [sum(row) for row in content["confusion_matrix"]] == [1] * 10


def test_folders_named_for_splits_and_a_class_called_train(own_pictures, tmp_path):
    """What is trained on is not measured as test; CIFAR-100 has a class of that name."""
    (own_pictures / "truck").rename(own_pictures / "train")
    names = ["train" if name == "truck" else name for name in CIFAR]
    assert sorted(load_labeled_images(str(own_pictures), "test", names).labels) == sorted(list(range(10)) * 3)
    (tmp_path / "splits").mkdir()
    own_pictures.rename(tmp_path / "splits" / "train")
    with pytest.raises(ValueError, match=r"has no split 'test'; there are \['train'\]\.$"):
        main(flags("no-model", tmp_path / "splits", tmp_path / "r.json"))

"""Zero-shot classification, from folder to result file."""

import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence

from capivara_common.image_files import BadImage
from caption_data.labelled_images import _by_name, load_images
from eval.classification import chance_of, class_embeddings, classification_metrics, main
from eval.embeddings import EmbeddingStore
from eval.prompts import load_prompts
from modeling_capivara.embedder import load_embedder

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def image_folder(tmp_path):
    """Three noisy pictures a class of CIFAR-10, a sub-folder a class."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(CIFAR):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(3):
            colour = np.array([number * 25, 255 - number * 25, number * 13])
            pixels = (generator.random((40, 40, 3)) * 40 + colour * 0.8).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def flags(folder, pictures, result, **more) -> list[str]:
    values = {"model": folder, "benchmark": "cifar-10", "images": pictures, "output": result, **more}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def test_a_folder_of_images(tiny_folder, image_folder, tmp_path, capsys):
    (image_folder / "cat" / "1.png").write_bytes(b"no picture")
    main(flags(tiny_folder, image_folder, tmp_path / "r.json"))
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert content["skipped_rows"] == 1 and len(content["skipped"]) == 1
    values = {record["metric"]: record for record in content["records"]}
    assert set(values) == {"accuracy", "top_5_accuracy"} and values["accuracy"]["n"] == 29
    matrix = torch.tensor(content["confusion_matrix"])
    assert matrix.sum() == 29 and matrix.trace() / 29 == pytest.approx(values["accuracy"]["value"])
    assert content["classes"][0] == "avião" and values["accuracy"]["chance"] == 0.1
    assert "accuracy" in capsys.readouterr().out


def test_scores_are_cosines_with_the_mean_of_the_prompts(tiny_folder, tmp_path):
    embedder, prompts = load_embedder(str(tiny_folder)), load_prompts("cifar-10")
    embeds = class_embeddings(EmbeddingStore(embedder, tmp_path), prompts)
    each = embedder.texts(prompts.filled[3], 4)
    torch.testing.assert_close(embeds[3], torch.nn.functional.normalize(each.mean(0), dim=0), rtol=1e-4, atol=1e-5)


def test_classes_are_matched_by_name(image_folder, tmp_path):
    shuffled = sorted(CIFAR, reverse=True)
    features = Features({"image": Image(), "label": ClassLabel(names=shuffled)})
    pictures = [str(image_folder / name / "0.png") for name in shuffled]
    rows = Dataset.from_dict({"image": pictures, "label": list(range(10))}, features=features)
    DatasetDict(test=rows).save_to_disk(tmp_path / "saved")
    images = load_images(str(tmp_path / "saved"), "test", CIFAR)
    assert images.labels == [CIFAR.index(name) for name in shuffled]
    with pytest.raises(ValueError, match=r"don't match by name: \['airplane'.*'avião' are missing|are unknown"):
        load_images(str(tmp_path / "saved"), "test", ["avião", *CIFAR[1:]])
    with pytest.raises(ValueError, match="no split 'train'"):
        load_images(str(tmp_path / "saved"), "train", CIFAR)
    with pytest.raises(ValueError, match="no column 'class'; there are"):
        load_images(str(tmp_path / "saved"), "test", CIFAR, label_column="class")


def test_labels_without_a_name_are_refused(image_folder, tmp_path):
    rows = Dataset.from_dict({"image": [str(image_folder / "cat" / "0.png")], "label": [10]})
    DatasetDict(test=rows.cast_column("image", Image())).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"labels \[10\] are outside the 10 classes"):
        load_images(str(tmp_path / "saved"), "test", CIFAR)


def test_several_labels_an_image(image_folder, tmp_path):
    features = Features({"image": Image(), "label": Sequence(ClassLabel(names=CIFAR))})
    rows = {"image": [str(image_folder / "cat" / "0.png")] * 2, "label": [[0, 3], [2]]}
    DatasetDict(test=Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "saved")
    images = load_images(str(tmp_path / "saved"), "test", CIFAR)
    assert images.labels == [[0, 3], [2]]
    scores = torch.zeros(2, 10)
    scores[0, [0, 3]] = scores[1, 2] = 1.0
    assert classification_metrics(scores, images.labels, "11point_mAP") == {"11point_mAP": 1.0}


def test_chance_is_what_random_scores_reach():
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.rand(5000, 8, generator=generator), torch.arange(5000) % 8
    for metric, few in (("accuracy", 8), ("mean-per-class", 8), ("roc_auc", 2)):
        found = classification_metrics(scores[:, :few], (labels % few).tolist(), metric)
        for name, value in found.items():
            assert chance_of(name, labels.tolist(), few) == pytest.approx(value, abs=0.03), name
    several = [[row % 8, (row + 1) % 8] for row in range(800)]
    value = classification_metrics(scores[:800], several, "11point_mAP")["11point_mAP"]
    assert chance_of("11point_mAP", several, 8) == pytest.approx(value, abs=0.03)


def test_metrics_of_a_data_set():
    scores, labels = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), [1, 0, 0]
    assert classification_metrics(scores, labels, "roc_auc") == {"roc_auc": 1.0, "accuracy": pytest.approx(2 / 3)}
    found = classification_metrics(scores, labels, "mean-per-class")
    assert found == {"mean_per_class_accuracy": 0.75, "accuracy": pytest.approx(2 / 3)}


def test_a_missing_split_names_its_flag_alone(tiny_folder, image_folder, tmp_path):
    (tmp_path / "splits").mkdir()
    image_folder.rename(tmp_path / "splits" / "train")
    with pytest.raises(SystemExit, match=r"no split 'test'; there are \['train'\]\.$"):
        main(flags(tiny_folder, tmp_path / "splits", tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"benchmark": "cifar-11"}, "Unknown benchmark: `cifar-11`. Did you mean `cifar-10`"),
        ({"images": "/nowhere/at/all"}, "nowhere"),
        ({"language": "es"}, "cifar-10 are in 'pt'; leave out --language es"),
        ({"model": "open_clip:ViT-B-32"}, "--role baseline"),
        ({"model": "open_clip:ViT-B-32", "role": "baseline"}, "names no weights; say open_clip:ViT-B-32:TAG"),
        ({"model": "open_clip:foo:bar", "role": "baseline"}, "open_clip can't load 'foo:bar'"),
        ({"model": "clip:tests", "role": "baseline"}, "clip:tests can't be loaded; it must hold a CLIP"),
        ({"device": "tpuu"}, "device must be cpu, cuda or one GPU of several such as cuda:1; 'tpuu'"),
        ({"batch_size": "0"}, "batch_size must be at least 1, got 0"),
    ],
)
def test_slips_end_early(tiny_folder, image_folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        main(flags(tiny_folder, image_folder, tmp_path / "r.json", **more))
    assert not (tmp_path / "r.json").exists()


def test_an_open_clip_baseline(tiny_folder, image_folder, tmp_path):
    """The same weights in open_clip's format give the same figures."""
    from modeling_capivara.convert_open_clip import main as convert

    convert([str(tiny_folder), str(tmp_path / "open_clip"), "--to-open-clip"])
    main(flags(tiny_folder, image_folder, tmp_path / "ours.json"))
    name = f"open_clip:local-dir:{tmp_path / 'open_clip'}"
    main(flags(name, image_folder, tmp_path / "theirs.json", role="baseline"))
    values = [
        [record["value"] for record in json.loads((tmp_path / f"{name}.json").read_text())["records"]]
        for name in ("ours", "theirs")
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_names_that_occur_twice_are_matched_in_their_order(image_folder, tmp_path):
    """ImageNet has two classes called "missile", and two called "sunglasses"."""
    assert load_prompts("imagenet-1k").names_en.count("missile") == 2
    wanted = ["missile", "cat", "missile"]
    assert _by_name(["cat", "missile", "Missile"], wanted, "d") == {0: 1, 1: 0, 2: 2}
    with pytest.raises(ValueError, match=r"more often than the prompts do: \['cat'\]"):
        _by_name(["cat", "cat"], wanted, "d")


def test_images_of_classes_without_a_name_are_left_out(image_folder, tmp_path):
    images = load_images(str(image_folder), "test", CIFAR, indices=[3, 0])
    assert sorted(images.labels) == [0] * 3 + [1] * 3 and len(images.images) == 6


@pytest.mark.parametrize("key", ["file_name", "image_file_name", "file_names"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_file_outside_its_folder_that_a_list_names_is_not_opened(image_folder, form, key):
    name = ["../secret.png"] if key == "file_names" and form != "csv" else "../secret.png"
    row, path = {key: name, "label": 0}, image_folder / f"metadata.{form}"
    if form == "parquet":
        Dataset.from_list([row]).to_parquet(path)
    else:
        path.write_text(json.dumps(row) if form == "jsonl" else f"{key},label\n{name},0\n", encoding="utf-8")
    PIL.Image.new("RGB", (40, 40)).save(image_folder.parent / "secret.png")
    if form == "csv":  # pictures are taken by their names
        assert len(load_images(str(image_folder), "test", CIFAR).images) == 30
        return
    (image_folder / "test").mkdir()
    path.rename(image_folder / "test" / path.name)
    if form == "parquet":
        with pytest.raises(ValueError, match="of images"):
            load_images(str(image_folder), "test", CIFAR)
        return
    images = load_images(str(image_folder), "test", CIFAR).images
    with pytest.raises(BadImage):
        images.image(0)


@pytest.mark.parametrize("name", ["cat/1.png", "cat"])
def test_links_out_of_the_folder_are_refused(image_folder, tmp_path, name):
    (image_folder / name).rename(tmp_path / "elsewhere")
    (image_folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"links to files outside of it, refused: \['{name}'\]"):
        load_images(str(image_folder), "test", CIFAR)
    (tmp_path / "link").symlink_to(image_folder)
    (image_folder / name).unlink()
    (tmp_path / "elsewhere").rename(image_folder / name)
    assert len(load_images(str(tmp_path / "link"), "test", CIFAR).images) == 30


def test_clip_benchmarks_tars(tiny_folder, image_folder, tmp_path):
    """WebDataset tars of image and class number, with the names in a file of their own, in another order."""
    shuffled = sorted(CIFAR, reverse=True)
    (tmp_path / "wds" / "test").mkdir(parents=True)
    (tmp_path / "wds" / "classnames.txt").write_text("\n".join(shuffled) + "\n", encoding="utf-8")
    with tarfile.open(tmp_path / "wds" / "test" / "0.tar", "w") as tar:
        for number, name in enumerate(shuffled):
            for ending, data in (("png", (image_folder / name / "0.png").read_bytes()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"s{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    images = load_images(str(tmp_path / "wds"), "test", CIFAR)
    assert images.labels == [CIFAR.index(name) for name in shuffled]
    main(flags(tiny_folder, tmp_path / "wds", tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["records"][0]["n"] == 10


def test_a_lone_train_split_is_not_measured_as_test(image_folder, tmp_path):
    (tmp_path / "splits").mkdir()
    image_folder.rename(tmp_path / "splits" / "train")
    with pytest.raises(ValueError, match="has no split 'test'; there are \\['train'\\]"):
        load_images(str(tmp_path / "splits"), "test", CIFAR)


def test_a_class_may_be_called_train(image_folder):
    names = ["train" if name == "truck" else name for name in CIFAR]  # as CIFAR-100 has one
    (image_folder / "truck").rename(image_folder / "train")
    images = load_images(str(image_folder), "test", names)
    assert sorted(images.labels) == sorted(list(range(10)) * 3)


def test_signs_in_names_of_folders():
    assert _by_name(["F-16A_B", "Boeing 737-200"], ["Boeing 737-200", "F-16A/B"], "d") == {0: 1, 1: 0}


def test_authors_list_without_a_name_counts_its_class_as_wrong(tiny_folder, tmp_path):
    """Food-101's list has 100 names for 101 classes; FER-2013's names are lists, of which the first counts."""
    names = load_prompts("food-101").names_en
    listed = repr([[name, "x"] for name in names[:100]])
    (tmp_path / "authors.py").write_text(
        f'food_classes = {listed}\nfood_templates = ["uma foto de {{}}"]\n'
        'class_map = {"food-101": food_classes}\ntemplate_map = {"food-101": food_templates}\n',
        encoding="utf-8",
    )
    for name in (names[0], names[100]):
        (tmp_path / "d" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (40, 40), (len(name), 9, 9)).save(tmp_path / "d" / name / "0.png")
    more = {"benchmark": "food-101", "protocol": "authors", "authors_file": tmp_path / "authors.py"}
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [str(tmp_path / "d" / name / "0.png") for name in (names[0], names[100])], "label": [0, 100]}
    DatasetDict(test=Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "saved")
    main(flags(tiny_folder, tmp_path / "saved", tmp_path / "r.json", **more))
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert content["per_class_accuracy"][100] == 0 and "tacos" in content["notes"][0]


def test_results_name_no_place_of_the_machine(tiny_folder, image_folder, tmp_path):
    main(flags(tiny_folder, image_folder, tmp_path / "r.json"))
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and '"model_folder": "model"' in text

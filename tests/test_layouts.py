"""Published layouts of their own, and where data are looked for."""

import json
import os

import pytest
from made_benchmarks import BENCHMARKS, IMAGES, make_captions, make_flickr30k_200, make_pracegover, make_xm3600

from capivara_common.image_files import decode_image
from caption_data.sources import open_split
from eval.benchmarks import adapted, local_data, locate


def captions_of(folder, language: str) -> list:
    """Of the rows that `eval.retrieval` would read, whose images can be opened."""
    source = open_split(str(folder), "test", "image", image_roots=[(folder / "test" / "images").resolve()])
    rows = list(source.rows())
    assert all(decode_image(row["image"], source.files).size == (38, 34) for row in rows)
    return [row[f"captions-{language}"] for row in rows]


def test_pracegover(tmp_path):
    make_pracegover(tmp_path / "data")
    made = adapted("pracegover", tmp_path / "data", "test", "pt", tmp_path / "made")
    assert captions_of(made, "pt") == [[f"foto {number:03d}.jpg"] for number in range(IMAGES)]
    assert not any(path.is_file() and path.suffix == ".jpg" for path in made.rglob("*") if not path.is_symlink())


@pytest.mark.parametrize("name", ["test.json", "test/dataset.json"])
def test_a_list_of_the_split_alone(tmp_path, name):
    make_pracegover(tmp_path / "data")
    posts = json.loads((tmp_path / "data" / "pracegover_400k.json").read_text(encoding="utf-8"))["test"]
    (tmp_path / "data" / "pracegover_400k.json").unlink()
    (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "data" / name).write_text(json.dumps(posts[:3]), encoding="utf-8")
    assert len(captions_of(adapted("pracegover", tmp_path / "data", "test", "pt", tmp_path / "made"), "pt")) == 3


def test_all_posts_are_not_taken_for_the_test_split(tmp_path):
    make_pracegover(tmp_path)
    (tmp_path / "pracegover_400k.json").rename(tmp_path / "dataset.json")
    with pytest.raises(ValueError, match=r"holds all posts and names no split\. Take pracegover_400k.json"):
        adapted("pracegover", tmp_path, "test", "pt", tmp_path / "made")


def test_xm3600(tmp_path):
    make_xm3600(tmp_path / "data")
    made = adapted("xm3600", tmp_path / "data", "test", "hi", tmp_path / "made")
    assert captions_of(made, "hi")[1] == ["hi foto 001", "casa 001"]
    with pytest.raises(ValueError, match="line 0 has no captions of 'xh'; there are en, es, hi, pt, sw"):
        adapted("xm3600", tmp_path / "data", "test", "xh", tmp_path / "made")


def test_flickr30k_200(tmp_path):
    make_flickr30k_200(tmp_path / "data")
    made = adapted("flickr30k_200", tmp_path / "data", "test", "xho_Latn", tmp_path / "made")
    assert captions_of(made, "xho_Latn")[2] == ["xho_Latn 002.jpg"]
    (tmp_path / "data" / "xho_Latn.txt").write_text("one line\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1 captions of xho_Latn for 12 images"):
        adapted("flickr30k_200", tmp_path / "data", "test", "xho_Latn", tmp_path / "made")
    with pytest.raises(ValueError, match=r"There is no swh_Latn\.txt in data"):
        adapted("flickr30k_200", tmp_path / "data", "test", "swh_Latn", tmp_path / "made")


def test_flickr30k_200_as_clip_benchmark_leaves_it(tmp_path):
    """Its own class reads the same captions of the same images."""
    clip_benchmark = pytest.importorskip("clip_benchmark.datasets.flickr30k_200")
    make_flickr30k_200(tmp_path / "data" / "flickr30k-200")
    images = tmp_path / "data" / "flickr30k-200" / "images"
    content = {
        "image_paths": [str(images / name) for name in sorted(os.listdir(images))],
        "annotations": [f"foto {number}" for number in range(IMAGES)],
    }
    path = tmp_path / "data" / clip_benchmark.OUTPUT_FILENAME_TEMPLATE.format("por_Latn")
    path.write_text(json.dumps(content), encoding="utf-8")
    theirs = clip_benchmark.Flickr30k_200(str(tmp_path), str(path))
    made = adapted("flickr30k_200", tmp_path / "data", "test", "por_Latn", tmp_path / "made")
    assert captions_of(made, "por_Latn") == [captions for _, captions in theirs]
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="needs `image_paths` and `annotations`"):
        adapted("flickr30k_200", tmp_path / "data", "test", "por_Latn", tmp_path / "made")


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "..\\b.jpg", ""])
def test_names_that_point_outside_are_refused(tmp_path, name):
    make_pracegover(tmp_path / "data")
    path = tmp_path / "data" / "pracegover_400k.json"
    posts = json.loads(path.read_text(encoding="utf-8"))
    posts["test"][3]["filename"] = name
    path.write_text(json.dumps(posts), encoding="utf-8")
    with pytest.raises(ValueError, match="points out of the folder of images and is refused"):
        adapted("pracegover", tmp_path / "data", "test", "pt", tmp_path / "made")


@pytest.mark.parametrize("name", ["images/003.jpg", "images"])
def test_links_that_point_outside_are_refused(tmp_path, name):
    make_pracegover(tmp_path / "data")
    (tmp_path / "data" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"links to files outside of it, refused: \['{name}'\]"):
        adapted("pracegover", tmp_path / "data", "test", "pt", tmp_path / "made")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"test": [{"filename": 3, "caption": "x"}]}', "post 0 needs the texts"),
        ('{"train": []}', r"no split 'test'; there are \['train'\]"),
        ("3", "must hold a list of posts"),
        ("{", "pracegover_400k.json is not JSON"),
    ],
)
def test_files_of_another_form(tmp_path, text, message):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "pracegover_400k.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        adapted("pracegover", tmp_path / "data", "test", "pt", tmp_path / "made")


def test_a_folder_without_images(tmp_path):
    make_xm3600(tmp_path)
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(ValueError, match="has no folder of images images"):
        adapted("xm3600", tmp_path, "test", "pt", tmp_path / "made")


@pytest.mark.parametrize("reader", ["pracegover", "xm3600", "flickr30k_200"])
def test_other_forms_are_left_as_they_are(tmp_path, reader):
    make_captions(tmp_path / "data", "captions-pt")
    assert adapted(reader, tmp_path / "data", "test", "pt", tmp_path / "made") == tmp_path / "data"


def test_where_data_are_looked_for(tmp_path):
    def place(key, given, fault=""):
        return locate(BENCHMARKS[key], local_data(given), tmp_path, lambda: fault)

    for key in ("imagenet-1k", "cifar-10", "own"):
        (tmp_path / key).mkdir()

    def local(name):
        return {"data": str(tmp_path / name), "local": True, "reason": ""}

    assert place("cifar-10", [f"cifar-10={tmp_path / 'own'}"]) == local("own")
    assert place("cifar-10", []) == local("cifar-10")
    assert place("babel-imagenet", []) == local("imagenet-1k")
    assert place("gtsrb", []) == {"data": "clip-benchmark/wds_gtsrb", "local": False, "reason": ""}
    assert "and offline; give --data gtsrb=PATH" in place("gtsrb", [], fault="offline")["reason"]
    assert "and it is down; give" in place("gtsrb", [], fault="it is down")["reason"]
    assert "no Hub id is known; give --data food-101=PATH" in place("food-101", [])["reason"]

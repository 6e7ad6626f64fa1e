"""Untrusted paths and URLs in dataset rows: nothing outside the dataset is read, and nothing is downloaded."""

import base64
import http.server
import io
import json
import os
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import yaml
from caption_tars import files_of, write_tar
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from hub_client import hub_commands
from test_generate import image_processor, opt_tokenizer, tiny_blip2

import train_accelerate
from capivara_common import image_files
from capivara_common.files import AllowedFolders
from capivara_common.image_files import BadImage, ImageAccess, decode_image, read_image_bytes
from caption_data.labeled_images import load_images_with_prompt_class_labels
from caption_data.sources import open_split
from captions.build import BuildArguments, build_dataset
from captions.generate import main as generate
from captions.score import main as score
from captions.select import main as select
from eval.classification import main as classify
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths

MARK = b"SENTINEL-0f3a9c"  # content of every file that must not be read
MAGENTA = (255, 0, 255)  # color of the private photo; no other image contains it
GOOD = 6  # valid rows of a dataset


class Counter(http.server.BaseHTTPRequestHandler):
    """HTTP server that answers every path with an image and records the requests."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.picture)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


def png(color: tuple[int, int, int], **options) -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (32, 32), color).save(stream, "PNG", **options)
    return stream.getvalue()


def photo() -> bytes:
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.ImageDescription] = MARK.decode()
    return png(MAGENTA, exif=exif)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counter) as http_server:
        http_server.requests, http_server.picture = [], photo()
        threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
        yield http_server
        http_server.shutdown()


@pytest.fixture
def hostile(tmp_path, server) -> list[str]:
    """Paths and URLs that rows must not be able to open. The folder `data` is for the rows."""
    home, data = tmp_path / "home", tmp_path / "data"
    for name, content in (
        ("token", b"hf_" + MARK), (".ssh/id_ed25519", b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + MARK),
        ("private.png", photo()),
    ):  # fmt: skip
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    data.mkdir()
    (data / "notes.txt").write_bytes(MARK)  # inside the dataset, but not an image
    (data / "link.png").symlink_to(home / "private.png")
    os.mkfifo(data / "fifo.png")
    os.mkfifo(home / "fifo")
    local = [home / "token", home / ".ssh" / "id_ed25519", "/etc/passwd", home / "private.png", home / "fifo"]
    local += ["/dev/zero", "/proc/self/fd/1", "../home/private.png", "link.png", "fifo.png", "notes.txt"]
    web = f"127.0.0.1:{server.server_port}"
    archive = tmp_path / "home" / "a.zip"
    shutil.make_archive(str(archive.with_suffix("")), "zip", home, "private.png")
    addresses = [
        f"http://{web}/a.png", f"HTTP://{web}/a.png", f"ftp://{web}/a.png", f"file://{home}/private.png",
        f"simplecache::http://{web}/a.png", f"zip://private.png::file://{archive}", f"zip://private.png::{archive}",
        "hf://datasets/a/b/c.png", f"hf://datasets/a/b/c.png::http://{web}/a.png", "memory://a.png",
        f"data:;base64,{base64.b64encode(photo()).decode()}",
    ]  # fmt: skip
    return [*map(str, local), *addresses]


def good() -> list[bytes]:
    return [png((40 * i, 200 - 30 * i, 90)) for i in range(GOOD)]


def rows_of(hostile: list[str]) -> dict[str, list]:
    """Return valid rows with bytes, followed by hostile rows with only a path."""
    images = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(good())]
    images += [{"bytes": None, "path": path} for path in hostile]
    return {"image": images, "captions-pt": [[f"foto {i}"] for i in range(len(images))]}


FEATURES = Features({"image": Image(), "captions-pt": List(Value("string"))})


def as_parquet(folder: Path, rows: dict[str, list], split: str = "train") -> None:
    pq.write_table(pa.table(rows, schema=FEATURES.arrow_schema), folder / f"{split}.parquet")


def as_list(folder: Path, rows: dict[str, list]) -> None:
    lines = []
    for number, image in enumerate(rows["image"]):
        if image["bytes"]:
            (folder / image["path"]).write_bytes(image["bytes"])
        lines.append({"file_name": image["path"], "captions-pt": rows["captions-pt"][number]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def as_saved(folder: Path, rows: dict[str, list]) -> None:
    shutil.rmtree(folder)  # a saved dataset with links would be refused as a whole
    # Datasets would open a feature of type `Image` while saving it.
    image = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"image": image, "captions-pt": List(Value("string"))})
    DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(folder)


def as_tar(folder: Path, rows: dict[str, list]) -> None:
    members = []
    for number, image in enumerate(rows["image"]):
        data = image["bytes"] or image["path"].encode()  # a tar contains only bytes: here the text of the path
        captions = json.dumps({"captions-pt": rows["captions-pt"][number]}).encode()
        members += [(f"{number:05d}.png", data), (f"{number:05d}.json", captions)]
    write_tar(folder / "train.tar", members)


FORMS = [as_parquet, as_list, as_saved, as_tar]


@pytest.mark.parametrize(
    "image", [{"bytes": 5, "path": "a"}, {"bytes": "text", "path": None}, {"bytes": None, "path": 7}, "a.png", [b"x"],
              {"bytes": None, "path": "x" * 5000}, {"bytes": None, "path": "a\0b"}, {"bytes": None, "path": "\ud800"},
              {"bytes": None, "path": "hf://"}, {"more": 1},
              *({"path": "a.png", "archive": name, "offset": start, "size": 9}
                for name, start in (("/etc/passwd", 0), ("../a.tar", 0), ("a.tar", -1), (7, 0), ("a.tar", None)))]
)  # fmt: skip
def test_an_invalid_image_entry_is_a_bad_row(image, tmp_path):
    with pytest.raises(BadImage):
        read_image_bytes(image, ImageAccess(AllowedFolders(tmp_path)))


def test_a_stage_with_other_image_limits_is_not_resumed(tmp_path):
    as_parquet(tmp_path, {"image": [{"bytes": png((1, 2, 3)), "path": None}], "captions-pt": [["x"]]})
    command = ["--dataset", str(tmp_path / "train.parquet"), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"max_pixels\b.*\b1\b.*\b0\b"):
        select([*command, "--max_pixels", "0"])
    with pytest.raises(ValueError, match=r"image_roots.*nowhere"):
        select([*command, "--image_roots", str(tmp_path / "nowhere")])
    select(command)
    with pytest.raises(ValueError, match=r"max_pixels\b.*\b9\b"):
        select([*command, "--max_pixels", "9"])


@pytest.mark.parametrize("write", FORMS)
def test_no_dataset_format_reads_outside_the_dataset(write, tmp_path, hostile, server, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "data", rows_of(hostile))
    assert files_of(tmp_path / "data") == good() + [None] * len(hostile) and not server.requests


def test_a_url_in_metadata_is_refused(tmp_path, server):
    for name in ("hf://datasets/a/b/c.png", f"http://127.0.0.1:{server.server_port}/a.png"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n", encoding="utf-8")
        split = open_split(str(tmp_path), "train", "image")
        with pytest.raises(BadImage, match=f"'{name}'.*URL"):
            read_image_bytes(next(split.rows())["image"], split.image_access)
    assert not server.requests


def test_paths_are_followed_only_in_allowed_folders(tmp_path, hostile):
    """Allowed are the dataset's folder, by absolute or relative paths, and folders that the user names."""
    (tmp_path / "data" / "in").mkdir()
    (tmp_path / "data" / "in" / "a.png").write_bytes(good()[1])
    inside = ImageAccess(AllowedFolders(tmp_path / "data"))
    for path in ("in/a.png", str(tmp_path / "data" / "in" / "a.png"), f"{tmp_path}/home/../data/in/a.png"):
        assert read_image_bytes({"bytes": None, "path": path}, inside) == good()[1]
    with pytest.raises(BadImage, match=r"unreadable image.*bytes"):
        read_image_bytes({"bytes": None, "path": str(tmp_path / "data" / "in" / "a.png")})
    private = {"bytes": None, "path": str(tmp_path / "home" / "private.png")}
    with pytest.raises(BadImage, match=r"private\.png.*--image_roots"):
        read_image_bytes(private, inside)
    assert read_image_bytes(private, ImageAccess(AllowedFolders(tmp_path / "data", [tmp_path / "home"]))) == photo()
    everywhere = ImageAccess(AllowedFolders(tmp_path / "data", [Path("/")]))
    for path in ("/dev/zero", "/proc/self/fd/1", str(tmp_path / "home" / "fifo"), "/etc/passwd", str(tmp_path)):
        with pytest.raises(BadImage, match="unreadable image"):
            read_image_bytes({"bytes": None, "path": path}, everywhere)


def test_more_pixels_than_the_default_need_max_pixels(monkeypatch):
    stream = io.BytesIO()
    PIL.Image.new("1", (8000, 7000)).save(stream, "PNG")
    row = {"bytes": stream.getvalue(), "path": None}
    for read in (read_image_bytes, decode_image):
        with pytest.raises(BadImage, match=r"8000 x 7000 .*50,000,000 .*--max_pixels"):
            read(row)
    assert decode_image(row, ImageAccess(max_pixels=56_000_000)).size == (8000, 7000)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10_000_000)  # PIL's own limit
    assert len(read_image_bytes(row, ImageAccess(max_pixels=56_000_000))) == len(stream.getvalue())


def test_nothing_is_opened_that_the_datasets_library_would_open(tmp_path, server, tiny_folder, monkeypatch):
    """Images in other columns, a README that lists data files, and tables outside a saved dataset."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    address = f"http://127.0.0.1:{server.server_port}/a.parquet"
    features = Features({"image": Image(), "label": Value("int64"), "more": List(Image()), "other": Image()})
    elsewhere = {"bytes": None, "path": address}
    image = {"bytes": good()[0], "path": None}
    rows = {"image": [image], "label": [0], "more": [[elsewhere]], "other": [elsewhere]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows, schema=features.arrow_schema), tmp_path / "data" / "test.parquet")
    head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": [{"split": "test", "path": address}]}]})
    (tmp_path / "data" / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")
    assert read_image_bytes(next(open_split(str(tmp_path / "data"), "test", "image").rows())["image"]) == good()[0]
    command = ["--model", str(tiny_folder), "--benchmark", "cifar-10", "--images", str(tmp_path / "data")]
    classify([*command, "--image_column", "image", "--output", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["skipped"] == {} and not server.requests
    Dataset.from_dict({"image": [1]}).save_to_disk(tmp_path / "private")
    DatasetDict(train=Dataset.from_dict({"image": [2]})).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "train" / "state.json"
    content = json.loads(state.read_text(encoding="utf-8"))
    content["_data_files"] = [{"filename": str(next((tmp_path / "private").glob("*.arrow")))}]
    state.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"saved.*private"):
        open_split(str(tmp_path / "saved"), "train", "image")


# --- All commands -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip2")
    tiny_blip2().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    opt_tokenizer().save_pretrained(folder)
    return folder


def assert_nothing_leaked(folder: Path) -> None:
    """Assert that no file below a folder contains the mark or a magenta pixel."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert MARK not in content, path
        if path.suffix in (".jpg", ".png", ".webp"):
            assert not has_magenta(content), path


def has_magenta(content: bytes) -> bool:
    pixels = PIL.Image.open(io.BytesIO(content)).convert("RGB").getdata()
    return any(red > 240 and green < 15 and blue > 240 for red, green, blue in pixels)


@pytest.mark.slow
def test_caption_stages_builds_and_uploads_leak_nothing(tmp_path, hostile, server, tiny_folder, blip2_folder, capsys):
    as_parquet(tmp_path / "data", rows_of(hostile))
    out, number = tmp_path / "out", len(hostile)
    generate(["--dataset", str(tmp_path / "data"), "--output", str(out / "generated"), "--model", str(blip2_folder),
              "--max_new_tokens", "3", "--device", "cpu"])  # fmt: skip
    for command, name, more in (
        (score, "scored", ["--model", str(tiny_folder), "--device", "cpu"]),
        (select, "selected", ["--caption_strategy", "none"]),
    ):
        command(["--dataset", str(tmp_path / "data"), "--output", str(out / name), *more])
    assert capsys.readouterr().out.count(f"{GOOD} rows written, {number} skipped ({number} unreadable image)") == 3
    for name in ("generated", "scored", "selected"):
        (skipped,) = (out / name).glob("*.skipped.jsonl")
        listed = [json.loads(line) for line in skipped.read_text(encoding="utf-8").splitlines()]
        assert [line["row"] for line in listed] == list(range(GOOD, GOOD + number))
        skipped.unlink()  # it lists the URLs, one of which contains the photo itself
    config = {
        "dataset": str(tmp_path / "data"), "output": str(out / "built"), "language": "pt",
        "select": {"caption_strategy": "none"},
        "card": {"license": "mit", "sources": [{"name": "made here", "license": "mit"}]},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    built = build_dataset(BuildArguments(tmp_path / "config.yaml"))
    assert [row["image"]["bytes"] for row in open_split(str(built), "train", "image").rows()] == good()
    for skipped in out.rglob("*.skipped.jsonl"):
        skipped.unlink()
    assert_nothing_leaked(out)
    with hub_commands(tmp_path) as commands:
        done = commands("--model", built, "--repo-id", "us/built", "--repo-type", "dataset", "--push")
        assert done.code == 0, done.err
        assert_nothing_leaked(commands.hub.storage.folder)
    assert not server.requests


@pytest.mark.slow
def test_training_and_its_cache_leak_nothing(tmp_path, hostile, server, tiny_folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    as_parquet(tmp_path / "data", rows_of(hostile))
    clean = {name: values[:GOOD] for name, values in rows_of([]).items()}
    for split in ("validation", "test"):
        as_parquet(tmp_path / "data", clean, split)
    values = {"model": tiny_folder, "dataset": tmp_path / "data", "output_dir": tmp_path / "run", "max_steps": 1}
    values |= {"effective_batch_size": 4, "micro_batch_size": 2, "warmup_steps": 0, "max_bad_share": 1}
    values |= {"image_embedding_cache": tmp_path / "cache", "language": "pt", "eval_languages": "pt"}
    train_accelerate.main([word for key, value in values.items() for word in (f"--{key}", str(value))])
    lines = (tmp_path / "run" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(hostile) and not server.requests
    (tmp_path / "run" / "skipped.jsonl").unlink()
    assert_nothing_leaked(tmp_path / "run")
    shards = list((tmp_path / "cache").rglob("*.arrow"))
    assert shards and MARK not in b"".join(path.read_bytes() for path in shards)


# --- HEIC ----------------------------------------------------


def test_without_the_heic_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(image_files, "_AVAILABLE_FORMATS", ("PNG",))
    with pytest.raises(BadImage, match=r"'a\.heic'.*PNG.*\[heic\]"):
        decode_image({"bytes": b"\0\0\0\x18ftypheic", "path": "a.heic"})


# --- Attacks by TIFF files -------------------------------------------------------------------------------


def test_a_tile_larger_than_its_image_is_refused():
    """The header declares 64 x 64 pixels, in one tile of 35,200 x 35,200."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((64, 64), dtype=np.uint8), tile=(64, 64))
    tiff = stream.getvalue()
    assert decode_image({"bytes": tiff, "path": None}).size == (64, 64)
    for tag in (322, 323):  # TileWidth, TileLength
        position = next(i for i in range(8, len(tiff)) if tiff[i : i + 2] == tag.to_bytes(2, "little"))
        tiff = tiff[: position + 2] + struct.pack("<HII", 4, 1, 35_200) + tiff[position + 12 :]
    with pytest.raises(BadImage, match=r"'a\.png'.*JPEG, PNG"):
        read_image_bytes({"bytes": b"a text", "path": "a.png"}, ImageAccess())
    with pytest.raises(BadImage, match=r"35200 x 35200 .*50,000,000"):
        read_image_bytes({"bytes": tiff, "path": None})


TILE_SIDE = struct.pack("<I", 64)
LONG8_SIDE = struct.pack("<Q", 35_200)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (2, 4, b"64\0\0"),  # ASCII
        (7, 4, b"\0\0\0@"),  # UNDEFINED
        (5, 1, LONG8_SIDE),  # RATIONAL
        (2, 3_000_000, bytes(3_000_000)),  # multiplying such a text by an integer would take gigabytes
        (4, 2, TILE_SIDE * 2),
        # libtiff reads these types. PIL does not: it would use the second entry or none.
        (17, 1, LONG8_SIDE),  # SLONG8
        (18, 1, LONG8_SIDE),  # IFD8
    ],
    ids=["ascii", "undefined", "rational", "long-ascii", "two-longs", "slong8", "ifd8"],
)
def test_a_tile_side_of_an_invalid_type_is_a_bad_row(kind, count, value, order):
    """TIFF 6.0 allows only a single SHORT or LONG."""
    bad = tiff_with([(322, kind, count, value), (322, 4, 1, TILE_SIDE), (323, 4, 1, struct.pack("<I", 2_000))], order)
    with pytest.raises(BadImage) as error:
        read_image_bytes({"bytes": bad, "path": None})
    assert error.value.reason == "unreadable image" and "322" in error.value.detail


def test_tile_sides_are_read_in_all_byte_orders_and_bigtiff():
    side = struct.pack("<I", 35_200)
    for order in "<>":
        good = tiff_with([], order)
        assert decode_image({"bytes": good, "path": None}).size == (64, 64)
        with pytest.raises(BadImage, match="35200 x 35200"):
            read_image_bytes({"bytes": tiff_with([(322, 4, 1, side), (323, 4, 1, side)], order), "path": None})
    tifffile.imwrite(stream := io.BytesIO(), np.zeros((64, 64), dtype=np.uint8), tile=(64, 64), bigtiff=True)
    assert decode_image({"bytes": stream.getvalue(), "path": None}).size == (64, 64)
    with pytest.raises(BadImage, match="unreadable image"):
        # The directory offset lies outside the file.
        read_image_bytes({"bytes": b"II*\0" + struct.pack("<I", 9_000) + bytes(64), "path": None})


def tiff_with(entries: list[tuple[int, int, int, bytes]], order: str) -> bytes:
    """Build a TIFF file of 64 x 64 gray pixels with more directory entries: tag, type, count, little-endian value."""
    longs = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 64, 279: 64 * 64}
    entries = [*((tag, 4, 1, struct.pack("<I", value)) for tag, value in longs.items()), *entries]
    unit = {3: 2, 4: 4, 5: 4, 17: 8, 18: 8}
    tiff, directory = bytearray(64 * 64), struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in sorted(entries, key=lambda entry: entry[0]):
        if order == ">":
            pieces = np.frombuffer(value, np.uint8).reshape(-1, unit.get(kind, 1))
            value = pieces[:, ::-1].tobytes()
        if len(value) > 4:
            tiff += value
            value = struct.pack(f"{order}I", 8 + len(tiff) - len(value))
        directory += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(tiff))
    return head + bytes(tiff) + directory + bytes(4)


@pytest.mark.parametrize("values", [[-1.0, 2.0], [float("nan"), 0.5], [0.0, 70_000.0]])
def test_invalid_float_pixels_are_a_bad_row(values):
    """Otherwise such an image would end an evaluation with an error of the image processor."""
    pixels = np.full((32, 32), values[1], dtype=np.float32)
    pixels[0, 0] = values[0]
    PIL.Image.fromarray(pixels).save(stream := io.BytesIO(), "TIFF")
    with pytest.raises(BadImage, match="unreadable image"):
        decode_image({"bytes": stream.getvalue(), "path": None})


@pytest.mark.parametrize("place", ["table", "state", "split", "list"])
def test_a_pipe_in_a_dataset_is_refused_without_waiting(place, tmp_path):
    folder = tmp_path / "saved"
    os.mkfifo(tmp_path / "pipe")
    DatasetDict(train=Dataset.from_dict({"image": [1]})).save_to_disk(folder)
    state, about = folder / "train" / "state.json", folder / "dataset_dict.json"
    if place == "table":
        table = next((folder / "train").glob("*.arrow"))
        table.unlink()
        os.mkfifo(table)
    elif place == "state":
        content = json.loads(state.read_text(encoding="utf-8"))
        state.write_text(json.dumps(content | {"_data_files": [{"filename": str(tmp_path / "pipe")}]}))
    elif place == "split":
        about.write_text(json.dumps({"splits": ["../.."]}))
    else:
        (tmp_path / "photos").mkdir()
        os.mkfifo(tmp_path / "photos" / "metadata.csv")
        with pytest.raises(ValueError, match=r"metadata\.csv"):
            load_images_with_prompt_class_labels(str(tmp_path / "photos"), "test", ["cat"])
        return
    with pytest.raises(ValueError, match="saved"):
        open_split(str(folder), "train", "image")


@pytest.mark.parametrize("content", ["{}", "[]", "", "[" * 100_000, '{"splits": "train"}'])
def test_an_invalid_list_of_splits_is_reported(content, tmp_path):
    DatasetDict(train=Dataset.from_dict({"image": [1]})).save_to_disk(tmp_path)
    (tmp_path / "dataset_dict.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"dataset_dict\.json"):
        open_split(str(tmp_path), "train", "image")


def test_a_glob_pattern_allows_only_the_folders_of_its_files(tmp_path, hostile):
    for name in ("a", "b"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        (tmp_path / "sets" / name / f"{name}.png").write_bytes(good()[0])
        images = [{"bytes": None, "path": path} for path in (f"{name}.png", str(tmp_path / "home" / "private.png"))]
        as_parquet(tmp_path / "sets" / name, {"image": images, "captions-pt": [["x"], ["y"]]})
    assert files_of(tmp_path / "*" / "*" / "train.parquet") == [good()[0], None] * 2


def test_an_example_dataset_never_embeds_a_local_file(tmp_path, hostile):
    """`save_to_disk` of `datasets` would open the path in the row."""
    image = {"bytes": None, "path": str(tmp_path / "home" / "private.png")}
    table = pa.table({"image": [image], "captions-pt": [["x"]]}, schema=FEATURES.arrow_schema)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    DatasetDict(test=Dataset.from_dict({"image": [1]})).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved" / "test").glob("*.arrow")).write_bytes((tmp_path / "a.arrow").read_bytes())
    info = tmp_path / "saved" / "test" / "dataset_info.json"
    content = json.loads(info.read_text(encoding="utf-8"))
    info.write_text(json.dumps(content | {"features": FEATURES.to_dict()}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'test'.*1"):
        load_dataset_and_refuse_image_paths(tmp_path / "saved")

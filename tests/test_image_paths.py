"""Paths and addresses in rows: whatever a data set names, nothing outside of it is read, and nothing is fetched."""

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
from caption_data.labeled_images import load_labeled_images
from caption_data.sources import open_split
from captions.build import BuildArguments, build_dataset
from captions.generate import main as generate
from captions.score import main as score
from captions.select import main as select
from eval.classification import main as classify
from examples.openmoji.dataset import load_dataset_with_images

MARK = b"SENTINEL-0f3a9c"  # stands in every file that must not be read
MAGENTA = (255, 0, 255)  # of the private photo, all of it; no other picture has it
GOOD = 6


class Counter(http.server.BaseHTTPRequestHandler):
    """Gives an image for every path, and counts."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.picture)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


def png(colour: tuple[int, int, int], **options) -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (32, 32), colour).save(stream, "PNG", **options)
    return stream.getvalue()


def photo() -> bytes:
    about = PIL.Image.Exif()
    about[PIL.Image.ExifTags.Base.ImageDescription] = MARK.decode()
    return png(MAGENTA, exif=about)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counter) as found:
        found.requests, found.picture = [], photo()
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture
def hostile(tmp_path, server) -> list[str]:
    """Paths and addresses that a row may name, none of which may be opened; a folder `data` to put the rows into."""
    home, data = tmp_path / "home", tmp_path / "data"
    for name, content in (
        ("token", b"hf_" + MARK), (".ssh/id_ed25519", b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + MARK),
        ("private.png", photo()),
    ):  # fmt: skip
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    data.mkdir()
    (data / "notes.txt").write_bytes(MARK)  # within the data set, but no image
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
    """Good rows with their bytes, then hostile ones with a path alone."""
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
    shutil.rmtree(folder)  # links are refused as a whole in a saved data set; others are as in the fixture
    image = {"bytes": Value("binary"), "path": Value("string")}  # an `Image` would be opened while it is saved
    features = Features({"image": image, "captions-pt": List(Value("string"))})
    DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(folder)


def as_tar(folder: Path, rows: dict[str, list]) -> None:
    members = []
    for number, image in enumerate(rows["image"]):
        data = image["bytes"] or image["path"].encode()  # a tar has bytes alone: here those of a path
        about = json.dumps({"captions-pt": rows["captions-pt"][number]}).encode()
        members += [(f"{number:05d}.png", data), (f"{number:05d}.json", about)]
    write_tar(folder / "train.tar", members)


FORMS = [as_parquet, as_list, as_saved, as_tar]


@pytest.mark.parametrize(
    "image", [{"bytes": 5, "path": "a"}, {"bytes": "text", "path": None}, {"bytes": None, "path": 7}, "a.png", [b"x"],
              {"bytes": None, "path": "x" * 5000}, {"bytes": None, "path": "a\0b"}, {"bytes": None, "path": "\ud800"},
              {"bytes": None, "path": "hf://"}, {"more": 1},
              *({"path": "a.png", "archive": name, "offset": start, "size": 9}
                for name, start in (("/etc/passwd", 0), ("../a.tar", 0), ("a.tar", -1), (7, 0), ("a.tar", None)))]
)  # fmt: skip
def test_what_is_no_image_is_a_bad_row(image, tmp_path):
    with pytest.raises(BadImage):
        read_image_bytes(image, ImageAccess(AllowedFolders(tmp_path)))


def test_a_stage_with_other_limits_is_another_stage(tmp_path):
    as_parquet(tmp_path, {"image": [{"bytes": png((1, 2, 3)), "path": None}], "captions-pt": [["x"]]})
    command = ["--dataset", str(tmp_path / "train.parquet"), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"max_pixels must be at least 1, got 0"):
        select([*command, "--max_pixels", "0"])
    with pytest.raises(ValueError, match=r"image_roots must be folders that are there, got .*nowhere"):
        select([*command, "--image_roots", str(tmp_path / "nowhere")])
    select(command)
    with pytest.raises(ValueError, match=r"other settings.*max_pixels: None there, 9 now"):
        select([*command, "--max_pixels", "9"])


@pytest.mark.parametrize("write", FORMS)
def test_no_form_of_a_data_set_leads_out(write, tmp_path, hostile, server, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "data", rows_of(hostile))
    assert files_of(tmp_path / "data") == good() + [None] * len(hostile) and not server.requests


def test_an_address_in_a_list_is_refused_as_one(tmp_path, server):
    for name in ("hf://datasets/a/b/c.png", f"http://127.0.0.1:{server.server_port}/a.png"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n", encoding="utf-8")
        split = open_split(str(tmp_path), "train", "image")
        with pytest.raises(BadImage, match=f"'{name}': an address, which is not fetched"):
            read_image_bytes(next(split.rows())["image"], split.image_access)
    assert not server.requests


def test_a_path_is_followed_where_it_may_be(tmp_path, hostile):
    """Within the data set's folder, absolute or relative, and in a folder that the user names; elsewhere it is not."""
    (tmp_path / "data" / "in").mkdir()
    (tmp_path / "data" / "in" / "a.png").write_bytes(good()[1])
    inside = ImageAccess(AllowedFolders(tmp_path / "data"))
    for path in ("in/a.png", str(tmp_path / "data" / "in" / "a.png"), f"{tmp_path}/home/../data/in/a.png"):
        assert read_image_bytes({"bytes": None, "path": path}, inside) == good()[1]
    with pytest.raises(BadImage, match="a path of a row that should hold the bytes"):
        read_image_bytes({"bytes": None, "path": str(tmp_path / "data" / "in" / "a.png")})
    private = {"bytes": None, "path": str(tmp_path / "home" / "private.png")}
    with pytest.raises(BadImage, match=r"lies outside of the data set's folder; --image_roots names others"):
        read_image_bytes(private, inside)
    assert read_image_bytes(private, ImageAccess(AllowedFolders(tmp_path / "data", [tmp_path / "home"]))) == photo()
    everywhere = ImageAccess(AllowedFolders(tmp_path / "data", [Path("/")]))
    for path in ("/dev/zero", "/proc/self/fd/1", str(tmp_path / "home" / "fifo"), "/etc/passwd", str(tmp_path)):
        with pytest.raises(BadImage, match="unreadable image"):
            read_image_bytes({"bytes": None, "path": path}, everywhere)


def test_more_than_the_default_of_pixels_is_asked_for(monkeypatch):
    stream = io.BytesIO()
    PIL.Image.new("1", (8000, 7000)).save(stream, "PNG")
    row = {"bytes": stream.getvalue(), "path": None}
    for read in (read_image_bytes, decode_image):
        with pytest.raises(BadImage, match=r"8000 x 7000 pixels; all may be 50,000,000 \(--max_pixels raises it\)"):
            read(row)
    assert decode_image(row, ImageAccess(max_pixels=56_000_000)).size == (8000, 7000)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10_000_000)  # PIL's own limit; put back afterwards
    assert len(read_image_bytes(row, ImageAccess(max_pixels=56_000_000))) == len(stream.getvalue())


def test_what_datasets_would_open_by_itself(tmp_path, server, tiny_folder, monkeypatch):
    """Lists of images in other columns, a README that names files, and tables outside of a saved data set."""
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
    with pytest.raises(ValueError, match="files outside of it, refused"):
        open_split(str(tmp_path / "saved"), "train", "image")


# --- Through every command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip2")
    tiny_blip2().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    opt_tokenizer().save_pretrained(folder)
    return folder


def nothing_arrived(folder: Path) -> None:
    """No file below holds the mark, or is a picture with a magenta pixel."""
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
def test_the_stages_and_a_build(tmp_path, hostile, server, tiny_folder, blip2_folder, capsys):
    as_parquet(tmp_path / "data", rows_of(hostile))
    out, number = tmp_path / "out", len(hostile)
    generate(["--dataset", str(tmp_path / "data"), "--output", str(out / "generated"), "--model", str(blip2_folder),
              "--max_new_tokens", "3", "--device", "cpu"])  # fmt: skip
    for command, name, more in (
        (score, "scored", ["--model", str(tiny_folder), "--device", "cpu"]),
        (select, "selected", ["--caption_strategy", "none"]),
    ):
        command(["--dataset", str(tmp_path / "data"), "--output", str(out / name), *more])
    assert capsys.readouterr().out.count(f"{GOOD} rows written, {number} left out ({number} unreadable image)") == 3
    for name in ("generated", "scored", "selected"):
        (skipped,) = (out / name).glob("*.skipped.jsonl")
        listed = [json.loads(line) for line in skipped.read_text(encoding="utf-8").splitlines()]
        assert [line["row"] for line in listed] == list(range(GOOD, GOOD + number))
        skipped.unlink()  # it names the addresses, one of which has the photo in it
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
    nothing_arrived(out)
    with hub_commands(tmp_path) as commands:
        done = commands("--model", built, "--repo-id", "us/built", "--repo-type", "dataset", "--push")
        assert done.code == 0, done.err
        nothing_arrived(commands.hub.storage.folder)
    assert not server.requests


@pytest.mark.slow
def test_training_and_its_cache(tmp_path, hostile, server, tiny_folder, monkeypatch):
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
    nothing_arrived(tmp_path / "run")
    shards = list((tmp_path / "cache").rglob("shard-*.arrow"))
    assert shards and MARK not in b"".join(path.read_bytes() for path in shards)


# --- Pictures of phones, and folders that hold more than pictures ----------------------------------------------------


def test_heic_without_its_package(monkeypatch):
    monkeypatch.setattr(image_files, "_AVAILABLE_FORMATS", ("PNG",))
    with pytest.raises(BadImage, match=r"'a\.heic' is no image of PNG, .*the extra `heic` reads HEIC, too: pip"):
        decode_image({"bytes": b"\0\0\0\x18ftypheic", "path": "a.heic"})


# --- What a reviewer got past the gate -------------------------------------------------------------------------------


def test_a_tile_that_is_larger_than_its_image():
    """The header promises 64 x 64 pixels, in one tile of 35,200 x 35,200."""
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((64, 64), dtype=np.uint8), tile=(64, 64))
    tiff = stream.getvalue()
    assert decode_image({"bytes": tiff, "path": None}).size == (64, 64)
    for tag in (322, 323):  # TileWidth, TileLength
        place = next(i for i in range(8, len(tiff)) if tiff[i : i + 2] == tag.to_bytes(2, "little"))
        tiff = tiff[: place + 2] + struct.pack("<HII", 4, 1, 35_200) + tiff[place + 12 :]
    with pytest.raises(BadImage, match=r"'a\.png' is no image of JPEG, PNG"):
        read_image_bytes({"bytes": b"a text", "path": "a.png"}, ImageAccess())
    with pytest.raises(BadImage, match=r"tiles of 35200 x 35200 pixels; all may be 50,000,000"):
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
        (2, 3_000_000, bytes(3_000_000)),  # text x integer would take gigabytes
        (4, 2, TILE_SIDE * 2),
        # libtiff reads these, PIL does not: it would take the second entry, or none.
        (17, 1, LONG8_SIDE),  # SLONG8
        (18, 1, LONG8_SIDE),  # IFD8
    ],
    ids=["ascii", "undefined", "rational", "long-ascii", "two-longs", "slong8", "ifd8"],
)
def test_a_tile_whose_side_is_no_integer_is_a_bad_row(kind, count, value, order):
    """Only a single SHORT or LONG counts, as the standard of TIFF says."""
    bad = tiff_with([(322, kind, count, value), (322, 4, 1, TILE_SIDE), (323, 4, 1, struct.pack("<I", 2_000))], order)
    with pytest.raises(BadImage) as error:
        read_image_bytes({"bytes": bad, "path": None})
    assert error.value.reason == "unreadable image" and "322" in error.value.detail


def test_tags_of_tiff_are_read_in_every_layout():
    side = struct.pack("<I", 35_200)
    for order in "<>":
        good = tiff_with([], order)
        assert decode_image({"bytes": good, "path": None}).size == (64, 64)
        with pytest.raises(BadImage, match="tiles of 35200 x 35200"):
            read_image_bytes({"bytes": tiff_with([(322, 4, 1, side), (323, 4, 1, side)], order), "path": None})
    tifffile.imwrite(stream := io.BytesIO(), np.zeros((64, 64), dtype=np.uint8), tile=(64, 64), bigtiff=True)
    assert decode_image({"bytes": stream.getvalue(), "path": None}).size == (64, 64)
    with pytest.raises(BadImage, match="unreadable image"):
        read_image_bytes({"bytes": b"II*\0" + struct.pack("<I", 9_000) + bytes(64), "path": None})  # no directory there


def tiff_with(entries: list[tuple[int, int, int, bytes]], order: str) -> bytes:
    """A TIFF file of 64 x 64 gray pixels with further directory entries: tag, kind, count and little-endian value."""
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
def test_pixels_that_are_none_are_a_bad_row(values):
    """Such an image would end an evaluation in the processor."""
    pixels = np.full((32, 32), values[1], dtype=np.float32)
    pixels[0, 0] = values[0]
    PIL.Image.fromarray(pixels).save(stream := io.BytesIO(), "TIFF")
    with pytest.raises(BadImage, match="unreadable image"):
        decode_image({"bytes": stream.getvalue(), "path": None})


@pytest.mark.parametrize("place", ["table", "state", "split", "list"])
def test_a_pipe_in_a_data_set_is_not_waited_for(place, tmp_path):
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
        with pytest.raises(ValueError, match="no regular file"):
            load_labeled_images(str(tmp_path / "photos"), "test", ["cat"])
        return
    with pytest.raises(ValueError, match=r"no regular file|outside of it"):
        open_split(str(folder), "train", "image")


@pytest.mark.parametrize("content", ["{}", "[]", "", "[" * 100_000, '{"splits": "train"}'])
def test_a_list_of_splits_that_is_none_is_named(content, tmp_path):
    DatasetDict(train=Dataset.from_dict({"image": [1]})).save_to_disk(tmp_path)
    (tmp_path / "dataset_dict.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"dataset_dict\.json"):
        open_split(str(tmp_path), "train", "image")


def test_a_pattern_opens_the_folders_of_its_files_alone(tmp_path, hostile):
    for name in ("a", "b"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        (tmp_path / "sets" / name / f"{name}.png").write_bytes(good()[0])
        images = [{"bytes": None, "path": path} for path in (f"{name}.png", str(tmp_path / "home" / "private.png"))]
        as_parquet(tmp_path / "sets" / name, {"image": images, "captions-pt": [["x"], ["y"]]})
    assert files_of(tmp_path / "*" / "*" / "train.parquet") == [good()[0], None] * 2


def test_an_example_embeds_no_file_that_a_row_names(tmp_path, hostile):
    """`save_to_disk` of `datasets` would open it."""
    image = {"bytes": None, "path": str(tmp_path / "home" / "private.png")}
    table = pa.table({"image": [image], "captions-pt": [["x"]]}, schema=FEATURES.arrow_schema)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    DatasetDict(test=Dataset.from_dict({"image": [1]})).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved" / "test").glob("*.arrow")).write_bytes((tmp_path / "a.arrow").read_bytes())
    info = tmp_path / "saved" / "test" / "dataset_info.json"
    content = json.loads(info.read_text(encoding="utf-8"))
    info.write_text(json.dumps(content | {"features": FEATURES.to_dict()}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"split 'test': 1 of its images lie outside of its tables"):
        load_dataset_with_images(tmp_path / "saved")

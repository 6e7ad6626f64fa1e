"""Datasets with secrets in any column, damaged images or paths that lead out of the folder are not uploaded."""

import bz2
import contextlib
import gzip
import json
import os
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pyarrow
import pytest
from caption_tars import encoded
from PIL.PngImagePlugin import PngInfo
from pyarrow import parquet

from hub_upload.upload_checks import check_dataset_files, list_uploadable_dataset_or_space_files

SECRET = "gho_" + "a1B2c3D4e5" * 4
TEXTS = pyarrow.list_(pyarrow.string())
PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    text = "# Fotos de 12/05/2020, em https://x.org/home/page\n"
    (tmp_path / "data" / "README.md").write_text(text, encoding="utf-8")
    return tmp_path / "data"


def check_folder(folder) -> None:
    """Check the files of the dataset in `folder`."""
    check_dataset_files(folder, list_uploadable_dataset_or_space_files(folder))


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a ValueError with a message of one line that does not repeat the secret."""
    with pytest.raises(ValueError, match=message) as caught:
        yield
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def png() -> bytes:
    """Return the bytes of a valid image."""
    return encoded(PIL.Image.new("RGB", (3, 2)))


def column(kind, value, good) -> pyarrow.Table:
    """Return a table of 1,200 rows with `value` in row 1,000 and `good` in all others."""
    return pyarrow.table({"n": range(1200), "x": pyarrow.array([good] * 1000 + [value] + [good] * 199, kind)})


COLUMNS = {
    "text": (pyarrow.string(), f"um gato {SECRET}", "um gato"),
    "large text": (pyarrow.large_string(), SECRET, None),
    "words of a list": (TEXTS, ["a", f"b {SECRET}"], ["a"]),
    "list of lists": (pyarrow.list_(TEXTS), [[], ["a", SECRET]], [["b"], []]),
    "struct": (pyarrow.struct([("a", pyarrow.struct([("b", TEXTS)]))]), {"a": {"b": [SECRET]}}, None),
    "map": (pyarrow.map_(pyarrow.string(), pyarrow.string()), [("k", SECRET)], [("k", "v")]),
    "categories": (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), SECRET, "gato"),
    "bytes": (pyarrow.binary(), SECRET.encode(), b"\0\xff"),
    "path of a picture": (PICTURE, {"bytes": png(), "path": f"{SECRET}.png"}, {"bytes": png(), "path": "1.png"}),
    "inside a picture": (PICTURE, {"bytes": png() + SECRET.encode(), "path": None}, {"bytes": png(), "path": None}),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_secret_in_any_column_is_refused_with_its_row_number(folder, kind, suffix):
    path = folder / "train" / f"rows{suffix}"

    def write(table: pyarrow.Table) -> None:
        if suffix == ".parquet":
            return parquet.write_table(table, path, row_group_size=500)
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table, max_chunksize=400)

    kind, value, good = COLUMNS[kind]
    write(column(kind, good, good))
    check_folder(folder)
    write(column(kind, value, good))
    with refused(rf"train/rows\{suffix}, column 'x', row 1000"):
        check_folder(folder)


WRONG_IMAGES = [
    ({"bytes": b"-----BEGIN OPENSSH", "path": None}, "bytes"),
    ({"bytes": None, "path": "/etc/passwd"}, "path"),
    ({"bytes": png(), "path": "/data1/maria/1.png"}, "path"),
    ({"bytes": None, "path": "train/../../1.png"}, "path"),
    ({"bytes": None, "path": "C:\\Users\\ana\\1.png"}, "path"),
]


@pytest.mark.parametrize(("picture", "field"), WRONG_IMAGES)
def test_damaged_images_and_paths_out_of_the_folder_are_refused(folder, picture, field):
    good = {"bytes": png(), "path": "train/1.png"}
    for kind, value, fine in ((PICTURE, picture, good), (pyarrow.list_(PICTURE), [good, picture], [good])):
        parquet.write_table(column(kind, value, fine), folder / "rows.parquet")
        with pytest.raises(ValueError, match=rf"rows\.parquet, column 'x', row 1000, .*\b{field}\b"):
            check_folder(folder)


def test_the_schema_and_metadata_of_a_file_are_searched(folder):
    parquet.write_table(pyarrow.table({SECRET: [1]}, metadata={"by": SECRET}), folder / "rows.parquet")
    with refused(r"rows\.parquet, in its header"):
        check_folder(folder)


def test_text_files_archives_and_json_records_are_searched(folder):
    (folder / "metadata.jsonl").write_text('{"text": "homem /mulher/criança"}\n' * 9, encoding="utf-8")
    (folder / "1.png").write_bytes(png())
    (folder / "record.json").write_text('{"license": "mit", "share": "1/2"}', encoding="utf-8")
    with tarfile.open(folder / "rows.tar", "w") as tar:
        tar.add(folder / "1.png", "1.png")
        tar.add(folder / "metadata.jsonl", "1.json")
    check_folder(folder)
    (folder / "captions.csv").write_text(f"a,b\n\n1,{SECRET}\n", encoding="utf-8")
    with refused(r"captions\.csv, line 3.*gho_…"):
        check_folder(folder)
    with tarfile.open(folder / "rows.tar", "a") as tar:
        tar.add(folder / "captions.csv", "2.txt")
    (folder / "captions.csv").unlink()
    with refused(r"rows\.tar, byte \d+"):
        check_folder(folder)
    (folder / "rows.tar").unlink()
    for name, text, message in (
        ("record.json", json.dumps({"cache": "/gpfs/users/maria/x"}), "line 1, .*/gpfs/users/maria/x"),
        ("1.png", "-----BEGIN", "can't be read"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        with refused(rf"{name},? {message}"):
            check_folder(folder)
        (folder / name).unlink()


def test_a_secret_in_the_text_fields_of_an_image_is_refused(folder):
    exif, comment = PIL.Image.Exif(), PngInfo()
    exif[270] = SECRET
    comment.add_text("Comment", SECRET)
    for name, more in (("1.jpg", {"exif": exif}), ("1.webp", {"exif": exif}), ("1.png", {"pnginfo": comment})):
        PIL.Image.new("RGB", (4, 4)).save(folder / name, **more)
        with refused(rf"{name}, byte \d+"):
            check_folder(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link out", "link of a folder"])
def test_special_files_and_links_out_of_the_folder_are_refused_at_once(folder, tmp_path, kind):
    path = folder / "train" / "rows.json"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rows.json").write_text("{}", encoding="utf-8")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.chdir(path.parent):  # the path of a socket may have at most 107 bytes
            socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        targets = {"device": "/dev/zero", "link out": tmp_path / "elsewhere/rows.json", "link of a folder": tmp_path}
        path.symlink_to(targets[kind])
    with pytest.raises(ValueError, match=r"rows\.json"):
        list_uploadable_dataset_or_space_files(folder)


@pytest.mark.parametrize("name", ["a.tar", "d.json", "e.csv"])
def test_files_that_cannot_be_searched_are_refused(folder, name):
    for rows in ("rows.parquet", "rows.arrow"):
        (folder / rows).write_bytes(b"PAR1" * 10)
        with pytest.raises(ValueError, match=rf"{rows} can't be read"):
            check_dataset_files(folder, [Path(rows)])
    words = f'{{"key": "hf_{"x" * 30}"}}'
    for content in (gzip.compress(words.encode()), bz2.compress(words.encode()), words.encode("utf-16")):
        (folder / "train" / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is compressed or UTF-16"):
            check_dataset_files(folder, [Path("train") / name])


@pytest.mark.slow
def test_a_large_row_group_is_checked_in_small_parts(folder):
    texts = [f"uma foto de {n} gatos na praia com céu azul" * 25 for n in range(1000)]
    size = (table := pyarrow.table({"caption": texts * 30})).nbytes
    parquet.write_table(table, folder / "rows.parquet", size, compression="zstd", use_dictionary=False)
    default_pool = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(default_pool)  # counts the memory from here on
    pyarrow.set_memory_pool(pool)
    try:
        check_folder(folder)
    finally:
        pyarrow.set_memory_pool(default_pool)
    assert size > 3e7 and 0 < pool.max_memory() < 0.5 * size

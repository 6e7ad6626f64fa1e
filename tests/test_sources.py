"""Datasets of every form, and errors in them."""

import json
import re
import tarfile
from collections.abc import Iterable
from hashlib import blake2b

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_tars import CAPTIONS, PICTURES, ROWS, sample, table_of, tar_source, tars_by_name, write_tar
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from capivara_common.image_files import decode_image, image_display_path, read_image_bytes
from caption_data import sources, tars_and_image_folders
from caption_data.parquet_split import open_in_place
from caption_data.sources import Split, open_split

FEATURES = Features({"image": Image(), "captions-pt": List(Value("string"))})


def rows_of_datasets() -> Dataset:
    rows = {"image": [{"bytes": data, "path": None} for data in PICTURES], "captions-pt": CAPTIONS}
    return Dataset.from_dict(rows, features=FEATURES)


def saved(folder):
    data = rows_of_datasets()
    DatasetDict(train=data, test=data.select([6])).save_to_disk(folder / "saved")
    return str(folder / "saved")


def parquet_of_datasets(folder):
    (folder / "set [1]" / "data").mkdir(parents=True)  # as in a clone of a Hub repository; brackets are glob characters
    rows_of_datasets().to_parquet(folder / "set [1]" / "data" / "train-00000-of-00001.parquet")
    Dataset.from_dict({"x": [1]}).to_parquet(folder / "set [1]" / "data" / "test-00000-of-00001.parquet")
    return str(folder / "set [1]")


def parquet_of_others(folder):
    pq.write_table(pa.table({"image": PICTURES, "captions-pt": CAPTIONS}), folder / "plain.parquet")
    return str(folder / "plain.parquet")


def image_folder(folder):
    for split, numbers in (("train", range(ROWS)), ("test", [6])):
        lines = []
        for number in numbers:
            path = folder / "pictures" / split / "files" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PICTURES[number])
            lines.append(json.dumps({"file_name": f"files/{number}.png", "captions-pt": CAPTIONS[number]}) + "\n\n")
        (folder / "pictures" / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder / "pictures")


def tars_by_folder(folder):
    tars_by_name(folder)
    for path in (folder / "shards").iterdir():
        split, number = path.stem.split("-")
        (folder / "by_folder" / split).mkdir(parents=True, exist_ok=True)
        path.rename(folder / "by_folder" / split / f"{number}.tar")
    return str(folder / "by_folder")


def tars_by_pattern(folder):
    return tars_by_name(folder) + "/train-*.tar"


FORMS = [saved, parquet_of_datasets, parquet_of_others, image_folder, tars_by_name, tars_by_folder, tars_by_pattern]


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def bytes_and_captions(source: Split, rows: Iterable[dict]) -> list[tuple[bytes, list[str]]]:
    return [(read_image_bytes(row["image"], source.image_access), row["captions-pt"]) for row in rows]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    place = form(tmp_path)
    source = open_split(place, "train", "image")
    expected = list(zip(PICTURES, CAPTIONS, strict=True))
    assert bytes_and_captions(source, source.rows()) == expected
    assert bytes_and_captions(source, source.rows(5)) == expected[5:], "a second pass"
    assert list(source.rows(ROWS)) == [] and set(source.columns) >= {"image", "captions-pt"}
    assert decode_image(next(source.rows(3))["image"], source.image_access).size == (9, 12)
    assert len(source) == ROWS and bytes_and_captions(source, [next(source.rows(4))]) == expected[4:5]
    skipped = []
    table = table_of(source, skipped)
    assert not skipped and table["row"][:] == list(range(ROWS)) and table["captions"][:] == CAPTIONS
    assert table["digest"][:] == [blake2b(data, digest_size=16).hexdigest() for data in PICTURES]
    splits = "'train'" if form in (parquet_of_others, tars_by_pattern) else "'test', 'train'"
    with pytest.raises(ValueError, match=rf"'validation'.*\[{splits}\]"):
        open_split(place, "validation", "image")


def csv_folder(folder, text: str | bytes) -> str:
    for number in range(3):
        (folder / "csv" / "train").mkdir(parents=True, exist_ok=True)
        (folder / "csv" / "train" / f"{number}.png").write_bytes(PICTURES[number])
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "csv" / "train" / "metadata.csv").write_bytes(content)
    return str(folder / "csv")


def test_a_metadata_csv_is_read(tmp_path):
    """As spreadsheets write it: byte-order mark, quoted commas, quotes and line ends, and empty cells."""
    text = (
        '\ufefffile_name,captions-pt,url\r\n0.png,"um gato, e ""outro""\nali",http://a\r\n\r\n1.png,,x\r\n2.png,2\r\n'
    )
    source = open_split(csv_folder(tmp_path, text), "train", "image")
    captions = [['um gato, e "outro"\nali'], None, ["2"]]
    assert [row["captions-pt"] for row in source.rows()] == captions
    assert [row["url"] for row in source.rows()] == ["http://a", "x", None]
    assert [read_image_bytes(row["image"], source.image_access) for row in source.rows()] == list(PICTURES[:3])
    skipped = []
    assert table_of(source, skipped)["row"][:] == [0, 2] and [line.reason for line in skipped] == ["no caption"]
    (tmp_path / "csv" / "test").mkdir()
    (tmp_path / "csv" / "test" / "metadata.jsonl").write_text('{"file_name": "0.png"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"test/metadata\.jsonl.*train/metadata\.csv"):
        open_split(str(tmp_path / "csv"), "train", "image")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image;captions-pt\n0.png;um gato\n", "file_name"),
        ("", "file_name"),
        ("file_name,captions-pt,captions-pt\n0.png,a,b\n", "'captions-pt'"),
        ("file_name,captions-pt\n0.png,um gato, e outro\n", "line 2 "),
        ("file_name,captions-pt\n" + "0.png,um gato\n" * 200 + "1.png,um gato, e outro\n", "line 202 "),
        ("file_name,captions-pt\n0.png," + "x" * 2_000_000, r"line 2 has more than 1,000,000 bytes\.$"),
        ('file_name,captions-pt\n0.png,"um\ngato"\n\n1.png,"' + "x\n" * 200_000, "line 5 "),
        ('file_name,captions-pt\n0.png,um gato\n1.png,"um gato\n2.png,outro\n', "line 3 "),
        ("file_name,captions-pt\n0.png,água\n".encode("latin-1"), "UTF-8"),
        ("file_name,captions-pt\n0.png,um gato\n".encode("utf-16"), "UTF-8"),
    ],
)
def test_an_error_in_a_metadata_csv_is_refused(tmp_path, text, message):
    """Otherwise, the rows after it would silently be lost."""
    with pytest.raises(ValueError, match=rf"metadata\.csv.*{message}") as caught:
        open_split(csv_folder(tmp_path, text), "train", "image")
    assert "codec" not in str(caught.value)


def test_files_that_state_no_split_belong_to_train(tmp_path):
    for name, split, other in (("cc3m/00000.tar", "train", "test"), ("test/00000.tar", "test", "train")):
        folder = write_tar(tmp_path / name, sample(1)).parent  # the folder itself may have the name of the split
        assert len(open_split(str(folder), split, "image")) == 1
        with pytest.raises(ValueError, match=rf"'{other}'.*\['{split}'\]"):
            open_split(str(folder), other, "image")
    write_tar(tmp_path / "mixed" / "train-0.tar", sample(1))
    write_tar(tmp_path / "mixed" / "trainer-0.tar", sample(2))
    assert len(open_split(str(tmp_path / "mixed"), "train", "image")) == 1, (
        "the word trainer does not state the split train"
    )


def test_missing_datasets_are_refused():
    for name in ("/no/such/folder", "./no", "no/such/deep", "no.tar", "no/*.tar"):
        with pytest.raises(ValueError, match=re.escape(name)):
            open_split(name, "train", "image")
    with pytest.raises(ValueError, match="no/such"):
        open_split("no/such", "train", "image")


def test_unusable_folders(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        open_split(str(tmp_path), "train", "image")
    tarfile.open(tmp_path / "train-0.tar.gz", "w:gz").close()
    with pytest.raises(ValueError, match=r"train-0\.tar\.gz"):
        open_split(str(tmp_path), "train", "image")
    (tmp_path / "rot.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"rot\.parquet.*train-0\.tar\.gz"):
        open_split(str(tmp_path), "train", "image")
    with pytest.raises(ValueError, match=r"rot\.parquet"):
        open_split(str(tmp_path / "rot.parquet"), "train", "image")


def test_missing_column_and_empty_source(tmp_path):
    with pytest.raises(ValueError, match=r"'captions-xh'.*\['image', 'captions-pt'\]"):
        table_of(tar_source(tmp_path, sample(0)), columns=["captions-xh"])
    with pytest.raises(ValueError, match=r"x\.tar.*'train'"):
        tar_source(tmp_path, [("readme.txt", b"")])
    (tmp_path / "x.tar").write_bytes(b"garbage" * 1000)
    with pytest.raises(ValueError, match=r"x\.tar.*'train'.*x\.tar: .+"):
        open_split(str(tmp_path / "x.tar"), "train", "image")


def test_tars_in_the_layout_of_the_capivara_authors(tmp_path):
    """Rows may have different keys, members of a sample any order; other members are ignored."""
    generated = {"generated-captions-pt": ["a", "b"], "similarities-pt": [0.1, 0.2, 0.3]}
    members = [*sample(0), ("00000.pyd", b"cos\nsystem\n(S'false'\ntR."), *sample(1, **generated), (".DS_Store", b"x")]
    source = tar_source(tmp_path, [*members, ("._00002.jpg", b"x"), *sample(2), ("00002.json.bak", b"{}")])
    assert set(source.columns) == {"image", "captions-pt", *generated}
    rows = list(source.rows())
    assert [row["similarities-pt"] for row in rows] == [None, [0.1, 0.2, 0.3], None]
    assert image_display_path(rows[1]["image"]).endswith("x.tar/00001.png")
    skipped = []
    table = table_of(source, skipped, ["captions-pt", *generated], lambda row: row["generated-captions-pt"])
    assert table["row"][:] == [1] and [(line.row, line.reason) for line in skipped] == [
        (0, "not chosen"), (2, "not chosen"),
    ]  # fmt: skip


def test_tar_members_are_never_extracted(tmp_path):
    """Paths that lead out of the folder, links and long names only name samples."""
    folder, members = tmp_path / "inner" / "deep", []
    for number, place in enumerate(("../../", "/tmp/", "d" * 200 + "/"), 1):
        members += sample(number, folder=place)
    members += [*sample(3, data=PICTURES[5], folder="d" * 200 + "/"), *sample(3, folder="other/")]
    source = tar_source(folder, members)
    before = sorted(tmp_path.rglob("*"))
    contents = [data for data, _ in bytes_and_captions(source, source.rows())]
    assert contents == [*PICTURES[1:4], PICTURES[5], PICTURES[3]], "a repeated name begins a new sample"
    assert len(table_of(source)) == 5 and sorted(tmp_path.rglob("*")) == before
    link = tarfile.TarInfo("00009.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(folder / "x.tar", "a") as tar:
        tar.addfile(link)
    assert len(open_split(str(folder / "x.tar"), "train", "image")) == 5


@pytest.mark.parametrize("damage", ["in a file", "in a header", "at a border", "garbage header"])
def test_samples_before_the_damage_of_an_archive_are_read(tmp_path, damage):
    path = write_tar(tmp_path / "train-0.tar", [member for i in range(4) for member in sample(i)])
    write_tar(tmp_path / "train-1.tar", [member for i in range(4, ROWS) for member in sample(i)])
    with tarfile.open(path) as tar:
        third = [member for member in tar if member.name.startswith("00002")]
    whole, start = path.read_bytes(), third[0].offset
    cut = {"in a file": third[1].offset_data + 5, "in a header": start + 100, "at a border": start}
    garbage = whole[:start] + b"\x07" * 512 + whole[start + 512 :]
    path.write_bytes(garbage if damage == "garbage header" else whole[: cut[damage]])
    table = table_of(open_split(str(tmp_path), "train", "image"), skipped := [])
    assert table["captions"][:] == CAPTIONS[:2] + CAPTIONS[4:] and table["row"][:] == list(range(5))
    assert [(line.row, line.reason) for line in skipped] == [(2, "damaged archive")]
    assert "train-0.tar: " in skipped[0].detail and "byte" in skipped[0].detail


@pytest.mark.parametrize("form", ["saved", "parquet", "parquet in place"])
def test_positions_in_tars_are_refused_without_the_tars(tmp_path, form):
    """The tars may have changed, and another image would silently be read."""
    rows = open_split(tars_by_name(tmp_path), "train", "image").data
    if form == "saved":
        DatasetDict(train=rows).save_to_disk(tmp_path / "shards" / "copy")
    else:
        rows.to_parquet(tmp_path / "shards" / "copy" / "train.parquet")
    opened = open_in_place if form == "parquet in place" else open_split
    with pytest.raises(ValueError, match="'image'"):
        opened(str(tmp_path / "shards" / "copy"), "train", "image")


# --- Files that expand to much more than their size ------------------------------------------------------------------


@pytest.mark.parametrize("line", ["first", "later"])
def test_an_endless_line_of_a_metadata_file_is_not_read(tmp_path, line):
    """A sparse file needs no disk space, but could fill the memory if it was read as one line."""
    good = b"" if line == "first" else b'{"file_name": "a.png", "captions-pt": ["um gato"]}\n'
    with (tmp_path / "metadata.jsonl").open("wb") as file:
        file.write(good)
        file.truncate(tars_and_image_folders.MAX_ROW_JSON_BYTES * 3)
    if line == "first":
        with pytest.raises(ValueError, match=r"metadata\.jsonl.*line 1 .*1,000,000"):
            open_split(str(tmp_path), "train", "image")
        return
    split = open_split(str(tmp_path), "train", "image")
    [damaged] = split.damaged_archives
    assert [row["captions-pt"] for row in split.rows()] == [["um gato"]]
    assert damaged.row == 1 and "line 2 has more than 1,000,000 bytes" in damaged.detail and "skipped" in damaged.detail


@pytest.mark.parametrize("encoding", ["RLE_DICTIONARY", "DELTA_BYTE_ARRAY"])
def test_a_parquet_file_that_expands_is_not_copied_to_the_cache(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "UNLIMITED_EXPANSION_BYTES", 1_000_000)
    (tmp_path / "data").mkdir()
    path, table = (
        tmp_path / "data" / "train.parquet",
        pa.table({"captions-pt": ["a" * 10_000] * 150, "image": [b""] * 150}),
    )
    is_dictionary = encoding == "RLE_DICTIONARY"
    encodings = {} if is_dictionary else {"column_encoding": {"captions-pt": encoding}}
    pq.write_table(table, path, compression="zstd", use_dictionary=is_dictionary, **encodings)
    assert encoding in pq.read_metadata(path).row_group(0).column(0).encodings and path.stat().st_size < 2_000
    with pytest.raises(ValueError, match=r"train\.parquet.*\b100 .*\b1 MB"):
        open_split(str(tmp_path / "data"), "train", "image")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    monkeypatch.setattr(sources, "MAX_PARQUET_EXPANSION", 10_000)
    split = open_split(str(tmp_path / "data"), "train", "image")
    assert (
        len(split) == 150
        and split.data._fingerprint
        == datasets.load_dataset("parquet", data_files={"train": [str(path)]}, split="train")._fingerprint
    ), "existing stages remain valid"


@pytest.mark.parametrize("is_list", [False, True])
def test_a_parquet_column_of_dictionary_type_counts_with_its_repeated_values(tmp_path, is_list, monkeypatch):
    """Arrow stores the type in the file and gives the column back as a dictionary, which is small in memory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "UNLIMITED_EXPANSION_BYTES", 1_000_000)
    captions = pa.DictionaryArray.from_arrays(pa.array([0] * 150, pa.int32()), pa.array(["a" * 10_000]))
    if is_list:
        captions = pa.ListArray.from_arrays(pa.array(range(151), pa.int32()), captions)
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"captions-pt": captions, "image": [b""] * 150}), path, compression="zstd")
    assert path.stat().st_size < 3_000
    with pytest.raises(ValueError, match=r"train\.parquet.*\b100 .*\b1 MB"):
        open_split(str(path), "train", "image")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_an_error_without_text_is_named_by_its_type():
    with pytest.raises(ValueError, match=r"^x .*MemoryError"):
        sources._call_loader("x", lambda: (_ for _ in ()).throw(MemoryError()))

"""A damaged index: what is broken is named, and the next `add` goes on from the newest version that can be read."""

import logging
import os
import shutil

import numpy as np
import pytest
from made_index import make_pictures, rows_of

from capivara_search import index as index_module
from capivara_search import indexing, table
from capivara_search.index import PictureIndex
from capivara_search.storage import DamagedIndexError
from capivara_search.table import LAYOUT_METADATA_KEY, TABLE_SCHEMAS, pictures_schema

ROWS, COMMIT = 24, 8


@pytest.fixture(scope="session")
def whole(tmp_path_factory, model):
    """A folder of pictures and its index, of three commits."""
    place = tmp_path_factory.mktemp("whole")
    make_pictures(place / "fotos", ROWS)
    (place / "fotos" / "broken.jpg").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "COMMIT_ROWS", COMMIT)
        PictureIndex.open(place / "i", model=model).add(place / "fotos", batch_size=1)
    return place


@pytest.fixture
def place(whole, tmp_path):
    shutil.copytree(whole / "i", tmp_path / "i")
    return tmp_path


def data_files(place):
    return sorted((place / "i" / "pictures.lance" / "data").iterdir(), key=os.path.getmtime)


def paths(hits):
    return [hit.path for hit in hits]


def remove(path):
    path.unlink()


def overwrite(path):
    generator = np.random.default_rng(0)
    with path.open("r+b") as file:
        file.write(generator.bytes(path.stat().st_size // 2))


@pytest.mark.parametrize("harm", [remove, overwrite])
def test_a_broken_data_file_is_named_and_its_pictures_are_read_again(whole, place, model, harm, caplog):
    index = PictureIndex.open(place / "i", model=model)
    known = rows_of(index)
    harm(data_files(place)[1])
    before = sorted((str(path), path.stat().st_mtime_ns) for path in place.rglob("*"))
    index = PictureIndex.open(place / "i", model=model)
    with pytest.raises(ValueError, match=r"is damaged in its part pictures: .*Run `capivara index` with"):
        index.search("um gato", k=50)
    after = sorted((str(path), path.stat().st_mtime_ns) for path in place.rglob("*"))
    assert after == before, "reading changes nothing"
    added = PictureIndex.open(place / "i", model=model).add(whole / "fotos", batch_size=1)
    kept = COMMIT - 1  # beside the file that is no picture
    assert f"pictures.lance is damaged: a version with {kept} of its {ROWS} rows is taken" in caplog.text
    assert (added.embedded, added.new, added.unchanged) == (ROWS - kept, ROWS - kept, kept)
    assert rows_of(PictureIndex.open(place / "i")) == known
    assert len(index.search("um gato", k=50)) == ROWS, "who was reading sees the whole index again"


RECORDS = {
    "cut": lambda data: b"broken",
    "zeros": lambda data: bytes(len(data)),  # as a disk leaves a file whose blocks were not written before a power cut
    "ones": lambda data: b"\xff" * len(data),  # of which the engine panics
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_broken_record_of_the_newest_version_gives_way_to_the_one_before(whole, place, model, damage, caplog):
    versions = place / "i" / "pictures.lance" / "_versions"
    newest = min(versions.glob("*.manifest"))
    newest.write_bytes(broken := RECORDS[damage](newest.read_bytes()))
    index = PictureIndex.open(place / "i", model=model)
    for call in (lambda: index.search("um gato"), index.status):
        with pytest.raises(DamagedIndexError, match=r"pictures\.lance/_versions .*run `capivara index` with") as caught:
            call()
        assert caught.value.code == "damaged_record"
    added = index.add(whole / "fotos")
    assert added.new > 0 and f"with {ROWS - added.new} rows" in caplog.text
    assert len(PictureIndex.open(place / "i")) == ROWS
    assert newest.with_name(f"{newest.name}.damaged").read_bytes() == broken


@pytest.mark.parametrize(("part", "lost"), [("data", ROWS), ("_versions", "?"), ("no _versions", "?")])
def test_pictures_of_which_no_version_can_be_read_are_set_aside_and_added_anew(whole, place, model, part, lost, caplog):
    index, folder = PictureIndex.open(place / "i"), place / "i" / "pictures.lance"
    known = rows_of(index)
    index._table.purge()  # of the first version, which has no rows and can be read
    for path in (folder / part.removeprefix("no ")).iterdir():
        os.truncate(path, 100)
    if part == "no _versions":
        shutil.rmtree(folder / "_versions")
    (place / "i" / "pictures.lance.damaged").mkdir()  # of an earlier time
    left = [path.read_bytes() for path in data_files(place)]
    index = PictureIndex.open(place / "i", model=model)
    with pytest.raises(ValueError, match=r"is damaged.* [Rr]un `capivara index` with all its folders") as caught:
        index.search("um gato")
    assert ".rs" not in str(caught.value)
    added = index.add(whole / "fotos", batch_size=1)
    assert f"no version of it can be read; rows lost: {lost}. It lies in {folder}.damaged1 now" in caplog.text
    assert (added.new, added.embedded, len(added.skipped_files)) == (ROWS, ROWS, 1)
    folder.with_name("pictures.lance.damaged1").rename(place / "i" / "kept")
    assert [path.read_bytes() for path in sorted((place / "i/kept/data").iterdir(), key=os.path.getmtime)] == left
    assert rows_of(PictureIndex.open(place / "i")) == known
    assert len(index.search("um gato", k=50)) == ROWS


@pytest.mark.parametrize("damage", ["cut", "zeros"])
@pytest.mark.parametrize(("name", "part"), [("left_out", "data"), ("about", "_versions")])
def test_a_broken_small_table_is_made_anew(whole, place, model, name, part, damage, caplog):
    for path in (place / "i" / f"{name}.lance" / part).iterdir():
        path.write_bytes(RECORDS[damage](path.read_bytes()))
    index = PictureIndex.open(place / "i", model=model)
    with pytest.raises(ValueError, match="is damaged"):
        index.status()
    added = index.add(whole / "fotos")
    assert f"{name}.lance is damaged" in caplog.text
    assert (added.unchanged, added.embedded, len(added.skipped_files)) == (ROWS, 0, 1)
    fresh = PictureIndex.open(place / "i")
    assert fresh.model.name == "model"
    assert fresh.folders() == {str(whole / "fotos"): ROWS}
    assert len(fresh.status().skipped_files) == 1


@pytest.mark.parametrize("files", ["*.idx", "page_*.lance"])  # of the vectors, of the paths
def test_a_broken_search_index_is_named_and_built_anew(tmp_path, model, monkeypatch, caplog, files):
    monkeypatch.setattr(table, "MAX_EXACT_ROWS", 280), monkeypatch.setattr(index_module, "MAX_CACHED_ROWS", 100)
    fotos = tmp_path / "fotos"
    make_pictures(fotos, 300)
    index = PictureIndex.open(tmp_path / "i", model=model)
    index.add(fotos)
    assert index.status().approximate
    expected, inside = paths(index.search("um gato", k=5)), paths(index.search("um gato", k=5, folder=fotos / "d1"))
    for path in (tmp_path / "i" / "pictures.lance" / "_indices").rglob(files):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"is damaged in its part pictures: .*Run `capivara index` with"):
        broken = PictureIndex.open(tmp_path / "i", model=model)
        broken.search("um gato", k=5), broken.get_picture(expected[0])
    with caplog.at_level(logging.INFO, "capivara"):
        assert PictureIndex.open(tmp_path / "i", model=model).add(fotos).unchanged == 300
    assert "Approximate index of 300 pictures built" in caplog.text and "rows is taken" not in caplog.text
    assert paths(index.search("um gato", k=5)) == expected, "who was reading finds it again"
    assert paths(index.search("um gato", k=5, folder=fotos / "d1")) == inside
    assert index.get_picture(expected[0]).path == expected[0] and index.status().approximate


def test_an_index_of_a_newer_version_or_of_others_is_refused(tmp_path):
    import lancedb

    newer = pictures_schema(8).with_metadata({LAYOUT_METADATA_KEY: b"2"})
    lancedb.connect(tmp_path / "newer").create_table("pictures", schema=newer)
    with pytest.raises(ValueError, match=r"has layout 2, this version of capivara reads up to 1. Install a newer one"):
        PictureIndex.open(tmp_path / "newer")
    lancedb.connect(tmp_path / "other").create_table("pictures", schema=TABLE_SCHEMAS["about"])
    with pytest.raises(ValueError, match="was not made by capivara"):
        PictureIndex.open(tmp_path / "other")


def test_an_index_of_a_newer_lancedb_is_refused_and_left_as_it_lies(place, model):
    """A record that is whole but unknown: bit 9 of its features, in the last field."""
    folder = place / "i" / "pictures.lance" / "_versions"
    newest = sorted(folder.glob("*.manifest"))[0]
    content = newest.read_bytes()
    start = int.from_bytes(content[-16:-8], "little")
    length = int.from_bytes(content[start : start + 4], "little")
    message = content[start + 4 : start + 4 + length] + b"\x48\x80\x80\x01"  # reader_feature_flags, an unknown bit
    newest.write_bytes(content[:start] + len(message).to_bytes(4, "little") + message + content[start + 4 + length :])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = PictureIndex.open(place / "i", model=model)
    for call in (index.status, lambda: index.add(place / "fotos")):
        with pytest.raises((ValueError, OSError)):
            call()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_passing_error_is_no_damage(place, model, monkeypatch):
    index = PictureIndex.open(place / "i", model=model)

    def fails(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(table, "_build_scan", fails)
    with pytest.raises(OSError, match="Too many open files"):
        index.repair()
    assert not list((place / "i").glob("*.damaged"))

"""A damaged index: what is broken is named, the rest serves, and the next `add` makes it whole."""

import logging
import os
import shutil

import numpy as np
import pytest
from made_index import make_pictures, rows_of, save_model

from capivara_search import adding, table
from capivara_search.damage import damaged_fragments, fragments_of
from capivara_search.index import PictureIndex
from capivara_search.picture_columns import EMPTY, LAYOUT_KEY, schema
from capivara_search.table import PictureTable

ROWS, COMMIT = 24, 8


@pytest.fixture(scope="session")
def model(tmp_path_factory, tiny_processor):
    return str(save_model(tmp_path_factory.mktemp("model") / "m", tiny_processor))


@pytest.fixture(scope="session")
def whole(tmp_path_factory, model):
    """A folder of pictures and its index, of three commits."""
    place = tmp_path_factory.mktemp("whole")
    make_pictures(place / "fotos", ROWS)
    (place / "fotos" / "broken.jpg").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adding, "COMMIT_ROWS", COMMIT)
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


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)


def overwrite(path):
    generator = np.random.default_rng(0)
    with path.open("r+b") as file:
        file.write(generator.bytes(path.stat().st_size // 2))


@pytest.mark.parametrize("harm", [remove, cut, overwrite])
def test_a_broken_data_file_is_named_and_the_rest_is_found_then_read_again(whole, place, model, harm, caplog):
    index = PictureIndex.open(place / "i", model=model)
    known = rows_of(index)
    harm(data_files(place)[1])
    index = PictureIndex.open(place / "i", model=model)
    hits = index.search("um gato", k=50)
    assert len(hits) == len(index) == ROWS - COMMIT
    assert paths(index.search("um gato", k=50, folder=whole / "fotos")) == paths(hits)
    assert f"pictures.lance is damaged: {COMMIT} of {ROWS} pictures can't be read" in caplog.text
    assert caplog.text.count("is damaged") == 1, "the same part is named again and again"
    assert index.duplicates(0.999) is not None
    assert index.status().pictures == ROWS - COMMIT
    added = PictureIndex.open(place / "i", model=model).add(whole / "fotos", batch_size=1)
    assert (added.embedded, added.new, added.unchanged) == (COMMIT, COMMIT, ROWS - COMMIT)
    assert rows_of(PictureIndex.open(place / "i")) == known
    assert len(index.search("um gato", k=50)) == ROWS, "who was reading sees the whole index again"


def test_reading_a_damaged_index_changes_nothing_in_it(place, model):
    remove(data_files(place)[0])
    before = sorted((str(path), path.stat().st_mtime_ns) for path in place.rglob("*"))
    PictureIndex.open(place / "i", model=model).search("um gato")
    assert sorted((str(path), path.stat().st_mtime_ns) for path in place.rglob("*")) == before


def test_a_broken_record_of_the_newest_version_gives_way_to_the_one_before(whole, place, model, caplog):
    versions = place / "i" / "pictures.lance" / "_versions"
    newest = min(versions.glob("*.manifest"))
    newest.write_bytes(b"broken")
    index = PictureIndex.open(place / "i", model=model)
    assert 0 < len(index.search("um gato", k=50)) < ROWS
    assert f"its file _versions/{newest.name} was set aside" in caplog.text
    assert index.add(whole / "fotos").new > 0
    assert len(PictureIndex.open(place / "i")) == ROWS


def test_without_any_record_the_index_is_refused_with_the_way_out(place):
    for path in (place / "i" / "pictures.lance" / "_versions").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"is damaged: no record of its files is left in .*remove the index and add"):
        PictureIndex.open(place / "i")


def test_pictures_without_any_record_are_not_taken_for_a_new_index(place, model):
    shutil.rmtree(place / "i" / "pictures.lance" / "_versions")
    before = data_files(place)
    with pytest.raises(ValueError, match="is damaged: no record of its files is left"):
        PictureIndex.open(place / "i", model=model).add(place / "fotos")
    assert data_files(place) == before


@pytest.mark.parametrize("name", ["left_out", "about"])
@pytest.mark.parametrize("part", ["_versions", "data"])
def test_a_broken_small_table_is_taken_for_empty_and_made_anew(whole, place, model, name, part, caplog):
    for path in (place / "i" / f"{name}.lance" / part).iterdir():
        path.write_bytes(b"broken")
    index = PictureIndex.open(place / "i", model=model)
    assert len(index.search("um gato", k=50)) == ROWS
    assert index.status().pictures == ROWS
    assert f"{name}.lance is damaged" in caplog.text
    added = index.add(whole / "fotos")
    assert (added.unchanged, added.embedded, len(added.left_out)) == (ROWS, 0, 1)
    fresh = PictureIndex.open(place / "i")
    assert fresh.model.name == "m"
    assert fresh.folders() == {str(whole / "fotos"): ROWS}
    assert len(fresh.status().left_out) == 1


def test_a_broken_approximate_index_is_named_and_built_anew(tmp_path, model, monkeypatch, caplog):
    monkeypatch.setattr(table, "EXACT_ROWS", 280)
    make_pictures(tmp_path / "fotos", 300)
    index = PictureIndex.open(tmp_path / "i", model=model)
    index.add(tmp_path / "fotos")
    assert index.status().approximate
    expected = paths(index.search("um gato", k=5, exact=True))
    for path in (tmp_path / "i" / "pictures.lance" / "_indices").rglob("*.idx"):
        path.write_bytes(b"broken")
    index = PictureIndex.open(tmp_path / "i", model=model)
    assert paths(index.search("um gato", k=5)) == paths(index.search("um gato", k=5)) == expected
    assert caplog.text.count("The approximate index of ") == 1
    assert "all pictures are compared instead" in caplog.text
    with caplog.at_level(logging.INFO, "capivara"):
        PictureIndex.open(tmp_path / "i", model=model).add(tmp_path / "fotos")
    assert "Approximate index of 300 pictures built" in caplog.text
    caplog.clear()
    assert index.status().approximate
    assert len(index.search("um gato", k=5)) == 5
    assert not caplog.text


@pytest.fixture(scope="module")
def searched(tmp_path_factory, model):
    """A folder of pictures and its index, with search indices."""
    place = tmp_path_factory.mktemp("searched")
    make_pictures(place / "fotos", 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "EXACT_ROWS", 280)
        PictureIndex.open(place / "i", model=model).add(place / "fotos")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", ["page_lookup.lance", "page_data.lance", "index.idx", "auxiliary.idx"])
@pytest.mark.parametrize("begin", [0, 0.3, 0.6, 0.9])
def test_zeros_in_a_search_index_are_one_line_and_no_wrong_answer(
    searched, tmp_path, model, monkeypatch, caplog, name, begin
):
    monkeypatch.setattr(table, "EXACT_ROWS", 280)
    fotos = searched / "fotos"

    def answers(index):
        sentences = ("um gato", "uma casa azul", "noite")
        found = [paths(index.search(text, k=5, folder=folder)) for text in sentences for folder in (None, fotos / "d1")]
        return found, index.row(str(fotos / "d1" / "p0001.png")), index.folders(), index.status().pictures

    expected = answers(PictureIndex.open(searched / "i", model=model))
    shutil.copytree(searched / "i", tmp_path / "i")
    (path,) = (tmp_path / "i" / "pictures.lance" / "_indices").rglob(name)
    content = bytearray(path.read_bytes())
    start = int(len(content) * begin)
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)
    index = PictureIndex.open(tmp_path / "i", model=model)
    assert answers(index) == expected
    assert len(caplog.records) == 1 and f"{name}); all pictures are compared instead" in caplog.text
    assert index.add(fotos).unchanged == 300
    caplog.clear()
    for again in (index, PictureIndex.open(tmp_path / "i", model=model)):
        assert answers(again) == expected and again.status().approximate
    assert not caplog.records


def test_an_index_of_a_newer_version_or_of_others_is_refused(tmp_path):
    import lancedb

    newer = schema(8).with_metadata({LAYOUT_KEY: b"2"})
    lancedb.connect(tmp_path / "newer").create_table("pictures", schema=newer)
    with pytest.raises(ValueError, match=r"has layout 2, this version of capivara reads up to 1. Install a newer one"):
        PictureIndex.open(tmp_path / "newer")
    lancedb.connect(tmp_path / "other").create_table("pictures", schema=EMPTY["about"])
    with pytest.raises(ValueError, match="was not made by capivara"):
        PictureIndex.open(tmp_path / "other")


def test_fragments_are_found_whatever_their_numbers(tmp_path):
    import pyarrow as pa

    tables = PictureTable(tmp_path / "i")
    with tables.locked():
        tables.create(8)
        for number in range(12):
            tables.merge(pa.table({"key": [str(number)], "value": [""]}, schema=EMPTY["about"]), "about")
        opened = tables.table("about")
        assert fragments_of(opened) == list(range(12))
        tables.remove(["0", "3", "4", "5", "11"], "about")
        assert fragments_of(opened) == [1, 2, 6, 7, 8, 9, 10]
        assert damaged_fragments(opened, ["key", "value"]) == []
        opened.optimize()
        assert len(fragments_of(opened)) == 1
        tables.remove_where("true", "about")
        assert fragments_of(opened) == []


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
    with pytest.raises((ValueError, OSError)):
        PictureIndex.open(place / "i", model=model).status()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_passing_error_empties_no_list(place, model, monkeypatch):
    index = PictureIndex.open(place / "i", model=model)
    known = index.status().left_out
    assert known
    tables = index._table

    def fails(table):
        raise OSError(24, "Too many open files")

    with tables.locked(), pytest.raises(OSError, match="Too many open files"):
        tables.write("left_out", fails)
    assert PictureIndex.open(place / "i", model=model).status().left_out == known


def test_an_index_in_a_folder_called_403_serves_its_rest(place, model):
    (place / "403").mkdir()
    (place / "i").rename(place / "403" / "i")
    remove(sorted((place / "403" / "i" / "pictures.lance" / "data").iterdir(), key=os.path.getmtime)[1])
    index = PictureIndex.open(place / "403" / "i", model=model)
    assert len(index.search("um gato", k=100)) == ROWS - COMMIT


def test_a_damaged_index_is_exported_with_a_line_that_says_so(place, model, tmp_path):
    remove(data_files(place)[1])
    with pytest.raises((ValueError, OSError), match=r"^The index .* is damaged in its part"):
        PictureIndex.open(place / "i", model=model).export(tmp_path / "all.csv")
    assert not list(tmp_path.glob("*.csv"))

"""A damaged index: the error names the damaged part, and the next `add` continues from the newest readable version."""

import logging
import os
import shutil

import numpy as np
import pytest
from made_index import expect_error, logged_values, make_pictures, rows_of

from capivara_search import index as index_module
from capivara_search import indexing, table
from capivara_search.command import main
from capivara_search.index import PictureIndex
from capivara_search.storage_errors import DamagedIndexError
from capivara_search.table import LAYOUT_METADATA_KEY, TABLE_SCHEMAS, pictures_schema

ROWS, COMMIT_ROWS = 24, 8


@pytest.fixture(scope="session")
def intact(tmp_path_factory, model):
    """A folder with pictures in `fotos` and their index in `i`, written in three commits."""
    folder = tmp_path_factory.mktemp("intact")
    make_pictures(folder / "fotos", ROWS)
    (folder / "fotos" / "broken.jpg").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "COMMIT_ROWS", COMMIT_ROWS)
        PictureIndex.open(folder / "i", model=model).add(folder / "fotos", batch_size=1)
    return folder


@pytest.fixture
def copy(intact, tmp_path):
    """A folder with a copy of the index in `i`, which a test may damage."""
    shutil.copytree(intact / "i", tmp_path / "i")
    return tmp_path


def data_files(copy):
    return sorted((copy / "i" / "pictures.lance" / "data").iterdir(), key=os.path.getmtime)


def paths(hits):
    return [hit.path for hit in hits]


def remove(path):
    path.unlink()


def overwrite(path):
    rng = np.random.default_rng(0)
    with path.open("r+b") as file:
        file.write(rng.bytes(path.stat().st_size // 2))


@pytest.mark.parametrize("damage", [remove, overwrite])
def test_a_damaged_data_file_is_reported_and_its_pictures_are_read_again(intact, copy, model, damage, caplog):
    index = PictureIndex.open(copy / "i", model=model)
    rows = rows_of(index)
    damage(data_files(copy)[1])
    before = sorted((str(path), path.stat().st_mtime_ns) for path in copy.rglob("*"))
    index = PictureIndex.open(copy / "i", model=model)
    with expect_error("damaged", path=copy / "i", part="pictures"):
        index.search("um gato", k=50)
    after = sorted((str(path), path.stat().st_mtime_ns) for path in copy.rglob("*"))
    assert after == before, "a search has changed files"
    report = PictureIndex.open(copy / "i", model=model).add(intact / "fotos", batch_size=1)
    restored = COMMIT_ROWS - 1  # the first commit also has the file that is no picture
    assert logged_values(caplog, "older_version") == [(copy / "i" / "pictures.lance", restored, ROWS)]
    assert (report.embedded, report.new, report.unchanged) == (ROWS - restored, ROWS - restored, restored)
    assert rows_of(PictureIndex.open(copy / "i")) == rows
    assert len(index.search("um gato", k=50)) == ROWS, "an open index does not see the repaired version"


DAMAGED_CONTENTS = {
    "cut": lambda data: b"broken",
    "zeros": lambda data: bytes(len(data)),  # what remains of a file if the power fails before its blocks are written
    "ones": lambda data: b"\xff" * len(data),  # makes LanceDB panic
}


@pytest.mark.parametrize("damage", DAMAGED_CONTENTS)
def test_a_damaged_newest_manifest_is_replaced_by_the_previous_one(intact, copy, model, damage, caplog):
    versions = copy / "i" / "pictures.lance" / "_versions"
    newest = min(versions.glob("*.manifest"))
    damaged = DAMAGED_CONTENTS[damage](newest.read_bytes())
    newest.write_bytes(damaged)
    index = PictureIndex.open(copy / "i", model=model)
    for call in (lambda: index.search("um gato"), index.status):
        with expect_error("damaged_record", DamagedIndexError, part=copy / "i" / "pictures.lance"):
            call()
    report = index.add(intact / "fotos")
    assert report.new > 0
    assert logged_values(caplog, "older_record") == [(copy / "i" / "pictures.lance", ROWS - report.new)]
    assert len(PictureIndex.open(copy / "i")) == ROWS
    assert newest.with_name(f"{newest.name}.damaged").read_bytes() == damaged


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: bytes(len(data))]
)
def test_search_and_status_report_a_damaged_manifest_and_index_repairs_it(
    intact, copy, model, damage, monkeypatch, capsys
):
    """The commands treat an empty, a truncated and a zeroed manifest in the same way."""
    monkeypatch.setenv("CAPIVARA_INDEX", str(copy / "i"))
    monkeypatch.setenv("CAPIVARA_MODEL", model)
    folder = copy / "i" / "pictures.lance"
    newest = min((folder / "_versions").glob("*.manifest"))
    newest.write_bytes(damage(newest.read_bytes()))

    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        return caught.value.code, capsys.readouterr().err

    for words in (["search", "um gato"], ["status"]):
        code, error = run(*words)
        assert code == 3 and f"{folder}/_versions" in error and len(error.splitlines()) == 1
    code, error = run("index", str(intact / "fotos"))
    assert code == 0 and str(folder) in error
    assert run("search", "um gato")[0] == run("status")[0] == 0
    assert len(PictureIndex.open(copy / "i")) == ROWS


@pytest.mark.parametrize(("part", "lost"), [("data", ROWS), ("_versions", None), ("no _versions", None)])
def test_a_table_without_a_readable_version_is_moved_aside_and_created_again(intact, copy, model, part, lost, caplog):
    index, folder = PictureIndex.open(copy / "i"), copy / "i" / "pictures.lance"
    rows = rows_of(index)
    index._table.purge()  # removes the first version, which has no rows and could be read
    for path in (folder / part.removeprefix("no ")).iterdir():
        os.truncate(path, 100)
    if part == "no _versions":
        shutil.rmtree(folder / "_versions")
    (copy / "i" / "pictures.lance.damaged").mkdir()  # from an earlier repair
    contents = [path.read_bytes() for path in data_files(copy)]
    index = PictureIndex.open(copy / "i", model=model)
    with pytest.raises(DamagedIndexError) as caught:
        index.search("um gato")
    assert ".rs" not in str(caught.value)
    report = index.add(intact / "fotos", batch_size=1)
    aside = folder.with_name("pictures.lance.damaged1")
    if lost is None:
        assert logged_values(caplog, "set_aside_unknown") == [(folder, aside)]
    else:
        assert logged_values(caplog, "set_aside") == [(folder, lost, aside)]
    assert (report.new, report.embedded, len(report.skipped_files)) == (ROWS, ROWS, 1)
    assert [path.read_bytes() for path in sorted((aside / "data").iterdir(), key=os.path.getmtime)] == contents
    assert rows_of(PictureIndex.open(copy / "i")) == rows
    assert len(index.search("um gato", k=50)) == ROWS


@pytest.mark.parametrize("damage", ["cut", "zeros"])
@pytest.mark.parametrize(("name", "part"), [("left_out", "data"), ("about", "_versions")])
def test_a_damaged_small_table_is_created_again(intact, copy, model, name, part, damage, caplog):
    for path in (copy / "i" / f"{name}.lance" / part).iterdir():
        path.write_bytes(DAMAGED_CONTENTS[damage](path.read_bytes()))
    index = PictureIndex.open(copy / "i", model=model)
    with pytest.raises(DamagedIndexError):
        index.status()
    report = index.add(intact / "fotos")
    assert f"{name}.lance" in caplog.text
    assert (report.unchanged, report.embedded, len(report.skipped_files)) == (ROWS, 0, 1)
    fresh = PictureIndex.open(copy / "i")
    assert fresh.model.name == "model"
    assert fresh.folders() == {str(intact / "fotos"): ROWS}
    assert len(fresh.status().skipped_files) == 1


# Files of the vector index, and of the index of paths
@pytest.mark.parametrize("files", ["*.idx", pytest.param("page_*.lance", marks=pytest.mark.slow)])
def test_a_damaged_search_index_is_reported_and_built_again(tmp_path, model, monkeypatch, caplog, files):
    monkeypatch.setattr(table, "MAX_EXACT_ROWS", 280), monkeypatch.setattr(index_module, "MAX_CACHED_ROWS", 100)
    fotos = tmp_path / "fotos"
    make_pictures(fotos, 300)
    index = PictureIndex.open(tmp_path / "i", model=model)
    index.add(fotos)
    assert index.status().approximate
    expected, inside = paths(index.search("um gato", k=5)), paths(index.search("um gato", k=5, folder=fotos / "d1"))
    for path in (tmp_path / "i" / "pictures.lance" / "_indices").rglob(files):
        path.write_bytes(b"broken")
    with expect_error("damaged", path=tmp_path / "i", part="pictures"):
        broken = PictureIndex.open(tmp_path / "i", model=model)
        broken.search("um gato", k=5), broken.get_picture(expected[0])
    caplog.clear()  # an earlier test of this process may have set the logger to INFO
    with caplog.at_level(logging.INFO, "capivara"):
        assert PictureIndex.open(tmp_path / "i", model=model).add(fotos).unchanged == 300
    assert [values[0] for values in logged_values(caplog, "approximate")] == [300]
    assert not logged_values(caplog, "older_version")
    assert paths(index.search("um gato", k=5)) == expected, "an open index does not see the new search index"
    assert paths(index.search("um gato", k=5, folder=fotos / "d1")) == inside
    assert index.get_picture(expected[0]).path == expected[0] and index.status().approximate


def test_an_index_of_a_newer_version_and_tables_of_other_programs_are_refused(tmp_path):
    import lancedb

    newer = pictures_schema(8).with_metadata({LAYOUT_METADATA_KEY: b"2"})
    lancedb.connect(tmp_path / "newer").create_table("pictures", schema=newer)
    with expect_error("newer_index", path=tmp_path / "newer", layout=2, known=1):
        PictureIndex.open(tmp_path / "newer")
    lancedb.connect(tmp_path / "other").create_table("pictures", schema=TABLE_SCHEMAS["about"])
    with expect_error("other_table", path=tmp_path / "other"):
        PictureIndex.open(tmp_path / "other")


def test_an_index_of_a_newer_lancedb_is_refused_and_not_changed(copy, model):
    """Its manifest is complete, but has an unknown bit, number 9, in the feature flags, its last field."""
    folder = copy / "i" / "pictures.lance" / "_versions"
    newest = sorted(folder.glob("*.manifest"))[0]
    content = newest.read_bytes()
    start = int.from_bytes(content[-16:-8], "little")
    length = int.from_bytes(content[start : start + 4], "little")
    message = content[start + 4 : start + 4 + length] + b"\x48\x80\x80\x01"  # reader_feature_flags, an unknown bit
    newest.write_bytes(content[:start] + len(message).to_bytes(4, "little") + message + content[start + 4 + length :])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = PictureIndex.open(copy / "i", model=model)
    for call in (index.status, lambda: index.add(copy / "fotos")):
        with pytest.raises((ValueError, OSError)):
            call()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_temporary_error_is_not_taken_for_damage(copy, model, monkeypatch):
    index = PictureIndex.open(copy / "i", model=model)

    def fail(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(table, "_build_row_scan_query", fail)
    with expect_error("too_many_files", OSError):
        index.repair()
    assert not list((copy / "i").glob("*.damaged"))

"""PictureIndex: adding, moving, forgetting and searching pictures, with a tiny model."""

import errno
import json
import logging
import os
import shutil
from datetime import date, datetime
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from made_index import expect_error, logged_values, make_pictures, rows_of
from tiny import save_model
from towers import as_published, gemma_like, siglip2
from transformers import AutoProcessor, SiglipModel

from capivara_search import folder_scan, indexing, picture_reading, table
from capivara_search import folders as known_folders
from capivara_search import index as index_module
from capivara_search.index import PictureIndex
from capivara_search.models import SearchModel, resolve_search_model
from capivara_search.results import SkippedFile
from capivara_search.table import filter_clause


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny_processor):
    """A base model, and models with another text encoder, another image encoder, and another width."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": str(save_model(folder / "base", tiny_processor)),
        "text": str(save_model(folder / "text", tiny_processor, text_seed=7)),
        "image": str(save_model(folder / "image", tiny_processor, seed=3)),
        "wide": str(save_model(folder / "wide", tiny_processor, seed=4, projection_dim=32)),
    }


@pytest.fixture(scope="module")
def known_folder(tmp_path_factory):
    """A folder of pictures that no test changes."""
    folder = tmp_path_factory.mktemp("known") / "fotos"
    make_pictures(folder, 20)
    return folder


@pytest.fixture(scope="module")
def known_index(known_folder, models):
    """An index of `known_folder` that no test changes."""
    index = PictureIndex.open(known_folder.with_name("i.lance"), model=models["base"])
    index.add(known_folder)
    return index


@pytest.fixture
def folder(tmp_path):
    make_pictures(tmp_path / "fotos", 20)
    return tmp_path / "fotos"


@pytest.fixture
def index(tmp_path, folder, models):
    index = PictureIndex.open(tmp_path / "i.lance", model=models["base"])
    index.add(folder)
    return index


def record_reads(monkeypatch) -> list[str]:
    """Return a list to which the path of each picture is added that is read from now on."""
    paths, read_picture = [], indexing.read_picture_for_indexing

    def read_and_record(file, **options):
        paths.append(file.path)
        return read_picture(file, **options)

    monkeypatch.setattr(indexing, "read_picture_for_indexing", read_and_record)
    return paths


def test_hits_are_ranked_by_the_scores_of_the_model(known_index, known_folder):
    paths = sorted(str(path) for path in known_folder.rglob("*.png"))
    images = [PIL.Image.open(path).convert("RGB") for path in paths]
    scores = known_index.model.embed_images(images) @ known_index.model.embed_texts(["um gato"])[0]
    hits = known_index.search("um gato", k=7)
    best = np.argsort(-scores)[:7]
    assert [hit.path for hit in hits] == [paths[i] for i in best]
    np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=2e-3)  # vectors are stored in float16
    assert (hits[0].width, hits[0].height) == images[best[0]].size
    assert hits[0].size == os.path.getsize(hits[0].path)
    assert abs(hits[0].modified.timestamp() - os.path.getmtime(hits[0].path)) < 1e-3


def test_text_and_picture_are_searched_by_their_mean(known_index, known_folder):
    like = known_folder / "d0" / "p0000.png"
    text, picture = known_index.model.embed_texts(["um gato"])[0], known_index.vectors([str(like)])[0]
    both = known_index.search("um gato", like=like, k=20)
    expected = known_index.search_vector(text + picture, k=20)
    assert [hit.path for hit in both] == [hit.path for hit in expected]
    assert known_index.search(like=like, k=1)[0].path == str(like)
    assert known_index.search(like=PIL.Image.open(like).convert("RGB"), k=1)[0].path == str(like)


def test_a_touched_file_is_read_but_keeps_its_vector(index, folder, monkeypatch):
    path = folder / "d1" / "p0001.png"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    read_paths = record_reads(monkeypatch)
    report = index.add(folder)
    assert (report.unchanged, report.embedded, report.changed, read_paths) == (20, 0, 0, [str(path)])
    assert index.get_picture(str(path)).modified == datetime.fromtimestamp(1_000_000_000)
    assert index.add(folder).unchanged == 20
    assert len(read_paths) == 1


def test_moved_copied_changed_deleted_and_broken_files(index, folder):
    vector = index.vectors([str(folder / "d0" / "p0000.png")])
    (folder / "d0" / "p0000.png").rename(folder / "novo.png")
    shutil.copy(folder / "d1" / "p0001.png", folder / "copia.png")
    make_pictures(folder / "outra", 1, seed=9)[0].rename(folder / "d2" / "p0002.png")
    (folder / "d3" / "p0003.png").unlink()
    (folder / "d4" / "p0004.png").write_bytes(b"no picture")
    report = index.add(folder)
    counts = (report.moved, report.new, report.changed, report.removed, report.embedded, report.unchanged)
    assert counts == (1, 1, 1, 2, 1, 16)
    assert [skipped.path for skipped in report.skipped_files] == [str(folder / "d4" / "p0004.png")]
    assert report.skipped_files[0].reason
    np.testing.assert_array_equal(index.vectors([str(folder / "novo.png")]), vector)
    gone = [folder / "d0" / "p0000.png", folder / "d3" / "p0003.png", folder / "d4" / "p0004.png"]
    assert [index.get_picture(str(path)) for path in gone] == [None] * 3
    assert len(index) == 19


def test_a_broken_file_is_reported_again_without_being_read_and_indexed_once_repaired(index, folder, monkeypatch):
    broken = folder / "d0" / "quebrada.jpg"
    broken.write_bytes(b"no picture")
    first = index.add(folder).skipped_files
    read_paths = record_reads(monkeypatch)
    assert index.add(folder).skipped_files == first == index.status().skipped_files
    assert read_paths == []
    PIL.Image.new("RGB", (50, 50), "red").save(broken)
    report = index.add(folder)
    assert (report.new, report.skipped_files, index.status().skipped_files) == (1, [], [])
    broken.write_bytes(b"again")
    assert len(index.add(folder).skipped_files) == 1
    broken.unlink()
    assert index.add(folder).skipped_files == []


def test_a_copy_within_one_run_is_embedded_once(tmp_path, folder, models):
    for number in range(3):
        shutil.copy(folder / "d0" / "p0000.png", folder / f"copia{number}.png")
    index = PictureIndex.open(tmp_path / "j.lance", model=models["base"])
    report = index.add(folder, batch_size=2)
    assert (report.new, report.embedded, len(index)) == (23, 20, 23)


@pytest.mark.parametrize("fault", ["empty", "gone"])
def test_a_folder_that_became_empty_or_is_gone_keeps_its_rows(index, folder, fault):
    other = folder.rename(folder.with_name("disk"))
    if fault == "empty":
        folder.mkdir()
    for folders in ([folder], [other, folder]):
        with expect_error("no_picture" if fault == "empty" else None, path=folder, number=20):
            index.add(*folders)
    assert len(index) == 20
    assert index.forget(folder) == 20


def test_filters_by_folder_and_date(index, folder):
    special = folder / "d'0%_x"
    make_pictures(special, 3, seed=8)
    os.utime(special / "d0" / "p0000.png", (datetime(2021, 5, 3, 12).timestamp(),) * 2)
    exif = PIL.Image.Exif()
    exif.get_ifd(PIL.ExifTags.IFD.Exif)[PIL.ExifTags.Base.DateTimeOriginal] = "2021:05:02 23:59:59"
    PIL.Image.new("RGB", (60, 50), "blue").save(special / "taken.jpg", exif=exif)
    index.add(folder)
    assert {hit.path for hit in index.search("gato", k=50, folder=special)} == {
        str(path) for path in special.rglob("*.*")
    }
    assert len(index.search("gato", k=50, folder=folder / "d0")) == 4
    hits = index.search("gato", k=50, folder=folder)
    assert len(hits) > 8 and index.search("gato", k=1, folder=folder)[0].path == hits[0].path
    day = {"since": date(2021, 5, 2), "until": date(2021, 5, 2)}
    assert [hit.path for hit in index.search("gato", **day)] == [str(special / "taken.jpg")]
    next_day = {"since": date(2021, 5, 3), "until": date(2021, 5, 3)}
    assert [hit.path for hit in index.search("gato", **next_day)] == [str(special / "d0" / "p0000.png")]
    assert len(index.search("gato", k=50, until=date(2021, 5, 3))) == 2
    assert index.search("gato", folder=folder / "nothing") == []
    with pytest.raises(ValueError, match=r"\bsince\b.*2021-05-03.*2021-05-02"):
        index.search("gato", since=date(2021, 5, 3), until=date(2021, 5, 2))
    assert index.status().first == index.status().last == datetime(2021, 5, 2, 23, 59, 59)


def test_another_text_encoder_reuses_all_vectors_and_is_logged(index, folder, models, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "capivara"):
        other = PictureIndex.open(tmp_path / "i.lance", model=models["text"])
        assert other.search("um gato", k=20) != index.search("um gato", k=20)
        assert other.add(folder).embedded == 0
    assert logged_values(caplog, "text_exchanged") == [("text", "base")]
    assert PictureIndex.open(tmp_path / "i.lance").model.name == "text"


@pytest.mark.parametrize("name", ["image", pytest.param("wide", marks=pytest.mark.slow)])
def test_another_image_encoder_is_refused_in_search_and_embeds_all_pictures_again(
    index, folder, models, tmp_path, name, caplog, monkeypatch
):
    make_pictures(folder.with_name("outras"), 4, seed=6)
    index.add(folder.with_name("outras"))
    other = PictureIndex.open(tmp_path / "i.lance", model=models[name])
    with monkeypatch.context() as patch:
        patch.setattr(SearchModel, "_loaded", property(lambda model: pytest.fail("the model was loaded")))
        with expect_error("other_model", model=name, known="base"):
            other.search("um gato", like=folder / "d0" / "p0000.png")
    with caplog.at_level(logging.INFO, "capivara"):
        report = other.add(folder)
    assert logged_values(caplog, "image_side") == [(name, 20, 24)]
    assert (report.embedded, report.reembedded, report.new, report.changed, report.moved) == (20, 20, 0, 0, 0)
    caplog.clear()
    assert other.add(folder).unchanged == 20 and not logged_values(caplog, "image_side"), "it is logged only once"
    assert (report := other.add()).reembedded == 4 and report.unchanged == 20
    fresh = PictureIndex.open(tmp_path / "fresh.lance", model=models[name])
    fresh.add(folder, folder.with_name("outras"))
    assert rows_of(other) == rows_of(fresh)
    with expect_error("other_model", model="base", known=name):
        index.search("um gato")


@pytest.fixture(scope="module")
def siglips(tmp_path_factory):
    """A SigLIP 2 as published, and two copies, saved by transformers, with another text or image encoder."""
    folder = tmp_path_factory.mktemp("siglips")
    siglip2(folder / "base", gemma_like(["um gato azul na praia", "a casa e o carro"] * 3, 400))
    for name, start in (("text", "text_model."), ("other", "vision_model.")):
        model = SiglipModel.from_pretrained(shutil.copytree(folder / "base", folder / name))
        for weights in (weights for key, weights in model.named_parameters() if key.startswith(start)):
            weights.data *= 1.5
        model.save_pretrained(folder / name)
    as_published(folder / "base")
    return folder


@pytest.mark.slow
def test_another_siglip_text_encoder_searches_the_index_of_its_base_with_siglips_scores(siglips, tmp_path, folder):
    index = PictureIndex.open(tmp_path / "siglip.lance", model=str(siglips / "base"))
    assert index.add(folder).embedded == 20
    exchanged = PictureIndex.open(index.where, model=str(siglips / "text"))
    for searched in (index, exchanged):
        hits = searched.search("Um gato", k=20)
        model, processor = (kind.from_pretrained(searched.model.folder) for kind in (SiglipModel, AutoProcessor))
        images = [PIL.Image.open(hit.path) for hit in hits]
        text = {"text": ["um gato"], "padding": "max_length", "max_length": 64}
        with torch.no_grad():
            expected = model(**processor(images=images, return_tensors="pt", **text)).logits_per_image.sigmoid()[:, 0]
        np.testing.assert_allclose([hit.score for hit in hits], expected, rtol=0.01)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        (classification,) = searched.classify(hits[0].path, ["gato", "casa"], "um {}")
        text = {"text": ["um gato", "um casa"], "padding": "max_length", "max_length": 64}
        with torch.no_grad():
            logits = model(**processor(images=images[0], return_tensors="pt", **text)).logits_per_image[0]
        np.testing.assert_allclose(list(classification.shares.values()), logits.sigmoid(), rtol=0.01)
        assert searched.search(like=hits[0].path, k=1)[0].score == pytest.approx(1, abs=1e-5)  # a cosine
    assert index.search("Um gato") != exchanged.search("Um gato")
    assert exchanged.add(folder).embedded == 0


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "48.*32"),
        ("preprocessor_config.json", {"processor_class": "CLIPProcessor"}, "CLIPProcessor.*siglip"),
        ("config.json", {"text_config": {"num_hidden_layers": 9}}, "missing keys"),
    ],
)
def test_an_unsupported_model_creates_no_index(siglips, index, folder, tmp_path, file, change, text):
    path = shutil.copytree(siglips / "base", tmp_path / "base") / file
    settings = json.loads(path.read_text())
    for key, value in change.items():
        settings[key] = settings.get(key, {}) | value if key == "text_config" else value
    path.write_text(json.dumps(settings))
    for where in (tmp_path / "new.lance", index.where):
        with pytest.raises(ValueError, match=f"^[^\\n]*{text}[^\\n]*$"):
            PictureIndex.open(where, model=str(path.parent)).add(folder)
    assert not (tmp_path / "new.lance").exists()
    assert index.status().model == "base" and index.add(folder).unchanged == 20


def test_an_interrupted_change_of_the_model_finds_only_the_rows_of_the_model_in_use(
    index, folder, models, monkeypatch, caplog
):
    other = PictureIndex.open(index.where, model=models["wide"])

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise Stopped

    monkeypatch.setattr(indexing, "COMMIT_ROWS", 4)
    with pytest.raises(Stopped):
        other.add(folder, batch_size=4, on_progress=stop)
    newer = len(other.search("um gato", k=50))
    assert 0 < newer < 20
    assert (20 - newer, 20, "wide") in logged_values(caplog, "not_yet_embedded")
    assert len(index.search("um gato", k=50)) == 20 - newer
    with caplog.at_level(logging.INFO, "capivara"):
        assert other.add(folder).embedded == 20 - newer
    assert logged_values(caplog, "image_side")[-1] == ("wide", 20 - newer, 20 - newer)
    assert len(other.search("um gato", k=50)) == 20


def test_classification_uses_stored_vectors_reads_other_pictures_and_can_answer_none(
    known_index, known_folder, models, tmp_path, monkeypatch
):
    labels = ["gato", "cachorro", "casa"]
    classifications = known_index.classify(known_folder, labels)
    read_paths = record_reads(monkeypatch)
    assert known_index.classify(known_folder, labels) == classifications
    assert read_paths == []
    fresh = PictureIndex.open(tmp_path / "none.lance", model=known_index.model).classify(known_folder, labels)
    assert [(item.path, item.label) for item in fresh] == [(item.path, item.label) for item in classifications]
    assert not (tmp_path / "none.lance").exists()
    assert all(abs(sum(item.shares.values()) - 1) < 1e-5 for item in classifications)
    texts = known_index.model.embed_texts([*(f"uma imagem de {label}" for label in labels), "uma imagem"])
    scores = known_index.vectors([item.path for item in classifications]) @ texts.T
    expected = [[*labels, None][best] for best in scores.argmax(axis=1)]
    assert [item.label for item in classifications] == expected
    with pytest.raises(ValueError, match=r"\blabels\b.*'gato'"):
        known_index.classify(known_folder, "gato")
    image = PIL.Image.open(classifications[0].path).convert("RGB")
    assert known_index.classify(image, labels)[0].label == classifications[0].label
    other = PictureIndex.open(known_index.where, model=models["wide"])  # the index has no vectors of this width
    assert [item.path for item in other.classify(known_folder, labels)] == [item.path for item in classifications]


def test_an_index_that_does_not_exist_is_empty_and_not_created_by_reading(tmp_path, models):
    index = PictureIndex.open(tmp_path / "none.lance", model=models["base"])
    assert (len(index), index.folders(), index.duplicates(), index.forget("/x")) == (0, {}, [], 0)
    assert index.status().pictures == 0
    with expect_error("no_index", where=tmp_path / "none.lance"):
        index.search("gato")
    with expect_error("no_known_folder"):
        index.add()
    assert not (tmp_path / "none.lance").exists()


def test_a_file_that_is_not_regular_is_skipped(index, folder):
    (folder / "d0").rename(folder / "kept")
    os.mkfifo(folder / "pipe.jpg")
    report = index.add(folder)
    assert (report.moved, report.removed) == (4, 0)
    assert [os.path.basename(skipped.path) for skipped in report.skipped_files] == ["pipe.jpg"]
    assert index.status().skipped_files == report.skipped_files
    version = index.version()
    assert index.add(folder).skipped_files == report.skipped_files
    assert index.version() == version
    (folder / "pipe.jpg").unlink()
    assert index.add(folder).skipped_files == index.status().skipped_files == []


def test_only_the_given_paths_are_updated(index, folder, models, tmp_path, monkeypatch):
    """The same rules apply as for whole folders; other changes are not seen."""
    new, moved, broken, other = (folder / name for name in ("d1/new.png", "moved", "d2/broken.png", "d3/other.png"))
    make_pictures(tmp_path / "more", 2, seed=5)[0].rename(new)
    new.with_name(".hidden.png").write_bytes(new.read_bytes())
    other.write_bytes(new.read_bytes())
    (folder / "d0").rename(moved)
    deleted, *_ = sorted((folder / "d4").iterdir())
    deleted.unlink()
    broken.write_bytes(b"no picture")
    read_paths = record_reads(monkeypatch)
    paths = [new, new.with_name(".hidden.png"), broken, folder / "d0", moved, folder / "not a folder"]
    report = index.add(folder, only_paths=list(map(str, paths)))
    assert (report.new, report.moved, report.changed, report.removed, report.embedded) == (1, 4, 0, 0, 1)
    assert [skipped.path for skipped in report.skipped_files] == [str(broken)]
    assert sorted(read_paths) == sorted(map(str, [new, broken, *moved.iterdir()]))
    assert index.get_picture(str(deleted)) and not index.get_picture(str(other)), "another path was updated"
    assert len(index.status().skipped_files) == 1 and index.folders() == {str(folder): 21}
    report = index.add(folder, only_paths=[str(deleted), str(broken)])
    assert (report.removed, [skipped.path for skipped in report.skipped_files]) == (1, [str(broken)])
    broken.unlink()
    assert not index.add(folder, only_paths=[str(broken)]).skipped_files and not index.status().skipped_files
    report = index.add(folder)
    assert (report.new, report.embedded, report.unchanged) == (1, 0, 20), "other.png has the content of new.png"
    whole = PictureIndex.open(tmp_path / "whole.lance", model=models["base"])
    whole.add(folder)
    assert rows_of(whole) == rows_of(index)


def test_an_empty_list_of_paths_updates_nothing(index, folder):
    next(folder.rglob("*.png")).unlink()
    report = index.add(folder, only_paths=[])
    assert (report.new, report.removed, report.embedded, len(index)) == (0, 0, 0, 20)


@pytest.mark.parametrize("number", [480, 6000])
def test_many_paths_are_updated_at_once(index, folder, number):
    paths = [*folder.rglob("*.png"), *(folder / f"none{n}" for n in range(number))]
    report = index.add(folder, only_paths=list(map(str, paths)))
    assert (report.unchanged, report.removed, len(index)) == (20, 0, 20)


def test_updating_the_paths_of_an_emptied_folder_keeps_its_rows(index, folder):
    paths = [str(path) for path in folder.rglob("*.png")]
    folder.rename(folder.with_name("away"))
    folder.mkdir()
    with expect_error("no_picture", path=folder, number=20):
        index.add(folder, only_paths=paths)
    assert len(index) == 20
    make_pictures(folder, 1, seed=9)
    assert index.add(folder, only_paths=paths).removed == 19


def test_ctrl_c_keeps_the_pictures_that_are_embedded(tmp_path, folder, models):
    def interrupt(done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    index = PictureIndex.open(tmp_path / "j.lance", model=models["base"])
    with pytest.raises(KeyboardInterrupt):
        index.add(folder, batch_size=4, on_progress=interrupt)
    assert len(index) == 12
    assert index.status().folders == {str(folder): 12}
    assert index.requested_folders(), "the page must be able to open originals already"
    assert index.add().embedded == 8


def test_the_default_index_is_in_the_users_data_or_in_capivara_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("CAPIVARA_INDEX", raising=False)
    assert PictureIndex.open().where == str(tmp_path / "data" / "capivara" / "pictures.lance")
    monkeypatch.setenv("CAPIVARA_INDEX", str(tmp_path / "mine.lance"))
    assert PictureIndex.open().where == str(tmp_path / "mine.lance")


@pytest.mark.slow
def test_add_builds_an_approximate_index_that_finds_the_hits_of_the_exact_search(tmp_path, models, monkeypatch, folder):
    monkeypatch.setattr(table, "MAX_EXACT_ROWS", 300), monkeypatch.setattr(index_module, "MAX_CACHED_ROWS", 100)
    monkeypatch.setattr(table, "MAX_UNINDEXED_ROWS", 50)
    monkeypatch.setattr(indexing, "COMMIT_ROWS", 100)
    index = PictureIndex.open(tmp_path / "many.lance", model=resolve_search_model(models["base"]))
    many = tmp_path / "many"
    make_pictures(many, 400)
    index.add(many)
    assert index.status().approximate
    queries = [f"{word} {number}" for number in range(10) for word in ("gato", "casa")]
    recall = [
        len({hit.path for hit in index.search(q, k=10)} & {hit.path for hit in index.search(q, k=10, exact=True)}) / 10
        for q in queries
    ]
    assert np.mean(recall) >= 0.98
    make_pictures(many / "new", 20, seed=3)  # found although the approximate index does not have them yet
    index.add(many)
    picture = many / "new" / "d0" / "p0000.png"
    assert index.search(like=picture, k=1)[0].path == str(picture)
    assert index._table.indices()["vector_24"].num_unindexed_rows >= 20
    make_pictures(many / "new2", 60, seed=4)
    index.add(many)
    assert index._table.indices()["vector_24"].num_unindexed_rows == 0


def test_the_approximate_index_is_trained_again_when_the_rows_have_doubled(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "MAX_EXACT_ROWS", 200)
    pictures, vectors = table.PictureTable(tmp_path / "i.lance"), np.random.default_rng(0).normal(size=(600, 16))
    pictures.create(16)
    constant = {"size": 1, "mtime_ns": 1, "width": 1, "height": 1, "model": "m"}
    for rows, trained in ((200, None), (300, 300), (599, 300), (600, 600)):
        added = [
            constant | {"path": f"/{i}.png", "digest": f"{i}", "vector_16": vectors[i].astype(np.float16)}
            for i in range(pictures.count(), rows)
        ]
        pictures.upsert(pa.Table.from_pylist(added, table.pictures_schema(16)))
        pictures.optimize(16)
        index = pictures.indices().get("vector_16")
        assert (index and index.num_indexed_rows) == trained


@pytest.mark.parametrize("day", [date.min, date.max])
def test_days_outside_the_range_of_file_times_are_accepted(day):
    assert filter_clause(None, day, day).count("taken IS NOT NULL") == 2


def test_forgetting_removes_thumbnails_from_the_disk(index, folder):
    assert any(b"WEBP" in path.read_bytes() for path in Path(index.where).rglob("*") if path.is_file())
    assert index.forget(folder) > 0
    assert not any(b"WEBP" in path.read_bytes() for path in Path(index.where).rglob("*") if path.is_file())


def test_a_file_that_can_not_be_opened_keeps_its_row_and_is_tried_again(index, folder, monkeypatch):
    chosen = sorted(folder.rglob("*.png"))[0]
    os.utime(chosen, ns=(1, 1))
    open_regular_file = picture_reading.open_regular_file_safe_from_link_swaps

    def open_or_fail(path, *options):
        if path == str(chosen):
            raise OSError(errno.EIO, "the disk: no")
        return open_regular_file(path, *options)

    monkeypatch.setattr(picture_reading, "open_regular_file_safe_from_link_swaps", open_or_fail)
    skipped_files = [SkippedFile(str(chosen), "read error", "the disk: no")]
    assert index.add(folder).skipped_files == index.status().skipped_files == skipped_files
    assert index.get_picture(str(chosen)) is not None
    monkeypatch.undo()
    assert index.add(folder).skipped_files == []


# --- Ignored files and moved folders ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_forgotten_paths_stay_out_until_they_are_included(index, folder):
    chosen, other = folder / "d1", folder / "d2" / "p0002.png"
    assert (index.forget(chosen), index.forget(other)) == (4, 1)
    report = index.add(folder)
    assert (report.new, report.embedded, report.ignored_counts, len(index)) == (0, 0, {"forgotten": 5}, 15)
    assert index.status().forgotten == [str(chosen), str(other)] and index.status().ignored_counts == {"forgotten": 5}
    assert (index.add(include=[other]).new, index.status().forgotten) == (1, [str(chosen)])
    folders = index.folders_to_add(include=[folder.parent])
    assert folders == {folder: str(folder)}, "a parent of forgotten paths was added as a folder"
    assert index.add(folder, include=[chosen]).new == 4 and len(index) == 20
    assert (index.status().forgotten, index.add(folder).unchanged) == ([], 20)


def test_adding_a_forgotten_folder_is_refused_until_it_is_included(index, folder, tmp_path):
    assert index.forget(folder) == 20
    for named in (folder, folder / "d0"):
        with expect_error("folder_forgotten", path=named, forgotten=folder):
            index.add(named)
    make_pictures(tmp_path / "outras", 1, seed=5)
    assert index.add(tmp_path).new == 1, "a forgotten folder was indexed as a part of its parent"
    assert index.add(include=[folder]).new == 20


def test_patterns_are_stored_and_remove_rows(index, folder, models):
    (folder / "filme.MP4").write_bytes(b"x")
    report = index.add(folder, exclude=["d1/", "*2.png"])
    assert (report.removed, report.moved, report.ignored_counts) == (6, 0, {"excluded": 6, "video": 1})
    again = PictureIndex.open(index.where, model=models["base"])
    assert (again.add(folder).unchanged, again.status().exclude, len(again)) == (14, ["d1/", "*2.png"], 14)
    assert again.add(folder, include=["*2.png"]).new == 2
    assert (again.status().exclude, len(again)) == (["d1/"], 16)
    version = again.version()
    assert again.add(folder).unchanged == 16 and again.version() == version
    for code, options in (
        ("bad_pattern", {"exclude": [" "]}),
        ("bad_pattern", {"exclude": ["# x"]}),
        ("nothing_to_include", {"include": ["*.gif"]}),
    ):
        with expect_error(code):
            again.add(folder, **options)
    assert again.version() == version


def test_without_a_folder_all_available_folders_are_updated(index, folder, tmp_path, caplog):
    away, linked = tmp_path / "disk", tmp_path / "linked"
    make_pictures(away, 3, seed=5)
    linked.symlink_to(make_pictures(tmp_path / "a", 2, seed=6)[0].parent)
    index.add(away, linked)
    away.rename(tmp_path / "unmounted"), away.mkdir()
    linked.unlink(), linked.symlink_to(make_pictures(tmp_path / "private", 1, seed=7)[0].parent)
    make_pictures(folder / "novas", 2, seed=8)
    with caplog.at_level(logging.INFO, "capivara"):
        report = index.add()
    assert (report.new, report.removed, len(index)) == (2, 0, 26), (
        "a link that leads to another folder now was followed"
    )
    assert logged_values(caplog, "folders_away") == [(f"{away}, {linked}",)]


@pytest.mark.slow
def test_an_emptied_folder_does_not_prevent_the_update_of_the_others(index, folder, tmp_path, caplog):
    for name in ("coffee", "notes", "shut"):
        make_pictures(tmp_path / name, 3, seed=len(name))
    index.add(*(tmp_path / name for name in ("coffee", "notes", "shut")))
    assert index.add(tmp_path / "coffee", exclude=["/d0", "/d1", "/d2"]).removed == 3, (
        "the user has excluded all of its pictures"
    )
    shutil.rmtree(tmp_path / "notes"), (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no picture")
    (tmp_path / "coffee" / "a.txt").write_text("no picture")
    make_pictures(folder / "d3", 2, seed=8)
    with caplog.at_level(logging.INFO, "capivara"):
        assert (report := index.add()).new == 2 and report.removed == 15, "the pattern applies to all folders"
        assert (index.add(include=["/d0", "/d1", "/d2"]).new, len(index)) == (18, 31)
    warnings = logged_values(caplog, "left_as_it_is")
    assert [error.values["path"] for (error,) in warnings] == [str(tmp_path / "notes")] * 2
    with expect_error("no_picture", path=tmp_path / "notes", number=3):
        index.add(tmp_path / "notes")


@pytest.mark.slow
def test_moving_a_folder_rewrites_paths_without_reading_pictures(tmp_path, models, monkeypatch, caplog):
    old, new = tmp_path / "it's é" / "Fotos", tmp_path / "outro" / "c'est là"
    make_pictures(old, 12), make_pictures(old.with_name("Fotos2"), 2, seed=5)
    (old / "quebrada.jpg").write_bytes(b"no picture")
    index = PictureIndex.open(tmp_path / "i.lance", model=models["base"])
    index.add(old, old.with_name("Fotos2"))
    index.forget(old / "d3")
    before = {path: row[1:] for path, row in rows_of(index).items() if path.startswith(f"{old}/")}
    new.parent.mkdir(), old.rename(new)
    (new / "d0" / "p0000.png").unlink()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another machine"))
    moved = PictureIndex.open(shutil.move(tmp_path / "i.lance", tmp_path / "j.lance"), model=models["base"])
    read_paths = record_reads(monkeypatch)
    assert moved.requested_folders() == {} and moved.move(old, new) == (10, 9)
    after = {path: row[1:] for path, row in rows_of(moved).items() if path.startswith(f"{new}/")}
    assert after == {str(new) + path.removeprefix(str(old)): row for path, row in before.items()}
    assert moved.folders() == {str(new): 10, str(old.with_name("Fotos2")): 2}
    assert moved.requested_folders() == {str(new): str(new)}, "the other folder was not added on this machine"
    status = moved.status()
    assert (status.forgotten, status.skipped_files[0].path) == ([str(new / "d3")], str(new / "quebrada.jpg"))
    report = moved.add()
    assert (report.unchanged, report.removed, report.new, len(report.skipped_files), read_paths) == (9, 1, 0, 1, [])


@pytest.mark.parametrize("step", ["save_ignore_rules", "record_requested_folders", "_update_rows_after_move"])
def test_an_interrupted_move_can_be_repeated(index, folder, tmp_path, monkeypatch, step):
    new, function, calls = folder.rename(tmp_path / "novo"), getattr(known_folders, step), []
    (new / "quebrada.jpg").write_bytes(b"no picture")

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 1 + (
            step == "_update_rows_after_move"
        ):  # in the second call of `_update_rows_after_move`, between the two tables
            raise KeyboardInterrupt
        return function(*args)

    monkeypatch.setattr(known_folders, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        index.move(folder, new)
    index.move(folder, new)
    assert (index.folders(), index.requested_folders()) == ({str(new): 20}, {str(new): str(new)})
    report = index.add()
    assert (report.unchanged, report.embedded, len(report.skipped_files)) == (20, 0, 1)


def test_moving_a_subfolder_keeps_rows_at_the_new_path(index, folder, tmp_path):
    new = tmp_path / "novo"
    (folder / "d0").rename(new)
    index.add(new)
    assert index.move(folder / "d0", new) == (4, 4) and len(index) == 20 and len(rows_of(index)) == 20
    (folder / "d1").rename(tmp_path / "d1")
    assert index.move(folder / "d1", tmp_path / "d1") == (4, 4)
    assert index.folders() == {str(folder): 12, str(new): 4, str(tmp_path / "d1"): 4}
    assert index.add().unchanged == 20 and set(index.requested_folders()) == set(index.folders())


def test_an_impossible_move_changes_nothing(index, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    version = index.version()
    for old, new, code in (
        (folder, tmp_path / "empty", "move_not_there"),
        (folder, folder / "d0", "move_nested"),
        (folder / "d0", folder, "move_nested"),
        (tmp_path / "none", folder, "move_nothing"),
    ):
        with expect_error(code):
            index.move(old, new)
    assert index.version() == version


def test_a_move_requests_no_folder_outside_of_the_new_one(index, folder, tmp_path, monkeypatch):
    """An index from elsewhere may list folders whose paths lead out of the folder that is moved."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another machine"))
    new = shutil.copytree(folder, tmp_path / "novo")
    (new / "link").symlink_to("/etc")
    index._table.set_folders({f"{folder}/../..": "", f"{folder}/link": ""})
    index.move(folder, new)
    assert index.requested_folders() == {str(new): str(new)}


# --- Folders that others change, and indexes from others --------------------------------------------------------------


def test_a_file_that_becomes_a_link_while_indexing_is_not_read(tmp_path, models, folder, monkeypatch):
    """The scan has found a file, and then it becomes a link to a picture outside of the folder."""
    make_pictures(tmp_path / "private", 1, seed=9)
    private, chosen = next((tmp_path / "private").rglob("*.png")), sorted(folder.rglob("*.png"))[3]
    make_plan = indexing.plan_index_update

    def plan_then_swap(*args, **options):
        plan = make_plan(*args, **options)
        chosen.unlink()
        chosen.symlink_to(private)
        return plan

    monkeypatch.setattr(indexing, "plan_index_update", plan_then_swap)
    index = PictureIndex.open(tmp_path / "i.lance", model=models["base"])
    [skipped] = index.add(folder).skipped_files
    assert (skipped.path, skipped.code) == (str(chosen), "link out of the folder")
    assert len(index) == 19 and index.get_picture(str(chosen)) is None


def swap_before(patch, owner: object, name: str, folder: Path, private: Path) -> None:
    """Replace a folder by a link to private pictures right before the first call of a function."""
    function = getattr(owner, name)

    def swap_then_call(*args, **options):
        if not folder.is_symlink():
            folder.rename(folder.with_name("away"))
            folder.symlink_to(private)
        return function(*args, **options)

    patch.setattr(owner, name, swap_then_call)


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        *((PictureIndex, "add"), (known_folders, "load_ignore_rules"), (folder_scan, "_FolderScan")),
        *((indexing, step) for step in ("plan_index_update", "record_requested_folders", "read_picture_for_indexing")),
    ],
)
def test_a_known_folder_that_becomes_a_link_during_the_run_is_not_read(
    owner, step, index, folder, tmp_path, monkeypatch
):
    """`capivara index` without folders: a folder becomes a link to another user's pictures after it was checked."""
    make_pictures(tmp_path / "private", 3, seed=9)
    private = {path.read_bytes() for path in (tmp_path / "private").rglob("*.png")}
    requested = index.requested_folders()
    new = make_pictures(folder / "new", 1, seed=7)
    count, contents, read_bounded = len(index), [], picture_reading.read_bounded

    def read_and_record(file):
        contents.append(read_bounded(file))
        return contents[-1]

    monkeypatch.setattr(picture_reading, "read_bounded", read_and_record)
    with monkeypatch.context() as patch:
        folders = index.folders_to_add()
        swap_before(patch, owner, step, folder, tmp_path / "private")
        try:
            index.add(*folders, real_paths=folders)
        except ValueError as error:
            assert error.code == "folder_swapped" and str(folder) in str(error)
    assert folder.is_symlink() and private.isdisjoint(contents)
    assert index.requested_folders() == requested == {str(folder): str(folder)}
    assert len(index) in (count, count + len(new))
    with expect_error("no_known_folder"):
        index.add()
    assert index.add(folder).embedded == 3, "a user who names the link means it"
    assert index.requested_folders() == {str(folder): str(tmp_path / "private")}


def test_the_folders_of_an_index_from_elsewhere_are_not_read(tmp_path, models, folder, index, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another machine"))
    index._table.set_folders({"/": ""})
    make_pictures(tmp_path / "own", 3, seed=5)
    assert index.requested_folders() == {}
    with expect_error("no_known_folder"):
        index.add()
    other = PictureIndex.open(index.where, model=models["image"])
    read_paths = record_reads(monkeypatch)
    assert other.add(tmp_path / "own").new == 3
    assert read_paths and all(path.startswith(str(tmp_path / "own")) for path in read_paths)
    assert other.requested_folders() == {str(tmp_path / "own"): str(tmp_path / "own")}
    assert other.add(folder).embedded > 0 and set(other.requested_folders()) == {str(tmp_path / "own"), str(folder)}
    assert other.add().unchanged == 23


def test_rows_of_a_folder_that_can_not_be_read_stay(index, folder, monkeypatch):
    """For example, on a disk that is not mounted: its files are not taken for deleted."""
    index.add(folder)
    row_count = len(index)
    files, skipped_files = indexing.find_pictures_and_unreadable_files([folder])
    closed = str(folder / "d0")
    readable = [file for file in files if not file.path.startswith(closed)]
    skipped_files.append(SkippedFile(closed, "no permission", "it may not be read"))
    monkeypatch.setattr(indexing, "find_pictures_and_unreadable_files", lambda *_: (readable, skipped_files))
    assert len(readable) < len(files) and index.add(folder).removed == 0 and len(index) == row_count

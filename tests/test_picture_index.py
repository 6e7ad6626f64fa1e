"""An index of pictures: what is added, kept, found and answered. Everything runs on a tiny model."""

import errno
import json
import logging
import os
import shutil
from datetime import date, datetime
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from made_index import make_pictures, rows_of
from tiny import save_model
from towers import as_published, gemma_like, siglip2
from transformers import AutoProcessor, SiglipModel

from capivara_search import adding, picture_files, table
from capivara_search import folders as known_folders
from capivara_search import index as index_module
from capivara_search.index import PictureIndex
from capivara_search.models import SearchModel, find_model
from capivara_search.results import LeftOut
from capivara_search.table import taken_between


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny_processor):
    """One model, another text side, another image side, and another width."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": str(save_model(folder / "base", tiny_processor)),
        "text": str(save_model(folder / "text", tiny_processor, text_seed=7)),
        "image": str(save_model(folder / "image", tiny_processor, seed=3)),
        "wide": str(save_model(folder / "wide", tiny_processor, seed=4, projection_dim=32)),
    }


@pytest.fixture(scope="module")
def known_folder(tmp_path_factory):
    """Pictures that no test changes."""
    folder = tmp_path_factory.mktemp("known") / "fotos"
    make_pictures(folder, 20)
    return folder


@pytest.fixture(scope="module")
def known_index(known_folder, models):
    """Their index, which no test changes."""
    found = PictureIndex.open(known_folder.with_name("i.lance"), model=models["base"])
    found.add(known_folder)
    return found


@pytest.fixture
def folder(tmp_path):
    make_pictures(tmp_path / "fotos", 20)
    return tmp_path / "fotos"


@pytest.fixture
def index(tmp_path, folder, models):
    found = PictureIndex.open(tmp_path / "i.lance", model=models["base"])
    found.add(folder)
    return found


def reads(monkeypatch) -> list[str]:
    """The paths whose files are opened from here on."""
    opened, real = [], adding.read_picture
    monkeypatch.setattr(adding, "read_picture", lambda file, **more: (opened.append(file.path), real(file, **more))[1])
    return opened


def test_hits_are_those_of_the_model_itself_best_first(known_index, known_folder):
    paths = sorted(str(path) for path in known_folder.rglob("*.png"))
    images = [PIL.Image.open(path).convert("RGB") for path in paths]
    scores = known_index.model.images(images) @ known_index.model.texts(["um gato"])[0]
    hits = known_index.search("um gato", k=7)
    best = np.argsort(-scores)[:7]
    assert [hit.path for hit in hits] == [paths[i] for i in best]
    np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=2e-3)  # vectors are kept in float16
    assert (hits[0].width, hits[0].height) == images[best[0]].size
    assert hits[0].size == os.path.getsize(hits[0].path)
    assert abs(hits[0].modified.timestamp() - os.path.getmtime(hits[0].path)) < 1e-3


def test_text_and_picture_are_searched_by_their_mean(known_index, known_folder):
    like = known_folder / "d0" / "p0000.png"
    text, picture = known_index.model.texts(["um gato"])[0], known_index.vectors([str(like)])[0]
    both = known_index.search("um gato", like=like, k=20)
    expected = known_index.search_vector(text + picture, k=20)
    assert [hit.path for hit in both] == [hit.path for hit in expected]
    assert known_index.search(like=like, k=1)[0].path == str(like)
    assert known_index.search(like=PIL.Image.open(like).convert("RGB"), k=1)[0].path == str(like)


def test_a_touched_file_is_compared_by_its_content_and_keeps_its_vector(index, folder, monkeypatch):
    path = folder / "d1" / "p0001.png"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    opened = reads(monkeypatch)
    added = index.add(folder)
    assert (added.unchanged, added.embedded, added.changed, opened) == (20, 0, 0, [str(path)])
    assert index.row(str(path)).modified == datetime.fromtimestamp(1_000_000_000)
    assert index.add(folder).unchanged == 20
    assert len(opened) == 1


def test_moved_copied_changed_vanished_and_broken_files(index, folder):
    vector = index.vectors([str(folder / "d0" / "p0000.png")])
    (folder / "d0" / "p0000.png").rename(folder / "novo.png")
    shutil.copy(folder / "d1" / "p0001.png", folder / "copia.png")
    make_pictures(folder / "outra", 1, seed=9)[0].rename(folder / "d2" / "p0002.png")
    (folder / "d3" / "p0003.png").unlink()
    (folder / "d4" / "p0004.png").write_bytes(b"no picture")
    added = index.add(folder)
    counts = (added.moved, added.new, added.changed, added.removed, added.embedded, added.unchanged)
    assert counts == (1, 1, 1, 2, 1, 16)
    assert [one.path for one in added.left_out] == [str(folder / "d4" / "p0004.png")]
    assert added.left_out[0].reason
    np.testing.assert_array_equal(index.vectors([str(folder / "novo.png")]), vector)
    gone = [folder / "d0" / "p0000.png", folder / "d3" / "p0003.png", folder / "d4" / "p0004.png"]
    assert [index.row(str(path)) for path in gone] == [None] * 3
    assert len(index) == 19


def test_a_broken_file_is_listed_again_without_being_read_and_found_when_mended(index, folder, monkeypatch):
    broken = folder / "d0" / "quebrada.jpg"
    broken.write_bytes(b"no picture")
    first = index.add(folder).left_out
    opened = reads(monkeypatch)
    assert index.add(folder).left_out == first == index.status().left_out
    assert opened == []
    PIL.Image.new("RGB", (50, 50), "red").save(broken)
    added = index.add(folder)
    assert (added.new, added.left_out, index.status().left_out) == (1, [], [])
    broken.write_bytes(b"again")
    assert len(index.add(folder).left_out) == 1
    broken.unlink()
    assert index.add(folder).left_out == []


def test_a_copy_within_one_run_is_embedded_once(tmp_path, folder, models):
    for number in range(3):
        shutil.copy(folder / "d0" / "p0000.png", folder / f"copia{number}.png")
    index = PictureIndex.open(tmp_path / "j.lance", model=models["base"])
    added = index.add(folder, batch_size=2)
    assert (added.new, added.embedded, len(index)) == (23, 20, 23)


@pytest.mark.parametrize("fault", ["empty", "gone"])
def test_a_folder_that_has_become_empty_or_unreachable_removes_nothing(index, folder, fault):
    kept = folder.rename(folder.with_name("disk"))
    if fault == "empty":
        folder.mkdir()
    with pytest.raises(ValueError, match=r"keeps its 20 pictures of this folder; `forget` removes them"):
        index.add(folder)
    with pytest.raises(ValueError, match="keeps its 20 pictures"):
        index.add(kept, folder)
    assert len(index) == 20
    assert index.forget(folder) == 20


def test_filters_by_folder_and_date(index, folder):
    strange = folder / "d'0%_x"
    make_pictures(strange, 3, seed=8)
    os.utime(strange / "d0" / "p0000.png", (datetime(2021, 5, 3, 12).timestamp(),) * 2)
    exif = PIL.Image.Exif()
    exif.get_ifd(PIL.ExifTags.IFD.Exif)[PIL.ExifTags.Base.DateTimeOriginal] = "2021:05:02 23:59:59"
    PIL.Image.new("RGB", (60, 50), "blue").save(strange / "taken.jpg", exif=exif)
    index.add(folder)
    assert {hit.path for hit in index.search("gato", k=50, folder=strange)} == {
        str(path) for path in strange.rglob("*.*")
    }
    every = index.search("gato", k=50, folder=folder / "d0")
    assert len(every) == 4
    every = index.search("gato", k=50, folder=folder)
    assert len(every) > 8 and index.search("gato", k=1, folder=folder)[0].path == every[0].path
    day = {"since": date(2021, 5, 2), "until": date(2021, 5, 2)}
    assert [hit.path for hit in index.search("gato", **day)] == [str(strange / "taken.jpg")]
    next_day = {"since": date(2021, 5, 3), "until": date(2021, 5, 3)}
    assert [hit.path for hit in index.search("gato", **next_day)] == [str(strange / "d0" / "p0000.png")]
    assert len(index.search("gato", k=50, until=date(2021, 5, 3))) == 2
    assert index.search("gato", folder=folder / "nothing") == []
    with pytest.raises(ValueError, match="since must not be after until"):
        index.search("gato", since=date(2021, 5, 3), until=date(2021, 5, 2))
    assert index.status().first == index.status().last == datetime(2021, 5, 2, 23, 59, 59)


def test_another_text_side_embeds_nothing_again_and_says_so(index, folder, models, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "capivara"):
        other = PictureIndex.open(tmp_path / "i.lance", model=models["text"])
        assert other.search("um gato", k=20) != index.search("um gato", k=20)
        assert other.add(folder).embedded == 0
    assert "Exchange of the text side, text for base: 0 pictures embedded again." in caplog.text
    assert PictureIndex.open(tmp_path / "i.lance").model.name == "text"


@pytest.mark.parametrize("name", ["image", "wide"])
def test_another_image_side_is_refused_in_search_and_embeds_all_again(
    index, folder, models, tmp_path, name, caplog, monkeypatch
):
    make_pictures(folder.with_name("outras"), 4, seed=6)
    index.add(folder.with_name("outras"))
    other = PictureIndex.open(tmp_path / "i.lance", model=models[name])
    with monkeypatch.context() as patch:
        patch.setattr(SearchModel, "_loaded", property(lambda model: pytest.fail("the model was loaded")))
        with pytest.raises(ValueError, match=r"does not fit the index .* embedded by base: search with base"):
            other.search("um gato", like=folder / "d0" / "p0000.png")
    with caplog.at_level(logging.INFO, "capivara"):
        added = other.add(folder)
    assert f"24 pictures of the index were embedded by another model; {name} now embeds 20 of them" in caplog.text
    assert (added.embedded, added.again, added.new, added.changed, added.moved) == (20, 20, 0, 0, 0)
    caplog.clear()
    assert other.add(folder).unchanged == 20 and "another model" not in caplog.text, "it is said once"
    assert (added := other.add()).again == 4 and added.unchanged == 20
    fresh = PictureIndex.open(tmp_path / "fresh.lance", model=models[name])
    fresh.add(folder, folder.with_name("outras"))
    assert rows_of(other) == rows_of(fresh)
    with pytest.raises(ValueError, match="does not fit"):
        index.search("um gato")


@pytest.fixture(scope="module")
def siglips(tmp_path_factory):
    """A published SigLIP 2, another text side of it as transformers saves it, and another image side; no index yet."""
    folder = tmp_path_factory.mktemp("siglips")
    siglip2(folder / "base", gemma_like(["um gato azul na praia", "a casa e o carro"] * 3, 400))
    for name, start in (("text", "text_model."), ("other", "vision_model.")):
        model = SiglipModel.from_pretrained(shutil.copytree(folder / "base", folder / name))
        for weights in (weights for key, weights in model.named_parameters() if key.startswith(start)):
            weights.data *= 1.5
        model.save_pretrained(folder / name)
    as_published(folder / "base")
    return folder


def test_a_text_side_of_siglip_finds_in_the_index_of_its_base_on_siglips_own_scale(siglips, tmp_path, folder):
    index = PictureIndex.open(tmp_path / "siglip.lance", model=str(siglips / "base"))
    assert index.add(folder).embedded == 20
    exchanged = PictureIndex.open(index.where, model=str(siglips / "text"))
    for one in (index, exchanged):
        hits = one.search("Um gato", k=20)
        model, processor = (kind.from_pretrained(one.model.folder) for kind in (SiglipModel, AutoProcessor))
        images = [PIL.Image.open(hit.path) for hit in hits]
        text = {"text": ["um gato"], "padding": "max_length", "max_length": 64}
        with torch.no_grad():
            expected = model(**processor(images=images, return_tensors="pt", **text)).logits_per_image.sigmoid()[:, 0]
        np.testing.assert_allclose([hit.score for hit in hits], expected, rtol=0.01)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        (found,) = one.classify(hits[0].path, ["gato", "casa"], "um {}")
        text = {"text": ["um gato", "um casa"], "padding": "max_length", "max_length": 64}
        with torch.no_grad():
            logits = model(**processor(images=images[0], return_tensors="pt", **text)).logits_per_image[0]
        np.testing.assert_allclose(list(found.shares.values()), logits.sigmoid(), rtol=0.01)
        assert one.search(like=hits[0].path, k=1)[0].score == pytest.approx(1, abs=1e-5)  # a cosine
    assert index.search("Um gato") != exchanged.search("Um gato")
    assert exchanged.add(folder).embedded == 0


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "gives .*48.*, its image tower takes 32"),
        ("preprocessor_config.json", {"processor_class": "CLIPProcessor"}, "CLIPProcessor, and the model is siglip"),
        ("config.json", {"text_config": {"num_hidden_layers": 9}}, "can't be used: .*missing keys"),
    ],
)
def test_a_model_that_does_not_fit_leaves_no_index_behind(siglips, index, folder, tmp_path, file, change, text):
    path = shutil.copytree(siglips / "base", tmp_path / "base") / file
    known = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            known | {key: known.get(key, {}) | new if key == "text_config" else new for key, new in change.items()}
        )
    )
    for where in (tmp_path / "new.lance", index.where):
        with pytest.raises(ValueError, match=f"^[^\\n]*{text}[^\\n]*$"):
            PictureIndex.open(where, model=str(path.parent)).add(folder)
    assert not (tmp_path / "new.lance").exists()
    assert index.status().model == "base" and index.add(folder).unchanged == 20


def test_while_embedded_by_two_models_only_the_rows_of_the_querys_model_are_found(
    index, folder, models, monkeypatch, caplog
):
    other = PictureIndex.open(index.where, model=models["wide"])

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise Stopped

    monkeypatch.setattr(adding, "COMMIT_ROWS", 4)
    with pytest.raises(Stopped):
        other.add(folder, batch_size=4, on_progress=stop)
    newer = len(other.search("um gato", k=50))
    assert 0 < newer < 20
    assert f"{20 - newer} of 20 pictures are not yet embedded by wide, and not found;" in caplog.text
    assert len(index.search("um gato", k=50)) == 20 - newer
    with caplog.at_level(logging.INFO, "capivara"):
        assert other.add(folder).embedded == 20 - newer
    assert f"{20 - newer} pictures of the index were embedded by another model; wide now" in caplog.text
    assert len(other.search("um gato", k=50)) == 20


def test_classification_uses_kept_vectors_reads_others_and_can_say_none(
    known_index, known_folder, tmp_path, monkeypatch
):
    labels = ["gato", "cachorro", "casa"]
    kept = known_index.classify(known_folder, labels)
    opened = reads(monkeypatch)
    assert known_index.classify(known_folder, labels) == kept
    assert opened == []
    fresh = PictureIndex.open(tmp_path / "none.lance", model=known_index.model).classify(known_folder, labels)
    assert [(one.path, one.label) for one in fresh] == [(one.path, one.label) for one in kept]
    assert not (tmp_path / "none.lance").exists()
    assert all(abs(sum(one.shares.values()) - 1) < 1e-5 for one in kept)
    texts = known_index.model.texts([*(f"uma imagem de {label}" for label in labels), "uma imagem"])
    scores = known_index.vectors([one.path for one in kept]) @ texts.T
    expected = [[*labels, None][best] for best in scores.argmax(axis=1)]
    assert [one.label for one in kept] == expected
    with pytest.raises(ValueError, match="labels must be a list of words, got the text 'gato'"):
        known_index.classify(known_folder, "gato")
    assert known_index.classify(PIL.Image.open(kept[0].path).convert("RGB"), labels)[0].label == kept[0].label


def test_what_is_no_index_yet_is_empty_and_is_not_made_by_reading(tmp_path, models):
    index = PictureIndex.open(tmp_path / "none.lance", model=models["base"])
    assert (len(index), index.folders(), index.duplicates(), index.forget("/x")) == (0, {}, [], 0)
    assert index.status().pictures == 0
    with pytest.raises(ValueError, match=r"there is no index in .*none.lance yet"):
        index.search("gato")
    with pytest.raises(ValueError, match="No folder was named"):
        index.add()
    assert not (tmp_path / "none.lance").exists()


def test_what_can_not_even_be_looked_at_is_listed_and_its_rows_stay(index, folder):
    (folder / "d0").rename(folder / "kept")
    os.mkfifo(folder / "pipe.jpg")
    added = index.add(folder)
    assert (added.moved, added.removed) == (4, 0)
    assert [os.path.basename(one.path) for one in added.left_out] == ["pipe.jpg"]
    assert index.status().left_out == added.left_out
    version = index.version()
    assert index.add(folder).left_out == added.left_out
    assert index.version() == version
    (folder / "pipe.jpg").unlink()
    assert index.add(folder).left_out == index.status().left_out == []


def test_only_some_paths_are_brought_up_to_date(index, folder, models, tmp_path, monkeypatch):
    """By the same rules as all of them, and as if nothing else had changed."""
    new, moved, broken, other = (folder / name for name in ("d1/new.png", "moved", "d2/broken.png", "d3/other.png"))
    make_pictures(tmp_path / "more", 2, seed=5)[0].rename(new)
    new.with_name(".hidden.png").write_bytes(new.read_bytes())
    other.write_bytes(new.read_bytes())
    (folder / "d0").rename(moved)
    gone, *_ = sorted((folder / "d4").iterdir())
    gone.unlink()
    broken.write_bytes(b"no picture")
    opened = reads(monkeypatch)
    paths = [new, new.with_name(".hidden.png"), broken, folder / "d0", moved, folder / "not a folder"]
    added = index.add(folder, only=list(map(str, paths)))
    assert (added.new, added.moved, added.changed, added.removed, added.embedded) == (1, 4, 0, 0, 1)
    assert [one.path for one in added.left_out] == [str(broken)]
    assert sorted(opened) == sorted(map(str, [new, broken, *moved.iterdir()]))
    assert index.row(str(gone)) and not index.row(str(other)), "nobody has asked about these"
    assert len(index.status().left_out) == 1 and index.folders() == {str(folder): 21}
    added = index.add(folder, only=[str(gone), str(broken)])
    assert (added.removed, [one.path for one in added.left_out]) == (1, [str(broken)])
    broken.unlink()
    assert not index.add(folder, only=[str(broken)]).left_out and not index.status().left_out
    added = index.add(folder)
    assert (added.new, added.embedded, added.unchanged) == (1, 0, 20), "it has the content of another one"
    whole = PictureIndex.open(tmp_path / "whole.lance", model=models["base"])
    whole.add(folder)
    assert rows_of(whole) == rows_of(index)


@pytest.mark.parametrize("number", [480, 6000])
def test_many_paths_are_asked_about_at_once(index, folder, number):
    paths = [*folder.rglob("*.png"), *(folder / f"none{n}" for n in range(number))]
    added = index.add(folder, only=list(map(str, paths)))
    assert (added.unchanged, added.removed, len(index)) == (20, 0, 20)


def test_a_folder_all_of_whose_pictures_are_gone_keeps_its_rows_when_asked_about_them(index, folder):
    paths = [str(path) for path in folder.rglob("*.png")]
    folder.rename(folder.with_name("away"))
    folder.mkdir()
    with pytest.raises(ValueError, match="keeps its 20 pictures"):
        index.add(folder, only=paths)
    assert len(index) == 20
    make_pictures(folder, 1, seed=9)
    assert index.add(folder, only=paths).removed == 19


def test_ctrl_c_keeps_what_was_embedded(tmp_path, folder, models):
    def interrupt(done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    index = PictureIndex.open(tmp_path / "j.lance", model=models["base"])
    with pytest.raises(KeyboardInterrupt):
        index.add(folder, batch_size=4, on_progress=interrupt)
    assert len(index) == 12
    assert index.status().folders == {str(folder): 12} and index.asked_folders(), "the page opens originals meanwhile"
    assert index.add().embedded == 8


def test_the_place_of_the_index_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("CAPIVARA_INDEX", raising=False)
    assert PictureIndex.open().where == str(tmp_path / "data" / "capivara" / "pictures.lance")
    monkeypatch.setenv("CAPIVARA_INDEX", str(tmp_path / "mine.lance"))
    assert PictureIndex.open().where == str(tmp_path / "mine.lance")


@pytest.mark.slow
def test_the_approximate_index_is_built_by_add_and_finds_what_the_exact_search_finds(
    tmp_path, models, monkeypatch, folder
):
    monkeypatch.setattr(table, "EXACT_ROWS", 300), monkeypatch.setattr(index_module, "HELD_ROWS", 100)
    monkeypatch.setattr(table, "UNINDEXED_ROWS", 50)
    monkeypatch.setattr(adding, "COMMIT_ROWS", 100)
    index = PictureIndex.open(tmp_path / "many.lance", model=find_model(models["base"]))
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
    make_pictures(many / "neu", 20, seed=3)  # beside the approximate index, found all the same
    index.add(many)
    added = many / "neu" / "d0" / "p0000.png"
    assert index.search(like=added, k=1)[0].path == str(added)
    assert index._table.indices()["vector_24"].num_unindexed_rows >= 20
    make_pictures(many / "neu2", 60, seed=4)
    index.add(many)
    assert index._table.indices()["vector_24"].num_unindexed_rows == 0


@pytest.mark.parametrize("day", [date.min, date.max])
def test_a_day_that_no_clock_of_a_file_has_is_compared_all_the_same(day):
    assert len(taken_between(day, day)) == 2


def test_what_is_forgotten_leaves_no_thumbnail_on_the_disk(index, folder):
    assert any(b"WEBP" in path.read_bytes() for path in Path(index.where).rglob("*") if path.is_file())
    assert index.forget(folder) > 0
    assert not any(b"WEBP" in path.read_bytes() for path in Path(index.where).rglob("*") if path.is_file())


def test_a_file_that_could_not_be_opened_is_tried_again_and_keeps_its_row(index, folder, monkeypatch):
    chosen = sorted(folder.rglob("*.png"))[0]
    os.utime(chosen, ns=(1, 1))
    opened = picture_files.open_regular_file

    def fails(path, *options):
        if path == str(chosen):
            raise OSError(errno.EIO, "the disk: no")
        return opened(path, *options)

    monkeypatch.setattr(picture_files, "open_regular_file", fails)
    left_out = [LeftOut(str(chosen), "read error", "the disk: no")]
    assert index.add(folder).left_out == index.status().left_out == left_out
    assert index.row(str(chosen)) is not None
    monkeypatch.undo()
    assert index.add(folder).left_out == []


# --- What is left out, and where folders lie --------------------------------------------------------------------------


def test_what_is_forgotten_stays_out_until_it_is_included(index, folder):
    chosen, other = folder / "d1", folder / "d2" / "p0002.png"
    assert (index.forget(chosen), index.forget(other)) == (4, 1)
    added = index.add(folder)
    assert (added.new, added.embedded, added.skipped, len(index)) == (0, 0, {"forgotten": 5}, 15)
    assert index.status().forgotten == [str(chosen), str(other)] and index.status().skipped == {"forgotten": 5}
    assert (index.add(include=[other]).new, index.status().forgotten) == (1, [str(chosen)])
    assert index.folders_to_add(include=[folder.parent]) == [folder], "what was not forgotten itself is no new folder"
    assert index.add(folder, include=[chosen]).new == 4 and len(index) == 20
    assert (index.status().forgotten, index.add(folder).unchanged) == ([], 20)


def test_a_forgotten_folder_is_refused_by_its_name_and_comes_back_when_it_is_included(index, folder, tmp_path):
    assert index.forget(folder) == 20
    for named in (folder, folder / "d0"):
        with pytest.raises(ValueError, match=rf"was forgotten\. To bring it back: capivara index --include {folder}$"):
            index.add(named)
    make_pictures(tmp_path / "outras", 1, seed=5)
    assert index.add(tmp_path).new == 1, "below another folder it stays out"
    assert index.add(include=[folder]).new == 20


def test_patterns_are_kept_with_the_index_and_take_out_what_it_has(index, folder, models):
    (folder / "filme.MP4").write_bytes(b"x")
    added = index.add(folder, exclude=["d1/", "*2.png"])
    assert (added.removed, added.moved, added.skipped) == (6, 0, {"excluded": 6, "video": 1})
    again = PictureIndex.open(index.where, model=models["base"])
    assert (again.add(folder).unchanged, again.status().exclude, len(again)) == (14, ["d1/", "*2.png"], 14)
    assert again.add(folder, include=["*2.png"]).new == 2
    assert (again.status().exclude, len(again)) == (["d1/"], 16)
    version = again.version()
    assert again.add(folder).unchanged == 16 and again.version() == version
    for wrong in ({"exclude": [" "]}, {"exclude": ["# x"]}, {"include": ["*.gif"]}):
        with pytest.raises(ValueError, match=r"is no pattern of "):
            again.add(folder, **wrong)
    assert again.version() == version


def test_without_a_folder_all_that_are_there_are_brought_up_to_date(index, folder, tmp_path, caplog):
    away, linked = tmp_path / "disk", tmp_path / "linked"
    make_pictures(away, 3, seed=5)
    linked.symlink_to(make_pictures(tmp_path / "a", 2, seed=6)[0].parent)
    index.add(away, linked)
    away.rename(tmp_path / "unmounted"), away.mkdir()
    linked.unlink(), linked.symlink_to(make_pictures(tmp_path / "private", 1, seed=7)[0].parent)
    make_pictures(folder / "novas", 2, seed=8)
    with caplog.at_level(logging.INFO, "capivara"):
        added = index.add()
    assert (added.new, added.removed, len(index)) == (2, 0, 26), "a link that leads elsewhere now is not followed"
    assert f"were not added on this machine: {away}, {linked}" in caplog.text


def test_one_of_all_folders_that_has_nothing_left_keeps_no_other_from_its_turn(index, folder, tmp_path, caplog):
    for name in ("coffee", "notes", "shut"):
        make_pictures(tmp_path / name, 3, seed=len(name))
    index.add(*(tmp_path / name for name in ("coffee", "notes", "shut")))
    assert index.add(tmp_path / "coffee", exclude=["/d0", "/d1", "/d2"]).removed == 3, "the user wants it to be empty"
    shutil.rmtree(tmp_path / "notes"), (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no picture")
    (tmp_path / "coffee" / "a.txt").write_text("no picture")
    make_pictures(folder / "d3", 2, seed=8)
    with caplog.at_level(logging.INFO, "capivara"):
        assert (added := index.add()).new == 2 and added.removed == 15, "the pattern holds in all folders"
        assert (index.add(include=["/d0", "/d1", "/d2"]).new, len(index)) == (18, 31)
    assert caplog.text.count(f"Left as it is: The folder {tmp_path / 'notes'} holds no picture") == 2
    with pytest.raises(ValueError, match="keeps its 3 pictures of this folder"):
        index.add(tmp_path / "notes")


def test_a_moved_index_opens_its_pictures_again_without_reading_one(tmp_path, models, monkeypatch, caplog):
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
    opened = reads(monkeypatch)
    assert moved.asked_folders() == {} and moved.move(old, new) == (10, 9)
    after = {path: row[1:] for path, row in rows_of(moved).items() if path.startswith(f"{new}/")}
    assert after == {str(new) + path.removeprefix(str(old)): row for path, row in before.items()}
    assert moved.folders() == {str(new): 10, str(old.with_name("Fotos2")): 2}
    assert moved.asked_folders() == {str(new): str(new)}, "that of the other folder is not this machine's"
    status = moved.status()
    assert (status.forgotten, status.left_out[0].path) == ([str(new / "d3")], str(new / "quebrada.jpg"))
    added = moved.add()
    assert (added.unchanged, added.removed, added.new, len(added.left_out), opened) == (9, 1, 0, 1, [])


@pytest.mark.parametrize("step", ["note_rules", "note_asked", "_move_rows"])
def test_an_interrupted_move_goes_on(index, folder, tmp_path, monkeypatch, step):
    new, real, calls = folder.rename(tmp_path / "novo"), getattr(known_folders, step), []
    (new / "quebrada.jpg").write_bytes(b"no picture")

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1 + (step == "_move_rows"):  # between the two tables
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(known_folders, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.move(folder, new)
    index.move(folder, new)
    assert (index.folders(), index.asked_folders()) == ({str(new): 20}, {str(new): str(new)})
    added = index.add()
    assert (added.unchanged, added.embedded, len(added.left_out)) == (20, 0, 1)


def test_a_part_of_a_folder_moves_and_rows_that_are_there_already_stay(index, folder, tmp_path):
    new = tmp_path / "novo"
    (folder / "d0").rename(new)
    index.add(new)
    assert index.move(folder / "d0", new) == (4, 4) and len(index) == 20 and len(rows_of(index)) == 20
    (folder / "d1").rename(tmp_path / "d1")
    assert index.move(folder / "d1", tmp_path / "d1") == (4, 4)
    assert index.folders() == {str(folder): 12, str(new): 4, str(tmp_path / "d1"): 4}
    assert index.add().unchanged == 20 and set(index.asked_folders()) == set(index.folders())


def test_a_move_that_can_not_be_meant_changes_nothing(index, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    version = index.version()
    for old, new, text in (
        (folder, tmp_path / "empty", r"None of the 20 pictures .* is at the new place; .*empty/d\d/p00"),
        (folder, folder / "d0", "must differ"),
        (folder / "d0", folder, "must differ"),
        (tmp_path / "none", folder, "has nothing of the folder"),
    ):
        with pytest.raises(ValueError, match=text):
            index.move(old, new)
    assert index.version() == version


def test_a_move_gives_the_page_nothing_outside_of_the_new_folder(index, folder, tmp_path, monkeypatch):
    """An index of somebody else's names folders that lead out of the one that is moved."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another machine"))
    new = shutil.copytree(folder, tmp_path / "novo")
    (new / "link").symlink_to("/etc")
    index._table.note({adding.FOLDER_KEY + f"{folder}/../..": "", adding.FOLDER_KEY + f"{folder}/link": ""})
    index.move(folder, new)
    assert index.asked_folders() == {str(new): str(new)}


# --- What others do ---------------------------------------------------------------------------------------------------


def test_a_file_that_becomes_a_link_while_indexing_is_not_read(tmp_path, models, folder, monkeypatch):
    """It was seen in its folder, and a moment later it leads to a picture of somebody else's."""
    make_pictures(tmp_path / "private", 1, seed=9)
    private, chosen = next((tmp_path / "private").rglob("*.png")), sorted(folder.rglob("*.png"))[3]
    plan = adding.make_plan

    def planned_then_swapped(*args, **more):
        made = plan(*args, **more)
        chosen.unlink()
        chosen.symlink_to(private)
        return made

    monkeypatch.setattr(adding, "make_plan", planned_then_swapped)
    index = PictureIndex.open(tmp_path / "i.lance", model=models["base"])
    [left] = index.add(folder).left_out
    assert left.path == str(chosen) and left.reason.startswith("link out of the folder")
    assert len(index) == 19 and index.row(str(chosen)) is None


def test_the_folders_that_an_index_of_others_names_are_not_read(tmp_path, models, folder, index, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another machine"))
    index._table.note({adding.FOLDER_KEY + "/": ""})
    make_pictures(tmp_path / "own", 3, seed=5)
    assert index.asked_folders() == {}
    with pytest.raises(ValueError, match="none was added on this machine before"):
        index.add()
    other = PictureIndex.open(index.where, model=models["image"])
    opened = reads(monkeypatch)
    assert other.add(tmp_path / "own").new == 3
    assert opened and all(path.startswith(str(tmp_path / "own")) for path in opened)
    assert other.asked_folders() == {str(tmp_path / "own"): str(tmp_path / "own")}
    assert other.add(folder).embedded > 0 and set(other.asked_folders()) == {str(tmp_path / "own"), str(folder)}
    assert other.add().unchanged == 23


def test_rows_of_a_folder_that_can_not_be_read_stay(index, folder, monkeypatch):
    """An unmounted disk, say: what was there is not taken for gone."""
    index.add(folder)
    rows = len(index)
    found, unseen = adding.find_pictures([folder])
    closed = str(folder / "d0")
    seen = [file for file in found if not file.path.startswith(closed)]
    left_out = [*unseen, LeftOut(closed, "no permission", "it may not be read")]
    monkeypatch.setattr(adding, "find_pictures", lambda *_: (seen, left_out))
    assert len(seen) < len(found) and index.add(folder).removed == 0 and len(index) == rows

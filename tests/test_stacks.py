"""Pictures that are nearly the same: their groups, one hit for each in an answer, and the others when asked for."""

import io
from datetime import date, datetime, timedelta

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pyarrow as pa
import pytest

from capivara_search import duplicates
from capivara_search import index as index_module
from capivara_search.duplicates import (
    FLOAT16_TOLERANCE,
    SIGNATURE_BYTES,
    add_color_signatures,
    color_signature,
    find_duplicate_groups,
    is_duplicate,
    leaders,
)
from capivara_search.index import PictureIndex, l2_normalize
from capivara_search.results import DUPLICATE_MIN_SIMILARITY
from capivara_search.table import vector_column

WIDTH = 24
SCENES = 40  # each with a number of copies that is its own, 0 to 7
FIRST_DAY = datetime(2024, 1, 1, 12)


def near(vector: np.ndarray, dice: np.random.Generator, size: float) -> np.ndarray:
    """A vector at a distance from another one, of unit length."""
    noise = dice.standard_normal(len(vector))
    return l2_normalize(vector + size * noise / np.linalg.norm(noise))


def naive_leaders(vectors: np.ndarray, threshold: float) -> list[int]:
    """One vector after the other."""
    first, leading = [], []
    for row, vector in enumerate(vectors.astype(np.float32)):
        found = next(
            (one for one in leading if vectors[one].astype(np.float32) @ vector >= threshold - FLOAT16_TOLERANCE), row
        )
        first.append(found)
        leading += [row] if found == row else []
    return first


def filled(where, name: str, vectors: np.ndarray, folders: int = 2, **columns) -> PictureIndex:
    """An index of rows without files, a day after the other; `columns`: values of some."""
    index = PictureIndex.open(where, model=name)
    index._table.create(WIDTH)
    rows = [
        {
            "path": f"/fotos/{row % folders}/{row:04d}.jpg", "size": 1000, "digest": f"{row:032x}", "width": 40,
            "height": 30, "mtime_ns": int((FIRST_DAY + timedelta(days=row)).timestamp()) * 10**9,
            vector_column(WIDTH): np.float16(vector), "model": index.model.image_digest,
            **{name: values[row] for name, values in columns.items()},
        }
        for row, vector in enumerate(vectors)
    ]  # fmt: skip
    index._table.upsert(pa.Table.from_pylist(rows, index._table.columns()))
    return index


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Scenes that differ, with copies that differ little, in no order."""
    dice = np.random.default_rng(0)
    scenes = [vector for vector in l2_normalize(dice.standard_normal((SCENES, WIDTH)))]
    distance = (
        0.4 * (2 * (1 - DUPLICATE_MIN_SIMILARITY)) ** 0.5
    )  # from a scene; so all copies of one are nearly the same as one another
    every = [near(scene, dice, distance) for number, scene in enumerate(scenes) for _ in range(number % 8 + 1)]
    return np.array(every)[dice.permutation(len(every))].astype(np.float16)


@pytest.fixture(scope="module")
def index(tmp_path_factory, model, vectors) -> PictureIndex:
    return filled(tmp_path_factory.mktemp("stacks") / "i.lance", model, vectors)


def number_of(path: str) -> int:
    return int(path[-8:-4])


def expected(vectors: np.ndarray, order: list[int], k: int) -> list[tuple[int, int]]:
    """Row and copies of the first k of an order, each pair of rows compared."""
    first = naive_leaders(vectors[order], DUPLICATE_MIN_SIMILARITY)
    lead = [order[place] for place, one in enumerate(first) if place == one][:k]
    exact = vectors.astype(np.float32)
    return [
        (row, int(sum(exact[order] @ exact[row] >= DUPLICATE_MIN_SIMILARITY - FLOAT16_TOLERANCE)) - 1) for row in lead
    ]


def test_groups_are_those_of_one_picture_after_the_other(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 70), monkeypatch.setattr(duplicates, "LATER_BLOCK_ROWS", 150)
    dice = np.random.default_rng(0)
    vectors = dice.standard_normal((1000, 96))
    for number in range(200):
        vectors[dice.integers(1000)] = vectors[number] + dice.standard_normal(96) * 0.18
    vectors = l2_normalize(vectors).astype(np.float16)
    wanted = naive_leaders(vectors, 0.97)
    vectors = add_color_signatures(vectors, [None] * len(vectors))
    assert leaders(vectors, 0.97).tolist() == wanted
    lead = [row for row, first in enumerate(wanted) if row == first]
    found = [group.tolist() for group in find_duplicate_groups(vectors, 0.97)]
    assert found == [[place for place, first in enumerate(wanted) if first == row] for row in lead]
    assert sum(len(group) > 1 for group in found) > 100
    assert [group[0] for group in find_duplicate_groups(vectors, 0.97, max_groups=5)] == lead[:5]


def test_the_looks_tell_copies_from_pictures_of_the_same_thing(tmp_path, model):
    """Two thirds of the similarity are theirs; where a picture has none, as of one grey, the vectors decide."""
    dice = np.random.default_rng(5)
    look, other, grey = dice.integers(0, 256, 108), dice.integers(0, 256, 108), np.full(108, 90)
    noisy = np.clip(look + dice.integers(-9, 10, 108), 0, 255)
    looks = [np.uint8(one).tobytes() for one in (look, noisy, other, grey, grey + 1)] + [None]
    one = np.eye(WIDTH)[0]
    vectors = np.stack([one, l2_normalize(one + 0.5 * np.eye(WIDTH)[1]), *[one] * 4])
    index = filled(tmp_path / "i.lance", model, vectors, look=looks)
    assert [sorted(number_of(hit.path) for hit in group) for group in index.duplicates()] == [[3, 4, 5], [0, 1]]
    assert [number_of(hit.path) for hit in index.copies("/fotos/0/0000.jpg")] == [1]
    vectors[1] = np.eye(WIDTH)[1]
    strange = filled(tmp_path / "j.lance", model, vectors, look=looks)
    assert strange.copies("/fotos/0/0000.jpg") == [], "the same colours of another thing"


def test_the_colour_of_all_of_a_picture_makes_no_copy_of_it():
    """Two cuts of a red retina, and sheets of one colour, which the same vectors tell nothing of."""
    dice, red = np.random.default_rng(5), np.tile([200, 60, 40], 36)
    cuts = [np.uint8(red + dice.integers(-40, 41, 108)).tobytes() for _ in range(2)]
    sheets = [np.uint8(np.roll(red, turn)).tobytes() for turn in (0, 1)]
    vectors = add_color_signatures(np.tile(np.eye(WIDTH)[0], (4, 1)), cuts + sheets)
    assert (
        is_duplicate(vectors, vectors)[:2, :2].tolist()
        == is_duplicate(vectors, vectors)[2:, 2:].tolist()
        == np.eye(2).tolist()
    )


def icon(corner: int, size: int = 96, shade: int = 0) -> PIL.Image.Image:
    """A disc on white, as of an icon, with a mark in one of its corners."""
    image = PIL.Image.new("RGB", (480, 480), "white")
    draw = PIL.ImageDraw.Draw(image)
    draw.ellipse((40, 40, 440, 440), (250 - shade, 200, 40))
    x, y = 160 + 120 * (corner % 2), 160 + 120 * (corner // 2)
    draw.ellipse((x, y, x + 40, y + 40), "black")
    return image.resize((size, size), PIL.Image.Resampling.LANCZOS)


def test_flat_pictures_are_the_same_only_if_their_details_are(tmp_path, model):
    """Icons that differ in a mark, whatever the model sees; and their copies of another size and another file."""
    different = [icon(0), icon(1), icon(2), icon(3), icon(0, shade=40)]
    blank = [PIL.Image.new("RGB", (96, 96), color) for color in ("white", (253, 255, 255), (240, 255, 255))]
    written = io.BytesIO()
    icon(1).save(written, "JPEG", quality=90)
    copies = [icon(0, 192), PIL.Image.open(written)]
    looks = [color_signature(image) for image in (*different, *copies, *blank)]
    assert all(len(look) > SIGNATURE_BYTES for look in looks)
    vectors = np.tile(np.eye(WIDTH)[0], (len(looks), 1))
    index = filled(tmp_path / "i.lance", model, vectors, look=looks)
    found = [[(number_of(hit.path), round(hit.score, 2)) for hit in group] for group in index.duplicates()]
    assert sorted(sorted(number for number, _ in group) for group in found) == [[0, 5], [1, 6], [7, 8]]
    assert all(group[0][1] == 1 and DUPLICATE_MIN_SIMILARITY - FLOAT16_TOLERANCE <= group[1][1] <= 1 for group in found)
    assert [number_of(hit.path) for hit in index.copies("/fotos/0/0000.jpg")] == [5]
    assert {number_of(hit.path): hit.copies for hit in index.newest(20, group_duplicates=True)} == {
        9: 0, 8: 1, 6: 1, 5: 1, 4: 0, 3: 0, 2: 0,
    }  # fmt: skip


def test_a_photograph_is_not_flat_and_a_flat_copy_of_it_is_found():
    """JPEG of a low quality makes flat areas: the photograph itself has none."""
    dice = np.random.default_rng(0)
    photo = PIL.Image.fromarray(dice.integers(0, 256, (12, 12, 3), np.uint8)).resize((240, 240), 3)
    noisy = PIL.Image.fromarray(np.clip(np.asarray(photo) + dice.normal(0, 3, (240, 240, 3)), 0, 255).astype(np.uint8))
    look, flat = color_signature(noisy), color_signature(photo.quantize(4).convert("RGB"))
    assert len(look) == SIGNATURE_BYTES < len(flat)
    vectors = add_color_signatures(np.tile(np.eye(WIDTH)[0], (2, 1)), [look, flat])
    assert is_duplicate(vectors, vectors).all()


@pytest.mark.parametrize("k", [1, 5, 12, SCENES, 100])
def test_copies_stand_as_one_hit_and_as_many_as_asked_are_answered(index, vectors, k):
    query = l2_normalize(np.random.default_rng(1).standard_normal(WIDTH))
    order = np.argsort(-(l2_normalize(vectors) @ query), kind="stable").tolist()
    hits = index.search_vector(query, k, group_duplicates=True)
    assert [(number_of(hit.path), hit.copies) for hit in hits] == expected(vectors, order, k)
    assert len(hits) == min(k, SCENES) and [hit.score for hit in hits] == sorted((h.score for h in hits), reverse=True)
    apart = index.search_vector(query, k)
    assert [number_of(hit.path) for hit in apart] == order[:k] and {hit.copies for hit in apart} == {0}


@pytest.mark.parametrize("k", [1, 12, 100])
def test_the_newest_are_stacked_too(index, vectors, k):
    order = list(range(len(vectors)))[::-1]
    hits = index.newest(k, group_duplicates=True)
    assert [(number_of(hit.path), hit.copies) for hit in hits] == expected(vectors, order, k)
    without = PictureIndex.open(index.where, model="/no/model")
    assert [number_of(hit.path) for hit in without.newest(k)] == order[:k], "not stacked it needs no model"


def test_copies_are_counted_where_is_searched_and_listed_when_asked_for(index, vectors):
    query = vectors[3].astype(np.float32)
    where = {"folder": "/fotos/0", "since": date(2024, 1, 20), "until": date(2024, 5, 1)}
    inside = [row for row in range(0, len(vectors), 2) if 19 <= row <= 121]
    order = sorted(inside, key=lambda row: -float(l2_normalize(vectors[row]) @ query))
    hits = index.search_vector(query, 12, **where, group_duplicates=True)
    assert [(number_of(hit.path), hit.copies) for hit in hits] == expected(vectors, order, 12)
    for options in ({}, where):
        for hit in index.search_vector(query, 12, **options, group_duplicates=True):
            others = index.copies(hit.path, **options)
            assert len(others) == hit.copies and hit.path not in {one.path for one in others}
            assert all(one.score >= DUPLICATE_MIN_SIMILARITY - 2 * FLOAT16_TOLERANCE for one in others)
    assert max(hit.copies for hit in hits) > 0, "nothing was stacked"
    with pytest.raises(KeyError, match="/nothing has no vector"):
        index.copies("/nothing")


def test_of_a_large_index_the_copies_among_the_nearest_are_counted(index, vectors, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_CACHED_ROWS", 10)
    hits = index.search_vector(vectors[3].astype(np.float32), 3, group_duplicates=True)
    assert hits[0].copies == len(index.copies(hits[0].path)) > 0


def test_an_index_of_nothing_but_copies_is_one_hit(tmp_path, model):
    index = filled(tmp_path / "i.lance", model, np.tile(np.eye(WIDTH)[0], (300, 1)))
    (hit,) = index.search_vector(np.eye(WIDTH)[0], 5, group_duplicates=True)
    assert (number_of(hit.path), hit.copies) == (0, 299) and index.newest(5, group_duplicates=True)[0].copies == 299
    assert len(index.copies(hit.path, k=7)) == 7


def test_a_picture_that_another_model_has_embedded_stands_alone(tmp_path, model):
    digests = [PictureIndex.open(tmp_path / "x", model=model).model.image_digest] * 5
    digests[1] = digests[3] = "of another model"
    index = filled(tmp_path / "i.lance", model, np.tile(np.eye(WIDTH)[0], (5, 1)), model=digests)
    assert [(number_of(hit.path), hit.copies) for hit in index.newest(9, group_duplicates=True)] == [
        (4, 2),
        (3, 0),
        (1, 0),
    ]


@pytest.mark.parametrize("held", [0, 10])
def test_a_row_without_a_vector_is_no_hit_and_ties_are_in_the_order_of_paths(tmp_path, model, monkeypatch, held):
    """In memory as in the table, whatever is asked for."""
    monkeypatch.setattr(index_module, "MAX_CACHED_ROWS", held)
    query = np.eye(WIDTH)[0]
    index = filled(tmp_path / "i.lance", model, np.stack([query, np.full(WIDTH, np.nan), query, query]))
    for options in ({}, {"exact": True}, {"folder": "/fotos"}):
        assert [number_of(hit.path) for hit in index.search_vector(query, 9, **options)] == [0, 2, 3]
    assert len(index.newest(9)) == 4


def test_duplicates_are_led_by_the_picture_of_most_pixels(tmp_path, model, vectors):
    widths = np.random.default_rng(2).integers(40, 4000, len(vectors)).tolist()
    index = filled(tmp_path / "i.lance", model, vectors, width=widths)
    groups = index.duplicates()
    assert sum(len(group) - 1 for group in groups) == len(vectors) - SCENES
    for group in groups:
        assert group[0].width == max(hit.width for hit in group) and group[0].score == pytest.approx(1)
        assert all(hit.score >= DUPLICATE_MIN_SIMILARITY - 2 * FLOAT16_TOLERANCE for hit in group)
    with pytest.raises(ValueError, match="threshold must be above 0"):
        index.duplicates(0)


def test_every_folder_is_counted_with_those_in_it(tmp_path, model):
    paths = ["/f/a/b/c/1.jpg", "/f/a/b/2.jpg", "/f/a/b/3.jpg", "/f/4.jpg", "/f/a b/5.jpg", "/g/h/6.jpg", "/other/7.jpg"]
    index = filled(tmp_path / "i.lance", model, np.eye(WIDTH)[:7], path=paths)
    index._table.set_metadata({"folder:/f": "", "folder:/g": "", "folder:/f/a": "", "folder:/empty": ""})
    assert index.all_folders() == {
        "/empty": 0, "/f": 5, "/f/a": 3, "/f/a b": 1, "/f/a/b": 3, "/f/a/b/c": 1, "/g": 1, "/g/h": 1, "/other": 1,
    }  # fmt: skip
    assert {folder: index.all_folders()[folder] for folder in index.folders()} == index.folders()


def test_the_date_of_a_picture_is_the_cameras_or_else_the_files(tmp_path, model):
    taken = [datetime(2020, 2, 3, 4, 5), None]
    index = filled(tmp_path / "i.lance", model, np.eye(WIDTH)[:2], taken=taken)
    by_file, by_camera = index.newest()
    assert (by_camera.date, by_camera.date_source) == (taken[0], "camera")
    assert (by_file.date, by_file.date_source) == (FIRST_DAY + timedelta(days=1), "file") and by_file.taken is None
    index.export(tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert "2020-02-03 04:05:00" in text and ",camera\n" in text and "2024-01-02 12:00:00.000000,file\n" in text

"""Near-duplicates: their groups, one hit per group in a search, and the list of the other copies."""

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
    assign_near_duplicate_leaders,
    cluster_near_duplicates,
    combine_vectors_and_colors,
    compute_color_signature,
    is_duplicate,
)
from capivara_search.index import PictureIndex
from capivara_search.results import DUPLICATE_MIN_SIMILARITY
from capivara_search.table import l2_normalize, vector_column

WIDTH = 24
SCENES = 40  # each with 0 to 7 copies
FIRST_DAY = datetime(2024, 1, 1, 12)


def add_noise(vector: np.ndarray, rng: np.random.Generator, size: float) -> np.ndarray:
    """Return a unit-length vector near another vector."""
    noise = rng.standard_normal(len(vector))
    return l2_normalize(vector + size * noise / np.linalg.norm(noise))


def naive_leaders(vectors: np.ndarray, threshold: float) -> list[int]:
    """Return the leader of each row, comparing one vector after the other."""
    vectors, leader_of, leading = vectors.astype(np.float32), [], []
    for row, vector in enumerate(vectors):
        similar = (other for other in leading if vectors[other] @ vector >= threshold - FLOAT16_TOLERANCE)
        leader_of.append(next(similar, row))
        leading += [row] if leader_of[row] == row else []
    return leader_of


def fill_index(where, name: str, vectors: np.ndarray, folders: int = 2, **columns) -> PictureIndex:
    """Create an index of rows without files, one per day; `columns` are values of further columns."""
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
    """Vectors of different scenes with 1 to 8 near-duplicates each, in random order."""
    rng = np.random.default_rng(0)
    scenes = [vector for vector in l2_normalize(rng.standard_normal((SCENES, WIDTH)))]
    # Distance of a copy from its scene, so small that all copies of a scene are near-duplicates of each other.
    distance = 0.4 * (2 * (1 - DUPLICATE_MIN_SIMILARITY)) ** 0.5
    copies = [add_noise(scene, rng, distance) for number, scene in enumerate(scenes) for _ in range(number % 8 + 1)]
    return np.array(copies)[rng.permutation(len(copies))].astype(np.float16)


@pytest.fixture(scope="module")
def index(tmp_path_factory, model, vectors) -> PictureIndex:
    return fill_index(tmp_path_factory.mktemp("stacks") / "i.lance", model, vectors)


def number_of(path: str) -> int:
    return int(path[-8:-4])


def expected(vectors: np.ndarray, order: list[int], k: int) -> list[tuple[int, int]]:
    """Return row and number of copies of the first k leaders of an order, comparing each pair of rows."""
    leader_of = naive_leaders(vectors[order], DUPLICATE_MIN_SIMILARITY)
    first = [order[position] for position, leader in enumerate(leader_of) if position == leader][:k]
    vectors, threshold = vectors.astype(np.float32), DUPLICATE_MIN_SIMILARITY - FLOAT16_TOLERANCE
    return [(row, int(sum(vectors[order] @ vectors[row] >= threshold)) - 1) for row in first]


def test_groups_equal_those_of_comparing_one_picture_after_the_other(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", 20), monkeypatch.setattr(duplicates, "LATER_BLOCK_ROWS", 45)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 96))
    for number in range(60):
        vectors[rng.integers(300)] = vectors[number] + rng.standard_normal(96) * 0.18
    vectors = l2_normalize(vectors).astype(np.float16)
    expected_leaders = naive_leaders(vectors, 0.97)
    vectors = combine_vectors_and_colors(vectors, [None] * len(vectors))
    assert assign_near_duplicate_leaders(vectors, 0.97).tolist() == expected_leaders
    leading = [row for row, leader in enumerate(expected_leaders) if row == leader]
    groups = [group.tolist() for group in cluster_near_duplicates(vectors, 0.97)]
    assert groups == [[row for row, leader in enumerate(expected_leaders) if leader == first] for first in leading]
    assert sum(len(group) > 1 for group in groups) > 30
    assert [group[0] for group in cluster_near_duplicates(vectors, 0.97, max_groups=5)] == leading[:5]


def test_color_signatures_distinguish_copies_from_pictures_of_the_same_object(tmp_path, model):
    """The vectors alone decide for pictures without a signature, or with the signature of a uniform gray."""
    rng = np.random.default_rng(5)
    colors, other, gray = rng.integers(0, 256, 108), rng.integers(0, 256, 108), np.full(108, 90)
    noisy = np.clip(colors + rng.integers(-9, 10, 108), 0, 255)
    signatures = [np.uint8(pixels).tobytes() for pixels in (colors, noisy, other, gray, gray + 1)] + [None]
    vector = np.eye(WIDTH)[0]
    vectors = np.stack([vector, l2_normalize(vector + 0.5 * np.eye(WIDTH)[1]), *[vector] * 4])
    index = fill_index(tmp_path / "i.lance", model, vectors, look=signatures)
    assert [sorted(number_of(hit.path) for hit in group) for group in index.duplicates()] == [[3, 4, 5], [0, 1]]
    assert [number_of(hit.path) for hit in index.copies("/fotos/0/0000.jpg")] == [1]
    vectors[1] = np.eye(WIDTH)[1]
    different = fill_index(tmp_path / "j.lance", model, vectors, look=signatures)
    assert different.copies("/fotos/0/0000.jpg") == [], "another object with the same colors is no copy"


def test_a_common_mean_color_does_not_make_pictures_near_duplicates():
    """Two crops of a red picture, and two uniform pictures, all with the same vector."""
    rng, red = np.random.default_rng(5), np.tile([200, 60, 40], 36)
    crops = [np.uint8(red + rng.integers(-40, 41, 108)).tobytes() for _ in range(2)]
    uniform = [np.uint8(np.roll(red, turn)).tobytes() for turn in (0, 1)]
    vectors = combine_vectors_and_colors(np.tile(np.eye(WIDTH)[0], (4, 1)), crops + uniform)
    duplicates_of = is_duplicate(vectors, vectors)
    assert duplicates_of[:2, :2].tolist() == duplicates_of[2:, 2:].tolist() == np.eye(2).tolist()


def icon(corner: int, size: int = 96, shade: int = 0) -> PIL.Image.Image:
    """Return an icon: a disc on white with a black mark in one of four places."""
    image = PIL.Image.new("RGB", (480, 480), "white")
    draw = PIL.ImageDraw.Draw(image)
    draw.ellipse((40, 40, 440, 440), (250 - shade, 200, 40))
    x, y = 160 + 120 * (corner % 2), 160 + 120 * (corner // 2)
    draw.ellipse((x, y, x + 40, y + 40), "black")
    return image.resize((size, size), PIL.Image.Resampling.LANCZOS)


def test_flat_pictures_are_near_duplicates_only_if_their_details_are(tmp_path, model):
    """Icons that differ in their mark have the same vector; copies differ in size or file format."""
    different = [icon(0), icon(1), icon(2), icon(3), icon(0, shade=40)]
    blank = [PIL.Image.new("RGB", (96, 96), color) for color in ("white", (253, 255, 255), (240, 255, 255))]
    stream = io.BytesIO()
    icon(1).save(stream, "JPEG", quality=90)
    copies = [icon(0, 192), PIL.Image.open(stream)]
    signatures = [compute_color_signature(image) for image in (*different, *copies, *blank)]
    assert all(len(signature) > SIGNATURE_BYTES for signature in signatures)
    vectors = np.tile(np.eye(WIDTH)[0], (len(signatures), 1))
    index = fill_index(tmp_path / "i.lance", model, vectors, look=signatures)
    groups = index.duplicates()
    assert sorted(sorted(number_of(hit.path) for hit in group) for group in groups) == [[0, 5], [1, 6], [7, 8]]
    scores = [[round(hit.score, 2) for hit in group] for group in groups]
    assert all(first == 1 and DUPLICATE_MIN_SIMILARITY - FLOAT16_TOLERANCE <= second <= 1 for first, second in scores)
    assert [number_of(hit.path) for hit in index.copies("/fotos/0/0000.jpg")] == [5]
    assert {number_of(hit.path): hit.copies for hit in index.newest(20, group_duplicates=True)} == {
        9: 0, 8: 1, 6: 1, 5: 1, 4: 0, 3: 0, 2: 0,
    }  # fmt: skip


@pytest.mark.slow
def test_a_photograph_is_not_flat_and_a_flat_copy_of_it_is_found():
    """Reducing a photograph to four colors makes it flat; it is still compared by its colors and its vector."""
    rng = np.random.default_rng(0)
    photo = PIL.Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((240, 240), 3)
    noisy = PIL.Image.fromarray(np.clip(np.asarray(photo) + rng.normal(0, 3, (240, 240, 3)), 0, 255).astype(np.uint8))
    signature, flat_signature = (
        compute_color_signature(noisy),
        compute_color_signature(photo.quantize(4).convert("RGB")),
    )
    assert len(signature) == SIGNATURE_BYTES < len(flat_signature)
    vectors = combine_vectors_and_colors(np.tile(np.eye(WIDTH)[0], (2, 1)), [signature, flat_signature])
    assert is_duplicate(vectors, vectors).all()


@pytest.mark.parametrize("k", [1, 5, 12, SCENES, 100])
def test_grouped_search_returns_one_hit_per_group_and_k_hits(index, vectors, k):
    query = l2_normalize(np.random.default_rng(1).standard_normal(WIDTH))
    order = np.argsort(-(l2_normalize(vectors) @ query), kind="stable").tolist()
    hits = index.search_vector(query, k, group_duplicates=True)
    assert [(number_of(hit.path), hit.copies) for hit in hits] == expected(vectors, order, k)
    assert len(hits) == min(k, SCENES) and [hit.score for hit in hits] == sorted((h.score for h in hits), reverse=True)
    ungrouped = index.search_vector(query, k)
    assert [number_of(hit.path) for hit in ungrouped] == order[:k] and {hit.copies for hit in ungrouped} == {0}


@pytest.mark.parametrize("k", [1, 12, 100])
def test_the_newest_pictures_are_grouped_too(index, vectors, k):
    order = list(range(len(vectors)))[::-1]
    hits = index.newest(k, group_duplicates=True)
    assert [(number_of(hit.path), hit.copies) for hit in hits] == expected(vectors, order, k)
    without = PictureIndex.open(index.where, model="/no/model")
    assert [number_of(hit.path) for hit in without.newest(k)] == order[:k], "without grouping, no model is needed"


@pytest.mark.slow
def test_copies_are_counted_and_listed_within_the_filters(index, vectors):
    query = vectors[3].astype(np.float32)
    filters = {"folder": "/fotos/0", "since": date(2024, 1, 20), "until": date(2024, 5, 1)}
    inside = [row for row in range(0, len(vectors), 2) if 19 <= row <= 121]
    order = sorted(inside, key=lambda row: -float(l2_normalize(vectors[row]) @ query))
    hits = index.search_vector(query, 12, **filters, group_duplicates=True)
    assert [(number_of(hit.path), hit.copies) for hit in hits] == expected(vectors, order, 12)
    for options in ({}, filters):
        for hit in index.search_vector(query, 12, **options, group_duplicates=True):
            others = index.copies(hit.path, **options)
            assert len(others) == hit.copies and hit.path not in {other.path for other in others}
            assert all(other.score >= DUPLICATE_MIN_SIMILARITY - 2 * FLOAT16_TOLERANCE for other in others)
    assert max(hit.copies for hit in hits) > 0, "nothing was grouped"
    with pytest.raises(KeyError, match="/nothing"):
        index.copies("/nothing")


def test_in_a_large_index_copies_among_the_nearest_rows_are_counted(index, vectors, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_CACHED_ROWS", 10)
    hits = index.search_vector(vectors[3].astype(np.float32), 3, group_duplicates=True)
    assert hits[0].copies == len(index.copies(hits[0].path)) > 0


def test_an_index_of_copies_only_has_one_hit(tmp_path, model):
    index = fill_index(tmp_path / "i.lance", model, np.tile(np.eye(WIDTH)[0], (300, 1)))
    (hit,) = index.search_vector(np.eye(WIDTH)[0], 5, group_duplicates=True)
    assert (number_of(hit.path), hit.copies) == (0, 299) and index.newest(5, group_duplicates=True)[0].copies == 299
    assert len(index.copies(hit.path, k=7)) == 7


def test_pictures_with_vectors_of_another_model_are_not_grouped(tmp_path, model):
    digests = [PictureIndex.open(tmp_path / "x", model=model).model.image_digest] * 5
    digests[1] = digests[3] = "of another model"
    index = fill_index(tmp_path / "i.lance", model, np.tile(np.eye(WIDTH)[0], (5, 1)), model=digests)
    hits = index.newest(9, group_duplicates=True)
    assert [(number_of(hit.path), hit.copies) for hit in hits] == [(4, 2), (3, 0), (1, 0)]


@pytest.mark.parametrize("max_cached_rows", [0, 10])
def test_rows_without_a_vector_are_no_hits_and_ties_are_sorted_by_path(tmp_path, model, monkeypatch, max_cached_rows):
    """This holds for rows in memory and for rows in the table."""
    monkeypatch.setattr(index_module, "MAX_CACHED_ROWS", max_cached_rows)
    query = np.eye(WIDTH)[0]
    index = fill_index(tmp_path / "i.lance", model, np.stack([query, np.full(WIDTH, np.nan), query, query]))
    for options in ({}, {"exact": True}, {"folder": "/fotos"}):
        assert [number_of(hit.path) for hit in index.search_vector(query, 9, **options)] == [0, 2, 3]
    assert len(index.newest(9)) == 4


def test_duplicates_are_led_by_the_picture_of_most_pixels(tmp_path, model, vectors):
    widths = np.random.default_rng(2).integers(40, 4000, len(vectors)).tolist()
    index = fill_index(tmp_path / "i.lance", model, vectors, width=widths)
    groups = index.duplicates()
    assert sum(len(group) - 1 for group in groups) == len(vectors) - SCENES
    for group in groups:
        assert group[0].width == max(hit.width for hit in group) and group[0].score == pytest.approx(1)
        assert all(hit.score >= DUPLICATE_MIN_SIMILARITY - 2 * FLOAT16_TOLERANCE for hit in group)
    with pytest.raises(ValueError, match=r"\bthreshold\b.*0"):
        index.duplicates(0)


def test_pictures_of_a_folder_include_those_of_its_subfolders(tmp_path, model):
    paths = ["/f/a/b/c/1.jpg", "/f/a/b/2.jpg", "/f/a/b/3.jpg", "/f/4.jpg", "/f/a b/5.jpg", "/g/h/6.jpg", "/other/7.jpg"]
    index = fill_index(tmp_path / "i.lance", model, np.eye(WIDTH)[:7], path=paths)
    index._table.set_metadata({"folder:/f": "", "folder:/g": "", "folder:/f/a": "", "folder:/empty": ""})
    assert index.all_folders() == {
        "/empty": 0, "/f": 5, "/f/a": 3, "/f/a b": 1, "/f/a/b": 3, "/f/a/b/c": 1, "/g": 1, "/g/h": 1, "/other": 1,
    }  # fmt: skip
    assert {folder: index.all_folders()[folder] for folder in index.folders()} == index.folders()


def test_the_date_of_a_picture_is_the_exif_date_or_the_file_date(tmp_path, model):
    taken = [datetime(2020, 2, 3, 4, 5), None]
    index = fill_index(tmp_path / "i.lance", model, np.eye(WIDTH)[:2], taken=taken)
    by_file, by_camera = index.newest()
    assert (by_camera.date, by_camera.date_source) == (taken[0], "camera")
    assert (by_file.date, by_file.date_source) == (FIRST_DAY + timedelta(days=1), "file") and by_file.taken is None
    index.export(tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert "2020-02-03 04:05:00" in text and ",camera\n" in text and "2024-01-02 12:00:00.000000,file\n" in text

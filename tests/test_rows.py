"""Pair tables: which rows are used, which are bad, and when a table is made again."""

import contextlib
import io
import json
import os
import zlib
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from caption_tars import CAPTIONS, PICTURES, encoded, picture, sample, table_of, tar_source, tars_by_name, write_tar
from datasets import Image

from capivara_common import image_files
from capivara_common.image_files import BadImage, BadRow, decode_image
from caption_data import pairs
from caption_data.pairs import (
    check_bad_share,
    filter_usable_rows,
    list_skipped_rows_and_damaged_archives,
    load_or_build_pair_table,
    load_or_compute_pair_content_digest,
)
from caption_data.rows import SkippedRow, convert_to_caption_list, write_skipped_rows
from caption_data.sources import open_split
from eval.retrieval import select_captions_by_position


def plain(row: dict) -> list[str]:
    return row["captions-pt"]


def bad_rows() -> list[tuple[str, list[tuple[str, bytes]]]]:
    captions = [None, b'{"captions-en": ["x"]}', b'["captions-pt"]', b"[" * 100_000, b'{"captions-pt": null}']
    captions += [b'{"captions-pt": ["' + b"x" * 1_000_000 + b'"]}', b'{"captions-pt": [" ", "&nbsp;", null, 7]}']
    rows = [("no image", [("a.json", b'{"captions-pt": ["x"]}')])]
    rows.append(("no image", [("b.jpg", b""), ("b.json", b'{"captions-pt": ["x"]}')]))
    for number, content in enumerate([*captions, b'{"captions-pt": {"pt": "x"}}']):
        image, text = [(f"{number}.jpg", picture(0, "JPEG"))], [(f"{number}.json", content)]
        rows.append(("no caption", image + text * (content is not None)))
    return rows


def test_bad_rows_are_listed_and_left_out(tmp_path):
    good = [*sample(0), ("s.jpg", PICTURES[2]), ("s.json", b'{"captions-pt": "lone"}')]
    partly = [("t.jpg", PICTURES[4]), ("t.json", b'{"captions-pt": ["", "kept \\ud800", null]}')]
    source = tar_source(tmp_path, good + [m for _, members in bad_rows() for m in members] + partly)
    skipped = []
    table = table_of(source, skipped)
    assert [line.reason for line in skipped] == [reason for reason, _ in bad_rows()]
    assert [line.row for line in skipped] == list(range(2, 12)) and max(len(line.detail) for line in skipped) <= 300
    assert table["row"][:] == [0, 1, 12] and table["captions"][:] == [CAPTIONS[0], ["lone"], ["kept ?"]]
    write_skipped_rows(tmp_path / "skipped.jsonl", skipped)
    lines = [SkippedRow(**json.loads(line)) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines == skipped and lines[0].source.endswith("x.tar") and lines[0].split == "train"
    write_skipped_rows(tmp_path / "none.jsonl", [])
    assert not (tmp_path / "none.jsonl").exists()

    def choose(row):
        assert "image" not in row
        if row["captions-pt"] == ["lone"]:
            raise ValueError("1 similarity for 2 captions")
        return row["captions-pt"]

    refused = []
    assert table_of(source, refused, choose=choose)["row"][:] == [0, 12]
    assert ("no caption", "1 similarity for 2 captions") in [(line.reason, line.detail) for line in refused]


def test_reasons_of_images_that_cannot_be_decoded(monkeypatch):
    def reason(data) -> str:
        with pytest.raises(BadImage) as error:
            decode_image({"bytes": data, "path": None})
        return error.value.reason

    whole = encoded(PIL.Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
    assert decode_image({"bytes": whole, "path": "x.jpg"}).size == (64, 64)
    assert reason(None) == reason(b"") == "no image"
    # EPS files would start Ghostscript; PCX is not a format for photographs.
    for data in (whole[: len(whole) // 2], *(encoded(PIL.Image.new("RGB", (9, 9)), form) for form in ("EPS", "PCX"))):
        assert reason(data) == "unreadable image"
    for size in ((1, 60_000), (30_001, 700), (14_000, 13_000)):  # aspect ratio, one side, number of pixels
        assert reason(encoded(PIL.Image.new("1", size))) == "absurd image size"
    png = bytearray(encoded(PIL.Image.new("1", (8, 8))))  # the header claims 2 x 10^9 pixels, and no pixels follow
    png[16:24] = (40_000).to_bytes(4, "big") + (50_000).to_bytes(4, "big")
    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
    assert reason(bytes(png)) == "absurd image size"
    monkeypatch.setattr("capivara_common.image_files.MAX_IMAGE_BYTES", len(whole) - 1)
    assert reason(whole) == "absurd image size"


def test_images_are_upright_as_in_datasets():
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    image = {"bytes": encoded(PIL.Image.effect_noise((20, 10), 50), "JPEG", exif=exif), "path": None}
    decoded, expected = decode_image(image), Image().decode_example(image)
    assert decoded.size == (10, 20) and np.array_equal(np.asarray(decoded), np.asarray(expected))


def test_the_fingerprint_covers_images_captions_and_order(tmp_path):
    def fingerprint(folder, numbers, change=None, **captions):
        members = [m for i in numbers for m in sample(i, *([change] if i == 1 and change else []), **captions)]
        return load_or_compute_pair_content_digest(table_of(tar_source(tmp_path / folder, members)))

    pixels = np.asarray(PIL.Image.open(io.BytesIO(PICTURES[1]))).copy()
    pixels[3, 4, 1] ^= 1
    first = fingerprint("a", [0, 1, 2])
    assert first == fingerprint("b", [0, 1, 2]), "the folder does not matter"
    others = [fingerprint("c", [0, 2, 1]), fingerprint("d", [0, 1])]
    others.append(fingerprint("e", [0, 1, 2], encoded(PIL.Image.fromarray(pixels))))
    others += [fingerprint(texts[0], [0, 1, 2], **{"captions-pt": texts}) for texts in (["a", "b"], ["a b"])]
    assert len({first, *others}) == 6


def test_a_table_is_one_memory_mapped_file(tmp_path, monkeypatch):
    source = open_split(tars_by_name(tmp_path), "train", "image")
    whole = table_of(source)
    monkeypatch.setattr(pairs, "MAP_BATCH_ROWS", 3)
    table = table_of(source)
    assert len(table.cache_files) == 1 and table["captions"][:] == CAPTIONS, "one memory-mapped file"
    assert table[:] == whole[:] and load_or_compute_pair_content_digest(table) == load_or_compute_pair_content_digest(
        whole
    )
    nothing = table_of(source, choose=lambda row: [])
    assert len(nothing) == 0 and set(nothing.column_names) >= {"row", "digest", "captions"}


def test_too_many_bad_rows_raise():
    skipped = [SkippedRow("data", "train", row, "no caption" if row else "no image", "why") for row in range(4)]
    check_bad_share(skipped, 400, 0.01)
    check_bad_share([], 0, 0.0)
    with pytest.raises(ValueError, match=r"4 of 399 .*1\.00%.*3 no caption, 1 no image(?s:.*)row 0: no image"):
        check_bad_share(skipped, 399, 0.01)


def test_a_table_is_made_again_if_its_inputs_change(tmp_path):
    """Rows, captions, an image file of the same name or settings change; without a change, the cache is used."""
    folder, calls = tmp_path / "data", []

    def tables(least=0):
        for read in ("tar", "list"):
            split = open_split(str(folder / read), "train", "image")

            def choose(row, read=read):
                calls.append(read)
                return row["captions-pt"][least:]

            yield filter_usable_rows(load_or_build_pair_table(split, ["captions-pt"], choose, {"least": least}))

    (folder / "list").mkdir(parents=True)
    (folder / "list" / "a.png").write_bytes(PICTURES[1])
    (folder / "list" / "metadata.jsonl").write_text('{"file_name": "a.png", "captions-pt": ["x", "y"]}')
    write_tar(folder / "tar" / "0.tar", sample(1))
    first = list(map(load_or_compute_pair_content_digest, tables()))
    assert (
        calls == ["tar", "list"]
        and list(map(load_or_compute_pair_content_digest, tables())) == first
        and len(calls) == 2
    )
    (folder / "list" / "a.png").write_bytes(PICTURES[3])
    write_tar(folder / "tar" / "0.tar", sample(1, data=PICTURES[3]))
    assert not set(map(load_or_compute_pair_content_digest, tables())) & set(first) and len(calls) == 4
    assert [table["captions"][:] for table in tables(1)] == [[CAPTIONS[1][1:]], [["y"]]] and len(calls) == 6


def test_an_image_that_becomes_readable_is_used(tmp_path, monkeypatch):
    """An image may be unreadable only for a time: too many open files, a missing disk, another decoder."""

    def reasons(name: str) -> list[str]:
        line = json.dumps({"file_name": name, "captions-pt": ["x"]})
        (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
        split = open_split(str(tmp_path), "train", "image")
        return [
            row.reason
            for row in list_skipped_rows_and_damaged_archives(
                load_or_build_pair_table(split, ["captions-pt"], plain, {}), split
            )
        ]

    def refused(*_):
        raise OSError(24, "Too many open files")

    assert reasons("https://example.org/a.png") == ["unreadable image"]
    (tmp_path / "a.png").write_bytes(PICTURES[1])
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "open_regular_file_safe_from_link_swaps", refused)
        assert reasons("a.png") == ["unreadable image"]
    assert not reasons("a.png")


def test_damaged_tables_are_made_again_and_unused_tables_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "cache_home", lambda: tmp_path / "cache")
    source = open_split(tars_by_name(tmp_path / "data"), "train", "image")

    def make_table(number=0):
        return load_or_build_pair_table(source, ["captions-pt"], plain, {"n": number})[:]

    whole = make_table()
    (file,) = (tmp_path / "cache" / "pairs").iterdir()
    data = file.read_bytes()
    middle = data.index(CAPTIONS[1][0].encode())
    for damaged in (data[:-200], b"", data[:middle] + b"#" + data[middle + 1 :]):
        file.write_bytes(damaged)
        assert make_table() == whole and file.read_bytes() == data
    make_table(1)
    (file.parent / "tmpkilled").touch()
    for path in file.parent.iterdir():
        os.utime(path, (0, 0))
    make_table()
    assert list(file.parent.iterdir()) == [file], "the table in use stays"


def test_stages_training_and_evaluation_read_captions_alike(tmp_path):
    """A caption may be one text, a list, None, or have a lone surrogate; other types are refused."""
    for value, expected in (("one", ["one"]), (["a", "b"], ["a", "b"]), (["\ud800"], ["?"])):
        assert (
            convert_to_caption_list(value, "captions-pt")
            == select_captions_by_position(value, "captions-pt", "all", 0)
            == expected
        )
        members = [("a.jpg", PICTURES[0]), ("a.json", json.dumps({"captions-pt": value}).encode())]
        assert table_of(tar_source(tmp_path, members), [])["captions"][:] == [expected]
    assert (
        convert_to_caption_list(["a", None], "captions-pt") == ["a", ""]
        and convert_to_caption_list(None, "captions-pt") == []
    )
    for value in ({"pt": "x"}, ["a", 7]):
        with pytest.raises(BadRow, match="captions-pt"):
            convert_to_caption_list(value, "captions-pt")
        with pytest.raises(ValueError, match=r"\b3\b"):
            select_captions_by_position(value, "captions-pt", "all", 3)


def test_one_of_several_processes_makes_the_table(tmp_path, monkeypatch):
    source, waited, ranks, results = tar_source(tmp_path, [*bad_rows()[0][1], *sample(0)]), [], [], []
    for rank in range(3):  # one after the other, as in `local_main_process_first`
        state = SimpleNamespace(is_local_main_process=rank == 0)
        state.local_main_process_first = lambda: contextlib.nullcontext(waited.append(1))
        monkeypatch.setattr(pairs, "get_or_init_distributed_state", lambda state=state: state)

        def choose(row, rank=rank):
            ranks.append(rank)
            return row["captions-pt"]

        table = load_or_build_pair_table(source, ["captions-pt"], choose, {"at": f"{tmp_path}"})
        results.append((filter_usable_rows(table)[:], list_skipped_rows_and_damaged_archives(table, source)))
    assert len(waited) == 3 and {*ranks} == {0}
    assert results[0] == results[1] == results[2] and len(results[0][1]) == 1

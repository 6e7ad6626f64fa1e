"""Stages: no row is lost or doubled if tasks are killed, split or out of disk space; image bytes do not change."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_tars import CAPTIONS as TEXTS
from caption_tars import PICTURES, ROWS, rows_of, sample, write_tar
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from killed_stage import arguments, run, shout
from test_checkpoints import flipped
from test_sources import FORMS

from capivara_common.image_files import BadRow
from caption_data.parquet_split import SAMPLE_BYTES, SAMPLE_COUNT, compute_split_content_digest, open_in_place
from caption_data.rows import CAPTIONS_FEATURE, SIMILARITIES_FEATURE
from caption_data.sources import count_missing_stage_rows_and_get_command, open_split
from captions.score import ScoreArguments
from captions.stages import (
    RowStage,
    StageArguments,
    check_stage_and_count_rows,
)

ROOT = Path(__file__).resolve().parent.parent
NUMBER = 40


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def numbered(tmp_path_factory) -> str:
    """A saved dataset of 40 numbered rows."""
    features = Features({"image": Image(), "captions-pt": CAPTIONS_FEATURE, "number": Value("int32")})
    rows = {
        "image": [{"bytes": PICTURES[i % ROWS], "path": f"{i}.png"} for i in range(NUMBER)],
        "captions-pt": [[f"foto {i}", f"São João {i}"][: 1 + i % 2] for i in range(NUMBER)],
        "number": list(range(NUMBER)),
    }
    folder = tmp_path_factory.mktemp("numbered") / "data"
    DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="session")
def undisturbed(numbered, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    run(numbered, folder)
    return folder


def parts(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of a stage except stage.json, by name, including hidden files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "stage.json"}


def run_stage(args: StageArguments, columns, settings, process, task=(0, 1)):
    return RowStage(args, *task).run(columns, settings, process)


@pytest.mark.slow
def test_a_killed_stage_resumes_to_the_same_bytes(numbered, undisturbed, tmp_path):
    """SIGKILL after any kind of action: one run, parallel tasks, changing numbers of tasks, two identical runs."""
    rounds = ["1", "1,3,2", "4,1", "-2"]
    done = subprocess.run(
        [sys.executable, "tests/killed_stage.py", numbered, str(tmp_path / "out"), *rounds],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = [int(line) for line in done.stdout.split()]
    assert len(kills) == len(rounds) and min(kills) >= 3, "too few processes were killed"
    for place in range(len(rounds)):
        folder = tmp_path / f"out-{place}"
        report = check_stage_and_count_rows(folder)
        assert (report.rows, report.skipped) == (NUMBER - 4, {"ends in five": 4})
        run(numbered, folder)  # a run with nothing to do deletes temporary files
        assert parts(folder) == parts(undisturbed)
        assert [row["number"] for row in rows_of(folder)] == [i for i in range(NUMBER) if i % 10 != 5]


@pytest.mark.slow
def test_any_number_of_tasks_writes_the_same_parts(numbered, undisturbed, tmp_path):
    first = run(numbered, tmp_path / "out", (2, 3))
    assert sorted(parts(tmp_path / "out")) == [
        "train-000000028-000000035.parquet",
        "train-000000035-000000040.parquet", "train-000000035-000000040.skipped.jsonl",
    ]  # fmt: skip
    assert (first.rows, first.skipped) == (11, {"ends in five": 1})
    assert count_missing_stage_rows_and_get_command(tmp_path / "out")[0] == 28

    def done(number: int, **other) -> list[int]:
        args = replace(arguments(numbered, tmp_path / "out"), **other)
        return [rank for rank in range(number) if RowStage(args, rank, number).is_done]

    assert [done(number) for number in (1, 3, 6, 7)] == [[], [2], [4, 5], [0, 5, 6]], (
        "six parts, so one of seven tasks has none"
    )
    assert done(3, batch_rows=4) == [], "another command"
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    program, *flags = record["command"].split(" --")
    record["command"] = " --".join([program, *reversed(flags)])
    (tmp_path / "out" / "stage.json").write_text(json.dumps(record))
    assert len(flags) > 2 and done(3) == [2], "earlier versions recorded flags in another order"
    calls = Counter()

    def counting(rows):
        calls.update(row["number"] for row in rows)
        return shout(rows)

    for index in range(2):
        run(numbered, tmp_path / "out", (index, 2), counting)
    assert calls == Counter(range(28)), "no part is written twice"
    assert parts(tmp_path / "out") == parts(undisturbed)
    many = [run(numbered, tmp_path / "many", (index, 100)) for index in range(100)]
    assert sum(report.rows for report in many) == NUMBER - 4 and parts(tmp_path / "many") == parts(undisturbed)


@pytest.mark.parametrize("form", FORMS)
def test_image_bytes_of_every_form_do_not_change(tmp_path, form):
    args = StageArguments(form(tmp_path), tmp_path / "out", rows_per_part=3, batch_rows=2)
    run_stage(args, {"captions-xh": CAPTIONS_FEATURE}, {}, lambda rows: [{"captions-xh": ["x", ""]} for _ in rows])
    rows = rows_of(tmp_path / "out")
    assert [row["image"]["bytes"] for row in rows] == PICTURES
    assert [row["captions-pt"] for row in rows] == TEXTS and rows[0]["captions-xh"] == ["x", ""]
    assert all("/" not in (row["image"]["path"] or "") for row in rows), "the name has no folder"
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train")
    assert loaded.features["image"] == Image() and loaded.features["captions-xh"] == CAPTIONS_FEATURE
    assert loaded[3]["image"].size == (9, 12)


def test_the_output_of_a_stage_is_read_without_a_copy(numbered, undisturbed, tmp_path):
    run(str(undisturbed), tmp_path / "again")
    assert not (tmp_path / "cache").exists()
    source = open_in_place(str(undisturbed), "train", "image")
    expected = [row["number"] for row in source.rows()]
    assert len(source) == NUMBER - 4 == len(expected)
    for start in (0, 1, 6, 13, 35, 36, 99):
        assert [row["number"] for row in source.rows(start, column_names=["number"])] == expected[start:]
    assert [next(source.rows(i))["number"] for i in (35, 0, 17)] == [expected[i] for i in (35, 0, 17)]
    assert list(next(source.rows(column_names=["number", "captions-xx"]))) == ["number", "captions-xx"]


def test_other_columns_are_copied_and_existing_columns_replaced(tmp_path):
    text, nested = Value("string"), {"a": Value("int8"), "b": List(Value("string"))}
    features = {"picture": Image(), "label": ClassLabel(names=["a", "b"]), "grid": datasets.Array2D((2, 2), "float32")}
    features |= {"caption": text, "similarities-pt": List(Value("float64")), "nested": nested}
    image, grid = {"bytes": PICTURES[0], "path": None}, [[1, 2], [3, 4]]
    rows = [
        dict(zip(features, (image, 1, grid, "um gato", [0.5], {"a": 1, "b": ["x"]}), strict=True)),
        dict(zip(features, (image, None, grid, None, [], None), strict=True)),
    ]
    DatasetDict(test=Dataset.from_list(rows, features=Features(features))).save_to_disk(tmp_path / "data")
    names = {"split": "test", "image_column": "picture"}
    args = StageArguments(str(tmp_path / "data"), tmp_path / "out", rename=["caption=captions-pt"], **names)
    seen = []

    def process(batch):
        seen.extend(batch)
        return [{"similarities-pt": [0.25], "unknown": 1} for _ in batch]

    run_stage(args, {"similarities-pt": SIMILARITIES_FEATURE}, {}, process)
    source = open_in_place(str(tmp_path / "out"), "test", "image")
    assert dict(source.features) == {
        "image": Image(), "label": features["label"], "captions-pt": CAPTIONS_FEATURE, "nested": nested,
        "similarities-pt": SIMILARITIES_FEATURE,
    }  # fmt: skip
    written = list(source.rows())
    assert [row["captions-pt"] for row in written] == [["um gato"], []] == [row["captions-pt"] for row in seen]
    assert [row["label"] for row in written] == [1, None] and written[0]["nested"] == {"a": 1, "b": ["x"]}
    assert written[0]["similarities-pt"] == [0.25] and seen[0]["picture"]["bytes"] == PICTURES[0]
    slips = (("caption", r"\['caption'\]"), ("no=captions-pt", "'no'"), ("caption=label", "'label'"))
    for rename, message in slips:
        with pytest.raises(ValueError, match=message):
            run_stage(StageArguments(args.dataset, tmp_path / "x", rename=[rename], **names), {}, {}, shout)


def test_rows_that_cannot_be_used_are_listed(tmp_path):
    features = Features({"image": Image(), "captions-pt": CAPTIONS_FEATURE})
    pairs = [(b"", None), (None, "/no/such.png"), (PICTURES[0], "a/b"), (b"no", "a/b")]
    images = [None, *({"bytes": data, "path": path} for data, path in pairs)]
    rows = {"image": images, "captions-pt": [["x"], ["x"], ["x"], ["y" * 10_000], ["z"]]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows, schema=features.arrow_schema), tmp_path / "data" / "train.parquet")
    args = StageArguments(str(tmp_path / "data"), tmp_path / "out", batch_rows=2)
    report = args.write_rows()
    assert report.rows == 1 and report.skipped == {"no image": 2, "unreadable image": 2}
    assert str(report) == "1 rows written, 4 skipped (2 no image, 2 unreadable image)"
    (row,) = rows_of(tmp_path / "out")
    assert row["captions-pt"] == ["y" * 10_000] and row["image"] == {"bytes": PICTURES[0], "path": "b"}
    lines = (tmp_path / "out" / "train-000000000-000000005.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2, 4] and "/no/such.png" in lines[2]
    args = StageArguments(str(tmp_path / "data"), tmp_path / "none")
    assert run_stage(args, {}, {}, lambda batch: [BadRow("bad", "") for _ in batch]).rows == 0
    with pytest.raises(ValueError, match=r"none\b.*'train'"):
        run_stage(StageArguments(str(tmp_path / "none"), tmp_path / "x"), {}, {}, shout)


def test_other_settings_are_refused_and_named(numbered, tmp_path):
    run(numbered, tmp_path / "out", (0, 2))
    before = parts(tmp_path / "out")

    def again(columns=("captions-xx",), voice="loud", **changes):
        args = StageArguments(**{"dataset": numbered, "output": tmp_path / "out", "rows_per_part": 7} | changes)
        run_stage(args, dict.fromkeys(columns, CAPTIONS_FEATURE), {"voice": voice}, shout)

    with pytest.raises(ValueError, match=r"settings\.voice: 'loud' .*'low'"):
        again(voice="low")
    with pytest.raises(ValueError, match=r"rows_per_part: 7 .*\b8\b"):
        again(rows_per_part=8)
    with pytest.raises(ValueError, match=r"columns\.captions-xh: None "):
        again(columns=("captions-xx", "captions-xh"))
    data = datasets.load_from_disk(numbered)
    shorter = DatasetDict(train=data["train"].select(range(30)))
    shorter.save_to_disk(tmp_path / "shorter")
    with pytest.raises(ValueError, match=r"source\.rows: 40 .*\b30\b.*source\.fingerprint"):
        again(dataset=str(tmp_path / "shorter"))
    assert parts(tmp_path / "out") == before, "nothing changed"
    again(batch_rows=5)
    check_stage_and_count_rows(tmp_path / "out")


def test_a_moved_dataset_is_the_same_source(tmp_path):
    members = [member for number in range(ROWS) for member in sample(number)]
    write_tar(tmp_path / "a" / "train-0.tar", members)
    StageArguments(str(tmp_path / "a"), tmp_path / "out", rows_per_part=2).write_rows(0, 2)
    (tmp_path / "a").rename(tmp_path / "b")
    args = StageArguments(str(tmp_path / "b"), tmp_path / "out", rows_per_part=2)
    assert args.write_rows().rows == ROWS
    write_tar(tmp_path / "b" / "train-0.tar", [*members[2:], *sample(0, data=PICTURES[4])])
    with pytest.raises(ValueError, match=r"source\.fingerprint"):
        args.write_rows()


@pytest.mark.parametrize("piece", [0, 31, SAMPLE_COUNT - 1])
def test_samples_all_over_a_large_file_are_compared(tmp_path, piece):
    """A changed byte of the same size changes the fingerprint; another folder does not."""
    path, size = tmp_path / "a" / "train-0.tar", 2 * SAMPLE_COUNT * SAMPLE_BYTES
    path.parent.mkdir()
    path.write_bytes(bytes(size))
    first = compute_split_content_digest(SimpleNamespace(paths=[path]))
    path = path.parent.rename(tmp_path / "b") / path.name
    assert compute_split_content_digest(SimpleNamespace(paths=[path])) == first
    flipped(path, (size - SAMPLE_BYTES) * piece // (SAMPLE_COUNT - 1) + SAMPLE_BYTES // 2)
    assert compute_split_content_digest(SimpleNamespace(paths=[path])) != first


def test_invalid_output_folders_and_columns_are_refused(numbered, undisturbed, tmp_path):
    with pytest.raises(ValueError, match=f"{undisturbed}"):
        StageArguments(str(undisturbed), undisturbed)
    with pytest.raises(ValueError, match=f"{undisturbed}"):
        StageArguments(str(undisturbed), undisturbed / "new")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"stage\.json"):
        run(numbered, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"/file\b"):
        run(numbered, tmp_path / "file")
    for change, message in (({"batch_rows": 0}, "batch_rows"), ({"split": "a/b"}, "split.*'a/b'")):
        with pytest.raises(ValueError, match=message):
            StageArguments(numbered, tmp_path / "x", **change)
    with pytest.raises(ValueError, match=r"'img'.*'captions-pt'"):
        run_stage(StageArguments(numbered, tmp_path / "x", image_column="img"), {}, {}, shout)
    with pytest.raises(ValueError, match=r"--rename OLD=captions-xh"):
        RowStage(ScoreArguments(numbered, tmp_path / "x", language="xh", model="m"))


def test_a_full_disk_leaves_complete_parts_and_the_run_can_resume(numbered, undisturbed, tmp_path, monkeypatch):
    write, left = pq.ParquetWriter.write_table, [3]

    def full(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(OSError, match=r"\bout\b"):
            run(numbered, tmp_path / "out")
    assert {name for name in parts(tmp_path / "out") if name.endswith(".parquet")} == {
        "train-000000000-000000007.parquet", "train-000000007-000000014.parquet",
    }  # fmt: skip
    assert not [name for name in parts(tmp_path / "out") if name.startswith(".")], "the incomplete part is deleted"
    run(numbered, tmp_path / "out")
    assert parts(tmp_path / "out") == parts(undisturbed)


def test_an_unfinished_stage_cannot_be_read(numbered, tmp_path):
    run(numbered, tmp_path / "out", (1, 3))
    command = (
        r"\b26 rows .*python -m captions.stages "
        rf"--dataset {numbered} --output {tmp_path}/out --batch_rows 3 --rows_per_part 7"
    )
    for read in (check_stage_and_count_rows, lambda out: open_split(str(out), "train", "image")):
        with pytest.raises(ValueError, match=command):
            read(tmp_path / "out")
    with pytest.raises(ValueError, match=command):
        run(str(tmp_path / "out"), tmp_path / "next")
    with pytest.raises(ValueError, match=r"stage\.json"):
        check_stage_and_count_rows(tmp_path)


def test_damaged_parts_are_named(numbered, undisturbed, tmp_path):
    run(numbered, tmp_path / "out")
    path, listed = (tmp_path / "out" / f"train-000000000-000000007.{end}" for end in ("parquet", "skipped.jsonl"))
    whole = path.read_bytes()
    path.write_bytes((undisturbed / "train-000000007-000000014.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"\b7 rows.*\b1;.*\b7 rows.*python -m "):
        check_stage_and_count_rows(tmp_path / "out")
    path.write_bytes(whole)
    listed.unlink()
    with pytest.raises(ValueError, match=r"\b6 rows.*\b0;.*\b7 rows"):
        check_stage_and_count_rows(tmp_path / "out")


def test_a_list_of_skipped_rows_of_a_killed_run_is_deleted(numbered, undisturbed, tmp_path):
    """The run was killed between writing the list and its part; the next run skips no rows of the part."""
    run(numbered, tmp_path / "out")
    (tmp_path / "out" / "train-000000000-000000007.parquet").unlink()
    stale = tmp_path / "out" / "train-000000007-000000014.skipped.jsonl"
    assert not stale.exists()
    (tmp_path / "out" / "train-000000007-000000014.parquet").unlink()
    stale.write_text(json.dumps({"row": 8, "reason": "was broken"}) + "\n")
    (tmp_path / "out" / ".train-000000000-000000007.parquet.gone-1.tmp").write_bytes(b"half a part")
    run(numbered, tmp_path / "out")
    assert parts(tmp_path / "out") == parts(undisturbed)


def test_batches_are_not_larger_than_batch_rows(numbered, tmp_path):
    sizes = []
    run(numbered, tmp_path / "out", process=lambda rows: sizes.append(len(rows)) or shout(rows))
    assert set(sizes) == {3, 1, 2} and sum(sizes) == NUMBER, "parts of seven rows, and one of five"

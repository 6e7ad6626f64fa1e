"""Images, captions, tars and saved datasets that several tests share."""

import io
import itertools
import json
import os
import tarfile
import tempfile
import time

import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict, Features

from capivara_common.image_files import BadImage, read_image_bytes
from caption_data.pairs import filter_usable_rows, list_skipped_rows_and_damaged_archives, load_or_build_pair_table
from caption_data.parquet_split import open_in_place
from caption_data.sources import open_split
from training.inputs import load_evaluation_pairs, load_training_pairs

CACHE = tempfile.TemporaryDirectory(prefix="capivara-tests-")
os.environ.setdefault("CAPIVARA_CACHE", CACHE.name)  # keeps the tests out of the developer's own cache
ROWS = 7
CALLS = itertools.count(time.time_ns())


def encoded(image: PIL.Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(number: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return encoded(PIL.Image.fromarray(pixels), form)


PICTURES = [picture(i, "PNG" if i % 2 else "JPEG") for i in range(ROWS)]
CAPTIONS = [[f"uma foto {i}", f"São João {i}"][: 1 + i % 2] for i in range(ROWS)]


def write_tar(path, members: list[tuple[str, bytes]]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, data: bytes | None = None, folder: str = "", **fields) -> list[tuple[str, bytes]]:
    """Return the members of a sample in the layout of the CAPIVARA authors; the image is first for odd numbers."""
    fields = {"captions-pt": CAPTIONS[number], **fields}
    data = PICTURES[number] if data is None else data
    extension = "png" if data[:4] == b"\x89PNG" else "jpg"
    members = [(f"{number:05d}.{extension}", data), (f"{number:05d}.json", json.dumps(fields).encode())]
    return [(folder + name, content) for name, content in (members if number % 2 else members[::-1])]


def tars_by_name(folder):
    write_tar(folder / "shards" / "train-0001.tar", [m for i in range(4, ROWS) for m in sample(i, url=f"u{i}")])
    write_tar(folder / "shards" / "train-0000.tar", [m for i in range(4) for m in sample(i)])
    write_tar(folder / "shards" / "test-0000.tar", sample(6))
    return str(folder / "shards")


def saved_train(folder, features: dict, *columns) -> str:
    """Save a dataset whose columns are the `columns`, in the order of `features`; the first are image bytes."""
    pictures = [{"bytes": data, "path": None} for data in columns[0]]
    rows = dict(zip(features, [pictures, *map(list, columns[1:])], strict=True))
    DatasetDict(train=Dataset.from_dict(rows, features=Features(features))).save_to_disk(folder)
    return str(folder)


def files_of(dataset, **limits) -> list[bytes | None]:
    """Return the file of each image of the split `train`, or None if it cannot be read."""
    source, contents = open_split(str(dataset), "train", "image", **limits), []
    for row in source.rows():
        try:
            contents.append(read_image_bytes(row["image"], source.image_access))
        except BadImage:
            contents.append(None)
    return contents


def rows_of(folder, split: str = "train") -> list[dict]:
    """Return all rows that a stage or a build has written."""
    return list(open_in_place(str(folder), split, "image").rows())


def table_of(source, skipped=None, columns=("captions-pt",), choose=lambda row: row["captions-pt"]):
    """Return the valid pairs of a new table; append the other rows to `skipped`."""
    settings = {"call": next(CALLS)}
    table = load_or_build_pair_table(source, list(columns), choose, settings)
    if skipped is not None:
        skipped += list_skipped_rows_and_damaged_archives(table, source)
    return filter_usable_rows(table)


def tar_source(tmp_path, members):
    return open_split(str(write_tar(tmp_path / "x.tar", members)), "train", "image")


def training_of(args, skipped) -> list:
    """Return the training pairs of a run, without a model; append the other rows to `skipped`."""
    splits = {(name, args.train_split): open_split(name, args.train_split, args.image_column) for name in args.dataset}
    pairs = load_training_pairs(args, splits, None)
    for dataset in pairs:
        skipped += list_skipped_rows_and_damaged_archives(dataset.table, dataset.source)
        dataset.table = filter_usable_rows(dataset.table)
    return pairs


def measured_of(args, split, languages) -> dict:
    """Return the pairs of a split that a run evaluates on, by language."""
    source = open_split(args.evaluation_dataset, split, args.image_column)
    columns = {code: args.caption_column.replace("{language}", code) for code in languages}
    return {code: load_evaluation_pairs(source, column, None) for code, column in columns.items()}

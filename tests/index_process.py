"""Functions that tests run in separate processes, forked from a server that has imported torch, but not lancedb."""

import logging
import os
import time

import lance_namespace  # noqa: F401 - the slowest import of lancedb that survives a fork
import pandas  # noqa: F401
import PIL.Image

import capivara_search.indexing
import capivara_search.models
import capivara_search.table
from modeling_capivara import CapivaraModel, CapivaraProcessor  # noqa: F401


def add(where: str, model: str, folder: str, started, log: str, commit_rows: int = 8, pause_s: float = 0.0) -> None:
    """Run `PictureIndex.add` with one picture per batch and many small commits; set `started` when it begins."""
    from capivara_search.index import PictureIndex

    logging.basicConfig(filename=log, level=logging.INFO)
    os.environ["OMP_NUM_THREADS"] = "1"
    capivara_search.indexing.COMMIT_ROWS = commit_rows
    capivara_search.table.MAX_SMALL_FRAGMENTS = 6
    index = PictureIndex.open(where, model=model)
    index.model.image_digest  # noqa: B018 - computed before the clock starts
    len(index)  # imports lancedb
    index.model.embed_images([PIL.Image.new("RGB", (32, 32))])
    started.set()
    report = index.add(folder, batch_size=1, on_progress=lambda done, total: time.sleep(pause_s))
    logging.info("embedded %d", report.embedded)

"""What int8 costs: recall of the float32 and the int8 graphs on the same captions and images, by eval's own measure."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from capivara_common.environment import device_description
from capivara_common.files import read_json, write_json
from capivara_common.privacy import short_name
from eval.embeddings import EmbeddingStore
from eval.records.schema import DIRECTIONS
from eval.retrieval import (
    PROTOCOL,
    RetrievalArguments,
    RetrievalData,
    load_data,
    retrieval_records,
)
from hub_upload.onnx_files import OnnxModel
from modeling_capivara.two_towers import plain_embedder


def int8_measurement(dataset: str, split: str, language: str, caption_column: str) -> Callable[[Path], list[str]]:
    """Open a data set, or raise ValueError; what measures the graphs of a folder on it, and says so in lines."""
    columns = {"split": split, "language": language, "caption_column": caption_column}
    args = RetrievalArguments(model="onnx", dataset=dataset, output=Path("onnx.json"), **columns)
    data = load_data(args)
    return lambda folder: recall_lines(measure_int8(folder, args, data))


def measure_int8(folder: Path, args: RetrievalArguments, data: RetrievalData) -> dict[str, Any]:
    """Measure the recall of both precisions on the data of `args`, and add it to `onnx/quantisation.json` of a folder.

    Returns:
        What was added as `recall`: about the data, and for "float32" and "int8" direction -> metric -> share of 1.
    """
    found: dict[str, Any] = {
        "dataset": short_name(args.dataset),
        "dataset_fingerprint": data.fingerprint(),
        "split": args.split,
        "language": args.language,
        "protocol": PROTOCOL,
        "device": device_description(),
    }
    facts = dict.fromkeys(("dataset", "split", "language", "model_folder"), "") | {"model": "capivara"}
    for precision in ("float32", "int8"):
        runs = OnnxModel(folder, precision)
        # Nothing that it computes is kept, so the fingerprint need only differ. "float32" is the autocast of torch,
        # which has no part in it.
        about = ("onnx", torch.device("cpu"), "float32", precision)
        store = EmbeddingStore(plain_embedder(*about, runs.embed_images, runs.embed_texts), None, args.batch_size)
        with closing(store):
            embeddings, images = data.embedded(store)
        found |= {"images": len(images.rows), "captions": len(embeddings.text_embeds)}
        found[precision] = {direction: {} for direction in DIRECTIONS}
        for record in retrieval_records(embeddings, **facts):
            if not record.is_rank:
                found[precision][record.direction][record.metric] = record.value
    path = folder / "onnx" / "quantisation.json"
    write_json(path, {**read_json(path), "recall": found})
    return found


def recall_lines(recall: dict[str, Any]) -> list[str]:
    """The change of mean recall in words, one line a direction."""
    lines = []
    for direction, before in recall["float32"].items():
        exact, rounded = 100 * before["mean_recall"], 100 * recall["int8"][direction]["mean_recall"]
        lines.append(
            f"int8, {direction.replace('_', '-')}: mean recall {rounded:.2f} % against {exact:.2f} % in float32, "
            f"{rounded - exact:+.2f} points ({recall['images']} images, {recall['dataset']} {recall['split']})"
        )
    return lines

r"""Improve Portuguese search in existing vector stores by replacing only the text encoder of the model.

    python -m hub_upload.export --model runs/openmoji-pt-001 --output text_side --formats drop_in \
        --base data/openmoji/base
    python -m examples.exchange_text_side --text_side text_side

The first command exports the text encoder of a fine-tuned model. The second command stores test images, embedded by the
base model, in Qdrant (local mode) and in LanceDB. It then searches both stores with Portuguese captions, embedded by
the base model and by the exported text encoder, and reports recall@k of each search.

The output folder gets the two stores and `results.json`. Its key "embedded_again" is 0 if no image vector changed.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import torch
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

import modeling_capivara  # noqa: F401  registers the tokenizer, so that no code of the model folder is executed
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import atomic_folder, check_inputs_outside, read_json, write_json
from capivara_common.image_encoder_digest import image_encoder_digest
from eval.capivara_metrics.metrics import RECALL_CUTOFFS, mean_recall, recall_at_k
from examples import collect_run_conditions
from examples.caption import flatten_split_captions
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

COLLECTION_NAME = "pictures"
SEARCH_DEPTH = max(RECALL_CUTOFFS)  # number of images that a search returns: the largest k of recall@k
# A stored vector counts as changed only if one of its numbers differs by more than this. A smaller difference is
# rounding: Qdrant's local mode normalizes the stored vectors at every query, which changes the last bits.
VECTOR_TOLERANCE = 1e-6


@dataclass
class ExchangeArguments:
    """Command-line arguments of `examples.exchange_text_side`, which replaces only a search's text encoder."""

    text_side: Path = flag(..., "Folder with a text encoder, written by `hub_upload.export --formats drop_in`.")
    base: str = flag("data/openmoji/base", "Folder of the model that embeds the images.")
    dataset: Path = flag(Path("data/openmoji/dataset"), "Saved dataset with the columns image and captions-LANGUAGE.")
    split: str = flag("test", "Split of the dataset.")
    language: str = flag("pt", "Language of the captions.")
    output: Path = flag(Path("runs/exchange_text_side"), "Folder for the vector stores and results.json.")
    overwrite_output_dir: bool = flag(False, "Replace the output folder if it exists.")


class QdrantPictures:
    """Searchable store of image embeddings: a local Qdrant collection in a folder, without a server.

    Args:
        folder: Folder to create the collection in.
        vectors: Image embeddings, (images, width). The row index of an image becomes the id of its vector.
    """

    def __init__(self, folder: Path, vectors: np.ndarray):
        self.client = QdrantClient(path=str(folder))
        self.client.create_collection(COLLECTION_NAME, VectorParams(size=vectors.shape[1], distance=Distance.COSINE))
        self.client.upload_collection(COLLECTION_NAME, vectors, ids=range(len(vectors)))
        self.close = self.client.close

    def nearest(self, query: np.ndarray) -> list[int]:
        """Find the stored images that are most similar to a query, by cosine similarity.

        Args:
            query: Query embedding, (width,).

        Returns:
            Row indices of the `SEARCH_DEPTH` most similar images, the most similar first.
        """
        response = self.client.query_points(COLLECTION_NAME, query=query.tolist(), limit=SEARCH_DEPTH)
        return [hit.id for hit in response.points]

    def vectors(self) -> np.ndarray:
        """Read all stored image embeddings, (images, width), in the order of their row indices."""
        count = self.client.count(COLLECTION_NAME).count
        points, _ = self.client.scroll(COLLECTION_NAME, limit=count, with_vectors=True)
        return np.array([point.vector for point in sorted(points, key=lambda point: point.id)], dtype=np.float32)


class LancePictures:
    """Searchable store of image embeddings: a LanceDB table in a folder. It has the same methods as `QdrantPictures`.

    Args:
        folder: Folder to create the table in.
        vectors: Image embeddings, (images, width). The row index of an image becomes the id of its vector.
    """

    def __init__(self, folder: Path, vectors: np.ndarray):
        rows = [{"id": row, "vector": vector} for row, vector in enumerate(vectors)]
        self.table = lancedb.connect(folder).create_table(COLLECTION_NAME, rows)

    def close(self) -> None:
        """Do nothing. `QdrantPictures` has this method to close its store, but a LanceDB table needs no cleanup."""

    def nearest(self, query: np.ndarray) -> list[int]:
        """Find the stored images that are most similar to a query, by cosine similarity.

        Args:
            query: Query embedding, (width,).

        Returns:
            Row indices of the `SEARCH_DEPTH` most similar images, the most similar first.
        """
        return self.table.search(query).distance_type("cosine").limit(SEARCH_DEPTH).to_arrow()["id"].to_pylist()

    def vectors(self) -> np.ndarray:
        """Read all stored image embeddings, (images, width), in the order of their row indices."""
        return np.array(self.table.to_arrow().sort_by("id")["vector"].to_pylist(), dtype=np.float32)


def search_vector_store_and_compute_recall(
    pictures: QdrantPictures | LancePictures, queries: np.ndarray, picture_of_query: list[int]
) -> dict[str, float]:
    """Search a vector store with all text queries, and compute how often the right image is found (recall@k).

    Args:
        pictures: Vector store of image embeddings.
        queries: Text embeddings of the queries, (queries, width).
        picture_of_query: For each query, the row index of the only relevant image.

    Returns:
        `{"recall@1": …, "mean_recall": …}`, all from 0 to 1. "recall@k", for each k in `RECALL_CUTOFFS`, is the
        fraction of the queries whose image is among the first k results. "mean_recall" is the mean of these recalls.
    """
    ranks = []
    for query, row in zip(tqdm(queries, desc="Queries", unit="query"), picture_of_query, strict=True):
        hits = pictures.nearest(query)
        ranks.append(hits.index(row) if row in hits else SEARCH_DEPTH)
    ranks = torch.tensor(ranks)
    return {f"recall@{k}": recall_at_k(ranks, k) for k in RECALL_CUTOFFS} | {"mean_recall": mean_recall(ranks)}


def main(argv: list[str] | None = None) -> None:
    """Run the command: store image embeddings in two vector stores, search with two text encoders, and report recall.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(ExchangeArguments, __doc__, argv)
    check_inputs_outside(args.output, args.text_side, args.base, args.dataset)
    if not (args.text_side / "drop_in.json").is_file():
        hint = "Write one with hub_upload.export --formats drop_in"
        raise ValueError(f"{args.text_side} is not an exported text encoder (drop_in.json is missing). {hint}.")
    expected_digest = read_json(args.text_side / "drop_in.json", image_digest=str)["image_digest"]
    base_digest = image_encoder_digest(Path(args.base))
    if expected_digest != base_digest:
        raise ValueError(
            f"{args.text_side} was exported for another image encoder than that of {args.base}: its digest is "
            f"{expected_digest}, not {base_digest}. Export the text encoder again, with this model as --base."
        )
    if not (args.text_side / "modules.json").is_file():
        raise ValueError(
            f"{args.text_side} is the text encoder of a SigLIP model, which sentence-transformers can't load. Export "
            "the text encoder of a CAPIVARA model."
        )
    with atomic_folder(args.output, args.overwrite_output_dir) as folder:
        rows = load_dataset_and_refuse_image_paths(args.dataset)[args.split]
        texts, picture_of_text = flatten_split_captions(rows, args.language)
        model, processor = load_model(args.base).eval(), load_processor(args.base)
        vectors = embed_images(model, processor, rows["image"], progress="Images, base model").numpy()
        queries = {
            "base": embed_texts(model, processor, texts, progress="Captions, base model").numpy(),
            "exchanged": SentenceTransformer(str(args.text_side), device="cpu").encode(texts, show_progress_bar=True),
        }
        results: dict[str, Any] = {"pictures": len(vectors), "captions": len(texts), "embedded_again": 0, "recall": {}}
        for name, store in {"Qdrant": QdrantPictures, "LanceDB": LancePictures}.items():
            with closing(store(folder / name.lower(), vectors)) as pictures:
                before = pictures.vectors()
                results["recall"][name] = {
                    encoder: search_vector_store_and_compute_recall(pictures, vectors_of_texts, picture_of_text)
                    for encoder, vectors_of_texts in queries.items()
                }
                # No vector may change, because no image is embedded again.
                changed = np.abs(before - pictures.vectors()).max(axis=1) > VECTOR_TOLERANCE
            results["embedded_again"] = max(results["embedded_again"], int(changed.sum()))
        run = collect_run_conditions(args, "cpu", "qdrant-client", "lancedb", "sentence-transformers")
        write_json(folder / "results.json", results | run)
    for store, recalls in results["recall"].items():
        for encoder, figures in recalls.items():
            text = ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items())
            print(f"{store}, {encoder} text encoder: {text}")
    print("{captions} captions, {pictures} images; images embedded again: {embedded_again}".format_map(results))


if __name__ == "__main__":
    run_main_and_report_user_errors(main)

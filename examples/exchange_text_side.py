r"""Better Portuguese search in vector stores that are filled already: the text side alone is exchanged.

    python -m hub_upload.export --model runs/openmoji-pt-001 --output text_side --formats drop_in \
        --base data/openmoji/base
    python -m examples.exchange_text_side --text_side text_side

A Qdrant collection (the local mode of its client) and a LanceDB table are filled with the test pictures, embedded with
the base. The Portuguese captions are then looked up in both, by the base's own text side and by the exported one, which
sentence-transformers opens. Recall is eval's. The vectors in the stores are read before and after: a picture whose
vector is another one counts as embedded again. Stores and `results.json` lie in the output folder.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import torch
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

import modeling_capivara  # noqa: F401  registers the tokenizer of the text side: none of its folder's code is run
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import atomic_folder, check_inputs_outside, read_json, write_json
from capivara_common.image_encoder_digest import image_encoder_digest
from eval.capivara_metrics.metrics import RECALL_CUTOFFS, mean_recall, recall_at_k
from examples import describe_run
from examples.caption import list_captions
from examples.openmoji.dataset import load_dataset_with_images
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

COLLECTION_NAME, SEARCH_DEPTH = "pictures", max(RECALL_CUTOFFS)
VECTOR_TOLERANCE = (
    1e-6  # of a vector's numbers: Qdrant's local mode scales all to length 1 at every query, which moves last bits
)


@dataclass
class ExchangeArguments:
    """Arguments of `examples.exchange_text_side`."""

    text_side: Path = flag(..., "Folder that `hub_upload.export --formats drop_in` has written.")
    base: str = flag("data/openmoji/base", "Folder of the model that the pictures are embedded with.")
    dataset: Path = flag(Path("data/openmoji/dataset"), "Saved data set with the columns image and captions-LANGUAGE.")
    split: str = flag("test", "Split of it.")
    language: str = flag("pt", "Language of the captions.")
    output: Path = flag(Path("runs/exchange_text_side"), "Folder of the stores and the figures.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")


class QdrantPictures:
    """A collection of Qdrant in a folder, by the local mode of its client; a picture's number is that of its row."""

    def __init__(self, folder: Path, vectors: np.ndarray):
        self.client = QdrantClient(path=str(folder))
        self.client.create_collection(COLLECTION_NAME, VectorParams(size=vectors.shape[1], distance=Distance.COSINE))
        self.client.upsert(
            COLLECTION_NAME, [PointStruct(id=row, vector=vector.tolist()) for row, vector in enumerate(vectors)]
        )
        self.close = self.client.close

    def nearest(self, query: np.ndarray) -> list[int]:
        """The numbers of the `SEARCH_DEPTH` pictures nearest to (width,), the nearest first."""
        return [
            hit.id for hit in self.client.query_points(COLLECTION_NAME, query=query.tolist(), limit=SEARCH_DEPTH).points
        ]

    def vectors(self) -> np.ndarray:
        """(pictures, width), as they lie in the store."""
        points, _ = self.client.scroll(
            COLLECTION_NAME, limit=self.client.count(COLLECTION_NAME).count, with_vectors=True
        )
        return np.array([point.vector for point in sorted(points, key=lambda point: point.id)], dtype=np.float32)


class LancePictures:
    """A table of LanceDB in a folder; its methods are those of `QdrantPictures`."""

    def __init__(self, folder: Path, vectors: np.ndarray):
        rows = [{"id": row, "vector": vector} for row, vector in enumerate(vectors)]
        self.table, self.close = lancedb.connect(folder).create_table(COLLECTION_NAME, rows), lambda: None

    def nearest(self, query: np.ndarray) -> list[int]:
        """As `QdrantPictures.nearest`."""
        return self.table.search(query).distance_type("cosine").limit(SEARCH_DEPTH).to_arrow()["id"].to_pylist()

    def vectors(self) -> np.ndarray:
        """As `QdrantPictures.vectors`."""
        return np.array(self.table.to_arrow().sort_by("id")["vector"].to_pylist(), dtype=np.float32)


def compute_recalls(
    pictures: QdrantPictures | LancePictures, queries: np.ndarray, picture_of_query: list[int]
) -> dict[str, float]:
    """Recall at each of eval's cut-offs and their mean, by what the store finds; `right` is each query's picture."""
    ranks = []
    for query, number in zip(tqdm(queries, desc="Queries", unit="query"), picture_of_query, strict=True):
        hits = pictures.nearest(query)
        ranks.append(hits.index(number) if number in hits else SEARCH_DEPTH)
    found = torch.tensor(ranks)
    return {f"recall@{k}": recall_at_k(found, k) for k in RECALL_CUTOFFS} | {"mean_recall": mean_recall(found)}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(ExchangeArguments, __doc__, argv)
    check_inputs_outside(args.output, args.text_side, args.base, args.dataset)
    if not (args.text_side / "drop_in.json").is_file():
        raise ValueError(f"{args.text_side} is no exported text side; hub_upload.export --formats drop_in makes one.")
    wanted, found = read_json(args.text_side / "drop_in.json", image_digest=str), image_encoder_digest(Path(args.base))
    if wanted["image_digest"] != found:
        raise ValueError(f"{args.text_side} is for pictures of the digest {wanted['image_digest']}, not {found}.")
    if not (args.text_side / "modules.json").is_file():
        raise ValueError(f"{args.text_side} is a SigLIP's; sentence-transformers opens CAPIVARA's alone.")
    with atomic_folder(args.output, args.overwrite_output_dir) as folder:
        rows = load_dataset_with_images(args.dataset)[args.split]
        texts, right = list_captions(rows, args.language)
        model, processor = load_model(args.base).eval(), load_processor(args.base)
        vectors = embed_images(model, processor, rows["image"], progress="Pictures, by the base").numpy()
        queries = {
            "base": embed_texts(model, processor, texts, progress="Captions, by the base").numpy(),
            "exchanged": SentenceTransformer(str(args.text_side), device="cpu").encode(texts, show_progress_bar=True),
        }
        facts: dict[str, Any] = {"pictures": len(vectors), "captions": len(texts), "embedded_again": 0, "recall": {}}
        for name, store in {"Qdrant": QdrantPictures, "LanceDB": LancePictures}.items():
            with closing(store(folder / name.lower(), vectors)) as pictures:
                before = pictures.vectors()
                facts["recall"][name] = {
                    side: compute_recalls(pictures, asked, right) for side, asked in queries.items()
                }
                changed = np.abs(before - pictures.vectors()).max(axis=1) > VECTOR_TOLERANCE
            facts["embedded_again"] = max(facts["embedded_again"], int(changed.sum()))
        about = describe_run(args, "cpu", "qdrant-client", "lancedb", "sentence-transformers")
        write_json(folder / "results.json", facts | about)
    for store, sides in facts["recall"].items():
        for side, figures in sides.items():
            print(f"{store}, {side}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items()))
    print("{captions} captions, {pictures} pictures; embedded again: {embedded_again}".format_map(facts))


if __name__ == "__main__":
    run_command(main)

r"""Better Portuguese search in vector stores that are filled already: the text side alone is exchanged.

    python -m hub_upload.export --model runs/openmoji-pt-001 --output text_side --formats drop_in \
        --base data/openmoji/base
    python -m examples.exchange_text_side --text_side text_side

A Qdrant collection (the local mode of its client) and a LanceDB table are filled with the test pictures, embedded with
the base. The Portuguese captions are then looked up in both, by the base's own text side and by the exported one, which
sentence-transformers opens. Recall is eval's. The vectors in the stores are read before and after: a picture whose
vector is another one counts as embedded again. Stores and `results.json` lie in the output folder.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

import modeling_capivara  # noqa: F401  registers the tokenizer of the text side: none of its folder's code is run
from capivara_common.cli import at_least, flag, parse, run_command, user_errors
from capivara_common.environment import device_description, package_versions, require
from capivara_common.files import check_inputs_stay, check_output_folder, read_json, whole_folder, write_json
from capivara_common.image_side_digest import image_side_digest
from capivara_common.privacy import short_name
from eval.capivara_metrics.metrics import RECALL_CUTOFFS, mean_recall, recall_at_k
from eval.embeddings import EmbeddingStore
from eval.retrieval import RetrievalArguments, RetrievalData, flat_captions, load_data
from modeling_capivara.two_towers import load_embedder

NAME, DEEPEST = "pictures", max(RECALL_CUTOFFS)
SAME = 1e-6  # of a vector's numbers: Qdrant's local mode scales all to length 1 at every query, which moves last bits
BATCH = 64  # texts that go through sentence-transformers at once
PACKAGES = ("qdrant-client", "lancedb", "sentence-transformers")


@dataclass
class ExchangeArguments:
    """Arguments of `examples.exchange_text_side`."""

    text_side: Path = flag(..., "Folder that `hub_upload.export --formats drop_in` has written.")
    base: str = flag("data/openmoji/base", "Folder of the model that the pictures are embedded with.")
    dataset: str = flag("data/openmoji/dataset", "Data set with pictures and captions.")
    split: str = flag("test", "Split of it.")
    language: str = flag("pt", "Language of the captions.")
    batch_size: int = flag(32, "Pictures that go through the base at once.")
    output: Path = flag(Path("runs/exchange_text_side"), "Folder of the stores and the figures.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")


class Pictures(Protocol):
    """A store of the pictures' vectors, as any of them looks from here."""

    def fill(self, vectors: np.ndarray) -> None:
        """Keep (pictures, width); the number of a row is the picture's."""

    def nearest(self, query: np.ndarray) -> list[int]:
        """The numbers of the `DEEPEST` pictures nearest to (width,), the nearest first."""

    def vectors(self) -> np.ndarray:
        """(pictures, width), as they lie in the store."""


class QdrantPictures:
    """A collection of Qdrant, in a folder, by the local mode of its client."""

    def __init__(self, folder: Path):
        from qdrant_client import QdrantClient

        self.client = QdrantClient(path=str(folder))

    def fill(self, vectors: np.ndarray) -> None:
        """See `Pictures`."""
        from qdrant_client.models import Distance, PointStruct, VectorParams

        self.client.create_collection(NAME, VectorParams(size=vectors.shape[1], distance=Distance.COSINE))
        self.client.upsert(NAME, [PointStruct(id=row, vector=vector.tolist()) for row, vector in enumerate(vectors)])

    def nearest(self, query: np.ndarray) -> list[int]:
        """See `Pictures`."""
        return [hit.id for hit in self.client.query_points(NAME, query=query.tolist(), limit=DEEPEST).points]

    def vectors(self) -> np.ndarray:
        """See `Pictures`."""
        points, _ = self.client.scroll(NAME, limit=self.client.count(NAME).count, with_vectors=True)
        return np.array([point.vector for point in sorted(points, key=lambda point: point.id)], dtype=np.float32)

    def close(self) -> None:
        """Let the folder go."""
        self.client.close()


class LancePictures:
    """A table of LanceDB, in a folder."""

    def __init__(self, folder: Path):
        import lancedb

        self.database = lancedb.connect(folder)

    def fill(self, vectors: np.ndarray) -> None:
        """See `Pictures`."""
        self.table = self.database.create_table(
            NAME, [{"id": row, "vector": vector} for row, vector in enumerate(vectors)]
        )

    def nearest(self, query: np.ndarray) -> list[int]:
        """See `Pictures`."""
        return self.table.search(query).distance_type("cosine").limit(DEEPEST).to_arrow()["id"].to_pylist()

    def vectors(self) -> np.ndarray:
        """See `Pictures`."""
        rows = self.table.to_arrow().sort_by("id")
        return np.array(rows["vector"].to_pylist(), dtype=np.float32)

    def close(self) -> None:
        """Nothing is held open."""


def check_text_side(folder: Path, base: str) -> None:
    """Raise ValueError where the folder is no drop-in text side, or one for pictures of another base."""
    facts = folder / "drop_in.json"
    if not facts.is_file():
        raise ValueError(
            f"{folder} is no exported text side ({facts.name} is missing); `python -m hub_upload.export --formats "
            "drop_in` makes one."
        )
    if (wanted := read_json(facts, image_digest=str)["image_digest"]) != (found := image_side_digest(Path(base))):
        raise ValueError(f"{folder} is for pictures of the digest {wanted}; {base} embeds them as {found}.")


def exchange(args: ExchangeArguments, data: RetrievalData, folder: Path) -> dict[str, Any]:
    """Fill the stores in `folder` with the base's vectors, and ask them by both text sides.

    Returns:
        `pictures` and `captions`, how many; `embedded_again`, how many pictures have another vector afterwards, in
        either store; `recall`, store -> text side -> metric -> share from 0 to 1.
    """
    with closing(EmbeddingStore(load_embedder(args.base), None, args.batch_size)) as base:
        images = base.images(data.images, "Pictures, by the base")
        captions, row_of_caption = flat_captions(data.captions)
        readable = torch.isin(row_of_caption, images.rows)
        texts = [text for text, kept in zip(captions, readable.tolist(), strict=True) if kept]
        right = torch.searchsorted(images.rows, row_of_caption[readable])  # (texts,), number of the picture of each
        queries = {"base": base.texts(texts, "Captions, by the base").numpy()}
    queries["exchanged"] = exchanged_texts(args.text_side, texts)
    stores: dict[str, Pictures] = {
        "Qdrant": QdrantPictures(folder / "qdrant"),
        "LanceDB": LancePictures(folder / "lance"),
    }
    found: dict[str, Any] = {"pictures": len(images.rows), "captions": len(texts), "embedded_again": 0, "recall": {}}
    for name, pictures in stores.items():
        with closing(pictures):
            pictures.fill(images.embeds.numpy())
            before = pictures.vectors()
            found["recall"][name] = {
                side: recalls(pictures, embeds, right, f"{name}, {side}") for side, embeds in queries.items()
            }
            changed = np.abs(before - pictures.vectors()).max(axis=1) > SAME
        found["embedded_again"] = max(found["embedded_again"], int(changed.sum()))
    return found


def exchanged_texts(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """(texts, width), unit length, by sentence-transformers out of an exported text side."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(list(texts), batch_size=BATCH, show_progress_bar=True)


def recalls(pictures: Pictures, queries: np.ndarray, right: torch.Tensor, title: str) -> dict[str, float]:
    """Recall at each of eval's cut-offs and their mean, by what the store itself finds nearest.

    Args:
        pictures: a filled store.
        queries: (queries, width).
        right: (queries,), the number of the picture that each one describes.
        title: of a progress bar.
    """
    ranks = []
    for query, number in zip(tqdm(queries, desc=title, unit="query"), right.tolist(), strict=True):
        hits = pictures.nearest(query)
        ranks.append(hits.index(number) if number in hits else DEEPEST)
    found = torch.tensor(ranks)
    return {f"recall@{k}": recall_at_k(found, k) for k in RECALL_CUTOFFS} | {"mean_recall": mean_recall(found)}


def table(found: dict[str, Any]) -> str:
    """The figures in lines, a text side in a store each, in per cent."""
    lines = [f"{'':24}" + "".join(f"{f'R@{k}':>8}" for k in RECALL_CUTOFFS) + f"{'mean':>8}"]
    for store, sides in found["recall"].items():
        for side, figures in sides.items():
            lines.append(f"{f'{store}, {side}':24}" + "".join(f"{100 * value:8.1f}" for value in figures.values()))
    lines.append("{captions} captions, {pictures} pictures; embedded again: {embedded_again}".format_map(found))
    return "\n".join(lines)


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(ExchangeArguments, __doc__, argv)
    require("examples.exchange_text_side", "vector_stores", "qdrant_client", "lancedb", "sentence_transformers")
    check_output_folder(args.output, args.overwrite_output_dir)
    check_inputs_stay(args.output, args.text_side, args.base, args.dataset)
    check_text_side(args.text_side, args.base)
    data = load_data(RetrievalArguments(args.base, args.dataset, args.output, split=args.split, language=args.language))
    with whole_folder(args.output, args.overwrite_output_dir) as folder:
        found = exchange(args, data, folder)
        facts = {name: short_name(str(getattr(args, name))) for name in ("base", "text_side", "dataset")}
        facts |= {"split": args.split, "language": args.language, "device": device_description()}
        versions = {**package_versions(), **{name: version(name) for name in PACKAGES}}
        write_json(folder / "results.json", facts | found | {"versions": versions})
    print(table(found))


if __name__ == "__main__":
    run_command(main)

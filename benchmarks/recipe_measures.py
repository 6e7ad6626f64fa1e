"""What `benchmarks.recipe` measures of a model: retrieval on OpenMoji and the proxies, and how far its English moved.

measures = Measures("data/openmoji/base", "data/openmoji/dataset", Path("data/openmoji/proxies"), Path("runs/cache"))
measures.of(load_model("runs/openmoji-pt-001"))["hits"]["openmoji/test/pt/text_to_image"]
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caption_data.rows import digest_of
from eval.capivara_metrics.metrics import RECALL_CUTOFFS, mean_hits
from eval.embeddings import EmbeddingStore, distinct_texts
from eval.records.schema import DIRECTIONS
from eval.retrieval import RetrievalArguments, RetrievalData, RetrievalEmbeddings, flat_captions, load_data
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import capivara_embedder

DRAWINGS = ("openmoji", "twemoji", "noto")
# data set, split, languages
SETS = [
    *((name, split, ("pt", "en")) for name in DRAWINGS for split in ("validation", "test")),
    ("photos", "test", ("pt", "en")),
    ("neighbours", "test", ("es", "fa")),
]
NAMES = "names/test/hi"  # Hindi names of ImageNet's classes find the English ones, and they these: texts alone
DRIFT = "openmoji/test/en"  # whose texts the drift is measured on


@dataclass(frozen=True)
class _Texts:
    """Pairs of texts, of which the English ones stand for the images."""

    queries: list[str]
    english: list[str]


class Measures:
    """All data, read once; models are measured one after the other, and images embedded once an image tower."""

    def __init__(self, base: str, openmoji: str, proxies: Path, cache: Path) -> None:
        """Read the data.

        Args:
            base: folder of the base model, whose processor all have.
            openmoji: folder of the demo's data set.
            proxies: folder that `examples.openmoji.proxies` has made.
            cache: folder of the embeddings.

        Raises:
            ValueError: a data set is missing.
        """
        self.cache, self.processor = cache, load_processor(base)
        self.data: dict[str, RetrievalData] = {}
        for name, split, languages in SETS:
            folder = openmoji if name == "openmoji" else str(proxies / name)
            for language in languages:
                key, unused = f"{name}/{split}/{language}", Path("unused.json")
                self.data[key] = load_data(RetrievalArguments(base, folder, unused, split=split, language=language))
        lines = (proxies / "parallel-hi.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        self.names = _Texts([pair["hi"] for pair in pairs], [pair["en"] for pair in pairs])
        model = load_model(base)
        self.base_digest = weights_digest(model)
        digests = [data.fingerprint() for data in self.data.values()]
        self.fingerprint = digest_of([self.base_digest, *digests, str(self.names)])
        found = self._embedded(model)
        self.base_english = found[DRIFT].text_embeds
        self.chance = {
            f"{key}/{direction}": sum(embeddings.chance(direction, k) for k in RECALL_CUTOFFS) / len(RECALL_CUTOFFS)
            for key, embeddings in found.items()
            for direction in DIRECTIONS
        }

    def of(self, model: CapivaraModel) -> dict[str, Any]:
        """Figures of a model.

        Returns:
            `hits`: condition and direction -> each query's mean hit at 1, 5 and 10, a share from 0 to 1; `drift`: mean
            cosine of its English texts to those of the base; `data`: digest of what it was measured on.
        """
        found = self._embedded(model)
        hits = {
            f"{key}/{direction}": [round(hit, 6) for hit in mean_hits(embeddings.ranks[direction]).tolist()]
            for key, embeddings in found.items()
            for direction in DIRECTIONS
        }
        drift = (found[DRIFT].text_embeds * self.base_english).sum(dim=1).mean().item()
        return {"hits": hits, "drift": drift, "data": self.fingerprint}

    def groups(self, key: str) -> Tensor:
        """(queries,), index of the picture that each query belongs to; `key` as in `hits`."""
        condition, _, direction = key.rpartition("/")
        if condition == NAMES:
            return torch.arange(len(self.names.queries))
        captions = self.data[condition].captions
        return torch.arange(len(captions)) if direction == "image_to_text" else flat_captions(captions)[1]

    def _embedded(self, model: CapivaraModel) -> dict[str, RetrievalEmbeddings]:
        embedder = capivara_embedder("", model.eval(), self.processor, "float32")
        images = EmbeddingStore(embedder, self.cache)  # kept for all models of this image tower
        flat = {key: flat_captions(data.captions) for key, data in self.data.items()}
        texts = [text for some, _ in flat.values() for text in some] + self.names.queries + self.names.english
        distinct = distinct_texts(texts)
        position = {text: number for number, text in enumerate(distinct)}
        embeds = embedder.texts(distinct)

        def rows(some: list[str]) -> Tensor:
            return embeds[[position[text] for text in some]]

        found = {
            key: RetrievalEmbeddings(rows(flat[key][0]), images.images(data.images).embeds, flat[key][1])
            for key, data in self.data.items()
        }
        names = self.names
        found[NAMES] = RetrievalEmbeddings(rows(names.queries), rows(names.english), torch.arange(len(names.queries)))
        return found

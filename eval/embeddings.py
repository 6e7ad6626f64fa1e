"""Embed images and texts with a cache on disk, and parse the flags and print the results of an evaluation command.

    cached_embedder = CachedEmbedder(load_embedder("data/openmoji/base"), cache_home(), batch_size=32)
    images = cached_embedder.embed_images(open_split("data/openmoji/dataset", "test", "image"))
    text_embeds = cached_embedder.embed_texts(["uma foto de um gato"])

A `CachedEmbedder` combines a model with a cache of its embeddings, so that each embedding is computed only once.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from capivara_common.cli import check_at_least, flag, parse_arguments
from capivara_common.embedding_store import EmbeddingStore, Place, vectors_to_array
from capivara_common.environment import cache_home, describe_device, get_or_init_distributed_state
from capivara_common.files import read_json
from capivara_common.image_files import BadImage, ImageFileArguments
from caption_data.embedded import EMBEDS_COLUMN
from caption_data.sources import Split
from eval.records.result_files import Record, write_records_to_result_file
from modeling_capivara.two_towers import Embedder, load_embedder

# Largest number of image embeddings and of text embeddings in one file of the cache.
IMAGES_PER_SHARD = 256
TEXTS_PER_SHARD = 2048
# Description of the flag --model, shared by the commands that measure one model.
MODEL_HELP = (
    "Folder or Hub id of a CLIP-like model. With --role baseline, also open_clip:NAME:PRETRAINED or "
    "open_clip:local-dir:FOLDER."
)


@dataclass(kw_only=True)
class EmbeddingArguments(ImageFileArguments):
    """Command-line arguments for embedding images and texts: batch size, precision, cache, device and image files."""

    batch_size: int = flag(32, "Images in a batch. A batch of texts is twice as large.")
    precision: Literal["float32", "bf16", "auto"] = flag(
        "float32",
        "Precision of the model. Results in bf16 differ slightly. auto: bf16 if it is faster, otherwise float32.",
    )
    cache_dir: str = flag("auto", "Cache folder. auto: $CAPIVARA_CACHE or ~/.cache/capivara. off: no cache is kept.")
    device: str | None = flag(None, "Device: cpu, cuda, or one GPU such as cuda:1. Default: the GPU if there is one.")
    limit: int | None = flag(
        None, "Use only LIMIT images of each dataset, evenly spaced, for a quick trial. Default: all images."
    )

    def __post_init__(self) -> None:
        self.check_image_files()
        check_at_least(self, 1, "batch_size", "limit")


@dataclass(kw_only=True)
class ModelArguments(EmbeddingArguments):
    """Command-line arguments shared by the commands that measure one model on one dataset split."""

    role: Literal["baseline", "capivara"] = flag(
        "capivara",
        "Role of the model in tables. capivara: the model under test. baseline: the model to compare it with. An "
        "open_clip model must be a baseline.",
    )
    split: str = flag("test", "Split of the dataset to measure.")


@dataclass(frozen=True)
class EmbeddedImages:
    """Embeddings of all readable images of a dataset split, and the reasons why other images can't be read."""

    embeds: Tensor  # (readable images, width), unit length, float32
    rows: Tensor  # (readable images,), row number of each image in the split, ascending
    skipped: dict[int, str]  # {row number of an unreadable image: reason}


@dataclass
class CachedEmbedder:
    """Model that embeds images and texts, with a cache of the embeddings on disk.

    The evaluation commands create it with `CachedEmbedder.load`. It also writes the result files of these commands, and
    adds a description of the model to them.
    """

    embedder: Embedder
    cache_folder: Path | None = None  # folder of all caches; None: a temporary folder that is deleted with this object
    batch_size: int = 32  # images in a batch; a batch of texts is twice as large
    # Keys to add to the result file. If a dataset has precomputed embeddings instead of images, `embed_images` stores
    # their description here (number type and image encoder). Otherwise, the dict is empty.
    result_metadata: dict[str, Any] = field(default_factory=dict, init=False)
    # Value of `time.perf_counter()` when the object was created. The duration of a measurement is counted from it.
    start_time: float = field(default_factory=time.perf_counter, init=False)

    @classmethod
    def load(cls, args: ModelArguments) -> "CachedEmbedder":
        """Load the model that the command-line arguments name, and connect it to the embedding cache on disk.

        Raises:
            ValueError, OSError, ImportError: If the model can't be loaded.
        """
        embedder = load_embedder(args.model, args.device, args.role == "baseline", args.precision)
        # If the cache is off, no home directory is needed.
        cache_folder = cache_home() if args.cache_dir == "auto" else Path(args.cache_dir)
        return cls(embedder, None if args.cache_dir == "off" else cache_folder, args.batch_size)

    def __post_init__(self) -> None:
        if self.cache_folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="capivara-embeddings-")
            # All processes use the temporary folder of the main process, so that they share one cache.
            self.cache_folder = Path(broadcast_object_list([self._temporary.name])[0])

    def embed_images(self, images: Split, description: str = "Images") -> EmbeddedImages:
        """Embed the images of a dataset split, or load their embeddings from the cache or from the dataset itself.

        Args:
            images: The dataset split.
            description: Label of the progress bar.

        Returns:
            Embeddings of the readable images, and the reasons why other images can't be read.

        Raises:
            ValueError: If no image can be read, or if the split has embeddings of another image encoder.
        """

        def load(batches: Iterator[list[Place]]) -> Iterator[list[PIL.Image.Image | BadImage]]:
            return (list(images.decode_images([row for row, _ in batch])) for batch in batches)

        if images.is_embedded:
            images.check_embeds(self.embedder.name, self.embedder.width, self.embedder.fingerprint)
            self.result_metadata, skipped = images.describe_embeds(), images.invalid_embeds
            column = pa.chunked_array([part for chunk in images.iter_column(EMBEDS_COLUMN) for part in chunk.chunks])
        else:
            store, digests = self._store(self.embedder.image_fingerprint, self.batch_size), images.image_digests
            embed = self.embedder.tune_image_embedding(len(images), self.batch_size, store.record_folder(digests))
            table = store.load_or_embed(digests, load, embed, description, rows_per_shard=IMAGES_PER_SHARD)
            skipped = {row: detail for row, detail in enumerate(table["detail"].to_pylist()) if detail}
            column = table["vectors"]
        if len(skipped) == len(images):
            raise ValueError(f"None of the {len(images)} images can be read. The error of the first is: {skipped[0]}.")
        good = np.setdiff1d(np.arange(len(images)), [*skipped])
        embeds = vectors_to_array(column.take(good)).astype(np.float32)
        return EmbeddedImages(torch.from_numpy(embeds), torch.from_numpy(good), skipped)

    def embed_texts(self, texts: Sequence[str], description: str = "Texts") -> Tensor:
        """Embed texts, or load their embeddings from the cache. A text that occurs several times is embedded once.

        Args:
            texts: The texts.
            description: Label of the progress bar.

        Returns:
            Unit-length embeddings (texts, width), float32, in the order of `texts`.
        """
        # Texts are sorted by length, because a batch of texts of similar length needs little padding.
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        store = self._store(self.embedder.fingerprint, 2 * self.batch_size)

        def embed(batch: list[str]) -> np.ndarray:
            return self.embedder.embed_texts(batch, store.batch_size).numpy()

        def load(batches: Iterator[list[Place]]) -> Iterator[list[str]]:
            return ([distinct[row] for row, _ in batch] for batch in batches)

        table = store.load_or_embed(distinct, load, embed, description, "text", TEXTS_PER_SHARD)
        position = {text: number for number, text in enumerate(distinct)}
        return torch.from_numpy(vectors_to_array(table["vectors"])[[position[text] for text in texts]])

    def write_result_file(self, args: ModelArguments, records: list[Record], **metadata: Any) -> None:
        """Write the result file of an evaluation command to `args.output`, with a description of model and measurement.

        Args:
            args: Command-line arguments.
            records: The measured values, each with the conditions of its measurement.
            metadata: Further keyword arguments of `write_records_to_result_file`. `dataset` and `fingerprint` (digest
                of the measured data) are required, `skipped` and `name` are optional. Any other keyword becomes a key
                of the file.
        """
        embedder, seconds = self.embedder, time.perf_counter() - self.start_time
        values = {"model": args.model, "device": describe_device(embedder.device), "precision": embedder.precision}
        values |= {"seconds": seconds} | embedder.metadata | self.result_metadata | metadata
        write_records_to_result_file(args.output, records, **values)

    def _store(self, encoder_fingerprint: str, batch_size: int) -> EmbeddingStore:
        """Open the part of the cache that holds the embeddings of an encoder.

        Args:
            encoder_fingerprint: Digest that identifies the encoder.
            batch_size: Number of images or texts that are embedded at a time.
        """
        return EmbeddingStore(self.cache_folder / "evaluation", {"encoder": encoder_fingerprint}, batch_size)


def run_evaluation_command(
    arguments_type: type[ModelArguments], doc: str, evaluate: Callable[..., list[Record]], argv: list[str] | None = None
) -> None:
    """Run an evaluation command: parse the arguments, measure, and print results and notes.

    Args:
        arguments_type: Dataclass of the command's arguments.
        doc: Docstring of the command's module, shown by --help.
        evaluate: Function that gets the parsed arguments, measures, writes the result file, and returns the records.
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(arguments_type, doc, argv)
    records = evaluate(args)
    if not get_or_init_distributed_state().is_main_process:
        return
    for record in records:
        label = record.direction or f"{record.dataset} {record.protocol}"
        value = f"{record.value:8.1f}" if record.is_rank else f"{100 * record.value:6.2f} %"
        chance = "" if record.chance is None else f"   chance {100 * record.chance:.2f} %"
        print(f"{label:28} {record.metric:24} {value}{chance}")
    content = read_json(args.output)
    for note in content.get("notes", []):
        print(note)
    if skipped := len(content["skipped"]):
        print(f"{skipped} images could not be read and are not included in these results. {args.output} lists them.")

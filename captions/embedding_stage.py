r"""Replace the images of one split by their embeddings. This is the stage that `captions.embed` and builds run.

    python -m captions.embedding_stage --model data/openmoji/base --dataset data/openmoji/dataset --output embedded

The output is a folder of parts, as of every stage. `captions.embed` makes a dataset with a card from such folders.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
import PIL.Image
from datasets import Value

from capivara_common.cli import check_at_least, flag, run_command
from capivara_common.embedding_speed import tune_chunk_size
from capivara_common.embedding_store import embed_batch
from capivara_common.image_files import BadImage, BadRow
from caption_data.augmentation import augment_view, describe_augmentation
from caption_data.embedded import DIGEST_COLUMN, EMBEDS_COLUMN, ENCODER_COLUMN, embeds_feature, image_encoder_of
from captions.stages import DECODED_KEY, EncoderStageArguments, RowStage, run_stage_command
from modeling_capivara.two_towers import load_embedder


@dataclass
class EmbedArguments(EncoderStageArguments):
    """Flags of the stage that replaces images by their embeddings."""

    accepts_embeds = keeps_images = False
    translations: ClassVar[dict[str, str]] = {}  # who translated each language, for the dataset card
    rerun_command: ClassVar[str] = ""  # command that writes missing rows; default: the command of this stage
    views: int = flag(
        1, "Embeddings per image. 1: the image itself. N above 1: N augmentations, for --augmented_views N of training."
    )
    seed: int = flag(0, "Seed of the augmentations (with --views).")
    batch_rows: int = flag(64, "Rows to process at the same time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "views")
        check_at_least(self, 0, "seed")

    def command(self) -> str:
        """Return the shell command that writes missing rows."""
        return self.rerun_command or super().command()

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Load the model whose image encoder embeds the images.

        Args:
            stage: The opened rows.

        Returns:
            The positional arguments of `RowStage.run`: columns, settings, and the function that embeds rows.

        Raises:
            ValueError, OSError, ImportError: If the model cannot be loaded.
        """
        embedder = load_embedder(self.model, self.device, True, self.precision, record=self.output)
        width = embedder.embed_images([PIL.Image.new("RGB", (32, 32))], 1).shape[1]
        settings = {
            "model": self.model,
            "encoder": image_encoder_of(self.model, embedder.fingerprint),
            "width": width,
            "precision": embedder.precision,
            "views": self.views,
            "augmentation": describe_augmentation(self.seed) if self.views > 1 else None,
        }
        columns = {EMBEDS_COLUMN: embeds_feature(width, self.views)}
        columns |= dict.fromkeys((DIGEST_COLUMN, ENCODER_COLUMN), Value("string"))
        embed = partial(embedder.embed_images, batch_size=self.embedding_batch_size)
        if embedder.has_chunks:
            row_count, encoder = len(stage.source), embedder.image_fingerprint
            embed = tune_chunk_size(embed, row_count * self.views, embedder.device, encoder, self.output)
        return columns, settings, lambda rows: embed_rows(embed, self, settings["encoder"], rows)


def embed_rows(
    embed: Callable[..., Any], args: EmbedArguments, encoder: str, rows: list[dict[str, Any]]
) -> list[dict[str, Any] | BadRow]:
    """Embed the images of rows.

    Args:
        embed: Function that embeds a list of images.
        args: Flags of the stage.
        encoder: Digest of the model's image encoder.
        rows: Rows with an image file, and its decoded image under the key `DECODED_KEY`.

    Returns:
        For each row, a dict with the new columns, or a BadImage if the image cannot be used.
    """
    digests = [blake2b(row[args.image_column]["bytes"], digest_size=16).hexdigest() for row in rows]
    images = [view for row, digest in zip(rows, digests, strict=True) for view in _make_views(row, digest, args)]
    vectors = embed_batch(images, embed, skip_refused=True)
    results: list[dict[str, Any] | BadRow] = []
    for digest, start in zip(digests, range(0, len(vectors), args.views), strict=True):
        views = vectors[start : start + args.views]
        if bad := [vector for vector in views if isinstance(vector, BadImage)]:
            results.append(bad[0])
            continue
        embeds = [vector.numpy().astype(np.float16) for vector in views]
        embeds = embeds[0] if args.views == 1 else embeds
        results.append({EMBEDS_COLUMN: embeds, DIGEST_COLUMN: digest, ENCODER_COLUMN: encoder})
    return results


def _make_views(row: dict[str, Any], digest: str, args: EmbedArguments) -> list[PIL.Image.Image | BadImage]:
    """Return the views of a row's image: the image itself, or `args.views` augmentations."""
    if args.views == 1:
        return [row[DECODED_KEY]]
    try:
        return [augment_view(row[DECODED_KEY], digest, view, args.seed) for view in range(args.views)]
    except ValueError as error:
        return [BadImage("unreadable image", str(error))] * args.views


def main(argv: list[str] | None = None) -> None:
    """Run the command `captions.embedding_stage`.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    run_stage_command(EmbedArguments, __doc__, argv)


if __name__ == "__main__":
    # Import this file as a named module, so that other processes can unpickle its classes.
    from captions import embedding_stage

    run_command(embedding_stage.main, resumable=True)

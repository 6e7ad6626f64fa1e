r"""Replace the images of one dataset split by their embeddings, so that others can train without the images.

    python -m captions.embedding_stage --model data/openmoji/base --dataset data/openmoji/dataset --output embedded

The output is a folder of parquet files without a dataset card. To get a dataset with a card, run `captions.embed` or
`captions.build` instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
from datasets import Value
from PIL import Image

from capivara_common.cli import check_at_least, flag, run_main_and_report_user_errors
from capivara_common.embedding_store import embed_batch_except_bad_images
from capivara_common.image_files import BadImage, BadRow
from caption_data import embedded
from caption_data.augmentation import describe_augmentation, make_augmented_view
from captions.stages import DECODED_KEY, EncoderStageArguments, Row, RowStage, run_stage_command
from modeling_capivara.two_towers import load_embedder


@dataclass
class EmbedArguments(EncoderStageArguments):
    """Flags of the stage (step of a build) that replaces the images of a dataset by their embeddings.

    The class also has the methods that run this stage.
    """

    accepts_embeds = keeps_images = False
    stage_name = "embed"
    # Language code -> "human" or "machine": who translated the captions in this language, for the dataset card.
    translations: ClassVar[dict[str, str]] = {}
    # Command that error messages show if rows are missing. If it is "", they show the command of this stage.
    rerun_command: ClassVar[str] = ""
    views: int = flag(
        1,
        "Embeddings per image. 1: the embedding of the image itself. N above 1: the embeddings of N randomly augmented "
        "copies, for training with --augmented_views N.",
    )
    seed: int = flag(0, "Random seed of the augmented copies. It has no effect with --views 1.")
    batch_rows: int = flag(64, "Rows to process at the same time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "views")
        check_at_least(self, 0, "seed")

    def command(self) -> str:
        """Return the shell command that error messages tell the user to run if rows of the output are missing.

        Normally, it is the command of this stage. If `captions.embed` runs the stage, it is the command of that
        program, which is stored in `rerun_command`.
        """
        return self.rerun_command or super().command()

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Load the model that embeds the images.

        Args:
            stage: Access to the rows to embed.

        Returns:
            The tuple (columns, settings, process) for the method `RowStage.run`: the types of the new columns, the
            settings to record, and a function that embeds the images of a list of rows.

        Raises:
            ValueError, OSError, ImportError: If the model can't be loaded.
        """
        embedder = load_embedder(self.model, self.device, True, self.precision, record=self.output)
        # Embed a test image, so that a damaged image encoder raises an error now. Otherwise, every image would be
        # skipped as unreadable.
        embedder.embed_images([Image.new("RGB", (32, 32))], 1)
        settings = {
            "model": self.model,
            "encoder": embedded.resolve_image_encoder_digest(self.model, embedder.fingerprint),
            "width": embedder.width,
            "precision": embedder.precision,
            "views": self.views,
            "augmentation": describe_augmentation(self.seed) if self.views > 1 else None,
        }
        columns = {embedded.EMBEDS_COLUMN: embedded.embeds_feature(embedder.width, self.views)}
        columns |= dict.fromkeys((embedded.DIGEST_COLUMN, embedded.ENCODER_COLUMN), Value("string"))
        image_count = len(stage.source) * self.views
        embed = embedder.tune_image_embedding(image_count, self.embedding_batch_size, self.output)
        return columns, settings, lambda rows: embed_images_of_rows(embed, self, settings["encoder"], rows)


def embed_images_of_rows(embed: Callable, args: EmbedArguments, encoder: str, rows: list[Row]) -> list[Row | BadRow]:
    """Embed the images of dataset rows, and return the columns that replace the images.

    Args:
        embed: Function that takes a list of images and returns their embeddings.
        args: Flags of the stage. If `views` is above 1, this number of augmented copies of each image is embedded.
        encoder: Digest (hash) of the model's image encoder.
        rows: Rows with an image file, and its decoded image under the key `DECODED_KEY`.

    Returns:
        For each row, a dict `{"column name": value}` with the embedding (width,) or (views, width), and the digests of
        image file and encoder. If the image can't be used, a `BadImage` that holds the reason.
    """
    digests = [blake2b(row[args.image_column]["bytes"], digest_size=16).hexdigest() for row in rows]
    images = [
        _make_view_or_bad_image(row[DECODED_KEY], digest, view, args)
        for row, digest in zip(rows, digests, strict=True)
        for view in range(args.views)
    ]
    vectors = embed_batch_except_bad_images(images, embed, skip_refused=True)
    results: list[Row | BadRow] = []
    for digest, start in zip(digests, range(0, len(vectors), args.views), strict=True):
        views = vectors[start : start + args.views]
        if bad := [vector for vector in views if isinstance(vector, BadImage)]:
            results.append(bad[0])
            continue
        embeds = [vector.numpy().astype(np.float16) for vector in views]
        embeds = embeds[0] if args.views == 1 else embeds
        columns = {embedded.EMBEDS_COLUMN: embeds, embedded.DIGEST_COLUMN: digest, embedded.ENCODER_COLUMN: encoder}
        results.append(columns)
    return results


def _make_view_or_bad_image(image: Image.Image, digest: str, view: int, args: EmbedArguments) -> Image.Image | BadImage:
    """Return the image itself or, if `args.views` is above 1, an augmented copy. If this fails, return a BadImage.

    Args:
        image: Decoded image of a row.
        digest: Digest of the image file.
        view: Index of the augmented copy, counted from 0.
        args: Flags of the stage.
    """
    try:
        return image if args.views == 1 else make_augmented_view(image, digest, view, args.seed)
    except ValueError as error:
        return BadImage("unreadable image", str(error))


def main(argv: list[str] | None = None) -> None:
    """Run the command: replace the images of one split by their embeddings.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    run_stage_command(EmbedArguments, __doc__, argv)


if __name__ == "__main__":
    # When this file runs as a command, its classes belong to the module `__main__`, and other processes can't unpickle
    # them. Import the file again under its own name to avoid this.
    from captions import embedding_stage

    run_main_and_report_user_errors(embedding_stage.main, resumable=True)

r"""Score captions by the cosine similarity of caption and image, computed with a model such as CLIP or SigLIP.

    python -m captions.score --dataset data/translated --output data/scored --language pt --model data/openmoji/base
    python -m captions.score --dataset data/translated --output data/scored --language pt --workers 2 \
        --model open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k

Each row gets the column `similarities-<language>`: one number for each caption in `captions-<language>`, then one for
each in `generated-captions-<language>`. The number is None for an empty caption. `captions.select` and training use the
column.

Rows without captions or a usable image are skipped, and listed in *.skipped.jsonl files. To finish an interrupted run,
run the same command again.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from capivara_common.cli import flag, run_main_and_report_user_errors
from capivara_common.embedding_store import embed_batch_except_bad_images
from capivara_common.image_files import BadRow
from caption_data.rows import SIMILARITIES_FEATURE
from captions.stages import DECODED_KEY, EncoderStageArguments, Row, RowStage, run_stage_command
from modeling_capivara.two_towers import Embedder, load_embedder


@dataclass
class ScoreArguments(EncoderStageArguments):
    """Command-line arguments of `captions.score`, which computes how similar captions and their images are.

    The class also has the methods that run the command, which is one stage (step) of building a caption dataset.
    """

    language: str = flag("pt", "Language code at the end of the names of the caption columns.")

    def required_columns(self) -> list[str]:
        """Return the names of the columns with captions in the language of `--language`, for example "captions-pt".

        The dataset must have at least one of these columns.
        """
        return [f"captions-{self.language}", f"generated-captions-{self.language}"]

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Check that the dataset has captions in the language of `--language`, and return the new column.

        Args:
            columns: Names of the columns of the dataset, after the renaming with the flag `rename`.
            where: Name of the dataset, for the error message.

        Returns:
            A list with the name of the new column, for example ["similarities-pt"].

        Raises:
            ValueError: If the dataset has no caption column of the language.
        """
        return [*super().check_columns(columns, where), f"similarities-{self.language}"]

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Load the model that computes the similarities of captions and images.

        Args:
            stage: Access to the rows to score.

        Returns:
            The tuple (columns, settings, process) for the method `RowStage.run`: the types of the new columns, the
            settings to record, and a function that scores the captions of a list of rows.

        Raises:
            ValueError, OSError, ImportError: If the model can't be loaded.
            ValueError: If the dataset has embeddings of another image encoder instead of images.
        """
        embedder = load_embedder(self.model, self.device, True, self.precision, record=self.output)
        if stage.source.is_embedded:
            stage.source.check_embeds(self.model, embedder.width, embedder.fingerprint)
            # The rows already contain embeddings instead of images, so "embedding" them only stacks them into a tensor.
            embedder = replace(embedder, embed_images=lambda embeds, batch_size: torch.from_numpy(np.stack(embeds)))
        settings = {"language": self.language, "model": self.model, "fingerprint": embedder.fingerprint}
        columns = {f"similarities-{self.language}": SIMILARITIES_FEATURE}
        return columns, settings, lambda rows: _compute_caption_similarities(embedder, self, rows)


def _compute_caption_similarities(embedder: Embedder, args: ScoreArguments, rows: list[Row]) -> list[Row | BadRow]:
    """Compute the similarities of the captions of rows to their images. Each distinct caption is embedded once.

    Args:
        embedder: Model that embeds texts and images.
        args: Command-line arguments.
        rows: Rows with captions, and a decoded image under the key `DECODED_KEY`.

    Returns:
        For each row, a dict `{"similarities-<language>": numbers}`, or a BadRow if the row has no caption or its image
        can't be used.
    """
    # The captions of a row come from up to two columns, captions and generated captions. The similarities have the same
    # order: first those of the captions, then those of the generated captions.
    columns, size = args.required_columns(), args.embedding_batch_size
    captions = [[text for column in columns for text in row.get(column) or []] for row in rows]
    distinct = sorted({text for texts in captions for text in texts if text.strip()}, key=len)
    embeds = embedder.embed_texts(distinct, 2 * size) if distinct else []
    text_embeds = dict(zip(distinct, embeds, strict=True))  # caption -> its embedding (width,)
    bad_row = BadRow("no caption", f"all of {', '.join(columns)} are empty")
    captioned_rows = zip(rows, captions, strict=True)
    images = [row[DECODED_KEY] if any(map(str.strip, texts)) else bad_row for row, texts in captioned_rows]
    embed_images = partial(embedder.embed_images, batch_size=size)
    results = embed_batch_except_bad_images(images, embed_images, skip_refused=True)
    for number, embed in enumerate(results):
        if not isinstance(embed, BadRow):
            cosines = [float(text_embeds[text] @ embed) if text in text_embeds else None for text in captions[number]]
            results[number] = {f"similarities-{args.language}": cosines}
    return results


def main(argv: list[str] | None = None) -> None:
    """Run the command: compute how similar captions and their images are.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    run_stage_command(ScoreArguments, __doc__, argv)


if __name__ == "__main__":
    # When this file runs as a command, its classes belong to the module `__main__`, and other processes can't unpickle
    # them. Import the file again under its own name to avoid this.
    from captions import score

    run_main_and_report_user_errors(score.main, resumable=True)

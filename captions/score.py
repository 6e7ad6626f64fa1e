"""How similar every caption is to its image: cosines under a CAPIVARA model, or a CLIP of open_clip or transformers.

    python -m captions.score --dataset data/translated --output data/scored --language pt --model data/openmoji/base
    python -m captions.score --dataset data/translated --output data/scored --language pt --workers 2 \\
        --model open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k

Every row gets `similarities-<language>`: a number for each of `captions-<language>`, then for each of
`generated-captions-<language>`, in their order; none where a caption is empty. `captions.select` and the caption
strategies of the training go by them. Rows whose image can't be used, or without any caption, are left out and listed.
The same command does what is missing.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import PIL.Image
from torch import Tensor

from capivara_common.cli import check_at_least, flag, run_command
from capivara_common.environment import require_packages
from capivara_common.image_files import BadImage, BadRow
from caption_data.rows import SIMILARITIES_FEATURE
from captions.stages import DECODED_KEY, RowStage, StageArguments, run_stage_command
from modeling_capivara.two_towers import Embedder, load_embedder


@dataclass
class ScoreArguments(StageArguments):
    """Arguments of `captions.score`."""

    uses_model = decodes_images = True
    language: str = flag("pt", "Language of the captions, the end of their columns' names.")
    model: str | None = flag(
        None,
        "Required: folder or Hub id of a CAPIVARA, SigLIP, CLIP …; open_clip:NAME:PRETRAINED; open_clip:local-dir:X.",
    )
    embedding_batch_size: int = flag(32, "Images that go through at once; twice as many captions.")
    precision: Literal["float32", "bf16"] = flag("float32", "bf16 is faster on most GPUs.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("model is missing: give the model whose similarities are wanted, such as the base model.")
        check_at_least(self, 1, "embedding_batch_size")
        if self.model.startswith("open_clip:"):
            require_packages("The stage score", "open_clip", "open_clip")

    def required_columns(self) -> list[str]:
        """Columns of captions, of which one must be there."""
        return [f"captions-{self.language}", f"generated-captions-{self.language}"]

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Return the column of similarities. Raises ValueError if there is no column of captions."""
        return [*super().check_columns(columns, where), f"similarities-{self.language}"]

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Similarities of each row's captions. Raises as `load_embedder` does."""
        embedder = load_embedder(self.model, self.device, True, self.precision)
        settings = {"language": self.language, "model": self.model, "fingerprint": embedder.fingerprint}
        return (
            {f"similarities-{self.language}": SIMILARITIES_FEATURE},
            settings,
            lambda rows: score_rows(embedder, self, rows),
        )


def score_rows(embedder: Embedder, args: ScoreArguments, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
    """The new column of each row, or what is wrong with the row."""
    columns, size = args.required_columns(), args.embedding_batch_size  # columns in the order of the similarities
    captions = [[text for column in columns for text in row.get(column) or []] for row in rows]
    good = [place for place, texts in enumerate(captions) if any(map(str.strip, texts))]
    results = [BadRow("no caption", f"all of {', '.join(columns)} are empty")] * len(rows)
    distinct = sorted({text for place in good for text in captions[place] if text.strip()}, key=len)
    embeds = dict(
        zip(distinct, embedder.embed_texts(distinct, 2 * size) if distinct else [], strict=True)
    )  # each (width,)
    for place, embed in zip(
        good, embed_row_images(embedder, [rows[place][DECODED_KEY] for place in good], size), strict=True
    ):
        results[place] = embed
        if not isinstance(embed, BadRow):
            cosines = [float(embeds[text] @ embed) if text in embeds else None for text in captions[place]]
            results[place] = {f"similarities-{args.language}": cosines}
    return results


def embed_row_images(embedder: Embedder, images: list[PIL.Image.Image], batch_size: int) -> list[Tensor | BadRow]:
    """(width,) of each image; one that the model refuses must not end the work on all others."""
    try:
        return list(embedder.embed_images(images, batch_size)) if images else []
    except ValueError as error:
        if len(images) == 1:
            return [BadImage("unreadable image", f"the model refuses it: {error}")]
    return [embed for image in images for embed in embed_row_images(embedder, [image], batch_size)]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    run_stage_command(ScoreArguments, __doc__, argv)


if __name__ == "__main__":
    from captions import score  # by its name, as other machines find it

    run_command(score.main, resumable=True)

"""How similar every caption is to its image: cosines under a CAPIVARA model, or a CLIP of open_clip or transformers.

    python -m captions.score --dataset data/translated --output data/scored --language pt --model data/openmoji/base
    python -m captions.score --dataset data/translated --output data/scored --language pt --workers 2 \\
        --model open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k

Every row gets `similarities-<language>`: a number for each of `captions-<language>`, then for each of
`generated-captions-<language>`, in their order; none where a caption is empty. `captions.select` and the caption
strategies of the training go by them. Rows whose image can't be used, or without any caption, are left out and listed.
The same command does what is missing.
"""

from common.start import start_command

if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
    start_command("captions.stage_arguments:ScoreArguments", __doc__)

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import PIL.Image
from torch import Tensor

from caption_data.columns import SIMILARITIES
from caption_data.image_files import BYTES_ALONE, ImageFiles, decode_image
from caption_data.rows import BadImage, BadRow
from captions.stage_arguments import ScoreArguments
from captions.stages import Phase, StageReport, finished_row_tasks, run_stage, stage_main
from common.cli import run_command
from modeling_capivara.embedder import Embedder, load_embedder

DECODERS = 4  # threads that decode images; PIL lets them run side by side


class ScoreProcess:
    """Rows with their similarities; what `run_stage` calls.

    Args:
        embedder: the model.
        columns: of captions, in the order of the similarities.
        result: name of the new column.
        image_column: of the images.
        batch_size: images that go through at once.
        files: the limits of an image.
    """

    def __init__(
        self,
        embedder: Embedder,
        columns: list[str],
        result: str,
        image_column: str,
        batch_size: int,
        files: ImageFiles = BYTES_ALONE,
    ):
        self.embedder, self.columns, self.result = embedder, columns, result
        self.image_column, self.batch_size, self.files = image_column, batch_size, files

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        captions = [[text for column in self.columns for text in row.get(column) or []] for row in rows]
        with ThreadPoolExecutor(DECODERS) as threads:  # ended before the model computes, whose own threads they slow
            images = list(threads.map(self._image, rows, captions))
        good = [place for place, image in enumerate(images) if not isinstance(image, BadRow)]
        if not good:
            return images
        image_embeds = self._embedded([images[place] for place in good])
        distinct = sorted({text for place in good for text in captions[place] if text.strip()}, key=_by_length)
        text_embeds = self.embedder.texts(distinct, 2 * self.batch_size)  # (distinct, width)
        number = {text: place for place, text in enumerate(distinct)}
        results: list[dict[str, Any] | BadRow] = list(images)
        for embed, place in zip(image_embeds, good, strict=True):
            if not isinstance(embed, BadRow):
                embed = {self.result: _similarities(embed, text_embeds, captions[place], number)}
            results[place] = embed
        return results

    def _embedded(self, images: list[PIL.Image.Image]) -> list[Tensor | BadRow]:
        """(width,) of each image; one that the model refuses must not end the work on all others."""
        try:
            return list(self.embedder.images(images, self.batch_size))
        except ValueError as error:
            if len(images) == 1:
                return [BadImage("unreadable image", f"the model refuses it: {error}")]
        return [embed for image in images for embed in self._embedded([image])]

    def _image(self, row: dict[str, Any], captions: list[str]) -> PIL.Image.Image | BadRow:
        if not any(text.strip() for text in captions):
            return BadRow("no caption", f"all of {', '.join(self.columns)} are empty")
        try:
            return decode_image(row[self.image_column], self.files)
        except BadImage as bad:
            return bad


def score(args: ScoreArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """Write the parts of one task that are missing.

    Raises:
        ValueError: there is no caption in the language, or no such model.
        OSError: the disk is full.
    """
    columns = [f"captions-{args.language}", f"generated-captions-{args.language}"]
    embedder = load_embedder(args.model, args.device, True, args.precision, args.trust_remote_code)
    settings = {"language": args.language, "model": args.model, "fingerprint": embedder.fingerprint}
    result = f"similarities-{args.language}"
    process = ScoreProcess(
        embedder, columns, result, args.image_column, args.embedding_batch_size, args.without_paths()
    )
    title = f"Similarities, {args.language}"
    return run_stage(args, {result: SIMILARITIES}, settings, process, title, columns, rank, world_size)


PHASES = {"rows": Phase(score, finished_row_tasks, uses_model=True)}


def _similarities(image: Tensor, texts: Tensor, captions: list[str], number: dict[str, int]) -> list[float | None]:
    """Cosines of one image (width,) and its captions; None where one is empty."""
    return [float(texts[number[text]] @ image) if text.strip() else None for text in captions]


def _by_length(text: str) -> tuple[int, str]:
    return len(text), text


def main(argv: list[str] | None = None) -> None:
    stage_main(ScoreArguments, __doc__, argv)


if __name__ == "__main__":
    run_command(main, resumes=True)

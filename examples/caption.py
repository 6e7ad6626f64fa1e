r"""Caption images in Portuguese by retrieval: choose the most similar sentences of a caption bank for each image.

    python -m examples.caption --model runs/openmoji-pt-001
    python -m examples.caption --model MODEL --pictures ~/Fotos --bank frases.txt --top_k 3 > legendas.csv

The caption bank is a text file with one sentence per line, or the captions of a dataset's training split. The output is
CSV with the columns picture (path of the image), score (cosine similarity of image and caption) and caption.
"""

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from datasets import Dataset

from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import resolve_device
from capivara_common.image_files import BadImage, decode_image
from capivara_common.privacy import escape_control_characters
from capivara_search.folder_scan import find_pictures_and_unreadable_files
from examples.openmoji.dataset import load_dataset_and_refuse_image_paths
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts


@dataclass
class CaptionArguments:
    """Command-line arguments of `examples.caption`, which chooses captions for images from a caption bank."""

    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    pictures: Path | None = flag(None, "Folder of images to caption. Default: the images of the test split.")
    dataset: Path = flag(Path("data/openmoji/dataset"), "Saved dataset with the columns image and captions-LANGUAGE.")
    language: str = flag("pt", "Language of the captions.")
    bank: Path | None = flag(None, "Text file with one sentence per line. Default: the captions of the training split.")
    top_k: int = flag(3, "Number of captions per image.")
    device: str | None = flag(None, "cpu or cuda. Default: the GPU if there is one.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "top_k")


def _iter_pictures(folder: Path, names: list[str]) -> Iterator[PIL.Image.Image]:
    """Yield the decoded images in a folder and its subfolders.

    An image that can't be read is reported on stderr and skipped.

    Args:
        folder: Folder to search.
        names: Output argument: list to which the path of each yielded image, relative to `folder`, is appended.
    """
    for file in find_pictures_and_unreadable_files([folder])[0]:
        try:
            image = decode_image({"bytes": Path(file.path).read_bytes(), "path": file.path})
        except (BadImage, OSError) as error:
            print(escape_control_characters(str(error)), file=sys.stderr)
            continue
        names.append(os.path.relpath(file.path, folder.expanduser().absolute()))
        yield image


def flatten_split_captions(rows: Dataset, language: str) -> tuple[list[str], list[int]]:
    """List all captions of a dataset split in one language, and the image that each caption belongs to.

    Args:
        rows: Dataset split with the column captions-LANGUAGE. A cell is a caption or a list of captions.
        language: Code of the language, such as "pt".

    Returns:
        Tuple (captions, rows): all captions, and the row index of the image of each caption.
    """
    captions = [[cell] if isinstance(cell, str) else cell for cell in rows[f"captions-{language}"]]
    texts = [text for row_captions in captions for text in row_captions]
    row_numbers = [row for row, row_captions in enumerate(captions) for _ in row_captions]
    return texts, row_numbers


def main(argv: list[str] | None = None) -> None:
    """Run the command: for each image, print the most similar sentences of the caption bank as CSV.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(CaptionArguments, __doc__, argv)
    data = None if args.pictures and args.bank else load_dataset_and_refuse_image_paths(args.dataset)
    if args.bank:
        sentences = args.bank.read_text("utf-8-sig").splitlines()
    else:
        sentences, _ = flatten_split_captions(data["train"], args.language)
    bank = list(dict.fromkeys(filter(None, map(str.strip, sentences))))
    if not bank:
        source = args.bank or f"the training split of {args.dataset}"
        raise ValueError(f"There is no sentence to choose from: {source} has no captions. Change --bank or --dataset.")
    model, processor = load_model(args.model).eval().to(resolve_device(args.device)), load_processor(args.model)
    names: list[str] = [] if args.pictures else [f"test/{row}" for row in range(len(data["test"]))]
    pictures = _iter_pictures(args.pictures, names) if args.pictures else data["test"]["image"]
    # `images` and `texts` have the shape (inputs, width) and rows of length 1, so `texts @ image` below gives cosines.
    images = embed_images(model, processor, pictures, progress="Pictures")
    texts = embed_texts(model, processor, bank, progress="Bank")
    writer = csv.writer(sys.stdout)
    writer.writerow(["picture", "score", "caption"])
    for name, image in zip(names, images, strict=True):
        best = (texts @ image).topk(min(args.top_k, len(bank)))
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            writer.writerow([escape_control_characters(name), f"{score:.4f}", escape_control_characters(bank[index])])


if __name__ == "__main__":
    run_main_and_report_user_errors(main)

r"""Captions of pictures in Portuguese: the sentences of a bank that fit best.

    python -m examples.caption --model runs/openmoji-pt-001
    python -m examples.caption --model MODEL --pictures ~/Fotos --bank frases.txt --top_k 3 > legendas.csv

A bank, the lines of a text file or the captions of the training split, names nothing that is not in it. What is printed
is CSV: picture, cosine with the caption, caption.
"""

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from datasets import Dataset

from capivara_common.cli import check_at_least, flag, parse_arguments, run_command
from capivara_common.environment import resolve_device
from capivara_common.image_files import BadImage, decode_image
from capivara_common.privacy import escape_control_characters
from capivara_search.folder_scan import find_pictures
from examples.openmoji.dataset import load_dataset_with_images
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts


@dataclass
class CaptionArguments:
    """Arguments of `examples.caption`."""

    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    pictures: Path | None = flag(None, "Folder of pictures; those of the test split where none.")
    dataset: Path = flag(Path("data/openmoji/dataset"), "Saved data set with the columns image and captions-LANGUAGE.")
    language: str = flag("pt", "Language of the captions.")
    bank: Path | None = flag(
        None, "Text file of sentences, a line each; the captions of the training split where none."
    )
    top_k: int = flag(3, "Captions a picture.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "top_k")


def iter_pictures(folder: Path, names: list[str]) -> Iterator[PIL.Image.Image]:
    """The pictures in a folder and below, whose names are added to `names`; those that can't be read are named."""
    for file in find_pictures([folder])[0]:
        try:
            image = decode_image({"bytes": Path(file.path).read_bytes(), "path": file.path})
        except (BadImage, OSError) as error:
            print(escape_control_characters(str(error)), file=sys.stderr)
            continue
        names.append(os.path.relpath(file.path, folder.expanduser().absolute()))
        yield image


def list_captions(rows: Dataset, language: str) -> tuple[list[str], list[int]]:
    """Every caption of a split, and the row that it is of."""
    lists = ([found] if isinstance(found, str) else found for found in rows[f"captions-{language}"])
    texts, of = zip(*((text, row) for row, found in enumerate(lists) for text in found), strict=True)
    return list(texts), list(of)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(CaptionArguments, __doc__, argv)
    data = None if args.pictures and args.bank else load_dataset_with_images(args.dataset)
    sentences = (
        args.bank.read_text("utf-8-sig").splitlines() if args.bank else list_captions(data["train"], args.language)[0]
    )
    bank = list(dict.fromkeys(filter(None, map(str.strip, sentences))))
    if not bank:
        raise ValueError(f"The bank {args.bank} has no sentence. Write one a line.")
    model, processor = load_model(args.model).eval().to(resolve_device(args.device)), load_processor(args.model)
    names: list[str] = [] if args.pictures else [f"test/{row}" for row in range(len(data["test"]))]
    pictures = iter_pictures(args.pictures, names) if args.pictures else data["test"]["image"]
    images = embed_images(model, processor, pictures, progress="Pictures")  # (pictures, width), unit length
    texts = embed_texts(model, processor, bank, progress="Bank")  # (sentences, width), unit length
    writer = csv.writer(sys.stdout)
    writer.writerow(["picture", "score", "caption"])
    for name, image in zip(names, images, strict=True):
        best = (texts @ image).topk(min(args.top_k, len(bank)))
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            writer.writerow([escape_control_characters(name), f"{score:.4f}", escape_control_characters(bank[place])])


if __name__ == "__main__":
    run_command(main)

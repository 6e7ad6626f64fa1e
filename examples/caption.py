r"""Captions of pictures in Portuguese: the sentences of a bank that fit best, or a language model's own words.

    python -m examples.caption --model runs/openmoji-pt-001
    python -m examples.caption --model MODEL --pictures ~/Fotos --bank frases.txt --top_k 3 --output legendas.csv
    python -m examples.caption --model MODEL --language_model LM --mapper runs/mapper --rerank --output captions.json

A bank names nothing that is not in it. A language model is given the picture as a few embeddings before the text
(ClipCap, arXiv 2111.09734): a mapping network, which alone is trained, makes them of the embedding of the picture.
Where the pictures are those of a data set, the first caption of each is measured against the data set's own: BLEU and
CIDEr of pycocoevalcap, on lower-case words without punctuation. The usual figures come from the tokenizer of PTB, which
needs Java and takes English; these are not comparable with them.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from capivara_common.cli import parse, run_command, user_errors
from capivara_common.environment import device_description, package_versions, require, torch_device
from capivara_common.files import write_json, write_text
from capivara_common.image_files import ImageFiles
from capivara_common.links import Bounds
from capivara_common.privacy import hide_paths
from capivara_search.picture_files import find_pictures
from capivara_search.show import printable
from caption_data.embedding_cache import cache_folder
from caption_data.rows import caption_texts
from caption_data.sources import Split, open_split
from eval.embeddings import EmbeddingStore
from eval.retrieval import flat_captions
from examples.prefix_captioner import (
    CaptionArguments,
    CaptionedEmbeds,
    PrefixCaptioner,
    load_captioner,
    load_language_model,
    train_captioner,
)
from modeling_capivara.two_towers import load_embedder

IMAGE_COLUMN = "image"
SHOWN = 10  # pictures whose captions are printed
IMAGES_AT_ONCE = 256  # that are compared with a whole bank: 0.1 GB beside 100,000 sentences
WORDS = re.compile(r"\w+(?:-\w+)*")
FIGURES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr")


@dataclass(frozen=True)
class Caption:
    """What is said of a picture, and the cosine of the two."""

    text: str
    score: float


@dataclass(frozen=True)
class Pictures:
    """Pictures in the shared space, those that can be read."""

    names: list[str]
    embeds: Tensor  # (pictures, width), unit length
    captions: list[list[str]]  # of each, as the data set has them; empty lists where there is none
    skipped: dict[str, str]  # name -> why it could not be read


def of_split(args: CaptionArguments, store: EmbeddingStore, split: str) -> Pictures:
    """The pictures of a split with their captions.

    Raises:
        ValueError: data set, split or column is missing, or a picture has no caption.
    """
    source = open_split(args.dataset, split, IMAGE_COLUMN)
    column = args.caption_column.replace("{language}", args.language)
    source.check_columns([IMAGE_COLUMN, column])
    captions = [caption_texts(row.get(column), column) for row in source.rows(only=[column])]
    flat_captions(captions)
    return _embedded(store, source, [f"{split}/{row}" for row in range(len(captions))], captions)


def of_folder(folder: Path, store: EmbeddingStore) -> Pictures:
    """The pictures in a folder and all below, by their paths in it. Raises ValueError where there is none."""
    found, left_out = find_pictures([folder])
    paths, root = [Path(file.path) for file in found], folder.expanduser().absolute()
    rows = Dataset.from_dict({IMAGE_COLUMN: [{"bytes": None, "path": str(path)} for path in paths]})
    images = Split(str(folder), "", IMAGE_COLUMN, rows, ImageFiles(Bounds(root)))
    pictures = _embedded(store, images, [str(path.relative_to(root)) for path in paths], [[] for _ in paths])
    return Pictures(**vars(pictures) | {"skipped": pictures.skipped | {one.path: one.reason for one in left_out}})


def _embedded(store: EmbeddingStore, images: Split, names: list[str], captions: list[list[str]]) -> Pictures:
    found = store.images(images)
    rows = found.rows.tolist()
    skipped = {names[row]: why for row, why in found.skipped.items()}
    return Pictures([names[row] for row in rows], found.embeds, [captions[row] for row in rows], skipped)


def read_bank(path: Path) -> list[str]:
    """The sentences of a text file, each once. Raises ValueError where it is missing, no UTF-8 text, or has none."""
    if not path.is_file():
        raise ValueError(f"There is no bank {path}. It must be a text file in UTF-8, a sentence a line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # without the mark that Windows' editors begin with
    except UnicodeDecodeError as error:
        raise ValueError(f"The bank {path} must be text in UTF-8, a sentence a line: {error}") from error
    sentences = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    if not sentences:
        raise ValueError(f"The bank {path} has no sentence. Write one a line.")
    return sentences


def bank_captions(image_embeds: Tensor, text_embeds: Tensor, bank: Sequence[str], top_k: int) -> list[list[Caption]]:
    """The sentences that fit best, the best first.

    Args:
        image_embeds: (pictures, width), unit length.
        text_embeds: (sentences, width), unit length.
        bank: (sentences,), different ones.
        top_k: captions a picture; all sentences where there are fewer.
    """
    found = []
    for part in image_embeds.split(IMAGES_AT_ONCE):
        best = (part @ text_embeds.T).topk(min(top_k, len(bank)))
        for scores, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append([Caption(bank[place], score) for place, score in zip(places, scores, strict=True)])
    return found


def written_captions(
    args: CaptionArguments, captioner: PrefixCaptioner, store: EmbeddingStore, pictures: Pictures
) -> list[list[Caption]]:
    """What a language model says of each picture: its likeliest words first, or with `rerank` those that fit best."""
    beams = args.num_beams if args.rerank else args.top_k  # the more there are, the more CAPIVARA has to choose from
    texts = captioner.captions(pictures.embeds, beams, args.num_beams, args.max_new_tokens, args.batch_size)
    flat = store.texts([text for of_picture in texts for text in of_picture], "Captions")
    cosines = (flat.view(len(texts), beams, -1) @ pictures.embeds[:, :, None]).squeeze(-1)  # (pictures, beams)
    found = []
    for of_picture, scores in zip(texts, cosines.tolist(), strict=True):
        captions = [Caption(text, score) for text, score in zip(of_picture, scores, strict=True)]
        if args.rerank:
            captions.sort(key=lambda caption: -caption.score)
        found.append(captions[: args.top_k])
    return found


def word_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`FIGURES` of a caption a picture, by pycocoevalcap: BLEU from 0 to 1, CIDEr (arXiv 1411.5726) from 0 to 10.

    Words are lower-case, and punctuation is left out but for hyphens within a word. The frequencies that CIDEr weighs
    words by are those of the references.

    Raises:
        ValueError: no reference has a word.
        ImportError: pycocoevalcap is not installed.
    """
    require("Measuring captions", "captioning", "pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    said = {row: [_words(text)] for row, text in enumerate(candidates)}
    right = {row: [_words(text) for text in texts] for row, texts in enumerate(references)}
    if not any(map(any, right.values())):
        raise ValueError("No caption of the data set has a word, so that nothing can be measured by them.")
    bleu, _ = Bleu(4).compute_score(right, said, verbose=0)
    cider, _ = Cider().compute_score(right, said)
    return dict(zip(FIGURES, map(float, [*bleu, cider]), strict=True))


def _words(text: str) -> str:
    return " ".join(WORDS.findall(text.lower()))


def make_captions(args: CaptionArguments) -> tuple[Pictures, list[list[Caption]], dict[str, Any]]:
    """Pictures, their captions, and what is known of the mapping network, where there is one."""
    bank = None if args.language_model else _bank(args)  # before the model is loaded
    if args.pictures is None:
        require("Measuring captions", "captioning", "pycocoevalcap")
    store = EmbeddingStore(load_embedder(args.model, args.device), cache_folder("auto"), args.batch_size)
    captioner = _captioner(args, store) if args.language_model else None
    pictures = of_folder(args.pictures, store) if args.pictures else of_split(args, store, args.split)
    if captioner:
        return pictures, written_captions(args, captioner, store, pictures), captioner.facts
    return pictures, bank_captions(pictures.embeds, store.texts(bank, "Bank"), bank, args.top_k), {"bank": len(bank)}


def _bank(args: CaptionArguments) -> list[str]:
    """Sentences of the file, or captions of the training split."""
    if args.bank:
        return read_bank(args.bank)
    source = open_split(args.dataset, args.train_split, IMAGE_COLUMN)
    column = args.caption_column.replace("{language}", args.language)
    source.check_columns([column])
    rows = [caption_texts(row.get(column), column) for row in source.rows(only=[column])]
    return list(dict.fromkeys(flat_captions(rows)[0]))


def _captioner(args: CaptionArguments, store: EmbeddingStore) -> PrefixCaptioner:
    """The mapping network that was trained before, or a new one, trained and kept."""
    language = load_language_model(args.language_model, store.embedder.device)  # first: embedding takes longer
    fingerprint = store.embedder.image_fingerprint
    if args.mapper.exists():
        return load_captioner(args.mapper, language, fingerprint)
    sets = []
    for split in (args.train_split, args.validation_split):
        pictures = of_split(args, store, split)
        texts, rows = flat_captions(pictures.captions)
        sets.append(CaptionedEmbeds(pictures.embeds[rows], texts))
    return train_captioner(args, language, *sets, fingerprint)


def write_captions(path: Path, pictures: Pictures, captions: list[list[Caption]], facts: dict[str, Any]) -> None:
    """A JSON file with all facts, or a CSV file of the captions alone, a line each."""
    rows = list(zip(pictures.names, captions, strict=True))
    if path.suffix.lower() == ".json":
        found = [{"picture": name, "captions": [asdict(one) for one in of_picture]} for name, of_picture in rows]
        write_json(path, facts | {"captions": found, "skipped": pictures.skipped})
        return
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["picture", "rank", "score", "caption"])
    for name, of_picture in rows:
        writer.writerows([name, rank, f"{one.score:.4f}", one.text] for rank, one in enumerate(of_picture, 1))
    write_text(path, text.getvalue())


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(CaptionArguments, __doc__, argv)
    pictures, captions, made = make_captions(args)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    facts = {"config": hide_paths(config), "made": made, "versions": package_versions("pycocoevalcap")}
    facts["device"] = device_description(torch_device(args.device))
    for name, of_picture in list(zip(pictures.names, captions, strict=True))[:SHOWN]:
        print(printable(f"{name}: " + "; ".join(f"{one.text} ({one.score:.3f})" for one in of_picture)))
    if args.pictures is None:
        facts["measured"] = word_scores([of_picture[0].text for of_picture in captions], pictures.captions)
        print("  ".join(f"{name} {value:.3f}" for name, value in facts["measured"].items()))
    if pictures.skipped:
        print(f"{len(pictures.skipped)} pictures could not be read and have no caption.")
    if args.output:
        write_captions(args.output, pictures, captions, facts)
        print(f"Captions: {args.output}")


if __name__ == "__main__":
    run_command(main)

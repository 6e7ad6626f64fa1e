"""A model that has only the word pieces of some languages, and back: most of a multilingual text tower are others'.

    python -m modeling_capivara.trim_vocabulary MODEL OUTPUT --languages pt en
    python -m modeling_capivara.trim_vocabulary MODEL OUTPUT --languages pt en --texts chosen.txt --held-out others.txt
    python -m modeling_capivara.trim_vocabulary TRAINED OUTPUT --restore MODEL

The embedding table loses rows and the tokenizer pieces; no other number changes, so that indexes of pictures stay
valid. `kept_pieces.py` chooses the pieces and says why a text that has all of its own is embedded as before.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from capivara_common.cli import run_command
from capivara_common.files import whole_folder

from .configuration_capivara import CapivaraConfig
from .convert_open_clip import free_output
from .kept_pieces import (
    chunks,
    cut_tokenizer,
    kept_ids,
    language_words,
    read_texts,
    tokenizer_state,
    vocabulary_digest,
    word_forms,
)
from .loading import (
    load_model,
    load_processor,
    mapped_model,
    mapped_tensors,
    origin_card,
    read_config,
    weight_files,
    weights_digest,
)
from .modeling_capivara import CapivaraModel
from .processing_capivara import CapivaraProcessor
from .trim_vocabulary_flags import WORDS, parser

COPIED = ("LICENSE", "run.json", "rotation.safetensors")  # results are not: they are the other model's
CHECKED_WORDS = 10_000  # of each language at most, that both tokenizers are compared on
MEASURED_TEXTS = 1000  # of a file, with a piece that was cut: the embeddings of the first ones are compared
BATCH_TEXTS = 64
TRIMMED = (
    "Made by `python -m modeling_capivara.trim_vocabulary`: of the embeddings of word pieces those are left that "
    "{languages} use (`trimmed_vocabulary` in config.json); all other weights are as they were."
)
RESTORED = (
    "Given its whole vocabulary back by `python -m modeling_capivara.trim_vocabulary --restore`; embeddings of word "
    "pieces that were trimmed are those from before."
)

Pair = tuple[list[int], list[int]]  # ids of a text in the whole vocabulary: of its best pieces, and of the kept ones


class HeldOut(NamedTuple):
    """Texts that chose no piece."""

    texts: int
    lost: int  # those with a piece that was cut
    cosines: list[float]  # of those (at most MEASURED_TEXTS), between the embeddings before and after


class Trim(NamedTuple):
    """What a trim has done, each number before and after."""

    pieces: tuple[int, int]
    parameters: tuple[int, int]
    weight_bytes: tuple[int, int]
    held_out: dict[str, HeldOut]  # by the path of the file


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parser().parse_args(argv)
    try:
        if args.restore:
            if args.texts or args.held_out:
                raise ValueError("--texts and --held-out are for --languages; --restore needs no texts.")
            restore(args.model, args.output, args.restore)
        else:
            print(report(trim(args.model, args.output, args.languages, args.words, args.texts, args.held_out)))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"trim_vocabulary: {' '.join(str(error).split())}") from error
    print(f"Written: {args.output}")


def trim(
    model: Path,
    output: Path,
    languages: Sequence[str],
    words: Sequence[int] = WORDS,
    texts: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
) -> Trim:
    """Write `model` with the pieces that some languages use into the new folder `output`, whole or not at all.

    Args:
        model: folder of a CAPIVARA model.
        output: folder that does not exist yet, or is empty.
        languages, words: as for `kept_ids`.
        texts: files whose pieces are kept, too.
        held_out: files on which the loss is measured.

    Raises:
        ValueError: the model is trimmed already, is damaged or has a vocabulary of another kind, an added token has no
            row, there is no list of words of a language, or a file holds no text.
        OSError: the output exists, or cannot be written (disk full).
        ImportError: wordfreq is not installed.
    """
    output, languages = free_output(output), list(dict.fromkeys(languages))
    config, processor = _whole_model(model)
    chosen, measured = ([(path, read_texts(path)) for path in paths] for paths in (texts, held_out))
    kept = kept_ids(processor, languages, words, (text for _, found in chosen for text in found))
    small = CapivaraProcessor(processor.image_processor, cut_tokenizer(processor.tokenizer, kept))
    for language in languages:
        checked = language_words(language, min(CHECKED_WORDS, *words))
        changed_texts(processor, small, kept, list(map(word_forms, checked)))
    changed = {str(path): changed_texts(processor, small, kept, found) for path, found in measured}
    record = {"languages": languages, "words": list(words), "tokenizer": vocabulary_digest(processor.tokenizer)}
    with whole_folder(output) as folder:
        parameters = _write_model(model, config, folder, lambda table: table[kept], record)
        small.save_pretrained(folder)
        _copy_records(model, folder, TRIMMED.format(languages=" and ".join(languages)))
        weight_bytes = tuple(sum(file.stat().st_size for file in weight_files(path)) for path in (model, folder))
        cosines = _cosines(model, changed)
    found = {str(path): HeldOut(len(found), len(changed[str(path)]), cosines[str(path)]) for path, found in measured}
    return Trim((record["of"], len(kept)), parameters, weight_bytes, found)


def restore(model: Path, output: Path, base: Path) -> None:
    """Write a trimmed model, trained since or not, with its whole vocabulary: rows that were cut are those of `base`.

    Raises:
        ValueError: `model` was not trimmed, or not from `base`, or one of them is damaged.
        OSError: the output exists, or cannot be written (disk full).
    """
    output = free_output(output)
    config, base_config = read_config(model), read_config(base)
    record = config.trimmed_vocabulary
    if record is None:
        raise ValueError(f"MODEL {model} has its whole vocabulary: its config.json names no trim to restore from.")
    processor, whole = load_processor(model), load_processor(base)
    table = _table(mapped_model(base, base_config))
    if (record["tokenizer"], record["table"]) != (vocabulary_digest(whole.tokenizer), _digest(table)):
        raise ValueError(f"MODEL {model} was not trimmed from {base}, whose vocabulary or embeddings are others.")
    ids, pieces = whole.tokenizer.get_vocab(), processor.tokenizer.get_vocab()
    if added := sorted(pieces.keys() - ids.keys()):
        raise ValueError(f"The tokenizer of MODEL {model} has the piece {added[0]!r}, which {base} has not.")
    kept, rows = [ids[piece] for piece in sorted(pieces, key=pieces.get)], config.text_config.vocab_size
    if sorted(pieces.values()) != list(range(rows)) or max(kept) >= len(table):
        raise ValueError(
            f"The tokenizer of MODEL {model} has {len(pieces)} pieces for its {rows} rows of embeddings; a trim leaves "
            "a piece for every row. Fetch or write the folder again."
        )

    def merged(trained: Tensor) -> Tensor:
        return table.to(trained.dtype, copy=True).index_copy_(0, torch.tensor(kept), trained)

    with whole_folder(output) as folder:
        _write_model(model, config, folder, merged, None)
        whole.save_pretrained(folder)
        _copy_records(model, folder, RESTORED)


def report(done: Trim) -> str:
    """Lines for the person who asked."""
    lines = [
        "{1:,} of {0:,} word pieces are kept.".format(*done.pieces),
        "Parameters: {:,} before, {:,} after.".format(*done.parameters),
        "Weights: {:,.1f} MB before, {:,.1f} MB after.".format(*(size / 1e6 for size in done.weight_bytes)),
    ]
    for name, found in done.held_out.items():
        line = f"{name}: {found.lost:,} of {found.texts:,} texts ({found.lost / found.texts:.2%}) lost a piece"
        if found.cosines:
            mean = sum(found.cosines) / len(found.cosines)
            line += f"; cosine to the embedding before: mean {mean:.3f}, lowest {min(found.cosines):.3f}"
        lines.append(f"{line}; the others are embedded as before.")
    return "\n".join(lines)


def changed_texts(
    whole: CapivaraProcessor, small: CapivaraProcessor, kept: Sequence[int], texts: Sequence[str]
) -> list[Pair]:
    """The texts that have a piece that was cut, as ids of the whole vocabulary.

    Raises:
        ValueError: a text whose pieces are all kept is split in another way, which would be an error of this program.
    """
    known, changed = set(kept), []
    for chunk in chunks(texts):
        before, after = (processor(text=chunk, padding=False)["input_ids"] for processor in (whole, small))
        for text, ids, small_ids in zip(chunk, before, after, strict=True):
            back = [kept[number] for number in small_ids]
            if ids != back and known.issuperset(ids):
                raise ValueError(f"The trimmed tokenizer splits {text[:200]!r} in another way; nothing was kept.")
            if ids != back:
                changed.append((ids, back))
    return changed


@torch.inference_mode()
def changed_cosines(model: CapivaraModel, pairs: Sequence[Pair]) -> list[float]:
    """Of every pair, the cosine between the embeddings of both splits.

    `model` is the whole one: the trimmed one embeds an id as it embeds the id in the whole vocabulary.
    """
    pad, cosines = model.config.text_config.pad_token_id, []
    for start in tqdm(range(0, len(pairs), BATCH_TEXTS), desc="Texts that lost a piece", unit="batch"):
        sides = []
        for side in zip(*pairs[start : start + BATCH_TEXTS], strict=True):
            ids = pad_sequence([torch.tensor(tokens) for tokens in side], batch_first=True, padding_value=pad)
            sides.append(model(input_ids=ids, attention_mask=(ids != pad).long()).text_embeds)
        cosines += (sides[0] * sides[1]).sum(dim=-1).tolist()
    return cosines


def _cosines(model: Path, changed: dict[str, list[Pair]]) -> dict[str, list[float]]:
    if not any(changed.values()):
        return {name: [] for name in changed}
    whole = load_model(model).eval()
    return {name: changed_cosines(whole, pairs[:MEASURED_TEXTS]) for name, pairs in changed.items()}


def _whole_model(folder: Path) -> tuple[CapivaraConfig, CapivaraProcessor]:
    """Configuration and processor of a model that can be trimmed, or ValueError."""
    config, processor = read_config(folder), load_processor(folder)
    if config.trimmed_vocabulary is not None:
        raise ValueError(
            f"MODEL {folder} is trimmed already, for {', '.join(config.trimmed_vocabulary['languages'])}. Trim the "
            "model that it was made from, or give it its whole vocabulary back by --restore."
        )
    rows = config.text_config.vocab_size
    for token in tokenizer_state(processor.tokenizer)["added_tokens"]:
        if token["id"] >= rows:
            raise ValueError(
                f"The added token {token['content']!r} has the id {token['id']}, but MODEL {folder} has {rows} rows of "
                "embeddings; the trim would drop it. Give it a row by `resize_token_embeddings`, or remove it."
            )
    return config, processor


def _write_model(
    source: Path, config: CapivaraConfig, folder: Path, make_table: Callable[[Tensor], Tensor], record: dict | None
) -> tuple[int, int]:
    """Write the weights of `source` with another table of embeddings, and read them again; parameters of both.

    The weights are views of their file, never a copy; `record` gets the facts about the table that was there.
    """
    model = mapped_model(source, config)
    before, table = model.num_parameters(), _table(model)
    if record is not None:
        record |= {"of": len(table), "table": _digest(table)}
    table = make_table(table)
    model.set_input_embeddings(nn.Embedding.from_pretrained(table, padding_idx=config.text_config.pad_token_id))
    config.text_config.vocab_size, config.trimmed_vocabulary = len(table), record
    model.save_pretrained(folder)
    written, expected = mapped_tensors(weight_files(folder)), model.state_dict()
    if wrong := sorted(name for name, tensor in expected.items() if not torch.equal(written[name], tensor)):
        raise ValueError(f"{', '.join(wrong)} of {source} did not come back as written; nothing was kept.")
    return before, model.num_parameters()


def _copy_records(source: Path, folder: Path, made: str) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if card := origin_card(source, made=made):
        (folder / "README.md").write_text(card, encoding="utf-8")


def _table(model: CapivaraModel) -> Tensor:
    return model.get_input_embeddings().weight.detach()


def _digest(table: Tensor) -> str:
    return weights_digest(nn.Embedding.from_pretrained(table))


if __name__ == "__main__":
    run_command(main)

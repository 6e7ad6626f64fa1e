"""A model that has only the word pieces of some languages: most of a multilingual text tower are others'.

    python -m modeling_capivara.trim_vocabulary MODEL OUTPUT --languages pt en
    python -m modeling_capivara.trim_vocabulary MODEL OUTPUT --languages pt en --texts chosen.txt

The embedding table loses rows and the tokenizer pieces; nothing else changes, so that indexes of pictures stay valid. A
Unigram tokenizer splits a text into those pieces whose scores add up to most: with fewer the best way stays the best,
as long as its own are kept. A letter without a piece scores 10 below the vocabulary's lowest, whose piece is kept, too.

SigLIP 2's tokenizer, Gemma's, joins pieces in the order of its list of merges, and has bytes for what is unknown. All
ways to a kept piece are kept: the merges of a text come in the same order as before, and no other can come between.
"""

import hashlib
import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import atomic_folder, check_output_folder
from capivara_common.weight_file import find_weight_files

from .loading import (
    load_config,
    load_mapped_model,
    load_mapped_tensors,
    load_processor,
    weights_digest,
    write_origin_card,
)

# Of the first language and of each further one, the most frequent: of long Portuguese sentences one in 400 loses a
# piece, and the model stays below 215 million parameters. docs/benchmarks.md has other numbers.
DEFAULT_WORD_COUNTS = (150_000, 50_000)
MAX_CHECKED_WORDS = 10_000  # of each language at most, that both tokenizers are compared on
TOKENIZER_BATCH_SIZE = 10_000  # that are tokenised together
WORD_START_MARKER = "▁"  # begins a piece that begins a word
BYTE_TOKEN_PATTERN = "<0x[0-9A-F]{2}>"  # a piece of one byte
COPIED_FILES = ("LICENSE", "run.json", "rotation.safetensors")  # results are not: they are the other model's
ORIGIN_SENTENCE = (
    "Made by `python -m modeling_capivara.trim_vocabulary`: of the embeddings of word pieces those are left that "
    "{languages} use (`trimmed_vocabulary` in config.json); all other weights are as they were."
)


@dataclass
class TrimArguments:
    """Flags of `modeling_capivara.trim_vocabulary`."""

    gone = {
        "restore": "a trimmed model stays small; keep the model that it was made from",
        "held_out": "measure the small model as any other",
    }
    model: Path = flag(..., "Folder of the model.", positional=True)
    output: Path = flag(..., "Folder to create; must not exist, or be empty.", positional=True)
    languages: list[str] = flag(..., "Keep the pieces of their most frequent words, as wordfreq has them: pt en.")
    words: list[int] = flag(
        [*DEFAULT_WORD_COUNTS], "Words of each language, in their order; the last is that of all further ones."
    )
    overwrite_output_dir: bool = flag(False, "Replace the output folder.")
    texts: list[Path] = flag([], "Keep the pieces of these files, too; UTF-8, a text a line.")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(TrimArguments, __doc__, argv)
    print(*trim(**vars(args)), f"Written: {args.output}", sep="\n")


def trim(
    model: Path,
    output: Path,
    languages: Sequence[str],
    words: Sequence[int] = DEFAULT_WORD_COUNTS,
    texts: Sequence[Path] = (),
    overwrite_output_dir: bool = False,
) -> list[str]:
    """As the command line: a CAPIVARA or SigLIP with the pieces of some languages, in a new folder; what was done.

    ValueError where the model is trimmed already, is damaged or has a vocabulary of another kind, an added token has no
    row, there is no list of words of a language, or a file holds no text; ImportError without wordfreq.
    """
    check_output_folder(output, overwrite_output_dir)
    languages = list(dict.fromkeys(languages))
    if min(words) < 1:
        raise ValueError(f"--words must be at least 1, got {min(words)}.")
    processor, config = load_processor(model), load_config(str(model))
    if (done := getattr(config, "trimmed_vocabulary", None)) is not None:
        known = ", ".join(done["languages"])
        raise ValueError(f"MODEL {model} is trimmed already, for {known}. Trim the model that it was made from.")
    rows = config.text_config.vocab_size
    if lost := [t for t in tokenizer_state(processor.tokenizer)["added_tokens"] if t["id"] >= rows]:
        fault = f"The added token {lost[0]['content']!r} has the id {lost[0]['id']}, but MODEL {model} has {rows} rows"
        raise ValueError(f"{fault} of embeddings. Give it a row by `resize_token_embeddings`, or remove it.")
    kept = select_token_ids(processor, languages, words, [text for path in texts for text in read_lines(path)])
    small = type(processor)(processor.image_processor, trim_tokenizer(processor.tokenizer, kept))
    for language in languages:
        checked = frequent_words(language, min(MAX_CHECKED_WORDS, *words))
        check_tokenization(processor, small, kept, map(word_variants, checked))
    pieces = sorted(processor.tokenizer.get_vocab().items(), key=lambda item: item[1])
    digest = hashlib.blake2b(json.dumps(pieces).encode(), digest_size=16).hexdigest()
    record = {"languages": languages, "words": list(words), "tokenizer": digest}
    with atomic_folder(output, overwrite_output_dir) as folder:
        parameters = _write_trimmed_model(model, config, folder, kept, record)
        small.save_pretrained(folder)
        for name in COPIED_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, folder / name)
        write_origin_card(model, folder, ORIGIN_SENTENCE.format(languages=" and ".join(languages)))
        sizes = [sum(file.stat().st_size for file in find_weight_files(path)) / 1e6 for path in (model, folder)]
    return [
        f"{len(kept):,} of {record['of']:,} word pieces are kept.",
        "Parameters: {:,} before, {:,} after.".format(*parameters),
        "Weights: {:,.1f} MB before, {:,.1f} MB after.".format(*sizes),
    ]


def _write_trimmed_model(
    source: Path, config: PreTrainedConfig, folder: Path, kept_ids: Sequence[int], record: dict
) -> tuple[int, int]:
    """Write the weights of `source` with the rows `kept` of its table, and read them again; parameters of both.

    The weights are views of their file, never a copy; `record` gets the facts about the table that was there.
    """
    model = load_mapped_model(source, config)
    whole = model.text_model.get_input_embeddings()
    before, table = model.num_parameters(), whole.weight.detach()
    record |= {"of": len(table), "table": weights_digest(nn.Embedding.from_pretrained(table))}
    model.text_model.set_input_embeddings(nn.Embedding.from_pretrained(table[kept_ids], padding_idx=whole.padding_idx))
    config.text_config.vocab_size, config.trimmed_vocabulary = len(kept_ids), record
    model.save_pretrained(folder)
    written, expected = load_mapped_tensors(find_weight_files(folder)), model.state_dict()
    if wrong := sorted(name for name, tensor in expected.items() if not torch.equal(written[name], tensor)):
        raise ValueError(f"{', '.join(wrong)} of {source} did not come back as written; nothing was kept.")
    return before, model.num_parameters()


# --- Pieces ----------------------------------------------------------------------------------------------------------


def select_token_ids(
    processor: ProcessorMixin, languages: Sequence[str], words: Sequence[int], texts: Iterable[str] = ()
) -> list[int]:
    """Ids, ascending, of the pieces that a trim keeps: those of the most frequent `words` of each language, in small
    letters, capitals and as a title, the last number being that of all further languages; and those of `texts`.

    Raises ValueError or ImportError as `language_words`, or where the tokenizer is of another kind.
    """
    numbers = zip(languages, [*words, *[words[-1]] * len(languages)], strict=False)
    lists = {language: frequent_words(language, number) for language, number in numbers}
    kept = _required_token_ids(processor.tokenizer)
    for language, found in lists.items():
        bar = tqdm(found, desc=f"Words of {language}", unit="word", unit_scale=True)
        kept |= used_token_ids(processor, map(word_variants, bar))
    return sorted(_add_merge_parts(processor.tokenizer, kept | used_token_ids(processor, texts)))


def frequent_words(language: str, number: int) -> list[str]:
    """The most frequent words of a language, out of the package wordfreq; ValueError or ImportError without them."""
    try:
        import wordfreq  # only this program needs it
    except ImportError as error:
        raise ImportError('The package wordfreq is not installed: pip install "modeling-capivara[trim]"') from error
    known = wordfreq.available_languages()
    if language not in known:
        fault = f"There is no list of words of the language {language!r}; there are {', '.join(sorted(known))}"
        raise ValueError(f"{fault}. For another one give texts of it by --texts, beside a language of the list.")
    return wordfreq.top_n_list(language, number)


def word_variants(word: str) -> str:
    """A text in which a word stands as it does in sentences: after a blank and after a sign, in small and capitals."""
    return " ".join(f"{form} ({form}" for form in dict.fromkeys((word, word.title(), word.upper())))


def used_token_ids(processor: ProcessorMixin, texts: Iterable[str]) -> set[int]:
    """Ids of all tokens of the texts, begin, end and padding included."""
    found = {processor.tokenizer.pad_token_id}
    for chunk in _iter_batches(texts):
        found.update(*_tokenize(processor, chunk))
    return found


def _tokenize(processor: ProcessorMixin, texts: Sequence[str]) -> list[list[int]]:
    return processor(text=list(texts), padding=False, truncation=True)["input_ids"]


def check_tokenization(
    original: ProcessorMixin, trimmed: ProcessorMixin, kept_ids: Sequence[int], texts: Iterable[str]
) -> None:
    """Raise ValueError where a text whose pieces are all kept is split otherwise by the small tokenizer."""
    known = set(kept_ids)
    for chunk in _iter_batches(texts):
        before, after = (_tokenize(processor, chunk) for processor in (original, trimmed))
        for text, ids, small_ids in zip(chunk, before, after, strict=True):
            if known.issuperset(ids) and ids != [kept_ids[number] for number in small_ids]:
                raise ValueError(f"The trimmed tokenizer splits {text[:200]!r} in another way; nothing was kept.")


def _iter_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while chunk := list(islice(remaining, TOKENIZER_BATCH_SIZE)):
        yield chunk


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises ValueError where it can't be read, or has none."""
    try:
        texts = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The texts {path} can't be read: {error}. Give a file in UTF-8, a text a line.") from error
    if not texts:
        raise ValueError(f"The file {path} holds no text; it takes one a line.")
    return texts


def _required_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of what any text may have: added tokens, single letters, and pieces without a letter.

    But for the ten thousand Chinese characters and Korean syllables, which the words of those languages bring. And what
    begins the vocabulary, so that the ids of padding, begin and end stay as they are.
    """
    state = tokenizer_state(tokenizer)
    pieces, unknown = _tokens_by_id(state), tokenizer.unk_token_id
    first = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, unknown} - {None}
    kept = {*range(max(first) + 1), *(token["id"] for token in state["added_tokens"])}
    if state["model"]["type"] == "Unigram":
        scores = [score for _, score in state["model"]["vocab"]]
        kept.add(min(range(len(scores)), key=scores.__getitem__))
    for number, piece in enumerate(pieces):
        text = "" if re.fullmatch(BYTE_TOKEN_PATTERN, piece) else piece.removeprefix(WORD_START_MARKER)
        letters = sum(map(str.isalpha, text))
        if not letters or (len(text) == 1 and not unicodedata.name(text, "").startswith(("CJK", "HANGUL"))):
            kept.add(number)
    return kept


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What its tokenizer.json holds. Raises ValueError where it is not of the kind that can be cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    model = state["model"]
    unigram = model.get("type") == "Unigram" and not model.get("byte_fallback") and model.get("unk_id") is not None
    if not unigram and not (model.get("type") == "BPE" and model.get("byte_fallback")):
        rule = (
            "a Unigram one with a token for unknown letters and without bytes, as XLM-R's, or a BPE with bytes for them"
        )
        raise ValueError(f"The tokenizer is of the kind {model.get('type')}; what can be cut: {rule}, as SigLIP 2's.")
    return state


def _tokens_by_id(state: dict) -> list[str]:
    """The pieces of a tokenizer's state, by their ids."""
    found = state["model"]["vocab"]
    return [piece for piece, _ in found] if isinstance(found, list) else sorted(found, key=found.get)


def _add_merge_parts(tokenizer: PreTrainedTokenizerBase, token_ids: set[int]) -> set[int]:
    """`kept`, and of a BPE the pieces that any of its merges makes them of."""
    state = tokenizer_state(tokenizer)
    if state["model"]["type"] != "BPE":
        return token_ids
    number, parts = state["model"]["vocab"], {}
    for left, right in _merges(state):
        parts.setdefault(number[left + right], set()).update((number[left], number[right]))
    token_ids, new = set(token_ids), set(token_ids)
    while new:
        new = set().union(*(parts.get(one, ()) for one in new)) - token_ids
        token_ids |= new
    return token_ids


def _merges(state: dict) -> list[tuple[str, str]]:
    """The merges of a BPE, in their order; older files write each as a text with a blank."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in state["model"]["merges"]]


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept_ids: Sequence[int]) -> PreTrainedTokenizerBase:
    """A tokenizer with the pieces `kept` of another and their scores; id i of it is the other's id `kept[i]`.

    ValueError where one at the vocabulary's beginning would get another id.
    """
    state, new_id = tokenizer_state(tokenizer), {old: number for number, old in enumerate(kept_ids)}
    model, pieces = state["model"], _tokens_by_id(state)
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept_ids if old < len(pieces)]
        model["unk_id"] = new_id[model["unk_id"]]
    else:
        left = {pieces[old]: number for number, old in enumerate(kept_ids) if old < len(pieces)}
        merges = [list(merge) for merge in _merges(state) if {*merge, "".join(merge)} <= left.keys()]
        model["vocab"], model["merges"] = left, merges
    for token in state["added_tokens"]:
        token["id"] = new_id[token["id"]]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        small = type(tokenizer).from_pretrained(folder)
    names, small_ids = {number: token for token, number in tokenizer.get_vocab().items()}, small.get_vocab()
    if wrong := [names[old] for number, old in enumerate(kept_ids) if small_ids.get(names[old]) != number]:
        raise ValueError(f"The tokenizer can't be cut: {wrong[0]!r} would get another id than its row has.")
    return small


if __name__ == "__main__":
    run_command(main)

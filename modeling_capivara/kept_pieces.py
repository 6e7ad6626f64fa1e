"""Which pieces of a vocabulary some texts need, and a tokenizer that has no others.

    kept = kept_ids(processor, languages=["pt", "en"], words=[150_000, 50_000])
    small = cut_tokenizer(processor.tokenizer, kept)  # id i of it is id kept[i] of the whole

A Unigram tokenizer splits a text into those of its pieces whose scores add up to most. Without some pieces there are
fewer ways to split it, and all that are left have the scores that they had: the best one stays the best, as long as its
own pieces are kept. So a text is split in the same way, or it had a piece that was cut. For a letter without a piece
the score is 10 below the lowest of the vocabulary (`Unigram` of the tokenizers library); the piece with the lowest
score is kept, so that this does not change either.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .processing_capivara import CapivaraProcessor
from .tokenization_capivara import CapivaraTokenizer

TEXTS_AT_ONCE = 10_000  # that are tokenised together
BLANK = "▁"  # begins a piece that begins a word


def kept_ids(
    processor: CapivaraProcessor, languages: Sequence[str], words: Sequence[int], texts: Iterable[str] = ()
) -> list[int]:
    """Ids, ascending, of the pieces that a trim keeps: no other text decides but those that are given.

    Args:
        processor: with the whole vocabulary.
        languages: codes of wordfreq, such as "pt".
        words: of each language, the most frequent ones, in small letters, capitals and as a title; the last number is
            that of all further languages.
        texts: whose pieces are kept, too.

    Raises:
        ValueError: there is no list of words of a language, or the tokenizer is of another kind.
        ImportError: wordfreq is not installed.
    """
    state = tokenizer_state(processor.tokenizer)
    numbers = zip(languages, [*words, *[words[-1]] * len(languages)], strict=False)
    lists = {language: language_words(language, number) for language, number in numbers}
    kept = always_kept(processor.tokenizer, state)
    for language, found in lists.items():
        bar = tqdm(found, desc=f"Words of {language}", unit="word", unit_scale=True)
        kept.update(used_ids(processor, map(word_forms, bar)).tolist())
    kept.update(used_ids(processor, texts).tolist())
    return sorted(kept)


def language_words(language: str, number: int) -> list[str]:
    """The most frequent words of a language, out of the package wordfreq.

    Raises:
        ValueError: it has no list of that language.
        ImportError: it is not installed.
    """
    try:
        import wordfreq  # only this program needs it
    except ImportError as error:
        raise ImportError(
            'wordfreq, whose lists of words choose the pieces, is not installed: pip install "modeling-capivara[trim]"'
        ) from error
    known = wordfreq.available_languages()
    if language not in known:
        raise ValueError(
            f"There is no list of words of the language {language!r}; there are {', '.join(sorted(known))}. For "
            "another one give texts of it by --texts, beside a language of the list."
        )
    return wordfreq.top_n_list(language, number)


def word_forms(word: str) -> str:
    """A text in which a word stands as it does in sentences: after a blank and after a sign, in small and capitals."""
    return " ".join(f"{form} ({form}" for form in dict.fromkeys((word, word.title(), word.upper())))


def used_ids(processor: CapivaraProcessor, texts: Iterable[str]) -> Tensor:
    """(ids,), ascending: of all tokens of the texts, begin, end and padding included."""
    found = {processor.tokenizer.pad_token_id}
    for chunk in chunks(texts):
        for tokens in processor(text=chunk, padding=False)["input_ids"]:
            found.update(tokens)
    return torch.tensor(sorted(found))


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, `TEXTS_AT_ONCE` at a time."""
    remaining = iter(texts)
    while chunk := list(islice(remaining, TEXTS_AT_ONCE)):
        yield chunk


def read_texts(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises ValueError where it can't be read, or has none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The texts {path} can't be read: {error}. Give a file in UTF-8, a text a line.") from error
    if not (texts := [line for line in lines if line.strip()]):
        raise ValueError(f"The file {path} holds no text; it takes one a line.")
    return texts


def always_kept(tokenizer: CapivaraTokenizer, state: dict) -> set[int]:
    """Ids of what any text may have: added tokens, single letters, and pieces without a letter.

    But for the ten thousand Chinese characters and Korean syllables, which the words of those languages bring. And what
    begins the vocabulary, so that the ids of padding, begin and end stay as they are.
    """
    pieces = state["model"]["vocab"]
    unknown = state["model"]["unk_id"]
    first = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, unknown} - {None}
    kept = {*range(max(first) + 1), *(token["id"] for token in state["added_tokens"])}
    kept.add(min(range(len(pieces)), key=lambda number: pieces[number][1]))
    for number, (piece, _) in enumerate(pieces):
        text = piece.removeprefix(BLANK)
        letters = sum(map(str.isalpha, text))
        if not letters or (len(text) == 1 and not unicodedata.name(text, "").startswith(("CJK", "HANGUL"))):
            kept.add(number)
    return kept


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What its tokenizer.json holds. Raises ValueError where it is not of the kind that can be cut."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model.get("type") != "Unigram" or model.get("byte_fallback") or model.get("unk_id") is None:
        raise ValueError(
            f"The tokenizer is of the kind {model.get('type')}; cut is the vocabulary of a Unigram one that has a "
            "token for unknown letters and does not fall back to bytes, as XLM-R's."
        )
    return state


def cut_tokenizer(tokenizer: CapivaraTokenizer, kept: Sequence[int]) -> CapivaraTokenizer:
    """A tokenizer with the pieces `kept` of another and their scores; id i of it is the other's id `kept[i]`.

    Raises:
        ValueError: an added token, or one at the vocabulary's beginning, would be lost or get another id.
    """
    state, new_id = tokenizer_state(tokenizer), {old: number for number, old in enumerate(kept)}
    if lost := [token["content"] for token in state["added_tokens"] if token["id"] not in new_id]:
        raise ValueError(f"The added tokens {', '.join(lost)} would be cut; a trim keeps all added tokens.")
    pieces = state["model"]["vocab"]
    state["model"]["vocab"] = [pieces[old] for old in kept if old < len(pieces)]
    state["model"]["unk_id"] = new_id[state["model"]["unk_id"]]
    for token in state["added_tokens"]:
        token["id"] = new_id[token["id"]]
    small = tokenizer.with_backend(Tokenizer.from_str(json.dumps(state)))
    names, small_ids = {number: token for token, number in tokenizer.get_vocab().items()}, small.get_vocab()
    if wrong := [names[old] for number, old in enumerate(kept) if small_ids.get(names[old]) != number]:
        raise ValueError(f"The tokenizer can't be cut: {wrong[0]!r} would get another id than its row has.")
    return small


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of all pieces, in the order of their ids."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.blake2b(json.dumps(pieces).encode(), digest_size=16).hexdigest()

"""Trim the vocabulary of a multilingual model: remove the tokens that the given languages do not use.

    python -m modeling_capivara.trim_vocabulary MODEL OUTPUT --languages pt en
    python -m modeling_capivara.trim_vocabulary MODEL OUTPUT --languages pt en --texts chosen.txt

The command writes a smaller copy of the model. Removed tokens disappear from the tokenizer and from the embedding table
of the text tower. A text keeps its embedding if all its tokens are kept. The image encoder does not change, so search
indexes of images stay valid.
"""

import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import require_packages
from capivara_common.files import atomic_folder, check_output_folder_and_clean_leftovers, json_digest
from capivara_common.weight_file import find_weight_files

from . import loading

# Number of most frequent words whose tokens are kept, for the first language and for each further language. With these
# numbers, one in 400 long Portuguese sentences contains a removed token, and the model has less than 215 million
# parameters. docs/reference/benchmarks.md compares other numbers.
DEFAULT_WORD_COUNTS = (150_000, 50_000)
MAX_CHECKED_WORDS = 10_000  # words per language with which trimmed and original tokenizer are compared
TOKENIZER_BATCH_SIZE = 10_000  # texts per call of a tokenizer
WORD_START_MARKER = "▁"  # first character of every token that starts a word
BYTE_TOKEN_PATTERN = "<0x[0-9A-F]{2}>"  # token for a single byte, such as "<0xC3>"
# Files that are copied to the trimmed model if they exist. Files of evaluation results are not copied, because the
# results were measured with the original model.
COPIED_FILES = ("LICENSE", "run.json", "rotation.safetensors")
ORIGIN_SENTENCE = (
    "Made by `python -m modeling_capivara.trim_vocabulary`: only the embeddings of tokens that {languages} use were "
    "kept (`trimmed_vocabulary` in config.json). All other weights are unchanged."
)


@dataclass
class TrimArguments:
    """Command-line arguments of `trim_vocabulary`, which removes unused tokens from a multilingual model."""

    model: Path = flag(..., "Folder of the model.", positional=True)
    output: Path = flag(..., "Folder to create. If it exists, it must be empty.", positional=True)
    languages: list[str] = flag(
        ..., "Language codes of the package wordfreq, such as pt en. The tokens of their most frequent words are kept."
    )
    words: list[int] = flag(
        [*DEFAULT_WORD_COUNTS],
        "Number of most frequent words of each language, in the order of --languages. The last number is used for all "
        "further languages.",
    )
    overwrite_output_dir: bool = flag(False, "Replace the output folder if it exists.")
    texts: list[Path] = flag([], "UTF-8 files with one text per line. All tokens of these texts are kept too.")


def main(argv: list[str] | None = None) -> None:
    """Run the command: trim a model's vocabulary, and print the model's size before and after.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
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
    """Write a smaller copy of a multilingual model, with only the tokens that the given languages use.

    Args:
        model: Folder of a CAPIVARA, SigLIP or MetaCLIP 2 model.
        output: Folder to create. An existing folder must be empty.
        languages: Language codes of the package wordfreq, such as "pt".
        words: For each language, the number of most frequent words whose tokens are kept. The last number is used for
            all further languages.
        texts: UTF-8 files with one text per line. All tokens of these texts are kept too.
        overwrite_output_dir: Replace an existing `output`, even if it has files.

    Returns:
        Sentences for the user, with the model's size before and after.

    Raises:
        ValueError: If the model can't be trimmed, an argument or file is invalid, or `output` has files.
        ImportError: If wordfreq is not installed.
    """
    check_output_folder_and_clean_leftovers(output, overwrite_output_dir)
    languages = list(dict.fromkeys(languages))
    if min(words) < 1:
        raise ValueError(f"--words must be at least 1, got {min(words)}.")
    processor, config = loading.load_processor(model), loading.load_transformers_config(str(model))
    earlier_trim = getattr(config, "trimmed_vocabulary", None)
    if earlier_trim is not None:
        kept_languages = ", ".join(earlier_trim["languages"])
        raise ValueError(f"The vocabulary of {model} is already trimmed to {kept_languages}. Trim the original model.")
    lines = [line for path in texts for line in _read_lines(path)]
    kept_ids = select_token_ids_to_keep(processor, languages, words, lines)
    trimmed = type(processor)(processor.image_processor, trim_tokenizer(processor.tokenizer, kept_ids))
    for language in languages:
        checked_words = frequent_words(language, min(MAX_CHECKED_WORDS, *words))
        check_trimmed_tokenizer_matches_original(processor, trimmed, kept_ids, map(word_variants, checked_words))
    vocabulary = sorted(processor.tokenizer.get_vocab().items(), key=lambda item: item[1])
    record = {"languages": languages, "words": list(words), "tokenizer": json_digest(vocabulary)}
    with atomic_folder(output, overwrite_output_dir) as folder:
        parameters_before, parameters_after = _write_and_verify_trimmed_model(model, config, folder, kept_ids, record)
        trimmed.save_pretrained(folder)
        for name in COPIED_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, folder / name)
        loading.write_origin_card(model, folder, ORIGIN_SENTENCE.format(languages=" and ".join(languages)))
        megabytes_before, megabytes_after = _weights_megabytes(model), _weights_megabytes(folder)
    return [
        f"Kept {len(kept_ids):,} of {record['of']:,} tokens.",
        f"Parameters: {parameters_before:,} before, {parameters_after:,} after.",
        f"Weights: {megabytes_before:,.1f} MB before, {megabytes_after:,.1f} MB after.",
    ]


def _weights_megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in find_weight_files(folder)) / 1e6


def _write_and_verify_trimmed_model(
    source: Path, config: PreTrainedConfig, folder: Path, kept_ids: Sequence[int], record: dict
) -> tuple[int, int]:
    """Write the model without the embeddings of removed tokens, and verify the file that was written.

    Args:
        source: Folder of the original model.
        config: Configuration of the original model.
        folder: Folder to write to.
        kept_ids: Ids of the tokens to keep, in ascending order.
        record: Dictionary that becomes `trimmed_vocabulary` of the configuration. The keys "of" (rows of the original
            embedding table) and "table" (its hash) are added to it.

    Returns:
        Number of parameters before and after.

    Raises:
        ValueError: If a written weight differs from the model's weight.
    """
    # The weights are memory-mapped, so all but the embeddings of tokens are never copied in memory.
    model = loading.load_memory_mapped_model(source, config)
    config = model.config
    embedding = model.text_model.get_input_embeddings()
    before, table = model.num_parameters(), embedding.weight.detach()
    record |= {"of": len(table), "table": loading.weights_digest(nn.Embedding.from_pretrained(table))}
    trimmed_embedding = nn.Embedding.from_pretrained(table[kept_ids], padding_idx=embedding.padding_idx)
    model.text_model.set_input_embeddings(trimmed_embedding)
    config.text_config.vocab_size, config.trimmed_vocabulary = len(kept_ids), record
    model.save_pretrained(folder)
    # transformers may save weights under other names than the names in the model. So the written file is loaded again,
    # and the weights of the two models are compared.
    written, expected = loading.load_memory_mapped_model(folder, config).state_dict(), model.state_dict()
    changed = sorted(name for name, tensor in expected.items() if not torch.equal(written[name], tensor))
    if changed:
        raise ValueError(f"Weights of {source} changed when they were saved, so no model was written: {changed}.")
    return before, model.num_parameters()


# --- Tokens ----------------------------------------------------------------------------------------------------------


def select_token_ids_to_keep(
    processor: ProcessorMixin, languages: Sequence[str], words: Sequence[int], texts: Iterable[str] = ()
) -> list[int]:
    """Select the tokens to keep when a vocabulary is trimmed.

    These are the tokens of frequent words and of `texts`, and tokens that any text may need, such as digits.

    Args:
        processor: Processor with the original tokenizer.
        languages: Language codes of the package wordfreq, such as "pt".
        words: For each language, the number of most frequent words. The last number is used for all further languages.
        texts: Further texts.

    Returns:
        Token ids in ascending order.

    Raises:
        ValueError: If the tokenizer is of an unsupported type, or wordfreq has no word list of a language.
        ImportError: If wordfreq is not installed.
    """
    # The last number applies to all further languages. The list is longer than necessary, and `zip` ignores the rest.
    word_counts = [*words, *[words[-1]] * len(languages)]
    lists = {language: frequent_words(language, count) for language, count in zip(languages, word_counts, strict=False)}
    state = _check_and_get_tokenizer_json(processor.tokenizer)
    kept_ids = _get_always_kept_token_ids(processor.tokenizer, state) | _used_token_ids(processor, texts)
    for language, word_list in lists.items():
        bar = tqdm(word_list, desc=f"Words of {language}", unit="word", unit_scale=True)
        kept_ids |= _used_token_ids(processor, map(word_variants, bar))
    return sorted(_add_merge_parts(state, kept_ids))


def frequent_words(language: str, number: int) -> list[str]:
    """Return the most frequent words of a language from the package wordfreq.

    Args:
        language: Language code, such as "pt".
        number: Number of words.

    Returns:
        The words, the most frequent first.

    Raises:
        ValueError: If wordfreq has no word list of the language.
        ImportError: If wordfreq is not installed.
    """
    require_packages("Trimming a vocabulary", "trim", "wordfreq")
    # Imported here, because wordfreq is an optional dependency that only trimming needs.
    import wordfreq

    available = wordfreq.available_languages()
    if language not in available:
        fault = f"wordfreq has no word list of the language {language!r}, only of {', '.join(sorted(available))}"
        raise ValueError(f"{fault}. For another language, add a file of its texts with --texts.")
    return wordfreq.top_n_list(language, number)


def word_variants(word: str) -> str:
    """Return a text with a word in several spellings, because each spelling may consist of different tokens.

    The spellings are lower case, capitalized and upper case. Each spelling is written once after a space and once after
    a bracket: "gato (gato Gato (Gato GATO (GATO".

    Args:
        word: Word in lower case.
    """
    return " ".join(f"{form} ({form}" for form in dict.fromkeys((word, word.title(), word.upper())))


def _used_token_ids(processor: ProcessorMixin, texts: Iterable[str]) -> set[int]:
    """Collect the ids of all tokens that occur in the given texts.

    Args:
        processor: Processor that tokenizes the texts.
        texts: Any number of texts.

    Returns:
        Token ids, including the ids of the begin, end and padding tokens.
    """
    ids, remaining = {processor.tokenizer.pad_token_id}, iter(texts)
    while batch := list(islice(remaining, TOKENIZER_BATCH_SIZE)):
        ids.update(*_tokenize(processor, batch))
    return ids


def _tokenize(processor: ProcessorMixin, texts: list[str]) -> list[list[int]]:
    return processor(text=texts, padding=False, truncation=True)["input_ids"]


def check_trimmed_tokenizer_matches_original(
    original: ProcessorMixin, trimmed: ProcessorMixin, kept_ids: Sequence[int], texts: Iterable[str]
) -> None:
    """Check that the trimmed tokenizer splits texts into the same tokens as the original tokenizer.

    Args:
        original: Processor with the original tokenizer.
        trimmed: Processor with the trimmed tokenizer.
        kept_ids: Original id of each token of the trimmed tokenizer, in the order of its new ids.
        texts: Texts to compare. Texts with a removed token are ignored.

    Raises:
        ValueError: If the two tokenizers split a text differently.
    """
    id_set, texts = set(kept_ids), list(texts)
    for text, ids, trimmed_ids in zip(texts, _tokenize(original, texts), _tokenize(trimmed, texts), strict=True):
        if id_set.issuperset(ids) and ids != [kept_ids[trimmed_id] for trimmed_id in trimmed_ids]:
            fault = f"splits {text[:200]!r} differently from the original tokenizer"
            raise ValueError(f"The trimmed tokenizer {fault}, so no model was written.")


def _read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without blank lines.

    Args:
        path: UTF-8 file with one text per line.

    Raises:
        ValueError: If the file can't be read as UTF-8 or has no text.
    """
    try:
        texts = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}. Give a UTF-8 file with one text per line.") from error
    if not texts:
        raise ValueError(f"The file {path} has no text. Write one text per line.")
    return texts


def _get_always_kept_token_ids(tokenizer: PreTrainedTokenizerBase, state: dict) -> set[int]:
    """Return the ids of tokens that are always kept, because any text may need them.

    These are added tokens, tokens of a single letter, and tokens without letters.

    Args:
        tokenizer: The original tokenizer.
        state: Content of its tokenizer.json, from `_check_and_get_tokenizer_json`.
    """
    # All tokens up to the last special token are kept, so that the ids of the special tokens do not change.
    special_ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    ids = {*range(max(special_ids - {None}) + 1), *(token["id"] for token in state["added_tokens"])}
    # A Unigram tokenizer derives the score of unknown letters from the lowest score of all tokens. So the token with
    # the lowest score is kept, to split texts as before.
    if state["model"]["type"] == "Unigram":
        scores = [score for _, score in state["model"]["vocab"]]
        ids.add(scores.index(min(scores)))
    # Single Chinese characters and Korean syllables are left out, because there are ten thousand of them. If Chinese or
    # Korean is kept, its frequent words add the tokens that are needed.
    for token_id, token in enumerate(_list_tokens_in_id_order(state)):
        text = "" if re.fullmatch(BYTE_TOKEN_PATTERN, token) else token.removeprefix(WORD_START_MARKER)
        has_letters = any(map(str.isalpha, text))
        if not has_letters or (len(text) == 1 and not unicodedata.name(text, "").startswith(("CJK", "HANGUL"))):
            ids.add(token_id)
    return ids


def _check_and_get_tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return the content of a tokenizer's tokenizer.json as a dictionary, for example with `model` and `added_tokens`.

    Args:
        tokenizer: Tokenizer of any type.

    Raises:
        ValueError: If the tokenizer is of a type that can't be trimmed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    model = state["model"]
    unigram = model.get("type") == "Unigram" and not model.get("byte_fallback") and model.get("unk_id") is not None
    bpe = model.get("type") == "BPE" and model.get("byte_fallback")
    if not unigram and not bpe:
        rule = "Unigram with an unknown token and without byte fallback (XLM-R), or BPE with byte fallback (SigLIP 2)"
        raise ValueError(f"The tokenizer has the type {model.get('type')}, which can't be trimmed. Supported: {rule}.")
    return state


def _list_tokens_in_id_order(state: dict) -> list[str]:
    """Return the tokens of a vocabulary in the order of their ids, without added tokens.

    Args:
        state: Content of tokenizer.json, from `_check_and_get_tokenizer_json`.
    """
    vocab = state["model"]["vocab"]  # Unigram: list of tokens with scores; BPE: dictionary from token to id
    return [token for token, _ in vocab] if isinstance(vocab, list) else sorted(vocab, key=vocab.get)


def _add_merge_parts(state: dict, token_ids: set[int]) -> set[int]:
    """Add the shorter tokens from which a BPE tokenizer merges the given tokens, directly or over several merges.

    Args:
        state: Content of tokenizer.json, from `_check_and_get_tokenizer_json`.
        token_ids: Ids of the tokens.

    Returns:
        The given ids and the added ids. For a Unigram tokenizer, which has no merges, the given ids.
    """
    if state["model"]["type"] != "BPE":
        return token_ids
    id_of, parts = state["model"]["vocab"], {}
    for left, right in state["model"]["merges"]:
        parts.setdefault(id_of[left + right], set()).update((id_of[left], id_of[right]))
    all_ids, new_ids = set(token_ids), set(token_ids)
    while new_ids:
        new_ids = set().union(*(parts.get(token_id, ()) for token_id in new_ids)) - all_ids
        all_ids |= new_ids
    return all_ids


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept_ids: Sequence[int]) -> PreTrainedTokenizerBase:
    """Build a copy of a tokenizer that has only the given tokens, with new consecutive ids.

    Args:
        tokenizer: The original tokenizer.
        kept_ids: Ids of the tokens to keep, in ascending order. The token `kept_ids[i]` gets the new id i.

    Returns:
        The trimmed tokenizer, of the same class.

    Raises:
        ValueError: If the tokenizer is of a type that can't be trimmed, or a token would not get its new id.
    """
    state, new_id = _check_and_get_tokenizer_json(tokenizer), {old_id: new for new, old_id in enumerate(kept_ids)}
    model, tokens = state["model"], _list_tokens_in_id_order(state)
    # `model["vocab"]` does not contain the added tokens, whose ids may be higher. So their ids are left out.
    model_ids = [old_id for old_id in kept_ids if old_id < len(tokens)]
    if model["type"] == "Unigram":
        # A Unigram tokenizer (XLM-R, or XLM-V in MetaCLIP 2) splits a text into the tokens with the highest sum of
        # scores. Removing tokens that this split does not use can't make another split better.
        model["vocab"] = [model["vocab"][old_id] for old_id in model_ids]
        model["unk_id"] = new_id[model["unk_id"]]
    else:
        # A BPE tokenizer (SigLIP 2) applies its merges in order and falls back to bytes. All merges that produce a kept
        # token are kept in this order, so they give the same tokens as before.
        model["vocab"] = {tokens[old_id]: new_id[old_id] for old_id in model_ids}
        model["merges"] = [merge for merge in model["merges"] if {*merge, "".join(merge)} <= model["vocab"].keys()]
    for token in state["added_tokens"]:
        token["id"] = new_id[token["id"]]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder)
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    trimmed_ids = trimmed.get_vocab()
    moved = [names[old_id] for old_id in kept_ids if trimmed_ids.get(names[old_id]) != new_id[old_id]]
    if moved:
        fault = f"the id of {moved[0]!r} would differ from its row in the embedding table"
        raise ValueError(f"The tokenizer can't be trimmed: {fault}.")
    return trimmed


if __name__ == "__main__":
    run_main_and_report_user_errors(main)

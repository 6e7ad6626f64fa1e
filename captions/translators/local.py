"""Sequence-to-sequence models of transformers: Marian, NLLB, M2M100, mBART-50, MADLAD, and others with a prefix.

    python -c "from captions.translators.local import load; print(load('Helsinki-NLP/opus-mt-tc-big-en-pt', 'pt').code)"

How a model is told the language it shall write is read off its tokenizer: Marian's and MADLAD's have a token for each,
`>>por<<` or `<2pt>`, which goes before the sentence; NLLB, M2M100 and mBART begin the translation with one. Neither is
skipped in decoding, so it is cut off here.
"""

import hashlib
import itertools
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from capivara_common.environment import how_to_install, torch_device
from capivara_common.hub_cache import check_reachable
from captions.translators.languages import find_code, same_language
from captions.translators.pieces import cut, groups
from modeling_capivara.checks_capivara import tokenizer_errors
from modeling_capivara.loading import checked_config

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SOURCE_TOKENS = 256  # of a piece: translation models learn from sentences, and lose the rest of long paragraphs
SOURCE_TOKEN = re.compile(r">>(.+)<<|<2(.+)>")  # Marian's and MADLAD's
TARGET_TOKEN = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # NLLB's


class Seq2SeqTranslator:
    """A model with its tokenizer, told the languages.

    Args:
        model: in `eval()`, on the device where it shall work.
        language, source_language: that it shall write, and reads; `same_language` says which codes mean the same.
        source_prefix: goes before every sentence of a model that takes its task in words, such as T5.
        batch_size: sentences, or pieces of long ones, that go through at once.
        options: of `generate`; what is not given is as in the model's generation_config.
        identity: of the weights, for the translation memory.

    Raises:
        ValueError: the model does not know a language; the nearest codes are named.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        language: str,
        source_language: str = "en",
        source_prefix: str | None = None,
        batch_size: int = 32,
        options: dict[str, Any] | None = None,
        identity: dict[str, Any] | None = None,
    ):
        self.model, self.tokenizer, self._batch_size = model, tokenizer, batch_size
        self.name = f"{model.config.model_type} {Path(model.config.name_or_path).name}".strip()
        self._before: list[int] = []  # token ids before every sentence
        self._options = dict(options or {})
        source_codes, target_codes = _language_tokens(tokenizer)
        self._commands = {*source_codes.values()}  # token ids that a caption must not have
        self._language_ids = {*source_codes.values(), *target_codes.values()}
        if source_codes:
            self.code = find_code(language, source_codes, self.name)
            self._before = [source_codes[self.code]]
        elif target_codes:
            self.code = find_code(language, target_codes, self.name)
            tokenizer.src_lang = find_code(source_language, target_codes, self.name)
            self._options["forced_bos_token_id"] = target_codes[self.code]
        else:
            self.code = _only_language(tokenizer, language, source_prefix, self.name)
        if source_prefix:
            self._before += tokenizer(source_prefix, add_special_tokens=False)["input_ids"]
        # Within what the model has positions for, of which one is the start token's. Twice the source is more than
        # languages differ by, and ends a loop.
        positions = getattr(model.config, "max_position_embeddings", None) or 2 * MAX_SOURCE_TOKENS
        self._max_source = min(positions, tokenizer.model_max_length, MAX_SOURCE_TOKENS + len(self._before))
        longest = self._options.get("max_new_tokens") or 2 * MAX_SOURCE_TOKENS
        self._options["max_new_tokens"] = min(positions - 1, longest)
        model.generation_config.max_length = None  # else `generate` warns at every call that it has two limits
        settings = model.generation_config.to_diff_dict() | self._options
        settings.pop("transformers_version", None)
        self.fingerprint = {
            "backend": "transformers",
            **(identity or {"model": str(model.config.name_or_path)}),
            "source": getattr(tokenizer, "src_lang", None) or source_language,
            "target": self.code,
            "source_prefix": source_prefix,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_source_tokens": self._max_source,
            "generation": settings,
        }

    @torch.inference_mode()
    def translate(self, sentences: list[str]) -> list[str]:
        """One translation a sentence; one that is too long is translated in pieces, which are joined by blanks."""
        pieces = [cut(sentence, self._fits) for sentence in sentences]
        batches = groups(itertools.chain.from_iterable(pieces), sys.maxsize, self._batch_size)
        made = (text for batch in batches for text in self._translated(batch))
        return [" ".join(itertools.islice(made, len(some))).strip() for some in pieces]

    def token_ids(self, text: str) -> list[int]:
        """What the encoder reads. A language's token inside a caption is no command, nor is `</s>` an end."""
        ids = self.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        return self._before + [i for i in ids if i not in self._commands]

    def _fits(self, text: str) -> bool:
        return len(self.token_ids(text)) <= self._max_source

    def _translated(self, texts: list[str]) -> list[str]:
        inputs = self.tokenizer.pad({"input_ids": [self.token_ids(text) for text in texts]}, return_tensors="pt")
        ids = None
        try:
            ids = self.model.generate(**inputs.to(self.model.device), **self._options)  # (texts, tokens)
        except torch.OutOfMemoryError as error:
            if len(texts) == 1:
                raise ValueError(f"Out of memory with one sentence at once. Lower --num_beams. ({error})") from error
        if ids is None:  # not in `except`, where the error keeps the tensors of the failed try
            middle = len(texts) // 2
            return self._translated(texts[:middle]) + self._translated(texts[middle:])
        kept = [[i for i in row if i not in self._language_ids] for row in ids.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]


def load(
    name: str,
    language: str,
    source_language: str = "en",
    revision: str | None = None,
    precision: str = "float32",
    device: str | None = None,
    **options: Any,
) -> Seq2SeqTranslator:
    """The translator of a folder or Hub id; `options` are others of `Seq2SeqTranslator`.

    Raises:
        ValueError: there is no such model, it is none that translates, or it does not know a language.
        ImportError: its tokenizer needs a package that is not there.
    """
    target = torch_device(device)
    try:
        check_reachable(name, revision=revision)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")  # which the tokenizer never calls
            with tokenizer_errors("its tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        checked_config(name, revision=revision)
        model = AutoModelForSeq2SeqLM.from_pretrained(name, revision=revision, dtype=DTYPES[precision])
    except ImportError as error:
        said = str(error).strip().split(". ")[0]  # transformers adds where else to read on
        raise ImportError(f"{said}. What translators need: {how_to_install('translate')}") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} can't be loaded as a translation model: {said}") from error
    identity = {"model": Path(name).name if Path(name).is_dir() else name, "revision": _revision(name, model)}
    return Seq2SeqTranslator(
        model.eval().to(target), tokenizer, language, source_language, identity=identity, **options
    )


def _revision(name: str, model: PreTrainedModel) -> str:
    """The commit on the Hub, or a digest of a folder's files: weights that were trained on are other weights."""
    folder = Path(name)
    if not folder.is_dir():
        return str(model.config._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _language_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], dict[str, int]]:
    """Codes with their token ids: those that go before the source, and those that begin the translation."""
    vocabulary = tokenizer.get_vocab()
    found = {token: SOURCE_TOKEN.fullmatch(token) for token in vocabulary}
    before = {match[1] or match[2]: vocabulary[token] for token, match in found.items() if match}
    begins = getattr(tokenizer, "lang_code_to_id", None)
    if begins is None:  # NLLB's has no table
        begins = {token: number for token, number in vocabulary.items() if TARGET_TOKEN.fullmatch(token)}
    return before, {} if before else dict(begins)


def _only_language(tokenizer: PreTrainedTokenizerBase, language: str, prefix: str | None, name: str) -> str:
    """Of a tokenizer without codes: what it says that it writes, or what the prefix is trusted with."""
    written = getattr(tokenizer, "target_lang", None) or getattr(tokenizer, "tgt_lang", None)
    if written and same_language(written).isdisjoint(same_language(language)):
        raise ValueError(f"{name} translates into {written!r} only, not into {language!r}.")
    if not written and prefix is None:
        raise ValueError(
            f"{name} has no codes of languages, so nothing tells it to write {language!r}. Give --source_prefix, such "
            "as 'translate English to Portuguese: ', or '' for a model of one language."
        )
    return written or language

"""Translate sentences with sequence-to-sequence models of transformers (`--backend transformers`).

    python -m captions.translate --dataset data/generated --output data/hi --language hi --model facebook/m2m100_418M

Marian, NLLB, M2M100 and mBART models are supported. A multilingual model gets the target language as a language token,
such as `>>por<<` or `por_Latn`.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from capivara_common.cli import flag
from capivara_common.environment import get_install_command_of_extra, resolve_device
from capivara_common.hub_cache import check_hub_model_reachable
from captions.languages import find_translator_language_code
from captions.translators.base import Translator, translate_in_pieces
from modeling_capivara.checks_capivara import wrap_tokenizer_errors
from modeling_capivara.loading import load_transformers_config

PAPER_MODEL = "Helsinki-NLP/opus-mt-tc-big-en-pt"  # English-Portuguese model of the CAPIVARA paper, arXiv 2310.13683
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest number of tokens in a text that a model translates at once. Longer texts are split: translation models are
# trained on sentences, and often leave out the end of a long paragraph.
MAX_SOURCE_TOKENS = 256
# Language tokens of Marian models, such as `>>por<<`. They name the target language, before the source sentence.
SOURCE_TOKEN_RE = re.compile(r">>(.+)<<")
# Language tokens of NLLB models, such as `por_Latn`. The translation begins with the token of its language.
TARGET_TOKEN_RE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


@dataclass(kw_only=True)
class Seq2SeqFlags:
    """Flags of the backend that translates with a model on this machine (`--backend transformers`)."""

    revision: str | None = flag(None, "Hub branch, tag or commit, only for --backend transformers. Default: main.")
    max_new_tokens: int | None = flag(
        None,
        "Largest number of tokens of a translation, only for --backend transformers. Default: 512, or the limit of the "
        "model if that is lower.",
    )
    precision: Literal["float32", "bf16", "fp16"] = flag(
        "float32", "Data type of the weights and activations, only for --backend transformers."
    )
    device: str | None = flag(None, "cpu or cuda, only for --backend transformers. Default: cuda if there is a GPU.")


class Seq2SeqTranslator(Translator):
    """Translator that runs a sequence-to-sequence model of transformers on this machine.

    Args:
        args: Flags of `captions.translate`. All other options of `generate` come from the model's generation_config.

    Attributes:
        name: Type and name of the model, for messages.
        code: Code of the target language in the spelling of the model, for example "por_Latn".
        fingerprint: Everything that affects a translation, except the sentence itself, as a dict of JSON values.

    Raises:
        ValueError: If the model is not a translation model, or does not know a language.
        ImportError: If the tokenizer needs a package that is not installed.
    """

    flags = Seq2SeqFlags

    @classmethod
    def check_flags(cls, args: Any) -> None:
        """Check that the flag `--model` is given, unless the captions are translated from English to Portuguese.

        The default model translates only from English to Portuguese. Raises ValueError if `--model` is missing for
        other languages.
        """
        if args.model is None and (args.source_language, args.language) != ("en", "pt"):
            raise ValueError(
                f"--model is required to translate {args.source_language} to {args.language}, for example "
                f"facebook/nllb-200-distilled-600M. The default model only translates en to pt."
            )

    @classmethod
    def check(cls, args: Any) -> None:
        """Check that the model knows the source and the target language.

        The check reads the tokenizer of the model. It is skipped if the tokenizer has not been downloaded to this
        machine yet. Raises ValueError if the model does not know a language.
        """
        name = args.model or PAPER_MODEL
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=args.revision, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError, AttributeError):
            # Without the tokenizer, no check is possible now: it is not on this machine yet, or can't be loaded. Later,
            # `load` downloads the model, or raises the error.
            return
        _get_model_language_codes(tokenizer, args, name)

    def __init__(self, args: Any):
        name = args.model or PAPER_MODEL
        self.tokenizer, model = _load_model(name, args.revision, args.precision)
        self.model, tokenizer = model.eval().to(resolve_device(args.device)), self.tokenizer
        self._batch_size = args.batch_size or 32
        self.name = f"{model.config.model_type} {Path(name).name}"
        self._generate_options: dict[str, Any] = {}
        source_tokens, target_tokens = _find_language_token_ids(tokenizer)
        # Language tokens inside a sentence are removed, because they could change the target language.
        self._forbidden_ids = set(source_tokens.values())
        self._language_ids = {*source_tokens.values(), *target_tokens.values()}
        self.code, source_code = _get_model_language_codes(tokenizer, args, self.name)
        self._prefix_ids = [source_tokens[self.code]] if source_tokens else []  # put before each source sentence
        if target_tokens:
            tokenizer.src_lang = source_code
            self._generate_options["forced_bos_token_id"] = target_tokens[self.code]
        # The start token takes one of the model's positions, so at most `positions - 1` tokens can be generated. Models
        # sometimes repeat words endlessly, so by default a translation has at most `2 * MAX_SOURCE_TOKENS` tokens.
        positions = getattr(model.config, "max_position_embeddings", None) or 2 * MAX_SOURCE_TOKENS
        self._max_source_tokens = min(positions, tokenizer.model_max_length, MAX_SOURCE_TOKENS + len(self._prefix_ids))
        self._generate_options["max_new_tokens"] = min(positions - 1, args.max_new_tokens or 2 * MAX_SOURCE_TOKENS)
        # Unset `max_length`: if it and `max_new_tokens` were set, each call of `generate` would log a warning.
        model.generation_config.max_length = None
        settings = model.generation_config.to_diff_dict() | self._generate_options
        settings.pop("transformers_version", None)
        self.fingerprint = {
            "backend": "transformers",
            "model": Path(name).name if Path(name).is_dir() else name,
            "revision": _get_commit_or_folder_digest(name, model),
            "source": getattr(tokenizer, "src_lang", None) or args.source_language,
            "target": self.code,
            "source_prefix": None,  # unused; without this key, stored translations of earlier versions would be ignored
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_source_tokens": self._max_source_tokens,
            "generation": settings,
        }

    @torch.inference_mode()
    def translate(self, sentences: list[str]) -> list[str]:
        """Translate sentences with the model, and return one translation per sentence, in order.

        Args:
            sentences: Sentences to translate. None of them may be blank.

        Raises:
            ValueError: If the memory of the device is insufficient.
        """
        return translate_in_pieces(sentences, self._fits, self._translate_batch, self._batch_size)

    def token_ids(self, text: str) -> list[int]:
        """Tokenize a text for the encoder of the model, and return the token ids.

        For a multilingual Marian model, the first id is the token of the target language. Language tokens inside the
        text, such as `>>por<<`, are removed. Other special tokens, such as `</s>`, are treated as plain text.
        """
        ids = self.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        return self._prefix_ids + [token for token in ids if token not in self._forbidden_ids]

    def _fits(self, text: str) -> bool:
        """Return True if a text is short enough for the model. Longer texts are translated in pieces."""
        return len(self.token_ids(text)) <= self._max_source_tokens

    def _translate_batch(self, texts: list[str]) -> list[str]:
        """Translate a batch of texts that are short enough for the model, and return the translations in order.

        Raises ValueError if the memory of the device is insufficient.
        """
        inputs = self.tokenizer.pad({"input_ids": [self.token_ids(text) for text in texts]}, return_tensors="pt")
        try:
            # `ids` are the token ids of the translations (texts, tokens).
            ids = self.model.generate(**inputs.to(self.model.device), **self._generate_options)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"Out of memory with {len(texts)} sentences at the same time. Lower --batch_size. ({error})"
            ) from error
        # The tokenizers do not skip language tokens when they decode, so remove them here.
        text_ids = [[token for token in row if token not in self._language_ids] for row in ids.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(text_ids, skip_special_tokens=True)]


def _find_language_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], dict[str, int]]:
    """Return the ids of the language tokens of a translation tokenizer.

    Returns:
        Two dicts `{language code: token id}`, at least one of which is empty. The first dict has the tokens that go
        before the source sentence (Marian). The second dict has the tokens that begin the translation (NLLB, M2M100,
        mBART).
    """
    vocabulary = tokenizer.get_vocab()
    source_tokens = {token[2:-2]: number for token, number in vocabulary.items() if SOURCE_TOKEN_RE.fullmatch(token)}
    target_tokens = {token: number for token, number in vocabulary.items() if TARGET_TOKEN_RE.fullmatch(token)}
    # Some tokenizers list their language tokens in the attribute `lang_code_to_id`. The tokenizer of NLLB does not, so
    # its language tokens are found in the vocabulary.
    return source_tokens, {} if source_tokens else getattr(tokenizer, "lang_code_to_id", target_tokens)


def _get_model_language_codes(tokenizer: PreTrainedTokenizerBase, args: Any, name: str) -> tuple[str, str | None]:
    """Return the codes that a translation model uses for the target and the source language.

    Args:
        tokenizer: Tokenizer of the model.
        args: Flags of `captions.translate`, of which `language` and `source_language` are used.
        name: Name of the model, for errors.

    Returns:
        The tuple (target code, source code). The source code is None if the model does not need a source language.

    Raises:
        ValueError: If the model does not know a language.
    """
    source_tokens, target_tokens = _find_language_token_ids(tokenizer)
    only_language = filter(None, [getattr(tokenizer, "target_lang", None)])
    # A Marian model for a single target language has no language tokens. Its tokenizer may name the language instead.
    target = find_translator_language_code(args.language, source_tokens or target_tokens or only_language, name)
    source = find_translator_language_code(args.source_language, target_tokens, name) if target_tokens else None
    return target, source


def _load_model(name: str, revision: str | None, precision: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the tokenizer and the weights of a translation model.

    Args:
        name: Folder or Hub id of the model.
        revision: Branch, tag or commit on the Hub.
        precision: Data type of the weights: a key of `DTYPES`.

    Returns:
        The tokenizer and the model.

    Raises:
        ValueError: If the model does not exist or is not a translation model. The message is a single line.
        ImportError: If the tokenizer needs a package that is not installed.
    """
    try:
        check_hub_model_reachable(name, revision=revision)
        with wrap_tokenizer_errors("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        load_transformers_config(name, revision=revision)
        return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(name, revision=revision, dtype=DTYPES[precision])
    except ImportError as error:
        # Keep only the first sentence of the message, because transformers adds long instructions with links.
        reason = str(error).strip().split(". ")[0]
        raise ImportError(
            f"{reason}. Install the packages for translation: {get_install_command_of_extra('translate')}"
        ) from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} can't be loaded as a translation model: {reason}") from error


def _get_commit_or_folder_digest(name: str, model: PreTrainedModel) -> str:
    """Return a text that identifies the weights of a model, for its fingerprint.

    Args:
        name: Folder or Hub id of the model.
        model: The loaded model.

    Returns:
        The commit of the model on the Hub. For a folder, the SHA-256 hex digest of the names and contents of its files.
    """
    if not Path(name).is_dir():
        return str(model.config._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, Path(name).iterdir())):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

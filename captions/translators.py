"""Translate sentences with sequence-to-sequence models of transformers, or with Google Cloud Translation.

    python -c "from captions.translators import Seq2SeqTranslator as T; print(T('facebook/m2m100_418M', 'hi').code)"

A multilingual model needs a token for the target language. The position of this language token depends on the model:

- Marian models read it before the source sentence, for example `>>por<<`.
- NLLB, M2M100 and mBART write it at the start of the translation.

Decoding does not skip language tokens, so this module removes them from translations.

Google Cloud Translation is called through version 2 ("Basic") of its API, with the official client. The API key is sent
in a header, and only to the host of the service.
"""

import difflib
import hashlib
import itertools
import os
import random
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from langcodes import Language, LanguageTagError
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from capivara_common.environment import install_command, resolve_device
from capivara_common.hub_cache import check_reachable
from captions.stages import batch_by_length
from modeling_capivara.checks_capivara import wrap_tokenizer_errors
from modeling_capivara.loading import load_config

MAX_NAMED_CODES = 8  # largest number of language codes in an error message
# Regular expressions of positions at which to split a long text, in order of preference: between sentences (in Chinese
# and Japanese, no blank follows a sentence), between clauses, between words.
BOUNDARIES = (r"(?<=[.!?…।॥؟])\s+|(?<=[。！？])|\n+", r"(?<=[,;:،؛、])\s+|(?<=[，；：])", r"\s+")

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest number of tokens in a text that a model translates at once. Longer texts are split, because translation models
# are trained on sentences, and often do not translate the end of a long paragraph.
MAX_SOURCE_TOKENS = 256
SOURCE_TOKEN_RE = re.compile(r">>(.+)<<")  # language tokens of Marian models, which go before the source sentence
TARGET_TOKEN_RE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # language tokens of NLLB, which begin the translation
GOOGLE_MODULES = ("google.auth", "google.cloud.translate_v2")  # modules that the extra `google` installs
GOOGLE_MAX_CHARACTERS = 5_000  # largest number of characters per request that Google recommends
API_KEY_VARIABLE = "GOOGLE_API_KEY"
GOOGLE_ENDPOINT = "https://translation.googleapis.com"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")  # hosts that may be called without encryption
GOOGLE_MAX_SENTENCES = 128  # largest number of sentences per request that version 2 of Google's API accepts
REQUEST_TIMEOUT_S = 60.0
MAX_TRIES = 8  # largest number of attempts per request, with exponential backoff and jitter
# Shortest and longest time between two attempts, in seconds. One minute is long enough, because Google's quotas are per
# minute (cloud.google.com/translate/quotas).
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0
RETRYABLE_STATUS_CODES = {408, 429, 500, 502, 503, 504}  # HTTP status codes of failures that may be temporary


# Language codes. Each translator has other codes: for the language `pt` of a column `captions-pt`, a translator may use
# `>>por<<`, `por_Latn`, `pt_XX` or `pt`.


def parse_language(code: str) -> Language | None:
    """Parse a language code to its language, script and region.

    Args:
        code: BCP 47 code such as "pt-BR", or the code of a translator such as "por_Latn".

    Returns:
        The parsed code; None if the code is invalid.
    """
    try:
        return Language.get(code.strip()).prefer_macrolanguage()
    except LanguageTagError:
        return None


def find_language_code(language: str, codes: Iterable[str], translator_name: str = "The translator") -> str:
    """Find the code that a translator uses for a language.

    Args:
        language: ISO 639 code, optionally with script or region, for example "pt", "por", "zh-Hant" or "pt-BR".
        codes: All language codes of the translator.
        translator_name: Name of the translator, for the error message.

    Returns:
        A code for the same language in the same script. If several codes match, a code that is spelled like `language`
        is preferred, then a code with the same region as `language`, then a code without a region.

    Raises:
        ValueError: If no code matches. The message lists the most similar codes.
    """
    codes, wanted = list(codes), parse_language(language)
    parsed = {code: parse_language(code) for code in codes}
    matches = [code for code in codes if wanted and parsed[code] and _is_same_language(wanted, parsed[code])]
    if matches:
        return min(matches, key=lambda code: (code != language, parsed[code] != wanted, bool(parsed[code].territory)))
    near = sorted(codes, key=lambda code: -difflib.SequenceMatcher(None, language.lower(), code.lower()).ratio())
    raise ValueError(
        f"{translator_name} does not know the language {language!r}. The most similar of its {len(codes)} codes are "
        f"{', '.join(near[:MAX_NAMED_CODES])}."
    )


def _is_same_language(wanted: Language, other: Language) -> bool:
    """Return True if two language codes mean the same language in the same script.

    Codes with two different regions (pt-BR and pt-PT) are not the same. A code without a region matches any region.
    """
    regions = {wanted.territory, other.territory} - {None, "XX"}  # in codes of mBART, XX means no region
    return (
        wanted.language == other.language and len(regions) < 2 and wanted.maximize().script == other.maximize().script
    )


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Split a text into pieces that are short enough for a translator, each as long as possible.

    The text is split between sentences if possible, otherwise between clauses, then between words. A word that is too
    long is split in the middle. A single character is never split, even if it is too long.

    Args:
        text: The text.
        fits: Function that returns True if a text is short enough.

    Returns:
        The pieces in order. If the text is short enough, the list contains only the text.
    """
    if len(text) < 2 or fits(text):
        return [text]
    for boundary in BOUNDARIES:
        units = [unit for unit in re.split(boundary, text) if unit.strip()]
        if len(units) > 1:
            break
    else:
        return split_text(text[: len(text) // 2], fits) + split_text(text[len(text) // 2 :], fits)
    pieces: list[str] = []
    for unit in units:
        for part in split_text(unit, fits):
            if pieces and fits(f"{pieces[-1]} {part}"):
                pieces[-1] += f" {part}"
            else:
                pieces.append(part)
    return pieces


def translate_in_pieces(
    sentences: list[str],
    fits: Callable[[str], bool],
    translate_batch: Callable[[list[str]], list[str]],
    max_texts: int,
    max_characters: int = sys.maxsize,
) -> list[str]:
    """Translate sentences of any length in batches.

    A sentence that is too long for the translator is split into pieces, which are translated separately.

    Args:
        sentences: Sentences to translate.
        fits: Function that returns True if a text is short enough for the translator.
        translate_batch: Function that returns the translations of a batch of texts, in order.
        max_texts: Largest number of texts in a batch.
        max_characters: Largest number of characters in a batch.

    Returns:
        One translation per sentence. The translations of the pieces of a sentence are joined with blanks.
    """
    pieces = [split_text(sentence, fits) for sentence in sentences]
    batches = batch_by_length(itertools.chain.from_iterable(pieces), max_characters, max_texts)
    translations = (text for batch in batches for text in translate_batch(batch))
    return [" ".join(itertools.islice(translations, len(texts))).strip() for texts in pieces]


# Translators


class Seq2SeqTranslator:
    """A sequence-to-sequence model that translates from one language into another.

    Args:
        name: Folder or Hub id of a Marian, NLLB, M2M100 or mBART-50 model.
        language: Code of the target language.
        source_language: Code of the source language.
        revision: Branch, tag or commit on the Hub.
        precision: Data type of weights and activations: float32, bf16 or fp16.
        device: cpu or cuda. Default: cuda if a GPU is available.
        batch_size: Number of texts to translate at the same time.
        max_new_tokens: Largest number of tokens of a translation. Default: 512, or the limit of the model if that is
            lower. All other options of `generate` come from the model's generation_config.

    Attributes:
        name: Type and name of the model, for messages.
        code: The code that the model uses for the target language.
        fingerprint: Everything that affects a translation, except the sentence itself, as a dict of JSON values.
            Translators with equal fingerprints can share their translations.

    Raises:
        ValueError: If the model is not a translation model or does not know a language (the message lists similar
            codes). The method `translate` also raises ValueError, if the memory of the device is insufficient.
        ImportError: If the tokenizer needs a package that is not installed.
    """

    def __init__(
        self,
        name: str,
        language: str,
        source_language: str = "en",
        revision: str | None = None,
        precision: str = "float32",
        device: str | None = None,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
    ):
        self.tokenizer, model = _load_model(name, revision, precision)
        self.model, tokenizer = model.eval().to(resolve_device(device)), self.tokenizer
        self._batch_size = batch_size
        self.name = f"{model.config.model_type} {Path(name).name}"
        self._prefix_ids: list[int] = []  # token ids before each source sentence
        self._generate_options: dict[str, Any] = {}
        source_tokens, target_tokens = _find_language_token_ids(tokenizer)
        self._forbidden_ids = {*source_tokens.values()}  # token ids that are removed from source sentences
        self._language_ids = {*source_tokens.values(), *target_tokens.values()}
        self.code, source_code = _codes(tokenizer, language, source_language, self.name)
        if source_tokens:
            self._prefix_ids = [source_tokens[self.code]]
        elif target_tokens:
            tokenizer.src_lang = source_code
            self._generate_options["forced_bos_token_id"] = target_tokens[self.code]
        # The start token needs one of the model's positions. The limit of twice the source length ends repetition
        # loops, and no correct translation is longer.
        positions = getattr(model.config, "max_position_embeddings", None) or 2 * MAX_SOURCE_TOKENS
        self._max_source_tokens = min(positions, tokenizer.model_max_length, MAX_SOURCE_TOKENS + len(self._prefix_ids))
        self._generate_options["max_new_tokens"] = min(positions - 1, max_new_tokens or 2 * MAX_SOURCE_TOKENS)
        model.generation_config.max_length = None  # if it were set, `generate` would warn about `max_new_tokens`
        settings = model.generation_config.to_diff_dict() | self._generate_options
        settings.pop("transformers_version", None)
        self.fingerprint = {
            "backend": "transformers",
            "model": Path(name).name if Path(name).is_dir() else name,
            "revision": _resolve_revision(name, model),
            "source": getattr(tokenizer, "src_lang", None) or source_language,
            "target": self.code,
            "source_prefix": None,  # a key of earlier versions; it keeps existing translation memories valid
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_source_tokens": self._max_source_tokens,
            "generation": settings,
        }

    @torch.inference_mode()
    def translate(self, sentences: list[str]) -> list[str]:
        """Translate sentences, and return one translation per sentence, in order. Sentences must not be blank."""
        return translate_in_pieces(sentences, self._fits, self._translate_batch, self._batch_size)

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids that the encoder reads for a text, with a language token in front if it needs one.

        If the text itself contains a special token such as `</s>`, it is treated as plain text. A language token in the
        text is removed.
        """
        ids = self.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        return self._prefix_ids + [token for token in ids if token not in self._forbidden_ids]

    def _fits(self, text: str) -> bool:
        """Return True if a text has few enough tokens to be translated at once."""
        return len(self.token_ids(text)) <= self._max_source_tokens

    def _translate_batch(self, texts: list[str]) -> list[str]:
        """Translate a batch of texts that are short enough for the model, and return the translations in order.

        Raises ValueError if the memory of the device is insufficient.
        """
        inputs = self.tokenizer.pad({"input_ids": [self.token_ids(text) for text in texts]}, return_tensors="pt")
        try:
            ids = self.model.generate(**inputs.to(self.model.device), **self._generate_options)  # (texts, tokens)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"Out of memory with {len(texts)} sentences at the same time. Lower --batch_size. ({error})"
            ) from error
        text_ids = [[token for token in row if token not in self._language_ids] for row in ids.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(text_ids, skip_special_tokens=True)]


def check_languages(model: str, revision: str | None, language: str, source_language: str) -> None:
    """Check that a translation model knows both languages, if its tokenizer is on this machine. Nothing is downloaded.

    Args:
        model: Folder or Hub id of the model.
        revision: Branch, tag or commit on the Hub.
        language: Code of the target language.
        source_language: Code of the source language.

    Raises:
        ValueError: If the model does not know a language.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, AttributeError):
        return  # `Seq2SeqTranslator` will download the model, or raise the error
    _codes(tokenizer, language, source_language, model)


def _find_language_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], dict[str, int]]:
    """Return the language codes of a translation tokenizer with the ids of their language tokens.

    Returns:
        Two dicts from language code to token id, at least one of which is empty. The first dict has the tokens that go
        before the source sentence (Marian). The second dict has the tokens that begin the translation (NLLB, M2M100,
        mBART).
    """
    vocabulary = tokenizer.get_vocab()
    source_tokens = {token[2:-2]: number for token, number in vocabulary.items() if SOURCE_TOKEN_RE.fullmatch(token)}
    target_tokens = {token: number for token, number in vocabulary.items() if TARGET_TOKEN_RE.fullmatch(token)}
    # The tokenizer of NLLB has no attribute `lang_code_to_id`, so its language tokens are found in the vocabulary.
    return source_tokens, {} if source_tokens else getattr(tokenizer, "lang_code_to_id", target_tokens)


def _codes(
    tokenizer: PreTrainedTokenizerBase, language: str, source_language: str, name: str
) -> tuple[str, str | None]:
    """Return the codes that a translation model uses for two languages.

    Args:
        tokenizer: Tokenizer of the model.
        language: Code of the target language.
        source_language: Code of the source language.
        name: Name of the model, for errors.

    Returns:
        The model's code for the target language, and for the source language. The latter is None if the model does not
        need a source language.

    Raises:
        ValueError: If the model does not know a language.
    """
    source_tokens, target_tokens = _find_language_token_ids(tokenizer)
    only_language = filter(None, [getattr(tokenizer, "target_lang", None)])
    # A Marian model for a single target language has no language tokens.
    target = find_language_code(language, source_tokens or target_tokens or only_language, name)
    return target, find_language_code(source_language, target_tokens, name) if target_tokens else None


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
        check_reachable(name, revision=revision)
        with wrap_tokenizer_errors("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        load_config(name, revision=revision)
        return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(name, revision=revision, dtype=DTYPES[precision])
    except ImportError as error:
        reason = str(error).strip().split(". ")[0]  # remove the links that transformers adds
        raise ImportError(f"{reason}. Install the packages for translation: {install_command('translate')}") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} can't be loaded as a translation model: {reason}") from error


def _resolve_revision(name: str, model: PreTrainedModel) -> str:
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


class GoogleTranslator:
    """A client of Google Cloud Translation that translates from one language into another.

    The API key is read from the environment variable GOOGLE_API_KEY.

    Args:
        language: Code of the target language.
        source_language: Code of the source language.
        endpoint: URL of the service. Default: Google's URL.

    Attributes:
        code: The code that Google uses for the target language.
        fingerprint: Everything that affects a translation, except the sentence itself, as a dict of JSON values.
            Translators with equal fingerprints can share their translations.

    Raises:
        ValueError: If the key is missing or refused, or the service does not know a language.
        OSError: If the service cannot be reached.
    """

    name = "Google Translate"

    def __init__(self, language: str, source_language: str, endpoint: str | None = None):
        self._key = os.environ.get(API_KEY_VARIABLE, "").strip()
        self._client = _make_client(endpoint or GOOGLE_ENDPOINT, self._key)
        codes = self._retry(lambda: [entry["language"] for entry in self._client.get_languages()])
        self.code, self._source_code = (
            find_language_code(code, codes, self.name) for code in (language, source_language)
        )
        self.fingerprint = {"backend": "google", "api": "v2", "source": self._source_code, "target": self.code}

    def translate(self, sentences: list[str]) -> list[str]:
        """Translate sentences, and return one translation per sentence, in order. Sentences must not be blank."""

        def fits(text: str) -> bool:
            return len(text) <= GOOGLE_MAX_CHARACTERS

        def translate_batch(texts: list[str]) -> list[str]:
            return self._retry(lambda: self._request_translations(texts))

        return translate_in_pieces(sentences, fits, translate_batch, GOOGLE_MAX_SENTENCES, GOOGLE_MAX_CHARACTERS)

    def _request_translations(self, texts: list[str]) -> list[str]:
        """Send one request, and return the translations of the texts, in order.

        Raises TypeError if the response does not contain one translation per text.
        """
        languages = {"target_language": self.code, "source_language": self._source_code}
        translations = [
            entry.get("translatedText") for entry in self._client.translate(texts, format_="text", **languages)
        ]
        if len(translations) != len(texts) or not all(isinstance(text, str) for text in translations):
            raise TypeError("the response contained no translation")
        return translations

    def _retry(self, request: Callable[[], Any]) -> Any:
        """Send a request, and send it again after a failure that may be temporary.

        Args:
            request: Function that sends the request and returns the result.

        Returns:
            The result of the function.

        Raises:
            ValueError: If Google refuses the request.
            ConnectionError: If the request has failed `MAX_TRIES` times.
        """
        for attempt in range(MAX_TRIES):
            if attempt:
                time.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), MAX_WAIT_S) * random.uniform(0.5, 1.0))
            try:
                return request()
            except Exception as error:  # the client and the HTTP libraries raise errors of many types
                reason, is_temporary = self._describe_failure(error)
            # The error is raised outside of `except`, so that the original error, which may contain the API key, is not
            # chained to it.
            if not is_temporary:
                raise ValueError(
                    "Google refuses the request. Check the key, its permissions and its quota. Google's reason: "
                    f"{reason}"
                )
        raise ConnectionError(
            f"Google has failed {MAX_TRIES} times. The last reason: {reason}. All finished translations are saved; run "
            "the same command again to continue."
        )

    def _describe_failure(self, error: Exception) -> tuple[str, bool]:
        """Explain why a request failed.

        Args:
            error: The exception that the request raised.

        Returns:
            The reason as a text without the API key, and True if the failure may be temporary.
        """
        from google.api_core.exceptions import GoogleAPICallError

        reason = f"{error or type(error).__name__}"
        for form in (self._key, urllib.parse.quote(self._key, safe=""), repr(self._key)[1:-1]):
            reason = reason.replace(form, "<key>")
        if isinstance(error, GoogleAPICallError):
            # Google answers with status 403, which is not in the list, also if a rate limit is exceeded.
            return reason, error.code in RETRYABLE_STATUS_CODES or "rate limit exceeded" in reason.lower()
        # The client raises these types if a response is not valid JSON or incomplete. Their messages would not help,
        # because they are about the code of the client.
        is_bad_response = isinstance(error, LookupError | AttributeError | TypeError | ValueError)
        if is_bad_response and not isinstance(error, OSError):
            reason = "the response contained no translation"
        return reason, True


def _make_client(endpoint: str, key: str) -> Any:
    """Return the official client of Google Cloud Translation.

    Args:
        endpoint: URL of the service.
        key: API key.

    Raises:
        ValueError: If the key is missing or has invalid characters, or the URL is not encrypted (https).
    """
    address = urllib.parse.urlsplit(endpoint)
    if address.scheme != "https" and not (address.scheme == "http" and address.hostname in LOOPBACK_HOSTS):
        raise ValueError(f"The endpoint must begin with https://, to protect the key, got {endpoint!r}.")
    if not re.fullmatch(r"[!-~]+", key):
        state = "contains blanks or special characters" if key else "is not set"
        raise ValueError(
            f"--backend google needs a key of the Google Cloud Translation API in the environment variable "
            f"{API_KEY_VARIABLE}, which {state}."
        )
    from google.auth import api_key
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import translate_v2

    class Session(AuthorizedSession):
        """An HTTP session with a timeout and without redirects, which would forward the API key to another host."""

        def request(self, method: str, url: str, **options: Any) -> Any:
            return super().request(method, url, **options | {"timeout": REQUEST_TIMEOUT_S, "allow_redirects": False})

    credentials = api_key.Credentials(key)
    session = Session(credentials, max_refresh_attempts=0)  # do not retry: Google will refuse the same key again
    return translate_v2.Client(credentials=credentials, _http=session, client_options={"api_endpoint": endpoint})

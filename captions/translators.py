"""Translators: sequence-to-sequence models of transformers, and Google Cloud Translation.

    python -c "from captions.translators import Seq2SeqTranslator as T; print(T('facebook/m2m100_418M', 'hi').code)"

A multilingual model needs a token for the target language, and the tokenizer shows where: Marian models have tokens
such as `>>por<<`, which go before the source sentence; NLLB, M2M100 and mBART begin the translation with a language
token. Decoding does not skip these tokens, so they are removed here. Google's API is version 2 ("Basic"), called with
its official client; the key travels in a header, and only to Google's host.
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

MAX_NAMED_CODES = 8  # language codes that an error lists
# Where to split a long text, in order of preference: after sentences (in Chinese and Japanese, no blank follows), after
# clauses, after words.
BOUNDARIES = (r"(?<=[.!?…।॥؟])\s+|(?<=[。！？])|\n+", r"(?<=[,;:،؛、])\s+|(?<=[，；：])", r"\s+")

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest number of tokens in a piece of text. Models are trained on sentences, and drop the end of long paragraphs.
MAX_SOURCE_TOKENS = 256
SOURCE_TOKEN_RE = re.compile(r">>(.+)<<")  # language tokens of Marian
TARGET_TOKEN_RE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # language tokens of NLLB
GOOGLE_MODULES = ("google.auth", "google.cloud.translate_v2")  # packages of the extra `google`
GOOGLE_MAX_CHARACTERS = 5_000  # per request, as Google recommends
API_KEY_VARIABLE = "GOOGLE_API_KEY"
GOOGLE_ENDPOINT = "https://translation.googleapis.com"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
GOOGLE_MAX_SENTENCES = 128  # per request, limit of version 2
REQUEST_TIMEOUT_S = 60.0
MAX_TRIES = 8  # attempts per request, with exponential backoff and jitter
# Seconds between attempts. Google's quotas are per minute: cloud.google.com/translate/quotas.
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0
RETRYABLE_STATUS_CODES = {408, 429, 500, 502, 503, 504}


# Language codes: a translator calls `pt`, as in our column names, `>>por<<`, `por_Latn`, `pt_XX` or `pt`.


def parse_language(code: str) -> Language | None:
    """Parse a code of BCP 47 or of a translator to language, script and region. Returns None if it is invalid."""
    try:
        return Language.get(code.strip()).prefer_macrolanguage()
    except LanguageTagError:
        return None


def find_language_code(language: str, codes: Iterable[str], translator_name: str = "The translator") -> str:
    """Find a translator's code for a language.

    Args:
        language: ISO 639 code, with script or region if needed: pt, por, zh-Hant, pt-BR.
        codes: All codes of the translator.
        translator_name: Name of the translator, for the error.

    Returns:
        The code that means the same language in the same script. The same text is preferred, then the same region, then
        a code without a region.

    Raises:
        ValueError: If no code matches; the message lists the most similar codes.
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
    """Tell whether two codes mean the same language in the same script.

    Two different regions differ; a region and no region do not.
    """
    regions = {wanted.territory, other.territory} - {None, "XX"}  # mBART writes XX for no region
    return (
        wanted.language == other.language and len(regions) < 2 and wanted.maximize().script == other.maximize().script
    )


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Split a text into the longest possible pieces that fit, in order.

    A word that does not fit is cut in half. A single letter is a piece even if it does not fit.

    Args:
        text: The text.
        fits: Tells whether a piece is short enough.

    Returns:
        The pieces; only the text itself if it fits.
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

    Args:
        sentences: The sentences.
        fits: Tells whether a text is short enough for the translator; longer sentences are split.
        translate_batch: Returns the translations of a batch of texts.
        max_texts: Largest number of texts in a batch.
        max_characters: Largest number of characters in a batch.

    Returns:
        One translation per sentence; the translations of pieces are joined with blanks.
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
        max_new_tokens: Largest number of tokens of a translation. The other options of the search come from the model's
            generation_config.

    Attributes:
        name: Type and name of the model, for messages.
        code: The model's code of the target language.
        fingerprint: Everything besides the sentence that a translation depends on, as JSON values.

    Raises:
        ValueError: If the model is not a translation model or does not know a language (the message lists similar
            codes); in `translate`, if the memory of the device is insufficient.
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
        source_tokens, target_tokens = _language_tokens(tokenizer)
        self._forbidden_ids = {*source_tokens.values()}  # token ids that are removed from source sentences
        self._language_ids = {*source_tokens.values(), *target_tokens.values()}
        self.code, source_code = _codes(tokenizer, language, source_language, self.name)
        if source_tokens:
            self._prefix_ids = [source_tokens[self.code]]
        elif target_tokens:
            tokenizer.src_lang = source_code
            self._generate_options["forced_bos_token_id"] = target_tokens[self.code]
        # The start token takes one of the model's positions. Twice the source length is longer than any translation
        # needs, and ends repetition loops.
        positions = getattr(model.config, "max_position_embeddings", None) or 2 * MAX_SOURCE_TOKENS
        self._max_source_tokens = min(positions, tokenizer.model_max_length, MAX_SOURCE_TOKENS + len(self._prefix_ids))
        self._generate_options["max_new_tokens"] = min(positions - 1, max_new_tokens or 2 * MAX_SOURCE_TOKENS)
        model.generation_config.max_length = None  # otherwise each call of `generate` warns about two limits
        settings = model.generation_config.to_diff_dict() | self._generate_options
        settings.pop("transformers_version", None)
        self.fingerprint = {
            "backend": "transformers",
            "model": Path(name).name if Path(name).is_dir() else name,
            "revision": _resolve_revision(name, model),
            "source": getattr(tokenizer, "src_lang", None) or source_language,
            "target": self.code,
            "source_prefix": None,  # recorded by earlier versions; keeps their translation memories valid
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_source_tokens": self._max_source_tokens,
            "generation": settings,
        }

    @torch.inference_mode()
    def translate(self, sentences: list[str]) -> list[str]:
        """Return one translation per sentence. Sentences must not be blank."""
        return translate_in_pieces(sentences, self._fits, self._translate_batch, self._batch_size)

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids that the encoder reads for a text.

        Language tokens and special tokens such as `</s>` in the text are treated as plain text or removed.
        """
        ids = self.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        return self._prefix_ids + [token for token in ids if token not in self._forbidden_ids]

    def _fits(self, text: str) -> bool:
        """Tell whether a text is short enough for the encoder."""
        return len(self.token_ids(text)) <= self._max_source_tokens

    def _translate_batch(self, texts: list[str]) -> list[str]:
        """Translate texts that fit. Raises ValueError if the memory is insufficient."""
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
    """Check that a translation model on this machine knows the languages. Nothing is downloaded.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        language: Code of the target language.
        source_language: Code of the source language.

    Raises:
        ValueError: If the model does not know a language. A model that is not on this machine raises nothing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, AttributeError):
        return  # `Seq2SeqTranslator` downloads the model, or reports its error
    _codes(tokenizer, language, source_language, model)


def _language_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], dict[str, int]]:
    """Return the language codes of a tokenizer with their token ids, in two dicts.

    The first has the tokens that go before the source (Marian), the second those that begin the translation (NLLB,
    M2M100, mBART). At least one is empty.
    """
    vocabulary = tokenizer.get_vocab()
    source_tokens = {token[2:-2]: number for token, number in vocabulary.items() if SOURCE_TOKEN_RE.fullmatch(token)}
    target_tokens = {token: number for token, number in vocabulary.items() if TARGET_TOKEN_RE.fullmatch(token)}
    # The tokenizer of NLLB has no such attribute.
    return source_tokens, {} if source_tokens else getattr(tokenizer, "lang_code_to_id", target_tokens)


def _codes(
    tokenizer: PreTrainedTokenizerBase, language: str, source_language: str, name: str
) -> tuple[str, str | None]:
    """Return the model's codes of the target and source languages; the source code is None if it needs none.

    Raises ValueError if the model does not know a language.
    """
    source_tokens, target_tokens = _language_tokens(tokenizer)
    only_language = filter(None, [getattr(tokenizer, "target_lang", None)])
    # A Marian model for a single target language has no language tokens.
    target = find_language_code(language, source_tokens or target_tokens or only_language, name)
    return target, find_language_code(source_language, target_tokens, name) if target_tokens else None


def _load_model(name: str, revision: str | None, precision: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load tokenizer and model. Raises ValueError or ImportError, with the reason in one line."""
    try:
        check_reachable(name, revision=revision)
        with wrap_tokenizer_errors("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        load_config(name, revision=revision)
        return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(name, revision=revision, dtype=DTYPES[precision])
    except ImportError as error:
        reason = str(error).strip().split(". ")[0]  # without the links that transformers adds
        raise ImportError(f"{reason}. Install the packages for translation: {install_command('translate')}") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} can't be loaded as a translation model: {reason}") from error


def _resolve_revision(name: str, model: PreTrainedModel) -> str:
    """Return the commit on the Hub, or the SHA-256 digest of all files in a local folder."""
    if not Path(name).is_dir():
        return str(model.config._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, Path(name).iterdir())):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class GoogleTranslator:
    """Google Cloud Translation, from one language into another.

    The key comes from the environment variable GOOGLE_API_KEY.

    Args:
        language: Code of the target language.
        source_language: Code of the source language.
        endpoint: Address of the service, if it is not Google's.

    Attributes:
        code: Google's code of the target language.
        fingerprint: Everything besides the sentence that a translation depends on, as JSON values.

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
        """Return one translation per sentence. Sentences must not be blank."""

        def fits(text: str) -> bool:
            return len(text) <= GOOGLE_MAX_CHARACTERS

        def translate_batch(texts: list[str]) -> list[str]:
            return self._retry(lambda: self._request_translations(texts))

        return translate_in_pieces(sentences, fits, translate_batch, GOOGLE_MAX_SENTENCES, GOOGLE_MAX_CHARACTERS)

    def _request_translations(self, texts: list[str]) -> list[str]:
        """Send one request, and return the translations of its texts."""
        languages = {"target_language": self.code, "source_language": self._source_code}
        translations = [
            entry.get("translatedText") for entry in self._client.translate(texts, format_="text", **languages)
        ]
        if len(translations) != len(texts) or not all(isinstance(text, str) for text in translations):
            raise TypeError("the response contained no translation")
        return translations

    def _retry(self, request: Callable[[], Any]) -> Any:
        """Send a request, and repeat it while its failure may be temporary.

        Raises ValueError if Google refuses the request, and ConnectionError after `MAX_TRIES` failures.
        """
        for attempt in range(MAX_TRIES):
            if attempt:
                time.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), MAX_WAIT_S) * random.uniform(0.5, 1.0))
            try:
                return request()
            except Exception as error:  # google, requests, urllib3, and responses that are not JSON
                reason, is_temporary = self._describe_failure(error)
            # Outside of `except`, so that the original error, which may contain the key, is not chained to the new one.
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
        """Return the reason of a failed request, without the key, and whether the failure may be temporary."""
        from google.api_core.exceptions import GoogleAPICallError

        reason = f"{error or type(error).__name__}"
        for form in (self._key, urllib.parse.quote(self._key, safe=""), repr(self._key)[1:-1]):
            reason = reason.replace(form, "<key>")
        if isinstance(error, GoogleAPICallError):
            # Google also answers 403 if a rate limit is exceeded.
            return reason, error.code in RETRYABLE_STATUS_CODES or "rate limit exceeded" in reason.lower()
        # These types mean that the response was not JSON or too short; their messages are about the client's code.
        is_bad_response = isinstance(error, LookupError | AttributeError | TypeError | ValueError)
        if is_bad_response and not isinstance(error, OSError):
            reason = "the response contained no translation"
        return reason, True


def _make_client(endpoint: str, key: str) -> Any:
    """Make the official client. Raises ValueError if the key is missing, or the address is not encrypted."""
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
        """A session with a timeout and without redirects: `requests` would forward the key to the new host."""

        def request(self, method: str, url: str, **options: Any) -> Any:
            return super().request(method, url, **options | {"timeout": REQUEST_TIMEOUT_S, "allow_redirects": False})

    credentials = api_key.Credentials(key)
    session = Session(credentials, max_refresh_attempts=0)  # a refused key stays refused
    return translate_v2.Client(credentials=credentials, _http=session, client_options={"api_endpoint": endpoint})

"""What can translate: sequence-to-sequence models of transformers, and Google's service.

    python -c "from captions.translators import Seq2SeqTranslator as T; print(T('facebook/m2m100_418M', 'hi').code)"

How a model is told the language it shall write is read off its tokenizer: Marian's have a token for each, `>>por<<`,
which goes before the sentence; NLLB, M2M100 and mBART begin the translation with one. Neither is skipped in decoding.
Google's is version 2 of the service ("Basic"), by its official client; the key travels in a header, to no other host.
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

MAX_NAMED_CODES = 8  # codes that an error shows
# Where a text is cut, the best place first: ends of sentences, with no blank behind them in Chinese and Japanese; then
# of clauses; then of words.
BOUNDARIES = (r"(?<=[.!?…।॥؟])\s+|(?<=[。！？])|\n+", r"(?<=[,;:،؛、])\s+|(?<=[，；：])", r"\s+")

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SOURCE_TOKENS = 256  # of a piece: translation models learn from sentences, and lose the rest of long paragraphs
SOURCE_TOKEN_RE = re.compile(r">>(.+)<<")  # Marian's
TARGET_TOKEN_RE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # NLLB's
GOOGLE_MODULES = ("google.auth", "google.cloud.translate_v2")  # of the extra `google`
GOOGLE_MAX_CHARACTERS = 5_000  # of a request, as Google advises
API_KEY_VARIABLE = "GOOGLE_API_KEY"
GOOGLE_ENDPOINT = "https://translation.googleapis.com"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
GOOGLE_MAX_SENTENCES = 128  # of a request, version 2 of the service
REQUEST_TIMEOUT_S = 60.0
MAX_TRIES = 8  # of a request, with pauses that double and lose a random part
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0  # Google's quotas are by the minute, cloud.google.com/translate/quotas
RETRYABLE_STATUS_CODES = {408, 429, 500, 502, 503, 504}


# Names of languages: `pt` of the columns is `>>por<<`, `por_Latn`, `pt_XX` or `pt` to a translator.


def parse_language(code: str) -> Language | None:
    """What a code means, of BCP 47 or a translator's own: language, with a script or region where it has one."""
    try:
        return Language.get(code.strip()).prefer_macrolanguage()
    except LanguageTagError:
        return None


def find_language_code(language: str, codes: Iterable[str], translator_name: str = "The translator") -> str:
    """The code of `codes`, what a translator calls its languages, that means `language`: of ISO 639, with a script or
    region where it matters: pt, por, zh-Hant, pt-BR.

    Raises ValueError where there is none, and the nearest are named.
    """
    codes, wanted = list(codes), parse_language(language)
    known = {code: one for code in codes if (one := parse_language(code)) and wanted and _is_same_language(wanted, one)}
    if found := sorted(known, key=lambda code: (code != language, known[code] != wanted, bool(known[code].territory))):
        return found[0]
    near = sorted(codes, key=lambda code: -difflib.SequenceMatcher(None, language.lower(), code.lower()).ratio())
    raise ValueError(
        f"{translator_name} does not know the language {language!r}; of its {len(codes)} codes the nearest are "
        f"{', '.join(near[:MAX_NAMED_CODES])}."
    )


def _is_same_language(wanted: Language, other: Language) -> bool:
    """Whether two codes mean one language in one script; two regions differ, one and none do not."""
    regions = {one.territory for one in (wanted, other)} - {None, "XX"}  # XX is mBART's for "none"
    return (
        wanted.language == other.language and len(regions) < 2 and wanted.maximize().script == other.maximize().script
    )


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Pieces of `text` that fit, as long as possible, in order; `text` itself where it fits.

    A word that does not fit is cut into halves. A single letter is a piece even if it does not fit.
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
    group_limits: tuple[int, int],
    translate_batch: Callable[[list[str]], list[str]],
) -> list[str]:
    """One translation a sentence, `made_of` `groups` of these `limits`; those of pieces are joined by blanks."""
    pieces = [split_text(sentence, fits) for sentence in sentences]
    made = (
        text
        for some in batch_by_length(itertools.chain.from_iterable(pieces), *group_limits)
        for text in translate_batch(some)
    )
    return [" ".join(itertools.islice(made, len(some))).strip() for some in pieces]


# What translates


class Seq2SeqTranslator:
    """A model, told the languages that it writes and reads.

    Args:
        name: folder or Hub id; `revision` is of the latter.
        batch_size: sentences, or pieces of long ones, that go through at once.
        max_new_tokens: of a translation; the search is as the model's generation_config says.

    Raises:
        ValueError: it is no model that translates, or does not know a language; the nearest codes are named. Or, later,
            the memory of the device does not suffice.
        ImportError: its tokenizer needs a package that is not there.
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
        self._prefix_ids: list[int] = []  # token ids before every sentence
        self._generate_options: dict[str, Any] = {}  # of `generate`
        before, begins = _language_tokens(tokenizer)
        self._forbidden_ids = {*before.values()}  # token ids that a caption must not have
        self._language_ids = {*before.values(), *begins.values()}
        self.code, source_code = _codes(tokenizer, language, source_language, self.name)
        if before:
            self._prefix_ids = [before[self.code]]
        elif begins:
            tokenizer.src_lang = source_code
            self._generate_options["forced_bos_token_id"] = begins[self.code]
        # Within what the model has positions for, of which one is the start token's. Twice the source is more than
        # languages differ by, and ends a loop.
        positions = getattr(model.config, "max_position_embeddings", None) or 2 * MAX_SOURCE_TOKENS
        self._max_source_tokens = min(positions, tokenizer.model_max_length, MAX_SOURCE_TOKENS + len(self._prefix_ids))
        self._generate_options["max_new_tokens"] = min(positions - 1, max_new_tokens or 2 * MAX_SOURCE_TOKENS)
        model.generation_config.max_length = None  # else `generate` warns at every call that it has two limits
        settings = model.generation_config.to_diff_dict() | self._generate_options
        settings.pop("transformers_version", None)
        self.fingerprint = {
            "backend": "transformers",
            "model": Path(name).name if Path(name).is_dir() else name,
            "revision": _resolve_revision(name, model),
            "source": getattr(tokenizer, "src_lang", None) or source_language,
            "target": self.code,
            "source_prefix": None,  # what earlier versions could have: their memories stay
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_source_tokens": self._max_source_tokens,
            "generation": settings,
        }

    @torch.inference_mode()
    def translate(self, sentences: list[str]) -> list[str]:
        """One translation a sentence."""
        return translate_in_pieces(sentences, self._fits, (sys.maxsize, self._batch_size), self._translate_batch)

    def token_ids(self, text: str) -> list[int]:
        """What the encoder reads. A language's token inside a caption is no command, nor is `</s>` an end."""
        ids = self.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        return self._prefix_ids + [i for i in ids if i not in self._forbidden_ids]

    def _fits(self, text: str) -> bool:
        return len(self.token_ids(text)) <= self._max_source_tokens

    def _translate_batch(self, texts: list[str]) -> list[str]:
        inputs = self.tokenizer.pad({"input_ids": [self.token_ids(text) for text in texts]}, return_tensors="pt")
        try:
            ids = self.model.generate(**inputs.to(self.model.device), **self._generate_options)  # (texts, tokens)
        except torch.OutOfMemoryError as error:
            said = f"Out of memory with {len(texts)} sentences at once. Lower --batch_size. ({error})"
            raise ValueError(said) from error
        kept = [[i for i in row if i not in self._language_ids] for row in ids.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]


def check_languages(model: str, revision: str | None, language: str, source_language: str) -> None:
    """Raise ValueError if a translation model on this machine does not know a language; nothing is downloaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, AttributeError):
        return  # `Seq2SeqTranslator` fetches the model, or says what is wrong with it
    _codes(tokenizer, language, source_language, model)


def _language_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], dict[str, int]]:
    """Return codes with their token ids: those that go before the source, and those that begin the translation."""
    vocabulary = tokenizer.get_vocab()
    before = {token[2:-2]: number for token, number in vocabulary.items() if SOURCE_TOKEN_RE.fullmatch(token)}
    begins = {token: number for token, number in vocabulary.items() if TARGET_TOKEN_RE.fullmatch(token)}
    return before, {} if before else getattr(tokenizer, "lang_code_to_id", begins)  # NLLB has no such table


def _codes(
    tokenizer: PreTrainedTokenizerBase, language: str, source_language: str, name: str
) -> tuple[str, str | None]:
    """Return the codes of the language to write and of the one to read; the latter is None if the model needs none."""
    before, begins = _language_tokens(tokenizer)
    only = filter(None, [getattr(tokenizer, "target_lang", None)])
    target = find_language_code(language, before or begins or only, name)
    return target, find_language_code(source_language, begins, name) if begins else None


def _load_model(name: str, revision: str | None, precision: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    try:
        check_reachable(name, revision=revision)
        with wrap_tokenizer_errors("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        load_config(name, revision=revision)
        return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(name, revision=revision, dtype=DTYPES[precision])
    except ImportError as error:
        said = str(error).strip().split(". ")[0]  # transformers adds where else to read on
        raise ImportError(f"{said}. What translators need: {install_command('translate')}") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} can't be loaded as a translation model: {said}") from error


def _resolve_revision(name: str, model: PreTrainedModel) -> str:
    """The commit on the Hub, or a digest of a folder's files: weights that were trained on are other weights."""
    if not Path(name).is_dir():
        return str(model.config._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, Path(name).iterdir())):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class GoogleTranslator:
    """Google's service, told the languages that it writes and reads.

    Raises ValueError where no key is given or it is refused, or the service does not know a language; OSError where the
    service can't be reached.
    """

    name = "Google Translate"

    def __init__(self, language: str, source_language: str, endpoint: str | None = None):
        self._key = os.environ.get(API_KEY_VARIABLE, "").strip()
        self._client = _make_client(endpoint or GOOGLE_ENDPOINT, self._key)
        known = self._retry(lambda: [entry["language"] for entry in self._client.get_languages()])
        self.code, self._source_code = (
            find_language_code(code, known, self.name) for code in (language, source_language)
        )
        self.fingerprint = {"backend": "google", "api": "v2", "source": self._source_code, "target": self.code}

    def translate(self, sentences: list[str]) -> list[str]:
        """One translation a sentence."""
        limits = (GOOGLE_MAX_CHARACTERS, GOOGLE_MAX_SENTENCES)
        fits, tried = (
            lambda text: len(text) <= GOOGLE_MAX_CHARACTERS,
            lambda some: self._retry(lambda: self._request_translations(some)),
        )
        return translate_in_pieces(sentences, fits, limits, tried)

    def _request_translations(self, texts: list[str]) -> list[str]:
        """One request."""
        languages = {"target_language": self.code, "source_language": self._source_code}
        found = [entry.get("translatedText") for entry in self._client.translate(texts, format_="text", **languages)]
        if len(found) != len(texts) or not all(isinstance(text, str) for text in found):
            raise TypeError("it answered without a translation")
        return found

    def _retry(self, request: Callable[[], Any]) -> Any:
        """The result of a request, which is repeated while its failure may pass."""
        for number in range(MAX_TRIES):
            if number:
                time.sleep(min(FIRST_WAIT_S * 2 ** (number - 1), MAX_WAIT_S) * random.uniform(0.5, 1.0))
            try:
                return request()
            except Exception as error:  # of google, requests and urllib3, and of answers that are no JSON
                reason, may_pass = self._describe_failure(error)
            if not may_pass:  # here: an error that was raised in `except` would carry the first one
                raise ValueError(f"Google refuses it; see to the key, its rights and its quota. It says: {reason}")
        raise ConnectionError(
            f"Google has failed {MAX_TRIES} times, at last so: {reason}. What is translated is kept; the same command "
            "goes on."
        )

    def _describe_failure(self, error: Exception) -> tuple[str, bool]:
        """Why a request got no answer, without the key, and whether it may get one later: unless Google says no."""
        from google.api_core.exceptions import GoogleAPICallError

        said = f"{error or type(error).__name__}"
        for form in (self._key, urllib.parse.quote(self._key, safe=""), repr(self._key)[1:-1]):
            said = said.replace(form, "<key>")
        if isinstance(error, GoogleAPICallError):
            return (
                said,
                error.code in RETRYABLE_STATUS_CODES or "rate limit exceeded" in said.lower(),
            )  # 403 is for quotas, too
        # No answer, none that is JSON, or too short a one: the client's words for that are of its own code.
        garbled = isinstance(error, LookupError | AttributeError | TypeError | ValueError) and not isinstance(
            error, OSError
        )
        return "it answered without a translation" if garbled else said, True


def _make_client(endpoint: str, key: str) -> Any:
    """The official client, with a key."""
    address = urllib.parse.urlsplit(endpoint)
    if address.scheme != "https" and not (address.scheme == "http" and address.hostname in LOOPBACK_HOSTS):
        raise ValueError(f"The key would travel unprotected to {endpoint!r}; it must begin with https://.")
    if not re.fullmatch(r"[!-~]+", key):
        rule = f"needs a key of Google Cloud's Translation API in the environment variable {API_KEY_VARIABLE}"
        raise ValueError(f"--backend google {rule}; there is {'one with blanks or odd letters' if key else 'none'}.")
    from google.auth import api_key
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import translate_v2

    class Session(AuthorizedSession):
        """The client sets no time-out of one's own, and `requests` would send the key on to where it is redirected."""

        def request(self, method: str, url: str, **options: Any) -> Any:
            return super().request(method, url, **options | {"timeout": REQUEST_TIMEOUT_S, "allow_redirects": False})

    credentials = api_key.Credentials(key)
    session = Session(credentials, max_refresh_attempts=0)  # a refused key stays refused
    return translate_v2.Client(credentials=credentials, _http=session, client_options={"api_endpoint": endpoint})

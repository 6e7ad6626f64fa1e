"""What can translate: sequence-to-sequence models of transformers, and Google's service.

    python -c "from captions.translators import load; print(load('Helsinki-NLP/opus-mt-tc-big-en-pt', 'pt').code)"

How a model is told the language it shall write is read off its tokenizer: Marian's and MADLAD's have a token for each,
`>>por<<` or `<2pt>`, which goes before the sentence; NLLB, M2M100 and mBART begin the translation with one. Neither is
skipped in decoding, so it is cut off here.

Google's is version 2 of the service ("Basic"), by its official client, which takes a key. The key travels in a header,
not in the address, is sent to no other host, and is removed from whatever an error says.
"""

import hashlib
import itertools
import os
import random
import re
import sys
import time
import urllib.parse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from capivara_common.environment import how_to_install, require, torch_device
from capivara_common.hub_cache import check_reachable
from captions.languages import cut, find_code, groups, same_language
from modeling_capivara.checks_capivara import tokenizer_errors
from modeling_capivara.loading import checked_config

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SOURCE_TOKENS = 256  # of a piece: translation models learn from sentences, and lose the rest of long paragraphs
SOURCE_TOKEN = re.compile(r">>(.+)<<|<2(.+)>")  # Marian's and MADLAD's
TARGET_TOKEN = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # NLLB's
GOOGLE_MODULES = ("google.auth", "google.cloud.translate_v2")  # of the extra `google`
GOOGLE_CHARACTERS = 5_000  # of a request, as Google advises
KEY, ACCOUNT = "GOOGLE_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"
ENDPOINT = "https://translation.googleapis.com"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_SENTENCES = 128  # of a request, version 2 of the service
TIMEOUT_S = 60.0
MAX_TRIES = 8  # of a request, with pauses that double and lose a random part
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # Google's quotas are by the minute, cloud.google.com/translate/quotas
RETRIED = {408, 429, 500, 502, 503, 504}
REFUSED = {400, 401, 403}


class Seq2SeqTranslator:
    """A model in `eval()`, with its tokenizer, told the languages that it writes and reads.

    Args:
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
            self.code = _only_language(tokenizer, language, self.name)
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
            "source_prefix": None,  # what earlier versions could have: their memories stay
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

    Raises ValueError where it is no model that translates, or does not know a language; ImportError where its tokenizer
    needs a package that is not there.
    """
    target = torch_device(device)
    try:
        check_reachable(name, revision=revision)
        with warnings.catch_warnings(), tokenizer_errors("its tokenizer"):
            warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")  # which the tokenizer never calls
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
    model.eval().to(target)
    return Seq2SeqTranslator(model, tokenizer, language, source_language, identity=identity, **options)


def _revision(name: str, model: PreTrainedModel) -> str:
    """The commit on the Hub, or a digest of a folder's files: weights that were trained on are other weights."""
    if not Path(name).is_dir():
        return str(model.config._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, Path(name).iterdir())):
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


def _only_language(tokenizer: PreTrainedTokenizerBase, language: str, name: str) -> str:
    """Of a tokenizer without codes: what it says that it writes."""
    written = getattr(tokenizer, "target_lang", None) or getattr(tokenizer, "tgt_lang", None)
    if not written:
        raise ValueError(f"{name} has no codes of languages, so nothing tells it to write {language!r}. Take another.")
    if same_language(written).isdisjoint(same_language(language)):
        raise ValueError(f"{name} translates into {written!r} only, not into {language!r}.")
    return written


class GoogleTranslator:
    """Google's service, told the languages that it writes and reads.

    Raises ValueError where no key is given or it is refused, or the service does not know a language; OSError where the
    service can't be reached.
    """

    name = "Google Translate"

    def __init__(self, language: str, source_language: str, endpoint: str | None = None):
        self._secrets: list[str] = []
        self._client = _client(endpoint or ENDPOINT, self._secrets)
        languages = self._tried(self._client.get_languages)
        known = [entry["language"] for entry in languages if isinstance(entry, dict) and "language" in entry]
        self.code, self._source = (find_code(code, known, self.name) for code in (language, source_language))
        self.fingerprint = {"backend": "google", "api": "v2", "source": self._source, "target": self.code}

    def translate(self, sentences: list[str]) -> list[str]:
        """One translation a sentence; one that is too long is translated in pieces, which are joined by blanks."""
        pieces = [cut(sentence, lambda text: len(text) <= GOOGLE_CHARACTERS) for sentence in sentences]
        requests = groups(itertools.chain.from_iterable(pieces), GOOGLE_CHARACTERS, MAX_SENTENCES)
        made = iter([text for request in requests for text in self._tried(lambda texts=request: self._answers(texts))])
        return [" ".join(itertools.islice(made, len(some))) for some in pieces]

    def _answers(self, texts: list[str]) -> list[str]:
        """One request."""
        languages = {"target_language": self.code, "source_language": self._source}
        found = [entry.get("translatedText") for entry in self._client.translate(texts, format_="text", **languages)]
        if len(found) != len(texts) or not all(isinstance(text, str) for text in found):
            raise TypeError("it answered without a translation")
        return found

    def _tried(self, request: Callable[[], Any]) -> Any:
        """The result of a request, which is repeated while its failure may pass."""
        for number in range(MAX_TRIES):
            if number:
                time.sleep(min(FIRST_WAIT_S * 2 ** (number - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0))
            try:
                return request()
            except Exception as error:  # of google, requests and urllib3, and of answers that are no JSON
                reason, may_pass = self._failure(error)
            if not may_pass:
                raise ValueError(reason)  # here: an error that was raised in `except` would carry the first one
        raise ConnectionError(
            f"Google has failed {MAX_TRIES} times, at last so: {reason}. What is translated is kept; the same command "
            "goes on."
        )

    def _failure(self, error: Exception) -> tuple[str, bool]:
        """Why a request got no answer, without the key, and whether it may get one later: unless Google says no."""
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError

        said = f"{error or type(error).__name__}"
        for secret in self._secrets:
            for form in (secret, urllib.parse.quote(secret, safe=""), repr(secret)[1:-1]):
                said = said.replace(form, "<key>")
        if isinstance(error, GoogleAuthError):
            return f"Google refuses the credentials: {said}", bool(getattr(error, "retryable", False))
        if isinstance(error, GoogleAPICallError):
            too_fast = error.code == 403 and "rate limit exceeded" in said.lower()  # 403 is for quotas, too
            if error.code in REFUSED and not too_fast:
                said = f"Google refuses the request; see to the key, its rights and its quota. It says: {said}"
            return said, error.code in RETRIED or too_fast
        # No answer, none that is JSON, or too short a one: the client's words for that are of its own code.
        garbled = isinstance(error, AttributeError | TypeError | ValueError) and not isinstance(error, OSError)
        return "it answered without a translation" if garbled else said, True


def _client(endpoint: str, secrets: list[str]) -> Any:
    """The official client, with the key or the account of the environment; what must not be shown joins `secrets`."""
    address = urllib.parse.urlsplit(endpoint)
    if address.scheme != "https" and not (address.scheme == "http" and address.hostname in LOOPBACK):
        raise ValueError(f"The key would travel unprotected to {endpoint!r}; it must begin with https://.")
    require("--backend google", "google", *GOOGLE_MODULES)
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import translate_v2

    class Session(AuthorizedSession):
        """The client sets no time-out of one's own, and `requests` would send the key on to where it is redirected."""

        def request(self, method: str, url: str, **options: Any) -> Any:
            return super().request(method, url, **options | {"timeout": TIMEOUT_S, "allow_redirects": False})

    credentials = _credentials(translate_v2.Client.SCOPE, secrets)
    session = Session(credentials, max_refresh_attempts=0 if secrets else 2)  # a refused key stays refused
    return translate_v2.Client(credentials=credentials, _http=session, client_options={"api_endpoint": endpoint})


def _credentials(scopes: tuple[str, ...], secrets: list[str]) -> Any:
    import google.auth
    from google.auth import api_key

    key = os.environ.get(KEY, "").strip()
    if key:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"The key in {KEY} has blanks, line breaks or letters that no key has. Copy it anew.")
        secrets.append(key)
        return api_key.Credentials(key)
    if not os.environ.get(ACCOUNT):
        raise ValueError(
            f"--backend google needs a key of Google Cloud's Translation API in the environment variable {KEY}, or the "
            f"file of a service account in {ACCOUNT}. Neither is set."
        )
    try:
        return google.auth.default(scopes=scopes)[0]
    except google.auth.exceptions.GoogleAuthError as error:
        raise ValueError(f"{ACCOUNT} names no usable account: {error}") from error

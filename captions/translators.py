"""What can translate: sequence-to-sequence models of transformers, and Google's service.

    python -c "from captions.translators import load; print(load('Helsinki-NLP/opus-mt-tc-big-en-pt', 'pt').code)"

How a model is told the language it shall write is read off its tokenizer: Marian's and MADLAD's have a token for each,
`>>por<<` or `<2pt>`, which goes before the sentence; NLLB, M2M100 and mBART begin the translation with one. Neither is
skipped in decoding, so it is cut off here.

Google's is version 2 of the service ("Basic"), by its official client, which takes a key. The key travels in a header,
not in the address, is sent to no other host, and is removed from whatever an error says.
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
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from capivara_common.environment import how_to_install, require, torch_device
from capivara_common.hub_cache import check_reachable
from captions.stages import groups
from modeling_capivara.checks_capivara import tokenizer_errors
from modeling_capivara.loading import checked_config

CODES_NAMED = 8  # codes that an error shows
# ISO 639-1 and the code of ISO 639-3 for the same, from the tables of the Library of Congress and SIL.
_PAIRS = """
aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel bg:bul bi:bis bm:bam
bn:ben bo:bod br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces cu:chu cv:chv cy:cym da:dan de:deu dv:div dz:dzo
ee:ewe el:ell en:eng eo:epo es:spa et:est eu:eus fa:fas ff:ful fi:fin fj:fij fo:fao fr:fra fy:fry ga:gle gd:gla gl:glg
gn:grn gu:guj gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv ht:hat hu:hun hy:hye hz:her ia:ina id:ind ie:ile ig:ibo ii:iii
ik:ipk io:ido is:isl it:ita iu:iku ja:jpn jv:jav ka:kat kg:kon ki:kik kj:kua kk:kaz kl:kal km:khm kn:kan ko:kor kr:kau
ks:kas ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao lt:lit lu:lub lv:lav mg:mlg mh:mah mi:mri
mk:mkd ml:mal mn:mon mr:mar ms:msa mt:mlt my:mya na:nau nb:nob nd:nde ne:nep ng:ndo nl:nld nn:nno no:nor nr:nbl nv:nav
ny:nya oc:oci oj:oji om:orm or:ori os:oss pa:pan pi:pli pl:pol ps:pus pt:por qu:que rm:roh rn:run ro:ron ru:rus rw:kin
sa:san sc:srd sd:snd se:sme sg:sag si:sin sk:slk sl:slv sm:smo sn:sna so:som sq:sqi sr:srp ss:ssw st:sot su:sun sv:swe
sw:swa ta:tam te:tel tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig uk:ukr
ur:urd uz:uzb ve:ven vi:vie vo:vol wa:wln wo:wol xh:xho yi:yid yo:yor za:zha zh:zho zu:zul
"""
# A group of languages, and the one of it that translators mean (the codes of NLLB-200 and of Tatoeba's models).
_OF_GROUP = """
ara:arb aym:ayr aze:azj est:ekk fas:pes ful:fuv kau:knc kur:kmr lav:lvs mlg:plt mon:khk msa:zsm nep:npi nor:nob ori:ory
orm:gaz pus:pbt que:quy sqi:als swa:swh uzb:uzn yid:ydd zho:cmn
"""
_THREE_LETTERS = dict(pair.split(":") for pair in _PAIRS.split())
TWO_LETTERS = {long: short for short, long in _THREE_LETTERS.items()}
_GROUP_MEMBER = dict(pair.split(":") for pair in _OF_GROUP.split())
# Where a text is cut, the best place first: ends of sentences, with no blank behind them in Chinese and Japanese; then
# of clauses; then of words.
BOUNDARIES = (r"(?<=[.!?…।॥؟])\s+|(?<=[。！？])|\n+", r"(?<=[,;:،؛、])\s+|(?<=[，；：])", r"\s+")

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


# Names of languages: `pt` of the columns is `>>por<<`, `por_Latn`, `pt_XX` or `pt` to a translator.


def find_code(language: str, codes: Iterable[str], translator: str = "The translator") -> str:
    """The code of `codes`, what a translator calls its languages, that means `language`: of ISO 639-1 or 639-3, with a
    script or region where it matters (pt, por, zh-Hant, pt-BR), or one of `codes`.

    Raises ValueError where there is none, and the nearest are named, or several, and all of them are.
    """
    codes = list(codes)
    same = [code for code in codes if language_parts(code) == language_parts(language)]
    found = same or [code for code in codes if _fits(language, code)]
    bare = [code for code in found if len(language_parts(code)) == 1]
    if len(same) == 1 or len(bare) == 1 or len(found) == 1:
        return (same or bare or found)[0]
    if found:
        raise ValueError(f"{translator} knows {language!r} as several: {', '.join(sorted(found))}. Say which.")
    names = sorted(same_language(language))
    near = dict.fromkeys(code for name in names for code in difflib.get_close_matches(name, codes, CODES_NAMED, 0.5))
    near |= dict.fromkeys(sorted(code for code in codes if code[:1] == language[:1].lower()))
    shown = ", ".join(list(near or sorted(codes))[:CODES_NAMED])
    raise ValueError(
        f"{translator} does not know the language {language!r}; of its {len(codes)} codes the nearest are {shown}."
    )


def same_language(language: str) -> set[str]:
    """The codes, without script and region, for the language of a code."""
    name = language_parts(language)[0]
    long = _THREE_LETTERS.get(name, name)
    group = next((group for group, member in _GROUP_MEMBER.items() if member == long), long)
    return {name, long, group, TWO_LETTERS.get(group, name), _GROUP_MEMBER.get(group, group)}


def _fits(language: str, code: str) -> bool:
    """Whether two codes mean one language; two scripts or two regions differ, one and none do not."""
    if same_language(language).isdisjoint(same_language(code)):
        return False
    (_, *ours), (_, *theirs) = language_parts(language), language_parts(code)
    for length in (4, 2):  # scripts have four letters, regions two; XX is mBART's for "none"
        one, other = ({part for part in rest if len(part) == length and part != "xx"} for rest in (ours, theirs))
        if one and other and one != other:
            return False
    return True


def language_parts(code: str) -> list[str]:
    """Language, script and region, as far as a code has them: ["zh", "hant"] of zh-Hant."""
    return code.strip().lower().replace("_", "-").split("-")


def cut(text: str, fits: Callable[[str], bool]) -> list[str]:
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
        return cut(text[: len(text) // 2], fits) + cut(text[len(text) // 2 :], fits)
    pieces: list[str] = []
    for unit in units:
        for part in cut(unit, fits):
            if pieces and fits(f"{pieces[-1]} {part}"):
                pieces[-1] += f" {part}"
            else:
                pieces.append(part)
    return pieces


# What translates


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

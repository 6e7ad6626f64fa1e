"""Translators: tiny models of the real classes, and a fake server of Google's service on loopback."""

import logging
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from google_server import KEY, google_service, translated
from sampling import one_in
from seq2seq_models import m2m100_folder, marian_folder
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, NllbTokenizer

from capivara_common.cli import flag
from captions import http_service
from captions.translate import TranslateArguments
from captions.translators import google as google_module
from captions.translators import seq2seq
from captions.translators.base import Translator, split_text
from captions.translators.google import GOOGLE_MAX_CHARACTERS, GoogleTranslator
from captions.translators.seq2seq import Seq2SeqTranslator

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"max_new_tokens": 6}
NLLB_CODES = {"pt": "por_Latn", "hi": "hin_Deva", "xh": "xho_Latn", "es": "spa_Latn", "yo": "yor_Latn"}


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    return marian_folder(tmp_path_factory.mktemp("marian") / "model")


@pytest.fixture(scope="module")
def m2m100(tmp_path_factory):
    return m2m100_folder(tmp_path_factory.mktemp("m2m100") / "model")


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    return m2m100_folder(tmp_path_factory.mktemp("nllb") / "model", NllbTokenizer)


# Models


def local_translator(model: Path | str, language: str, **flags) -> Seq2SeqTranslator:
    return Seq2SeqTranslator(TranslateArguments("data", Path("out"), language=language, model=str(model), **flags))


def test_marian_translates_as_the_model_itself_does(marian):
    """Batches with padding give the same translations as `generate` with one sentence at a time."""
    translator = local_translator(marian, "pt", **SHORT)
    sentences = ["a cat on a mat.", "two men ride horses on the beach.", "dog"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(marian).eval(), AutoTokenizer.from_pretrained(marian)
    expected = []
    for sentence in sentences:
        ids = model.generate(**tokenizer(f">>por<< {sentence}", return_tensors="pt"), **SHORT)
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    assert translator.translate(sentences) == expected
    assert len(set(expected)) == 3 and all(expected), "the translations differ and are not empty"
    spanish = local_translator(marian, "es", **SHORT).translate(sentences)
    assert spanish != expected, "the prefix reaches the model"


def test_language_tokens_are_removed_from_translations(marian, monkeypatch):
    translator = local_translator(marian, "pt", **SHORT)
    tokens = translator.tokenizer(">>por<< a cat", return_tensors="pt")["input_ids"]
    assert translator.tokenizer.decode(tokens[0], skip_special_tokens=True).startswith(">>por<<")
    monkeypatch.setattr(translator.model, "generate", lambda **_: tokens)
    assert translator.translate(["anything"]) == ["a cat"]


def test_special_tokens_in_captions_are_plain_text(marian, nllb):
    for folder, language in ((marian, "pt"), (nllb, "pt")):
        translator = local_translator(folder, language, **SHORT)
        ids = translator.token_ids(">>spa<< a </s> <pad> spa_Latn cat")
        special = {translator.tokenizer.eos_token_id, translator.tokenizer.pad_token_id, *translator._language_ids}
        assert [i for i in ids if i in special] == [ids[0], ids[-1]], "only the language token and the end token"


@pytest.mark.parametrize("kind", ["m2m100", "nllb"])
@pytest.mark.parametrize("language", one_in(3, NLLB_CODES))
def test_m2m100_and_nllb_begin_with_the_language_token(kind, language, request):
    folder, sentence = request.getfixturevalue(kind), "two men ride horses on the beach."
    translator = local_translator(folder, language, **SHORT)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert translator.code == (language if kind == "m2m100" else NLLB_CODES[language])
    token = tokenizer.convert_tokens_to_ids(f"__{language}__" if kind == "m2m100" else translator.code)
    tokenizer.src_lang = "en" if kind == "m2m100" else "eng_Latn"
    ids = model.generate(**tokenizer(sentence, return_tensors="pt"), forced_bos_token_id=token, **SHORT)[0].tolist()
    assert ids[1] == token, "the start token, then the language"
    text_ids = [i for i in ids[2:] if i not in translator._language_ids]
    expected = tokenizer.decode(text_ids, skip_special_tokens=True).strip()
    assert translator.translate([sentence, "dog"])[0] == expected
    assert "__" not in expected and "_Latn" not in expected


def test_a_model_for_one_language(tmp_path):
    folder = marian_folder(tmp_path / "german", codes=(), target="deu")
    assert local_translator(folder, "de", **SHORT).translate(["a cat"])
    with pytest.raises(ValueError, match=r"'pt'.*\b1\b.*deu"):
        local_translator(folder, "pt")


def test_long_texts_are_split_at_sentences_clauses_and_words():
    def fits(text: str) -> bool:
        return len(text) <= 12

    assert split_text("One two. Three four! Five?", fits) == ["One two.", "Three four!", "Five?"]
    assert split_text("One. Two. Three, and four.", fits) == ["One. Two.", "Three,", "and four."]
    assert split_text("एक बिल्ली। एक कुत्ता। दो", fits) == ["एक बिल्ली।", "एक कुत्ता।", "दो"]
    assert split_text("日本語の文。日本語の長い文。", fits) == ["日本語の文。", "日本語の長い文。"]
    assert split_text("x" * 30, fits) == ["x" * 7, "x" * 8, "x" * 7, "x" * 8]
    assert split_text("short", fits) == ["short"] and split_text("", fits) == [""]
    assert split_text("ab", lambda text: False) == ["a", "b"]


@pytest.mark.slow
def test_the_fingerprint_covers_everything_that_changes_translations(marian, m2m100, tmp_path):
    base = local_translator(marian, "pt", **SHORT).fingerprint
    assert base == local_translator(marian, "por", **SHORT, batch_size=3).fingerprint
    others = [
        local_translator(marian, "es", **SHORT),
        local_translator(marian, "pt", max_new_tokens=5),
        local_translator(marian, "pt", **SHORT, precision="bf16"),
        local_translator(marian_folder(tmp_path / "model", codes=("por",)), "pt", **SHORT),  # same name, other files
    ]
    assert all(other.fingerprint != base for other in others)
    assert str(marian.parent) not in str(base), "the memory can be moved to another machine"


def test_an_out_of_memory_error_names_the_flag_to_lower(marian, monkeypatch):
    def full(**_):
        raise torch.OutOfMemoryError("too many")

    translator = local_translator(marian, "pt", **SHORT)
    monkeypatch.setattr(translator.model, "generate", full)
    with pytest.raises(ValueError, match=r"\b2 sentences.*--batch_size.*too many"):
        translator.translate(["a cat", "a dog"])


def test_a_tokenizer_without_its_package_names_the_extra(marian, monkeypatch):
    def missing(*_, **__):
        raise ImportError("MarianTokenizer requires the SentencePiece library. Check out the page")

    monkeypatch.setattr(seq2seq.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(ImportError, match=r"SentencePiece.*\[translate\]"):
        local_translator(marian, "pt")


def test_other_models_are_refused(tmp_path, tiny_folder):
    for name in (str(tmp_path / "nothing"), str(tiny_folder), "owner/no-such-model"):
        with pytest.raises(ValueError, match=re.escape(name)):
            local_translator(name, "pt")


def test_the_translator_of_the_guide_works():
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n((?:(?!```).)*class ShoutTranslator.*?)```", page, re.DOTALL)
    names = {"dataclass": dataclass, "flag": flag, "Translator": Translator, "Any": Any}
    exec(code, names)
    backend = names["ShoutTranslator"]
    args = names["ShoutFlags"](shout_marks=2)
    assert backend.load(args, None).translate(["a cat", "a dog"]) == ["A CAT!!", "A DOG!!"]
    assert not backend.needs_table and backend.check_flags(args) is None and backend.check(args) is None


# Google


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    with google_service() as service:
        yield service


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """Record the pauses without waiting."""
    pauses: list[float] = []
    monkeypatch.setattr("captions.translators.google.time.sleep", pauses.append)
    return pauses


def google(service, language="pt", endpoint=None):
    flags = {"backend": "google", "google_endpoint": endpoint or service.url}
    return GoogleTranslator(TranslateArguments("data", Path("out"), language=language, **flags))


@pytest.mark.slow
def test_requests_to_google_stay_within_its_limits(service):
    sentences = [f"sentence {i}" for i in range(300)] + ["word " * 400 for _ in range(5)]
    assert google(service).translate(sentences) == [translated(text, "pt") for text in sentences]
    assert all(len(body["q"]) <= 128 and sum(map(len, body["q"])) <= GOOGLE_MAX_CHARACTERS for body in service.requests)
    assert len(service.requests) == 5
    (translation,) = google(service).translate(["a cat on a mat. " * 625])
    assert len(service.requests) == 8 and translation.count("pt: ") == 3, "a long sentence is sent in pieces"
    assert all((body["source"], body["target"], body["format"]) == ("en", "pt", "text") for body in service.requests)


@pytest.mark.parametrize(
    "fault", [429, "quota", pytest.param("timeout", marks=pytest.mark.slow), "cut", "list", "fewer"]
)
def test_temporary_failures_are_retried(service, fault, monkeypatch):
    monkeypatch.setattr(google_module, "REQUEST_TIMEOUT_S", 5.0 if fault == "timeout" else 60.0)
    translator = google(service)
    service.faults[:] = [fault, fault]
    sentences = ["a cat", "a dog", "a fish"]
    assert translator.translate(sentences) == [translated(text, "pt") for text in sentences], (
        "each translation belongs to its sentence"
    )
    assert len(service.requests) == 3


@pytest.mark.parametrize(("faults", "reason"), [([503] * 8, "503"), (["list", "fewer"] * 4, "no translation")])
def test_pauses_double_up_to_a_limit(service, waits, faults, reason):
    translator = google(service)
    service.faults[:] = faults
    with pytest.raises(OSError, match=rf"\b8 times.*{reason}"):
        translator.translate(["a cat"])
    assert len(waits) == 7 and all(
        min(2**number, 60) / 2 <= wait <= min(2**number, 60) for number, wait in enumerate(waits)
    )
    assert translator.translate(["a cat"]) == [translated("a cat", "pt")]


@pytest.mark.parametrize(("fault", "reason"), [("daily", "Daily Limit Exceeded"), (401, "401"), (302, "302")])
def test_permanent_failures_are_not_retried(service, fault, reason):
    translator = google(service)
    service.faults[:] = [fault] * 3
    with pytest.raises(ValueError, match=reason):
        translator.translate(["a cat"])
    assert len(service.requests) == 1


def test_language_codes_of_google(service):
    assert google(service, "por").code == "pt" and google(service, "pt-PT").code == "pt-PT"
    assert google(service, "xh").fingerprint["target"] == "xh"
    with pytest.raises(ValueError, match=r"Google Translate.*'tlh'"):
        google(service, "tlh")
    assert google(service, "zh").code == "zh-CN" and google(service, "zh-Hant").code == "zh-TW"
    assert service.requests == [], "listing the languages costs nothing"


@pytest.mark.slow
def test_the_key_is_never_shown(service, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    secret = "AIza/wrong+key=%41'\"<&>"
    monkeypatch.setenv("GOOGLE_API_KEY", secret)
    monkeypatch.setattr(http_service, "MAX_TRIES", 2)
    caught = [failure(lambda: google(service))]
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    for fault in (400, 403, 500, "timeout", "cut", "list", 302):
        monkeypatch.setattr(google_module, "REQUEST_TIMEOUT_S", 3.0 if fault == "timeout" else 60.0)
        translator = google(service)
        service.faults[:] = [fault] * 2
        caught.append(failure(lambda translator=translator: translator.translate(["a cat"])))
    service.url = "http://127.0.0.1:9"
    caught.append(failure(lambda: google(service)))
    monkeypatch.setenv("GOOGLE_API_KEY", "two words")
    caught.append(failure(lambda: google(service)))
    shown = "\n".join(caught) + caplog.text + "".join(capfd.readouterr())
    assert "<key>" in caught[0], "the server repeats the key, and it was removed"
    for text in (KEY, secret, "AIza", "two words", repr(secret)[1:-1]):
        assert text not in shown
    assert not any("key" in path.lower() for path in service.paths), "the key travels in a header"
    assert any(headers.get("x-goog-api-key") == KEY for headers in service.headers)


def failure(call) -> str:
    """Return everything that a traceback and its exceptions show."""
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    error, texts = caught.value, []
    while error is not None:
        texts += [str(error), repr(error.args), *traceback.format_exception(error, chain=False)]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def test_a_missing_key_or_an_unencrypted_address_is_refused(service, monkeypatch):
    with pytest.raises(ValueError, match=r"https://.*translation\.example\.org"):
        google(service, endpoint="http://translation.example.org")
    monkeypatch.delenv("GOOGLE_API_KEY")
    with pytest.raises(ValueError, match="GOOGLE_API_KEY"):
        google(service)
    assert service.paths == []

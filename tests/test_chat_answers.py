"""Answers of language models: recorded kinds of additions are removed, and answers that are no caption are found."""

import json

import pytest

from captions.chat.answers import (
    Choice,
    build_json_response_format,
    clean_answer,
    detect_refusal_or_truncation,
    extract_numbered_lines,
    extract_value_from_json_answer,
)
from captions.chat.client import convert_completion_to_reply
from captions.chat.prompts import CaptionPrompts, TranslationPrompts, number_lines
from captions.http_service import check_service_url, hide_key, parse_retry_after
from captions.journal import append_to_journal, read_journal
from captions.languages import language_name
from captions.quality import find_caption_quality_flags


@pytest.mark.parametrize(
    "answer",
    [
        "Um gato no tapete.",
        "  Um gato\nno tapete.\n",
        '"Um gato no tapete."',
        "“Um gato no tapete.”",
        "«Um gato no tapete.»",
        "'Um gato no tapete.'",
        "**Um gato no tapete.**",
        '**"Um gato no tapete."**',
        "Here is the translation:\n\nUm gato no tapete.",
        'Sure! Here is the caption in Portuguese: "Um gato no tapete."',
        "Certainly, here's the translated text: Um gato no tapete.",
        "Translation: Um gato no tapete.",
        "**Translation:** Um gato no tapete.",
        "Claro! Aqui está a tradução:\nUm gato no tapete.",
        "Aqui está a legenda: Um gato no tapete.",
        "Tradução para o português: Um gato no tapete.",
        "Legenda: Um gato no tapete.",
        "```\nUm gato no tapete.\n```",
        "```text\nUm gato no tapete.\n```\nThis keeps the tone.",
        "<think>The user wants…\n\nRight.</think>\n\nUm gato no tapete.",
        "The user wants…</think>Um gato no tapete.",
        "[THINK]Hm.[/THINK]Um gato no tapete.",
        "Um gato no tapete.<|im_end|>",
        "<s>Um gato no tapete.</s>",
        "Um gato no tapete.\n\nNote: 'mat' can also be 'esteira'.",
        "Um gato no tapete.\n\n(Nota: tradução literal.)",
    ],
)
def test_additions_are_removed(answer):
    assert clean_answer(answer, "a cat on a mat.") == "Um gato no tapete."


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ('"Pare"', '"Stop"'),
        ('Placa com "Pare" e "Siga"', 'a sign with "Stop" and "Go"'),
        ("Legenda: um gato", "Caption: a cat"),
        ("Dois gatos: um preto e um branco", "two cats: one black and one white"),
        ("Here are two cats: one black", ""),
        ("d'água", "water"),
        ("5 < 6 gatos", "5 < 6 cats"),
    ],
)
def test_parts_of_a_caption_are_kept(answer, source):
    assert clean_answer(answer, source) == answer


def test_reasoning_without_an_end_is_no_answer():
    assert clean_answer("<think>The user wants a caption, so I") == ""


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, I cannot identify people.",
        "Sorry, I can't help.",
        "I cannot provide a translation.",
        "I am unable to view images.",
        "As an AI language model, I do not see images.",
        "Desculpe, mas não posso ajudar com isso.",
        "Infelizmente, não posso traduzir isso.",
        "Não consigo ver a imagem.",
        "Como uma IA, não vejo imagens.",
        "Lo siento, pero no puedo ayudar.",
    ],
)
def test_refusals_are_found(answer):
    assert detect_refusal_or_truncation(answer, Choice("", "stop"), "a cat") == "refused"


def test_faults_that_the_server_states():
    assert (
        detect_refusal_or_truncation("um gato", Choice("", "length")) == "truncated"
        and detect_refusal_or_truncation("um gato", Choice("", "content_filter")) == "refused"
    )
    assert (
        detect_refusal_or_truncation("", Choice("", "stop", "I can't")) == "refused"
        and detect_refusal_or_truncation("um gato", Choice("", "stop")) is None
    )
    stopped = Choice("", "stop")
    quoted = "I'm sorry, I can't read this sign"
    assert detect_refusal_or_truncation("Desculpe, não posso ler esta placa", stopped, quoted) is None, (
        "the source is an apology, too"
    )
    assert detect_refusal_or_truncation("Lamento sobre o Cristo morto", stopped, "Lamentation of Christ") is None


def test_numbered_lines():
    texts = ["a cat\non a mat", "a dog"]
    assert number_lines(texts) == "1. a cat on a mat\n2. a dog"
    assert extract_numbered_lines("Here you are:\n\n2) um cão\n1. um gato", 2) == ["um gato", "um cão"]
    for wrong in ("1. um gato", "1. a\n2. b\n3. c", "1. a\n1. b", "a\nb", "1. a\n2.", ""):
        assert extract_numbered_lines(wrong, 2) is None


def test_json_answers():
    assert extract_value_from_json_answer('```json\n{"caption": "um gato"}\n```', "caption") == "um gato"
    assert extract_value_from_json_answer('<think>x</think>{"caption": [1]}', "caption") == [1]
    for plain in ("um gato", "[1]", '{"other": 1}', ""):
        assert extract_value_from_json_answer(plain, "caption") is None
    schema = json.dumps(build_json_response_format("captions", 3))
    assert '"minItems": 3' in schema and '"required": ["captions"]' in schema


@pytest.mark.parametrize("completion", ["<html>", {}, None])
def test_other_responses_are_no_reply(completion):
    with pytest.raises((TypeError, AttributeError)):
        convert_completion_to_reply(completion)
    assert Choice("a").finish_reason is None


def test_captions_that_look_wrong():
    assert find_caption_quality_flags("um gato no tapete", "pt") == []
    assert find_caption_quality_flags("...", "pt") == ["empty"] and find_caption_quality_flags(
        "кошка на ковре", "pt"
    ) == ["wrong script"]
    assert find_caption_quality_flags("um gato " * 80, "pt") == ["length"] and find_caption_quality_flags(
        "um <b>gato</b>", "pt"
    ) == ["markup"]


# Prompts and names of languages


@pytest.mark.parametrize("language", ["pt", "hi", "pt-BR", "zh-Hant", "xh"])
def test_the_built_in_prompts_are_valid(language):
    captions = CaptionPrompts(None, language)
    assert len(captions.prompts) == 4
    message = captions.messages(1, "data:image/jpeg;base64,xx")[-1]["content"]
    assert [part["type"] for part in message] == ["image_url", "text"]
    translation = TranslationPrompts(None, language, "en", needs_lines=True)
    assert language_name(language) in translation.messages("a {{ cat }}")[0]["content"]
    assert translation.messages("a {{ cat }}")[-1]["content"] == "a {{ cat }}", "a caption is no template"


def test_languages_have_names():
    assert language_name("pt") == "Portuguese" and language_name("zh-Hant") == "Chinese (Traditional)"
    for code in ("qaa", "zxx", "mul", "p!t"):
        with pytest.raises(ValueError, match=code):
            language_name(code)


# Services


def test_retry_after_states_seconds_or_a_date():
    assert parse_retry_after("2.5") == 2.5 and parse_retry_after(None) is None and parse_retry_after("soon") is None
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert parse_retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


def test_keys_are_hidden_in_all_forms():
    key = "sk-a/b+c'd"
    text = f"{key} sk-a%2Fb%2Bc%27d {key!r}"
    assert "sk-a" not in hide_key(text, key) and hide_key("text", "") == "text"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:1/v1", "https://a.org"]
)
def test_addresses_that_are_allowed(url):
    check_service_url(url, "base_url")


@pytest.mark.parametrize(
    "url",
    ["http://a.org/v1", "a.org", "", "https://k@a.org", "https://a.org?key=k", "http://localhost.a.org", "http://"],
)
def test_addresses_that_are_refused(url):
    with pytest.raises(ValueError, match="base_url"):
        check_service_url(url, "base_url")


def test_a_journal_survives_incomplete_lines(tmp_path):
    path = tmp_path / "a" / "j.jsonl"
    assert list(read_journal(path)) == []
    append_to_journal(path, {"n": 1, "text": "ção \ud83e"})
    with path.open("ab") as file:
        file.write(b'{"n": 2, "te')
    append_to_journal(path, {"n": 3})
    assert [record["n"] for record in read_journal(path)] == [1, 3]

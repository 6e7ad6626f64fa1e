"""Chat backends against a stand-in server: protocol, faults, resuming, prompts, and what the key is sent to."""

import json
import logging
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from caption_build import CARD
from caption_tars import picture, rows_of, saved_train
from chat_server import KEY, chat_service, reversed_text
from datasets import Image, Value

from capivara_common.files import read_json
from caption_data.rows import CAPTIONS_FEATURE
from caption_data.sources import open_split
from captions import http_service
from captions.build import BuildArguments, build_dataset
from captions.chat.answers import Answer
from captions.generate import main as generate
from captions.stages import check_stage_and_count_rows
from captions.translate import TranslateArguments
from captions.translate import main as translate
from captions.translation_memory import TranslationMemory
from captions.translators.chat import ChatTranslator

ROOT = Path(__file__).resolve().parent.parent
ROWS = 12


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(http_service, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(http_service, "MAX_WAIT_S", 0.001)
    monkeypatch.setattr(http_service, "MAX_RETRY_AFTER_S", 0.3)


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_service() as service:
        yield service


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """A saved dataset with English captions, some of which occur several times."""
    features = {"image": Image(), "id": Value("int32"), "captions-en": CAPTIONS_FEATURE}
    captions = [[f"a photo of thing {i % 7}", "a cat on a mat", ""][: 1 + i % 3] for i in range(ROWS)]
    return saved_train(
        tmp_path_factory.mktemp("chat") / "data", features, map(picture, range(ROWS)), range(ROWS), captions
    )


def distinct() -> set[str]:
    return {f"a photo of thing {i}" for i in range(7)} | {"a cat on a mat"}


def flags(service, dataset: str, output: Path, *more: str) -> list[str]:
    words = ["--dataset", dataset, "--output", str(output), "--base_url", service.url, "--model", "stand-in"]
    return [*words, "--rows_per_part", "5", *more]


def translation_flags(service, dataset: str, output: Path, *more: str) -> list[str]:
    return flags(service, dataset, output, "--language", "pt", "--backend", "chat", *more)


def caption_flags(service, dataset: str, output: Path, *more: str) -> list[str]:
    return flags(service, dataset, output, "--captioner", "chat", "--caption_language", "pt", *more)


def written(output: Path) -> list[dict]:
    return list(open_split(str(output), "train", "image").rows())


def check_rows(output: Path) -> None:
    rows = written(output)
    assert [row["id"] for row in rows] == list(range(ROWS))
    for row in rows:
        assert row["captions-pt"] == [text[::-1] for text in row["captions-en"]]


def sent(service) -> list[str]:
    return [request["messages"][-1]["content"] for request in service.requests]


# Translation


def test_each_distinct_sentence_is_translated_once_in_order(service, dataset, tmp_path):
    service.delay_s = 0.05
    translate(translation_flags(service, dataset, tmp_path / "pt", "--concurrency", "4", "--seed", "7"))
    check_rows(tmp_path / "pt")
    assert sorted(sent(service)) == sorted(distinct()) and service.most == 4
    first = service.requests[0]
    assert (first["temperature"], first["seed"], first["max_tokens"]) == (0, 7, 1024) and "n" not in first
    system = first["messages"][0]["content"]
    assert first["messages"][0]["role"] == "system" and "English" in system and "Portuguese" in system
    usage = read_json(tmp_path / "pt" / "quality.json")["usage"]
    words = sum(len(text.split()) for text in distinct())
    assert usage == {"answers": 8, "retried": 0, "prompt_tokens": 80, "completion_tokens": words}
    translate(translation_flags(service, dataset, tmp_path / "2", "--memory", f"{tmp_path}/pt.memory", "--seed", "7"))
    check_rows(tmp_path / "2")
    assert len(service.requests) == 8, "another run with the same memory sends nothing"


@pytest.mark.slow
def test_everything_that_changes_an_answer_changes_the_fingerprint(service, dataset, tmp_path):
    prompts = tmp_path / "p.yaml"
    prompts.write_text('user: "Translate to {{ language }}: {{ text }}"\n')
    seen = set()
    variants = [[], ["--seed", "1"], ["--temperature", "0.5"], ["--max_tokens", "99"], ["--top_p", "0.9"]]
    variants += [["--prompts", str(prompts)], ["--captions_per_request", "2"], ["--extra_body", '{"a": 1}']]
    for number, more in enumerate(variants):
        translate(translation_flags(service, dataset, tmp_path / str(number), *more))
        seen.add(json.dumps(read_json(tmp_path / str(number) / "stage.json")["settings"]["translator"], sort_keys=True))
    assert len(seen) == len(variants)
    translate(translation_flags(service, dataset, tmp_path / "same", "--concurrency", "3", "--timeout", "7"))
    settings = read_json(tmp_path / "same" / "stage.json")["settings"]["translator"]
    assert json.dumps(settings, sort_keys=True) in seen, "concurrency and timeout change no answer"
    assert KEY not in (tmp_path / "same" / "stage.json").read_text()


SLOW = {"marks": pytest.mark.slow}
OTHER_FAULTS = (500, 503, "timeout", "slow", "malformed", "html", "empty")


@pytest.mark.parametrize("fault", [429, "cut", *(pytest.param(fault, **SLOW) for fault in OTHER_FAULTS)])
def test_temporary_faults_lose_nothing(service, dataset, tmp_path, fault):
    service.faults[:] = [fault, None, fault]
    limit = "0.5" if fault in ("timeout", "slow") else "60"
    translate(translation_flags(service, dataset, tmp_path / "pt", "--timeout", limit))
    check_rows(tmp_path / "pt")
    assert len(service.requests) == 8 + 2


@pytest.mark.slow
def test_retry_after_pauses_all_requests(service, dataset, tmp_path):
    arrived = []
    service.answer = lambda messages: arrived.append(time.monotonic()) or messages[-1]["content"][::-1]
    service.faults[:] = [429]
    start = time.monotonic()
    translate(translation_flags(service, dataset, tmp_path / "pt", "--concurrency", "1"))
    check_rows(tmp_path / "pt")
    assert min(arrived[1:]) - start > 0.3, "only the one-token request came before"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, "OPENAI_API_KEY"),
        (307, "redirects"),
        pytest.param(302, "redirects", **SLOW),
        pytest.param(404, "--base_url", **SLOW),
        pytest.param("quota", "no money", **SLOW),
    ],
)
def test_permanent_faults_end_the_run_in_one_line(service, dataset, tmp_path, fault, message):
    service.faults[:] = [None, None, fault]
    with chat_service() as elsewhere:
        service.redirect = f"{elsewhere.url}/chat/completions"
        with pytest.raises(ValueError, match=message) as caught:
            translate(translation_flags(service, dataset, tmp_path / "pt", "--concurrency", "1"))
        assert not elsewhere.keys, "redirects are not followed"
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert len(service.requests) == 3, "the request is not repeated"
    translate(translation_flags(service, dataset, tmp_path / "pt"))
    check_rows(tmp_path / "pt")
    assert sorted(Counter(sent(service)).values()) == [1] * 7 + [2], "finished translations are not requested again"


def test_a_server_that_always_fails_ends_the_run(service, dataset, tmp_path):
    service.always = 500
    with pytest.raises(OSError, match=r"8 times.*500") as caught:
        translate(translation_flags(service, dataset, tmp_path / "pt"))
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_bad_answers_are_requested_once_more_and_then_listed(service, dataset, tmp_path):
    def answer(messages):
        return {"a photo of thing 1": "I cannot help with that.", "a cat on a mat": "A cat on a mat."}.get(
            messages[-1]["content"], messages[-1]["content"][::-1]
        )

    service.answer = answer
    translate(translation_flags(service, dataset, tmp_path / "pt"))
    assert len(service.requests) == 8 + 2
    assert sorted(request["temperature"] for request in service.requests) == [0] * 8 + [0.7] * 2
    report = read_json(tmp_path / "pt" / "quality.json")
    counts = {name: flag["captions"] for name, flag in report["flags"].items() if flag["captions"]}
    assert counts == {"refused": 2, "copy": 8} and report["usage"]["retried"] == 2
    rows = written(tmp_path / "pt")
    assert rows[1]["captions-pt"] == ["", "A cat on a mat."], "a refusal is no translation"
    flagged = [(entry["flags"], entry["source"]) for entry in rows[1]["quality-pt"]["flagged"]]
    assert flagged == [(["refused"], "a photo of thing 1"), (["copy"], "a cat on a mat")]
    again = translation_flags(service, dataset, tmp_path / "2", "--memory", f"{tmp_path}/pt.memory")
    translate(again)
    assert [row["quality-pt"] for row in written(tmp_path / "2")] == [row["quality-pt"] for row in rows]


@pytest.mark.slow
def test_a_good_second_answer_replaces_a_bad_one(service, dataset, tmp_path):
    service.faults[:] = ["length", None, "refusal", None, "filter", None]
    translate(translation_flags(service, dataset, tmp_path / "pt", "--concurrency", "1"))
    check_rows(tmp_path / "pt")
    assert read_json(tmp_path / "pt" / "quality.json")["usage"]["retried"] == 3


@pytest.mark.slow
def test_truncated_answers_are_no_translation(service, dataset, tmp_path):
    service.always = "length"
    translate(translation_flags(service, dataset, tmp_path / "pt"))
    report = read_json(tmp_path / "pt" / "quality.json")
    assert report["flags"]["truncated"]["captions"] == report["flagged"] == 20


@pytest.mark.parametrize("tokens", [10**12, -5])
def test_odd_answers_can_be_stored(service, dataset, tmp_path, monkeypatch, tokens):
    completion, usage = type(service).completion, {"prompt_tokens": tokens, "completion_tokens": tokens}
    monkeypatch.setattr(type(service), "completion", lambda *args: completion(*args) | {"usage": usage})
    service.answer = lambda messages: "um \ud800 \0gato"  # half of a surrogate pair, and a zero byte
    translate(translation_flags(service, dataset, tmp_path / "pt"))
    assert written(tmp_path / "pt")[0]["captions-pt"] == ["um ? gato"]
    assert 0 <= read_json(tmp_path / "pt" / "quality.json")["usage"]["prompt_tokens"] < 10**12


def test_requests_are_not_logged(service, dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    translate(translation_flags(service, dataset, tmp_path / "pt"))
    assert "HTTP Request" not in caplog.text


@pytest.mark.parametrize("body", [{"api_key": "secret"}, {"a": {"Authorization": "secret"}}, {"x": "sk-secret"}])
def test_a_key_in_extra_body_is_refused(service, dataset, tmp_path, body):
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        translate(translation_flags(service, dataset, tmp_path / "pt", "--extra_body", json.dumps(body)))
    assert "secret" not in str(caught.value) and not service.keys


def test_many_refused_requests_in_a_row_end_the_run(service, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("captions.chat.client.MAX_REFUSED_IN_A_ROW", 4)
    service.faults[:] = [400] * 8
    with pytest.raises(ValueError, match="400"):
        translate(translation_flags(service, dataset, tmp_path / "pt", "--concurrency", "1"))
    assert len(service.requests) == 4


@pytest.mark.parametrize("size", [3, pytest.param(20, **SLOW)])
def test_several_captions_in_one_request(service, dataset, tmp_path, size):
    translate(translation_flags(service, dataset, tmp_path / "pt", "--captions_per_request", str(size)))
    check_rows(tmp_path / "pt")
    assert len(service.requests) == -(-8 // size)


def test_another_number_of_lines_falls_back_to_single_requests(service, dataset, tmp_path):
    service.faults[:] = ["lines", "lines"]
    translate(translation_flags(service, dataset, tmp_path / "pt", "--captions_per_request", "20"))
    check_rows(tmp_path / "pt")
    assert len(service.requests) == 2 + 8


@pytest.mark.slow
def test_a_schema_is_sent_only_on_request(service, dataset, tmp_path):
    translate(translation_flags(service, dataset, tmp_path / "plain"))
    assert not any("response_format" in request for request in service.requests)
    service.answer = lambda messages: json.dumps({"translation": messages[-1]["content"][::-1]})
    translate(translation_flags(service, dataset, tmp_path / "pt", "--response_schema"))
    check_rows(tmp_path / "pt")
    assert all("json_schema" in request.get("response_format", {}) for request in service.requests[8:])


@pytest.mark.slow
def test_long_sentences_are_translated_in_pieces(service, tmp_path):
    long = "A cat sits on a mat. " * 300
    features = {"image": Image(), "id": Value("int32"), "captions-en": CAPTIONS_FEATURE}
    data = saved_train(tmp_path / "data", features, [picture(0)], [0], [[long.strip()]])
    translate(translation_flags(service, data, tmp_path / "pt"))
    assert len(service.requests) == 4 and max(map(len, sent(service))) <= 2000


def test_another_model_on_the_server_is_noticed(service, dataset, tmp_path):
    service.answer = lambda messages: setattr(service, "model", "other" if service.requests else "stand-in") or "texto"
    with pytest.raises(ValueError, match=r"other.*stand-in"):
        translate(translation_flags(service, dataset, tmp_path / "pt", "--concurrency", "1"))


@pytest.mark.slow
def test_requests_are_spread_over_several_servers(service, dataset, tmp_path):
    with chat_service() as second:
        second.faults[:] = [500, 500]
        translate([*translation_flags(service, dataset, tmp_path / "pt"), "--base_url", service.url, second.url])
        check_rows(tmp_path / "pt")
        assert len(second.requests) >= 3 and len(service.requests) >= 4
        second.model = "other"
        with pytest.raises(ValueError, match="other, stand-in"):
            translate([*translation_flags(service, dataset, tmp_path / "2"), "--base_url", service.url, second.url])


def test_the_key_is_never_shown_or_stored(service, dataset, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for fault in (401, 302, 500):
        service.always = fault
        with pytest.raises((ValueError, OSError)) as caught:
            translate(translation_flags(service, dataset, tmp_path / "pt"))
        assert KEY not in str(caught.value) and caught.value.__cause__ is None
    service.always = None
    translate(translation_flags(service, dataset, tmp_path / "pt"))
    assert set(service.keys) == {f"Bearer {KEY}"}
    stored = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in [caplog.text, *capfd.readouterr(), *stored] if KEY in text]


@pytest.mark.slow
def test_a_local_server_needs_no_key(service, dataset, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    translate(translation_flags(service, dataset, tmp_path / "pt"))
    check_rows(tmp_path / "pt")
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        translate(translation_flags(service, dataset, tmp_path / "2"))
    assert "two words" not in str(caught.value)


# Captions


def test_captions_are_generated_in_the_language(service, dataset, tmp_path):
    service.answer = lambda messages: f'Legenda: "{messages[-1]["content"][-1]["text"]}"'
    generate(caption_flags(service, dataset, tmp_path / "out", "--image_side", "5"))
    rows = written(tmp_path / "out")
    assert len(rows) == ROWS and len(service.requests) == 4 * ROWS
    for row in rows:
        assert len(row["generated-captions-pt"]) == 4 and row["generated-captions-pt"][0].startswith(
            "Escreva uma legenda"
        )
        quality = row["generated-quality-pt"]
        assert (quality["captions"], quality["flagged"], quality["prompt_tokens"]) == (4, [], 80)
    image = service.requests[0]["messages"][-1]["content"][0]["image_url"]["url"]
    assert image.startswith("data:image/jpeg;base64,") and image_size(image) == 5
    report = read_json(tmp_path / "out" / "quality.json")
    assert report["usage"]["prompt_tokens"] == 80 * ROWS and report["flagged"] == 0
    assert not list((tmp_path / "out").glob("*.answers.jsonl"))
    service.answer = reversed_text
    translate(translation_flags(service, str(tmp_path / "out"), tmp_path / "pt"))
    names = written(tmp_path / "pt")[0].keys()
    assert {"captions-pt", "generated-captions-pt"} <= names and sent(service)[4 * ROWS :], (
        "only originals are translated"
    )
    assert set(sent(service)[4 * ROWS :]) == distinct()


def image_size(url: str) -> int:
    import base64
    import io

    import PIL.Image

    return max(PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size)


@pytest.mark.parametrize("choices", [1, pytest.param(None, **SLOW)])
def test_choices_are_counted(service, dataset, tmp_path, choices):
    service.choices = choices
    prompts = tmp_path / "p.yaml"
    prompts.write_text("prompts:\n  - Describe the image in {{ language }}.\n")
    more = ["--prompts", str(prompts), "--n", "3", "--temperature", "0.8"]
    generate(caption_flags(service, dataset, tmp_path / "out", *more))
    assert all(len(row["generated-captions-pt"]) == 3 for row in written(tmp_path / "out"))
    assert len(service.requests) == ROWS * (1 if choices is None else 3)


def test_bad_captions_are_listed_and_rows_without_captions_skipped(service, tmp_path):
    features = {"image": Image(), "id": Value("int32"), "captions-en": CAPTIONS_FEATURE}
    data = saved_train(tmp_path / "data", features, map(picture, range(3)), range(3), [["a cat"], [], []])
    service.always = "refusal"
    generate(caption_flags(service, data, tmp_path / "out"))
    (row,) = written(tmp_path / "out")
    assert row["id"] == 0 and row["generated-captions-pt"] == []
    flagged = row["generated-quality-pt"]["flagged"]
    assert [entry["position"] for entry in flagged] == [0, 1, 2, 3] and flagged[0]["flags"] == ["refused"]
    assert check_stage_and_count_rows(tmp_path / "out").skipped == {"refused": 2}
    assert read_json(tmp_path / "out" / "quality.json")["flags"] == {"refused": {"captions": 4}}


def test_a_text_model_asked_to_caption_is_refused_before_any_work(service, dataset, tmp_path):
    service.takes_images = False
    with pytest.raises(ValueError, match=r"not a multimodal model.*images"):
        generate(caption_flags(service, dataset, tmp_path / "out"))
    assert service.requests == [] and not (tmp_path / "out").exists()


def test_a_text_model_whose_server_drops_images_is_refused_before_any_work(service, dataset, tmp_path):
    service.takes_images = service.refuses_images = False
    for more in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="stand-in does not see images"):
            generate(caption_flags(service, dataset, tmp_path / "out", *more))
    assert service.requests == [] and not (tmp_path / "out").exists()


def test_an_image_above_the_limit_is_skipped(service, dataset, tmp_path):
    generate(caption_flags(service, dataset, tmp_path / "out", "--max_pixels", "1"))
    assert (
        check_stage_and_count_rows(tmp_path / "out").skipped == {"absurd image size": ROWS} and service.requests == []
    )


# Before any work


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--base_url", "http://example.org/v1"], "https"),
        (["--base_url", "https://me:secret@example.org/v1"], "user name"),
        (["--base_url", "ftp://example.org"], "ftp"),
        (["--temperature", "3"], r"temperature.*3"),
        (["--concurrency", "0"], r"concurrency.*0"),
        (["--extra_body", "[1]"], "JSON object"),
        (["--extra_body", '{"model": "x"}'], "model"),
        (["--price_per_million", "1", "2", "3"], "price"),
        (["--captions_per_request", "0"], "captions_per_request"),
        (["--language", "qaa"], "'qaa'"),
        (["--language", "zxx"], "'zxx'"),
    ],
)
def test_invalid_flags_are_refused(service, dataset, tmp_path, more, message):
    with pytest.raises(ValueError, match=message) as caught:
        translate(translation_flags(service, dataset, tmp_path / "pt", *more))
    assert "secret" not in str(caught.value) and not service.keys and not (tmp_path / "pt").exists()


@pytest.mark.parametrize("missing", ["--base_url", "--model"])
def test_address_and_model_are_required(service, dataset, tmp_path, missing):
    words = translation_flags(service, dataset, tmp_path / "pt")
    place = words.index(missing)
    with pytest.raises(ValueError, match=missing):
        translate(words[:place] + words[place + 2 :])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user: hello\n", r"user.*\{\{ text \}\}"),
        ('user: "{{ text }} {{ nothing }}"\n', "nothing"),
        ('user: "{{ text "\n', "user"),
        ("user: {{ text }}\n", "user|YAML"),
        ('user: "{{ text }}"\nlines: all\n', r"lines.*\{\{ text \}\}"),
        ("system: a\n", "user"),
        ('user: "{{ text }}"\nusr: b\n', "usr"),
        ('user: "{{ text }}"\nexamples: [a]\n', "examples"),
        ('user: "{{ text }}"\nexamples: [{text: a, answer: {b: c}}]\n', "examples"),
        ("user: \"{{ ''.__class__.__mro__ }}\"\n", "user"),
    ],
)
def test_invalid_prompts_are_refused(service, dataset, tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    more = ["--prompts", str(tmp_path / "p.yaml"), "--captions_per_request", "2"]
    with pytest.raises(ValueError, match=message):
        translate(translation_flags(service, dataset, tmp_path / "pt", *more))
    assert not service.keys


def test_examples_become_a_conversation(service, dataset, tmp_path):
    (tmp_path / "p.yaml").write_text(
        'user: "{{ source_language_code }}: {{ text }}"\nexamples: [{text: a dog, answer: um cachorro}]\n'
    )
    service.answer = lambda messages: messages[-1]["content"].removeprefix("en: ")[::-1]
    translate(translation_flags(service, dataset, tmp_path / "pt", "--prompts", str(tmp_path / "p.yaml")))
    check_rows(tmp_path / "pt")
    first, second, last = service.requests[0]["messages"]
    assert first == {"role": "user", "content": "en: a dog"} and second == {
        "role": "assistant",
        "content": "um cachorro",
    }
    assert last["content"].startswith("en: a ")


def test_a_wrong_address_or_model_ends_before_any_work(service, dataset, tmp_path):
    for more, message in (
        (["--base_url", service.url.removesuffix("/v1")], r"404.*/v1"),
        (["--model", "nothing"], "404.*nothing.*--model"),
    ):
        with pytest.raises(ValueError, match=message):
            translate(translation_flags(service, dataset, tmp_path / "pt", *more))
    assert service.requests == [] and not (tmp_path / "pt").exists()


def test_a_dry_run_counts_requests_and_asks_the_server(service, dataset, tmp_path, capsys, caplog):
    translate(translation_flags(service, dataset, tmp_path / "pt", "--dry_run"))
    generate(caption_flags(service, dataset, tmp_path / "out", "--dry_run"))
    output = capsys.readouterr().out
    assert "8 distinct captions" in output and "8 requests" in output and f"{4 * ROWS} requests" in output
    assert f"{ROWS} images" in output and service.requests == [] and len(service.keys) == 3
    assert [path.name for path in tmp_path.iterdir()] == []
    service.always = 401
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        translate(translation_flags(service, dataset, tmp_path / "pt", "--dry_run"))


# Killed runs


def test_a_memory_reads_the_journals_of_killed_runs(tmp_path):
    memory = TranslationMemory(tmp_path, {"model": "m"})
    memory.append("a cat", Answer("um gato", None, 10, 2))
    memory.append("a fish", Answer("", "refused", 10, 9, True))
    (journal,) = memory.folder.glob("*.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"source": "a do')  # a killed process can leave half a line
    after = TranslationMemory(tmp_path, {"model": "m"})
    expected = {"a cat": Answer("um gato"), "a fish": Answer("", "refused")}
    assert after.find(["a cat", "a fish", "a dog"]) == expected
    after.append("a dog", Answer("um cão", None, 5, 1))
    assert len(list(memory.folder.glob("*.jsonl"))) == 2, "each process has a journal of its own"
    after.add({"a dog": "um cão"})
    assert list(memory.folder.glob("*.jsonl")) == [journal]
    expected = {"answers": 3, "retried": 1, "prompt_tokens": 25, "completion_tokens": 12}
    assert TranslationMemory(tmp_path, {"model": "m"}).count_usage() == expected


@pytest.mark.slow
@pytest.mark.parametrize("command", ["translate", "generate"])
def test_a_killed_run_loses_only_requests_in_flight(service, dataset, tmp_path, command):
    make = translation_flags if command == "translate" else caption_flags
    total = 8 if command == "translate" else 4 * ROWS
    words = make(service, dataset, tmp_path / "out", "--concurrency", "2", "--batch_rows", "4")
    service.delay_s = 0.3
    with subprocess.Popen([sys.executable, "-m", f"captions.{command}", *words], cwd=ROOT, stderr=-3) as process:
        while len(service.requests) < 6 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert len(service.requests) >= 6, "the run was killed too early"
    service.delay_s = 0
    subprocess.run([sys.executable, "-m", f"captions.{command}", *words], cwd=ROOT, check=True, capture_output=True)
    contents = Counter(json.dumps(request["messages"]) for request in service.requests)
    assert len(contents) == total and sum(contents.values()) - total <= 2, "at most two requests were in flight"
    assert check_stage_and_count_rows(tmp_path / "out").rows == ROWS
    if command == "translate":
        check_rows(tmp_path / "out")


# Builds


@pytest.fixture
def config(service, dataset, tmp_path, monkeypatch):
    """A config that generates captions in Portuguese and translates the original ones, both by the server."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    server = {"base_url": service.url, "model": "stand-in"}
    content = {
        "dataset": dataset,
        "output": str(tmp_path / "built"),
        "language": "pt",
        "generate": {"captioner": "chat", "caption_language": "pt", **server},
        "translate": {"backend": "chat", **server},
        "card": CARD,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return tmp_path / "config.yaml"


def test_a_build_by_a_server(service, config, tmp_path):
    service.faults[:] = ["length", "length", "length", "length"]
    folder = build_dataset(BuildArguments(config))
    rows = rows_of(folder)
    assert len(rows) == ROWS
    assert all(row["captions-pt"] == [text[::-1] for text in row["captions-en"]] for row in rows)
    counts = [len(row["generated-captions-pt"]) for row in rows]
    assert "generated-captions-en" not in rows[0] and 4 * ROWS - 4 <= sum(counts) <= 4 * ROWS
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "model stand-in" in card and "temperature 0.0" in card and "tokens" in card
    assert "4 bad answers were requested again" in card or "truncated" in card
    assert "Você escreve legendas" in card and "{{ text }}" in card
    assert KEY not in card + (folder / "build.json").read_text()
    count = len(service.requests)
    build_dataset(BuildArguments(config))
    assert len(service.requests) == count


def test_a_dry_run_of_a_build_estimates_all_stages(service, config, tmp_path, caplog):
    with caplog.at_level("INFO", "capivara"):
        build_dataset(BuildArguments(config, dry_run=True))
    assert "1-generate, train: 12 images, 48 requests" in caplog.text
    assert "2-translate, train: 8 distinct captions" in caplog.text
    assert len(service.keys) == 3 and not service.requests and not (tmp_path / "built" / "1-generate").exists()
    service.always = 401
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        build_dataset(BuildArguments(config))


@pytest.mark.parametrize("place", ["generate", "translate", None])
def test_a_key_in_a_config_is_refused(service, config, place):
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    (content[place] if place else content)["api_key"] = "sk-secret"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"api_key.*OPENAI_API_KEY") as caught:
        build_dataset(BuildArguments(config, dry_run=True))
    assert "sk-secret" not in str(caught.value) and not service.keys


def test_servers_on_the_nodes_of_a_cluster_are_not_asked_by_the_login_node(service, config, caplog):
    flags = {"executor": "slurm", "tasks": 2, "partition": "gpu", "time": "01:00:00"}
    with caplog.at_level("INFO", "capivara"):
        build_dataset(BuildArguments(config, dry_run=True, **flags))
    assert not service.keys and "48 requests" in caplog.text


def test_progress_shows_tokens_and_cost(service, dataset, tmp_path):
    options = {"backend": "chat", "base_url": [service.url], "model": "stand-in", "price_per_million": [1e6, 2e6]}
    translator = ChatTranslator(TranslateArguments("data", tmp_path / "out", language="pt", **options), None)
    translator.translate(["a red cat", "a dog"])
    assert re.fullmatch(r"[\d,]+ tokens/s, cost 30\.00", translator.describe_usage()), "20 tokens read, 5 written"


def test_a_model_that_is_not_listed_is_only_a_warning(service, dataset, tmp_path, caplog):
    service.names = ("alias",)
    flags = translation_flags(service, dataset, tmp_path / "pt", "--model", "alias")
    translate([*flags, "--dry_run"])
    assert "does not list the model alias. It lists: stand-in" in caplog.text
    translate(flags)
    check_rows(tmp_path / "pt")
    fingerprint = read_json(tmp_path / "pt" / "stage.json")["settings"]["translator"]
    assert fingerprint["model"] == "stand-in", "the name that the server reports"


def test_keys_of_extra_body_replace_those_of_flags(service, dataset, tmp_path):
    extra = {"max_tokens": None, "max_completion_tokens": 50, "chat_template_kwargs": {"enable_thinking": False}}
    translate(translation_flags(service, dataset, tmp_path / "pt", "--extra_body", json.dumps(extra)))
    check_rows(tmp_path / "pt")
    assert all(extra.items() <= request.items() and request["temperature"] == 0 for request in service.requests)

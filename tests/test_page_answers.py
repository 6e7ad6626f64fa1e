"""The answers of the page without a server: search, refused questions, classification and texts."""

import json
import re
import time
from datetime import date
from pathlib import Path

import made_pictures
import numpy as np
import pytest
from made_pictures import CAPTIONS, made_index, save_folder
from PIL import Image

from capivara_search.index import PictureIndex
from capivara_search.page import server
from capivara_search.page.answers import MAX_ANSWER_PICTURES, MAX_LABELS, MAX_TEXT_CHARACTERS, PageAnswers, Question
from capivara_search.page.guard import RequestRefusedError
from hub_upload.space import static_page

PAGE = Path(server.__file__).parent
ATTACK = "<img src=x onerror=alert(1)>\"'${alert(1)}</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("pictures") / "fotos")


@pytest.fixture(scope="module")
def index(tmp_path_factory, folder, saved_tiny_folder):
    return made_index(tmp_path_factory.mktemp("index") / "fotos.lance", folder, saved_tiny_folder)


@pytest.fixture
def answers(index):
    return PageAnswers(index, is_local=True)


def names(answer: dict) -> list[str]:
    return [hit["name"] for hit in answer["hits"]]


def upload(number: int):
    return made_pictures.made_pictures()[number]


# --- Search ----------------------------------------------------------------------------------------------------------


def test_search_matches_a_plain_computation(answers, index, folder):
    every = [str(folder / caption.split()[0] / f"{caption}.png") for caption in CAPTIONS]
    vectors, picture = index.vectors(every), index.model.embed_images([upload(7)])[0]
    text = index.model.embed_texts(["um gato azul"])[0]
    for question, image, query in (
        ({"text": " um gato azul"}, None, text),
        ({}, upload(7), picture),
        ({"text": "um gato azul"}, upload(7), text + picture),
        ({"like": every[3]}, None, vectors[3]),
        ({"like": every[3], "text": "um gato azul"}, None, vectors[3] + text),
    ):
        answer = answers.search(Question.parse({**question, "k": 9}), image)
        scores = vectors @ (query / np.linalg.norm(query))
        expected = [every[i] for i in np.argsort(-scores, kind="stable") if every[i] != question.get("like")][:9]
        found_scores = [hit["score"] for hit in answer["hits"]]
        assert len(found_scores) == 9 and found_scores == sorted(found_scores, reverse=True)
        np.testing.assert_allclose(found_scores, [scores[every.index(path)] for path in expected], atol=2e-3)
        assert answer["hits"][0]["path"] == expected[0]
    assert answer["count"] == 30


def test_without_a_query_the_newest_pictures_come_first(answers):
    first = answers.search(Question.parse({"k": 5}), None)
    assert names(first) == CAPTIONS[:-6:-1] and {hit["score"] for hit in first["hits"]} == {None}
    assert answers.search(Question.parse({"text": "  \n"}), None) == answers.search(Question(), None)


@pytest.mark.parametrize("zone", ["America/Sao_Paulo", "Asia/Kolkata"])
def test_the_newest_pictures_by_the_date_of_the_camera_or_the_file(zone, saved_tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    folder = save_folder(tmp_path / "fotos")
    for number in range(8):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2024:01:{number + 1:02} 01:30:00"
        upload(number).save(folder / f"foto {number}.jpg", exif=exif)
    index = made_index(tmp_path / "i.lance", folder, saved_tiny_folder)
    every = index.newest(100)
    times = [hit.taken or hit.modified for hit in every]
    assert len(every) == 38 and times == sorted(times, reverse=True)
    assert sum(hit.taken is not None for hit in every) == 8 and all(index.newest(k) == every[:k] for k in range(1, 39))
    monkeypatch.undo()
    time.tzset()


def test_folder_and_dates_filter_every_search(answers, folder):
    for question in ({}, {"text": "um gato"}, {"like": str(folder / "azul" / "azul inteiro.png")}):
        answer = answers.search(Question.parse({**question, "folder": str(folder / "verde")}), None)
        assert sorted(names(answer)) == sorted(caption for caption in CAPTIONS if caption.startswith("verde"))
        days = {"since": "2024-01-03", "until": "2024-01-04"}
        assert sorted(names(answers.search(Question.parse({**question, **days}), None))) == sorted(CAPTIONS[2:4])


def test_a_missing_query_picture_is_refused_and_an_empty_index_has_no_hits(answers, saved_tiny_folder, tmp_path):
    with pytest.raises(RequestRefusedError, match="gone"):
        answers.search(Question.parse({"like": "/etc/passwd"}), None)
    empty = PageAnswers(PictureIndex.open(tmp_path / "new.lance", str(saved_tiny_folder)), is_local=False)
    assert empty.search(Question.parse({"text": "gato"}), None)["hits"] == []
    assert empty.status(Question()) | {"version": 0} == {
        "version": 0, "count": 0, "videos": 0, "model": "model", "note": None,
        "progress": None, "local": False,
    }  # fmt: skip


def test_feedback_by_pictures(answers, index):
    """`more` and `less` have the same effect as in the index; a missing picture is refused."""
    paths = [hit.path for hit in index.newest(30)]
    images = index.vectors(paths)
    wanted = index.apply_feedback(index.model.embed_texts(["azul"])[0], [(1.0, images[3]), (-1.0, images[8])])
    hits = answers.search(Question.parse({"text": "azul", "more": [paths[3]], "less": [paths[8]]}), None)["hits"]
    assert [hit["path"] for hit in hits] == [hit.path for hit in index.search_vector(wanted, 30, group_duplicates=True)]
    alone = answers.search(Question.parse({"more": [paths[3]]}), None)["hits"]
    assert alone[0]["path"] == paths[3] and alone[0]["score"] == pytest.approx(1, abs=1e-3)
    away = answers.search(Question.parse({"less": [paths[3]]}), None)["hits"]
    assert away[-1]["path"] == paths[3] and {hit["score"] for hit in away} == {None}, (
        "all pictures, the least similar first, without scores"
    )
    with pytest.raises(RequestRefusedError, match="gone"):
        answers.search(Question.parse({"text": "azul", "less": ["/gone.png"]}), None)


def test_a_long_text_is_truncated_and_a_very_long_one_is_refused(answers):
    sentence = "um gato azul e uma casa verde "
    short, long = (answers.search(Question.parse({"text": sentence * n, "k": 3}), None) for n in (1, 300))
    assert long["cut"] and not short["cut"] and len(names(long)) == 3
    with pytest.raises(RequestRefusedError, match="long_text"):
        Question.parse({"text": "a" * (MAX_TEXT_CHARACTERS + 1)})


@pytest.mark.parametrize(
    "question",
    [
        *(None, [], "azul", 5, {"fn_index": 1}, {"text": 5}, {"text": None}, {"text": ["a"]}, {"text": "\ud800"}),
        *({"like": {"path": "/etc"}}, {"like": 5}, {"folder": ["a"]}, {"template": {}}, {"language": 5}),
        *({"folder": folder} for folder in ("~root", "~nosuchuser", "../Fotos", "/Fotos/../etc", "Fotos")),
        *({"k": k} for k in (0, -1, MAX_ANSWER_PICTURES + 1, True, None, "6", 6.0, [6], 10**400)),
        *({"since": value} for value in (5, "ontem", "2024-13-01", "2024", "9999-12-31", None)),
        *({"labels": labels} for labels in ("azul", {}, [5], [None], ["\udfff"], [["a"]], 7)),
    ],
)
def test_an_invalid_question_is_refused(question):
    with pytest.raises(RequestRefusedError, match="bad_question"):
        Question.parse(question)


def test_a_valid_question_is_parsed():
    values = {"since": "2024-02-01", "until": "", "labels": [" um  gato", "casa", "Casa", ""], "language": "pt-BR"}
    question = Question.parse(values)
    assert (question.since, question.until, question.language) == (date(2024, 2, 1), None, "pt")
    assert question.check_labels_and_template()[0] == ["um gato", "casa"]
    assert Question.parse({"language": "fr"}).language == "en"
    with pytest.raises(RequestRefusedError, match="dates"):
        Question.parse({"since": "2024-02-02", "until": "2024-02-01"})


# --- Classification --------------------------------------------------------------------------------------------------


def test_classification_matches_the_index(answers, index):
    labels = ["gato", "casa verde", "céu"]
    answer = answers.classify(Question.parse({"labels": labels, "template": "{}"}), upload(3))
    (expected,) = index.classify(upload(3), labels, "{}")
    shares = answer["shares"]
    assert dict(map(tuple, shares)) == pytest.approx(expected.shares) and answer["label"] == expected.label
    assert [share for _, share in shares] == sorted((share for _, share in shares), reverse=True)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"labels": []}, "few_labels"),
        ({"labels": ["gato", " Gato "]}, "few_labels"),
        ({"labels": [f"casa {i}" for i in range(MAX_LABELS + 1)]}, "many_labels"),
        ({"labels": ["a", "b"], "template": "uma foto"}, "template"),
        ({"labels": ["a", "b"], "template": "{} e {}"}, "template"),
        ({"labels": ["a", "b"]}, "nothing_given"),
    ],
)
def test_invalid_classifications_are_refused(answers, values, code):
    with pytest.raises(RequestRefusedError, match=code):
        answers.classify(Question.parse(values), None)


# --- Texts -----------------------------------------------------------------------------------------------------------


def flatten(messages: dict, prefix: str = "") -> dict[str, str]:
    """Return texts by keys such as "errors.busy", so that there are no nested sections."""
    texts = {prefix + key: text for key, text in messages.items() if isinstance(text, str)}
    for key, section in messages.items():
        if isinstance(section, dict):
            texts |= flatten(section, f"{prefix}{key}.")
    return texts


def test_both_languages_have_the_same_texts_and_placeholders():
    portuguese, english = (
        flatten(json.loads((PAGE / "words" / f"{language}.json").read_text("utf-8"))) for language in ("pt", "en")
    )
    assert portuguese.keys() == english.keys()
    for key, text in portuguese.items():
        assert set(re.findall(r"\{\w*\}", text)) == set(re.findall(r"\{\w*\}", english[key])), key
        assert text != english[key] or key == "pixels", f"{key} is not translated"


def test_every_text_is_used_and_every_used_text_exists():
    """On the page with a server and on the page without one."""
    scripts = "".join(path.read_text("utf-8") for path in (*(PAGE / "static").glob("*.js"), static_page.SOURCE_SCRIPT))
    template = (PAGE / "page.html").read_text("utf-8")
    source = "".join(path.read_text("utf-8") for path in PAGE.glob("*.py"))
    texts = flatten(server.load_page_messages("pt")) | flatten(server.load_page_messages("pt", is_static=True))
    used = set(re.findall(r'\bmessage\("(\w+)"', scripts)) | set(re.findall(r"\bt(?:\.|\[')(\w+)", template))
    assert not {key for key in used if key not in texts and f"{key}_other" not in texts}
    raised = set(re.findall(r'(?:RequestRefusedError|make_coded_error|errorWithCode)\(\s*"(\w+)"', source + scripts))
    codes = raised | {"connection", "too_many_pixels"}  # these two are chosen by conditional expressions
    assert codes == {key.removeprefix("errors.") for key in texts if key.startswith("errors.")}
    quoted = set(re.findall(r'["`{](\w+)["`}]', scripts + source)) | used
    stems = {key: re.sub("_(one|other|long)$", "", key) for key in texts if not key.startswith("errors.")}
    assert not [key for key, stem in stems.items() if not {key, stem} & quoted], "texts that are not used"


def test_credits_are_escaped_and_licenses_are_linked():
    credit = server.Credit(ATTACK, ATTACK, "{{words}} {name} " + ATTACK)
    html = server._render_page("pt", False, credit)
    assert "<img src=x" not in html.replace('<img src="static', "") and html.count("</script>") == 3
    assert "{{words}} {name}" in html
    known = server._render_page("en", False, server.Credit("Áreas", "cc-by-sa-4.0", "Made here"))
    assert 'Áreas, license <a href="https://creativecommons.org/licenses/by-sa/4.0/"' in known
    assert ">cc-by-sa-4.0</a>. Made here" in known and '<html lang="en">' in known

"""Portuguese names and prompts are complete, ordered and agree in gender; the authors' file is never executed."""

import hashlib
import json
import re
import unicodedata

import pytest

from eval.prompts import PROMPTS_FOLDER, fill_template, list_benchmarks, load_prompts, parse_python_assignments

# First 16 digits of the SHA-256 of the English names, one per line in the order of the labels. They were computed from
# the lists that ELEVATER (twenty datasets) and open_clip (ImageNet-1k) publish, not from the files in pt/.
ORDER_DIGESTS = {
    "caltech-101": "44dced67cfca330d", "cifar-10": "bb3914949cecedee", "cifar-100": "ad0410630bfb8997",
    "country211": "027b30d283f3a153", "dtd": "681d23b9cd3c2ede", "eurosat_clip": "ee2e41b9973e7206",
    "fer-2013": "0fece1ddf1a3ebf7", "fgvc-aircraft-2013b-variants102": "331deff41262a93c",
    "food-101": "513e7f6450e69cc6", "gtsrb": "953036bc5aedbe6b", "hateful-memes": "62a880e9ac288c0e",
    "imagenet-1k": "571ae1c583b4be7d", "kitti-distance": "ecc16a4f92ee9fb1", "mnist": "29dd21f55e4611d4",
    "oxford-flower-102": "5429e1ef6e0e5aa3", "oxford-iiit-pets": "4a5177fdf86b7d17",
    "patch-camelyon": "27352df7ede1fd87", "rendered-sst2": "2e61aa7558046c2c", "resisc45_clip": "3c2177013901f0ef",
    "stanford-cars": "10033eecdd6946a9", "voc-2007-classification": "7d877f185c807bc5",
}  # fmt: skip
METRICS = {"accuracy", "mean-per-class", "11point_mAP", "roc_auc"}
PLACEHOLDER = re.compile(r"\{(nome|um|o|do|no)\}")


def read_prompts_file(name: str) -> dict:
    return json.loads((PROMPTS_FOLDER / "pt" / f"{name}.json").read_text(encoding="utf-8"))


def test_all_benchmarks_have_prompts():
    assert set(list_benchmarks()) == set(ORDER_DIGESTS)
    counts = {name: len(read_prompts_file(name)["classes"]) for name in ORDER_DIGESTS}
    assert sum(counts.values()) - counts["imagenet-1k"] == 1151, "classes of ELEVATER's twenty datasets"


@pytest.mark.parametrize("name", ORDER_DIGESTS)
def test_names_and_templates_are_well_formed_and_in_the_order_of_the_labels(name):
    """A list in another order would give images the names of other classes, which looks like a weak model."""
    content = read_prompts_file(name)
    names = [entry["pt"] for entry in content["classes"]]
    assert len({n.casefold() for n in names}) == len(names), "no duplicates"
    for text in [*names, *content["templates"]]:
        assert text == unicodedata.normalize("NFC", text) == " ".join(text.split()) and text
    assert content["metric"] in METRICS and content["language"] == "pt" and content["templates"]
    for entry in content["classes"]:
        assert entry["gender"] in "mf" and entry["number"] in "sp" and entry["en"], entry
        assert entry.keys() <= {"en", "pt", "gender", "number", "article"}
        assert entry.get("article", False) is False
    for template in content["templates"]:
        assert len(PLACEHOLDER.findall(template)) == template.count("{") == 1, template
    english = "\n".join(load_prompts(name).english_names)
    assert hashlib.sha256(english.encode()).hexdigest()[:16] == ORDER_DIGESTS[name], "a class was moved or renamed"
    for prompts in load_prompts(name).class_prompts:
        assert len(set(prompts)) == len(prompts) == len(content["templates"]) and "{" not in "".join(prompts)


def test_articles_agree_in_gender_and_number():
    forms, cat = ["{nome}", "{um}", "{o}", "{do}", "{no}"], {"pt": "gato", "gender": "m", "number": "s"}
    houses = {"pt": "casas", "gender": "f", "number": "p"}
    cuba = {"pt": "Cuba", "gender": "f", "number": "s", "article": False}
    assert [fill_template(f, cat) for f in forms] == ["gato", "um gato", "o gato", "do gato", "no gato"]
    assert [fill_template(f, houses) for f in forms] == ["casas", "umas casas", "as casas", "das casas", "nas casas"]
    assert [fill_template(f, cuba) for f in forms] == ["Cuba", "Cuba", "Cuba", "de Cuba", "em Cuba"]
    with pytest.raises(ValueError, match=r"'uma foto de {} {cor}' .*{}, {nome}, {um}, "):
        fill_template("uma foto de {} {cor}", cat)


# --- Classes of the user's own file ----------------------------------------------------------------------------------


def load_classes_file(path, **content):
    """Write a classes file and load its prompts."""
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_prompts(str(path))


def test_classes_may_be_plain_names_and_placeholders_empty(tmp_path):
    prompts = load_classes_file(
        tmp_path / "cores.json", classes=["azul", {"pt": "Cuba"}], templates=["cor {}", "{um}!"]
    )
    assert prompts.class_prompts == [["cor azul", "azul!"], ["cor Cuba", "Cuba!"]], "no gender, no article"
    assert prompts.names == prompts.english_names == ["azul", "Cuba"] and prompts.benchmark == "cores"
    assert (prompts.language, prompts.protocol, prompts.metric) == ("pt", "own", "accuracy")


def test_the_classes_file_in_the_docs_is_valid(tmp_path):
    page = (PROMPTS_FOLDER.parents[1] / "docs" / "how-to" / "evaluation.md").read_text(encoding="utf-8")
    content = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    prompts = load_classes_file(tmp_path / "a.json", **content)
    assert prompts.language == "es" and prompts.class_prompts[1] == ["una imagen de color azul", "algo de color azul"]


def test_classes_may_be_in_another_language(tmp_path):
    classes = ["rojo", {"es": "azul", "en": "blue"}, {"es": "azul", "en": "navy"}]
    content = {"dataset": "colores", "language": "es", "classes": classes, "templates": ["color {}"]}
    prompts = load_classes_file(tmp_path / "a.json", **content)
    assert prompts.names == ["rojo", "azul", "azul"] and prompts.english_names == ["rojo", "blue", "navy"]
    assert (prompts.benchmark, prompts.language, prompts.class_prompts[0]) == ("colores", "es", ["color rojo"])
    (note,) = prompts.notes
    assert "azul" in note and "rojo" not in note, "the name of two classes is stated"
    assert load_prompts(str(tmp_path / "a.json"), language="es") == prompts
    with pytest.raises(ValueError, match="'es', not 'pt'"):
        load_prompts(str(tmp_path / "a.json"), language="pt")


INVALID_CONTENTS = {  # name -> (changes to a valid file, message)
    "twice": ({"classes": ["rojo", "azul", "rojo"]}, r"\['rojo'\]"),
    "empty name": ({"classes": ["rojo", " "]}, "class 1 .*'es'.*{'es': ' '}"),
    "no class": ({"classes": []}, "classes and templates"),
    "no list": ({"templates": "color {}"}, "templates .*list"),
    "no placeholder": ({"templates": ["color"]}, "'color' .*{}"),
    "Portuguese placeholder": ({"templates": ["color {um}"]}, "'color {um}' .*{}"),
    "language": ({"language": "espanol del sur"}, "language .*'espanol del sur'"),
    "metric": ({"metric": "acuracy"}, "accuracy, .*'acuracy'"),
    "gender": ({"language": "pt", "classes": [{"pt": "a", "gender": ["x"]}]}, "gender .*class 0"),
}


@pytest.mark.parametrize("name", INVALID_CONTENTS)
def test_an_invalid_classes_file_is_refused_with_a_valid_example(name, tmp_path):
    changes, message = INVALID_CONTENTS[name]
    content = {"language": "es", "classes": ["rojo", "azul"], "templates": ["color {}"]} | changes
    with pytest.raises(ValueError, match=message) as error:
        load_classes_file(tmp_path / "a.json", **content)
    example = json.loads(str(error.value).partition("Example: ")[2])
    assert "\n" not in str(error.value)
    assert load_classes_file(tmp_path / "b.json", **example).class_prompts[0] == ["una imagen de color rojo"]


AUTHORS_FILE = '''
"""Docstring."""
a_classes = ["avião", "automóvel", "pássaro", "gato", "cervo", "cachorro", "sapo", "cavalo", "navio", "caminhão"]
a_templates = [lambda c: f"uma foto de {c}.", "um desenho de {}."]
f_classes = ["torta"]
class_map = {"cifar-10": a_classes, "food-101": f_classes}
template_map = {"cifar-10": a_templates, "food-101": a_templates}
'''


def test_the_authors_file_is_parsed(tmp_path):
    (tmp_path / "prompts.py").write_text(AUTHORS_FILE, encoding="utf-8")
    prompts = load_prompts("cifar-10", "authors", authors_file=str(tmp_path / "prompts.py"))
    assert prompts.class_prompts[0] == ["uma foto de avião.", "um desenho de avião."] and not prompts.notes
    (note,) = load_prompts("food-101", "authors", authors_file=str(tmp_path / "prompts.py")).notes
    assert "tacos" in note


@pytest.mark.parametrize(
    "text", ["x = __import__('os').system('true')", "x = open('f')", "x = ['a'] * 0 or ['b']", "x = ("]
)
def test_code_in_the_authors_file_is_refused(text):
    with pytest.raises(ValueError, match="plain assignments"):
        parse_python_assignments(text)


def test_babel_names_some_classes_of_imagenet():
    hindi = load_prompts("imagenet-1k", "babel", language="hi")
    assert len(hindi.names) == len(hindi.class_prompts) == 342 and "342 of the 1000" in hindi.notes[0]


def test_invalid_arguments_are_refused(tmp_path):
    for call, message in (
        (lambda: load_prompts("cifar10"), "`cifar10`.*`cifar-10`"),
        (lambda: load_prompts("cifar-10", language="es"), "'pt', not 'es'"),
        (lambda: load_prompts("cifar-10", "authors"), "--authors_file"),
        (lambda: load_prompts("cifar-10", "authors", authors_file=str(tmp_path / "no.py")), "--authors_file.*no.py"),
        (lambda: load_prompts("cifar-10", "babel"), "imagenet-1k.*cifar-10"),
        (lambda: load_prompts("imagenet-1k", "babel", language="zz"), "'zz'.*AF, "),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_review_file_agrees_with_the_prompts():
    review = json.loads((PROMPTS_FOLDER / "pt" / "review.json").read_text(encoding="utf-8"))
    assert set(review) == set(ORDER_DIGESTS) and sum(map(len, review.values())) > 50
    for name, entries in review.items():
        prompts = load_prompts(name)
        for entry in entries:
            assert prompts.english_names[entry["index"]] == entry["en"]
            assert prompts.names[entry["index"]] == entry["kept"] and entry["why"]

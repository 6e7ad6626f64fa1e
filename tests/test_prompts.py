"""Portuguese names and prompts are whole, in order, and agree in gender; other protocols are parsed, never executed."""

import hashlib
import json
import re
import unicodedata

import pytest

from eval.prompts import PROMPTS_FOLDER, fill_template, list_benchmarks, load_prompts, parse_assignments

# SHA-256, its first 16 digits, of the English names in the order of the labels, a line each: the twenty as ELEVATER
# publishes them, ImageNet-1k as open_clip does. Computed from those lists, not from the files in pt/.
ORDERS = {
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


def data(name: str) -> dict:
    return json.loads((PROMPTS_FOLDER / "pt" / f"{name}.json").read_text(encoding="utf-8"))


def test_all_sets_are_there():
    assert set(list_benchmarks()) == set(ORDERS)
    counts = {name: len(data(name)["classes"]) for name in ORDERS}
    assert sum(counts.values()) - counts["imagenet-1k"] == 1151, "ELEVATER's twenty sets"


@pytest.mark.parametrize("name", ORDERS)
def test_names_and_templates_are_well_formed_and_in_the_order_of_the_labels(name):
    """A list in another order would give each image the name of another class, and look like a weak model."""
    content = data(name)
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
    assert hashlib.sha256(english.encode()).hexdigest()[:16] == ORDERS[name], "a class was moved or renamed"
    for prompts in load_prompts(name).class_prompts:
        assert len(set(prompts)) == len(prompts) == len(content["templates"]) and "{" not in "".join(prompts)


def test_articles_agree():
    forms, cat = ["{nome}", "{um}", "{o}", "{do}", "{no}"], {"pt": "gato", "gender": "m", "number": "s"}
    houses = {"pt": "casas", "gender": "f", "number": "p"}
    cuba = {"pt": "Cuba", "gender": "f", "number": "s", "article": False}
    assert [fill_template(f, cat) for f in forms] == ["gato", "um gato", "o gato", "do gato", "no gato"]
    assert [fill_template(f, houses) for f in forms] == ["casas", "umas casas", "as casas", "das casas", "nas casas"]
    assert [fill_template(f, cuba) for f in forms] == ["Cuba", "Cuba", "Cuba", "de Cuba", "em Cuba"]
    with pytest.raises(ValueError, match=r"needs the class's name in place of {}, {nome}, {um}, "):
        fill_template("uma foto de {} {cor}", cat)


# --- One's own classes -----------------------------------------------------------------------------------------------


def own(path, **content):
    """The prompts of a file of one's own."""
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_prompts(str(path))


def test_names_alone_and_an_empty_placeholder(tmp_path):
    prompts = own(tmp_path / "cores.json", classes=["azul", {"pt": "Cuba"}], templates=["cor {}", "{um}!"])
    assert prompts.class_prompts == [["cor azul", "azul!"], ["cor Cuba", "Cuba!"]], "no gender, no article"
    assert prompts.names == prompts.english_names == ["azul", "Cuba"] and prompts.benchmark == "cores"
    assert (prompts.language, prompts.protocol, prompts.metric) == ("pt", "own", "accuracy")


def test_the_file_in_the_docs_is_one(tmp_path):
    page = (PROMPTS_FOLDER.parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    prompts = own(tmp_path / "a.json", **json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1]))
    assert prompts.language == "es" and prompts.class_prompts[1] == ["una imagen de color azul", "algo de color azul"]


def test_classes_of_another_language(tmp_path):
    classes = ["rojo", {"es": "azul", "en": "blue"}, {"es": "azul", "en": "navy"}]
    prompts = own(tmp_path / "a.json", dataset="colores", language="es", classes=classes, templates=["color {}"])
    assert prompts.names == ["rojo", "azul", "azul"] and prompts.english_names == ["rojo", "blue", "navy"]
    assert (prompts.benchmark, prompts.language, prompts.class_prompts[0]) == ("colores", "es", ["color rojo"])
    assert prompts.notes == ("1 names stand for several classes, whose images count as wrong: azul.",)
    assert load_prompts(str(tmp_path / "a.json"), language="es") == prompts
    with pytest.raises(ValueError, match="are in 'es'; leave out --language pt"):
        load_prompts(str(tmp_path / "a.json"), language="pt")


OWN_SLIPS = {
    "twice": ({"classes": ["rojo", "azul", "rojo"]}, r"no class may be there twice, as \['rojo'\] are"),
    "empty name": ({"classes": ["rojo", " "]}, "class 1 needs a name in the file's language, 'es', got {'es': ' '}"),
    "no class": ({"classes": []}, "at least one of classes and of templates"),
    "no list": ({"templates": "color {}"}, "templates must be of type list"),
    "no placeholder": ({"templates": ["color"]}, "'color' needs the class's name in place of {}"),
    "Portuguese placeholder": ({"templates": ["color {um}"]}, "'color {um}' needs the class's name in place of {}"),
    "language": ({"language": "espanol del sur"}, "language must be a code such as 'es', got 'espanol del sur'"),
    "metric": ({"metric": "acuracy"}, "unknown metric 'acuracy', the known ones are"),
    "gender": ({"language": "pt", "classes": [{"pt": "a", "gender": ["x"]}]}, "class 0 needs gender m or f and number"),
}


@pytest.mark.parametrize("slip", OWN_SLIPS)
def test_a_slip_shows_a_whole_file_that_works(slip, tmp_path):
    content = {"language": "es", "classes": ["rojo", "azul"], "templates": ["color {}"]} | OWN_SLIPS[slip][0]
    with pytest.raises(ValueError, match=OWN_SLIPS[slip][1]) as error:
        own(tmp_path / "a.json", **content)
    shown = json.loads(str(error.value).partition("Such a file works: ")[2])
    assert "\n" not in str(error.value) and own(tmp_path / "b.json", **shown).class_prompts[0] == [
        "una imagen de color rojo"
    ]


PLAIN = '''
"""Docstring."""
a_classes = ["avião", "automóvel", "pássaro", "gato", "cervo", "cachorro", "sapo", "cavalo", "navio", "caminhão"]
a_templates = [lambda c: f"uma foto de {c}.", "um desenho de {}."]
f_classes = ["torta"]
class_map = {"cifar-10": a_classes, "food-101": f_classes}
template_map = {"cifar-10": a_templates, "food-101": a_templates}
'''


def test_the_authors_file_is_parsed(tmp_path):
    (tmp_path / "prompts.py").write_text(PLAIN, encoding="utf-8")
    prompts = load_prompts("cifar-10", "authors", authors_file=str(tmp_path / "prompts.py"))
    assert prompts.class_prompts[0] == ["uma foto de avião.", "um desenho de avião."] and not prompts.notes
    (note,) = load_prompts("food-101", "authors", authors_file=str(tmp_path / "prompts.py")).notes
    assert "tacos" in note


@pytest.mark.parametrize(
    "text", ["x = __import__('os').system('true')", "x = open('f')", "x = ['a'] * 0 or ['b']", "x = ("]
)
def test_code_in_the_authors_file_is_refused(text):
    with pytest.raises(ValueError, match="plain assignments"):
        parse_assignments(text)


def test_babel_names_a_part_of_imagenet():
    hindi = load_prompts("imagenet-1k", "babel", language="hi")
    assert len(hindi.names) == len(hindi.class_prompts) == 342 and "342 of the 1000" in hindi.notes[0]


def test_slips_are_named(tmp_path):
    for call, message in (
        (lambda: load_prompts("cifar10"), "Unknown benchmark: `cifar10`. Did you mean `cifar-10`"),
        (lambda: load_prompts("cifar-10", language="es"), "are in 'pt'; leave out --language es"),
        (lambda: load_prompts("cifar-10", "authors"), "give --authors_file"),
        (lambda: load_prompts("cifar-10", "authors", authors_file=str(tmp_path / "no.py")), "a path; got .*no.py"),
        (lambda: load_prompts("cifar-10", "babel"), "imagenet-1k alone"),
        (lambda: load_prompts("imagenet-1k", "babel", language="zz"), "no language 'zz'; there are AF, "),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_second_reading_is_recorded():
    review = json.loads((PROMPTS_FOLDER / "pt" / "review.json").read_text(encoding="utf-8"))
    assert set(review) == set(ORDERS) and sum(map(len, review.values())) > 50
    for name, entries in review.items():
        prompts = load_prompts(name)
        for entry in entries:
            assert (
                prompts.english_names[entry["index"]] == entry["en"] and prompts.names[entry["index"]] == entry["kept"]
            )
            assert entry["why"]

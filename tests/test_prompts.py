"""Portuguese names and prompts are whole, in order, and agree in gender; other protocols are parsed, never executed."""

import json
import re
import unicodedata

import pytest

from eval.prompts import FOLDER, assignments, benchmarks, fill, load_prompts

COUNTS = {
    "caltech-101": 102, "cifar-10": 10, "cifar-100": 100, "country211": 211, "dtd": 47, "eurosat_clip": 10,
    "fer-2013": 7, "fgvc-aircraft-2013b-variants102": 100, "food-101": 101, "gtsrb": 43, "hateful-memes": 2,
    "imagenet-1k": 1000, "kitti-distance": 4, "mnist": 10, "oxford-flower-102": 102, "oxford-iiit-pets": 37,
    "patch-camelyon": 2, "rendered-sst2": 2, "resisc45_clip": 45, "stanford-cars": 196, "voc-2007-classification": 20,
}  # fmt: skip
METRICS = {"accuracy", "mean-per-class", "11point_mAP", "roc_auc"}
PLACEHOLDER = re.compile(r"\{(nome|um|o|do|no)\}")


def data(name: str) -> dict:
    return json.loads((FOLDER / "pt" / f"{name}.json").read_text(encoding="utf-8"))


def test_all_sets_are_there():
    assert {name: len(data(name)["classes"]) for name in benchmarks()} == COUNTS
    assert sum(COUNTS.values()) - 1000 == 1151, "ELEVATER's twenty sets"


@pytest.mark.parametrize("name", COUNTS)
def test_names_and_templates_are_well_formed(name):
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
    for prompts in load_prompts(name).filled:
        assert len(set(prompts)) == len(prompts) == len(content["templates"]) and "{" not in "".join(prompts)


def test_orders_are_those_of_the_labels():
    """The two sets whose order another package holds."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    assert load_prompts("imagenet-1k").names_en == list(IMAGENET_CLASSNAMES)
    cifar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert load_prompts("cifar-10").names_en == cifar
    food = load_prompts("food-101")
    assert food.names_en[96] == "tacos" and len(food.names) == 101


@pytest.mark.parametrize(
    ("benchmark", "english", "wrong"),
    [
        ("cifar-100", "mouse", "rato de computador"),
        ("caltech-101", "crayfish", "caranguejo"),
        ("food-101", "macarons", "macarrão"),
        ("cifar-100", "ray", "raio"),
        ("imagenet-1k", "kite (bird of prey)", "pipa"),
    ],
)
def test_senses(benchmark, english, wrong):
    prompts = load_prompts(benchmark)
    assert wrong not in prompts.names[prompts.names_en.index(english)]


def test_imagenet_keeps_its_two_cranes_apart():
    names = load_prompts("imagenet-1k").names
    assert names[134] != names[517] and "guindaste" in names[517] and "guindaste" not in names[134]


def test_review_is_recorded():
    review = json.loads((FOLDER / "pt" / "review.json").read_text(encoding="utf-8"))
    assert set(review) == set(COUNTS) and sum(map(len, review.values())) > 50
    for name, entries in review.items():
        names = load_prompts(name)
        for entry in entries:
            assert names.names_en[entry["index"]] == entry["en"] and names.names[entry["index"]] == entry["kept"]
            assert entry["why"]


def test_articles_agree():
    cat = {"pt": "gato", "gender": "m", "number": "s"}
    houses = {"pt": "casas", "gender": "f", "number": "p"}
    cuba = {"pt": "Cuba", "gender": "f", "number": "s", "article": False}
    forms = ["{nome}", "{um}", "{o}", "{do}", "{no}"]
    assert [fill(f, cat) for f in forms] == ["gato", "um gato", "o gato", "do gato", "no gato"]
    assert [fill(f, houses) for f in forms] == ["casas", "umas casas", "as casas", "das casas", "nas casas"]
    assert [fill(f, cuba) for f in forms] == ["Cuba", "Cuba", "Cuba", "de Cuba", "em Cuba"]
    with pytest.raises(ValueError, match="none of the placeholders"):
        fill("uma foto", cat)


AUTHORS = """
cifar10_classes = ["avião", "carro"]
cifar10_templates = ["uma foto de um {}.", "desenho de {}"]
food_classes = ["torta"] * 0 or ["x"]
"""
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
    assert prompts.filled[0] == ["uma foto de avião.", "um desenho de avião."] and not prompts.notes
    (note,) = load_prompts("food-101", "authors", authors_file=str(tmp_path / "prompts.py")).notes
    assert "tacos" in note


@pytest.mark.parametrize("text", ["x = __import__('os').system('true')", "x = open('f')", AUTHORS, "x = ("])
def test_code_in_the_authors_file_is_refused(text):
    with pytest.raises(ValueError, match="plain assignments"):
        assignments(text)


def test_babel_names_a_part_of_imagenet():
    hindi = load_prompts("imagenet-1k", "babel", language="hi")
    assert len(hindi.names) == len(hindi.filled) == 342 and "342 of the 1000" in hindi.notes[0]


def test_slips_are_named(tmp_path):
    for call, message in (
        (lambda: load_prompts("cifar10"), "Unknown benchmark 'cifar10'; the nearest are .*cifar-10"),
        (lambda: load_prompts("cifar-10", "theirs"), "Unknown protocol 'theirs'"),
        (lambda: load_prompts("cifar-10", "authors"), "give --authors_file"),
        (lambda: load_prompts("cifar-10", "authors", authors_file=str(tmp_path / "no.py")), "does not exist"),
        (lambda: load_prompts("cifar-10", "babel"), "imagenet-1k alone"),
        (lambda: load_prompts("imagenet-1k", "babel", language="zz"), "no language 'zz'; the nearest are"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

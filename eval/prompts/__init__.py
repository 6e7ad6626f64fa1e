"""Class names and prompt templates, as data; three protocols of zero-shot classification.

`ours` are the Portuguese names and templates in `pt/`, `authors` those that CAPIVARA's authors publish, read from their
file, `babel` the names of Babel-ImageNet out of the package `clip-benchmark`, in any of its languages. What a file of
one's own names, in whatever language, is recorded as `own`.
"""

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from capivara_common.cli import unknown_name_message
from capivara_common.files import read_json

PROMPTS_FOLDER = Path(__file__).resolve().parent
PORTUGUESE_ARTICLES = {
    ("m", "s"): ("um", "o"),
    ("f", "s"): ("uma", "a"),
    ("m", "p"): ("uns", "os"),
    ("f", "p"): ("umas", "as"),
}
DATASET_METRICS = ("accuracy", "mean-per-class", "11point_mAP", "roc_auc")
# A file of one's own, whole: a class is its name, or an object with "en" where the data call it otherwise.
CLASSES_FILE_EXAMPLE = (
    '{"language": "es", "classes": ["rojo", {"es": "azul", "en": "blue"}], "templates": ["una imagen de color {}"]}'
)
FOOD_101_NOTE = (
    "The authors' list has 100 names for 101 classes: 'tacos' (index 96) is missing, so the last four names are "
    "shifted by one and class 100 cannot be predicted."
)


@dataclass(frozen=True)
class Prompts:
    """What a classifier is made of."""

    benchmark: str  # key of the data set, such as "cifar-10"
    protocol: str  # "ours", "authors", "babel" or, of a file of one's own, "own"
    names: list[str]  # of the classes, in the order of the labels, as results show them
    english_names: list[str]  # English names of all classes of the data set, by which its own order is matched
    class_prompts: list[list[str]]  # class -> its prompts
    metric: str  # of `DATASET_METRICS`
    language: str = "pt"  # of `filled`
    notes: tuple[str, ...] = ()  # what a reader of the figure must know
    class_indices: list[int] | None = (
        None  # class of these prompts -> its index in `english_names`; None where they are the same
    )


def list_benchmarks() -> list[str]:
    """Keys of the data sets that `ours` has."""
    return sorted(path.stem for path in (PROMPTS_FOLDER / "pt").glob("*.json") if path.stem != "review")


def load_prompts(
    benchmark: str, protocol: str = "ours", language: str | None = None, authors_file: str | None = None
) -> Prompts:
    """Names and prompts of a data set: a key of `benchmarks()`, or a JSON file such as `CLASSES_FILE_EXAMPLE`.

    The language is babel's; that of the other prompts is their file's, and another one is refused. `authors_file` is
    the path of the authors' `portuguese_prompts.py`; it is parsed, never executed. ValueError where something is
    unknown (the nearest are named), or a file is not as expected; ImportError of babel without clip-benchmark.
    """
    if protocol not in ("ours", "authors", "babel"):
        raise ValueError(f"Unknown protocol {protocol!r}; there are ours, authors and babel.")
    if benchmark.endswith(".json"):
        if protocol != "ours":
            raise ValueError(f"{benchmark} has prompts of its own; protocol {protocol!r} is for the known data sets.")
        prompts = _load_classes_file(Path(benchmark))
    elif benchmark in list_benchmarks():
        prompts = _build_prompts(benchmark, "ours", read_json(PROMPTS_FOLDER / "pt" / f"{benchmark}.json"))
    else:
        known = f"There are {', '.join(list_benchmarks())}, and files of one's own, FILE.json, such as {CLASSES_FILE_EXAMPLE}"
        raise ValueError(unknown_name_message(benchmark, "benchmark", list_benchmarks(), known))
    if protocol == "authors":
        prompts = _load_authors_prompts(prompts, authors_file)
    elif protocol == "babel":
        prompts = _load_babel_prompts(prompts, language or "pt")
    if language and language != prompts.language:
        raise ValueError(
            f"The prompts of {benchmark} are in {prompts.language!r}; leave out --language {language}, it is babel's."
        )
    return prompts


def fill_template(template: str, class_entry: dict, language: str = "pt") -> str:
    """A template with a class's name in place of {}; in Portuguese of {nome}, too, and of {um}, {o}, {do} or {no}.

    `entry` has the name under its `language` and, for Portuguese articles and contractions that agree, `gender`,
    `number` and, for a name without article, `article` false.
    """
    name = class_entry[language]
    forms = {"": name}
    if language == "pt":
        forms |= {"nome": name, "um": name, "o": name, "do": f"de {name}", "no": f"em {name}"}
        if class_entry.get("article", True) and "gender" in class_entry:
            indefinite, definite = PORTUGUESE_ARTICLES[class_entry["gender"], class_entry["number"]]
            forms |= {"um": f"{indefinite} {name}", "o": f"{definite} {name}"}
            forms |= {"do": f"d{definite} {name}", "no": f"n{definite} {name}"}
    places = re.findall(r"\{([^{}]*)\}", template)
    if not places or not forms.keys() >= set(places):
        known = ", ".join(f"{{{form}}}" for form in forms)
        raise ValueError(f"the template {template!r} needs the class's name in place of {known}")
    return re.sub(r"\{([^{}]*)\}", lambda place: forms[place[1]], template)


def _load_classes_file(path: Path) -> Prompts:
    if not path.is_file():
        raise ValueError(f"The file of classes {path} does not exist.")
    try:
        data = {"dataset": path.stem, "language": "pt", "metric": "accuracy"}
        data |= read_json(path, classes=list, templates=list)
        language, metric, names = data["language"], data["metric"], []
        if not isinstance(language, str) or not re.fullmatch(r"[A-Za-z]{2,3}([-_]\w+)*", language):
            raise ValueError(f"language must be a code such as 'es', got {language!r}")
        if metric not in DATASET_METRICS:
            raise ValueError(f"unknown metric {metric!r}, the known ones are {', '.join(DATASET_METRICS)}")
        texts = [data["dataset"], *data["templates"]]
        if not data["classes"] or not data["templates"] or not all(isinstance(text, str) for text in texts):
            raise ValueError("it needs at least one of classes and of templates, and the latter are texts")
        for number, entry in enumerate(data["classes"]):  # an object, or the name alone
            entry = entry if isinstance(entry, dict) else {language: entry}
            name = entry.get(language)
            if not all(isinstance(text, str) and text.strip() for text in (name, entry.get("en", name))):
                raise ValueError(f"class {number} needs a name in the file's language, {language!r}, got {entry}")
            if "gender" in entry and (entry["gender"], entry.get("number")) not in [*PORTUGUESE_ARTICLES]:
                raise ValueError(f"class {number} needs gender m or f and number s or p, got {entry}")
            names.append(entry.get("en", name))
            data["classes"][number] = entry | {"en": names[-1]}
        if repeated := sorted(name for name, times in Counter(names).items() if times > 1):
            raise ValueError(f"no class may be there twice, as {repeated[:10]} are")
        return _build_prompts(data["dataset"], "own", data)
    except ValueError as error:
        raise ValueError(f"{path} is no file of classes: {error}. Such a file works: {CLASSES_FILE_EXAMPLE}") from error


def _build_prompts(benchmark: str, protocol: str, data: dict[str, Any]) -> Prompts:
    classes, language = data["classes"], data["language"]
    filled = [[fill_template(template, entry, language) for template in data["templates"]] for entry in classes]
    names, names_en = ([entry[key] for entry in classes] for key in (language, "en"))
    return Prompts(
        benchmark, protocol, names, names_en, filled, data["metric"], language, _describe_shared_names(names)
    )


def _describe_shared_names(names: list[str]) -> tuple[str, ...]:
    """A note on the names of several classes, which no prompt can tell apart; none where there is no such name."""
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    note = f"{len(twice)} names stand for several classes, whose images count as wrong: {', '.join(twice)}."
    return (note,) if twice else ()


def _load_authors_prompts(own_prompts: Prompts, authors_file: str | None) -> Prompts:
    if not authors_file or not Path(authors_file).is_file():
        raise ValueError(f"Protocol authors needs their file: give --authors_file, a path; got {authors_file}.")
    values, key, found = parse_assignments(Path(authors_file).read_text(encoding="utf-8")), own_prompts.benchmark, []
    for what, name in (("classes", "class_map"), ("templates", "template_map")):
        texts = values[name].get(key) if isinstance(values.get(name), dict) else None
        if what == "classes" and isinstance(texts, list):
            texts = [text[0] if isinstance(text, list) and text else text for text in texts]  # as they do
        if not isinstance(texts, list) or not texts or not all(isinstance(v, str) and v.strip() for v in texts):
            raise ValueError(f"The authors' file has no {name} with a list of texts for {key!r}: the {what}.")
        found.append(texts)
    names, templates = found
    if lacking := [template for template in templates if "{}" not in template]:
        raise ValueError(f"The authors' templates of {key!r} have no {{}} for the name: {lacking[:3]}.")
    note = (
        FOOD_101_NOTE if key == "food-101" else f"The list has {len(names)} names for {len(own_prompts.names)} classes."
    )
    notes = (note,) if len(names) != len(own_prompts.names) else ()
    filled = [[template.replace("{}", name) for template in templates] for name in names]
    return Prompts(key, "authors", names, own_prompts.english_names, filled, own_prompts.metric, notes=notes)


def parse_assignments(text: str) -> dict:
    """Plain assignments of a Python file, parsed and never executed; ValueError where it holds anything else."""
    values: dict = {}

    def value(node: ast.expr):
        if isinstance(node, ast.Name) and node.id in values:
            return values[node.id]
        if isinstance(node, ast.Dict):
            return {value(key): value(item) for key, item in zip(node.keys, node.values, strict=True)}
        if isinstance(node, ast.List | ast.Tuple):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Lambda) and isinstance(node.body, ast.JoinedStr):  # lambda c: f"uma foto de {c}."
            parts = node.body.values
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        return ast.literal_eval(node)

    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                values[statement.targets[0].id] = value(statement.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"The authors' file is not what it is known to be, plain assignments: {error}.") from error
    return values


def _load_babel_prompts(own_prompts: Prompts, language: str) -> Prompts:
    if own_prompts.benchmark != "imagenet-1k":
        raise ValueError(f"Babel-ImageNet names the classes of imagenet-1k alone, not of {own_prompts.benchmark}.")
    try:
        folder = files("clip_benchmark.datasets")
    except ImportError as error:
        raise ImportError("Babel-ImageNet comes with clip-benchmark: pip install clip-benchmark.") from error
    data = json.loads((folder / "babel_imagenet.json").read_text(encoding="utf-8"))
    key = language.upper()
    if key not in data:
        raise ValueError(f"Babel-ImageNet has no language {language!r}; there are {', '.join(sorted(data))}.")
    indices, names = data[key]
    templates = json.loads((folder / "nllb_dist13b_prompts.json").read_text(encoding="utf-8"))
    filled = [[template.replace("{}", name) for template in templates.get(key, templates["EN"])] for name in names]
    note = f"Babel-ImageNet names {len(indices)} of the 1000 classes in {language}; only their images are classified."
    notes = (note, *_describe_shared_names(names))
    return Prompts(
        "imagenet-1k", "babel", names, own_prompts.english_names, filled, "accuracy", language, notes, list(indices)
    )

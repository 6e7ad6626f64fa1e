"""Load class names and prompt templates for zero-shot classification, from four sources.

A source is called a protocol. Results of different protocols are not comparable.

- `ours`: this project's Portuguese names and templates, in `pt/`.
- `authors`: the names and templates of CAPIVARA's authors, in their `portuguese_prompts.py`.
- `babel`: the translated ImageNet class names of Babel-ImageNet, from the package `clip-benchmark`.
- `own`: a user's JSON file, in any language.
"""

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from capivara_common.cli import unknown_name_message
from capivara_common.environment import require_packages
from capivara_common.files import read_json

PROMPTS_FOLDER = Path(__file__).resolve().parent
# {(gender, number): (indefinite article, definite article)}. Gender is "m" or "f", number is "s" (singular) or "p"
# (plural).
PORTUGUESE_ARTICLES = {
    ("m", "s"): ("um", "o"),
    ("f", "s"): ("uma", "a"),
    ("m", "p"): ("uns", "os"),
    ("f", "p"): ("umas", "as"),
}
DATASET_METRICS = ("accuracy", "mean-per-class", "11point_mAP", "roc_auc")
# Example of a complete classes file, for error messages. A class is written as its name in the prompts. If the dataset
# uses another name for the class, usually an English one, the class is an object with this name under the key "en".
CLASSES_FILE_EXAMPLE = (
    '{"language": "es", "classes": ["rojo", {"es": "azul", "en": "blue"}], "templates": ["una imagen de color {}"]}'
)
FOOD_101_NOTE = (
    "The authors' list has 100 names for 101 classes: 'tacos' (index 96) is missing, so the last four names are "
    "shifted by one and class 100 cannot be predicted."
)


@dataclass(frozen=True)
class Prompts:
    """Class names and prompts of a zero-shot classifier. A prompt is a template filled with the name of a class."""

    benchmark: str  # key of the dataset, such as "cifar-10"
    # Where the class names and templates come from. "ours": this project's files in the folder `pt`. "authors": the
    # CAPIVARA authors' file `portuguese_prompts.py`. "babel": the names of Babel-ImageNet, with clip-benchmark's
    # templates. "own": a JSON file with the user's own classes.
    protocol: str
    names: list[str]  # names of the classes that have prompts, in the language of the prompts, in the order of labels
    english_names: list[str]  # names of all classes as the dataset spells them, usually in English
    class_prompts: list[list[str]]  # for each class in `names`, its prompts
    metric: str  # metric of the dataset, from `DATASET_METRICS`
    language: str = "pt"  # language code of `class_prompts`
    notes: tuple[str, ...] = ()  # remarks to show with the results
    # Index in `english_names` of each class in `names`. None: `names` has the same classes in the same order.
    class_indices: list[int] | None = None


def list_benchmarks() -> list[str]:
    """Return the keys of all benchmarks that have Portuguese prompts: the names of the JSON files in `pt/`."""
    return sorted(path.stem for path in (PROMPTS_FOLDER / "pt").glob("*.json") if path.stem != "review")


def load_prompts(
    benchmark: str, protocol: str = "ours", language: str | None = None, authors_file: str | None = None
) -> Prompts:
    """Load the class names and prompts that a zero-shot classifier needs for a benchmark.

    Args:
        benchmark: A key of `list_benchmarks()`, or the path of a JSON file with your own classes, such as
            `CLASSES_FILE_EXAMPLE`.
        protocol: Source of names and templates: "ours", "authors" or "babel". It must be "ours" for a JSON file.
        language: Language code for protocol "babel", by default "pt". For other protocols, it must be None or the
            language of the prompts.
        authors_file: Path of the authors' `portuguese_prompts.py`. The file is parsed, never executed.

    Raises:
        ValueError: If the benchmark, protocol or language is unknown, or a file is invalid.
        ImportError: If the protocol is "babel" and the package clip-benchmark is not installed.
    """
    if protocol not in ("ours", "authors", "babel"):
        raise ValueError(f"protocol must be ours, authors or babel, got {protocol!r}.")
    if benchmark.endswith(".json"):
        if protocol != "ours":
            raise ValueError(f"{benchmark} has its own prompts, so protocol must be 'ours', got {protocol!r}.")
        prompts = _load_prompts_from_classes_file(Path(benchmark))
    elif benchmark in list_benchmarks():
        prompts = _build_prompts(benchmark, "ours", read_json(PROMPTS_FOLDER / "pt" / f"{benchmark}.json"))
    else:
        known = ", ".join(list_benchmarks())
        hint = f"Known are {known}, and the path of your own JSON file, such as {CLASSES_FILE_EXAMPLE}"
        raise ValueError(unknown_name_message(benchmark, "benchmark", list_benchmarks(), hint))
    if protocol == "authors":
        prompts = _load_authors_prompts(prompts, authors_file)
    elif protocol == "babel":
        prompts = _load_babel_prompts(prompts, language or "pt")
    if language and language != prompts.language:
        raise ValueError(f"The prompts of {benchmark} are in {prompts.language!r}, not {language!r}. Omit --language.")
    return prompts


def fill_template(template: str, class_entry: dict, language: str = "pt") -> str:
    """Fill the placeholders of a template with a class name, to get a prompt such as "uma foto de um gato".

    The placeholder {} becomes the name. Portuguese templates have more placeholders:

    - {nome}: the name, as in "gato".
    - {um} and {o}: with an article, as in "um gato" and "o gato".
    - {do} and {no}: with preposition and article, as in "do gato" and "no gato".

    Args:
        template: The template.
        class_entry: The class as `{language code: name}`. For Portuguese also "gender" ("m" or "f"), "number" ("s" or
            "p") and "article" (False for a name without article).
        language: Language code of the template.

    Returns:
        The prompt.

    Raises:
        ValueError: If the template has no placeholder, or an unknown placeholder.
    """
    name = class_entry[language]
    forms = {"": name}
    if language == "pt":
        forms |= {"nome": name, "um": name, "o": name, "do": f"de {name}", "no": f"em {name}"}
        if class_entry.get("article", True) and "gender" in class_entry:
            indefinite, definite = PORTUGUESE_ARTICLES[class_entry["gender"], class_entry["number"]]
            forms |= {"um": f"{indefinite} {name}", "o": f"{definite} {name}"}
            forms |= {"do": f"d{definite} {name}", "no": f"n{definite} {name}"}
    placeholders = re.findall(r"\{([^{}]*)\}", template)
    if not placeholders or not forms.keys() >= set(placeholders):
        known = ", ".join(f"{{{form}}}" for form in forms)
        raise ValueError(f"the template {template!r} must have a placeholder for the class name, one of {known}")
    return re.sub(r"\{([^{}]*)\}", lambda match: forms[match[1]], template)


def _load_prompts_from_classes_file(path: Path) -> Prompts:
    """Load prompts from a JSON file with a user's own classes and templates, see `CLASSES_FILE_EXAMPLE`.

    Raises:
        ValueError: If the file does not exist, or its content is invalid. The message shows a valid example.
    """
    if not path.is_file():
        raise ValueError(f"The classes file {path} does not exist.")
    try:
        data = {"dataset": path.stem, "language": "pt", "metric": "accuracy"}
        data |= read_json(path, classes=list, templates=list)
        language, metric, names = data["language"], data["metric"], []
        if not isinstance(language, str) or not re.fullmatch(r"[A-Za-z]{2,3}([-_]\w+)*", language):
            raise ValueError(f"language must be a code such as 'es', got {language!r}")
        if metric not in DATASET_METRICS:
            raise ValueError(f"metric must be one of {', '.join(DATASET_METRICS)}, got {metric!r}")
        texts = [data["dataset"], *data["templates"]]
        if not data["classes"] or not data["templates"] or not all(isinstance(text, str) for text in texts):
            raise ValueError("classes and templates must not be empty, and dataset and templates must be texts")
        for number, entry in enumerate(data["classes"]):
            entry = entry if isinstance(entry, dict) else {language: entry}
            name = entry.get(language)
            if not all(isinstance(text, str) and text.strip() for text in (name, entry.get("en", name))):
                raise ValueError(f"class {number} must have a name in the language {language!r}, got {entry}")
            if "gender" in entry and (entry["gender"], entry.get("number")) not in [*PORTUGUESE_ARTICLES]:
                raise ValueError(
                    f"gender must be m or f, and number s or p (singular or plural), got class {number}: {entry}"
                )
            names.append(entry.get("en", name))
            data["classes"][number] = entry | {"en": names[-1]}
        if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
            raise ValueError(f"class names must be distinct, but {repeated[:10]} occur more than once")
        return _build_prompts(data["dataset"], "own", data)
    except ValueError as error:
        raise ValueError(f"{path} is not a classes file: {error}. Example: {CLASSES_FILE_EXAMPLE}") from error


def _build_prompts(benchmark: str, protocol: str, data: dict[str, Any]) -> Prompts:
    """Fill all templates with all class names.

    Args:
        benchmark: Key of the dataset.
        protocol: "ours" or "own".
        data: Content of a JSON file with the keys `language`, `metric`, `templates` and `classes`. Each class is a dict
            with its name under the language code and under "en".
    """
    classes, language = data["classes"], data["language"]
    class_prompts = [[fill_template(template, entry, language) for template in data["templates"]] for entry in classes]
    names, english_names = ([entry[key] for entry in classes] for key in (language, "en"))
    notes = _describe_shared_names(names)
    return Prompts(benchmark, protocol, names, english_names, class_prompts, data["metric"], language, notes)


def _describe_shared_names(names: list[str]) -> tuple[str, ...]:
    """Return a note for the results if several classes have the same name, because prompts can't tell them apart.

    Args:
        names: Names of all classes.

    Returns:
        A tuple with the note, or an empty tuple if all names are distinct.
    """
    shared = sorted(name for name, count in Counter(names).items() if count > 1)
    note = f"Several classes have the same name, so all their images count as wrong: {', '.join(shared)}."
    return (note,) if shared else ()


def _load_authors_prompts(our_prompts: Prompts, authors_file: str | None) -> Prompts:
    """Load the prompts of CAPIVARA's authors.

    Args:
        our_prompts: This project's prompts for the same dataset, from which English class names and metric are taken.
        authors_file: Path of the authors' `portuguese_prompts.py`. The file is parsed, never executed.

    Raises:
        ValueError: If the file does not exist, or has no valid class names and templates for the dataset.
    """
    if not authors_file or not Path(authors_file).is_file():
        raise ValueError(f"--authors_file must be the path of portuguese_prompts.py, got {authors_file}.")
    values = parse_python_assignments(Path(authors_file).read_text(encoding="utf-8"))
    key, lists = our_prompts.benchmark, []
    for variable in ("class_map", "template_map"):
        texts = values[variable].get(key) if isinstance(values.get(variable), dict) else None
        if variable == "class_map" and isinstance(texts, list):
            # A class may have a list of synonyms. As in the authors' code, the first one is used.
            texts = [text[0] if isinstance(text, list) and text else text for text in texts]
        is_list = isinstance(texts, list) and len(texts) > 0
        if not is_list or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{variable} in {authors_file} must have a list of texts for {key!r}.")
        lists.append(texts)
    names, templates = lists
    if invalid := [template for template in templates if "{}" not in template]:
        raise ValueError(f"{authors_file}: templates of {key!r} must have {{}} for the class name, got {invalid[:3]}.")
    note = f"The authors' list has {len(names)} names for {len(our_prompts.names)} classes."
    note = FOOD_101_NOTE if key == "food-101" else note
    notes = (note,) if len(names) != len(our_prompts.names) else ()
    class_prompts = [[template.replace("{}", name) for template in templates] for name in names]
    return replace(our_prompts, protocol="authors", names=names, class_prompts=class_prompts, notes=notes)


def parse_python_assignments(text: str) -> dict:
    """Read the values that a Python file assigns to its variables, without executing the file.

    A value may be a literal (text, number, list, tuple or dict), the name of an earlier variable, or a template: a
    lambda that returns an f-string.

    Args:
        text: Source code of the file.

    Returns:
        A dict from variable names to values. A template becomes a text in which {} stands for the argument of the
        lambda.

    Raises:
        ValueError: If a value is anything else, such as a call, or if the text is not valid Python.
    """
    values: dict = {}

    def evaluate(node: ast.expr):
        if isinstance(node, ast.Name) and node.id in values:
            return values[node.id]
        if isinstance(node, ast.Dict):
            return {evaluate(key): evaluate(item) for key, item in zip(node.keys, node.values, strict=True)}
        if isinstance(node, ast.List | ast.Tuple):
            return [evaluate(item) for item in node.elts]
        # In the authors' file, a template is a lambda with an f-string, such as `lambda c: f"uma foto de {c}."`. It
        # becomes the text "uma foto de {}.".
        if isinstance(node, ast.Lambda) and isinstance(node.body, ast.JoinedStr):
            parts = node.body.values
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        return ast.literal_eval(node)

    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                values[statement.targets[0].id] = evaluate(statement.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"The authors' file must contain only plain assignments of texts: {error}.") from error
    return values


def _load_babel_prompts(our_prompts: Prompts, language: str) -> Prompts:
    """Load Babel-ImageNet's class names in a language, with clip-benchmark's prompt templates.

    If there are no templates in the language, the English templates are used.

    Args:
        our_prompts: This project's prompts for ImageNet, from which the English names of all classes are taken.
        language: Language code, such as "pt".

    Raises:
        ValueError: If `our_prompts` is not for ImageNet, or Babel-ImageNet does not have the language.
        ImportError: If clip-benchmark is not installed.
    """
    if our_prompts.benchmark != "imagenet-1k":
        raise ValueError(f"Protocol babel is only for the benchmark imagenet-1k, got {our_prompts.benchmark}.")
    require_packages("Protocol babel", None, "clip_benchmark")
    folder = files("clip_benchmark.datasets")
    data = json.loads((folder / "babel_imagenet.json").read_text(encoding="utf-8"))
    key = language.upper()
    if key not in data:
        raise ValueError(f"Babel-ImageNet has no language {language!r}. Known are {', '.join(sorted(data))}.")
    indices, names = data[key]
    templates = json.loads((folder / "nllb_dist13b_prompts.json").read_text(encoding="utf-8"))
    templates = templates.get(key, templates["EN"])
    class_prompts = [[template.replace("{}", name) for template in templates] for name in names]
    note = f"Babel-ImageNet names {len(indices)} of the 1000 classes in {language}; only their images are classified."
    notes = (note, *_describe_shared_names(names))
    texts = {"language": language, "names": names, "class_prompts": class_prompts}
    return replace(our_prompts, protocol="babel", notes=notes, class_indices=list(indices), **texts)

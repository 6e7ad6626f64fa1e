"""Docstrings of public functions are complete, and the examples of the main classes run.

Complete means: Google sections for arguments, results and errors in the two packages that users import.
"""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("modeling_capivara", "capivara_search")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Examples|Note|Attributes):\s*$", re.MULTILINE)
ENTRY = re.compile(r"^    (\*{0,2}\w+)(?: \([^)]*\))?:", re.MULTILINE)
# Matches docstrings that refer to another docstring for their arguments. IDEs show only one docstring.
REFERENCE = re.compile(r"\b(?:arguments?|args|parameters?)\b[^.\n]*\b(?:as|of|see|like)\b[^.\n]*`", re.IGNORECASE)

WITH_EXAMPLES = {
    "modeling_capivara": (
        *("CapivaraConfig", "CapivaraForImageClassification", "CapivaraModel", "CapivaraProcessor"),
        "two_towers.load_embedder",
    ),
    "capivara_search": ("PictureIndex",),
    "training": ("whole_batch.WholeBatch",),
    "eval": ("capivara_metrics.metrics.recall_at_k",),
}
EXAMPLES = [f"{package}.{name}" for package, names in WITH_EXAMPLES.items() for name in names]
SLOW_EXAMPLES = {"capivara_search.PictureIndex"}


def public_functions(path: Path) -> list[tuple[str, FUNCTIONS]]:
    """Return the public functions and methods of a file with their qualified names."""
    functions = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, FUNCTIONS):
            functions.append((node.name, node))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            functions += [(f"{node.name}.{item.name}", item) for item in node.body if isinstance(item, FUNCTIONS)]
    return [(name, node) for name, node in functions if not node.name.startswith("_")]


def parameters(node: FUNCTIONS) -> list[str]:
    """Return the names of the parameters, without `self` and `cls`, with the stars of `*args` and `**kwargs`."""
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return [name for name in names if name not in ("self", "cls")]


def sections(docstring: str) -> dict[str, str]:
    """Split a docstring into its Google sections; the text before the first one has the key ``""``."""
    parts = SECTION.split(docstring)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def raised(node: FUNCTIONS) -> set[str]:
    """Return the names of the exceptions that the function's own body raises, without those of nested functions."""
    names, nodes = set(), list(node.body)
    while nodes:
        item = nodes.pop()
        if isinstance(item, FUNCTIONS | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(item, ast.Raise) and isinstance(item.exc, ast.Call) and isinstance(item.exc.func, ast.Name):
            names.add(item.exc.func.id)
        nodes += ast.iter_child_nodes(item)
    return {name for name in names if name.endswith("Error")}


def faults(name: str, node: FUNCTIONS) -> list[str]:
    """Return what the docstring of a function with two or more parameters lacks."""
    docstring = ast.get_docstring(node) or ""
    by_title = sections(docstring)
    documented = set(ENTRY.findall(by_title.get("Args", "")))
    missing = [f"{name}: argument {parameter}" for parameter in parameters(node) if parameter not in documented]
    returns_value = node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn")
    is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
    if returns_value and not is_property and not {"Returns", "Yields"} & by_title.keys():
        missing.append(f"{name}: what it returns")
    missing += [f"{name}: raises {error}" for error in raised(node) if error not in by_title.get("Raises", "")]
    if REFERENCE.search(docstring):
        missing.append(f"{name}: refers to another docstring for its arguments")
    return missing


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_document_arguments_results_and_errors(package):
    missing = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for name, node in public_functions(path):
            if len(parameters(node)) >= 2:
                missing += [f"{path.relative_to(ROOT)}: {fault}" for fault in faults(name, node)]
    assert not missing, "\n".join(missing)


def test_results_on_the_api_page_have_no_colon_inside_code():
    """Napoleon takes the text before the first colon of a result as its type, so no colon may be inside code."""
    modules = re.findall(r"automodule:: (\S+)", (ROOT / "docs/reference/api.md").read_text(encoding="utf-8"))
    # A package may import a name of `__all__` only when it is used, so `vars` does not have it yet.
    objects = [
        getattr(module, name)
        for module in map(importlib.import_module, modules)
        for name in {*vars(module), *getattr(module, "__all__", ())}
    ]
    members = [member for cls in objects if inspect.isclass(cls) for member in vars(cls).values()]
    functions = [thing for thing in objects + members if inspect.isfunction(thing)]
    functions += [member.fget for member in members if isinstance(member, property)]
    results = {
        f"{function.__module__}.{function.__qualname__}": sections(inspect.getdoc(function) or "").get("Returns", "")
        for function in functions
        if function.__module__.split(".")[0] in (*PACKAGES, "eval", "training") and function.__name__[0] != "_"
    }
    assert len(results) > 50
    assert not [name for name, text in results.items() if text.partition(":")[0].count("`") % 2]


def test_incomplete_docstrings_are_found():
    source = '''
def search(text, k, *, folder=None) -> list:
    """Return hits, with the arguments of `find`.

    Args:
        text: A sentence.
    """
    if k < 1:
        raise ValueError(k)
    return []
'''
    node = ast.parse(source).body[0]
    assert faults("search", node) == [
        *("search: argument k", "search: argument folder", "search: what it returns", "search: raises ValueError"),
        "search: refers to another docstring for its arguments",
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_EXAMPLES)) for name in EXAMPLES]
)
def test_examples_run_as_they_stand(name, tiny_folder, tmp_path, monkeypatch):
    """Examples may use the name `folder`, a saved model. They run in an empty folder."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    module, _, attribute = name.rpartition(".")
    docstring = inspect.getdoc(getattr(importlib.import_module(module), attribute))
    examples = doctest.DocTestParser().get_examples(docstring)
    assert examples and "Example" in sections(docstring)
    output: list[str] = []
    test = doctest.DocTest(examples, {"folder": str(tiny_folder)}, name, None, None, docstring)
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=output.append)
    assert results.failed == 0, "".join(output)

"""Structure of the project: allowed imports, sizes of files and functions, and self-contained model files."""

import ast
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent

COMMON = "capivara_common"
# Folder or top-level file -> parts of this project that it may import besides its own modules.
ALLOWED = {
    "modeling_capivara": {COMMON},  # not for the files that are published with models, see MODEL_FILES
    COMMON: set(),  # shared by all tools and installed with them
    "capivara_search": {COMMON, "modeling_capivara"},
    "caption_data": {COMMON, "modeling_capivara"},  # reads rows
    "eval.records": {COMMON},  # writes results; does not know cards and reports
    "captions": {COMMON, "caption_data", "eval.records", "modeling_capivara"},
    "training": {COMMON, "caption_data", "eval.records", "modeling_capivara", "eval"},  # training evaluates its models
    "eval": {COMMON, "caption_data", "eval.records", "modeling_capivara"},
    # hub_upload/space publishes the page of capivara_search as a Space
    "hub_upload": {COMMON, "capivara_search", "eval.records", "modeling_capivara", "eval"},
    # A run can end with a push, so the command imports hub_upload; `training` itself does not.
    "train_accelerate": {
        *(COMMON, "caption_data", "eval.records", "training", "eval", "modeling_capivara", "hub_upload"),
    },
    "examples": {
        *(COMMON, "capivara_search", "caption_data", "eval.records", "captions", "training", "eval"),
        *("modeling_capivara", "train_accelerate"),  # an example trains many languages
    },
    "docs": {COMMON, "capivara_search", "modeling_capivara"},  # the site documents all commands, found by name
    "benchmarks": {
        *(COMMON, "caption_data", "eval.records", "captions", "training", "eval", "modeling_capivara", "examples"),
        *("hub_upload", "train_accelerate", "capivara_search"),
    },
}
# Files that are published with every model. They import each other only by `from .sibling import name`.
MODEL_FILES = [
    f"modeling_capivara/{name}_capivara.py"
    for name in (
        "checks",
        "configuration",
        "image_processing",
        "modeling",
        "processing",
        "text_cleaning",
        "tokenization",
    )
]
# Limits in lines of code: docstrings, comments and blank lines don't count.
MAX_FILE_CODE_LINES, MAX_FUNCTION_CODE_LINES = 600, 60
# Names that import code dynamically, which the tests of imports can't see, and names that only look up packages.
BY_NAME = {"importlib", "runpy", "pkgutil", "__import__", "import_module", "__path__"}
LOOKUPS = ("importlib.metadata", "importlib.resources", "importlib.util.find_spec")
MODEL_FILES_PACKAGE = "capivara_search.model_files"  # its `__path__` is the folder modeling_capivara
MODEL_PACKAGES = {"torch", "transformers", "PIL", "numpy", "huggingface_hub", "ftfy"}


@cache
def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    # Git lists removed files until they are committed.
    return [Path(name) for name in listed if (ROOT / name).is_file()]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
NOT_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


@cache
def code_lines(path: Path) -> set[int]:
    """Return the line numbers of a file that hold code, without docstrings, comments and blank lines."""
    docstrings: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    with open(ROOT / path, encoding="utf-8") as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in NOT_CODE]
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings


@cache
def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)]


def owner(module: str) -> str:
    """Return the part of the project that a module belongs to: a top-level folder or file, or `eval.records`."""
    parts = module.split(".")
    return "eval.records" if parts[:2] == ["eval", "records"] else parts[0]


def imported_packages(path: Path) -> set[str]:
    """Return the parts of all absolute imports of a file."""
    names = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            names |= {owner(alias.name) for alias in node.names}
        elif node.level == 0:
            names |= {owner(f"{node.module}.{alias.name}") for alias in node.names}
    return names


def test_imports_follow_the_direction_of_the_data():
    wrong = []
    for path in python_files():
        place = owner(".".join(path.with_suffix("").parts))
        if place == "tests":
            continue
        assert place in ALLOWED, f"{path}: add to ALLOWED what {place} may import"
        forbidden = set(ALLOWED) - ALLOWED[place] - {place}
        wrong += [f"{path} imports {name}" for name in imported_packages(path) & forbidden]
    assert not wrong, wrong


def sources() -> dict[str, Path]:
    """Return module -> file, without tests."""
    files = [path for path in python_files() if path.parts[0] != "tests"]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported_modules(name: str, path: Path, known: set[str]) -> set[str]:
    """Return the modules of this project that a module imports, also within functions and for type hints."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imported = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
            continue
        base = (node.module or "").replace(MODEL_FILES_PACKAGE, "modeling_capivara")
        if node.level:
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            imported.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return (imported & known) - {name}


def test_there_are_no_circular_imports():
    """Repeatedly remove modules without imports and modules that no other imports; nothing may remain."""
    modules = sources()
    graph = {name: imported_modules(name, path, set(modules)) for name, path in modules.items()}
    while True:
        targets = set().union(*graph.values())
        reduced = {name: imported & graph.keys() for name, imported in graph.items() if name in targets}
        reduced = {name: imported for name, imported in reduced.items() if imported}
        if reduced == graph:
            break
        graph = reduced
    assert not graph, "these modules import each other"


def test_there_are_no_dynamic_imports():
    """Except in `CapivaraModel.from_open_clip`, whose file is published without the rest of the package."""
    wrong = []
    for path in sources().values():
        nodes = list(ast.walk(tree(path)))
        exempt = {id(node) for top in nodes if getattr(top, "name", "") == "from_open_clip" for node in ast.walk(top)}
        for node in (node for node in nodes if id(node) not in exempt):
            names = {ast.unparse(node).rpartition(".")[2]} if isinstance(node, ast.Name | ast.Attribute) else set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                names = {f"{base}{alias.name}" for alias in node.names if not f"{base}{alias.name}".startswith(LOOKUPS)}
                names = {name.partition(".")[0] for name in names}
            if names & BY_NAME and not (names == {"__path__"} and path.parts[-2] == "model_files"):
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong


def test_files_and_functions_stay_small():
    too_long = []
    for path in sources().values():
        lines = code_lines(path)
        if len(lines) > MAX_FILE_CODE_LINES:
            too_long.append(f"{path}: {len(lines)}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = sum(node.lineno <= line <= node.end_lineno for line in lines)
                if length > MAX_FUNCTION_CODE_LINES:
                    too_long.append(f"{path}:{node.lineno} {node.name}: {length}")
    assert not too_long


def test_code_lines_leave_out_docstrings_comments_and_blank_lines(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        '"""Two\nlines."""\n\n# comment\nx = """a\nb"""  # counts\n\n\ndef f():\n    """Doc."""\n    return x\n'
    )
    assert code_lines(path) == {5, 6, 9, 11}


def test_every_mutation_applies_exactly_once():
    mutations = yaml.safe_load((ROOT / "tests/mutations.yaml").read_text(encoding="utf-8"))
    counts = {
        mutation["find"]: (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["find"])
        for mutation in mutations
    }
    assert set(counts.values()) == {1}, [text for text, count in counts.items() if count != 1]


@pytest.mark.parametrize("path", MODEL_FILES)
def test_model_files_are_self_contained(path):
    for node in imports(Path(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, "only `from .sibling import name`"
            assert f"modeling_capivara/{node.module}.py" in MODEL_FILES, f"{node.module} is not published with models"
    standard = set(sys.stdlib_module_names)
    assert imported_packages(Path(path)) - standard <= MODEL_PACKAGES

"""The house: data flows one way, and so do imports."""

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
# Folder or top-level file -> what of this project it may import, beside its own modules.
ALLOWED = {
    "modeling_capivara": {COMMON},  # but for the files that travel with a model
    COMMON: set(),  # what all tools share; it is installed with them
    "capivara_search": {COMMON, "modeling_capivara"},
    "caption_data": {COMMON, "modeling_capivara"},  # rows in
    "eval.records": {COMMON},  # values out: it knows no card and no report
    "captions": {COMMON, "caption_data", "eval.records", "modeling_capivara"},
    "training": {COMMON, "caption_data", "eval.records", "modeling_capivara", "eval"},  # it measures what it trains
    "eval": {COMMON, "caption_data", "eval.records", "modeling_capivara"},
    # hub_upload/space: the page of capivara_search, as a Space
    "hub_upload": {COMMON, "capivara_search", "eval.records", "modeling_capivara", "eval"},
    # hub_upload: a run can end with a push; `training` itself knows nothing of it
    "train_accelerate": {
        *(COMMON, "caption_data", "eval.records", "training", "eval", "modeling_capivara", "hub_upload"),
    },
    "examples": {
        *(COMMON, "capivara_search", "caption_data", "eval.records", "captions", "training", "eval"),
        "modeling_capivara",
    },
    "benchmarks": {
        *(COMMON, "caption_data", "eval.records", "captions", "training", "eval", "modeling_capivara", "examples"),
        *("hub_upload", "train_accelerate", "capivara_search"),
    },
}
# What travels to the Hub: these reach each other by `from .sibling import name` alone.
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
# What loads code by a name that no test of imports sees; and what only looks which packages are there, and where.
BY_NAME = {"importlib", "runpy", "pkgutil", "__import__", "import_module", "__path__"}
LOOKS = ("importlib.metadata", "importlib.resources", "importlib.util.find_spec")
MODEL_FILES_ALONE = "capivara_search.model_files"  # whose `__path__` is the folder modeling_capivara
MODEL_PACKAGES = {"torch", "transformers", "PIL", "numpy", "huggingface_hub", "ftfy"}


@cache
def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [Path(name) for name in listed if (ROOT / name).is_file()]  # what was removed is listed until a commit


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
    """The place that a module belongs to: its top-level folder or file, or `eval.records`, which others read from."""
    parts = module.split(".")
    return "eval.records" if parts[:2] == ["eval", "records"] else parts[0]


def imported_packages(path: Path) -> set[str]:
    """The place of every absolute import."""
    names = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            names |= {owner(alias.name) for alias in node.names}
        elif node.level == 0:
            names |= {owner(f"{node.module}.{alias.name}") for alias in node.names}
    return names


def test_imports_go_one_way():
    wrong = []
    for path in python_files():
        place = owner(".".join(path.with_suffix("").parts))
        if place == "tests":
            continue
        assert place in ALLOWED, f"{path}: say in ALLOWED what this new place may import"
        forbidden = set(ALLOWED) - ALLOWED[place] - {place}
        wrong += [f"{path} imports {name}" for name in imported_packages(path) & forbidden]
    assert not wrong, wrong


def sources() -> dict[str, Path]:
    """Module -> file, of all but the tests."""
    files = [path for path in python_files() if path.parts[0] != "tests"]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported_modules(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of this project that one imports, in functions and for type hints, too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = (node.module or "").replace(MODEL_FILES_ALONE, "modeling_capivara")
        if node.level:
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return (found & known) - {name}


def test_no_circle_of_imports():
    """Take away, again and again, the modules that import none of the others, or that none imports."""
    modules = sources()
    left = {name: imported_modules(name, path, set(modules)) for name, path in modules.items()}
    while True:
        wanted = set().union(*left.values())
        kept = {name: imported & left.keys() for name, imported in left.items() if name in wanted}
        kept = {name: imported for name, imported in kept.items() if imported}
        if kept == left:
            break
        left = kept
    assert not left, "these import each other"


def test_nothing_is_imported_by_name():
    """But by `CapivaraModel.from_open_clip`, whose file travels with a model, without the rest of the package."""
    wrong = []
    for path in sources().values():
        nodes = list(ast.walk(tree(path)))
        spared = {id(node) for top in nodes if getattr(top, "name", "") == "from_open_clip" for node in ast.walk(top)}
        for node in (node for node in nodes if id(node) not in spared):
            names = {ast.unparse(node).rpartition(".")[2]} if isinstance(node, ast.Name | ast.Attribute) else set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                names = {f"{base}{alias.name}" for alias in node.names if not f"{base}{alias.name}".startswith(LOOKS)}
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


def test_every_mutation_has_a_place():
    mutations = yaml.safe_load((ROOT / "tests/mutations.yaml").read_text(encoding="utf-8"))
    found = {one["find"]: (ROOT / one["file"]).read_text(encoding="utf-8").count(one["find"]) for one in mutations}
    assert set(found.values()) == {1}, [find for find, number in found.items() if number != 1]


@pytest.mark.parametrize("path", MODEL_FILES)
def test_model_files_are_self_contained(path):
    for node in imports(Path(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, "only `from .sibling import name`"
            assert f"modeling_capivara/{node.module}.py" in MODEL_FILES, f"{node.module} would not travel"
    standard = set(sys.stdlib_module_names)
    assert imported_packages(Path(path)) - standard <= MODEL_PACKAGES

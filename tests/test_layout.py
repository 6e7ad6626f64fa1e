"""The house: data flows one way, and so do imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folder or top-level file -> what of this project it may import, beside its own modules.
ALLOWED = {
    "modeling_capivara": set(),
    "common": set(),
    "caption_data": {"common", "modeling_capivara"},  # rows in
    "records": {"common"},  # figures out
    "captions": {"common", "caption_data", "modeling_capivara"},
    "training": {"common", "caption_data", "modeling_capivara"},
    "eval": {"common", "caption_data", "records", "modeling_capivara"},
    # hub_upload/space searches: it keeps eval's embeddings
    "hub_upload": {"common", "caption_data", "records", "modeling_capivara", "eval"},
    # hub_upload: a run can end with a push; `training` itself knows nothing of it
    "train_accelerate": {
        *("common", "caption_data", "records", "training", "eval", "modeling_capivara", "examples", "hub_upload"),
    },
    "examples": {"common", "caption_data", "records", "captions", "training", "eval", "modeling_capivara"},
    "benchmarks": {
        *("common", "caption_data", "records", "captions", "training", "eval", "modeling_capivara", "examples"),
        *("hub_upload", "train_accelerate"),
    },
}
# What travels to the Hub: these reach each other by `from .sibling import name` alone.
MODEL_FILES = [
    f"modeling_capivara/{name}_capivara.py"
    for name in (
        "configuration",
        "image_classification",
        "image_processing",
        "loss",
        "modeling",
        "processing",
        "tokenization",
    )
]
MODEL_PACKAGES = {"torch", "transformers", "PIL", "numpy", "huggingface_hub", "ftfy"}


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [Path(name) for name in listed if (ROOT / name).is_file()]  # what was removed is listed until a commit


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_packages(path: Path) -> set[str]:
    """First part of every absolute import."""
    names = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way():
    wrong = []
    for path in python_files():
        owner = path.parts[0].removesuffix(".py")
        if owner == "tests":
            continue
        assert owner in ALLOWED, f"{path}: say in ALLOWED what this new place may import"
        forbidden = set(ALLOWED) - ALLOWED[owner] - {owner}
        wrong += [f"{path} imports {name}" for name in imported_packages(path) & forbidden]
    assert not wrong, wrong


def test_only_tasks_of_the_arrow_know_the_embedded_default():
    assert "examples" in imported_packages(Path("train_accelerate.py"))
    assert not [p for p in python_files() if p.parts[0] in ("training", "eval") and "examples" in imported_packages(p)]


@pytest.mark.parametrize("path", MODEL_FILES)
def test_model_files_are_self_contained(path):
    for node in imports(Path(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, "only `from .sibling import name`"
            assert f"modeling_capivara/{node.module}.py" in MODEL_FILES, f"{node.module} would not travel"
    standard = set(sys.stdlib_module_names)
    assert imported_packages(Path(path)) - standard <= MODEL_PACKAGES


def test_nobody_hides_the_builtin_eval():
    for path in python_files():
        for node in imports(path):
            if isinstance(node, ast.Import):
                assert not [a for a in node.names if a.name.split(".")[0] == "eval"], (
                    f"{path}: write `from eval.x import y`"
                )


def test_import_is_light():
    """Neither open_clip nor datasets is loaded, and no more is paid than for the Auto classes themselves."""
    code = "import sys, modeling_capivara; print({'open_clip', 'datasets', 'timm', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_wheel_holds_the_model_package_alone():
    import setuptools

    config = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "include = modeling_capivara*" in config
    assert setuptools.find_packages(ROOT, include=["modeling_capivara*"]) == ["modeling_capivara"]

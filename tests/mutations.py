"""Mutation testing: change one line at a time, and check that the fast tests fail.

    python tests/mutations.py                    # all mutations of tests/mutations.yaml, in a copy of this tree
    python tests/mutations.py --only training    # only mutations of files whose path starts with "training"

Each mutation names a file, a text that occurs once in it, the replacement, and the test files that must fail. Tests
run in forks of this process, which has imported the slow packages. The exit code is 1 if a mutation survives.
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LARGE = ("torch", "transformers", "transformers.pipelines", "transformers.trainer", "accelerate", "datasets", "pandas")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--only", default="", help="Only mutate files whose path starts with this text. Default: all files."
    )
    args = flags.parse_args()
    mutations = [
        mutation
        for mutation in yaml.safe_load((ROOT / "tests/mutations.yaml").read_text())
        if mutation["file"].startswith(args.only)
    ]
    if not mutations:
        sys.exit(f"error: No mutation has a file that starts with {args.only!r}.")
    for mutation in mutations:
        if (count := (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["find"])) != 1:
            sys.exit(f"error: {mutation['file']} contains {mutation['find']!r} {count} times, expected once.")
    sys.dont_write_bytecode = True  # bytecode could hide a mutation that keeps the size and time of the file
    for name in LARGE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        results = [is_caught(tree, mutation) for mutation in mutations]
    print(f"{sum(results)} of {len(results)} caught")
    sys.exit(not all(results))


def copy_tree(tree: Path) -> None:
    """Copy the tracked and the untracked files of this tree, without ignored ones."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    for name in (name for name in names if (ROOT / name).is_file()):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)


def is_caught(tree: Path, mutation: dict) -> bool:
    """Apply a mutation, run its tests, undo it, and return whether a test failed."""
    path, log, started = tree / mutation["file"], tree.with_name("log"), time.perf_counter()
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutation["find"], mutation["replace"]), encoding="utf-8")
    try:
        if not (child := os.fork()):
            os._exit(run_tests(tree, log, mutation["tests"]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        path.write_text(original, encoding="utf-8")
    output = log.read_text(encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    caught, seconds = code != 0 and bool(failed), round(time.perf_counter() - started, 1)
    verdict, details = "caught" if caught else "SURVIVED", " ".join(failed) if failed or not code else output[-1000:]
    print(f"{verdict}  {mutation['file']}: {mutation['what']}, {seconds} s. {details}", flush=True)
    return caught


def run_tests(tree: Path, log: Path, names: list[str]) -> int:
    """Run test files in this process, with the project's modules from `tree`, and return the exit code of pytest."""
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests")))]
    os.environ["PYTHONPATH"], os.environ["PYTHONDONTWRITEBYTECODE"] = str(tree), "1"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    return int(pytest.main([*options, *(f"tests/{name}.py" for name in names)]))


if __name__ == "__main__":
    main()

"""Mutate one line at a time, and see whether the fast tests catch it.

    python tests/mutations.py                    # all of tests/mutations.yaml, in copies of this tree
    python tests/mutations.py --only training    # those whose file starts so

Each mutation names a file, a text that stands in it once, what stands there instead, and the test files that must
fail. Their processes are forks of this one, which has imported the packages that take long. The exit code is 1 where
one survives.
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
    flags.add_argument("--only", default="", help="start of the files to mutate")
    args = flags.parse_args()
    mutations = [
        m for m in yaml.safe_load((ROOT / "tests/mutations.yaml").read_text()) if m["file"].startswith(args.only_paths)
    ]
    if not mutations:
        sys.exit(f"error: no mutation's file starts with {args.only_paths!r}.")
    for mutation in mutations:
        if (count := (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["find"])) != 1:
            sys.exit(f"error: {mutation['file']} holds {mutation['find']!r} {count} times, expected once.")
    sys.dont_write_bytecode = True  # a mutated file may be as old and as long as the whole one
    for name in LARGE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        results = [is_caught(tree, mutation) for mutation in mutations]
    print(f"{sum(results)} of {len(results)} caught")
    sys.exit(not all(results))


def copy_tree(tree: Path) -> None:
    """Files of this tree, whether committed yet or not."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    for name in (name for name in names if (ROOT / name).is_file()):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)


def is_caught(tree: Path, mutation: dict) -> bool:
    """Run the tests of one mutation, and take it back."""
    path, log, started = tree / mutation["file"], tree.with_name("log"), time.perf_counter()
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(mutation["find"], mutation["replace"]), encoding="utf-8")
    try:
        if not (child := os.fork()):
            os._exit(run_tests(tree, log, mutation["tests"]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        path.write_text(whole, encoding="utf-8")
    said = log.read_text(encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    caught, seconds = code != 0 and bool(failed), round(time.perf_counter() - started, 1)
    verdict, why = "caught" if caught else "SURVIVED", " ".join(failed) if failed or not code else said[-1000:]
    print(f"{verdict}  {mutation['file']}: {mutation['what']}, {seconds} s. {why}", flush=True)
    return caught


def run_tests(tree: Path, log: Path, names: list[str]) -> int:
    """In a process of its own, which takes this project's modules from `tree`; returns pytest's exit code."""
    os.chdir(tree)
    sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT), str(ROOT / "tests")))]
    os.environ["PYTHONPATH"], os.environ["PYTHONDONTWRITEBYTECODE"] = str(tree), "1"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    chosen = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    return int(pytest.main([*chosen, *(f"tests/{name}.py" for name in names)]))


if __name__ == "__main__":
    main()

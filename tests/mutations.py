"""Mutate one line at a time, and see whether the fast tests catch it.

    python tests/mutations.py                                # all of tests/mutations.yaml, in copies of this tree
    python tests/mutations.py --tests OTHER_TREE/tests       # the same faults with the tests of another tree
    python tests/mutations.py --only training                # those whose file starts so

Each mutation names a file, a text that stands in it once, what stands there instead, and the test files that must
fail. The exit code is 1 where one survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", default="", help="start of the files to mutate")
    flags.add_argument("--tests", type=Path, default=ROOT / "tests", help="folder of the tests to run")
    args = flags.parse_args()
    mutations = [
        m for m in yaml.safe_load((ROOT / "tests/mutations.yaml").read_text()) if m["file"].startswith(args.only)
    ]
    if not mutations or not args.tests.is_dir():
        sys.exit(f"error: no mutation's file starts with {args.only!r}, or {args.tests} is no folder.")
    for mutation in mutations:
        if (count := (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["find"])) != 1:
            sys.exit(f"error: {mutation['file']} holds {mutation['find']!r} {count} times, expected once.")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree, args.tests)
        results = [is_caught(tree, mutation) for mutation in mutations]
    print(f"{sum(results)} of {len(results)} caught")
    sys.exit(not all(results))


def copy_tree(tree: Path, tests: Path) -> None:
    """Tracked files of this tree, with the given tests."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    shutil.rmtree(tree / "tests")
    shutil.copytree(tests, tree / "tests")


def is_caught(tree: Path, mutation: dict) -> bool:
    """Run the tests of one mutation, and take it back."""
    path, started = tree / mutation["file"], time.perf_counter()
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(mutation["find"], mutation["replace"]), encoding="utf-8")
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
            + [f"tests/{name}.py" for name in mutation["tests"]],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(whole, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    caught, seconds = run.returncode != 0 and bool(failed), round(time.perf_counter() - started, 1)
    said = " ".join(failed) if failed or not run.returncode else run.stdout[-500:] + run.stderr[-500:]
    print(
        f"{'caught' if caught else 'SURVIVED'}  {mutation['file']}: {mutation['what']}, {seconds} s. {said}", flush=True
    )
    return caught


if __name__ == "__main__":
    main()

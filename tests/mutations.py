"""Mutate one line at a time, in a copy of this tree, and see whether the fast tests catch it.

    python tests/mutations.py           # all of tests/mutations.yaml
    python tests/mutations.py training  # those whose file starts so

Each mutation names a file, a text that stands in it once, what stands there instead, and the test files that must
fail. The exit code is 1 where one survives.
"""

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
    start = "".join(sys.argv[1:])
    mutations = yaml.safe_load((ROOT / "tests/mutations.yaml").read_text(encoding="utf-8"))
    mutations = [mutation for mutation in mutations if mutation["file"].startswith(start)]
    for mutation in mutations:
        if (count := (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["find"])) != 1:
            sys.exit(f"error: {mutation['file']} holds {mutation['find']!r} {count} times, expected once.")
    with tempfile.TemporaryDirectory() as tree:
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (Path(tree) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(tree) / name)
        caught = [is_caught(Path(tree), mutation) for mutation in mutations]
    print(f"{sum(caught)} of {len(caught)} caught")
    sys.exit(not all(caught))


def is_caught(tree: Path, mutation: dict) -> bool:
    """Run the tests of one mutation, and take it back."""
    path, started = tree / mutation["file"], time.perf_counter()
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(mutation["find"], mutation["replace"]), encoding="utf-8")
    flags = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *(f"tests/{name}.py" for name in mutation["tests"])],
        cwd=tree, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    path.write_text(whole, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    caught, seconds = run.returncode != 0 and bool(failed), time.perf_counter() - started
    said = " ".join(failed) if failed or not run.returncode else run.stdout[-500:] + run.stderr[-500:]
    title = f"{'caught' if caught else 'SURVIVED'}  {mutation['file']}: {mutation['what']}"
    print(f"{title}, {seconds:.1f} s. {said}", flush=True)
    return caught


if __name__ == "__main__":
    main()

"""Replace folders in processes that are killed at every possible step. Run by tests/test_files.py.

    python tests/killed_overwrite.py whole|finish FOLDER

A step is an event of the file system that Python reports to audit hooks: an open, a rename, a removal, a lock. The
process that replaces `FOLDER/N` gets SIGKILL before step N; the following run gets it before step N // 2 + 1. Prints,
for each N, all files after the kills, after a run that fails, and after a run that succeeds. The processes are forks.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from capivara_common.files import (
    atomic_folder,
    check_output_folder_and_clean_leftovers,
    get_partial_folder_path,
    rename_partial_folder,
)

WATCHED = ("open", "os.", "shutil.", "tempfile.", "fcntl.")


def write(kind: str, out: Path, word: str) -> None:
    """Replace `out` by a folder of three files that contain `word`; the word "fails" raises after the second file."""
    if kind == "whole":
        with atomic_folder(out, overwrite=True) as folder:
            fill(folder, word)
        return
    check_output_folder_and_clean_leftovers(out, overwrite=True)
    get_partial_folder_path(out).mkdir(exist_ok=True)
    fill(get_partial_folder_path(out), word)
    rename_partial_folder(out, overwrite=True)


def fill(folder: Path, word: str) -> None:
    (folder / "inner").mkdir(exist_ok=True)
    for name in ("a", "inner/b"):
        (folder / name).write_text(word)
    if word == "fails":
        raise ValueError
    (folder / "c").write_text(word)


def child(call: Callable[[], object], step: int | None) -> bool:
    """Call a function in a fork that is killed before step number `step`; return whether it was killed."""
    process = os.fork()
    if not process:
        remaining = [step]

        def count(event: str, _: tuple) -> None:
            if event.startswith(WATCHED):
                remaining[0] -= 1
                if not remaining[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        if step:
            sys.addaudithook(count)
        try:
            call()
        except ValueError:
            pass
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def state(folder: Path) -> dict[str, str]:
    """Return path -> content of all files below a folder; empty folders have the content ""."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def main(kind: str, root: Path) -> list[dict]:
    states, step, killed = [], 0, True
    while killed:
        step += 1
        out = root / str(step) / "out"
        out.mkdir(parents=True)
        fill(out, "old")
        killed = child(lambda out=out: write(kind, out, "new"), step)
        child(lambda out=out: write(kind, out, "newer"), step // 2 + 1)
        after_kill = state(out.parent)
        child(lambda out=out: write(kind, out, "fails"), None)
        after_failure = state(out.parent)
        child(lambda out=out: write(kind, out, "newest"), None)
        states.append({"killed": after_kill, "failed": after_failure, "done": state(out.parent)})
    return states


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))

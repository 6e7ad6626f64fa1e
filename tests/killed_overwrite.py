"""Folders that are replaced, each by a process that is killed one step later than the one before.

    python tests/killed_overwrite.py whole|finish FOLDER

A step is anything that Python tells an audit hook of the file system: an open, a rename, a removal, a lock. `FOLDER/N`
gets SIGKILL before step N, then, where there are enough steps, a second one in the run that follows. Prints for each N
what lay where after the kills, after a run that failed, and after one that did not. The processes are forks.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from capivara_common.files import atomic_folder, check_output_folder, finish_folder, partial_folder

WATCHED = ("open", "os.", "shutil.", "tempfile.", "fcntl.")


def write(kind: str, out: Path, word: str) -> None:
    """Replace `out` by a folder of three files that hold `word`; "fails" fails after the second."""
    if kind == "whole":
        with atomic_folder(out, overwrite=True) as folder:
            fill(folder, word)
        return
    check_output_folder(out, overwrite=True)
    partial_folder(out).mkdir(exist_ok=True)
    fill(partial_folder(out), word)
    finish_folder(out, overwrite=True)


def fill(folder: Path, word: str) -> None:
    (folder / "inner").mkdir(exist_ok=True)
    for name in ("a", "inner/b"):
        (folder / name).write_text(word)
    if word == "fails":
        raise ValueError
    (folder / "c").write_text(word)


def child(call: Callable[[], object], step: int | None) -> bool:
    """Do `call` in a process that is killed before its step of this number; whether it was."""
    number = os.fork()
    if not number:
        left = [step]

        def count(event: str, _: tuple) -> None:
            if event.startswith(WATCHED):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        if step:
            sys.addaudithook(count)
        try:
            call()
        except ValueError:
            pass
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL


def state(folder: Path) -> dict[str, str]:
    """Path -> content of every file below a folder, and of every empty folder ""."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def main(kind: str, root: Path) -> list[dict]:
    found, step, killed = [], 0, True
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
        found.append({"killed": after_kill, "failed": after_failure, "done": state(out.parent)})
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))

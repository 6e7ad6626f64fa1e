"""Bars are for terminals: a log gets the state of a long one now and then, and nothing of a quick one."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = textwrap.dedent(
    """
    import importlib, sys, time
    from capivara_common import progress
    from capivara_common.cli import run_command

    progress.QUICK_S, progress.EVERY_S = 0.2, 0.4

    def main():
        for name in sys.argv[1:]:
            bar = importlib.import_module(name).tqdm
            for _ in bar(range(20), desc="quick"):
                pass
            for _ in bar(range(20), desc="long"):
                time.sleep(0.05)

    run_command(main)
    """
)
LIBRARIES = ("tqdm.auto", "datasets.utils", "huggingface_hub.utils", "transformers.utils.logging")


def started(stderr: int, *libraries: str) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM, *libraries]
    return subprocess.Popen(words, cwd=ROOT, stderr=stderr)


@pytest.mark.slow
def test_a_log_gets_a_state_now_and_then():
    process = started(subprocess.PIPE, *LIBRARIES)
    lines = process.communicate(timeout=120)[1].decode().splitlines()  # a state begins with a return of the carriage
    assert process.returncode == 0 and all(line.startswith("long: ") for line in filter(None, lines)), lines
    assert 2 * len(LIBRARIES) <= len(list(filter(None, lines))) <= 8 * len(LIBRARIES)


def test_a_terminal_gets_bars_of_what_takes_time():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows and columns
    process = started(theirs, "tqdm.auto")
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while data := os.read(ours, 65536):
            said += data
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert b"quick" not in said and said.count(b"\rlong") > 4

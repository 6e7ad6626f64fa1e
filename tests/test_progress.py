"""Bars are for terminals: a log gets a line of a long one now and then, and nothing of a quick one."""

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

    progress.LINE_EVERY_S = 0.4

    def main():
        for name in sys.argv[1:]:
            bar = importlib.import_module(name).tqdm
            for _ in bar(range(20), desc="quick"):
                pass
            for _ in bar(range(20), desc=f"long {name}", leave=False):
                time.sleep(0.05)

    run_command(main)
    """
)
LIBRARIES = ("tqdm.auto", "datasets.utils", "huggingface_hub.utils", "transformers.utils.logging")


def started(stderr: int, *libraries: str) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM, *libraries]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=stderr)


@pytest.mark.slow
def test_a_log_gets_lines_now_and_then():
    process = started(subprocess.PIPE, *LIBRARIES)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0
    assert "quick" not in said and "\r" not in said and "\x1b" not in said
    lines = said.splitlines()
    for name in LIBRARIES:
        own = [line for line in lines if line.startswith(f"long {name}:")]
        assert 2 <= len(own) <= 8 and "/20 [" in own[0] and "20/20 [" in own[-1]
        lines = [line for line in lines if line not in own]
    assert not lines


def test_a_terminal_gets_bars():
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
    assert b"quick: 100%" in said and said.count(b"\rlong") > 4

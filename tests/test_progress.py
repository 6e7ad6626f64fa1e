"""Progress bars: terminals show bars of long work; logs get a line of long work now and then; quick work shows none."""

import contextlib
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))  # Windows lacks them

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = textwrap.dedent(
    """
    import importlib, sys, time
    from capivara_common import progress
    from capivara_common.cli import run_main_and_report_user_errors

    progress.BAR_DELAY_S, progress.LOG_INTERVAL_S = 0.2, 0.4

    def main():
        for name in sys.argv[1:]:
            bar = importlib.import_module(name).tqdm
            for _ in bar(range(20), desc="quick"):
                pass
            for _ in bar(range(20), desc="long"):
                time.sleep(0.05)

    run_main_and_report_user_errors(main)
    """
)
LIBRARIES = ("tqdm.auto", "datasets.utils", "huggingface_hub.utils", "transformers.utils.logging")


def start_program(stderr: int, *libraries: str) -> subprocess.Popen:
    """Start a process that shows a quick and a long bar of each library."""
    words = [sys.executable, "-c", PROGRAM, *libraries]
    return subprocess.Popen(words, cwd=ROOT, stderr=stderr)


@pytest.mark.slow
def test_a_log_gets_a_line_of_long_work_now_and_then():
    process = start_program(subprocess.PIPE, *LIBRARIES)
    lines = process.communicate(timeout=120)[1].decode().splitlines()  # each line begins with \r
    assert process.returncode == 0 and all(line.startswith("long: ") for line in filter(None, lines)), lines
    assert 2 * len(LIBRARIES) <= len(list(filter(None, lines))) <= 8 * len(LIBRARIES)


def test_a_terminal_shows_bars_of_long_work():
    terminal, child_end = pty.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows and columns
    process = start_program(child_end, "tqdm.auto")
    os.close(child_end)
    output = b""
    with contextlib.suppress(OSError):  # raised when the process has closed its end
        while data := os.read(terminal, 65536):
            output += data
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    assert b"quick" not in output and output.count(b"\rlong") > 4

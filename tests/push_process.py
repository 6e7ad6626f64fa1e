"""Runs commands for the tests of a push, in one process that takes a stand-in for the Hub: JSON lines in and out.

The client reads its settings when it is imported, so they are in this process's environment; imports are paid once. A
line asks for {"call": "module:function", "argv": [...], "environment": {...}} and is answered by {"code", "out", "err",
"waits_s"}: nothing sleeps, what would have been waited is told. All output is caught, that of libraries included.
"""

import gc
import importlib
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager

from capivara_common.cli import run_command


@contextmanager
def caught(number: int, texts: dict[str, str], name: str):
    """What is written to a file descriptor."""
    kept = os.dup(number)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept, number)
            os.close(kept)
            file.seek(0)
            texts[name] = file.read().decode(errors="replace")


def answer(request: dict) -> dict:
    texts, waits, code = {}, [], 0
    module, _, name = request["call"].partition(":")
    before, sleep = dict(os.environ), time.sleep
    os.environ.update(request.get("environment", {}))
    time.sleep = waits.append
    with caught(1, texts, "out"), caught(2, texts, "err"):
        try:
            command = getattr(importlib.import_module(module), name)
            run_command(lambda: command(request["argv"]))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
        except BaseException:
            code = 70
            traceback.print_exc()
    time.sleep = sleep
    os.environ.clear()
    os.environ.update(before)
    for handler in logging.getLogger().handlers[:]:
        logging.getLogger().removeHandler(handler)
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        for kind in (state.AcceleratorState, state.GradientState, state.PartialState):
            kind._reset_state()
    gc.collect()
    gc.freeze()  # what is left, modules above all, is not looked through after the next call
    return {"code": code, "waits_s": waits, **texts}


def main() -> None:
    gc.disable()  # it would look through all modules again and again while they are imported
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()

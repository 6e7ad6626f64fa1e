"""Server process of the push tests: run commands against a simulated Hub. Reads and writes one JSON object per line.

huggingface_hub reads its settings when it is imported, so the process gets them in its environment; commands share the
imports. A request is {"call": "module:function", "argv": [...], "environment": {...}}, a reply {"code", "out", "err",
"waits_s"}. `time.sleep` returns at once and its durations are reported in "waits_s". All output is captured, including
that of libraries.
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

from capivara_common.cli import run_main_and_report_user_errors


@contextmanager
def captured(number: int, texts: dict[str, str], name: str):
    """Capture everything that is written to the file descriptor `number`, and store it in `texts[name]`."""
    saved_descriptor = os.dup(number)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved_descriptor, number)
            os.close(saved_descriptor)
            file.seek(0)
            texts[name] = file.read().decode(errors="replace")


def answer(request: dict) -> dict:
    """Run the requested command and return its exit code, output and sleep durations."""
    texts, waits, code = {}, [], 0
    module, _, name = request["call"].partition(":")
    saved_environment, sleep = dict(os.environ), time.sleep
    os.environ.update(request.get("environment", {}))
    time.sleep = waits.append
    with captured(1, texts, "out"), captured(2, texts, "err"):
        try:
            command = getattr(importlib.import_module(module), name)
            run_main_and_report_user_errors(lambda: command(request["argv"]))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
        except BaseException:
            code = 70
            traceback.print_exc()
    time.sleep = sleep
    os.environ.clear()
    os.environ.update(saved_environment)
    for handler in logging.getLogger().handlers[:]:
        logging.getLogger().removeHandler(handler)
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        for kind in (state.AcceleratorState, state.GradientState, state.PartialState):
            kind._reset_state()
    gc.collect()
    gc.freeze()  # the next collection skips the objects that are left, which are mostly modules
    return {"code": code, "waits_s": waits, **texts}


def main() -> None:
    gc.disable()  # otherwise it would scan all modules again and again during imports
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()

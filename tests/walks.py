"""Trace which files of the project a value passes through in a real run.

A file counts if one of its functions gets the value as an argument or returns it. `modeling_capivara/` counts as a
single file, because it is used as one library. Not counted are `capivara_common/` except for `image_files.py`, files
of settings and their checks, excluded functions, and methods that only hold the value in `self`.
"""

import inspect
import json
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGE_FILES, MODEL = "capivara_common/image_files.py", "modeling_capivara/"
SETTINGS = ("arguments", "configuration_capivara", "checks_capivara")
MAX_ITEMS = 40  # items of a list that are searched for the value


def project_file(code: CodeType) -> str:
    """Return the file of a function, relative to the project; empty for other packages, tests and module-level code."""
    path = Path(code.co_filename)
    if code.co_name == "<module>" or not path.is_relative_to(ROOT):
        return ""
    name = path.relative_to(ROOT).as_posix()
    return "" if name.startswith(("tests/", ".venv/")) else name


def contains(container: Any, is_value: Callable[[Any], bool], depth: int = 4) -> bool:
    """Return whether an object is the value, or contains it in nested lists and dictionaries."""
    if is_value(container):
        return True
    if isinstance(container, dict):
        container = container.values()
    elif not isinstance(container, list | tuple | set):
        return False
    return depth > 0 and any(contains(item, is_value, depth - 1) for item in list(container)[:MAX_ITEMS])


def trace_files(
    run: Callable[[], object], is_value: Callable[[Any], bool], first: str, last: str, excluded: Collection[str] = ()
) -> set[str]:
    """Run a function and return the files that the value passes through.

    Args:
        run: Function to trace.
        is_value: Returns whether an object is the value.
        first: FILE:NAME of the function whose first call starts the trace; its file is included.
        last: FILE:NAME of the function whose last return ends the trace; its file is included.
        excluded: Names of functions within which nothing counts.
    """
    passed, at_last_return, files, started, excluded_calls = {first.split(":")[0]}, set(), {}, [], []

    def trace(frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        file = files[code] if code in files else files.setdefault(code, project_file(code))
        if not file or event not in ("call", "return"):
            return
        function, values = f"{file}:{code.co_name}", result
        if event == "call":
            started.extend([function] * (function == first))
            excluded_calls.extend([function] * (code.co_name in excluded))
            names, varargs, varkw, local = inspect.getargvalues(frame)
            values = [local.get(name) for name in (*names, varargs, varkw) if name not in ("self", "cls", None)]
        if started and not excluded_calls and file not in passed and contains(values, is_value):
            passed.add(file)
        if event == "return" and code.co_name in excluded:
            excluded_calls.pop()
        if function == last and event == "return":
            at_last_return.update(passed, [file])

    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    counted = {file for file in at_last_return if not Path(file).stem.endswith(SETTINGS)}
    counted = {MODEL if file.startswith(MODEL) else file for file in counted}
    return {file for file in counted if file == IMAGE_FILES or not file.startswith("capivara_common/")}


def publish(argv: list[str]) -> None:
    """Print the files that publishing a run passes through. `argv`: FOLDER, REPO_ID. Needs a stand-in for the Hub."""
    from hub_upload.push import try_export_and_push_run

    run = Path(argv[0]).resolve()

    def is_of_run(value: Any) -> bool:
        is_path = isinstance(value, Path) and value.resolve().is_relative_to(run)
        return is_path or type(value).__name__ in ("ModelCard", "PushPlan")

    module = "hub_upload/push.py:"
    files = trace_files(
        lambda: try_export_and_push_run(run, argv[1]),
        is_of_run,
        f"{module}try_export_and_push_run",
        f"{module}push_planned_changes",
    )
    print(json.dumps(sorted(files)))

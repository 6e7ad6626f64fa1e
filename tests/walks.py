"""Which files a value goes through: those with a function that is given it, or gives it back, in a real run.

The model is one place, `modeling_capivara/`: it is called as one, whether its classes are transformers' or ours. Not
counted are `capivara_common/` but for the gate of pictures, files of settings and their checks, what happens in
functions beside the way, and methods that have the value in `self` alone.
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
GATE, MODEL = "capivara_common/image_files.py", "modeling_capivara/"
SETTINGS = ("arguments", "configuration_capivara", "checks_capivara")
LOOKED_AT = 40  # items of a list


def project_file(code: CodeType) -> str:
    """The file of a function of the project, from its root; empty for those of others, of tests, and for imports."""
    path = Path(code.co_filename)
    if code.co_name == "<module>" or not path.is_relative_to(ROOT):
        return ""
    name = path.relative_to(ROOT).as_posix()
    return "" if name.startswith(("tests/", ".venv/")) else name


def holds(thing: Any, is_value: Callable[[Any], bool], depth: int = 4) -> bool:
    """Whether something is the value, or has it in lists and dictionaries."""
    inside = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set) else ()
    return is_value(thing) or any(holds(one, is_value, depth - 1) for one in list(inside)[: LOOKED_AT * (depth > 0)])


def walked(
    run: Callable[[], object], is_value: Callable[[Any], bool], first: str, last: str, beside: Collection[str] = ()
) -> set[str]:
    """The files from the first call of `first` to the last return of `last`, FILE:NAME each, those two included.

    `beside` are names of functions within which nothing counts.
    """
    found, kept, files, begun, aside = {first.split(":")[0]}, set(), {}, [], []

    def note(frame: FrameType, event: str, given: Any) -> None:
        code = frame.f_code
        file = files[code] if code in files else files.setdefault(code, project_file(code))
        if not file or event not in ("call", "return"):
            return
        place = f"{file}:{code.co_name}"
        if event == "call":
            begun.extend([place] * (place == first))
            aside.extend([place] * (code.co_name in beside))
            names, several, options, local = inspect.getargvalues(frame)
            given = [local.get(name) for name in (*names, several, options) if name not in ("self", "cls", None)]
        if begun and not aside and file not in found and holds(given, is_value):
            found.add(file)
        if event == "return" and code.co_name in beside:
            aside.pop()
        if place == last and event == "return":
            kept.update(found, [file])

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    counted = {file for file in kept if not Path(file).stem.endswith(SETTINGS)}
    counted = {MODEL if file.startswith(MODEL) else file for file in counted}
    return {file for file in counted if file == GATE or not file.startswith("capivara_common/")}


def publish(argv: list[str]) -> None:
    """Print the files that publishing a run goes through: FOLDER, REPO_ID; in a process with a stand-in for the Hub."""
    from hub_upload.push import publish_run

    run = Path(argv[0]).resolve()

    def of_run(thing: Any) -> bool:
        is_path = isinstance(thing, Path) and thing.resolve().is_relative_to(run)
        return is_path or type(thing).__name__ in ("ModelCard", "PushPlan")

    place = "hub_upload/push.py:"
    found = walked(lambda: publish_run(run, argv[1]), of_run, f"{place}publish_run", f"{place}push")
    print(json.dumps(sorted(found)))

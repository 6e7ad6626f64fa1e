"""The first lines of a command; nothing is imported here that takes time, so that Ctrl-C works from the start."""

import os
import signal
import sys
from typing import NoReturn


def start_command(arguments: str | None = None, description: str | None = None) -> None:
    """Let Ctrl-C end the imports that follow in one line, and answer `--help` and wrong flags before them.

    Args:
        arguments: "module:name" of the command's dataclass, or of a function that reads the flags as `parse` does; the
            module imports neither torch nor datasets. What is read is dropped, `main` reads the flags again. None
            where the imports that follow are quick.
        description: text of `--help`.

    Raises:
        SystemExit: the command ends here, a wrong flag or value with 2.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell has it ignored
        # Nothing is written yet, and KeyboardInterrupt would get lost in the imports of C extensions.
        signal.signal(signal.SIGINT, lambda *_: stop_at_once("Stopped."))
    if arguments is None:
        return
    from pkgutil import resolve_name  # here, as parse: Ctrl-C works by now

    from capivara_common.cli import parse

    found = resolve_name(arguments)
    parse(found, description) if isinstance(found, type) else found(None, description)


def stop_at_once(text: str) -> NoReturn:
    """End the process with a line about it and the exit code of Ctrl-C; nothing is cleaned up."""
    print(f"\n{text}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)

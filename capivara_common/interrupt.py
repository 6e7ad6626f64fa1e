"""Handle Ctrl-C while a command imports torch and other large libraries: print one line instead of a traceback.

Importing this module from a command activates `exit_on_interrupt`; `capivara_common.cli.run_command` ends it.
"""

import os
import signal
import sys

message = "Stopped."


def exit_immediately(*_: object) -> None:
    """Print `message` and end the process at once.

    C extensions can swallow a KeyboardInterrupt while they are imported. Nothing has been written at that time.
    """
    print(f"\n{message}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


def exit_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, until `raise_on_interrupt` is called.

    A handler that is already installed, or a shell that ignores Ctrl-C, is respected.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_immediately)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, so that running work can clean up."""
    if signal.getsignal(signal.SIGINT) is exit_immediately:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# `python -m` sets argv[0] to "-m" until it has located the module's own file.
if os.path.basename(sys.argv[0]) in ("-m", "train_accelerate.py"):
    exit_on_interrupt()

"""Ctrl-C while a command imports torch and the like: one line in place of a traceback from the middle of it."""

import os
import signal
import sys

message = "Stopped."


def exit_immediately(*_: object) -> None:
    """End at once; KeyboardInterrupt would get lost in the imports of C extensions, and nothing is written yet."""
    print(f"\n{message}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


def exit_on_interrupt() -> None:
    """Until `stop_by_exception`, unless Ctrl-C has a handler already, or the shell has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_immediately)


def raise_on_interrupt() -> None:
    """Ctrl-C is KeyboardInterrupt again: what is at work cleans up."""
    if signal.getsignal(signal.SIGINT) is exit_immediately:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if os.path.basename(sys.argv[0]) in ("-m", "train_accelerate.py"):  # "-m" until the module's own file is found
    exit_on_interrupt()

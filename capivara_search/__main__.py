"""`python -m capivara_search` and the console script `capivara`."""

import os
import signal
import sys


def stop(*_: object) -> None:
    """Ctrl-C during the imports that follow; KeyboardInterrupt would get lost in those of C extensions."""
    print("\nStopped.", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)  # nothing is written yet


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell has it ignored
    signal.signal(signal.SIGINT, stop)

from capivara_search.command import run  # noqa: E402

if __name__ == "__main__":
    run()

"""Handle Ctrl-C while a command still imports large libraries such as torch: print one line instead of a traceback.

If a command was started by `python -m`, importing this module calls `exit_on_interrupt`. Ctrl-C then ends the process
at once. After the imports, `capivara_common.cli.run_main_and_report_user_errors` calls `raise_on_interrupt`. Ctrl-C
then raises KeyboardInterrupt as usual.
"""

import atexit
import os
import signal
import sys
import threading

message = "Stopped."  # text that is printed after Ctrl-C
# Name of the daemon threads that may run C++ code for a long time, for example while they load a model.
NATIVE_THREAD_NAME = "native code"


def _print_message_and_exit_at_once(*_: object) -> None:
    """Print `message` and end the process at once; a signal handler for Ctrl-C.

    The handler does not raise KeyboardInterrupt, because C extensions can suppress the exception while they are
    imported. Ending at once is safe, because the command has not written any file at that time.
    """
    print(f"\n{message}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


def exit_on_interrupt() -> None:
    """Let Ctrl-C print one line and end the process at once, until `raise_on_interrupt` is called.

    Commands use this while they import large libraries, when there is nothing to clean up. Nothing changes if another
    handler for Ctrl-C is already installed, or if the shell ignores Ctrl-C for this process.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _print_message_and_exit_at_once)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, so that running work can clean up; undoes `exit_on_interrupt`."""
    if signal.getsignal(signal.SIGINT) is _print_message_and_exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_if_native_code_runs(code: int) -> None:
    """End the process at once if a thread still runs C++ code, for example to load a model. Otherwise do nothing.

    Such a thread has the name `NATIVE_THREAD_NAME`. At a normal exit, it could abort the process with a C++ error.

    Args:
        code: Exit code of the process, if it is ended.
    """
    # At a normal exit, Python ends such a thread when it returns from C++ code. The C++ runtime then aborts the process
    # with the error "terminate called without an active exception".
    if any(thread.name == NATIVE_THREAD_NAME for thread in threading.enumerate()):
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


# Handle Ctrl-C only in the commands of this project: while `python -m` imports the package of a command, sys.argv[0] is
# "-m". Other programs that import this package keep their own handling of Ctrl-C.
if os.path.basename(sys.argv[0]) in ("-m", "train_accelerate.py"):
    exit_on_interrupt()

"""The command `capivara`: search your own pictures, in Portuguese or English.

    capivara index ~/Fotos                        # capivara indexar
    capivara search "cachorro correndo na praia"  # capivara buscar
    python -m capivara_search --help

    from capivara_search.command import main

    main(["buscar", "um gato dormindo", "--index", "fotos.lance", "--json"])

Its flags stand in `command_flags.py`, what it does in `commands.py`, what it says in `words.yaml`. Nothing that takes
time is imported here: `--help` and wrong use are answered at once.
"""

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from capivara_common.files import no_space_left
from capivara_common.progress import prepare_bars
from capivara_search import commands
from capivara_search.command_flags import COMMANDS, WrongUse, language_of, parsed, parser
from capivara_search.shell_completion import completion
from capivara_search.terminal import Words, harmless

WRONG_USE, UNUSABLE = 2, 3  # exit codes, beside those of `commands`; the help explains them
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
OF_THE_SYSTEM = {  # number of an OSError -> key of `words.yaml`
    **dict.fromkeys(DENIED, "no_permission"),
    errno.EADDRINUSE: "port_in_use",
    errno.EADDRNOTAVAIL: "no_host",
}
EXPECTED = (WrongUse, commands.Unusable, ValueError, OSError, ImportError, RuntimeError)  # whose message is enough


def run() -> None:
    """The console script: `main`, which Ctrl-C ends in one line from the start."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        words = Words(language_of(sys.argv[1:]))

        def stop(*_: object) -> None:
            print("\n" + words("stopped"), file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGINT)

        # KeyboardInterrupt would get lost in the imports of C extensions; commands that clean up set a handler.
        signal.signal(signal.SIGINT, stop)
    prepare_bars()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a terminal with few letters
    main()


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Args:
        argv: its words, `sys.argv[1:]` where None.

    Raises:
        SystemExit: always, with the exit code that the help explains.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    words = Words(language_of(argv))
    try:
        with _notes_shown(words), warnings.catch_warnings():
            # PIL's, in English, of pictures that are refused next, in one line.
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
            code = _code(argv, words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        goes_on = {"index", COMMANDS["index"]} & set(argv)
        print("\n" + words("stopped_goes_on" if goes_on else "stopped"), file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # `capivara search … | head`; what is left must not be written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except EXPECTED as error:
        code, text = explained(error, words)
        print(words("error", text=text), file=sys.stderr)
    sys.exit(code)


def explained(error: Exception, words: Words) -> tuple[int, str]:
    """The exit code of an error, and one line about it; in the language, where the error is a usual one."""
    if isinstance(error, WrongUse | commands.Unusable):
        return WRONG_USE if isinstance(error, WrongUse) else UNUSABLE, str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return UNUSABLE, words("missing_package", name=error.name.partition(".")[0])
    if no_space_left(error):
        return UNUSABLE, words("no_space")
    if isinstance(error, OSError):
        number = error.errno or 0
        if number in OF_THE_SYSTEM and (error.filename or number not in DENIED):
            return UNUSABLE, words(OF_THE_SYSTEM[number], path=harmless(str(error.filename)))
        if number < 0:  # socket.gaierror, whose numbers are the resolver's
            return UNUSABLE, words("no_host")
    text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    text, code = words.of_library(text)
    return UNUSABLE if code is None else code, text or type(error).__name__


def _code(argv: Sequence[str], words: Words) -> int:
    args = parsed(argv, words)
    if args.command == "completion":
        print(completion(parser(words), args.shell), end="")
        return commands.DONE
    return commands.run(args, words)


@contextmanager
def _notes_shown(words: Words) -> Iterator[None]:
    """What the library logs for people, such as that it waits, is shown on stderr, in the language."""
    handler, logger = logging.Handler(logging.INFO), logging.getLogger("capivara")

    def emit(record: logging.LogRecord) -> None:
        from tqdm.std import tqdm  # a bar goes on below it

        tqdm.write(words.of_library(record.getMessage())[0], file=sys.stderr)

    handler.emit, level = emit, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

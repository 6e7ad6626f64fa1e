"""The command `capivara`: search your own pictures, in Portuguese or English.

    capivara index ~/Fotos                        # capivara indexar
    capivara search "cachorro correndo na praia"  # capivara buscar

What it says stands in `words.yaml`. Nothing that takes time is imported before a command begins: `--help` and wrong use
are answered at once.
"""

import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
from click.shell_completion import shell_complete

from capivara_common.files import no_space_left
from capivara_common.progress import prepare_bars
from capivara_search.command_line import COMPLETE, ENGLISH
from capivara_search.commands import NOTHING, capivara
from capivara_search.words import COMMANDS, Words, visible

WRONG_USE, UNUSABLE = 2, 3  # exit codes, beside those of `commands`; the help explains them
WRONG = "folder_shut empty_label label_twice bad_template bad_pull folder_forgotten no_known_folder bad_pattern"
WRONG += " path_excluded nothing_to_include move_nested move_not_there bad_suffix"
# Of errors with a code, where it is not UNUSABLE.
EXIT_CODES = {"no_picture": NOTHING, "move_nothing": NOTHING, **dict.fromkeys(WRONG.split(), WRONG_USE)}
OF_THE_SYSTEM = {  # number of an OSError -> its words
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "no_permission"),
    errno.EADDRINUSE: "port_in_use",
    errno.EADDRNOTAVAIL: "no_host",
}
EXPECTED = (click.UsageError, ValueError, OSError, ImportError, RuntimeError)  # whose message is enough


def language_of(argv: Sequence[str]) -> str:
    """ "pt" or "en": what `--lang` says, else the first of LC_ALL, LC_MESSAGES and LANG that is set."""
    if asked := re.search(r"^--lang[=\n](pt|en)$", "\n".join(argv), re.MULTILINE):
        return asked[1]
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "pt" if next(filter(None, names), "").startswith("pt") else "en"


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
    """The command, of these words, or those of the shell. Raises SystemExit, with the exit code of the help, always."""
    argv = sys.argv[1:] if argv is None else list(argv)
    words = Words(language_of(argv))
    try:
        with _notes_shown(words), warnings.catch_warnings():
            # PIL's, in English, of pictures that are refused next, in one line.
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
            if asked := os.environ.get(COMPLETE):  # by a shell
                sys.exit(shell_complete(capivara, {"obj": words}, "capivara", COMPLETE, asked))
            with capivara.make_context("capivara", argv, obj=words) as ctx:
                code = capivara.invoke(ctx) or 0
        sys.stdout.flush()
    except click.exceptions.Exit as ended:  # --help and --version
        code = ended.exit_code
    except KeyboardInterrupt:
        name = next((ENGLISH.get(one, one) for one in argv if one in COMMANDS or one in ENGLISH), None)
        is_server = name in ("watch", "app")  # which ends by nothing else
        said = "ended" if is_server else "stopped_goes_on" if name == "index" else "stopped"
        print("\n" + words(said), file=sys.stderr)
        code = 0 if is_server else 128 + signal.SIGINT
    except BrokenPipeError:  # `capivara search … | head`; what is left must not be written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except EXPECTED as error:
        code, text = explained(error, words)
        print(words("error", text=text), file=sys.stderr)
    sys.exit(code)


def explained(error: Exception, words: Words) -> tuple[int, str]:
    """The exit code of an error, and one line about it; in the language, where the error has a code."""
    if isinstance(error, click.UsageError):
        return WRONG_USE, error.message
    if isinstance(error, ModuleNotFoundError) and error.name:
        return UNUSABLE, words("missing_package", name=error.name.partition(".")[0])
    if no_space_left(error):
        return UNUSABLE, words("no_space")
    code = getattr(error, "code", None)
    if words.language == "pt" and words.has(f"error.{code}"):
        values = {name: visible(str(value)) for name, value in error.values.items()}
        return EXIT_CODES.get(code, UNUSABLE), words(f"error.{code}", **values)
    if isinstance(error, OSError) and code is None:
        number = error.errno or 0
        key = "no_host" if number < 0 else OF_THE_SYSTEM.get(number)  # below 0: the resolver's, of socket.gaierror
        if key and (key != "no_permission" or error.filename):
            return UNUSABLE, words(key, path=visible(str(error.filename)))
    text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    return EXIT_CODES.get(code, UNUSABLE), visible(" ".join(text.split())) or type(error).__name__


@contextmanager
def _notes_shown(words: Words) -> Iterator[None]:
    """What the library logs for people, such as that it waits, is shown on stderr, in the language."""
    handler, logger = logging.Handler(), logging.getLogger("capivara")

    def emit(record: logging.LogRecord) -> None:
        from tqdm.std import tqdm  # a bar goes on below it

        text, key = record.getMessage(), f"note.{getattr(record, 'code', None)}"
        if words.language == "pt" and words.has(key):
            values = getattr(record, "values", record.args)
            text = words(key, *(explained(one, words)[1] if isinstance(one, Exception) else one for one in values))
        tqdm.write(visible(" ".join(text.split())), file=sys.stderr)

    handler.emit = emit
    # transformers warns of default values of SigLIP's own configuration, whatever a model has.
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)

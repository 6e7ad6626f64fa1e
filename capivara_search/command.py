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
from tqdm.std import tqdm

from capivara_common import interrupt
from capivara_common.files import no_space_left
from capivara_common.progress import prepare_bars
from capivara_search.command_line import wrong_use
from capivara_search.commands import capivara
from capivara_search.words import Words, visible

WRONG_USE, UNUSABLE = 2, 3  # exit codes, beside that of `commands`; the help explains them


def language_of(argv: Sequence[str]) -> str:
    """ "pt" or "en": what `--lang` says, else the first of LC_ALL, LC_MESSAGES and LANG that is set."""
    if asked := re.search(r"^--lang[=\n](pt|en)$", "\n".join(argv), re.MULTILINE):
        return asked[1]
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "pt" if next(filter(None, names), "").startswith("pt") else "en"


def run() -> None:
    """The console script: `main`, which Ctrl-C ends in one line from the start."""
    interrupt.said = Words(language_of(sys.argv[1:]))("stopped")
    interrupt.stop_while_importing()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a terminal with few letters
    main()


def main(argv: Sequence[str] | None = None) -> None:
    """The command, of these words, or those of the shell. Raises SystemExit, with the exit code of the help, always."""
    argv = sys.argv[1:] if argv is None else list(argv)
    words = Words(language_of(argv))
    prepare_bars()
    # PIL's, in English, of pictures that are refused next, in one line.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        with _notes_shown(words):
            code = capivara.main(argv, "capivara", standalone_mode=False, obj=words) or 0
    except click.Abort:  # Ctrl-C, where it is no end as any other
        click.echo(words("stopped_goes_on"), err=True)
        code = 128 + signal.SIGINT
    except (click.UsageError, ValueError, OSError, ImportError, RuntimeError) as error:  # whose message is enough
        code, text = explained(error, words)
        click.echo(words("error", text=text), err=True)
    sys.exit(code)


def explained(error: Exception, words: Words) -> tuple[int, str]:
    """The exit code of an error, and one line about it; in the language, where the error has a code."""
    if isinstance(error, click.UsageError):
        return WRONG_USE, wrong_use(error, words)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return UNUSABLE, words("missing_package", names=error.name.partition(".")[0])
    if no_space_left(error):
        return UNUSABLE, words("no_space")
    code, number = getattr(error, "code", None), getattr(error, "errno", None)
    text = str(error)
    if words.language == "pt" and words.has(f"error.{code}"):
        text = words(f"error.{code}", **{name: words.reason(str(value)) for name, value in error.values.items()})
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        text = words("no_permission", path=error.filename)
    elif number == errno.EADDRINUSE:
        text = words("port_in_use")
    elif number == errno.EADDRNOTAVAIL or (number or 0) < 0:  # of socket.gaierror
        text = words("no_host")
    return WRONG_USE if type(error) is ValueError else UNUSABLE, visible(" ".join(text.split())) or type(error).__name__


@contextmanager
def _notes_shown(words: Words) -> Iterator[None]:
    """What the library logs for people, such as that it waits, is shown on stderr, in the language."""
    handler, logger = logging.Handler(), logging.getLogger("capivara")

    def emit(record: logging.LogRecord) -> None:
        text, key = record.getMessage(), f"note.{getattr(record, 'code', None)}"
        if words.language == "pt" and words.has(key):
            values = getattr(record, "values", record.args)
            text = words(key, *(explained(one, words)[1] if isinstance(one, Exception) else one for one in values))
        text = visible(" ".join(text.split()))
        if sys.stderr.isatty():
            tqdm.write(text, file=sys.stderr)  # a bar goes on below it
        else:
            click.echo(text, err=True)

    handler.emit = emit
    # transformers warns of default values of SigLIP's own configuration, whatever a model has.
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)

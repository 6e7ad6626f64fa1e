"""Progress bars are drawn in a terminal; a log file has the state of each once in half a minute."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

from tqdm.std import tqdm

EVERY_S = 30  # in a file or a pipe; what takes less leaves nothing there


def prepare_bars() -> None:
    """Let all bars of this process, those of libraries too, write seldom where stderr is a file or a pipe.

    datasets, transformers, huggingface_hub and accelerate all show tqdm's bars, so that the rule stands in its class.
    """
    if not sys.stderr.isatty():
        seldom = {"mininterval": EVERY_S, "maxinterval": EVERY_S, "delay": EVERY_S}
        tqdm.__init__ = partialmethod(tqdm.__init__, **seldom)
        tqdm.set_postfix = partialmethod(tqdm.set_postfix, refresh=False)


def no_bars() -> None:
    """Draw no bar in this process, whose neighbour has one."""
    tqdm.display = tqdm.close = lambda bar, *args, **options: None


@contextmanager
def no_bars_of_transformers() -> Iterator[None]:
    """Let transformers draw no bars in the block, as those of weights that are read within a second."""
    from transformers.utils import logging  # here: what has no use for it does not pay for it

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

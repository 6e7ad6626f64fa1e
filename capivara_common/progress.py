"""Progress bars: in a terminal of what takes a second and more; a log file has each once in half a minute."""

import sys
from functools import partialmethod

from tqdm.std import tqdm

QUICK_S = 1  # in which nothing needs a bar, such as reading weights
EVERY_S = 30  # in a file or a pipe

_init, _set_postfix = tqdm.__init__, tqdm.set_postfix


def prepare_bars() -> None:
    """Let all bars of this process, those of libraries too, be so.

    datasets, transformers, huggingface_hub and accelerate all show tqdm's bars, so that the rule stands in its class.
    """
    seldom = dict.fromkeys(("mininterval", "maxinterval", "delay"), EVERY_S)
    tqdm.__init__ = partialmethod(_init, **{"delay": QUICK_S} if sys.stderr.isatty() else seldom)
    tqdm.set_postfix = partialmethod(_set_postfix, refresh=False)


def no_bars() -> None:
    """Draw no bar in this process, whose neighbour has one."""
    tqdm.display = tqdm.close = lambda bar, *args, **options: None

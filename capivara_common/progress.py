"""Progress bars: in a terminal of what takes a second and more; a log file has each once in half a minute."""

import math
import sys
from functools import partialmethod
from typing import Any

from tqdm.std import tqdm

BAR_DELAY_S = 1  # in which nothing needs a bar, such as reading weights
LOG_INTERVAL_S = 30  # in a file or a pipe

_init, _set_postfix, _display = tqdm.__init__, tqdm.set_postfix, tqdm.display


def configure_progress_bars() -> None:
    """Let all bars of this process, those of libraries too, be so.

    datasets, transformers, huggingface_hub and accelerate all show tqdm's bars, so that the rule stands in its class.
    """
    seldom = dict.fromkeys(("mininterval", "maxinterval", "delay"), LOG_INTERVAL_S)
    tqdm.__init__ = partialmethod(_init, **{"delay": BAR_DELAY_S} if sys.stderr.isatty() else seldom)
    tqdm.set_postfix = partialmethod(_set_postfix, refresh=False)
    tqdm.display = _display_after_delay


def _display_after_delay(bar: tqdm, *args: Any, **options: Any) -> bool:
    """Nothing before the delay: `tqdm.write` would draw a bar that `close` then gives no end of a line."""
    return bar._time() >= getattr(bar, "start_t", math.inf) + bar.delay and _display(bar, *args, **options)


def disable_progress_bars() -> None:
    """Draw no bar in this process, whose neighbour has one."""
    tqdm.display = tqdm.close = lambda bar, *args, **options: None

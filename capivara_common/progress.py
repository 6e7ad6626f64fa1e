"""Configure progress bars: in a terminal after one second of work, in a log file one line per 30 seconds."""

import math
import sys
from functools import partialmethod
from typing import Any

from tqdm.std import tqdm

BAR_DELAY_S = 1  # shorter work, such as reading weights, needs no bar
LOG_INTERVAL_S = 30  # between two lines if the output is a file or a pipe

_init, _set_postfix, _display = tqdm.__init__, tqdm.set_postfix, tqdm.display


def configure_progress_bars() -> None:
    """Apply the delay and the interval to all progress bars of this process, including those of libraries.

    datasets, transformers, huggingface_hub and accelerate all show tqdm's bars, so the class itself is changed.
    """
    log_options = dict.fromkeys(("mininterval", "maxinterval", "delay"), LOG_INTERVAL_S)
    tqdm.__init__ = partialmethod(_init, **{"delay": BAR_DELAY_S} if sys.stderr.isatty() else log_options)
    tqdm.set_postfix = partialmethod(_set_postfix, refresh=False)
    tqdm.display = _display_after_delay


def _display_after_delay(bar: tqdm, *args: Any, **options: Any) -> bool:
    """Draw a bar only after its delay.

    `tqdm.write` redraws bars at any time, and `close` would leave a bar that was drawn too early without a line end.
    """
    return bar._time() >= getattr(bar, "start_t", math.inf) + bar.delay and _display(bar, *args, **options)


def disable_progress_bars() -> None:
    """Draw no bars in this process, because another worker shows them."""
    tqdm.display = tqdm.close = lambda bar, *args, **options: None

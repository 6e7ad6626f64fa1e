"""Set when and how often the progress bars of tqdm are drawn, in all libraries of this process.

In a terminal, a bar appears after one second of work. If the output is a log file, a line is written every 30 seconds.
"""

import math
import sys
from functools import partialmethod
from typing import Any

from tqdm.std import tqdm

BAR_DELAY_S = 1  # seconds until a bar appears, because shorter work, such as reading weights, needs no bar
LOG_INTERVAL_S = 30  # seconds between two lines of progress if the output is a file or a pipe

_init, _set_postfix, _display = tqdm.__init__, tqdm.set_postfix, tqdm.display


def set_progress_bar_timing() -> None:
    """Set when the progress bars of this process are drawn, so that short work shows no bar and log files stay short.

    In a terminal, a bar appears after `BAR_DELAY_S` seconds. In a file or pipe, a line is written every
    `LOG_INTERVAL_S` seconds.
    """
    log_options = dict.fromkeys(("mininterval", "maxinterval", "delay"), LOG_INTERVAL_S)
    # The class itself is changed, because datasets, transformers, huggingface_hub and accelerate also use it.
    tqdm.__init__ = partialmethod(_init, **{"delay": BAR_DELAY_S} if sys.stderr.isatty() else log_options)
    tqdm.set_postfix = partialmethod(_set_postfix, refresh=False)
    tqdm.display = _display_after_delay


def _display_after_delay(bar: tqdm, *args: Any, **options: Any) -> bool:
    """Draw a progress bar if its delay has passed; replaces `tqdm.display`.

    The check is needed because `tqdm.write` redraws all bars, even before their delay has passed. `tqdm.close` would
    then write no line end after such a bar.

    Args:
        bar: The progress bar.
        *args: Arguments of `tqdm.display`.
        **options: Keyword arguments of `tqdm.display`.

    Returns:
        The result of `tqdm.display`; False if the bar was not drawn.
    """
    return bar._time() >= getattr(bar, "start_t", math.inf) + bar.delay and _display(bar, *args, **options)


def disable_progress_bars() -> None:
    """Turn off all progress bars of tqdm in this process.

    If several worker processes run on a machine, each worker except the first calls this function, so that only the
    first worker draws bars.
    """
    tqdm.display = tqdm.close = lambda bar, *args, **options: None

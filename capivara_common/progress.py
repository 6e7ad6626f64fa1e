"""Progress bars are drawn in a terminal; a log file gets a line of each every half minute.

Their rate, and so the time that is left, is that of the last half minute, once `MEASURED_S` of work were measured: what
comes before the first item, such as a model that is loaded, is no part of it.
"""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.std import tqdm

LINE_EVERY_S = 30
MEASURED_S = 2  # of work; before, there is no rate
WINDOW_S = 30  # the rate is that of so many seconds


def prepare_bars() -> None:
    """Let all bars of this process, those of libraries too, write lines where stderr is a file or a pipe.

    datasets, transformers, huggingface_hub and accelerate all show tqdm's bars, so that the rule stands in its class.
    """
    if tqdm.format_dict is not _with_rolling_rate:
        tqdm.format_dict = _with_rolling_rate
    if not sys.stderr.isatty() and tqdm.close is not _close:
        tqdm.display, tqdm.close = _display, _close


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


_close_of_tqdm, _format_dict_of_tqdm = tqdm.close, tqdm.format_dict


@property
def _with_rolling_rate(bar: tqdm) -> dict[str, Any]:
    values = _format_dict_of_tqdm.fget(bar)
    return values if bar.disable else values | {"rate": _rate(bar)}


def _rate(bar: tqdm) -> float | None:
    """Items a second, lately; 0, which is shown as "?", where that is not known yet; None, the mean, at the end."""
    done = bar.__dict__.setdefault("done_lately", deque())  # when so many items were done: (seconds, items)
    if done and bar.n < done[-1][1]:
        done.clear()  # it begins anew
    if bar.n > (done[-1][1] if done else bar.initial):
        done.append((bar._time(), bar.n))
    while len(done) > 2 and done[1][0] < done[-1][0] - WINDOW_S:
        done.popleft()
    if bar.total and bar.n >= bar.total:
        return None
    seconds = done[-1][0] - done[0][0] if done else 0
    return (done[-1][1] - done[0][1]) / seconds if seconds >= MEASURED_S else 0


def _display(bar: tqdm, *args: Any, **options: Any) -> None:
    """In place of drawing: a line where the last one, or the start, is long enough ago."""
    now, _ = bar._time(), _rate(bar)  # which is measured here, too
    if now - getattr(bar, "last_line_t", getattr(bar, "start_t", now)) >= LINE_EVERY_S:
        bar.last_line_t = now
        _write_line(bar)


def _close(bar: tqdm) -> None:
    """The last line of a bar that has written one; a quick one leaves nothing."""
    if hasattr(bar, "last_line_t") and not bar.disable:
        _write_line(bar)
    bar.delay = float("inf")  # tqdm itself then takes it for one that was never shown
    _close_of_tqdm(bar)


def _write_line(bar: tqdm) -> None:
    bar.fp.write(f"{bar}\n")
    bar.fp.flush()

"""Progress bars are drawn in a terminal; a log file gets a line of each every half minute."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.std import tqdm

LINE_EVERY_S = 30


def prepare_bars() -> None:
    """Let all bars of this process, those of libraries too, write lines where stderr is a file or a pipe.

    datasets, transformers, huggingface_hub and accelerate all show tqdm's bars, so that the rule stands in its class.
    """
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


_close_of_tqdm = tqdm.close


def _display(bar: tqdm, *args: Any, **options: Any) -> None:
    """In place of drawing: a line where the last one, or the start, is long enough ago."""
    now = bar._time()
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

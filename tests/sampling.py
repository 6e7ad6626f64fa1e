"""A few of many cases are quick tests, the others slow ones."""

from collections.abc import Iterable

import pytest


def one_in(number: int, cases: Iterable) -> list:
    """Cases for `parametrize`, where a tuple holds several arguments: the first, and each so many later, is quick."""
    sampled = []
    for index, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        sampled.append(pytest.param(*values, marks=[pytest.mark.slow] * (index % number > 0)))
    return sampled

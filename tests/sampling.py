"""Mark all but a few of many similar test cases as slow."""

from collections.abc import Iterable

import pytest


def one_in(number: int, cases: Iterable) -> list:
    """Return cases for `parametrize`, in which only every `number`-th is not slow. A tuple holds several arguments."""
    sampled = []
    for index, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        sampled.append(pytest.param(*values, marks=[pytest.mark.slow] * (index % number > 0)))
    return sampled

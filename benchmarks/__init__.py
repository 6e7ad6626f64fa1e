"""Timings and the figures of the README. Every script prints JSON as its last line and can write it to a file."""

import capivara_common.interrupt  # noqa: F401

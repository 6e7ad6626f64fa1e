"""Benchmark scripts. Every script prints its results as JSON in the last line and can write them to a file."""

import capivara_common.interrupt  # noqa: F401

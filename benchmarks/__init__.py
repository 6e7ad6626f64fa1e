"""Benchmark scripts. Every script prints its results as JSON in the last line and can write them to a file."""

# This import has an effect: Ctrl-C during the slow imports of libraries such as torch prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401

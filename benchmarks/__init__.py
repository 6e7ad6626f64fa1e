"""Benchmarks, and two scripts for the documentation: one writes tables of results, the other makes the screenshot.

Run a benchmark by its module name, such as `python -m benchmarks.encode`. Most benchmarks print their results as JSON
in the last line of the output, and can also write the results to a file.
"""

# Imported only for its effect: Ctrl-C during the slow imports of a command prints one line instead of a traceback.
import capivara_common.interrupt  # noqa: F401

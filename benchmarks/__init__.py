"""Benchmarks, and scripts that write tables of the results into the documentation and make its screenshot.

Run a benchmark by its module name, such as `python -m benchmarks.encode`. Most benchmarks print their results as JSON
in the last line of the output, and can also write the results to a file.
"""

# Imported only for its effect: Ctrl-C during the slow imports of a command prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401

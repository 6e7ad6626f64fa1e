"""Benchmarks, and scripts that write tables of the results into the documentation and make its screenshot.

Most benchmarks print their results as JSON in the last line, and can write them to a file.
"""

# Imported only for its effect: Ctrl-C during the slow imports of a command prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401

"""Evaluate CLIP-like models: metrics, benchmark commands, result files, tables and plots.

Import names from the modules of this package, for example `from eval.capivara_metrics.metrics import recall_at_k`. Do
not write `import eval`, because it would hide Python's builtin function `eval`.
"""

# This import is needed only for its side effect: if the user presses Ctrl-C during the slow imports of a command, one
# line is printed instead of a traceback.
import capivara_common.interrupt  # noqa: F401

"""Zero-shot evaluation: metrics, benchmark commands, result files, tables and plots.

Import names from its modules, for example `from eval.capivara_metrics.metrics import recall_at_k`. `import eval` would
hide the builtin function of that name.
"""

import capivara_common.interrupt  # noqa: F401

"""Zero-shot evaluation: metrics, tasks, tables and plots. Import by `from eval.capivara_metrics.metrics import …`."""

import capivara_common.interrupt  # noqa: F401

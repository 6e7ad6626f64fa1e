"""Folder that `evaluate.load` can load: functions in `metrics.py`, the metric module in `capivara_metrics.py`."""

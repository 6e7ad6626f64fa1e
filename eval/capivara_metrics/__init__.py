"""A folder that Hugging Face's `evaluate` loads: the formulas in `metrics.py`, its module in `capivara_metrics.py`."""

"""Metrics of retrieval and classification, in a folder that Hugging Face's `evaluate.load` can load.

`metrics.py` has the metrics as plain functions. `capivara_metrics.py` wraps them as a metric module for `evaluate`.
"""

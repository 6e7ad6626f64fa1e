"""What `python -m eval.report` is made of."""

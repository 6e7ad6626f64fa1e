"""Fine-tune CAPIVARA models: command-line arguments, data, training loop and checkpoints.

The command `train_accelerate.py` runs the training. Importing this package first imports `capivara_common.interrupt`,
so that Ctrl-C during slow imports ends the program without a traceback.
"""

# Imported first and only for its effect: Ctrl-C during the slow imports of a command prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401

"""Fine-tune CAPIVARA models: command-line arguments, data, training loop and checkpoints.

The command `train_accelerate.py` runs the training.
"""

# Imported only for its effect: Ctrl-C during the slow imports of a command prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401

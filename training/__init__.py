"""Fine-tune CAPIVARA models: command-line arguments, data, training loop and checkpoints.

The command `train_accelerate.py` runs the training.
"""

# This import is needed only for its side effect: if the user presses Ctrl-C during the slow imports of a command, one
# line is printed instead of a traceback.
import capivara_common.interrupt  # noqa: F401

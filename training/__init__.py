"""Fine-tuning of CAPIVARA models: arguments, data, training loop. The command is `train_accelerate.py`."""

import capivara_common.interrupt  # noqa: F401

"""The training of CAPIVARA: arguments, data, the step, the optimiser. `train_accelerate.py` puts them in sequence."""

import capivara_common.interrupt  # noqa: F401

"""Train several models one after another in the processes that torchrun has started: `training_process.py FLAGS.json`.

FLAGS.json is a list with the command line of each run. Starting the processes takes longer than training toy models.
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from pytest import MonkeyPatch
from tiny import draw_nothing

import train_accelerate

draw_nothing(patch := MonkeyPatch())
# The end of a run closes the process group, which the next run needs.
patch.setattr(Accelerator, "end_training", lambda self: self.wait_for_everyone())
for argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    train_accelerate.main(argv)

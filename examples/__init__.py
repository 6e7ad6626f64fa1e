"""Examples of training, evaluation and search, and a demo that trains a small model on emoji drawings (OpenMoji).

Most modules are commands. Run a command by its module name, such as `python -m examples.caption`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

# Imported only for its effect: Ctrl-C during the slow imports of a command prints one line instead of a traceback.
import capivara_common.interrupt  # noqa: F401
from capivara_common.environment import describe_device, package_versions, resolve_mixed_precision
from capivara_common.privacy import shorten_absolute_paths


def collect_run_conditions(args: Any, device: Any = "cpu", *packages: str) -> dict[str, Any]:
    """Collect the arguments, device and package versions of an example's run, to be stored in its results.json.

    Args:
        args: Dataclass instance with the command's arguments.
        device: Device that the model ran on.
        *packages: Names of packages whose versions are recorded, in addition to those that are always recorded.

    Returns:
        `{"config": {argument: value}, "device": description of the device, "versions": {package: version}}`. Absolute
        paths are shortened.
    """
    config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    versions = package_versions(*packages)
    return {"config": shorten_absolute_paths(config), "device": describe_device(device), "versions": versions}


def build_trainer_options(args: Any, folder: Path, device: Any) -> dict[str, Any]:
    """Build the arguments of transformers' `TrainingArguments` that the fine-tuning examples share.

    Args:
        args: Dataclass instance with the arguments epochs, batch_size, learning_rate and seed of the command.
        folder: Output folder of the training.
        device: torch.device that the model is trained on.
    """
    return {
        "output_dir": str(folder),
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # a value below 1 is a fraction of all steps
        "seed": args.seed,
        "save_strategy": "no",
        "logging_steps": 10,
        "use_cpu": device.type == "cpu",
        "bf16": resolve_mixed_precision("auto", device) == "bf16",
        "dataloader_pin_memory": device.type != "cpu",
        "report_to": "none",
    }

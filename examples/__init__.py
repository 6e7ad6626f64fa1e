"""The demo, and worked examples of training, evaluation and search. Each module is a command."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import capivara_common.interrupt  # noqa: F401
from capivara_common.environment import describe_device, package_versions
from capivara_common.privacy import hide_paths


def describe_run(args: Any, device: Any = "cpu", *packages: str) -> dict[str, Any]:
    """Describe a run of an example, for its results.json.

    Args:
        args: Dataclass of the command's arguments.
        device: Device that the model ran on.
        *packages: Packages whose versions are recorded in addition to the usual ones.

    Returns:
        `config` (the arguments, with paths of this machine hidden), `device` and `versions`.
    """
    config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    versions = package_versions(*packages)
    return {"config": hide_paths(config), "device": describe_device(device), "versions": versions}

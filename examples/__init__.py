"""The demo, and worked examples of training, evaluation and search: each a command that reads from top to bottom."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import capivara_common.interrupt  # noqa: F401
from capivara_common.environment import describe_device, package_versions
from capivara_common.privacy import hide_paths


def describe_run(args: Any, device: Any = "cpu", *packages: str) -> dict[str, Any]:
    """What an example writes beside its figures: `config`, the dataclass of its arguments without paths of this
    machine, `device` and `versions`, those of `packages` beside the usual ones."""
    config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    versions = package_versions(*packages)
    return {"config": hide_paths(config), "device": describe_device(device), "versions": versions}

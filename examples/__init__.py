"""The demo, and worked examples of training, evaluation and search: each a command that reads from top to bottom."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import capivara_common.interrupt  # noqa: F401
from capivara_common.environment import device_description, package_versions
from capivara_common.privacy import hide_paths

if TYPE_CHECKING:
    import torch


def run_facts(args: Any, device: "str | torch.device" = "cpu", *packages: str) -> dict[str, Any]:
    """What an example writes beside its figures: `config` without paths of this machine, `device` and `versions`.

    Args:
        args: the dataclass of its arguments.
        device: that it has computed on.
        packages: whose versions matter beside those that always do.
    """
    config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    versions = package_versions(*packages)
    return {"config": hide_paths(config), "device": device_description(device), "versions": versions}

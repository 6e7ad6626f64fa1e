"""Demo of CAPIVARA on OpenMoji, and examples of training, evaluation and search. Most modules are commands."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

# Imported only for its effect: Ctrl-C during the slow imports of a command prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401
from capivara_common.environment import describe_device, package_versions
from capivara_common.privacy import shorten_absolute_paths


def collect_run_conditions(args: Any, device: Any = "cpu", *packages: str) -> dict[str, Any]:
    """Collect the arguments, device and package versions of an example's run, to be stored in its results.json.

    Args:
        args: Dataclass instance with the command's arguments.
        device: Device that the model ran on.
        *packages: Names of packages whose versions are recorded, in addition to those that are always recorded.

    Returns:
        `{"config": {argument: value}, "device": description of the device, "versions": {package: version}}`. In
        "config", paths that would reveal folders of this machine are shortened.
    """
    config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    versions = package_versions(*packages)
    return {"config": shorten_absolute_paths(config), "device": describe_device(device), "versions": versions}

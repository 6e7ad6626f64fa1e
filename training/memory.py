"""How much memory there is, and how much a graph takes."""

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
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used + (_cgroup_page_cache() or 0))
    return max(free, 0)


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


def _cgroup_page_cache() -> int | None:
    """Bytes of file pages in the container's account: the kernel gives them back when they are needed."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), None)

"""How much memory there is, and how much a graph takes."""

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # in bytes, as a container sees it; other limits are not known


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, the limit of a container included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit, which is "max"
        limit = int(CONTAINER_LIMIT.read_text(encoding="ascii"))
        free = min(free, limit - psutil.Process().memory_info().rss)
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of one machine share it


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds on `device`; the most it has held, on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class GraphMeter(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves for the backward pass within it, the model's own tensors left out."""

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

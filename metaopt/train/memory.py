"""The memory that this process has taken."""

from __future__ import annotations

import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_memory() -> float:
    """Return the most memory so far in MiB: torch's on the GPU if it is used, else all on the CPU.

    0 where the system does not tell.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # of what the system counts in, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

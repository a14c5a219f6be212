"""Memory that large tensors use again.

The operating system zeroes every page that it hands out, and a C library gives those of large
tensors back as soon as they die. Where a loop makes tensors of the same sizes again and again, as
each step of a model does, to fetch the pages costs more than to fill them. GPUs have an allocator
of torch's own that keeps them; here is one for the CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Parameter

from metaopt.transforms import is_unrecorded

LEAST_BYTES = 2**17  # smaller ones the C library keeps

_CURRENT: ContextVar[Spare | None] = ContextVar("spare", default=None)


class Spare:
    """Memory in which nothing lies any more.

    It comes back when its last tensor dies, whoever holds that: nobody's values are written over.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}  # number of bytes -> memory

    def empty_like(self, like: Tensor) -> Tensor:
        """Return a contiguous tensor with the shape and dtype of another, of whatever values."""
        size = like.numel() * like.element_size()
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        # The tensor refers to this array object, and nothing else does: it dies with the tensor
        # and all views of it.
        lent = memory.numpy()
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(like.dtype).view(like.shape)

    @contextmanager
    def used(self) -> Iterator[None]:
        """While entered, `empty_like` takes memory from here and not from the system."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


def empty_like(like: Tensor) -> Tensor:
    """Return a contiguous tensor with the shape, dtype and device of another, of whatever values.

    Its memory is that of a `Spare`, if one is used here.
    """
    spare = _CURRENT.get()
    if (
        spare is None
        or like.device.type != "cpu"
        or type(like) not in (Tensor, Parameter)
        or like.numel() * like.element_size() < LEAST_BYTES
        or not is_unrecorded()
    ):
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return spare.empty_like(like)

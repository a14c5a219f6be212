"""Kernels that can be differentiated twice."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """While entered, attention runs on its plain kernel: the fused ones have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield

"""Bridges to other libraries: their optimizers as ours."""

from metaopt.interop.torch import from_torch
from metaopt.interop.torchopt import from_torchopt

__all__ = ["from_torch", "from_torchopt"]

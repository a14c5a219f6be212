"""Bridges to other libraries: their optimizers as ours."""

from metaopt.interop.torchopt import from_torchopt

__all__ = ["from_torchopt"]

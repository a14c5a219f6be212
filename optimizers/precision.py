"""The precision of numbers that are computed once per step."""

from __future__ import annotations

import torch
from torch import Tensor


def scalar_dtype(like: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32: half precision cannot count steps beyond 256 or
    2048.
    """
    return torch.float64 if like.dtype == torch.float64 else torch.float32

"""Numbers that are computed once per step, and the precision they are computed in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metaopt.optimizer import Value


def scalar_dtype(like: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32.

    Half precision cannot count steps beyond 256 or 2048.
    """
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def precise(step: Tensor, like: Tensor) -> Tensor:
    """Return a step count as a number to compute with, for tensors like this one."""
    return step.to(scalar_dtype(like))


def bias_correction(beta: Value, step: Tensor, like: Tensor) -> Tensor:
    """Return 1 - beta^step in float64 if `like` is, else in float32; differentiable in beta.

    For a number as -expm1(step log beta): in float32 the difference of 1 and .999 would be off by
    5e-5 of its size.
    """
    step = precise(step, like)
    if not isinstance(beta, Tensor) and beta > 0:
        return -torch.expm1(step * math.log(beta))
    base = beta.to(step.device, step.dtype) if isinstance(beta, Tensor) else beta
    return torch.rsub(torch.pow(base, step), 1)

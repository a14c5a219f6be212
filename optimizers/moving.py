"""Sums and moving averages: one operation in place of several where a coefficient is a number."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import Leaves, apply_update
from metaopt.optimizer.hyperparameter import Value, is_zero
from metaopt.tree import scaled_sum


def moved(params: Leaves, scale: Value, directions: Leaves) -> Leaves:
    """Return w + scale d for each parameter, in its shape and dtype.

    Raises:
        ValueError: a direction, or a scale that is not a number, has another shape.
    """
    with torch._C.DisableTorchFunction():  # under a mode every look at a shape is a call of its own
        pairs = list(zip(params, directions, strict=True))
        if isinstance(scale, Tensor) or any(w.shape != d.shape or w.dtype != d.dtype for w, d in pairs):
            return [apply_update(w, scale * d) for w, d in pairs]
        return [scaled_sum(w, scale, d) for w, d in pairs]


def average(mean: Tensor, x: Tensor, decay: Value) -> Tensor:
    """Return decay mean + (1 - decay) x."""
    return scaled_sum(decay * mean, 1 - decay, x)


def average_of_square(mean: Tensor, x: Tensor, decay: Value) -> Tensor:
    """Return decay mean + (1 - decay) x^2."""
    if isinstance(decay, Tensor):
        return decay * mean + (1 - decay) * x * x
    return torch.addcmul(decay * mean, x, x, value=1 - decay)


def raised(x: Tensor, by: Value) -> Tensor:
    """Return x + by, x itself for the number 0."""
    return x if is_zero(by) else x + by

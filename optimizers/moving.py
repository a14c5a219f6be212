"""Sums and moving averages: one operation in place of several where a coefficient is a number."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import Leaves
from metaopt.optimizer.hyperparameter import Value, is_zero
from metaopt.tree import safe_sqrt, scaled_sum


def averages(means: Leaves, xs: Leaves, decay: Value) -> Leaves:
    """Return decay mean + (1 - decay) x for each."""
    return [scaled_sum(decay * mean, 1 - decay, x) for mean, x in zip(means, xs, strict=True)]


def averages_of_squares(means: Leaves, xs: Leaves, decay: Value) -> Leaves:
    """Return decay mean + (1 - decay) x^2 for each."""
    pairs = zip(means, xs, strict=True)
    if isinstance(decay, Tensor):
        return [decay * mean + (1 - decay) * x * x for mean, x in pairs]
    return [torch.addcmul(decay * mean, x, x, value=1 - decay) for mean, x in pairs]


def roots(squares: Leaves, eps_root: Value, eps: Value) -> Leaves:
    """Return sqrt(v + eps_root) + eps for each, with derivative 0 of the root at 0."""
    raised = squares if is_zero(eps_root) else [v + eps_root for v in squares]
    return [safe_sqrt(v) + eps for v in raised]

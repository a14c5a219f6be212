"""Memory on lists of tensors: zeros to begin with, moving averages, their roots, and means.

Where nobody differentiates them, torch's kernels for lists compute them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import Leaves, Slots, Value, is_zero
from metaopt.torch_internals import foreach_add, foreach_addcmul, foreach_mul, foreach_sqrt
from metaopt.transforms import is_unrecorded
from metaopt.tree import safe_sqrt, scaled_sums


def zeros(params: Leaves, *names: str) -> Slots:
    """Return name -> zeros like the parameters."""
    return {name: [torch.zeros_like(p) for p in params] for name in names}


def averages(means: Leaves, xs: Leaves, decay: Value) -> Leaves:
    """Return decay mean + (1 - decay) x for each."""
    return scaled_sums(scaled(means, decay), 1 - decay, xs)


def averages_of_squares(means: Leaves, xs: Leaves, decay: Value) -> Leaves:
    """Return decay mean + (1 - decay) x^2 for each."""
    before = scaled(means, decay)
    if isinstance(decay, Tensor):
        return [mean + (1 - decay) * x * x for mean, x in zip(before, xs, strict=True)]
    if is_unrecorded():
        return list(foreach_addcmul(before, xs, xs, value=1 - decay))
    return [torch.addcmul(mean, x, x, value=1 - decay) for mean, x in zip(before, xs, strict=True)]


def roots(squares: Leaves, eps_root: Value, eps: Value) -> Leaves:
    """Return sqrt(v + eps_root) + eps for each, with derivative 0 of the root at 0."""
    raised = squares if is_zero(eps_root) else [v + eps_root for v in squares]
    if not is_unrecorded():
        return [safe_sqrt(v) + eps for v in raised]
    positive = foreach_sqrt(raised)
    if isinstance(eps, Tensor):
        return [root + eps for root in positive]
    return list(foreach_add(positive, eps))


def scaled(xs: Leaves, scale: Value) -> Leaves:
    """Return scale x for each."""
    if not isinstance(scale, Tensor) and is_unrecorded():
        return list(foreach_mul(xs, scale))
    return [scale * x for x in xs]


def mean_along(x: Tensor, axis: int = 0, *, keepdim: bool = False) -> Tensor:
    """Return the mean along an axis; 0 along one without entries."""
    average: Tensor = x.sum(axis, keepdim=keepdim) / max(x.shape[axis], 1)
    return average


def mean_of_squares(x: Tensor) -> Tensor:
    """Return the mean of the squares of each row; 0 of one without entries."""
    if is_unrecorded():  # in one pass; its second derivative would be wrong at 0
        norms: Tensor = torch.linalg.vector_norm(x, dim=1)
        return norms.square() / max(x.shape[1], 1)
    return mean_along(x.square(), 1)

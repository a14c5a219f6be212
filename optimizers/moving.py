"""Moving averages and their roots, of lists of tensors: by torch's kernels for lists where nobody
differentiates them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import Leaves
from metaopt.optimizer.hyperparameter import Value, is_zero
from metaopt.torch_internals import foreach_add, foreach_addcmul, foreach_mul, foreach_sqrt
from metaopt.transforms import is_last
from metaopt.tree import safe_sqrt, scaled_sums


def averages(means: Leaves, xs: Leaves, decay: Value) -> Leaves:
    """Return decay mean + (1 - decay) x for each."""
    return scaled_sums(scaled(means, decay), 1 - decay, xs)


def averages_of_squares(means: Leaves, xs: Leaves, decay: Value) -> Leaves:
    """Return decay mean + (1 - decay) x^2 for each."""
    before = scaled(means, decay)
    if isinstance(decay, Tensor):
        return [mean + (1 - decay) * x * x for mean, x in zip(before, xs, strict=True)]
    if is_last():
        return list(foreach_addcmul(before, xs, xs, value=1 - decay))
    return [torch.addcmul(mean, x, x, value=1 - decay) for mean, x in zip(before, xs, strict=True)]


def roots(squares: Leaves, eps_root: Value, eps: Value) -> Leaves:
    """Return sqrt(v + eps_root) + eps for each, with derivative 0 of the root at 0."""
    raised = squares if is_zero(eps_root) else [v + eps_root for v in squares]
    if is_last():
        positive = foreach_sqrt(raised)
        return (
            [root + eps for root in positive]
            if isinstance(eps, Tensor)
            else list(foreach_add(positive, eps))
        )
    return [safe_sqrt(v) + eps for v in raised]


def scaled(xs: Leaves, scale: Value) -> Leaves:
    """Return scale x for each."""
    if not isinstance(scale, Tensor) and is_last():
        return list(foreach_mul(xs, scale))
    return [scale * x for x in xs]

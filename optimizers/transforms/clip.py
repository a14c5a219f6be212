"""Clipping gradients."""

from __future__ import annotations

from metaopt import tree
from metaopt.optimizer import Hyper, Hyperparameter, Leaves, Optimizer, is_zero_anywhere

from ..scalars import scalar_dtype
from .transform import Transform


class ClipValue(Transform):
    """g = min(max(g, -limit), limit), entry by entry. Equal to `torch.nn.utils.clip_grad_value_`.

    The derivative is 1 inside of the limits and 0 outside, where it passes to `limit`.

    Args:
        limit: the largest absolute value.
        optimizer: what sees the clipped gradients.

    Raises:
        ValueError: a number below 0.
    """

    hyperparameters = ("limit",)

    def __init__(self, limit: Hyperparameter, optimizer: Optimizer):
        super().__init__(optimizer, limit=limit)

    def before(self, grads: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        limit = hyper["limit"]
        return [g.clamp(max=limit).clamp(min=-limit).to(g.dtype) for g in grads]


class ClipNorm(Transform):
    """g = g max_norm / max(|g|, max_norm), where |g| is the norm of all gradients together.

    The derivative is exact, that of the norm included; it is the identity at g = 0 and wherever
    nothing is clipped. Unlike `torch.nn.utils.clip_grad_norm_`, nothing is added to the norm (there
    1e-6).

    Args:
        max_norm: the largest norm.
        optimizer: what sees the clipped gradients.

    Raises:
        ValueError: a number that is not positive.

    Reference:
        Pascanu, Mikolov, Bengio 2012, arXiv:1211.5063, algorithm 1.
    """

    hyperparameters = ("max_norm",)
    max_norm: Hyperparameter

    def __init__(self, max_norm: Hyperparameter, optimizer: Optimizer):
        super().__init__(optimizer, max_norm=max_norm)
        if is_zero_anywhere(self.max_norm):
            raise ValueError(
                "ClipNorm: `max_norm` must be positive, got 0.0. To freeze parameters, use "
                "`Masked`."
            )

    def before(self, grads: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        norm = tree.norm([g.to(scalar_dtype(grads[0])) for g in grads])
        scale = hyper["max_norm"] / norm.clamp(min=hyper["max_norm"])
        return [(g * scale).to(g.dtype) for g in grads]

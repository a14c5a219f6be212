"""Weight decay for optimizers that have none."""

from __future__ import annotations

from metaopt.optimizer import Hyper, Hyperparameter, Leaves, Optimizer

from ..weight_decay import decayed, penalized
from .transform import Transform


class WeightDecay(Transform):
    """g = g + weight_decay w: the gradient of the loss plus weight_decay/2 |w|^2.

    Args:
        weight_decay: the coefficient.
        optimizer: what sees the penalized gradients.

    Raises:
        ValueError: a number below 0, or `params` is missing.
    """

    hyperparameters = ("weight_decay",)

    def __init__(self, weight_decay: Hyperparameter, optimizer: Optimizer):
        super().__init__(optimizer, weight_decay=weight_decay)

    def before(self, grads: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        return penalized(self, grads, params, hyper["weight_decay"])


class DecoupledWeightDecay(Transform):
    """u = u - weight_decay w, after the optimizer.

    The weights shrink at this rate for any gradients. `AdamW(lr, weight_decay=d)` is
    `DecoupledWeightDecay(lr * d, Adam(lr))`.

    Args:
        weight_decay: the rate per step.
        optimizer: what makes the update.

    Raises:
        ValueError: a number below 0, or `params` is missing.

    Reference:
        Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101, algorithm 1, whose eta_t lambda is the
        rate here.
    """

    hyperparameters = ("weight_decay",)

    def __init__(self, weight_decay: Hyperparameter, optimizer: Optimizer):
        super().__init__(optimizer, weight_decay=weight_decay)

    def after(self, updates: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        return decayed(self, updates, params, 1.0, hyper["weight_decay"])

"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.checks import check_flag
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    is_zero,
    set_hyperparameter,
)
from metaopt.tree import scaled_sums

from .moving import averages, averages_of_squares, roots, zeros
from .weight_decay import penalized


class RMSprop(Optimizer):
    """v = alpha v + (1 - alpha) g^2;  u = -lr g / (sqrt(v) + eps).

    With `centered`, v is replaced by v - a^2, where a = alpha a + (1 - alpha) g. With momentum, b =
    momentum b + g / (sqrt(v) + eps) and u = -lr b. Equal to `torch.optim.RMSprop`; finite
    derivatives where v = 0.

    Args:
        lr: step size.
        alpha: decay of the second moment, in [0, 1).
        eps: added to the denominator.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient.
        momentum: decay of the velocity; 0 keeps none.
        centered: divide by the standard deviation instead of the root mean square.

    Raises:
        ValueError: a number out of range.

    Cost:
        One to three copies of the parameters.

    Reference:
        Tieleman and Hinton, Neural Networks for Machine Learning, lecture 6.5, 2012; centred:
        Graves, arXiv:1308.0850, eq. 38-45.
    """

    hyperparameters = ("lr", "alpha", "eps", "weight_decay", "momentum")
    joinable = True
    momentum: Hyperparameter

    def __init__(
        self,
        lr: Hyperparameter = 1e-2,
        alpha: Hyperparameter = 0.99,
        *,
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0.0,
        momentum: Hyperparameter = 0.0,
        centered: bool = False,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        set_hyperparameter(self, "alpha", alpha, below=1.0)
        set_hyperparameter(self, "eps", eps)
        set_hyperparameter(self, "weight_decay", weight_decay)
        set_hyperparameter(self, "momentum", momentum)
        self.centered = check_flag(self, "centered", centered)

    def slots(self, params: Leaves) -> Slots:
        names = ["square", *["mean"] * self.centered, *["velocity"] * (not is_zero(self.momentum))]
        return zeros(params, *names)

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, alpha, eps, decay, momentum = (hyper[name] for name in self.hyperparameters)
        grads = penalized(self, grads, params, decay)
        after = {"square": averages_of_squares(slots["square"], grads, alpha)}
        spread = after["square"]
        if self.centered:
            after["mean"] = averages(slots["mean"], grads, alpha)
            # below 0 by rounding
            spread = [(v - a * a).clamp_min(0) for v, a in zip(spread, after["mean"], strict=True)]
        direction = [g / root for g, root in zip(grads, roots(spread, 0.0, eps), strict=True)]
        if "velocity" in slots:
            after["velocity"] = slots["velocity"]
        # one that was turned off leaves its memory alone, as torch's does
        if not is_zero(momentum):
            if "velocity" not in slots:
                raise ValueError(
                    f"RMSprop: momentum={momentum}, but `state` was made without. Call `init` "
                    "again."
                )
            direction = after["velocity"] = scaled_sums(direction, momentum, slots["velocity"])
        return [-lr * d for d in direction], after

    def diagonal(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> Leaves:
        """Return du/dg = -lr (1 - g r' / d) / d with d = r + eps, r = sqrt(v).

        r' = (1 - alpha) g / r, of `centered` (1 - alpha) (g - a) / r; 0 where r = 0.
        """
        lr, alpha, eps, decay, _ = (hyper[name] for name in self.hyperparameters)
        grads = penalized(self, grads, params, decay)
        spread, off = averages_of_squares(slots["square"], grads, alpha), grads
        if self.centered:
            means = averages(slots["mean"], grads, alpha)
            spread = [(v - a * a).clamp_min(0) for v, a in zip(spread, means, strict=True)]
            off = [g - a for g, a in zip(grads, means, strict=True)]
        found = []
        for g, v, x in zip(grads, spread, off, strict=True):
            root = v.sqrt()
            slope = torch.where(root > 0, (1 - alpha) * x / root, 0)
            denominator = root + eps
            found.append(-lr * (1 - g * slope / denominator) / denominator)
        return found

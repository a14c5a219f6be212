"""Adamax."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import Hyper, Hyperparameter, Leaves, Slots, set_hyperparameter

from .betas import Pair, WithBetas
from .moving import averages, zeros
from .scalars import bias_correction
from .weight_decay import penalized


class Adamax(WithBetas):
    """m = beta1 m + (1 - beta1) g;  n = max(beta2 n, |g| + eps);  u = -lr m / ((1 - beta1^t) n).

    Equal to `torch.optim.Adamax`. Where g = 0 decides the maximum, |g| has the derivative 0.

    Args:
        lr: step size.
        betas: decay of the mean and of the largest gradient, each in [0, 1).
        eps: added to |g|; keeps the denominator positive.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient.

    Raises:
        ValueError: a number out of range.

    Cost:
        Two copies of the parameters.

    Reference:
        Kingma and Ba, ICLR 2015, arXiv:1412.6980, algorithm 2.
    """

    hyperparameters = ("lr", "beta1", "beta2", "eps", "weight_decay")
    joinable = True

    def __init__(
        self,
        lr: Hyperparameter = 2e-3,
        betas: Pair = (0.9, 0.999),
        *,
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0.0,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        self._set_betas(betas)
        set_hyperparameter(self, "eps", eps)
        set_hyperparameter(self, "weight_decay", weight_decay)

    def slots(self, params: Leaves) -> Slots:
        return zeros(params, "mean", "largest")

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, beta1, beta2, eps, decay = (hyper[name] for name in self.hyperparameters)
        grads = penalized(self, grads, params, decay)
        mean = averages(slots["mean"], grads, beta1)
        largest = [
            torch.maximum(beta2 * n, g.abs() + eps)
            for n, g in zip(slots["largest"], grads, strict=True)
        ]
        rate = lr / bias_correction(beta1, step, grads[0])
        updates = [-rate * m / n for m, n in zip(mean, largest, strict=True)]
        return updates, {"mean": mean, "largest": largest}

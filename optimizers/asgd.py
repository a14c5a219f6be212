"""Averaged stochastic gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    require_params,
    set_hyperparameter,
)

from .moving import zeros
from .scalars import precise, scalar_dtype
from .weight_decay import penalized


class ASGD(Optimizer):
    """u = -eta_t (g + lambd w),  eta_{t+1} = lr / (1 + lambd lr t)^alpha;  a = a + mu (w + u - a).

    mu = 1 / max(1, t - 1 - t0).

    Equal to `torch.optim.ASGD`, also in this: eta is memory, made at the end of a step, so a change
    of lr acts one step later; eta_1 = lr. The average `a` of the iterates from step t0 on is
    `state["slots"]["average"]`.

    Args:
        lr: step size at the start.
        lambd: decay of the weights and of the step size.
        alpha: power of the step size's decay.
        t0: the step from which on iterates are averaged.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient.

    Raises:
        ValueError: a number out of range.

    Cost:
        One copy of the parameters.

    Reference:
        Polyak and Juditsky, SIAM J. Control and Optimization 30, 1992; step size: Bottou, COMPSTAT
        2010.
    """

    lr: Hyperparameter
    hyperparameters = ("lr", "lambd", "alpha", "t0", "weight_decay")

    def __init__(
        self,
        lr: Hyperparameter = 1e-2,
        *,
        lambd: Hyperparameter = 1e-4,
        alpha: Hyperparameter = 0.75,
        t0: Hyperparameter = 1e6,
        weight_decay: Hyperparameter = 0.0,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        set_hyperparameter(self, "lambd", lambd)
        set_hyperparameter(self, "alpha", alpha)
        set_hyperparameter(self, "t0", t0)
        set_hyperparameter(self, "weight_decay", weight_decay)

    def slots(self, params: Leaves) -> Slots:
        shape = self.lr.shape if isinstance(self.lr, Tensor) else ()
        eta = torch.zeros(shape, dtype=scalar_dtype(params[0]), device=params[0].device)
        return zeros(params, "average") | {"eta": eta}

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, lambd, alpha, t0, decay = (hyper[name] for name in self.hyperparameters)
        weights = require_params(self, params, "it averages them")
        grads = penalized(self, grads, weights, decay)
        done = precise(step - 1, grads[0])
        eta = torch.where(step == 1, lr, slots["eta"])
        mu = 1 / (done - t0).clamp(min=1)
        shrink = eta * lambd
        updates = [-eta * g - shrink * w for g, w in zip(grads, weights, strict=True)]
        average = [
            a + mu * (w + u - a) for a, w, u in zip(slots["average"], weights, updates, strict=True)
        ]
        return updates, {"average": average, "eta": lr / (1 + lambd * lr * (done + 1)) ** alpha}

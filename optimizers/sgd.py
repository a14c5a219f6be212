"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt.checks import check_flag
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    Value,
    is_zero,
    is_zero_anywhere,
    set_hyperparameter,
)
from metaopt.tree import scaled_sums

from .moving import zeros
from .weight_decay import penalized


class SGD(Optimizer):
    """g = grad + weight_decay w;  b = momentum b + (1 - dampening) g;  u = -lr b.

    At the first step b = g. With `nesterov`, u = -lr (g + momentum b). A momentum that is turned
    off, to 0, leaves b in the state as it is. Equal to `torch.optim.SGD` and differentiable in
    every hyperparameter.

    Args:
        lr: step size.
        momentum: decay of the velocity; 0 keeps no memory.
        dampening: share of the gradient left out of the velocity.
        weight_decay: coefficient of 1/2 |w|^2.
        nesterov: look ahead along the velocity.

    Raises:
        ValueError: a number out of range, or `nesterov` without momentum or with dampening.

    Cost:
        One copy of the parameters if there is momentum.

    Reference:
        Sutskever, Martens, Dahl, Hinton, ICML 2013.
    """

    hyperparameters = ("lr", "momentum", "dampening", "weight_decay")
    lr: Hyperparameter
    momentum: Hyperparameter
    dampening: Hyperparameter
    weight_decay: Hyperparameter

    def __init__(
        self,
        lr: Hyperparameter,
        momentum: Hyperparameter = 0.0,
        *,
        dampening: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        nesterov: bool = False,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        set_hyperparameter(self, "momentum", momentum)
        set_hyperparameter(self, "dampening", dampening, high=1.0)
        set_hyperparameter(self, "weight_decay", weight_decay)
        self.nesterov = check_flag(self, "nesterov", nesterov)
        if nesterov and (is_zero_anywhere(self.momentum) or not is_zero(self.dampening)):
            raise ValueError(
                f"SGD: `nesterov` needs momentum > 0 and dampening = 0, got {momentum} and "
                f"{dampening}."
            )

    def slots(self, params: Leaves) -> Slots:
        return {} if is_zero(self.momentum) else zeros(params, "velocity")

    def direction(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Value, Leaves, Slots]:
        momentum, dampening = hyper["momentum"], hyper["dampening"]
        grads = penalized(self, grads, params, hyper["weight_decay"])
        if is_zero(momentum):  # one that was turned off leaves its memory alone, as torch's does
            return (
                -hyper["lr"],
                grads,
                {name: slot for name, slot in slots.items() if name == "velocity"},
            )
        if "velocity" not in slots:
            raise ValueError(
                f"SGD: momentum={momentum}, but `state` was made without. Call `init` again."
            )
        damped = grads
        if not is_zero(dampening):  # the velocity starts as the whole first gradient
            damped = [torch.where(step == 1, g, (1 - dampening) * g) for g in grads]
        velocity = scaled_sums(damped, momentum, slots["velocity"])
        ahead = scaled_sums(grads, momentum, velocity) if self.nesterov else velocity
        return -hyper["lr"], ahead, {"velocity": velocity}

    def diagonal(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> Sequence[Value]:
        momentum, dampening = hyper["momentum"], hyper["dampening"]
        share: Value = 1.0
        if not is_zero(momentum):
            if not is_zero(dampening):
                share = torch.where(step == 1, 1.0, 1 - dampening)
            if self.nesterov:
                share = share + momentum
        return [-hyper["lr"] * share] * len(grads)

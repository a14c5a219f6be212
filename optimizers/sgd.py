"""Stochastic gradient descent with momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import Hyper, Leaves, Optimizer, Slots, State
from metaopt.optimizer.hyperparameter import Hyperparameter, is_zero, set_hyperparameter
from metaopt.tree import Tree, scaled_sum
from optimizers.moving import moved
from optimizers.weight_decay import penalized


class SGD(Optimizer):
    """g = grad + weight_decay w;  b = momentum b + (1 - dampening) g  (b = g at the first step);  u = -lr b.

    With `nesterov`, u = -lr (g + momentum b). Equal to `torch.optim.SGD` and differentiable in every hyperparameter.

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
        self.nesterov = nesterov
        if nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise ValueError(f"SGD: `nesterov` needs momentum > 0 and dampening = 0, got {momentum} and {dampening}.")

    def slots(self, params: Leaves) -> Slots:
        return {} if is_zero(self.momentum) else {"velocity": [torch.zeros_like(p) for p in params]}

    def update(self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor) -> tuple[Leaves, Slots]:
        directions, slots = self._directions(grads, params, slots, hyper, step)
        return [-hyper["lr"] * d for d in directions], slots

    def moved(self, grads: Tree, state: State, params: Tree, *, loss: Tensor | None = None) -> tuple[Tree, State]:
        """Return (w - lr d, next state), without making the update first."""
        is_changed = type(self).update is not SGD.update or "update" in vars(self)
        if is_changed or self._forward_hooks or self._forward_pre_hooks:
            return super().moved(grads, state, params, loss=loss)
        return self._on_leaves(self._moved, grads, state, params, loss)

    def _moved(self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor) -> tuple[Leaves, Slots]:
        weights = self._require_params(params, "it moves them")
        directions, slots = self._directions(grads, weights, slots, hyper, step)
        return moved(weights, -hyper["lr"], directions), slots

    def _directions(self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor) -> tuple[Leaves, Slots]:
        """Return d of u = -lr d, and the next slots."""
        momentum, dampening = hyper["momentum"], hyper["dampening"]
        grads = penalized(self, grads, params, hyper["weight_decay"])
        if "velocity" not in slots:
            if not is_zero(momentum):
                raise ValueError(f"SGD: momentum={momentum}, but `state` was made without. Call `init` again.")
            return grads, {}
        damped = [self._damp(g, dampening, step) for g in grads]
        velocity = [scaled_sum(g, momentum, b) for g, b in zip(damped, slots["velocity"], strict=True)]
        ahead = [scaled_sum(g, momentum, b) for g, b in zip(grads, velocity, strict=True)] if self.nesterov else velocity
        return ahead, {"velocity": velocity}

    @staticmethod
    def _damp(grad: Tensor, dampening: float | Tensor, step: Tensor) -> Tensor:
        """Scale the gradient; the velocity starts as the whole first one."""
        return grad if is_zero(dampening) else torch.where(step == 1, grad, (1 - dampening) * grad)

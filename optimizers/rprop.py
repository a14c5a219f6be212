"""Resilient backpropagation."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import Hyper, Hyperparameter, Leaves, Optimizer, Slots, set_hyperparameter

from .betas import Pair, as_pair
from .moving import zeros


class Rprop(Optimizer):
    """d = clip(d eta, step_min, step_max),  u = -d sign(g): only the sign of the gradient counts.

    eta is eta_plus where the gradient kept its sign, eta_minus where it changed it (there u = 0,
    and the next step counts as neither), else 1; d starts at lr. Equal to `torch.optim.Rprop`.
    Signs are piecewise constant: the derivative with respect to the gradient is 0, also at its
    jumps; with respect to lr, etas and step sizes it is exact.

    Args:
        lr: the first step size.
        etas: (eta_minus in [0, 1), eta_plus of at least 1), factors on the step size.
        step_sizes: (smallest, largest) step size.

    Raises:
        ValueError: a number out of range.

    Cost:
        Two copies of the parameters.

    Reference:
        Riedmiller and Braun, IEEE ICNN 1993; without going back, as in Igel and Husken, NC 2000
        (iRprop-).
    """

    hyperparameters = ("lr", "eta_minus", "eta_plus", "step_min", "step_max")
    joinable = True
    eta_minus: Hyperparameter
    eta_plus: Hyperparameter
    step_min: Hyperparameter
    step_max: Hyperparameter

    def __init__(
        self, lr: Hyperparameter = 1e-2, *, etas: Pair = (0.5, 1.2), step_sizes: Pair = (1e-6, 50.0)
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        minus, plus = as_pair(self, "etas", etas, "(0.5, 1.2)")
        smallest, largest = as_pair(self, "step_sizes", step_sizes, "(1e-6, 50.0)")
        set_hyperparameter(self, "eta_minus", minus, below=1.0)
        set_hyperparameter(self, "eta_plus", plus, low=1.0)
        set_hyperparameter(self, "step_min", smallest)
        set_hyperparameter(self, "step_max", largest)

    @property
    def etas(self) -> Pair:
        """The factors on the step size."""
        return self.eta_minus, self.eta_plus

    @property
    def step_sizes(self) -> Pair:
        """The bounds of the step size."""
        return self.step_min, self.step_max

    def slots(self, params: Leaves) -> Slots:
        return zeros(params, "previous", "size")

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, minus, plus, smallest, largest = (hyper[name] for name in self.hyperparameters)
        first = step == 1
        previous, sizes, updates = [], [], []
        for g, before, size in zip(grads, slots["previous"], slots["size"], strict=True):
            agreement = g * before
            turned = agreement < 0
            size = torch.where(first, lr, size)
            size = torch.where(agreement > 0, size * plus, torch.where(turned, size * minus, size))
            size = size.clamp(min=smallest).clamp(max=largest)
            g = torch.where(turned, 0, g)
            previous.append(g)
            sizes.append(size)
            updates.append(-size * g.sign())
        return updates, {"previous": previous, "size": sizes}

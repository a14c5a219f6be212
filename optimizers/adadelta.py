"""Adadelta."""

from __future__ import annotations

from torch import Tensor

from metaopt.optimizer import Hyper, Hyperparameter, Leaves, Optimizer, Slots, set_hyperparameter

from .moving import averages_of_squares, zeros
from .weight_decay import penalized


class Adadelta(Optimizer):
    """v = rho v + (1 - rho) g^2;  u = -lr d  with  d = sqrt(a + eps) / sqrt(v + eps) g.

    Then a = rho a + (1 - rho) d^2. Equal to `torch.optim.Adadelta`.

    Args:
        lr: factor on the update.
        rho: decay of both averages, in [0, 1].
        eps: added under the roots; the first updates are of the size sqrt(eps).
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient.

    Raises:
        ValueError: a number out of range.

    Cost:
        Two copies of the parameters.

    Reference:
        Zeiler 2012, arXiv:1212.5701, algorithm 1.
    """

    hyperparameters = ("lr", "rho", "eps", "weight_decay")
    joinable = True

    def __init__(
        self,
        lr: Hyperparameter = 1.0,
        rho: Hyperparameter = 0.9,
        *,
        eps: Hyperparameter = 1e-6,
        weight_decay: Hyperparameter = 0.0,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        set_hyperparameter(self, "rho", rho, high=1.0)
        set_hyperparameter(self, "eps", eps)
        set_hyperparameter(self, "weight_decay", weight_decay)

    def slots(self, params: Leaves) -> Slots:
        return zeros(params, "square", "moved")

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, rho, eps, decay = (hyper[name] for name in self.hyperparameters)
        grads = penalized(self, grads, params, decay)
        square = averages_of_squares(slots["square"], grads, rho)
        delta = [
            (a + eps).sqrt() / (v + eps).sqrt() * g
            for a, v, g in zip(slots["moved"], square, grads, strict=True)
        ]
        moved = averages_of_squares(slots["moved"], delta, rho)
        return [-lr * d for d in delta], {"square": square, "moved": moved}

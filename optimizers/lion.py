"""Lion."""

from __future__ import annotations

from torch import Tensor

from metaopt.optimizer import Hyper, Hyperparameter, Leaves, Slots, set_hyperparameter

from .betas import Pair, WithBetas
from .moving import averages, zeros
from .weight_decay import decayed


class Lion(WithBetas):
    """u = -lr (sign(beta1 m + (1 - beta1) g) + weight_decay w);  m = beta2 m + (1 - beta2) g.

    The sign is piecewise constant: its derivative is 0, also at its jump. So the derivatives with
    respect to the gradient, the memory and the betas are 0; those with respect to lr, weight_decay
    and the parameters are exact.

    Args:
        lr: step size; a third to a tenth of Adam's.
        betas: weight of the memory in the update, and its decay, each in [0, 1).
        weight_decay: decoupled, as in `AdamW`.

    Raises:
        ValueError: a number out of range.

    Cost:
        One copy of the parameters.

    Reference:
        Chen et al., NeurIPS 2023, arXiv:2302.06675, program 1 and algorithm 2.
    """

    hyperparameters = ("lr", "beta1", "beta2", "weight_decay")
    joinable = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-4,
        betas: Pair = (0.9, 0.99),
        *,
        weight_decay: Hyperparameter = 0.0,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        self._set_betas(betas)
        set_hyperparameter(self, "weight_decay", weight_decay)

    def slots(self, params: Leaves) -> Slots:
        return zeros(params, "mean")

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, beta1, beta2, decay = (hyper[name] for name in self.hyperparameters)
        updates = [-lr * m.sign() for m in averages(slots["mean"], grads, beta1)]
        mean = averages(slots["mean"], grads, beta2)
        return decayed(self, updates, params, lr, decay), {"mean": mean}

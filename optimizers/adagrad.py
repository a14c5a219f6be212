"""Adagrad."""

from __future__ import annotations

from torch import Tensor

from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    is_zero,
    set_hyperparameter,
)

from .moving import roots, zeros
from .scalars import precise
from .weight_decay import penalized


class Adagrad(Optimizer):
    """v = v + g^2;  u = -lr / (1 + (t - 1) lr_decay) g / (sqrt(v + initial) + eps).

    Equal to `torch.optim.Adagrad`; `initial` is its `initial_accumulator_value`, kept out of the
    memory so that it can be learned. The derivative is finite where v + initial = 0 (there sqrt has
    derivative 0).

    Args:
        lr: step size.
        lr_decay: decay of the step size.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient.
        initial_accumulator_value: the sum of squares before the first step.
        eps: added to the denominator.

    Raises:
        ValueError: a number out of range.

    Cost:
        One copy of the parameters.

    Reference:
        Duchi, Hazan, Singer, JMLR 12, 2011, figure 1 with diagonal matrices.
    """

    hyperparameters = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
    joinable = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-2,
        lr_decay: Hyperparameter = 0.0,
        *,
        weight_decay: Hyperparameter = 0.0,
        initial_accumulator_value: Hyperparameter = 0.0,
        eps: Hyperparameter = 1e-10,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        set_hyperparameter(self, "lr_decay", lr_decay)
        set_hyperparameter(self, "weight_decay", weight_decay)
        set_hyperparameter(self, "initial_accumulator_value", initial_accumulator_value)
        set_hyperparameter(self, "eps", eps)

    def slots(self, params: Leaves) -> Slots:
        return zeros(params, "square")

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, lr_decay, decay, initial, eps = (hyper[name] for name in self.hyperparameters)
        grads = penalized(self, grads, params, decay)
        if not is_zero(lr_decay):
            lr = lr / (1 + precise(step - 1, grads[0]) * lr_decay)
        square = [v + g * g for v, g in zip(slots["square"], grads, strict=True)]
        spread = square if is_zero(initial) else [v + initial for v in square]
        pairs = zip(grads, roots(spread, 0.0, eps), strict=True)
        return [-lr * g / root for g, root in pairs], {"square": square}

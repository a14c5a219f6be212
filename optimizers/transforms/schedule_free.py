"""Schedule-Free: an average of the iterates in place of a schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    Value,
    is_zero,
    set_hyperparameter,
    set_value,
)

from ..scalars import scalar_dtype
from .beside import Beside, moves
from .transform import refuse_to_change


class ScheduleFree(Beside):
    """z = z + u(y);  x = (1 - c) x + c z;  y = (1 - beta) z + beta x, with c = r_t^2 / sum_i r_i^2.

    u is the inner optimizer's update and z = x = y at first. The parameters are y, where the
    gradient is taken; `optimizer.evaluated(state, params)` is x. Memory is z - y, so that
    x = y - (1 - beta) / beta (z - y), and y moves by (1 - beta + beta c) u + c (z - y).

    `ScheduleFree(SGD(1.0))` is Schedule-Free SGD; `ScheduleFree(AdamW(2.5e-3, betas=(0.0, 0.999)))`
    is Schedule-Free AdamW, where beta is the momentum, with the bias of v corrected inside of the
    root, so that r_t is the step size itself. With a warm-up give it in both places:
    `ScheduleFree(SGD(rate), weight=rate)` with `rate = Warmup(1.0, 100)`.

    Args:
        optimizer: what makes u; better without momentum.
        beta: where y lies between z, 0, and x, 1; in (0, 1], a number, a tensor or a parameter.
        weight: r_t, of which an iterate has the square in the average; 1 is the plain average.

    Raises:
        ValueError: a number out of range, `params` is missing, or another that keeps parameters
            beside its own stands behind.
        TypeError: `beta` is a schedule.

    Cost:
        One copy of the parameters, in float32 at least.

    Reference:
        Defazio et al. 2024, arXiv:2405.15682, algorithm 1; as there, the first average is the z
        after the first step.
    """

    hyperparameters = ("weight",)
    beta: Value

    def __init__(self, optimizer: Optimizer, *, beta: Value = 0.9, weight: Hyperparameter = 1.0):
        super().__init__(optimizer)
        refuse_to_change(self, optimizer)
        set_value(self, "beta", beta, high=1.0)
        if is_zero(self.beta):
            raise ValueError(
                "ScheduleFree: `beta` must lie in (0, 1], got 0.0, from which x cannot be found. "
                "To average the iterates of the inner optimizer alone, use `EMA`."
            )
        set_hyperparameter(self, "weight", weight)

    def slots(self, params: Leaves) -> Slots:
        like = params[0]
        total = torch.zeros((), dtype=scalar_dtype(like), device=like.device)
        return super().slots(params) | {"total": total}

    def share(self) -> Value:
        return 1 - 1 / self.beta

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        square = hyper["weight"] * hyper["weight"]
        total = slots["total"] + square
        # a warm-up may begin at 0, where z stands still
        c = torch.where(total > 0, square / torch.where(total > 0, total, 1), 0)
        factor = 1 - self.beta + self.beta * c
        pairs = list(zip(grads, slots["offset"], strict=True))
        updates = [factor * u + c * offset for u, offset in pairs]
        rows = zip(pairs, moves(self, updates, params), strict=True)
        offset = [offset + u - moved for (u, offset), moved in rows]
        return updates, {"offset": offset, "total": total}

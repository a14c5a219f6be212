"""Lookahead: slow weights that follow fast ones."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    set_hyperparameter,
)

from .beside import Beside, moves
from .transform import refuse_to_change


class Lookahead(Beside):
    """Every k-th step s = s + alpha (w - s), and w = s; between, w moves and s waits.

    The parameters are the fast weights w; `optimizer.evaluated(state, params)` is s, the slow ones.
    The memory of the inner optimizer goes on when w goes back to s.

    Args:
        optimizer: what moves the fast weights.
        every: k, in steps.
        alpha: how far the slow weights go, in [0, 1].

    Raises:
        ValueError: a number out of range, `params` is missing, or another that keeps parameters
            beside its own stands behind.

    Cost:
        One copy of the parameters, in float32 at least.

    Reference:
        Zhang, Lucas, Hinton, Ba 2019, arXiv:1907.08610, algorithm 1.
    """

    hyperparameters = ("alpha",)

    def __init__(self, optimizer: Optimizer, *, every: int = 5, alpha: Hyperparameter = 0.5):
        super().__init__(optimizer)
        refuse_to_change(self, optimizer)
        self.every = check_count(self, "every", every)
        set_hyperparameter(self, "alpha", alpha, high=1.0)

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        now = step % self.every == 0
        offset = [o - m for o, m in zip(slots["offset"], moves(self, grads, params), strict=True)]
        # from w to s + alpha (w - s) = w + (1 - alpha) (s - w)
        back = [torch.where(now, (1 - hyper["alpha"]) * o, 0) for o in offset]
        updates = [u + b for u, b in zip(grads, back, strict=True)]
        return updates, {"offset": [torch.where(now, 0, o) for o in offset]}

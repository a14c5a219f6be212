"""Decay whenever the loss no longer falls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metaopt.checks import Limits, check_count, check_flag, check_number
from metaopt.optimizer import Schedule, Value, set_value

from ..scalars import precise, scalar_dtype
from .observing import require_loss


class Plateau(Schedule):
    """value_t = max(initial factor^n, final), where n counts how often the loss had not improved.

    That is, for `patience` steps. A loss L improves on the best one B so far if L < B (1 -
    threshold), or L < B - threshold if not `relative`. The value at a step does not depend on the
    loss at that step, only on those before, as with `torch.optim.lr_scheduler.ReduceLROnPlateau`,
    to which it is equal when that is told the loss of every step. n is piecewise constant: no
    derivative goes through the losses. It observes, so the optimizer must be given `loss=`; smooth
    a noisy loss first.

    Args:
        initial: the value at the start.
        factor: of a decay, in [0, 1).
        patience: number of steps without improvement that are borne.
        threshold: what counts as an improvement.
        relative: whether the threshold is a fraction of the best loss; needs positive losses.
        cooldown: number of steps after a decay that are not counted.
        final: the least value.
        eps: a decay by less than this is not made.

    Raises:
        ValueError: a number out of range.
        TypeError: something else than a number, or than True and False.
    """

    initial: Value
    factor: Value
    final: Value

    def __init__(
        self,
        initial: Value,
        factor: Value = 0.1,
        *,
        patience: int = 10,
        threshold: float = 1e-4,
        relative: bool = True,
        cooldown: int = 0,
        final: Value = 0.0,
        eps: float = 1e-8,
    ):
        super().__init__()
        set_value(self, "initial", initial)
        set_value(self, "factor", factor, below=1.0)
        set_value(self, "final", final)
        self.patience = check_count(self, "patience", patience, least=0)
        self.cooldown = check_count(self, "cooldown", cooldown, least=0)
        self.threshold = check_number(self, "threshold", threshold, Limits())
        self.relative = check_flag(self, "relative", relative)
        self.eps = check_number(self, "eps", eps, Limits())

    def init(self, like: Tensor) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.int64, device=like.device)
        best = torch.full((), math.inf, dtype=scalar_dtype(like), device=like.device)
        return {"best": best, "bad": zero, "cooldown": zero, "decays": zero}

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        names = ("best", "bad", "cooldown", "decays")
        best, bad, cooldown, decays = (state[name] for name in names)
        loss = require_loss(self, loss).detach().to(best.dtype)
        value = self._after(decays, best)
        improves = loss < (best * (1 - self.threshold) if self.relative else best - self.threshold)
        is_cooling = cooldown > 0
        bad = torch.where(improves | is_cooling, 0, bad + 1)
        cooldown = torch.where(is_cooling, cooldown - 1, cooldown)
        is_due = bad > self.patience
        is_worth_it = value - self._after(decays + 1, best) > self.eps
        return value, {
            "best": torch.where(improves, loss, best),
            "bad": torch.where(is_due, 0, bad),
            "cooldown": torch.where(is_due, self.cooldown, cooldown),
            "decays": torch.where(is_due & is_worth_it, decays + 1, decays),
        }

    def value_at(self, state: Any, *, like: Tensor, **_: Any) -> Value:
        return self._after(state["decays"], like)

    def _after(self, decays: Tensor, like: Tensor) -> Tensor:
        """Return the value after some decays."""
        final = torch.as_tensor(self.final, dtype=scalar_dtype(like), device=decays.device)
        decayed = self.initial * self.factor ** precise(decays, like)
        return torch.maximum(decayed.to(final.dtype), final)

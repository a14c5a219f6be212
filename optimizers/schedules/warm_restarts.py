"""Cosine decay that starts again and again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import Schedule, Value, set_value

from ..scalars import precise
from .of_time import half_wave


class WarmRestarts(Schedule):
    """value_t = final + (initial - final) (1 + cos(pi u / n)) / 2, u steps after the last restart.

    n is the length of a period. The first period has `steps` steps, each later one `factor` times
    those of the one before. Equal to `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`.

    Args:
        initial: the value at every restart.
        steps: length of the first period, in steps.
        factor: of the lengths of two periods in a row; an integer.
        final: the value that is approached at the end of a period.

    Raises:
        ValueError: `steps` or `factor` is not a positive integer, or a number is below 0.

    Reference:
        Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983, equation 5.
    """

    initial: Value
    final: Value

    def __init__(self, initial: Value, steps: int, *, factor: int = 1, final: Value = 0.0):
        super().__init__()
        set_value(self, "initial", initial)
        set_value(self, "final", final)
        self.steps = check_count(self, "steps", steps)
        self.factor = check_count(self, "factor", factor)

    def forward(
        self, state: Any, *, step: Tensor, grads: list[Tensor], **_: Any
    ) -> tuple[Value, Any]:
        since, length = self._find_period(step)
        return half_wave(self.initial, self.final, precise(since, grads[0]) / length), state

    def _find_period(self, step: Tensor) -> tuple[Tensor, Tensor | int]:
        """Return (steps since the last restart, length of the period), in exact integers."""
        if self.factor == 1:
            return step % self.steps, self.steps
        # Restart k is at t_k = steps (factor^k - 1) / (factor - 1). The logarithm gives k up to
        # rounding, hence the look at both neighbours.
        ratio = (step * (self.factor - 1)).div(self.steps, rounding_mode="floor") + 1
        k = (ratio.double().log() / math.log(self.factor)).floor().to(step.dtype)
        k = torch.where(ratio < self.factor**k, k - 1, k)
        k = torch.where(ratio >= self.factor ** (k + 1), k + 1, k)
        start = self.steps * (self.factor**k - 1).div(self.factor - 1, rounding_mode="floor")
        return step - start, self.steps * self.factor**k

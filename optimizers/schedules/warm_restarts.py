"""Cosine decay that starts again and again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer.hyperparameter import Value, set_value
from metaopt.optimizer.schedule import Schedule

from ..precision import scalar_dtype


class WarmRestarts(Schedule):
    """value_t = final + (initial - final) (1 + cos(pi u / n)) / 2, u steps after the last restart,
    in a period of n steps.

    The first period has `steps` steps, each later one `factor` times those of the one before. Equal
    to `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`.

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
        self.steps, self.factor = (
            check_count(self, "steps", steps),
            check_count(self, "factor", factor),
        )

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        since, length = self._period(step)
        over = since.to(scalar_dtype(grads[0])) / length
        return self.final + (self.initial - self.final) * (1 + torch.cos(math.pi * over)) / 2, state

    def _period(self, step: Tensor) -> tuple[Tensor, Tensor | int]:
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

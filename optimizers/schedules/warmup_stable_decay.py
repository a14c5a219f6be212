"""Warm-up, a long constant phase, and a short decay."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metaopt.checks import check_choice, check_count
from metaopt.optimizer import Value, set_value

from .of_time import OfTime, fraction, half_wave


class WarmupStableDecay(OfTime):
    """value_t = peak t / warmup, then peak for `stable` steps, then final + (peak - final) d(p).

    At the end it is `final`. p is the fraction of the decay that is over, and d(p) = 1 - p, (1 +
    cos(pi p)) / 2, or 1 - sqrt(p).

    Args:
        peak: the value of the constant phase.
        warmup: length of the warm-up, in steps; 0 for none.
        stable: length of the constant phase, in steps.
        decay: length of the decay, in steps.
        final: the value at its end, and from then on.
        shape: of the decay: "linear", "cosine" or "sqrt".

    Raises:
        ValueError: a length that is not such an integer, a number below 0, or another shape.

    Reference:
        Hu et al. 2024, arXiv:2404.06395 (MiniCPM), section 4.2; "sqrt": Haegele et al. 2024,
        arXiv:2405.18392, equation 1.
    """

    peak: Value
    final: Value

    def __init__(
        self,
        peak: Value,
        *,
        warmup: int,
        stable: int,
        decay: int,
        final: Value = 0.0,
        shape: Literal["linear", "cosine", "sqrt"] = "linear",
    ):
        super().__init__()
        set_value(self, "peak", peak)
        set_value(self, "final", final)
        self.warmup = check_count(self, "warmup", warmup, least=0)
        self.stable = check_count(self, "stable", stable, least=0)
        self.decay = check_count(self, "decay", decay)
        self.shape = check_choice(self, "shape", shape, ("linear", "cosine", "sqrt"))

    def at(self, t: Tensor) -> Value:
        ramp = fraction(t, self.warmup) if self.warmup else torch.ones_like(t)
        over = ((t - self.warmup - self.stable) / self.decay).clamp(0, 1)
        # The decay has not begun while the ramp goes on, so one factor is 1 at any step.
        return ramp * (self.final + (self.peak - self.final) * self._remaining(over))

    def _remaining(self, over: Tensor) -> Value:
        match self.shape:
            case "linear":
                return 1 - over
            case "cosine":
                return half_wave(1, 0, over)
        return 1 - over.sqrt()

"""One cycle: up to the peak, and down to almost nothing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metaopt.checks import Limits, check_choice, check_count, check_flag, check_number
from metaopt.optimizer import Value, set_value

from .of_time import OfTime, half_wave


class OneCycle(OfTime):
    """value_t goes from peak / div_factor up to the peak, then down to almost nothing.

    That is peak / div_factor / final_div_factor, at t = steps - 1. Between the ends x and y of a
    phase, at its fraction p: y + (x - y) (1 + cos(pi p)) / 2, or x + (y - x) p if "linear". With
    `three_phase` it comes down to where it started first, as fast as it went up. Equal to
    `torch.optim.lr_scheduler.OneCycleLR`; its cycle of the momentum m is `OneCycle(m_low, steps,
    div_factor=m_low / m_high, final_div_factor=1.0)`.

    Args:
        peak: the largest value.
        steps: length of the cycle, in steps; the value then stays.
        pct_start: the fraction of the cycle that goes up.
        div_factor: peak / initial value.
        final_div_factor: initial / final value.
        anneal: "cos" or "linear".
        three_phase: come down in two phases.

    Raises:
        ValueError: `steps` is not a positive integer, a phase has no length, or `anneal` is
            something else.

    Reference:
        Smith and Topin 2017, arXiv:1708.07120, section 3.
    """

    peak: Value
    div_factor: Value
    final_div_factor: Value

    def __init__(
        self,
        peak: Value,
        steps: int,
        *,
        pct_start: float = 0.3,
        div_factor: Value = 25.0,
        final_div_factor: Value = 1e4,
        anneal: Literal["cos", "linear"] = "cos",
        three_phase: bool = False,
    ):
        super().__init__()
        set_value(self, "peak", peak)
        set_value(self, "div_factor", div_factor)
        set_value(self, "final_div_factor", final_div_factor)
        self.steps = check_count(self, "steps", steps)
        self.pct_start = check_number(self, "pct_start", pct_start, Limits(high=1.0))
        self.anneal = check_choice(self, "anneal", anneal, ("cos", "linear"))
        self.three_phase = check_flag(self, "three_phase", three_phase)
        up = pct_start * steps - 1
        self._ends = (0.0, up, 2 * up, steps - 1.0) if three_phase else (0.0, up, steps - 1.0)
        if any(start >= end for start, end in zip(self._ends, self._ends[1:], strict=False)):
            raise ValueError(
                "OneCycle: every phase needs a length, got phases that end at steps "
                f"{self._ends[1:]}. Give more `steps`, or another `pct_start` than {pct_start}."
            )

    def at(self, t: Tensor) -> Value:
        initial = self.peak / self.div_factor
        middle = [initial] * self.three_phase
        levels = [initial, self.peak, *middle, initial / self.final_div_factor]
        phases = list(zip(self._ends, self._ends[1:], levels, levels[1:], strict=False))
        value = self._between(t, *phases[0])
        for phase in phases[1:]:
            value = torch.where(t <= phase[0], value, self._between(t, *phase))
        return value

    def _between(self, t: Tensor, start: float, end: float, x: Value, y: Value) -> Value:
        """Return the value at step t of the phase from (start, x) to (end, y)."""
        p = ((t - start) / (end - start)).clamp(max=1)
        return half_wave(x, y, p) if self.anneal == "cos" else x + (y - x) * p

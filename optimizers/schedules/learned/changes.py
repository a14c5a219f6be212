"""How far a learned schedule goes in a step, and what a change does to a value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHANGES = ("multiplicative", "additive")
FLOOR = 0.01  # what is left of a value whose additive change is -1


def bounded(x: Tensor) -> Tensor:
    """Return 2/pi atan(pi/2 x), in (-1, 1) with slope 1 at 0.

    Its slope 1 / (1 + (pi/2 x)^2) falls like 1 / x^2. That of tanh falls like exp(-2 |x|), and is 0
    in float32 from x = 10 on: what has come there once would stay there.
    """
    return torch.atan(x * (math.pi / 2)) * (2 / math.pi)


def positive(z: Tensor) -> Tensor:
    """Return (z + sqrt(z^2 + 4 d^2)) / 2, d = `FLOOR`, scaled to 1 at z = 1.

    It is nearly z above d and d at 0; below, it falls like d^2 / |z|, and its slope like d^2 / z^2,
    so nothing dies there either.
    """
    root = (z.square() + 4 * FLOOR**2).sqrt()
    # of two terms that cancel, the quotient keeps the digits
    value = torch.where(z > 0, (z + root) / 2, 2 * FLOOR**2 / (root - z.clamp(max=0)))
    return value / ((1 + math.sqrt(1 + 4 * FLOOR**2)) / 2)


def factor(change: Tensor, kind: str) -> Tensor:
    """Return what a value is multiplied by: exp(change), or positive(1 + change)."""
    return change.exp() if kind == "multiplicative" else positive(1 + change)

"""The inner optimizer of `maml.py` and `reptile.py`: SGD with a constant or a learned rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

import metaopt as mo
from optimizers import (
    SGD,
    AttentionSchedule,
    Constant,
    GPSchedule,
    LSTMSchedule,
    MLPSchedule,
    PerStep,
)

Kind = Literal["none", "per-step", "lstm", "mlp", "gp", "attention"]


def make_inner(
    kind: Kind, rate: float, steps: int, names: Iterable[str] = (), seed: int = 0
) -> SGD:
    """Return SGD whose rate starts at `rate`, with a schedule over `steps` steps.

    Args:
        kind: of the schedule; "none" is the constant rate.
        rate: where it starts.
        steps: number of steps of the adaptation.
        names: with names of parameters, each has a schedule of its own; otherwise all share one.
        seed: of the schedules' initial weights.
    """
    if kind == "none":
        return SGD(lr=rate)
    each = [*names]
    if not each:
        return SGD(lr=_make(kind, rate, steps, seed))
    return SGD(lr={name: _make(kind, rate, steps, seed + i) for i, name in enumerate(each)})


def _make(kind: Kind, rate: float, steps: int, seed: int) -> mo.Schedule:
    change = 0.5  # few steps: each may change the rate a good deal
    made: dict[str, Any] = {
        "per-step": lambda: PerStep(torch.nn.Parameter(torch.full((steps,), rate))),
        "lstm": lambda: LSTMSchedule(rate, steps, max_change=change, seed=seed),
        "mlp": lambda: MLPSchedule(rate, steps, max_change=change, seed=seed),
        "gp": lambda: GPSchedule(Constant(rate), steps, points=5, length_scale=0.4),
        "attention": lambda: AttentionSchedule(
            rate, steps, window=steps, max_change=change, seed=seed
        ),
    }
    schedule: mo.Schedule = made[kind]()
    return schedule

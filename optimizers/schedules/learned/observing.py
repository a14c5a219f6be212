"""What learned schedules observe, and how they move by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Value

from ...scalars import precise
from ..observing import require_loss
from ..of_time import fraction
from .changes import bounded
from .learned import LearnedSchedule

OBSERVED = 4  # loss, gradient norm, update norm, step fraction


class ObservingSchedule(LearnedSchedule):
    """change_t = change_{t-1} + max_change bounded(proposal_t), |bounded| < 1.

    The proposal is computed from four observations, and from a memory:

    - sign(L) log(1 + |L|) of the loss,
    - log(|g| + 1e-6) / 5 of the gradient's norm,
    - log(value |g| + 1e-6) / 5 of the step before: the norm of an update of plain SGD (which
      updates an optimizer makes of its values, a schedule is not told); 0 at the first step,
    - min(t / steps, 1).

    g are the gradients of the parameters that share the value: all of them, or those that match its
    pattern. A subclass defines `propose`, and `memory` if it remembers something.
    """

    def memory(self, like: Tensor) -> dict[str, Tensor]:
        """Return the memory before the first step."""
        return {}

    def propose(
        self, observed: Tensor, memory: dict[str, Tensor], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (proposal, a scalar; the next memory) for observations [4] at a step."""
        raise TypeError(f"{type(self).__name__} must define `propose(observed, memory, step)`.")

    def init(self, like: Tensor) -> dict[str, Any]:
        zero = torch.zeros((), dtype=self.log_initial.dtype, device=like.device)
        return {
            **self.memory(like),
            "change": zero,
            "update": zero.clone(),
            **self._init_start(like),
        }

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        loss, norm = require_loss(self, loss), tree.norm(grads)
        features = (
            loss.sign() * loss.abs().log1p(),
            _scaled_log(norm),
            state["update"],
            fraction(precise(step, self.log_initial), self.steps),
        )
        dtype = self.log_initial.dtype
        observed = torch.stack([feature.to(dtype) for feature in features])
        proposal, memory = self.propose(observed, state, step)
        change = state["change"] + self.max_change * bounded(proposal)
        start, own = self._start(state, step=step, loss=loss, grads=grads)
        value = self._value(start, change)
        update = _scaled_log(value * norm).to(dtype)
        return value, {**memory, "change": change, "update": update, **own}

    def value_at(self, state: Any, **seen: Any) -> Value:
        if seen["loss"] is None or seen["grads"] is None:
            return self._value(self._start_at(state, **seen), state["change"])
        return super().value_at(state, **seen)


def _scaled_log(norm: Tensor) -> Tensor:
    """Return log(norm + 1e-6) / 5: of the order of 1 for all norms that occur, finite at 0."""
    return (norm + 1e-6).log() / 5

"""A learned schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.checks import check_count, check_number, check_positive
from metaopt.optimizer import Schedule, Value

from ..lstm_cell import LSTMCell
from ..scalars import precise
from .observing import require_loss


class LSTMSchedule(Schedule):
    """log value_t = log value_{t-1} + max_change * tanh(readout . h_t).

    h_t = LSTM(loss_t, |grad_t|, t / steps). The loss enters as sign(L) log(1 + |L|), the norm of
    the gradient as log(|g| + 1e-6) / 5. The readout starts at zero: untrained, it is the constant
    `initial`, which is learned too. It observes, so the optimizer must be given `loss=`.

    Args:
        initial: the value at the start.
        steps: the number of steps that makes the step fraction 1.
        hidden_size: width of the LSTM.
        max_change: bound on the change of log value in one step.
        seed: of the initial weights.

    Raises:
        ValueError: an argument that is not positive.

    Reference:
        The controller of Xu, Dai, Kemp, Metz 2019, arXiv:1909.09712, section 3, trained through the
        inner loop instead of by reinforcement learning.
    """

    def __init__(
        self,
        initial: float = 0.1,
        steps: int = 100,
        *,
        hidden_size: int = 20,
        max_change: float = 0.05,
        seed: int = 0,
    ):
        super().__init__()
        self.initial = check_positive(self, "initial", check_number(self, "initial", initial))
        self.max_change = check_positive(
            self, "max_change", check_number(self, "max_change", max_change)
        )
        self.steps = check_count(self, "steps", steps)
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.seed = check_count(self, "seed", seed, least=0)
        self.cell = LSTMCell(3, hidden_size, torch.Generator().manual_seed(seed))
        self.log_initial = nn.Parameter(torch.tensor(math.log(initial)))
        self.readout = nn.Parameter(torch.zeros(1, hidden_size))

    def init(self, like: Tensor) -> dict[str, Tensor]:
        zeros = self.readout.new_zeros(self.hidden_size, 1, device=like.device)
        return {"h": zeros, "c": zeros, "change": self.readout.new_zeros((), device=like.device)}

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        loss = require_loss(self, loss)
        features = (
            loss.sign() * loss.abs().log1p(),
            (tree.norm(grads) + 1e-6).log() / 5,
            precise(step, self.readout) / self.steps,
        )
        observed = torch.stack([feature.to(self.readout.dtype) for feature in features])
        h, c = self.cell(observed[:, None], state["h"], state["c"])
        change = state["change"] + self.max_change * torch.tanh(self.readout @ h)[0, 0]
        return (self.log_initial + change).exp(), {"h": h, "c": c, "change": change}

    def value_at(self, state: Any, **seen: Any) -> Value:
        if seen["loss"] is None or seen["grads"] is None:
            log_value: Tensor = self.log_initial + state["change"]
            return log_value.exp()
        return super().value_at(state, **seen)

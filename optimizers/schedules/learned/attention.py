"""A learned schedule that looks back: attention over the last observations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import Schedule

from ...lstm_cell import uniform
from .mlp import Net
from .observing import OBSERVED, ObservingSchedule


class AttentionSchedule(ObservingSchedule):
    """proposal_t = MLP(observations_t, sum_s a_s V x_s), a = softmax(q_t . K x_s / sqrt(size)).

    s goes over the last `window` steps, t included; x_s are the observations at step s and the
    share of the window that has passed since, 1 - (t - s) / window; q_t = Q x_t. The window is a
    ring in the state: a step overwrites the oldest row. The value moves by the proposals, and what
    is observed: see `ObservingSchedule`. The last layer starts at zero, so untrained it is
    `initial`, whose scale is learned too. The optimizer must be given `loss=`.

    Args:
        initial: the value at the start, or a schedule to start from.
        steps: the number of steps that makes the step fraction 1.
        window: number of steps that are remembered.
        heads: number of sums, each with matrices of its own.
        hidden_size: width of the MLP and, over all heads, of the attention.
        max_change: bound on the change in one step, as for `LSTMSchedule`.
        change: "multiplicative" or "additive", see `LearnedSchedule`.
        seed: of the initial weights.

    Raises:
        ValueError: an argument that is not positive, another word, or a `hidden_size` that the
            heads do not divide.

    Cost:
        10 window hidden_size multiplications a step, and those of `MLPSchedule`.

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """

    def __init__(
        self,
        initial: float | Schedule = 0.1,
        steps: int = 100,
        *,
        window: int = 16,
        heads: int = 2,
        hidden_size: int = 16,
        max_change: float = 0.05,
        change: str = "multiplicative",
        seed: int = 0,
    ):
        super().__init__(initial, steps, max_change, change)
        self.window = check_count(self, "window", window)
        self.heads = check_count(self, "heads", heads)
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        if hidden_size % heads:
            raise ValueError(
                f"AttentionSchedule: `hidden_size` must be a multiple of `heads`, got "
                f"{hidden_size} and {heads}."
            )
        self.seed = check_count(self, "seed", seed, least=0)
        generator, inputs = torch.Generator().manual_seed(seed), OBSERVED + 1
        self.query = uniform((hidden_size, inputs), inputs, generator)
        self.key_and_value = uniform((2 * hidden_size, inputs), inputs, generator)
        self.net = Net(OBSERVED + hidden_size, hidden_size, generator)

    def memory(self, like: Tensor) -> dict[str, Tensor]:
        return {
            "window": self.query.new_zeros(self.window, OBSERVED, device=like.device),
            "count": torch.zeros((), dtype=torch.int64, device=like.device),
        }

    def propose(
        self, observed: Tensor, memory: dict[str, Tensor], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count = memory["count"]
        ages = (count - torch.arange(self.window, device=count.device)) % self.window
        # only what has age 0 is new
        window = torch.where((ages == 0)[:, None], observed, memory["window"])
        rows = torch.cat([window, (1 - ages / self.window).to(window)[:, None]], 1)
        now = torch.cat([observed, observed.new_ones(1)])
        query = (self.query @ now).view(self.heads, -1, 1)
        # each [heads, window, size]
        keys, values = (
            (rows @ self.key_and_value.mT).view(self.window, 2, self.heads, -1).permute(1, 2, 0, 3)
        )
        scores = (keys @ query)[..., 0] / math.sqrt(query.shape[1])
        shares = scores.masked_fill(ages > count, -math.inf).softmax(-1)
        seen = (shares[:, None] @ values).reshape(-1)
        proposal = self.net(torch.cat([observed, seen]))
        return proposal, {"window": window, "count": count + 1}

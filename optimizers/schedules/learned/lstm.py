"""A learned schedule that remembers: an LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaopt.checks import check_count
from metaopt.optimizer import Schedule

from ...lstm_cell import LSTMCell
from .observing import OBSERVED, ObservingSchedule


class LSTMSchedule(ObservingSchedule):
    """proposal_t = readout . h_t with h_t = LSTM(observations_t, h_{t-1}).

    The value moves by the proposals, and what is observed: see `ObservingSchedule`. The readout
    starts at zero, so untrained it is `initial`, whose scale is learned too. The optimizer must be
    given `loss=`.

    Args:
        initial: the value at the start, or a schedule to start from.
        steps: the number of steps that makes the step fraction 1.
        hidden_size: width of the LSTM.
        max_change: bound on the change in one step: of the value's logarithm; or of the value
            itself, as a fraction of the start.
        change: "multiplicative" or "additive", see `LearnedSchedule`.
        seed: of the initial weights.

    Raises:
        ValueError: an argument that is not positive, or another word.

    Cost:
        4 hidden_size (hidden_size + 4) multiplications a step.

    Reference:
        The controller of Xu, Dai, Kemp, Metz 2019, arXiv:1909.09712, section 3, trained through the
        inner loop instead of by reinforcement learning.
    """

    def __init__(
        self,
        initial: float | Schedule = 0.1,
        steps: int = 100,
        *,
        hidden_size: int = 20,
        max_change: float = 0.05,
        change: str = "multiplicative",
        seed: int = 0,
    ):
        super().__init__(initial, steps, max_change, change)
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.seed = check_count(self, "seed", seed, least=0)
        self.cell = LSTMCell(OBSERVED, hidden_size, torch.Generator().manual_seed(seed))
        self.readout = nn.Parameter(torch.zeros(1, hidden_size))

    def memory(self, like: Tensor) -> dict[str, Tensor]:
        zeros = self.readout.new_zeros(self.hidden_size, 1, device=like.device)
        return {"h": zeros, "c": zeros}

    def propose(
        self, observed: Tensor, memory: dict[str, Tensor], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        h, c = self.cell(observed[:, None], memory["h"], memory["c"])
        return (self.readout @ h)[0, 0], {"h": h, "c": c}

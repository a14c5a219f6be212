"""A learned schedule without a memory: a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaopt.checks import check_count
from metaopt.optimizer import Schedule

from ...lstm_cell import uniform
from .observing import OBSERVED, ObservingSchedule


class Net(nn.Module):
    """f(x) = w2 . tanh(W1 tanh(W0 x + b0) + b1) + b2, with w2 = 0 and biases 0 at the start.

    Args:
        inputs: size of x.
        hidden: width of both hidden layers.
        generator: draws W0 and W1 from U(-1/sqrt(fan in), 1/sqrt(fan in)).
    """

    def __init__(self, inputs: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.input_weight = uniform((hidden, inputs), inputs, generator)
        self.input_bias = nn.Parameter(torch.zeros(hidden))
        self.hidden_weight = uniform((hidden, hidden), hidden, generator)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.readout = nn.Parameter(torch.zeros(hidden))
        self.output_bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return f of each row, for x [..., inputs]."""
        x = torch.tanh(x @ self.input_weight.mT + self.input_bias)
        x = torch.tanh(x @ self.hidden_weight.mT + self.hidden_bias)
        return x @ self.readout + self.output_bias


class MLPSchedule(ObservingSchedule):
    """proposal_t = MLP(observations_t), with two hidden layers.

    The value moves by the proposals, and what is observed: see `ObservingSchedule`. The last layer
    starts at zero, so untrained it is `initial`, whose scale is learned too. The optimizer must be
    given `loss=`.

    Args:
        initial: the value at the start, or a schedule to start from.
        steps: the number of steps that makes the step fraction 1.
        hidden_size: width of the hidden layers.
        max_change: bound on the change in one step, as for `LSTMSchedule`.
        change: "multiplicative" or "additive", see `LearnedSchedule`.
        seed: of the initial weights.

    Raises:
        ValueError: an argument that is not positive, or another word.

    Cost:
        hidden_size (hidden_size + 5) multiplications a step.
    """

    def __init__(
        self,
        initial: float | Schedule = 0.1,
        steps: int = 100,
        *,
        hidden_size: int = 16,
        max_change: float = 0.05,
        change: str = "multiplicative",
        seed: int = 0,
    ):
        super().__init__(initial, steps, max_change, change)
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.seed = check_count(self, "seed", seed, least=0)
        self.net = Net(OBSERVED, hidden_size, torch.Generator().manual_seed(seed))

    def propose(
        self, observed: Tensor, memory: dict[str, Tensor], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.net(observed), {}

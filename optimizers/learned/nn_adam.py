"""Adam whose hyperparameters a network sets, tensor by tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metaopt.checks import check_count, check_number, check_positive
from metaopt.optimizer import Hyper, Leaves, Optimizer, Slots, require_params
from metaopt.tree import safe_sqrt

from ..lstm_cell import LSTMCell
from .normalized import HORIZONS, time_features
from .statistics import STATISTICS, describe

BETAS = (0.9, 0.999)
EPS = 1e-8
CONTROLS = 3  # the logarithms of lr, 1 - beta1 and 1 - beta2
LEAST_FORGET = 1e-6


class NNAdam(Optimizer):
    """u = -lr m^ / (sqrt(v^) + 1e-8), as Adam's, with lr, beta1 and beta2 of every tensor learned.

    The logarithms of lr, 1 - beta1 and 1 - beta2 of a tensor change in each step by max_change *
    tanh(readout . h). An LSTM whose weights all tensors share, h its state for this tensor, sees
    statistics of the tensor (`describe`), the time, and how far the three have moved. m^ and v^ are
    m and v divided by the same averages of 1, so that they are means for all betas. The
    readout starts at zero: untrained, it is Adam with the rate `step_size`. The first values are
    learned too.

    Args:
        hidden_size: width of the LSTM.
        step_size: lr at the start.
        max_change: bound on the change of each logarithm in one step.
        seed: of the initial weights.

    Cost:
        2 copies of the parameters as state, and 2 * hidden_size + 5 numbers for each tensor; some
        30 operations for each tensor.

    Reference:
        Metz, Maheswaranathan, Freeman, Poole, Sohl-Dickstein 2020, arXiv:2009.11243 ("NN Adam").
        There eps is controlled too, and a change acts one step later.
    """

    def __init__(
        self,
        hidden_size: int = 16,
        *,
        step_size: float = 1e-3,
        max_change: float = 0.1,
        seed: int = 0,
    ):
        super().__init__()
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.step_size = check_positive(
            self, "step_size", check_number(self, "step_size", step_size)
        )
        self.max_change = check_positive(
            self, "max_change", check_number(self, "max_change", max_change)
        )
        self.seed = check_count(self, "seed", seed, least=0)
        inputs = STATISTICS + len(HORIZONS) + CONTROLS
        self.cell = LSTMCell(inputs, hidden_size, torch.Generator().manual_seed(seed))
        self.shift = nn.Parameter(torch.zeros(CONTROLS, 1))  # of the first values
        self.readout = nn.Parameter(torch.zeros(CONTROLS, hidden_size))

    def slots(self, params: Leaves) -> Slots:
        like = [p.to(self.readout.dtype) for p in params]
        sizes = {"h": self.hidden_size, "c": self.hidden_size, "change": CONTROLS, "weight": 2}
        return {
            "mean": [torch.zeros_like(p) for p in like],
            "square": [torch.zeros_like(p) for p in like],
            **{name: like[0].new_zeros(size, len(like)) for name, size in sizes.items()},
        }

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        params = require_params(self, params, "its network looks at them")
        dtype = self.readout.dtype
        grads, params = [g.to(dtype) for g in grads], [p.to(dtype) for p in params]
        change, h, c = self._control(grads, params, slots, step)
        first = [math.log(self.step_size), *(math.log1p(-beta) for beta in BETAS)]
        log_values = grads[0].new_tensor(first)[:, None] + self.shift + change
        forget = log_values[1:].exp().clamp(LEAST_FORGET, 1)
        # the average of 1: what m and v lack because they start at 0
        weight = torch.lerp(slots["weight"], torch.ones_like(forget), forget)
        updates, means, squares = [], [], []
        for place, (g, m, v) in enumerate(zip(grads, slots["mean"], slots["square"], strict=True)):
            mean = torch.lerp(m, g, forget[0, place])
            square = torch.lerp(v, g * g, forget[1, place])
            root = safe_sqrt(square / weight[1, place]) + EPS
            rate = log_values[0, place].exp() / weight[0, place]
            updates.append(-rate * mean / root)
            means.append(mean)
            squares.append(square)
        after = {"mean": means, "square": squares, "weight": weight}
        return updates, {**after, "h": h, "c": c, "change": change}

    def _control(
        self, grads: Leaves, params: Leaves, slots: Slots, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (change of the logarithms since the start [3, tensors], h, c)."""
        rows = zip(grads, params, slots["mean"], slots["square"], strict=True)
        seen = torch.stack([describe(*row) for row in rows], dim=1)
        time = time_features(step, seen).expand(-1, len(grads))
        h, c = self.cell(torch.cat([seen, time, slots["change"]]), slots["h"], slots["c"])
        return slots["change"] + self.max_change * torch.tanh(self.readout @ h), h, c

"""The hierarchical optimizer: an LSTM for each tensor, above an MLP for each coordinate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaopt.checks import check_count, check_number
from metaopt.optimizer import Hyper, Leaves, Optimizer, Slots, require_params
from metaopt.tree import safe_sqrt

from ..lstm_cell import LSTMCell, uniform
from .normalized import (
    DECAYS,
    FEATURES,
    HORIZONS,
    Averages,
    advance,
    features,
    memory,
    time_features,
)
from .statistics import STATISTICS, describe

ADAM = DECAYS.index(0.9)  # the momentum of Adam
EPS = 1e-8


class RNNMLP(Optimizer):
    """u = -step_size * (m^ / (sqrt(v^) + 1e-8) + d) * exp(s + r): Adam's update and a correction.

    r is of the whole tensor, (d, s) = MLP(features of one coordinate, message to its tensor). An
    LSTM whose weights all tensors share sees statistics of a tensor (`describe`) and the time; its
    state gives r and the message, which is added to the first bias of the MLP, whose features are
    those of `MLPOptimizer`. The last layers start at zero: untrained, it is Adam with the rate
    `step_size`. Tensors do not see each other.

    Args:
        hidden_size: width of the MLP's two hidden layers.
        tensor_size: width of the LSTM.
        step_size: factor on the update; the rate before anything is learned.
        seed: of the initial weights.

    Cost:
        4 copies of the parameters as state, and 2 * tensor_size numbers for each tensor;
        hidden_size * (hidden_size + 12) multiplications per coordinate.

    Reference:
        Metz, Maheswaranathan, Freeman, Poole, Sohl-Dickstein 2020, arXiv:2009.11243; Metz et al.
        2022, arXiv:2211.09760 (VeLO). There the LSTM sees the loss, and means over coordinates and
        over tensors come back to it; the update starts from a random network, not from Adam.
    """

    def __init__(
        self,
        hidden_size: int = 16,
        tensor_size: int = 16,
        *,
        step_size: float = 1e-3,
        seed: int = 0,
    ):
        super().__init__()
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.tensor_size = check_count(self, "tensor_size", tensor_size)
        self.step_size = check_number(self, "step_size", step_size)
        self.seed = check_count(self, "seed", seed, least=0)
        generator = torch.Generator().manual_seed(seed)
        self.cell = LSTMCell(STATISTICS + len(HORIZONS), tensor_size, generator)
        self.message = uniform((hidden_size, tensor_size), tensor_size, generator)
        self.log_rate = nn.Parameter(torch.zeros(1, tensor_size))
        self.input_weight = uniform((hidden_size, FEATURES), FEATURES, generator)
        self.input_bias = nn.Parameter(torch.zeros(hidden_size, 1))
        self.hidden_weight = uniform((hidden_size, hidden_size), hidden_size, generator)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_size, 1))
        self.output_weight = nn.Parameter(torch.zeros(2, hidden_size))
        self.output_bias = nn.Parameter(torch.zeros(2, 1))

    def slots(self, params: Leaves) -> Slots:
        like = [p.to(self.message.dtype) for p in params]
        state = like[0].new_zeros(self.tensor_size, len(like))
        return {**memory(like), "h": state, "c": state}

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        params = require_params(self, params, "the parameter is one of its features")
        dtype = self.message.dtype
        grads, params = [g.to(dtype) for g in grads], [p.to(dtype) for p in params]
        after, averages = advance(grads, slots, step)
        rows = list(zip(grads, params, averages, strict=True))
        seen = [describe(g, p, one.momenta[ADAM], one.square) for g, p, one in rows]
        time = time_features(step, seen[0]).expand(-1, len(grads))
        h, c = self.cell(torch.cat([torch.stack(seen, 1), time]), slots["h"], slots["c"])
        biases, log_rates = self.message @ h + self.input_bias, self.log_rate @ h
        updates = [
            self._update_tensor(*row, biases[:, place, None], log_rates[0, place])
            for place, row in enumerate(rows)
        ]
        return updates, {**after, "h": h, "c": c}

    def _update_tensor(
        self, grad: Tensor, param: Tensor, averages: Averages, bias: Tensor, log_rate: Tensor
    ) -> Tensor:
        """Return the update of one tensor.

        Args:
            grad: gradient.
            param: parameter.
            averages: of its gradients.
            bias: of the first layer, with the message.
            log_rate: r.
        """
        seen = features(grad, param, averages)
        x = torch.addmm(bias, self.input_weight, seen.reshape(FEATURES, grad.numel()))
        x = torch.addmm(self.hidden_bias, self.hidden_weight, x.relu())
        x = torch.addmm(self.output_bias, self.output_weight, x.relu())
        correction, sharpness = x.view(2, *grad.shape)
        adam = averages.momenta[ADAM] / (safe_sqrt(averages.square) + EPS)
        update: Tensor = -self.step_size * (adam + correction) * torch.exp(sharpness + log_rate)
        return update

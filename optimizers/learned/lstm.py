"""The coordinatewise LSTM optimizer."""

from __future__ import annotations

import math

import torch
from einops import pack, unpack
from torch import Tensor, nn

from metaopt.checks import check_count, check_number
from metaopt.optimizer import Hyper, Leaves, Optimizer, Slots

from ..lstm_cell import LSTMCell, uniform

LAYERS = 2
CUTOFF = 10.0  # p in the paper: gradients below e^-p are seen linearly


class LSTMOptimizer(Optimizer):
    """u_i = scale * LSTM(LogAndSign(g_i), hidden state of coordinate i).

    It has two layers, whose weights all coordinates share. Works on any model: coordinates of all
    tensors are the columns of one matrix, so a step is one matrix product per layer.

    Args:
        hidden_size: width of both layers.
        scale: factor on the output; the step size before anything is learned.
        seed: of the initial weights.

    Cost:
        4 * hidden_size numbers of state per coordinate.

    Reference:
        Andrychowicz et al. 2016, arXiv:1606.04474, sections 2.1 and appendix A.
    """

    def __init__(self, hidden_size: int = 20, *, scale: float = 0.1, seed: int = 0):
        super().__init__()
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.scale = check_number(self, "scale", scale)
        self.seed = check_count(self, "seed", seed, least=0)
        generator = torch.Generator().manual_seed(seed)
        sizes = (2, *[hidden_size] * (LAYERS - 1))
        self.cells = nn.ModuleList([LSTMCell(size, hidden_size, generator) for size in sizes])
        self.readout = uniform((1, hidden_size), hidden_size, generator)

    def slots(self, params: Leaves) -> Slots:
        columns = sum(p.numel() for p in params)
        zeros = self.readout.new_zeros(self.hidden_size, columns, device=params[0].device)
        return {name: zeros for layer in range(LAYERS) for name in (f"h{layer}", f"c{layer}")}

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        flat, shapes = pack([g.to(self.readout.dtype) for g in grads], "*")
        signal, after = log_and_sign(flat), {}
        for layer, cell in enumerate(self.cells):
            signal, after[f"c{layer}"] = cell(signal, slots[f"h{layer}"], slots[f"c{layer}"])
            after[f"h{layer}"] = signal
        return unpack(self.scale * (self.readout @ signal)[0], shapes, "*"), after


def log_and_sign(x: Tensor) -> Tensor:
    """Return [2, n]: (log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x).

    Its derivatives are finite everywhere.

    Reference:
        arXiv:1606.04474, appendix A.
    """
    tiny = math.exp(-CUTOFF)
    return torch.stack([x.abs().clamp(min=tiny).log() / CUTOFF, (x / tiny).clamp(-1, 1)])

"""The per-parameter MLP optimizer."""

from __future__ import annotations

import torch
from einops import pack, unpack
from torch import Tensor, nn

from metaopt.checks import check_count, check_number
from metaopt.optimizer import Hyper, Leaves, Optimizer, Slots, require_params

from ..lstm_cell import uniform
from .normalized import FEATURES, HORIZONS, advance, features, memory, time_features


class MLPOptimizer(Optimizer):
    """u = step_size * d * exp(sharpness * s), with (d, s) = MLP(features of one coordinate).

    The network is shared over all coordinates. Features, each divided by its root mean square over
    the tensor: the gradient g, the parameter w, momenta m at decays .5, .9, .99, 1 / sqrt(v), g /
    sqrt(v) and m / sqrt(v), with m and v corrected for their start at 0; and tanh(t / h) for
    horizons h from 3 to 1000 steps, which are the same for all coordinates and are folded into the
    first bias.

    Args:
        hidden_size: width of both hidden layers (16: 578 weights).
        step_size: factor on the update.
        sharpness: factor in the exponent.
        seed: of the initial weights.

    Cost:
        4 copies of the parameters as state, hidden_size * (hidden_size + 12) multiplications per
        coordinate.

    Reference:
        Metz et al. 2019, arXiv:1810.10180, appendix D; Metz et al. 2020, arXiv:2009.11243, section
        3. Theirs are trained for longer and start from smaller factors (both 1e-3).
    """

    def __init__(
        self,
        hidden_size: int = 16,
        *,
        step_size: float = 0.1,
        sharpness: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.step_size = check_number(self, "step_size", step_size)
        self.sharpness = check_number(self, "sharpness", sharpness)
        self.seed = check_count(self, "seed", seed, least=0)
        generator = torch.Generator().manual_seed(seed)
        inputs = FEATURES + len(HORIZONS)
        self.input_weight = uniform((hidden_size, inputs), inputs, generator)
        self.input_bias = nn.Parameter(torch.zeros(hidden_size, 1))
        self.hidden_weight = uniform((hidden_size, hidden_size), hidden_size, generator)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_size, 1))
        self.output_weight = uniform((2, hidden_size), hidden_size, generator)
        self.output_bias = nn.Parameter(torch.zeros(2, 1))

    def slots(self, params: Leaves) -> Slots:
        return memory([p.to(self.input_weight.dtype) for p in params])

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        params = require_params(self, params, "the parameter is one of its features")
        # All is computed in the network's precision: half precision could not hold the square of a
        # small gradient.
        dtype = self.input_weight.dtype
        grads, params = [g.to(dtype) for g in grads], [p.to(dtype) for p in params]
        after, averages = advance(grads, slots, step)
        rows = zip(grads, params, averages, strict=True)
        seen, shapes = pack([features(*row) for row in rows], "f *")
        sizes = [FEATURES, len(HORIZONS)]
        of_coordinate, of_time = torch.split(self.input_weight, sizes, dim=1)
        x = of_coordinate @ seen + (of_time @ time_features(step, seen) + self.input_bias)
        x = self.hidden_weight @ x.relu() + self.hidden_bias
        direction, sharpness = self.output_weight @ x.relu() + self.output_bias
        updates = self.step_size * direction * torch.exp(self.sharpness * sharpness)
        return unpack(updates, shapes, "*"), after

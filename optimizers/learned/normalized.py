"""Averages of the gradients, and features of coordinates made of them, for the networks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from metaopt.optimizer import Leaves, Slots

from ..scalars import bias_correction

DECAYS = (0.5, 0.9, 0.99)
SQUARE_DECAY = 0.999
HORIZONS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
FEATURES = 4 + 2 * len(DECAYS)


class Averages(NamedTuple):
    """Averages over time of one tensor's gradients, corrected for their start at 0.

    Args:
        momenta: of g at each decay, [decays, *shape].
        square: of g^2.
    """

    momenta: Tensor
    square: Tensor


def memory(params: Leaves) -> Slots:
    """Return the averages before the first step."""
    return {
        "momenta": [p.new_zeros(len(DECAYS), *p.shape) for p in params],
        "square": [torch.zeros_like(p) for p in params],
    }


def advance(grads: Leaves, slots: Slots, step: Tensor) -> tuple[Slots, list[Averages]]:
    """Return the averages after a step as memory, and corrected for their start."""
    decays = torch.tensor(DECAYS, dtype=grads[0].dtype, device=grads[0].device)
    each = [decays.view(-1, *[1] * g.ndim) for g in grads]
    momenta = [d * m + (1 - d) * g for d, m, g in zip(each, slots["momenta"], grads, strict=True)]
    square = [
        SQUARE_DECAY * v + (1 - SQUARE_DECAY) * g * g
        for v, g in zip(slots["square"], grads, strict=True)
    ]
    unbias = 1 / bias_correction(decays, step, grads[0])
    scale = 1 / bias_correction(SQUARE_DECAY, step, grads[0])
    pairs = zip(momenta, each, square, strict=True)
    averages = [Averages(m * unbias.view(d.shape), v * scale) for m, d, v in pairs]
    return {"momenta": momenta, "square": square}, averages


def features(grad: Tensor, param: Tensor, averages: Averages) -> Tensor:
    """Return g, w, 1 / sqrt(v), g / sqrt(v), m and m / sqrt(v), [features, *shape].

    Each has root mean square 1 over the tensor.
    """
    momenta, inverse = averages.momenta, (averages.square + 1e-16).rsqrt()
    raw = torch.cat(
        [torch.stack([grad, param, inverse, grad * inverse]), momenta, momenta * inverse]
    )
    mean_square = rearrange(raw, "f ... -> f (...)").square().sum(1) / max(grad.numel(), 1)
    return raw * (mean_square + 1e-16).rsqrt().view(-1, *[1] * grad.ndim)


def time_features(step: Tensor, like: Tensor) -> Tensor:
    """Return tanh(t / h) for horizons h, [horizons, 1]."""
    horizons = torch.tensor(HORIZONS, dtype=like.dtype, device=like.device)
    return torch.tanh(step / horizons)[:, None]

"""What a network that looks at whole tensors sees of one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STATISTICS = 8


def describe(grad: Tensor, param: Tensor, momentum: Tensor, square: Tensor) -> Tensor:
    """Return the statistics of a tensor, [8], all of order 1 and with finite derivatives.

    They are log(rms) / 5 of the gradient, of the parameter, of the momentum and of the root of
    `square`; the cosine of gradient and momentum; log(entries) / 5; whether the tensor is a scalar,
    and whether it is a vector. An empty tensor has zeros in place of means.

    Args:
        grad: g.
        param: w.
        momentum: an average of g.
        square: an average of g^2.
    """
    count = max(grad.numel(), 1)
    means = [(x * x).sum() / count for x in (grad, param, momentum)] + [square.sum() / count]
    logs = [(mean + 1e-16).log() / 10 for mean in means]
    cosine = (grad * momentum).sum() / count * (means[0] * means[2] + 1e-24).rsqrt()
    shape = [math.log(count) / 5, float(grad.ndim == 0), float(grad.ndim == 1)]
    return torch.stack([*logs, cosine, *grad.new_tensor(shape)])

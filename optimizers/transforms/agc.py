"""Adaptive gradient clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    State,
    is_zero_anywhere,
    require_params,
)
from metaopt.tree import Tree

from ..real import require_real
from ..scalars import scalar_dtype
from .transform import Transform


class AGC(Transform):
    """g_i = g_i min(1, clipping max(|w_i|, eps) / |g_i|), where i is an output unit.

    The norms are those of the slices along the first axis of a weight, `w[i]`: a row of a matrix, a
    filter of a convolution. A vector or a scalar is one unit. As for `ClipNorm` the derivative is
    exact, and the identity where nothing is clipped, a zero gradient included.

    The last layer is better left out, its authors say:
    `Grouped({"head.*": SGD(0.1), "*": AGC(0.01, SGD(0.1))})`.

    Args:
        clipping: the largest gradient of a unit, in sizes of the unit.
        optimizer: what sees the clipped gradients.
        eps: the least size of a unit, so that weights of 0 can move.

    Raises:
        ValueError: a number that is not positive, `params` is missing, or (in `init`) a parameter
            is complex.

    Reference:
        Brock, De, Smith, Simonyan 2021, arXiv:2102.06171, section 4.
    """

    hyperparameters = ("clipping", "eps")
    clipping: Hyperparameter
    eps: Hyperparameter

    def __init__(
        self, clipping: Hyperparameter, optimizer: Optimizer, *, eps: Hyperparameter = 1e-3
    ):
        super().__init__(optimizer, clipping=clipping, eps=eps)
        for name in self.hyperparameters:
            if is_zero_anywhere(getattr(self, name)):
                raise ValueError(
                    f"AGC: `{name}` must be positive, got 0.0. To freeze parameters, use `Masked`."
                )

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        require_real(self, params, "The axes of a complex one are not its units")
        return super().init(params, per_parameter=per_parameter)

    def before(self, grads: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        weights = require_params(self, params, "it clips by their norms")
        clipped = []
        for g, w in zip(grads, weights, strict=True):
            dtype = scalar_dtype(g)
            least = torch.as_tensor(hyper["eps"], dtype=dtype, device=g.device)
            size = torch.maximum(unit_norms(w.to(dtype)), least)
            largest = hyper["clipping"] * size
            scale = largest / torch.maximum(unit_norms(g.to(dtype)), largest)
            clipped.append((g * scale).to(g.dtype))
        return clipped


def unit_norms(x: Tensor) -> Tensor:
    """Return the norm of each slice along the first axis, to be broadcast; derivative 0 at 0."""
    axes = tuple(range(1, x.ndim)) or None
    return tree.safe_sqrt(x.square().sum(axes, keepdim=True) if axes else x.square().sum())

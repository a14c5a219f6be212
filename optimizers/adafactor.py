"""Adafactor."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    State,
    Value,
    is_zero_anywhere,
    require_params,
    set_hyperparameter,
)
from metaopt.tree import Tree

from .betas import as_pair
from .moving import averages, mean_along
from .real import require_real
from .scalars import precise, scalar_dtype
from .weight_decay import decayed


class Adafactor(Optimizer):
    """u = -a U / max(1, RMS(U) / d) - lr weight_decay w  with  U = g / max(sqrt(V), eps1).

    a = max(eps2, RMS(w)) min(lr, 1 / sqrt(t)). For a tensor with two axes or more, V = R C /
    max(mean(R), eps1), where R is the moving average of the means of g^2 along its last axis and C
    along the last but one; V of a vector is the moving average of g^2 itself. They decay with 1 -
    t^beta2_decay. There is no momentum. Equal to `torch.optim.Adafactor`, whose eps1 differs from
    the paper's, which is added to g^2; of torch is also `lr`, in the paper 0.01. The derivative is
    finite at a zero gradient; there it is a / eps1, and 0 in what is clamped.

    Args:
        lr: largest relative step size, and the factor on the weight decay.
        beta2_decay: power of the decay, at most 0.
        eps: (eps1, eps2), the least denominator (None: the dtype's resolution), and the least size
            of a tensor to be scaled by.
        d: the largest root mean square of U, at least 1.
        weight_decay: decoupled, as in `AdamW`.

    Raises:
        ValueError: a number out of range, eps1 = 0, `params` is missing, or (in `init`) a parameter
            is complex.

    Cost:
        n + k numbers for a matrix of n x k entries, a copy of vectors.

    Reference:
        Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5.
    """

    hyperparameters = ("lr", "beta2_decay", "eps1", "eps2", "d", "weight_decay")
    eps1: Hyperparameter | None
    eps2: Hyperparameter

    def __init__(
        self,
        lr: Hyperparameter = 1e-2,
        beta2_decay: Hyperparameter = -0.8,
        eps: tuple[Hyperparameter | None, Hyperparameter] = (None, 1e-3),
        d: Hyperparameter = 1.0,
        weight_decay: Hyperparameter = 0.0,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        set_hyperparameter(self, "beta2_decay", beta2_decay, low=-math.inf, high=0.0)
        first, second = as_pair(self, "eps", eps, "(None, 1e-3)")
        if first is None:
            self.eps1 = None
        else:
            set_hyperparameter(self, "eps1", first)
            if self.eps1 is not None and is_zero_anywhere(self.eps1):
                raise ValueError(
                    "Adafactor: eps1 in `eps` must be positive, got 0.0. A zero gradient would be "
                    "divided by it. Write eps=(None, 1e-3)."
                )
        set_hyperparameter(self, "eps2", second)
        set_hyperparameter(self, "d", d, low=1.0)
        set_hyperparameter(self, "weight_decay", weight_decay)

    @property
    def eps(self) -> tuple[Hyperparameter | None, Hyperparameter]:
        """The least denominator, and the least size of a tensor."""
        return self.eps1, self.eps2

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        require_real(self, params, "Its parts would be a column each, and be factored")
        return super().init(params, per_parameter=per_parameter)

    def slots(self, params: Leaves) -> Slots:
        """Return zeros, and tensors without entries for what a parameter does not need."""
        zeros = [Moments(*(p.new_zeros(m.shape) for m in _moments(p))) for p in params]
        return {name: [getattr(one, name) for one in zeros] for name in Moments._fields}

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        weights = require_params(self, params, "its steps are in proportion to them")
        t = precise(step, grads[0])
        beta2 = 1 - t ** hyper["beta2_decay"]
        lr = torch.as_tensor(hyper["lr"], dtype=t.dtype, device=t.device)
        rate = torch.minimum(lr, t.rsqrt())
        new = [_moments(g) for g in grads]
        after = {
            name: averages(slots[name], [getattr(one, name) for one in new], beta2)
            for name in Moments._fields
        }
        eps1 = hyper["eps1"]
        updates = []
        for place, (g, w) in enumerate(zip(grads, weights, strict=True)):
            least = torch.finfo(g.dtype).eps if eps1 is None else eps1
            spread = _spread(Moments(*(row[place] for row in after.values())), least)
            scaled = g * spread.clamp(min=least * least).rsqrt()
            size = root_mean_square(w).clamp(min=hyper["eps2"])
            shrink = (root_mean_square(scaled) / hyper["d"]).clamp(min=1.0)
            updates.append(scaled * (-rate * size / shrink))
        return decayed(self, updates, weights, hyper["lr"], hyper["weight_decay"]), after


class Moments(NamedTuple):
    """Averages of g^2: along the last axis and the last but one, or nothing and g^2 itself."""

    row: Tensor
    column: Tensor
    square: Tensor


def _moments(x: Tensor) -> Moments:
    nothing = x.new_zeros(0)
    if x.ndim < 2:
        return Moments(nothing, nothing, x.square())
    rows, columns = (mean_along(x.square(), axis, keepdim=True) for axis in (-1, -2))
    return Moments(rows, columns, nothing)


def _spread(moments: Moments, eps1: Value) -> Tensor:
    """Return V."""
    row, column, square = moments
    if row.ndim < 2:
        return square
    return row * column / mean_along(row, -2, keepdim=True).clamp(min=eps1)


def root_mean_square(x: Tensor) -> Tensor:
    """Return sqrt(mean(x^2)), with derivative 0 at 0."""
    return tree.norm(x.to(scalar_dtype(x))) / math.sqrt(max(x.numel(), 1))

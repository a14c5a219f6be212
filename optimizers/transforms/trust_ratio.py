"""Steps in proportion to the size of each tensor."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_choice
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Value,
    require_params,
)

from ..scalars import scalar_dtype
from .transform import Transform


class TrustRatio(Transform):
    """u = coefficient |w| / |u| u, tensor by tensor; where |w| or |u| is 0, u = coefficient u.

    It acts on the updates, or with `of="gradients"` on the gradients. The derivative is exact, that
    of both norms included; at u = 0 it is the coefficient.

    `TrustRatio(lr, AdamW(1.0, weight_decay=0.01))` is LAMB, with phi(|w|) = |w|.
    `TrustRatio(1e-3, SGD(lr, momentum=0.9), of="gradients")` is LARS; with
    `WeightDecay(1e-4, ...)` in front of it the norm in the denominator is |g + 1e-4 w|, where its
    authors have |g| + 1e-4 |w|.

    Args:
        coefficient: the size of an update, in sizes of its tensor; of LAMB the step size.
        optimizer: what makes the updates.
        of: what is scaled, "updates" or "gradients".

    Raises:
        ValueError: a number below 0, another `of`, or `params` is missing.

    Cost:
        Two norms of every tensor.

    Reference:
        LARS: You, Gitman, Ginsburg 2017, arXiv:1708.03888, algorithm 1; LAMB: You et al.
        2019, arXiv:1904.00962, algorithm 2.
    """

    hyperparameters = ("coefficient",)

    def __init__(
        self,
        coefficient: Hyperparameter,
        optimizer: Optimizer,
        *,
        of: Literal["updates", "gradients"] = "updates",
    ):
        super().__init__(optimizer, coefficient=coefficient)
        self.of = check_choice(self, "of", of, ("updates", "gradients"))

    def before(self, grads: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        return self._scaled(grads, params, hyper) if self.of == "gradients" else grads

    def after(self, updates: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        return self._scaled(updates, params, hyper) if self.of == "updates" else updates

    def _scaled(self, given: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        weights = require_params(self, params, "it scales by their norms")
        pairs = zip(given, weights, strict=True)
        return [trusted(u, w, hyper["coefficient"]) for u, w in pairs]


def trusted(update: Tensor, weight: Tensor, coefficient: Value) -> Tensor:
    """Return coefficient |w| / |u| u."""
    dtype = scalar_dtype(update)  # half precision would overflow
    size, length = tree.norm(weight.to(dtype)), tree.norm(update.to(dtype))
    has_both = (size != 0) & (length != 0)  # with nan, the ratio is nan
    ratio = torch.where(has_both, size / torch.where(has_both, length, 1), 1)
    return (coefficient * ratio * update).to(update.dtype)

"""A hyperparameter for each entry of each parameter."""

from __future__ import annotations

import torch
from torch import nn

from metaopt import tree
from metaopt.checks import check_number
from metaopt.tree import Tree

from .for_params import ForParams, named_params


class PerParameter(ForParams):
    """A number for each entry: `SGD(lr=PerParameter(net.params, 0.1))` is Meta-SGD.

    It holds one `nn.Parameter` of the shape of each parameter. The update of w is that with the
    rates of w, entry by entry; all rates are learned, saved and loaded. A complex parameter has two
    rates for each entry, those of its real and imaginary part.

    Args:
        params: the tree of parameters that will be updated, for names, shapes, precision and
            devices.
        value: of every entry at the start.

    Raises:
        ValueError: there are no parameters, or (in `init`) others are updated.
        TypeError: `value` is not a number, or a leaf is not a floating-point or complex tensor.

    Cost:
        One copy of the parameters. The update is made for each parameter by itself.

    Reference:
        Li, Zhou, Chen, Li 2017, arXiv:1707.09835 (Meta-SGD), algorithm 1.
    """

    def __init__(self, params: Tree, value: float):
        value, named = check_number(self, "value", value), named_params("PerParameter", params)
        rates = {name: torch.full_like(tree.as_real(leaf), value) for name, leaf in named.items()}
        super().__init__({name: nn.Parameter(rate) for name, rate in rates.items()})
        self.value = value

"""A hyperparameter for each entry of each parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.checks import check_number
from metaopt.optimizer.by_name import ByName
from metaopt.optimizer.names import paths
from metaopt.transforms import is_differentiable
from metaopt.tree import Tree


class PerParameter(ByName):
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
        value, named = check_number(self, "value", value), paths(params)
        for name, leaf in named.items():
            if not is_differentiable(leaf):
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"PerParameter: `params` must be floating-point or complex tensors, got {kind} "
                    f"at {name!r}."
                )
        rates = {name: torch.full_like(tree.as_real(leaf), value) for name, leaf in named.items()}
        super().__init__({name: nn.Parameter(rate) for name, rate in rates.items()})
        self.value = value

    @property
    def params(self) -> dict[str, Any]:
        """Name of a parameter -> its values."""
        return self.values

    def match(self, owner: nn.Module, what: str, names: list[str]) -> list[list[str]]:
        """Return each name by itself.

        Raises:
            ValueError: they are others than those of `params`.
        """
        if sorted(names) != sorted(self.patterns):
            missing = sorted(set(self.patterns) - set(names))
            unknown = sorted(set(names) - set(self.patterns))
            raise ValueError(
                f"{type(owner).__name__}: `{what}` must be for the parameters that are updated, "
                f"missing {missing}, unknown {unknown}. Write {what}=PerParameter(params, 0.1) "
                "with their tree."
            )
        return [[name] for name in self.patterns]

"""Hyperparameters that are made for the parameters of one model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metaopt.optimizer.by_name import ByName
from metaopt.optimizer.names import paths
from metaopt.transforms import is_differentiable
from metaopt.tree import Tree


class ForParams(ByName):
    """A value for each parameter of a model, known by its name.

    A subclass has the constructor arguments `params` and `value`.
    """

    value: float

    @property
    def params(self) -> dict[str, Any]:
        """Name of a parameter -> its value or values."""
        return self.values

    def match(self, owner: nn.Module, what: str, names: list[str]) -> list[list[str]]:
        """Return each name by itself.

        Raises:
            ValueError: they are others than those of `params`.
        """
        if sorted(names) != sorted(self.patterns):
            missing = sorted(set(self.patterns) - set(names))
            unknown = sorted(set(names) - set(self.patterns))
            kind = type(self).__name__
            raise ValueError(
                f"{type(owner).__name__}: `{what}` must be for the parameters that are updated, "
                f"missing {missing}, unknown {unknown}. Write {what}={kind}(params, 0.1) with "
                "their tree."
            )
        return [[name] for name in self.patterns]


def named_params(kind: str, params: Tree) -> dict[str, Tensor]:
    """Return name -> parameter.

    Raises:
        TypeError: one is not a floating-point or complex tensor; `kind` is for the message.
    """
    named = paths(params)
    for name, leaf in named.items():
        if not is_differentiable(leaf):
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"{kind}: `params` must be floating-point or complex tensors, got {found} at "
                f"{name!r}."
            )
    return named

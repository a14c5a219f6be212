"""Optimizers to which the axes of a parameter mean something."""

from __future__ import annotations

from torch import Tensor, nn

from metaopt import tree
from metaopt.tree import Tree


def require_real(owner: nn.Module, params: Tree, reason: str) -> None:
    """Raise ValueError if a parameter is complex, which would be shown with one axis more."""
    for name, leaf in tree.named_leaves(params):
        if isinstance(leaf, Tensor) and leaf.is_complex():
            raise ValueError(
                f"{type(owner).__name__}: `params` must be real, got {leaf.dtype} at {name}. "
                f"{reason}. Give it to another optimizer, by its name: "
                '`Grouped({"waves.*": Adam(), "*": ...})`.'
            )

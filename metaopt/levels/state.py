"""Whether a state that is to be loaded is one of this graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree


def check_state(given: Any, own: dict[str, Any]) -> None:
    """Raise unless a state has the parts, names, shapes and dtypes of the graph's own.

    Raises:
        ValueError: the message names the first part that differs.
    """
    if not isinstance(given, dict) or given.keys() != own.keys():
        found = sorted(given) if isinstance(given, dict) else f"a {type(given).__name__}"
        raise ValueError(
            f"LevelGraph: a state must have the parts {sorted(own)}, got {found}. Take one from "
            f"`graph.state_dict()`."
        )
    for part in ("levels", "initial", "data", "draws"):
        # a look at paths takes longer than a step of a small graph
        if _are_alike(given[part], own[part]):
            continue
        one, other = _kinds(given[part]), _kinds(own[part])
        for path in [*other, *one]:
            if one.get(path) != other.get(path):
                raise ValueError(
                    f"LevelGraph: the state is that of another graph. At {part}{path} it has "
                    f"{one.get(path, 'nothing')}, where this graph has "
                    f"{other.get(path, 'nothing')}. Build the graph with the levels, models and "
                    "optimizers that it was saved with."
                )


def _are_alike(one: Tree, other: Tree) -> bool:
    """Return True if two trees of dicts have the same keys and kinds of leaves, in one order."""
    if one is other:
        return True
    if type(one) is dict:
        return (
            type(other) is dict
            and [*one] == [*other]
            and all(_are_alike(one[key], other[key]) for key in one)
        )
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    return type(one) is type(other) is int


def _kinds(values: Tree) -> dict[str, str]:
    return {path: _kind(leaf) for path, leaf in tree.named_leaves(values)}


def _kind(leaf: Any) -> str:
    return (
        f"a {leaf.dtype} of shape {tuple(leaf.shape)}"
        if isinstance(leaf, Tensor)
        else f"a {type(leaf).__name__}"
    )

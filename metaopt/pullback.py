"""Vector-Jacobian products of functions of trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree


def pull_back(function: Callable[..., Tree], arguments: Tree, cotangents: Tree, wanted: Tree) -> Tree:
    """Return the cotangents of `arguments`: bar_a = sum_i bar_r_i d r_i / d a, where r = function(*arguments).

    It is a function of tensors alone, and differentiable again.

    Args:
        function: from trees to a tree; some of its tensors may be integers.
        arguments: a tuple of trees.
        cotangents: in the structure of the result; None stands for zero.
        wanted: in the structure of the arguments: whether a leaf's cotangent is asked for. That leaf is a floating-point tensor.

    Returns:
        A tuple of trees like the arguments, with None for what is not wanted. Where no cotangent is given, all are None.

    Cost:
        One evaluation and one backward pass.
    """
    leaves, structure = tree.flatten(arguments)
    places = [place for place, is_wanted in enumerate(tree.leaves(wanted)) if is_wanted]
    seeds = tree.leaves(cotangents)

    def run(variables: list[Tensor]) -> list[Tensor]:
        full = list(leaves)
        for place, variable in zip(places, variables, strict=True):
            full[place] = variable
        results = tree.leaves(function(*tree.unflatten(structure, full)))
        return [result for result, seed in zip(results, seeds, strict=True) if seed is not None]

    bars: list[Any] = [None] * len(leaves)
    if places and any(seed is not None for seed in seeds):
        _, pull, *_ = torch.func.vjp(run, [leaves[place] for place in places])
        (pulled,) = pull([seed for seed in seeds if seed is not None])
        for place, bar in zip(places, pulled, strict=True):
            bars[place] = bar
    return tree.unflatten(structure, bars)


def plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the sum of two cotangents, of which None is zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other

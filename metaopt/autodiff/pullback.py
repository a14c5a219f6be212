"""Vector-Jacobian products of functions of trees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.plain import Recording, begin_at, cut, slopes, stands_in
from metaopt.transforms import constant, is_differentiable
from metaopt.tree import Tree


def pull_back(
    function: Callable[..., Tree], arguments: Tree, cotangents: Tree, wanted: Tree
) -> Tree:
    """Return the cotangents of the arguments: bar_a = sum_i bar_r_i d r_i / d a.

    Here r = function(*arguments).

    It is a function of tensors alone, and differentiable again.

    Args:
        function: from trees to a tree; some of its tensors may be integers.
        arguments: a tuple of trees.
        cotangents: in the structure of the result; None stands for zero.
        wanted: in the structure of the arguments: whether a leaf's cotangent is asked for, or that
            of all leaves in a part of the tree, of which a bool may take the place. These leaves
            are floating-point tensors.

    Returns:
        A tuple of trees like the arguments, with None for every part that is not wanted. Where no
        cotangent is given, all are None.

    Cost:
        One evaluation and one backward pass.
    """
    return pull_back_and_value(function, arguments, cotangents, wanted)[0]


def pull_back_and_value(
    function: Callable[..., Tree], arguments: Tree, cotangents: Tree, wanted: Tree
) -> tuple[Tree, Tree]:
    """Return what `pull_back` does, and r; None where there was no need to evaluate it."""
    seeds = tree.leaves(cotangents)
    variables = choose(arguments, wanted)
    if not variables or all(seed is None for seed in seeds):
        return spread(repeat(None), arguments, wanted), None

    def run(variables: list[Tensor]) -> tuple[list[Tensor], Tree]:
        value = function(*put(variables, arguments, wanted))
        pairs = zip(tree.leaves(value), seeds, strict=True)
        return [result for result, seed in pairs if seed is not None], value

    given = [seed for seed in seeds if seed is not None]
    if not stands_in(variables):
        _, pull, value = torch.func.vjp(run, variables, has_aux=True)  # type: ignore[misc]
        return spread(pull(given)[0], arguments, wanted), value
    again = torch.is_grad_enabled()
    fresh = begin_at(variables, again)
    with Recording(fresh):
        results, value = run(fresh)
    bars = _densify(slopes(results, fresh, given, again=again), variables)
    return spread(cut(bars, variables) if again else bars, arguments, wanted), value


def vjp(
    function: Callable[..., Tree], arguments: Tree
) -> tuple[Tree, Callable[[Tree, Tree], Tree]]:
    """Return (r, pullback) for r = function(*arguments), evaluated once.

    `pullback(cotangents, wanted)` is what `pull_back` returns, as often as it is asked for. It
    keeps the graph of the evaluation, of all that has a derivative in the arguments.
    """
    everywhere = tree.map(is_differentiable, arguments)
    variables = choose(arguments, everywhere)

    def run(variables: list[Tensor]) -> tuple[list[Tensor], Tree]:
        value = function(*put(variables, arguments, everywhere))
        return [leaf for leaf in tree.leaves(value) if is_differentiable(leaf)], value

    if stands_in(variables):
        again = torch.is_grad_enabled()
        fresh = begin_at(variables, again)
        with Recording(fresh):
            results, value = run(fresh)
        value = value if again else tree.map(constant, value)

        def pull(seeds: list[Tensor]) -> Sequence[Tensor | None]:
            again = torch.is_grad_enabled()
            return slopes(results, fresh, seeds, again=again, keep=True)
    else:
        results, pull_all, value = torch.func.vjp(run, variables, has_aux=True)  # type: ignore[misc]

        def pull(seeds: list[Tensor]) -> Sequence[Tensor | None]:
            return pull_all(seeds)[0]  # type: ignore[no-any-return]

    def pullback(cotangents: Tree, wanted: Tree) -> Tree:
        seeds: list[Tensor] = []
        tree.map(functools.partial(_add_seeds, seeds), cotangents, value)
        bars = spread(_densify(pull(seeds), variables), arguments, everywhere)
        return spread(choose(bars, wanted), arguments, wanted)

    return value, pullback


class Linearized:
    """A function at a point, evaluated once, and its transposed derivative there, many times.

    Where plain autograd can stand in for a transform (see `stands_in`), and nobody differentiates
    it again, but for a transform around `pull_back` itself: the cotangents may be those of a
    `vmap`.

    Args:
        function: from trees to a tree of floating-point tensors.
        arguments: a tuple of trees.
        wanted: as for `pull_back`.
    """

    def __init__(self, function: Callable[..., Tree], arguments: Tree, wanted: Tree):
        self._arguments, self._wanted = arguments, wanted
        counts = [
            len(choose(argument, part)) for argument, part in zip(arguments, wanted, strict=True)
        ]
        self._parts = [
            slice(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)
        ]
        self._variables = begin_at(choose(arguments, wanted), again=False)
        with Recording(self._variables):
            self._results = tree.leaves(function(*put(self._variables, arguments, wanted)))

    def pull_back(self, cotangents: Tree, argument: int, *, keep: bool = True) -> Tree:
        """Return the cotangent of one of the arguments; without `keep` it is the last time."""
        variables = self._variables[self._parts[argument]]
        again = torch.is_grad_enabled()  # inside a transform that transposes this
        bars = (
            slopes(self._results, variables, tree.leaves(cotangents), again=again, keep=keep)
            if variables
            else []
        )
        return spread(_densify(bars, variables), self._arguments[argument], self._wanted[argument])


def _add_seeds(seeds: list[Tensor], cotangent: Tensor | None, value: Tree) -> None:
    """Add the cotangents of the leaves of `value`, for all of which None may stand."""
    for leaf in tree.leaves(value):
        if is_differentiable(leaf):
            seeds.append(torch.zeros_like(leaf) if cotangent is None else cotangent)


def _densify(bars: Iterable[Tensor | None], like: Iterable[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(leaf) if bar is None else bar for bar, leaf in zip(bars, like, strict=True)
    ]


def choose(values: Tree, wanted: Tree) -> list[Any]:
    """Return the leaves that are wanted; one bool may stand for a whole part of the tree."""
    found: list[Any] = []
    _choose(values, wanted, found)
    return found


def put(leaves: Iterable[Any], values: Tree, wanted: Tree) -> Tree:
    """Return `values` with these in the place of the leaves that are wanted."""
    return _fill(iter(leaves), values, wanted)


def spread(leaves: Iterable[Any], values: Tree, wanted: Tree) -> Tree:
    """Return `values` with these in the place of the wanted leaves, and None elsewhere."""
    return _fill(iter(leaves), values, wanted, True)


# No closures: one that calls itself is a circle, which keeps the leaves alive until the collector
# comes.
def _choose(values: Tree, wanted: Tree, found: list[Any]) -> None:
    kind = type(wanted)
    if kind is bool:
        if wanted:
            found += tree.leaves(values)
    elif kind is dict:
        for key, part in wanted.items():
            if part is not False:  # most parts: not even a call for these
                _choose(values[key], part, found)
    elif issubclass(kind, tuple | list):
        for value, part in zip(values, wanted, strict=True):
            if part is not False:
                _choose(value, part, found)
    else:
        pairs = zip(tree.leaves(values), tree.leaves(wanted), strict=True)
        found += [leaf for leaf, is_wanted in pairs if is_wanted]


def _fill(fresh: Iterator[Any], values: Tree, wanted: Tree, bare: bool = False) -> Tree:
    kind: Any = type(wanted)
    if kind is bool:
        if wanted:
            if isinstance(values, Tensor):
                return next(fresh)
            return tree.map(lambda _: next(fresh), values)
        return None if bare else values
    if kind is dict:
        return {
            key: (None if bare else values[key])
            if part is False
            else _fill(fresh, values[key], part, bare)
            for key, part in wanted.items()
        }
    if issubclass(kind, tuple | list):
        parts: list[Any] = [
            (None if bare else value) if part is False else _fill(fresh, value, part, bare)
            for value, part in zip(values, wanted, strict=True)
        ]
        make: Any = getattr(kind, "_make", kind)  # of a named tuple
        return make(parts)
    return tree.map(
        lambda leaf, is_wanted: next(fresh) if is_wanted else None if bare else leaf, values, wanted
    )


def plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the sum of two cotangents, of which None is zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def or_zeros(cotangent: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a cotangent, with zeros for None where `like` is of a kind that has derivatives."""
    return torch.zeros_like(like) if cotangent is None and is_differentiable(like) else cotangent

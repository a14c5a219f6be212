"""Sums over ranks with derivatives of every order.

A value is *replicated*, the same on all ranks: parameters, a mean loss, a gradient that an
optimizer is given. Or it *varies*: a batch, its loss. Two linear maps lead from the one to the
other, and each is the other's transpose (f and g of Shoeybi et al. 2019, arXiv:1909.08053,
section 3):

    copy_to_ranks: y_r = x            replicated -> varying       cotangent: sum_r dy_r
    sum_over_ranks: y = sum_r x_r     varying -> replicated       cotangent: dx_r = dy

So a loss L(w) = sum_over_ranks(L_r(copy_to_ranks(w))) is a function of replicated parameters like
any other: its gradient, the gradient of that, forward derivatives and batches of them come out
complete on every rank, and no rule has to know that there are ranks.

torch's own all-reduce takes all values for varying: `copy_to_ranks(sum_over_ranks(x))` is what it
computes. The gradient of a replicated loss is then one rank's part, not the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from metaopt import tree
from metaopt.distributed.message import sum_leaves
from metaopt.distributed.overlap import running_sums
from metaopt.distributed.ranks import Ranks, is_busy
from metaopt.torch_internals import allow_in_compiled_graphs
from metaopt.transforms import has_tangent, is_differentiable, is_sharded, is_tracked
from metaopt.tree import Tree

Leaves = tuple[Tensor, ...]


class _Sum(Function):
    """(x_1, x_2, ...) of each rank -> their sums; the cotangents are copies."""

    @staticmethod
    def forward(*leaves: Tensor) -> Leaves:
        return tuple(sum_leaves(leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: Leaves, output: Leaves) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Leaves:
        return _copy(*bars)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Leaves:
        return _sum(*tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *leaves: Tensor) -> tuple[Leaves, Any]:
        # The batch is a part of the message: one for all of its rows. It comes first, since each
        # rank may have another layout.
        rows = [
            leaf if axis is None else leaf.movedim(axis, 0)
            for leaf, axis in zip(leaves, in_dims, strict=True)
        ]
        return _sum(*rows), tuple(None if axis is None else 0 for axis in in_dims)


class _Copy(Function):
    """(x_1, x_2, ...) -> the same; the cotangents are summed over ranks."""

    @staticmethod
    def forward(*leaves: Tensor) -> Leaves:
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Leaves, output: Leaves) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Leaves:
        return _sum(*bars)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Leaves:
        return _copy(*tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *leaves: Tensor) -> tuple[Leaves, Any]:
        return _copy(*leaves), in_dims


# A compiler that looked inside would refuse `jvp`; without it, it would get the second derivative
# wrong, silently. Called as they are, all derivatives are right in a compiled graph too.
@allow_in_compiled_graphs
def _sum(*leaves: Tensor) -> Leaves:
    found: Leaves = _Sum.apply(*leaves)  # type: ignore[no-untyped-call]
    return found


@allow_in_compiled_graphs
def _copy(*leaves: Tensor) -> Leaves:
    found: Leaves = _Copy.apply(*leaves)  # type: ignore[no-untyped-call]
    return found


def sum_over_ranks(values: Tree, ranks: Ranks) -> Tree:
    """Return the sum over ranks of every tensor, the same on all ranks; see the module.

    All ranks must call it, and whatever leads to it, in the same order.

    Args:
        values: tensors of the same shapes on every rank, which vary.
        ranks: from `join_ranks`.

    Raises:
        ValueError: this rank works on a task of its own, of which the others do not know.

    Cost:
        One message for each dtype, and none in the derivative.
    """
    if not ranks.are_many:
        return values
    _check_shared("sum_over_ranks")
    return tree.with_leaves(values, _sum(*tree.leaves(values)))


def mean_over_ranks(values: Tree, ranks: Ranks) -> Tree:
    """Return the mean over ranks of every tensor; as `sum_over_ranks`."""
    if not ranks.are_many:
        return values
    return tree.map(lambda leaf: leaf / ranks.size, sum_over_ranks(values, ranks))


def gather_rows(rows: Tree, count: int, ranks: Ranks) -> Tree:
    """Return the rows of all ranks in their order, leaves [count, ...]; each rank gives its own.

    It is a sum with zeros in place of the others' rows: one message for each dtype, and the parts
    may differ in length.
    """
    if not ranks.are_many:
        return rows
    part = ranks.part(count)

    def widen(leaf: Tensor) -> Tensor:
        if leaf.dtype == torch.bool:  # of which there are no sums
            leaf = leaf.to(torch.uint8)
        before = leaf.new_zeros(part.start, *leaf.shape[1:])
        after = leaf.new_zeros(count - part.stop, *leaf.shape[1:])
        return torch.cat([before, leaf, after])

    sums = sum_over_ranks(tree.map(widen, rows), ranks)
    return tree.map(lambda total, leaf: total.to(leaf.dtype), sums, rows)


def copy_to_ranks(values: Tree, ranks: Ranks) -> Tree:
    """Return the same tensors, where each rank uses them in its own way; see the module.

    Args:
        values: tensors that are replicated: the same numbers on every rank.
        ranks: from `join_ranks`.

    Raises:
        ValueError: this rank works on a task of its own, of which the others do not know.

    Cost:
        None; of its derivative, one message for each dtype.
    """
    if not ranks.are_many:
        return values
    _check_shared("copy_to_ranks")
    leaves = tree.leaves(values)
    # constants have no cotangents, which nobody needs to send
    places = [place for place, leaf in enumerate(leaves) if _may_vary(leaf)]
    if places:
        sums = running_sums()
        if sums is not None:
            sums.is_alone = False
        copies = _copy(*[leaves[place] for place in places])
        for place, copy in zip(places, copies, strict=True):
            leaves[place] = copy
    return tree.with_leaves(values, leaves)


def copy_beside_backward(values: Tree) -> Tree | None:
    """Return what `copy_to_ranks` does, with sums that are sent while the backward pass runs.

    It is for a first derivative in nothing else than these tensors: see `overlap`. Where that is
    not what is being taken, the answer is None.
    """
    sums = running_sums()
    leaves = tree.leaves(values)
    if sums is None or any(map(is_sharded, leaves)):
        return None
    places = [place for place, leaf in enumerate(leaves) if _may_vary(leaf)]
    copies = sums.copy([leaves[place] for place in places])
    if copies is None:
        return None
    for place, copy in zip(places, copies, strict=True):
        leaves[place] = copy
    return tree.with_leaves(values, leaves)


def _may_vary(leaf: Any) -> bool:
    """Return True if a leaf is differentiated; a compiler cannot be asked."""
    # a tensor that is spread over the ranks is already one for all of them
    if not is_differentiable(leaf) or is_sharded(leaf):
        return False
    return torch.compiler.is_compiling() or is_tracked(leaf) or has_tangent(leaf)


def _check_shared(name: str) -> None:
    if not torch.compiler.is_compiling() and is_busy():
        raise ValueError(
            f"{name} was called inside a task that this rank works on alone: the ranks share the "
            "tasks of a `meta_grad` or a `MetaTraining`, so none of them has the others' part of "
            "this one. Share either the tasks or what happens inside of one."
        )

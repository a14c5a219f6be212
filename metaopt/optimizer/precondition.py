"""The derivative of an update in the gradient, transposed, on a vector: D' v with D = du/dg."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.graph import is_varied
from metaopt.autodiff.plain import Recording, begin_at
from metaopt.autodiff.pullback import pull_back
from metaopt.exact_ops import any_order
from metaopt.optimizer.blocks import cut, flatten, is_plain, take
from metaopt.optimizer.by_name import Spread
from metaopt.optimizer.flat import is_elementwise, is_joinable
from metaopt.optimizer.parts import find_parts
from metaopt.optimizer.state import Arguments, Hyper, Leaves, State
from metaopt.optimizer.step import read_memory
from metaopt.optimizer.values import advance_schedules
from metaopt.spare import empty_like
from metaopt.torch_internals import foreach_copy_
from metaopt.transforms import is_unrecorded
from metaopt.tree import Tree

if TYPE_CHECKING:
    from metaopt.optimizer.optimizer import Optimizer


def precondition_by_vjp(
    optimizer: Optimizer, v: Tree, grads: Tree, state: State, params: Tree, loss: Tensor | None
) -> Tree:
    """Return D' v by the graph of the whole update; see `Optimizer.precondition`."""

    def update(grads: Tree) -> Tree:
        with any_order():
            return optimizer(grads, state, params, loss=loss)[0]

    (x,) = pull_back(update, (grads,), v, (True,))
    return x


def precondition_in_blocks(
    optimizer: Optimizer, v: Tree, grads: Tree, state: State, params: Tree, loss: Tensor | None
) -> Tree | None:
    """Return D' v of an update whose D is diagonal, block after block; None if it may not be."""
    if "steps" in state or not is_unrecorded():
        return None
    g, memory = tree.leaves(grads), read_memory(state, "slots", grads)
    given = [tree.leaves_like(grads, params, "params"), tree.leaves_like(grads, v, "v")]
    rows = [g, *given, *memory.values()]
    if not all(is_plain(leaf) and not leaf.is_complex() for row in rows for leaf in row):
        return None
    hyper = _find_values(optimizer, grads, state, loss)
    if hyper is None:
        return None
    parts, results = find_parts(hyper, range(len(g))), [empty_like(leaf) for leaf in g]
    if not all(_is_diagonal(optimizer, part.hyper) for part in parts):
        return None
    into, flat = flatten(results), [flatten(row) for row in rows]
    for part in parts:
        own, place = [part.take(row) for row in flat], part.take(into)
        for block in cut(own[0]):
            grad, weight, vector, *slots = [take(row, block) for row in own]
            named = state["shared"] | dict(zip(memory, slots, strict=True))
            call = Arguments(grad, weight, named, part.hyper, state["step"] + 1)
            _apply(optimizer, vector, call, take(place, block))
    return tree.with_leaves(grads, results)


def _find_values(
    optimizer: Optimizer, grads: Tree, state: State, loss: Tensor | None
) -> Hyper | None:
    """Return the hyperparameters' values; None if a schedule makes one of the gradients.

    A change of one entry of the gradient would then change the update everywhere.
    """
    variables = begin_at(tree.leaves(grads), again=False)
    with Recording(variables):
        hyper, _ = advance_schedules(optimizer, state, variables, loss, grads)
        values = [
            value
            for one in hyper.values()
            for value in (one.values.values() if type(one) is Spread else [one])
        ]
        if any(isinstance(value, Tensor) and is_varied(value) for value in values):
            return None
    return hyper


def _is_diagonal(optimizer: Optimizer, hyper: Hyper) -> bool:
    """Return True if each entry of the update depends on its own entry of the gradient alone."""
    kind = type(optimizer)
    says_so = is_joinable(kind) or "diagonal" in vars(kind)
    return says_so and is_elementwise(optimizer, hyper)


def _apply(optimizer: Optimizer, v: Leaves, call: Arguments, into: Leaves) -> None:
    """Write D' v, in closed form where the class knows one."""
    if "diagonal" in vars(type(optimizer)):  # not inherited: a subclass may have another update
        for d, x, result in zip(optimizer.diagonal(*call), v, into, strict=True):
            torch.mul(x, d, out=result)
        return

    def update(grads: Leaves) -> Leaves:
        return optimizer.update(grads, *call[1:])[0]

    foreach_copy_(into, pull_back(update, (call.grads,), v, (True,))[0])

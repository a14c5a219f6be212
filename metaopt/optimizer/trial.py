"""A large step that is tried, and made in place once nothing can fail any more.

Where a step must be undone if something after it fails, what was there before has to be kept. Of
Adam that would be a second copy of the parameters and both moments. But what comes after the step
looks at the parameters alone: they are computed first, and the gradient is kept; the rest moves in
its own memory when all is well. Two copies instead of three, and a second pass over the parameters,
block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from metaopt import tree
from metaopt.optimizer.blocks import cut, flatten, is_divisible, take
from metaopt.optimizer.flat import is_elementwise, is_joinable
from metaopt.optimizer.optimizer import Optimizer, is_plain
from metaopt.optimizer.parts import is_divided
from metaopt.optimizer.state import Arguments, Leaves, Slots, State, find_lists
from metaopt.optimizer.step import read_memory
from metaopt.optimizer.values import advance_schedules
from metaopt.spare import empty_like
from metaopt.torch_internals import foreach_copy_
from metaopt.tree import Tree


class Trial:
    """A step from a state and parameters that stay as they are until it is made.

    Attributes:
        before: the parameters from which it goes.
        params: those to which it leads.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        state: State,
        params: Tree,
        given: Arguments,
        schedules: Tree,
    ):
        self.before, self._state = params, state
        self._optimizer, self._given, self._schedules = optimizer, given, schedules
        results = [empty_like(leaf) for leaf in tree.leaves(params)]
        memory = find_lists(given.slots)
        for g, w, into, *slots in self._cut(results, memory):
            foreach_copy_(into, w)
            # what becomes of the memory is not needed yet
            scratch = dict(zip(memory, [[*map(torch.clone, slot)] for slot in slots], strict=True))
            self._move(g, into, scratch)
        self.params = tree.with_leaves(params, results)

    def make(self) -> State:
        """Make the step in the memory of the parameters and of the state; return the next state.

        With gradients off, as it was tried. An interruption meanwhile leaves them between the two.
        """
        memory, after = find_lists(self._given.slots), self._given.slots
        # block by block as it was tried: the same bits
        for g, w, _, *slots in self._cut(tree.leaves(self.before), memory):
            after = self._move(g, w, dict(zip(memory, slots, strict=True)))
        # a fused operation says nothing to a graph that a user has through the parameters
        increment_version(tree.leaves(self.before))
        return {
            **self._state,
            "step": self._given.step,
            "shared": {name: after[name] for name in self._state["shared"]},
            "schedules": self._schedules,
        }

    def _cut(self, results: Leaves, memory: dict[str, Leaves]) -> Iterator[list[Leaves]]:
        """Yield the parts of the gradients, parameters, results and each memory, by blocks."""
        before = tree.leaves(self.before)
        rows = [flatten(row) for row in (self._given.grads, before, results, *memory.values())]
        for block in cut(before):
            yield [take(row, block) for row in rows]

    def _move(self, grads: Leaves, params: Leaves, slots: dict[str, Leaves]) -> Slots:
        """Move one block in place; return its slots."""
        _, _, memory, hyper, step = self._given
        return self._optimizer.move_in_place(grads, params, {**memory, **slots}, hyper, step)


def try_step(
    optimizer: Optimizer, grads: Tree, state: State, params: Tree, loss: Tensor | None
) -> Trial | None:
    """Return a step to be made later; None where it is not elementwise, or too small to gain."""
    if "steps" in state or not (is_joinable(type(optimizer)) and is_plain(optimizer)):
        return None
    leaves, weights = tree.leaves(grads), tree.leaves_like(grads, params, "params")
    slots = read_memory(state, "slots", grads) | state["shared"]
    rows = [leaves, weights, *find_lists(slots).values()]
    if any(leaf is None or leaf.is_complex() for leaf in leaves):
        return None
    if not is_divisible(rows) or len({leaf.dtype for row in rows for leaf in row}) > 1:
        return None
    hyper, schedules = advance_schedules(optimizer, state, leaves, loss, grads)
    if is_divided(hyper) or not is_elementwise(optimizer, hyper):
        return None
    given = Arguments(leaves, weights, slots, hyper, state["step"] + 1)
    return Trial(optimizer, state, params, given, schedules)

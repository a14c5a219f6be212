"""What a scan is, apart from its tensors, and how it runs forward over a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.replay import Ambient
from metaopt.scan.disk import Disk
from metaopt.scan.nesting import plain_loops_inside
from metaopt.scan.revolve import Online, Revolve
from metaopt.scan.stream import Stream
from metaopt.tree import Structure, Tree

Step = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]

# (inputs, carry, x, (cotangents of the next carry, of out), wanted) -> (cotangents of (inputs,
# carry, x), out); None is zero. `wanted` is a tree of bools like (inputs, carry, x), and so are the
# cotangents, with None for leaves that are not wanted. `out` is that of the rebuilt step, by which
# one sees whether it is the same step; None if there was nothing to rebuild.
Pullback = Callable[
    [Tree, Tree, Tree, tuple[Tree, Tree], Tree], tuple[tuple[Tree, Tree, Tree], Tree]
]


@dataclass(frozen=True)
class Loop:
    """What a scan is, apart from its tensors; leaves are flat: inputs, carry, xs.

    Of a stream they are inputs, carry, x_0, x_1, ...: its batches are leaves one by one, since
    their shapes may differ.
    """

    step: Step
    pullback: Pullback
    structure: Structure
    shared: int  # leaves in `inputs`
    carried: int  # leaves in the carry
    length: int
    plan: Revolve
    disk: Disk | None
    streamed: bool = False
    times: tuple[int, ...] = ()  # whose carries are kept on the way forward, apart from 0
    # one a step, noted as the loop runs forward
    ambients: list[Ambient] = field(default_factory=list)
    # the structure of an out, noted at the first step
    outs: list[Structure] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many leaves there are."""
        before = self.shared + self.carried
        return before + (self.structure.num_leaves - before) * (self.length if self.streamed else 1)

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the leaves of (inputs, carry, xs), such that `[x[t] for x in xs]` are those of
        step t.
        """
        shared, carry, xs = self.cut(leaves)
        width = self.structure.num_leaves - self.shared - self.carried
        return shared, carry, [xs[i::width] for i in range(width)] if self.streamed else xs

    def cut(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the leaves of (inputs, carry, the rest)."""
        middle = self.shared + self.carried
        return (
            list(leaves[: self.shared]),
            list(leaves[self.shared : middle]),
            list(leaves[middle:]),
        )

    @property
    def width(self) -> int:
        """How many leaves an out has."""
        return self.outs[0].num_leaves

    def parts(
        self, outputs: Sequence[Any]
    ) -> tuple[list[Any], list[list[Any]], dict[int, list[Any]]]:
        """Return (last carry, leaves of each out, time -> kept carry) of what the Function returns,
        or of its cotangents.
        """
        end = self.carried + self.length * self.width
        outs = [
            list(outputs[start : start + self.width])
            for start in range(self.carried, end, self.width)
        ]
        carries = {
            t: list(outputs[end + i * self.carried :][: self.carried])
            for i, t in enumerate(self.times)
        }
        return list(outputs[: self.carried]), outs, carries

    def stored(self, carry: list[Any]) -> list[Any]:
        """Return the carry where it lies until it is needed again."""
        return moved(carry, ["cpu"] * len(carry)) if self.plan.store == "cpu" else carry

    def run(self, shared: list[Any], carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        """Make one step on flat leaves, of (next carry, out); inner scans are plain loops
        meanwhile.
        """
        trees = self.trees(shared, carry, x)
        with plain_loops_inside():
            after, out = self.step(*trees)
        if not tree.is_alike(trees[1], after):  # leaves find their places by their order
            tree.flatten_like(tree.flatten(trees[1])[1], after, "the carry that a step returns")
        leaves, structure = tree.flatten(out)
        if not self.outs:
            self.outs.append(structure)
        elif self.outs[0] != structure:
            tree.flatten_like(self.outs[0], out, "what a step gives out")
        return tree.leaves(after), leaves

    def trees(
        self, shared: Sequence[Any], carry: Sequence[Any], x: Sequence[Any]
    ) -> tuple[Tree, Tree, Tree]:
        """Return the trees (inputs, carry, x) with these leaves."""
        return tree.unflatten(self.structure, [*shared, *carry, *x])


def record(loop: Loop, leaves: list[Any], batches: Stream) -> tuple[Loop, list[Any], list[Tensor]]:
    """Run forward over a stream and return (the loop that it was, its leaves, what `ScanFunction`
    has to return).

    This happens outside the Function, for its inputs must be known, and batches may be computed
    from what requires grad. The steps see constants, so that no level of autograd or `torch.func`
    keeps a graph.
    """
    shared, carry = (
        [_constant(leaf) for leaf in leaves[: loop.shared]],
        [_constant(leaf) for leaf in leaves[loop.shared :]],
    )
    online, states, outs, rows = (
        Online(loop.plan.snapshots),
        dict[int, list[Any]](),
        [],
        list[Any](),
    )
    for t, batch in enumerate(batches.kept()):
        x = tree.leaves(batch)
        if t:
            gone = online.add(t)
            if gone is not None:
                del states[gone]
            states[t] = loop.stored(carry)
        loop.ambients.append(Ambient.now([*leaves, *x], loop.ambients[-1] if t else None))
        with torch.no_grad():
            carry, out = loop.run(shared, carry, [_constant(leaf) for leaf in x])
        outs += out
        rows += x
    loop = replace(loop, length=len(outs) // loop.width, streamed=True, times=tuple(states))
    return loop, [*leaves, *rows], [*carry, *outs, *chain(*states.values())]


def _constant(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def moved(leaves: list[Any], devices: Sequence[Any]) -> list[Any]:
    """Return the leaves on these devices."""
    return [leaf.to(device) for leaf, device in zip(leaves, devices, strict=True)]

"""What a scan is, apart from its tensors, and how it runs forward.

`run_forward` is the forward of every memory mode that rebuilds steps: states held on a device, in
main memory or on disk, rows that are stacked or come one by one. It needs a carry of tensors alone
and runs without a graph. The plain loop in `_scan` is another one, of three lines: there torch
keeps the graph or a compiler sees the steps, and the carry may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.replay import Ambient
from metaopt.scan.nesting import plain_loops_inside
from metaopt.scan.revolve import Keep, Revolve
from metaopt.scan.store import CpuStates, DeviceStates
from metaopt.tree import Tree

Step = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]

# (inputs, carry, x, (cotangents of the next carry, of out), wanted) -> (cotangents of (inputs,
# carry, x), out); None is zero. `wanted` is a tree of bools like (inputs, carry, x), and so are the
# cotangents, with None for leaves that are not wanted. `out` is that of the rebuilt step, by which
# one sees whether it is the same step; None if there was nothing to rebuild.
StepPullback = Callable[
    [Tree, Tree, Tree, tuple[Tree, Tree], Tree], tuple[tuple[Tree, Tree, Tree], Tree]
]


class ScanGiven(NamedTuple):
    """What a loop starts from, or the cotangents of that.

    Attributes:
        inputs: what every step reads.
        carry: the initial carry.
        xs: what the steps read one by one, stacked over time; of a stream, whose batches may have
            shapes of their own, a list.
    """

    inputs: Tree
    carry: Tree
    xs: Tree


class ScanResult(NamedTuple):
    """What a loop gives, or the cotangents of that.

    Attributes:
        carry: the last carry.
        outs: each step's out.
        states: time -> the carry before that step, where it is kept.
    """

    carry: Tree
    outs: list[Tree]
    states: dict[int, Tree]


@dataclass
class Run:
    """The steps taken so far.

    Attributes:
        carry: the carry after the last one of them.
        ambients: the random state and the autocast mode before each of them, and before the next.
        outs: what each of them gave out.
    """

    carry: Tree
    ambients: list[Ambient]
    outs: list[Tree] = field(default_factory=list)

    @property
    def time(self) -> int:
        """Number of steps taken."""
        return len(self.outs)


@dataclass
class Bars:
    """The cotangents found so far, from the last step down to that of a time.

    Attributes:
        time: of the step that was pulled back last.
        carry: those of the carry before that step, None for zero.
        inputs: those of what every step reads, summed over these steps.
        rows: those of each step's x, the last step first; None where not wanted.
    """

    time: int
    carry: Tree
    inputs: Tree
    rows: list[Tree] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """What a scan is, apart from its tensors.

    Attributes:
        step: (inputs, carry, x) -> (next carry, out).
        pullback: its derivative.
        held: number of states that are held, and where.
        streamed: whether xs is a list.
        ambients: one for each step. The list grows as the loop runs forward, since the `Run` has
            the same one.
    """

    step: Step
    pullback: StepPullback
    held: Revolve
    streamed: bool
    ambients: list[Ambient] = field(default_factory=list)

    def row(self, xs: Tree, time: int) -> Tree:
        """Return what the step of a time reads of xs."""
        return xs[time] if self.streamed else tree.index(xs, time)

    def step_once(self, inputs: Tree, carry: Tree, x: Tree) -> tuple[Tree, Tree]:
        """Make one step."""
        with plain_loops_inside():
            after, out = self.step(inputs, carry, x)
        tree.leaves_like(carry, after, "the carry that a step returns")
        if self.held.store == "disk":
            # as a file gives it back: the layout decides the order of sums, hence the last bits
            after = tree.map(Tensor.contiguous, after)
        return after, out

    def make_store(self, first: Tree, states: dict[int, Tree]) -> DeviceStates:
        """Return a store in memory that holds these states, for a loop with this initial carry."""
        return CpuStates(states, first) if self.held.store == "cpu" else DeviceStates(states)


def run_forward(
    loop: Loop, inputs: Tree, run: Run, rows: Iterable[Tree], note: Callable[[Run], object]
) -> None:
    """Make one more step for each row, without a graph.

    Args:
        loop: whose step it is.
        inputs: what every step reads.
        run: the steps taken so far; grows.
        rows: what the steps read one by one.
        note: called before each step, when its random state is known.
    """
    near = tree.leaves((inputs, run.carry))
    for x in rows:
        before = run.ambients[-1] if run.ambients else None
        run.ambients.append(Ambient.now([*near, *tree.leaves(x)], before))
        note(run)
        with torch.no_grad():
            run.carry, out = loop.step_once(inputs, run.carry, x)
        run.outs.append(out)
        tree.leaves_like(run.outs[0], out, "what a step gives out")


def run_in_memory(loop: Loop, given: ScanGiven, rows: Iterable[Tree], keep: Keep) -> ScanResult:
    """Run a loop forward and hold the states that `keep` chooses.

    Args:
        loop: what it is.
        given: what it starts from; its xs are not looked at.
        rows: what the steps read one by one.
        keep: says which states to keep.
    """
    states, run = loop.make_store(given.carry, {}), Run(given.carry, loop.ambients)

    def hold(run: Run) -> None:
        """Hold the present state if `keep` says so.

        Before the step, not after it: one that goes makes room for the one that comes.
        """
        gone = keep(run.time) if run.time else 0  # the initial state is at hand anyway
        if gone != run.time:
            if gone is not None:
                states.drop(gone)
            states.put(run.time, run.carry)

    run_forward(loop, given.inputs, run, rows, hold)
    return ScanResult(run.carry, run.outs, states.states)

"""The way back through a scan: steps are rebuilt and pulled back, the last one first."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.pullback import plus
from metaopt.scan.disk import Disk
from metaopt.scan.loop import Bars, Loop, ScanGiven, ScanResult
from metaopt.scan.nesting import plain_loops_inside
from metaopt.scan.rebuilt import check_rebuilt
from metaopt.scan.revolve import split
from metaopt.scan.store import Store
from metaopt.transforms import is_differentiable
from metaopt.tree import Tree


class Reversal:
    """One walk from the last step of a loop to the first.

    (a_inputs, a_carry, a_x)_t = vjp of step t at the carry of time t, with cotangents
    (a_carry_{t+1}, a_out_t); a_carry_t += the cotangent of the kept carry itself; a_inputs = sum
    over t.

    Args:
        loop: which is reversed; it has run.
        given: what it started from.
        needed: which leaves need a cotangent.
        states: the carries that are held.
        disk: what keeps the cotangents of a loop on disk as they are found.
    """

    def __init__(
        self, loop: Loop, given: ScanGiven, needed: ScanGiven, states: Store, disk: Disk | None
    ):
        self._loop, self._given, self._states, self._disk = loop, given, states, disk
        wanted = tree.map(lambda need, leaf: need and is_differentiable(leaf), needed, given)
        # One derivative is for all steps, so a leaf of x is wanted if it is in any of them; and the
        # carry's is always, as the way to the steps before.
        of_x = tree.map(lambda *each: any(each), *wanted.xs) if loop.streamed else wanted.xs
        self._wanted = (wanted.inputs, tree.map(is_differentiable, given.carry), of_x)
        # time -> the first leaf of the out of that step, made again
        self._rebuilt: dict[int, Tensor] = {}

    def run(self, cotangents: ScanResult, firsts: list[Tensor | None]) -> ScanGiven:
        """Return the cotangents of what the loop started from.

        The stack holds the times whose carries are at hand; steps from the topmost one to
        `bars.time` remain to be pulled back before it is dropped.

        Args:
            cotangents: of what it gave.
            firsts: the first leaf of each step's out.
        """
        given, states, disk = self._given, self._states, self._disk
        bars = Bars(len(firsts), cotangents.carry, tree.nones(given.inputs))
        if disk is not None:
            near = given._replace(xs=self._loop.row(given.xs, 0))
            disk.resume_back(bars, near, (cotangents, self._wanted))
        stack = [t for t in (0, *states.times()) if t < bars.time]
        now, carry = 0, given.carry
        while stack:
            low, high = stack[-1], bars.time
            if now != low:
                now, carry = low, states.get(low) if low else given.carry
            if high - low > 1:
                room = max(self._loop.held.snapshots - len(stack) + 1, 1)
                now = low + split(high - low, room)
                carry = self._replay(carry, low, now)
                if high - now > 1:
                    states.put(now, carry)
                stack.append(now)
                continue
            self._pull_back(low, carry, bars, cotangents)
            if disk is not None:
                disk.note_back(bars)
            states.drop(low)
            stack.pop()
        check_rebuilt(self._rebuilt, firsts)
        if disk is not None:
            disk.finish()
        rows = bars.rows[::-1]
        return ScanGiven(bars.inputs, bars.carry, rows if self._loop.streamed else _stack(rows))

    def _replay(self, carry: Tree, low: int, high: int) -> Tree:
        """Make the steps from a time to a later one again, from the carry of the former."""
        for t in range(low, high):
            with self._loop.ambients[t].restored():
                row = self._loop.row(self._given.xs, t)
                carry, _ = self._loop.step_once(self._given.inputs, carry, row)
        return carry

    def _pull_back(self, t: int, carry: Tree, bars: Bars, cotangents: ScanResult) -> None:
        """Take the cotangents from after step t to before it."""
        x = self._loop.row(self._given.xs, t)
        after = (bars.carry, cotangents.outs[t])
        with self._loop.ambients[t].restored(), plain_loops_inside():
            (to_inputs, to_carry, to_x), out = self._loop.pullback(
                self._given.inputs, carry, x, after, self._wanted
            )
        if out is not None:
            self._rebuilt[t] = tree.leaves(out)[0].detach()
        if t in cotangents.states:
            to_carry = tree.map(plus, to_carry, cotangents.states[t])
        bars.time, bars.carry = t, to_carry
        bars.inputs = tree.map(plus, bars.inputs, to_inputs)
        bars.rows.append(tree.map(_fill, self._wanted[2], to_x, x))


def _fill(wanted: bool, bar: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a cotangent of x that can be stacked with those of other steps."""
    return torch.zeros_like(like) if wanted and bar is None else bar


def _stack(rows: list[Tree]) -> Tree:
    """Return the cotangents of xs whose rows have these."""
    return tree.map(lambda *bars: None if bars[0] is None else torch.stack(bars), *rows)

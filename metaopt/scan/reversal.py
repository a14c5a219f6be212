"""The way back through a scan: steps are rebuilt and pulled back, the last one first."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.pullback import plus
from metaopt.scan.disk import Disk, contiguous
from metaopt.scan.loop import Loop, moved
from metaopt.scan.nesting import plain_loops_inside
from metaopt.scan.revolve import split
from metaopt.scan.tensor_file import digest_of
from metaopt.transforms import innermost, is_differentiable, outside_transforms


class Reversal:
    """One walk from the last step of a loop to the first.

    (a_shared, a_carry, a_x)_t = vjp of step t at the carry of time t, with cotangents
    (a_carry_{t+1}, a_out_t); a_carry_t += the cotangent of the kept carry itself;  a_shared = sum
    over t.
    """

    def __init__(self, ctx: Any, tensors: Sequence[Tensor | None]):
        loop: Loop = ctx.loop
        saved = zip(tensors[: loop.count], ctx.constants, strict=True)
        leaves = [constant if tensor is None else tensor for tensor, constant in saved]
        self.loop, (self.shared, self.first, self.xs) = loop, loop.split(leaves)
        kept, self.firsts = (
            tensors[loop.count : len(tensors) - loop.length],
            tensors[len(tensors) - loop.length :],
        )
        outputs: list[Any] = [None] * (loop.carried + loop.length * loop.width)
        _, _, states = loop.parts([*outputs, *kept])
        self.states: dict[int, list[Any]] | Disk = states if loop.disk is None else loop.disk
        needed = ctx.needs_input_grad[1 : 1 + loop.count]
        of_shared, _, of_xs = loop.split(
            [*map(operator.and_, needed, map(is_differentiable, leaves))]
        )
        self.of_xs = [any(column) for column in of_xs] if loop.streamed else of_xs
        self.wanted = loop.trees(of_shared, [*map(is_differentiable, self.first)], self.of_xs)
        self.bar_shared: list[Tensor | None] = [None] * loop.shared
        self.bar_xs: list[list[Tensor]] = [[] for _ in self.xs]
        self.recorded = len(ctx.needs_input_grad) - 1 - loop.count
        # time -> the first leaf of the out of that step, made again
        self.rebuilt: dict[int, Tensor] = {}

    def run(self, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the Function's inputs.

        The stack holds the times whose carries are at hand; steps from the topmost one to `high`
        remain to be pulled back before it is dropped.
        """
        bar, of_outs, of_kept = self.loop.parts(cotangents)
        high, origin, disk = self.loop.length, "", self.loop.disk
        if disk is not None:
            origin = digest_of([*cotangents, *tree.leaves(self.wanted)])
            high, bar = self._resumed(disk, origin, bar)
        stack = [t for t in (0, *self.states) if t < high]
        now, carry = 0, self.first
        while stack:
            low = stack[-1]
            if now != low:
                now, carry = low, self._taken(low)
            if high - low > 1:
                now = low + split(high - low, max(self.loop.plan.snapshots - len(stack) + 1, 1))
                carry = self._advanced(carry, low, now)
                if high - now > 1:
                    self.states[now] = self.loop.stored(carry)
                stack.append(now)
                continue
            bar = self._pull_back(low, carry, bar, of_outs[low])
            bar = [
                plus(pulled, own)
                for pulled, own in zip(bar, of_kept.get(low, [None] * len(bar)), strict=True)
            ]
            if disk is not None:
                bar = self._written(disk, origin, low, bar)
            self.states.pop(low, None)
            high = stack.pop()
        self._check_rebuilt()
        if disk is not None:
            disk.finish()
        return (None, *self.bar_shared, *bar, *self._of_xs(), *[None] * self.recorded)

    def _taken(self, time: int) -> list[Any]:
        """Return a state that is held, on the devices where steps run."""
        if time == 0:
            return self.first
        return moved(self.states[time], [leaf.device for leaf in self.first])

    def _advanced(self, carry: list[Any], low: int, time: int) -> list[Any]:
        for t in range(low, time):
            with self.loop.ambients[t].restored():
                carry, _ = self.loop.run(self.shared, carry, [x[t] for x in self.xs])
            if self.loop.disk is not None:
                carry = contiguous(carry)
        return carry

    def _resumed(
        self, disk: Disk, origin: str, bar: list[Tensor | None]
    ) -> tuple[int, list[Tensor | None]]:
        """Take over what a killed backward pass had found; return the time it had come down to and
        the cotangents there.
        """
        high, bars, rows = disk.pulled(self.loop.length, origin)
        if high == self.loop.length:
            return high, bar
        self.bar_shared = [_from(bars, f"shared.{i}", leaf) for i, leaf in enumerate(self.shared)]
        for i, is_wanted in enumerate(self.of_xs):
            self.bar_xs[i] = (
                [row[str(i)].to(self.xs[i][0].device) for row in rows] if is_wanted else []
            )
        return high, [_from(bars, f"carry.{i}", leaf) for i, leaf in enumerate(self.first)]

    def _written(
        self, disk: Disk, origin: str, time: int, bar: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Write what has been found down to a time; return the cotangents of its carry in the
        layout that they are read in.
        """
        found = {f"carry.{i}": part for i, part in enumerate(bar)} | {
            f"shared.{i}": part for i, part in enumerate(self.bar_shared)
        }
        disk.put_pulled(
            time,
            {name: part for name, part in found.items() if part is not None},
            {str(i): bars[-1] for i, bars in enumerate(self.bar_xs) if bars},
            origin,
        )
        self.bar_shared = [part if part is None else part.contiguous() for part in self.bar_shared]
        return [part if part is None else part.contiguous() for part in bar]

    def _of_xs(self) -> list[Tensor | None]:
        """Return the cotangents of the leaves of xs; they were found from the last step to the
        first.
        """
        if not self.loop.streamed:
            return [torch.stack(bars[::-1]) if bars else None for bars in self.bar_xs]
        none = [None] * self.loop.length
        return [
            bar
            for row in zip(*[bars[::-1] or none for bars in self.bar_xs], strict=True)
            for bar in row
        ]

    def _pull_back(
        self, t: int, carry: list[Any], bar: list[Tensor | None], of_out: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Add step t's part to the cotangents of inputs and xs, and return that of its carry."""
        x = [leaf[t] for leaf in self.xs]
        _, bar_after, _ = self.loop.trees([None] * len(self.shared), bar, [None] * len(x))
        with self.loop.ambients[t].restored(), plain_loops_inside():
            cotangents = bar_after, tree.unflatten(self.loop.outs[0], of_out)
            bars, out = self.loop.pullback(
                *self.loop.trees(self.shared, carry, x), cotangents, self.wanted
            )
        if out is not None:
            self.rebuilt[t] = tree.leaves(out)[0].detach()
        to_shared, to_carry, to_x = self.loop.cut(tree.leaves(bars))
        self.bar_shared = [*map(plus, self.bar_shared, to_shared)]
        for bars_so_far, row, part, is_wanted in zip(self.bar_xs, x, to_x, self.of_xs, strict=True):
            if is_wanted:
                bars_so_far.append(torch.zeros_like(row) if part is None else part)
        return to_carry

    def _check_rebuilt(self) -> None:
        """Raise if a rebuilt step was another one than the step that was taken.

        At the end, where one look at the device is enough. Rounding may differ: a rebuilt step is
        computed with a graph.
        """
        pairs = [
            (t, innermost(value), self.firsts[t])
            for t, value in sorted(self.rebuilt.items())
            if is_differentiable(value)
        ]
        times, found, taken = list[int](), list[Tensor](), list[Tensor]()
        for t, again, first in pairs:
            before = again if first is None else innermost(first)
            if again.shape == before.shape:
                times += [t] * again.numel()  # a `vmap` has a loss for each of its rows
                found.append(again.detach().reshape(-1))
                taken.append(before.detach().reshape(-1))
        if times and not found[0].is_meta:
            self._compare(times, found, taken)

    @staticmethod
    def _compare(times: list[int], rebuilt: list[Tensor], before: list[Tensor]) -> None:
        """Raise if two losses differ by more than rounding; each has its time."""
        with outside_transforms(), torch.no_grad():
            found, taken = torch.cat(rebuilt), torch.cat(before)
            size = taken.abs().nan_to_num(posinf=0)
            room = torch.finfo(taken.dtype).eps ** 0.5 * size.clamp(min=1e-3 * size.max())
            is_same = (
                ((found - taken).abs() <= room) | (found == taken) | (found.isnan() & taken.isnan())
            )
            others = (~is_same).nonzero().reshape(-1).tolist()
        if others:
            first = others[0]
            raise ValueError(
                "A step that is made again on the way back must be the step that was taken, but "
                "the loss of step "
                f"{times[first]} was {taken[first].tolist():.6g} and is now "
                f"{found[first].tolist():.6g}. Only torch's global "
                "generators are wound back: does the loss draw from `random` or numpy, does it "
                "count its calls, was a model switched between train() and eval() meanwhile? Draw "
                "with torch, pass the numbers in `batches`, or use "
                'memory="full".'
            )


def _from(bars: dict[str, Tensor], name: str, leaf: Any) -> Tensor | None:
    return bars[name].to(leaf.device) if name in bars else None

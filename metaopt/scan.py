"""The one differentiable loop: carry_{t+1}, out_t = step(inputs, carry_t, x_t) for t = 0, ..., length - 1."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt.compiled import compiled
from metaopt.disk import Disk, contiguous
from metaopt.pullback import plus, pull_back
from metaopt.replay import Ambient
from metaopt.revolve import Online, Revolve, kept, split
from metaopt.stream import Stream
from metaopt.tensor_file import digest_of
from metaopt.transforms import alive, is_differentiable, is_tracked, tracking_levels, values_are_readable
from metaopt.tree import Structure, Tree

Memory = Literal["full", "steps"] | Revolve
Step = Callable[[Tree, Tree, Tree], tuple[Tree, Tensor]]
# (inputs, carry, x, (cotangents of the next carry, of out), wanted) -> cotangents of (inputs, carry, x); None is zero. `wanted`
# is a tree of bools like (inputs, carry, x), and so is what comes back, with None for leaves that are not wanted.
Pullback = Callable[[Tree, Tree, Tree, tuple[Tree, Tensor | None], Tree], tuple[Tree, Tree, Tree]]

# While one scan runs forward or backward as a Function, scans inside its step run as plain loops: a Function inside
# another one's forward or backward is beyond torch.func. Memory stays bounded, since one outer step's graph exists at a time.
_inside_step: ContextVar[bool] = ContextVar("inside_step", default=False)


@contextmanager
def plain_loops_inside() -> Iterator[None]:
    """While entered, scans run as plain loops."""
    token = _inside_step.set(True)
    try:
        yield
    finally:
        _inside_step.reset(token)


def scan(
    step: Step,
    inputs: Tree,
    carry: Tree,
    xs: Tree | Stream,
    length: int | None,
    memory: Memory,
    *,
    pullback: Pullback | None = None,
    compile: bool = False,
) -> tuple[Tree, Tensor]:
    """Run `step` `length` times and return (last carry, outs stacked over time), differentiable in every tensor.

    Args:
        step: (inputs, carry, x) -> (next carry, out tensor); it must reach whatever is to be differentiated through these.
        inputs: what every step reads.
        carry: the initial carry; each step keeps its structure, shapes and dtypes.
        xs: a tree whose leaves have the leading axis `length`; step t gets row t. Or a `Stream`: step t gets what it yields
            next, until it ends.
        length: number of steps; None for a `Stream`.
        memory: "full" keeps the graph of every step; "steps" keeps every carry and rebuilds one step at a time on the way
            back, which costs one more forward run; `Revolve(snapshots)` keeps few carries and recomputes the others. All are
            exact for first and second derivatives. A step that runs again draws the same global random numbers under the
            same autocast. Under `torch.compile` the loop is always unrolled, and the compiler decides what to keep.
        pullback: the derivative of `step`, a differentiable function of its tensors; by default torch's own. It is used where a
            step is rebuilt, so never by "full". Whoever gives it compiles it.
        compile: compile one step and its derivative, for any length. Inside another compiled function or scan this changes nothing.
    """
    given = (inputs, carry, xs.first if isinstance(xs, Stream) else xs)
    tracing = torch.compiler.is_compiling()
    compile = compile and not tracing and not _inside_step.get()
    # A compiler cannot ask who tracks a tensor, and nobody can ask a batch that has not come yet.
    needed = torch.is_grad_enabled() and (isinstance(xs, Stream) or tracing or _any_tracked(tree.leaves(given)))
    plain = tracing or not needed or memory == "full" or _inside_step.get()
    if plain and not compile:
        return _plain_loop(step, inputs, carry, xs, length)
    for path, leaf in tree.named_leaves(carry):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"Parameters and optimizer state must be tensors to be kept from step to step, got {type(leaf).__name__} "
                f'at {path}. Make it a tensor, or use memory="full" without `compile`.'
            )
    if plain:
        return _plain_loop(compiled(step), inputs, tree.map(_as_later, carry) if needed else carry, xs, length)
    leaves, structure = tree.flatten(given)
    plan = memory if isinstance(memory, Revolve) else Revolve(snapshots=length or sys.maxsize)
    disk = None if plan.directory is None else Disk(Path(plan.directory))
    if pullback is None:
        pullback = functools.partial(_pull_back_step, step)
        pullback = compiled(_dense(pullback)) if compile else pullback
    step = compiled(step) if compile else step
    loop = _Loop(step, pullback, structure, len(tree.leaves(inputs)), len(tree.leaves(carry)), length or 0, plan, disk)
    outputs: Sequence[Any] = ()
    if isinstance(xs, Stream) and disk is not None:  # a directory belongs to one loop with all its batches
        rows = list(xs.kept())
        leaves = [*leaves[: loop.shared + loop.carried], *tree.leaves(rows)]
        if not _any_tracked(leaves):
            return _plain_loop(step, inputs, carry, rows, None)
        loop = replace(loop, length=len(rows), streamed=True)
    elif isinstance(xs, Stream):
        loop, leaves, outputs = _record(loop, leaves[: loop.shared + loop.carried], xs)
    elif disk is None:
        loop = replace(loop, times=kept(loop.length, plan.snapshots))
    if _any_tracked(leaves):
        outputs = _ScanFunction.apply(loop, *leaves, *outputs)
    last, outs, _ = loop.parts(outputs)
    return tree.unflatten(tree.flatten(carry)[1], last), torch.stack(outs)


def check_memory(memory: Memory) -> None:
    """Raise ValueError for a memory mode that does not exist."""
    if not isinstance(memory, Revolve) and memory not in ("full", "steps"):
        raise ValueError(f'`memory` must be "full", "steps" or Revolve(snapshots), got {memory!r}.')


def _pull_back_step(
    step: Step, inputs: Tree, carry: Tree, x: Tree, cotangents: tuple[Tree, Tensor | None], wanted: Tree
) -> tuple[Tree, Tree, Tree]:
    return pull_back(step, (inputs, carry, x), cotangents, wanted)


def _dense(pullback: Pullback) -> Pullback:
    """Give the carry's zero cotangents as tensors: None would make of the last step, which has many, a function of its own."""

    def call(inputs: Tree, carry: Tree, x: Tree, cotangents: tuple[Tree, Tensor | None], wanted: Tree) -> tuple[Tree, Tree, Tree]:
        of_carry, of_out = cotangents
        of_carry = tree.map(_or_zeros, of_carry, carry)
        return pullback(inputs, carry, x, (of_carry, of_out), wanted)

    return call


def _as_later(leaf: Tensor) -> Tensor:
    """Make of a leaf of the first carry what it is in later ones, no parameter and differentiable: one compiled step is for all."""
    if leaf.requires_grad or not is_differentiable(leaf):
        return leaf.view_as(leaf)
    return leaf.detach().requires_grad_()


def _any_tracked(leaves: list[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and is_tracked(leaf) for leaf in leaves)


def _plain_loop(step: Step, inputs: Tree, carry: Tree, xs: Any, length: int | None) -> tuple[Tree, Tensor]:
    outs = []
    for x in xs if length is None else (tree.index(xs, t) for t in range(length)):
        carry, out = step(inputs, carry, x)
        outs.append(out)
    return carry, torch.stack(outs)


@dataclass(frozen=True)
class _Loop:
    """What a scan is, apart from its tensors; leaves are flat: inputs, carry, xs.

    Of a stream they are inputs, carry, x_0, x_1, ...: its batches are leaves one by one, since their shapes may differ.
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
    ambients: list[Ambient] = field(default_factory=list)  # one a step, noted as the loop runs forward

    @property
    def count(self) -> int:
        """How many leaves there are."""
        before = self.shared + self.carried
        return before + (self.structure.num_leaves - before) * (self.length if self.streamed else 1)

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the leaves of (inputs, carry, xs), such that `[x[t] for x in xs]` are those of step t."""
        shared, carry, xs = self.cut(leaves)
        width = self.structure.num_leaves - self.shared - self.carried
        return shared, carry, [xs[i::width] for i in range(width)] if self.streamed else xs

    def cut(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the leaves of (inputs, carry, the rest)."""
        middle = self.shared + self.carried
        return list(leaves[: self.shared]), list(leaves[self.shared : middle]), list(leaves[middle:])

    def parts(self, outputs: Sequence[Any]) -> tuple[list[Any], list[Any], dict[int, list[Any]]]:
        """Return (last carry, outs, time -> kept carry) of what the Function returns, or of its cotangents."""
        outs = self.carried + self.length
        carries = {t: list(outputs[outs + i * self.carried :][: self.carried]) for i, t in enumerate(self.times)}
        return list(outputs[: self.carried]), list(outputs[self.carried : outs]), carries

    def stored(self, carry: list[Any]) -> list[Any]:
        """Return the carry where it lies until it is needed again."""
        return _moved(carry, ["cpu"] * len(carry)) if self.plan.store == "cpu" else carry

    def run(self, shared: list[Any], carry: list[Any], x: list[Any]) -> tuple[list[Any], Tensor]:
        """Make one step on flat leaves; inner scans are plain loops meanwhile."""
        trees = self.trees(shared, carry, x)
        with plain_loops_inside():
            after, out = self.step(*trees)
        if not tree.is_alike(trees[1], after):  # leaves find their places by their order
            tree.flatten_like(tree.flatten(trees[1])[1], after, "the carry that a step returns")
        return tree.leaves(after), out

    def trees(self, shared: Sequence[Any], carry: Sequence[Any], x: Sequence[Any]) -> tuple[Tree, Tree, Tree]:
        """Return the trees (inputs, carry, x) with these leaves."""
        return tree.unflatten(self.structure, [*shared, *carry, *x])


def _record(loop: _Loop, leaves: list[Any], batches: Stream) -> tuple[_Loop, list[Any], list[Tensor]]:
    """Run forward over a stream and return (the loop that it was, its leaves, what `_ScanFunction` has to return).

    This happens outside the Function, for its inputs must be known, and batches may be computed from what requires grad.
    The steps see constants, so that no level of autograd or `torch.func` keeps a graph.
    """
    shared, carry = [_constant(leaf) for leaf in leaves[: loop.shared]], [_constant(leaf) for leaf in leaves[loop.shared :]]
    online, states, outs, rows = Online(loop.plan.snapshots), dict[int, list[Any]](), [], list[Any]()
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
        outs.append(out)
        rows += x
    loop = replace(loop, length=len(outs), streamed=True, times=tuple(states))
    return loop, [*leaves, *rows], [*carry, *outs, *chain(*states.values())]


def _constant(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class _ScanFunction(torch.autograd.Function):
    """Run the loop without a graph and return the last carry, the outs and the kept carries.

    The kept carries being outputs makes the backward differentiable again, with exact second derivatives. Of a loop that has
    run already, these outputs follow the leaves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Loop, *args: Any) -> tuple[Tensor, ...]:
        leaves, recorded = args[: loop.count], args[loop.count :]
        if recorded:
            last = tuple(tensor.clone() for tensor in recorded[: loop.carried])  # these may be written to
            return *last, *[tensor.view_as(tensor) for tensor in recorded[loop.carried :]]
        shared, carry, xs = loop.split(leaves)
        if loop.disk is not None:
            facts = {"length": str(loop.length), "snapshots": str(loop.plan.snapshots), "inputs": digest_of(leaves)}
            held = [*kept(loop.length, loop.plan.snapshots), loop.length]
            near = [*shared, *carry, *[x[0] for x in xs]]

            def step(t: int, carry: list[Any]) -> tuple[list[Any], Tensor]:
                return loop.run(shared, carry, [x[t] for x in xs])

            return _distinct(loop.disk.forward(step, carry, held, facts, near, loop.ambients), {id(leaf) for leaf in leaves})
        times, outs, snapshots = set(loop.times), [], []
        for t in range(loop.length):
            if t in times:
                snapshots += loop.stored(carry)
            loop.ambients.append(Ambient.now(leaves, loop.ambients[-1] if t else None))
            carry, out = loop.run(shared, carry, [x[t] for x in xs])
            outs.append(out)
        return _distinct([*carry, *outs, *snapshots], {id(leaf) for leaf in leaves})

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loop, *args = inputs
        leaves = args[: loop.count]
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[tensor for tensor in output if not is_differentiable(tensor)])
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        snapshots = output[loop.carried + loop.length :]
        ctx.save_for_backward(*[leaf if isinstance(leaf, Tensor) else None for leaf in leaves], *snapshots)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, cotangents = tuple(map(alive, ctx.saved_tensors)), tuple(map(alive, cotangents))
        again = torch.is_grad_enabled() and _is_differentiated_again(saved, cotangents)
        disk: Disk | None = ctx.loop.disk
        with torch.set_grad_enabled(again), nullcontext() if disk is None else disk.reopened(again):
            return _Reversal(ctx, saved).run(cotangents)


def _is_differentiated_again(*tensors: Iterable[Tensor | None]) -> bool:
    """Say whether the backward pass itself must be recorded.

    `torch.func.grad` always asks for that, which would keep every rebuilt step. The graph is of use only to a level below the
    one whose backward pass this is. In plain autograd the caller says so by `create_graph`.
    """
    if values_are_readable():
        return True
    return len({level for tensor in chain(*tensors) if tensor is not None for level in tracking_levels(tensor)}) > 1


class _Reversal:
    """One walk from the last step of a loop to the first.

    (a_shared, a_carry, a_x)_t = vjp of step t at the carry of time t, with cotangents (a_carry_{t+1}, a_out_t);
    a_carry_t += the cotangent of the kept carry itself;  a_shared = sum over t.
    """

    def __init__(self, ctx: Any, tensors: Sequence[Tensor | None]):
        loop: _Loop = ctx.loop
        saved = zip(tensors[: loop.count], ctx.constants, strict=True)
        leaves = [constant if tensor is None else tensor for tensor, constant in saved]
        self.loop, (self.shared, self.first, self.xs) = loop, loop.split(leaves)
        outputs: list[Any] = [None] * (loop.carried + loop.length)
        _, _, states = loop.parts([*outputs, *tensors[loop.count :]])
        self.states: dict[int, list[Any]] | Disk = states if loop.disk is None else loop.disk
        needed = ctx.needs_input_grad[1 : 1 + loop.count]
        of_shared, _, of_xs = loop.split([*map(operator.and_, needed, map(is_differentiable, leaves))])
        self.of_xs = [any(column) for column in of_xs] if loop.streamed else of_xs
        self.wanted = loop.trees(of_shared, [*map(is_differentiable, self.first)], self.of_xs)
        self.bar_shared: list[Tensor | None] = [None] * loop.shared
        self.bar_xs: list[list[Tensor]] = [[] for _ in self.xs]
        self.recorded = len(ctx.needs_input_grad) - 1 - loop.count

    def run(self, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the Function's inputs.

        The stack holds the times whose carries are at hand; steps from the topmost one to `high` remain to be pulled back
        before it is dropped.
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
            bar = [plus(pulled, own) for pulled, own in zip(bar, of_kept.get(low, [None] * len(bar)), strict=True)]
            if disk is not None:
                bar = self._written(disk, origin, low, bar)
            self.states.pop(low, None)
            high = stack.pop()
        if disk is not None:
            disk.finish()
        return (None, *self.bar_shared, *bar, *self._of_xs(), *[None] * self.recorded)

    def _taken(self, time: int) -> list[Any]:
        """Return a state that is held, on the devices where steps run."""
        if time == 0:
            return self.first
        return _moved(self.states[time], [leaf.device for leaf in self.first])

    def _advanced(self, carry: list[Any], low: int, time: int) -> list[Any]:
        for t in range(low, time):
            with self.loop.ambients[t].restored():
                carry, _ = self.loop.run(self.shared, carry, [x[t] for x in self.xs])
            if self.loop.disk is not None:
                carry = contiguous(carry)
        return carry

    def _resumed(self, disk: Disk, origin: str, bar: list[Tensor | None]) -> tuple[int, list[Tensor | None]]:
        """Take over what a killed backward pass had found; return the time it had come down to and the cotangents there."""
        high, bars, rows = disk.pulled(self.loop.length, origin)
        if high == self.loop.length:
            return high, bar
        self.bar_shared = [_from(bars, f"shared.{i}", leaf) for i, leaf in enumerate(self.shared)]
        for i, is_wanted in enumerate(self.of_xs):
            self.bar_xs[i] = [row[str(i)].to(self.xs[i][0].device) for row in rows] if is_wanted else []
        return high, [_from(bars, f"carry.{i}", leaf) for i, leaf in enumerate(self.first)]

    def _written(self, disk: Disk, origin: str, time: int, bar: list[Tensor | None]) -> list[Tensor | None]:
        """Write what has been found down to a time; return the cotangents of its carry in the layout that they are read in."""
        found = {f"carry.{i}": part for i, part in enumerate(bar)} | {f"shared.{i}": part for i, part in enumerate(self.bar_shared)}
        disk.put_pulled(
            time,
            {name: part for name, part in found.items() if part is not None},
            {str(i): bars[-1] for i, bars in enumerate(self.bar_xs) if bars},
            origin,
        )
        self.bar_shared = [part if part is None else part.contiguous() for part in self.bar_shared]
        return [part if part is None else part.contiguous() for part in bar]

    def _of_xs(self) -> list[Tensor | None]:
        """Return the cotangents of the leaves of xs; they were found from the last step to the first."""
        if not self.loop.streamed:
            return [torch.stack(bars[::-1]) if bars else None for bars in self.bar_xs]
        none = [None] * self.loop.length
        return [bar for row in zip(*[bars[::-1] or none for bars in self.bar_xs], strict=True) for bar in row]

    def _pull_back(self, t: int, carry: list[Any], bar: list[Tensor | None], of_out: Tensor | None) -> list[Tensor | None]:
        """Add step t's part to the cotangents of inputs and xs, and return that of its carry."""
        x = [leaf[t] for leaf in self.xs]
        _, bar_after, _ = self.loop.trees([None] * len(self.shared), bar, [None] * len(x))
        with self.loop.ambients[t].restored(), plain_loops_inside():
            bars = self.loop.pullback(*self.loop.trees(self.shared, carry, x), (bar_after, of_out), self.wanted)
        to_shared, to_carry, to_x = self.loop.cut(tree.leaves(bars))
        self.bar_shared = [*map(plus, self.bar_shared, to_shared)]
        for bars_so_far, row, part, is_wanted in zip(self.bar_xs, x, to_x, self.of_xs, strict=True):
            if is_wanted:
                bars_so_far.append(torch.zeros_like(row) if part is None else part)
        return to_carry


def _moved(leaves: list[Any], devices: Sequence[Any]) -> list[Any]:
    return [leaf.to(device) for leaf, device in zip(leaves, devices, strict=True)]


def _from(bars: dict[str, Tensor], name: str, leaf: Any) -> Tensor | None:
    return bars[name].to(leaf.device) if name in bars else None


def _distinct(tensors: list[Tensor], seen: set[int]) -> tuple[Tensor, ...]:
    """Clone the tensors met before: a Function may not return one tensor twice, nor an input as it is."""
    fresh = []
    for tensor in tensors:
        fresh.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(fresh[-1]))
    return tuple(fresh)


def _or_zeros(cotangent: Tensor | None, like: Any) -> Tensor | None:
    return torch.zeros_like(like) if cotangent is None and is_differentiable(like) else cotangent

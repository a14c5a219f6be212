"""The one differentiable loop: carry_{t+1}, out_t = step(inputs, carry_t, x_t) for t = 0, ..., length - 1."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt.compiled import compiled
from metaopt.pullback import plus, pull_back
from metaopt.replay import Ambient
from metaopt.revolve import Revolve, kept, split
from metaopt.transforms import alive, is_tracked, tracking_levels, values_are_readable
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
    xs: Tree,
    length: int,
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
        xs: a tree whose leaves have the leading axis `length`; step t gets row t.
        length: number of steps.
        memory: "full" keeps the graph of every step; "steps" keeps every carry and rebuilds one step at a time on the way
            back, which costs one more forward run; `Revolve(snapshots)` keeps few carries and recomputes the others. All are
            exact for first and second derivatives. A step that runs again draws the same global random numbers under the
            same autocast. Under `torch.compile` the loop is always unrolled, and the compiler decides what to keep.
        pullback: the derivative of `step`, a differentiable function of its tensors; by default torch's own. It is used where a
            step is rebuilt, so never by "full".
        compile: compile what runs: by "full" the whole loop, otherwise, and where no gradient is needed, one step and its pullback.
            Inside another compiled function or scan this changes nothing.
    """
    leaves, structure = tree.flatten((inputs, carry, xs))
    compile = compile and not torch.compiler.is_compiling() and not _inside_step.get()
    if not torch.compiler.is_compiling() and not _needs_gradient(leaves):  # a compiler cannot ask who tracks a tensor
        return _plain_loop(compiled(step) if compile else step, inputs, carry, xs, length)
    if memory == "full" or torch.compiler.is_compiling() or _inside_step.get():
        whole = functools.partial(_plain_loop, length=length)
        return (compiled(whole) if compile else whole)(step, inputs, carry, xs)
    for path, leaf in tree.named_leaves(carry):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"Parameters and optimizer state must be tensors to be kept from step to step, got {type(leaf).__name__} "
                f'at {path}. Make it a tensor, or use memory="full".'
            )
    plan = memory if isinstance(memory, Revolve) else Revolve(snapshots=length)
    if pullback is None:
        pullback = functools.partial(_pull_back_step, step)
    if compile:
        step, pullback = compiled(step), compiled(_dense(pullback))
    loop = _Loop(step, pullback, structure, len(tree.leaves(inputs)), len(tree.leaves(carry)), length, plan)
    last, outs, _ = loop.parts(_ScanFunction.apply(loop, *leaves))
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


def _needs_gradient(leaves: list[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and is_tracked(leaf) for leaf in leaves)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _plain_loop(step: Step, inputs: Tree, carry: Tree, xs: Tree, length: int) -> tuple[Tree, Tensor]:
    outs = []
    for t in range(length):
        carry, out = step(inputs, carry, tree.index(xs, t))
        outs.append(out)
    return carry, torch.stack(outs)


@dataclass(frozen=True)
class _Loop:
    """What a scan is, apart from its tensors; leaves are flat: inputs, carry, xs."""

    step: Step
    pullback: Pullback
    structure: Structure
    shared: int  # leaves in `inputs`
    carried: int  # leaves in the carry
    length: int
    plan: Revolve
    ambients: list[Ambient] = field(default_factory=list)  # one a step, noted as the loop runs forward

    @property
    def kept(self) -> tuple[int, ...]:
        """The times whose carries are kept on the way forward, apart from 0."""
        return kept(self.length, self.plan.snapshots)

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the leaves of (inputs, carry, xs)."""
        middle = self.shared + self.carried
        return list(leaves[: self.shared]), list(leaves[self.shared : middle]), list(leaves[middle:])

    def parts(self, outputs: Sequence[Any]) -> tuple[list[Any], list[Any], dict[int, list[Any]]]:
        """Return (last carry, outs, time -> kept carry) of what the Function returns, or of its cotangents."""
        outs = self.carried + self.length
        carries = {t: list(outputs[outs + i * self.carried :][: self.carried]) for i, t in enumerate(self.kept)}
        return list(outputs[: self.carried]), list(outputs[self.carried : outs]), carries

    def run(self, shared: list[Any], carry: list[Any], x: list[Any]) -> tuple[list[Any], Tensor]:
        """Make one step on flat leaves; inner scans are plain loops meanwhile."""
        with plain_loops_inside():
            after, out = self.step(*self.trees(shared, carry, x))
        return tree.leaves(after), out

    def trees(self, shared: Sequence[Any], carry: Sequence[Any], x: Sequence[Any]) -> tuple[Tree, Tree, Tree]:
        """Return the trees (inputs, carry, x) with these leaves."""
        return tree.unflatten(self.structure, [*shared, *carry, *x])


class _ScanFunction(torch.autograd.Function):
    """Run the loop without a graph and return the last carry, the outs and the kept carries.

    The kept carries being outputs makes the backward differentiable again, with exact second derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Loop, *leaves: Any) -> tuple[Tensor, ...]:
        shared, carry, xs = loop.split(leaves)
        times, outs, snapshots = set(loop.kept), [], []
        for t in range(loop.length):
            if t in times:
                snapshots += _moved(carry, ["cpu"] * len(carry)) if loop.plan.store == "cpu" else carry
            loop.ambients.append(Ambient.now(leaves, loop.ambients[-1] if t else None))
            carry, out = loop.run(shared, carry, [x[t] for x in xs])
            outs.append(out)
        return _distinct([*carry, *outs, *snapshots], {id(leaf) for leaf in leaves})

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loop, *leaves = inputs
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[tensor for tensor in output if not tensor.is_floating_point()])
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        snapshots = output[loop.carried + loop.length :]
        ctx.save_for_backward(*[leaf if isinstance(leaf, Tensor) else None for leaf in leaves], *snapshots)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, cotangents = tuple(map(alive, ctx.saved_tensors)), tuple(map(alive, cotangents))
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_differentiated_again(saved, cotangents)):
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
        count = loop.structure.num_leaves
        saved = zip(tensors[:count], ctx.constants, strict=True)
        leaves = [constant if tensor is None else tensor for tensor, constant in saved]
        self.loop, (self.shared, self.first, self.xs) = loop, loop.split(leaves)
        _, _, self.snapshots = loop.parts([None] * (loop.carried + loop.length) + list(tensors[count:]))
        of_shared, _, self.of_xs = loop.split([*map(operator.and_, ctx.needs_input_grad[1:], map(_is_float, leaves))])
        self.wanted = loop.trees(of_shared, [*map(_is_float, self.first)], self.of_xs)
        self.bar_shared: list[Tensor | None] = [None] * loop.shared
        self.bar_xs: list[list[Tensor]] = [[] for _ in self.xs]

    def run(self, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the Function's inputs.

        The stack holds the times whose carries are at hand; steps from the topmost one to `high` remain to be pulled back
        before it is dropped.
        """
        bar, of_outs, of_kept = self.loop.parts(cotangents)
        stack, high = [(0, self.first)], self.loop.length
        while stack:
            low, carry = stack[-1]
            if high - low > 1:
                middle = low + split(high - low, self.loop.plan.snapshots - len(stack) + 1)
                stack.append((middle, self._carry_at(middle, low, carry)))
                continue
            bar = self._pull_back(low, carry, bar, of_outs[low])
            bar = [plus(pulled, own) for pulled, own in zip(bar, of_kept.get(low, [None] * len(bar)), strict=True)]
            high, _ = stack.pop()
        return (None, *self.bar_shared, *bar, *[torch.stack(bars[::-1]) if bars else None for bars in self.bar_xs])

    def _carry_at(self, time: int, low: int, carry: list[Any]) -> list[Any]:
        """Return the kept carry, or advance from an earlier one."""
        if time in self.snapshots:
            return _moved(self.snapshots.pop(time), [leaf.device for leaf in self.first])
        for t in range(low, time):
            with self.loop.ambients[t].restored():
                carry, _ = self.loop.run(self.shared, carry, [x[t] for x in self.xs])
        return carry

    def _pull_back(self, t: int, carry: list[Any], bar: list[Tensor | None], of_out: Tensor | None) -> list[Tensor | None]:
        """Add step t's part to the cotangents of inputs and xs, and return that of its carry."""
        x = [leaf[t] for leaf in self.xs]
        _, bar_after, _ = self.loop.trees([None] * len(self.shared), bar, [None] * len(x))
        with self.loop.ambients[t].restored(), plain_loops_inside():
            bars = self.loop.pullback(*self.loop.trees(self.shared, carry, x), (bar_after, of_out), self.wanted)
        to_shared, to_carry, to_x = self.loop.split(tree.leaves(bars))
        self.bar_shared = [*map(plus, self.bar_shared, to_shared)]
        for bars_so_far, row, part, is_wanted in zip(self.bar_xs, x, to_x, self.of_xs, strict=True):
            if is_wanted:
                bars_so_far.append(torch.zeros_like(row) if part is None else part)
        return to_carry


def _moved(leaves: list[Any], devices: Sequence[Any]) -> list[Any]:
    return [leaf.to(device) for leaf, device in zip(leaves, devices, strict=True)]


def _distinct(tensors: list[Tensor], seen: set[int]) -> tuple[Tensor, ...]:
    """Clone the tensors met before: a Function may not return one tensor twice, nor an input as it is."""
    fresh = []
    for tensor in tensors:
        fresh.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(fresh[-1]))
    return tuple(fresh)


def _or_zeros(cotangent: Tensor | None, like: Any) -> Tensor | None:
    return torch.zeros_like(like) if cotangent is None and _is_float(like) else cotangent

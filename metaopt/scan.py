"""The one differentiable loop: carry_{t+1}, out_t = step(inputs, carry_t, x_t) for t = 0, ..., length - 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt.replay import Ambient
from metaopt.revolve import Revolve, kept, split
from metaopt.transforms import is_tracked, tracking_levels, values_are_readable
from metaopt.tree import Structure, Tree

Memory = Literal["full", "steps"] | Revolve
Step = Callable[[Tree, Tree, Tree], tuple[Tree, Tensor]]

# While one scan runs forward or backward as a Function, scans inside its step run as plain loops: a Function inside
# another one's forward or backward is beyond torch.func. Memory stays bounded, since one outer step's graph exists at a time.
_inside_step: ContextVar[bool] = ContextVar("inside_step", default=False)


def scan(step: Step, inputs: Tree, carry: Tree, xs: Tree, length: int, memory: Memory) -> tuple[Tree, Tensor]:
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
    """
    leaves, structure = tree.flatten((inputs, carry, xs))
    if memory == "full" or torch.compiler.is_compiling() or _inside_step.get() or not _needs_gradient(leaves):
        return _plain_loop(step, inputs, carry, xs, length)
    for path, leaf in tree.named_leaves(carry):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"Parameters and optimizer state must be tensors to be kept from step to step, got {type(leaf).__name__} "
                f'at {path}. Make it a tensor, or use memory="full".'
            )
    plan = memory if isinstance(memory, Revolve) else Revolve(snapshots=length)
    loop = _Loop(step, structure, len(tree.leaves(inputs)), len(tree.leaves(carry)), length, plan)
    last, outs, _ = loop.parts(_ScanFunction.apply(loop, *leaves))
    return tree.unflatten(tree.flatten(carry)[1], last), torch.stack(outs)


def check_memory(memory: Memory) -> None:
    """Raise ValueError for a memory mode that does not exist."""
    if not isinstance(memory, Revolve) and memory not in ("full", "steps"):
        raise ValueError(f'`memory` must be "full", "steps" or Revolve(snapshots), got {memory!r}.')


def _needs_gradient(leaves: list[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and is_tracked(leaf) for leaf in leaves)


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


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
        token = _inside_step.set(True)
        try:
            after, out = self.step(*tree.unflatten(self.structure, [*shared, *carry, *x]))
        finally:
            _inside_step.reset(token)
        return tree.leaves(after), out


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
        ctx.mark_non_differentiable(*[tensor for tensor in output if not _is_differentiable(tensor)])
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        snapshots = output[loop.carried + loop.length :]
        ctx.save_for_backward(*[leaf if isinstance(leaf, Tensor) else None for leaf in leaves], *snapshots)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_differentiated_again(ctx.saved_tensors, cotangents)):
            return _Reversal(ctx).run(cotangents)


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

    def __init__(self, ctx: Any):
        loop: _Loop = ctx.loop
        count = loop.structure.num_leaves
        saved = zip(ctx.saved_tensors[:count], ctx.constants, strict=True)
        leaves = [constant if tensor is None else tensor for tensor, constant in saved]
        self.loop, (self.shared, self.first, self.xs) = loop, loop.split(leaves)
        _, _, self.snapshots = loop.parts([None] * (loop.carried + loop.length) + list(ctx.saved_tensors[count:]))
        needed = loop.split(ctx.needs_input_grad[1:])
        self.in_shared = [i for i, leaf in enumerate(self.shared) if needed[0][i] and _is_differentiable(leaf)]
        self.in_carry = [i for i, leaf in enumerate(self.first) if _is_differentiable(leaf)]
        self.in_xs = [i for i, leaf in enumerate(self.xs) if needed[2][i] and _is_differentiable(leaf)]
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
            bar = [_sum(pulled, own) for pulled, own in zip(bar, of_kept.get(low, [None] * len(bar)), strict=True)]
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

        def run(variables: tuple[list[Tensor], ...]) -> tuple[list[Tensor], Tensor]:
            full = [list(self.shared), list(carry), [x[t] for x in self.xs]]
            for part, places, values in zip(full, (self.in_shared, self.in_carry, self.in_xs), variables, strict=True):
                for place, value in zip(places, values, strict=True):
                    part[place] = value
            after, out = self.loop.run(*full)
            return [after[i] for i in self.in_carry], out

        variables = (
            [self.shared[i] for i in self.in_shared],
            [carry[i] for i in self.in_carry],
            [self.xs[i][t] for i in self.in_xs],
        )
        with self.loop.ambients[t].restored():
            (after, out), pullback, *_ = torch.func.vjp(run, variables)
        seeds = [_or_zeros(bar[i], tensor) for i, tensor in zip(self.in_carry, after, strict=True)]
        ((to_shared, to_carry, to_x),) = pullback((seeds, _or_zeros(of_out, out)))
        for i, part in zip(self.in_shared, to_shared, strict=True):
            self.bar_shared[i] = _sum(self.bar_shared[i], part)
        for i, part in zip(self.in_xs, to_x, strict=True):
            self.bar_xs[i].append(part)
        before: list[Tensor | None] = [None] * len(carry)
        for i, part in zip(self.in_carry, to_carry, strict=True):
            before[i] = part
        return before


def _moved(leaves: list[Any], devices: Sequence[Any]) -> list[Any]:
    return [leaf.to(device) for leaf, device in zip(leaves, devices, strict=True)]


def _distinct(tensors: list[Tensor], seen: set[int]) -> tuple[Tensor, ...]:
    """Clone the tensors met before: a Function may not return one tensor twice, nor an input as it is."""
    fresh = []
    for tensor in tensors:
        fresh.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(fresh[-1]))
    return tuple(fresh)


def _or_zeros(cotangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if cotangent is None else cotangent


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other

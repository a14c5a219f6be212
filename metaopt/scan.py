"""The one differentiable loop: carry_{t+1}, out_t = step(inputs, carry_t, x_t) for t = 0, ..., length - 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metaopt import tree
from metaopt.replay import Ambient
from metaopt.transforms import is_tracked, tracking_levels, values_are_readable
from metaopt.tree import Structure, Tree

Memory = Literal["full", "steps"]
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
            back, which costs one more forward run and is exact for first and second derivatives. A rebuilt step draws the
            same global random numbers and runs under the same autocast. Under `torch.compile` the loop is always unrolled, and
            the compiler decides what to keep.
    """
    leaves, structure = tree.flatten((inputs, carry, xs))
    if memory == "full" or torch.compiler.is_compiling() or _inside_step.get() or not _needs_gradient(leaves):
        return _plain_loop(step, inputs, carry, xs, length)
    loop = _Loop(step, structure, len(tree.leaves(inputs)), len(tree.leaves(carry)), length)
    outputs = _ScanFunction.apply(loop, *leaves)
    last = outputs[loop.carried * (length - 1) : loop.carried * length]
    return tree.unflatten(tree.flatten(carry)[1], last), torch.stack(outputs[loop.carried * length :])


def check_memory(memory: Memory) -> None:
    """Raise ValueError for a memory mode that does not exist."""
    if memory not in get_args(Memory):
        raise ValueError(f"`memory` must be one of {get_args(Memory)}, got {memory!r}.")


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
    structure: Structure
    shared: int  # leaves in `inputs`
    carried: int  # leaves in the carry
    length: int
    ambients: list[Ambient] = field(default_factory=list)  # one a step, noted as the loop runs forward

    def split(self, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the leaves of (inputs, carry, xs)."""
        middle = self.shared + self.carried
        return list(leaves[: self.shared]), list(leaves[self.shared : middle]), list(leaves[middle:])

    def run(self, shared: list[Tensor], carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Make one step on flat leaves; inner scans are plain loops meanwhile."""
        token = _inside_step.set(True)
        try:
            after, out = self.step(*tree.unflatten(self.structure, [*shared, *carry, *x]))
        finally:
            _inside_step.reset(token)
        return tree.leaves(after), out


class _ScanFunction(torch.autograd.Function):
    """Run the loop without a graph and return every carry, then every out.

    The kept carries being outputs makes the backward differentiable again, with exact second derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Loop, *leaves: Tensor) -> tuple[Tensor, ...]:
        shared, carry, xs = loop.split(leaves)
        carries, outs, seen = [], [], {id(leaf) for leaf in leaves}
        for t in range(loop.length):
            loop.ambients.append(Ambient.now(leaves))
            carry, out = loop.run(shared, carry, [x[t] for x in xs])
            *carry, out = _distinct([*carry, out], seen)
            carries += carry
            outs.append(out)
        return (*carries, *outs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loop, *leaves = inputs
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[tensor for tensor in output if not tensor.is_floating_point()])
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        kept = output[: loop.carried * (loop.length - 1)]
        ctx.save_for_backward(*[leaf if isinstance(leaf, Tensor) else None for leaf in leaves], *kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_differentiated_again(ctx.saved_tensors, cotangents)):
            return _pull_back(ctx, cotangents)


def _is_differentiated_again(*tensors: Iterable[Tensor | None]) -> bool:
    """Say whether the backward pass itself must be recorded.

    `torch.func.grad` always asks for that, which would keep every rebuilt step. The graph is of use only to a level below the
    one whose backward pass this is. In plain autograd the caller says so by `create_graph`.
    """
    if values_are_readable():
        return True
    return len({level for tensor in chain(*tensors) if tensor is not None for level in tracking_levels(tensor)}) > 1


def _pull_back(ctx: Any, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Walk from the last step to the first.

    (a_shared, a_carry, a_x)_t = vjp of step t at the kept carry, with cotangents (a_carry_{t+1}, a_out_t);
    a_carry_t += the cotangent of the kept carry itself;  a_shared = sum over t.
    """
    loop: _Loop = ctx.loop
    count = loop.shared + loop.carried
    saved, kept = ctx.saved_tensors[: count + _xs(loop)], ctx.saved_tensors[count + _xs(loop) :]
    leaves = [constant if tensor is None else tensor for tensor, constant in zip(saved, ctx.constants, strict=True)]
    shared, first, xs = loop.split(leaves)
    of_carry = [list(cotangents[loop.carried * t : loop.carried * (t + 1)]) for t in range(loop.length)]
    of_out = cotangents[loop.carried * loop.length :]

    needed = ctx.needs_input_grad[1:]
    in_shared = [i for i, leaf in enumerate(shared) if needed[i] and _is_float(leaf)]
    in_carry = [i for i, leaf in enumerate(first) if _is_float(leaf)]
    in_xs = [i for i, leaf in enumerate(xs) if needed[count + i] and _is_float(leaf)]

    bar_shared: list[Tensor | None] = [None] * loop.shared
    bar_xs: list[list[Tensor]] = [[] for _ in xs]
    bar_carry = of_carry[-1]
    for t in reversed(range(loop.length)):
        carry = first if t == 0 else list(kept[loop.carried * (t - 1) : loop.carried * t])
        x = [leaf[t] for leaf in xs]

        def run(variables, carry=carry, x=x):
            full = [list(shared), list(carry), list(x)]
            for part, places, values in zip(full, (in_shared, in_carry, in_xs), variables, strict=True):
                for place, value in zip(places, values, strict=True):
                    part[place] = value
            after, out = loop.run(*full)
            return [after[i] for i in in_carry], out

        variables = ([shared[i] for i in in_shared], [carry[i] for i in in_carry], [x[i] for i in in_xs])
        with loop.ambients[t].restored():
            (after, out), pullback, *_ = torch.func.vjp(run, variables)
        seeds = [_or_zeros(bar_carry[i], tensor) for i, tensor in zip(in_carry, after, strict=True)]
        ((to_shared, to_carry, to_x),) = pullback((seeds, _or_zeros(of_out[t], out)))
        for i, bar in zip(in_shared, to_shared, strict=True):
            bar_shared[i] = _add(bar_shared[i], bar)
        for i, bar in zip(in_xs, to_x, strict=True):
            bar_xs[i].append(bar)
        bar_carry = [None] * loop.carried if t == 0 else of_carry[t - 1]
        for i, bar in zip(in_carry, to_carry, strict=True):
            bar_carry[i] = _add(bar_carry[i], bar)
    return (None, *bar_shared, *bar_carry, *[torch.stack(bars[::-1]) if bars else None for bars in bar_xs])


def _distinct(tensors: list[Tensor], seen: set[int]) -> list[Tensor]:
    """Clone the tensors met before: a Function may not return one tensor twice, nor an input as it is."""
    fresh = []
    for tensor in tensors:
        fresh.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(fresh[-1]))
    return fresh


def _xs(loop: _Loop) -> int:
    """Return the number of leaves in `xs`."""
    return loop.structure.num_leaves - loop.shared - loop.carried


def _or_zeros(cotangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if cotangent is None else cotangent


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term

"""The one differentiable loop: carry_{t+1}, out_t = step(inputs, carry_t, x_t) for t = 0, ...,
length - 1.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.pullback import pull_back_and_value
from metaopt.compiled import compiled
from metaopt.scan.disk import Disk
from metaopt.scan.function import ScanFunction
from metaopt.scan.loop import Loop, Pullback, Step, record
from metaopt.scan.nesting import is_inside_step
from metaopt.scan.revolve import Revolve, kept
from metaopt.scan.stream import Stream
from metaopt.transforms import is_differentiable, is_tracked
from metaopt.tree import Tree

Memory = Literal["full", "steps"] | Revolve


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
    describe: Callable[[], str] = str,
) -> tuple[Tree, Tree]:
    """Run `step` `length` times and return (last carry, outs stacked over time), differentiable in
    every tensor.

    Args:
        step: (inputs, carry, x) -> (next carry, out), with a tree of tensors as out; it must reach
            whatever is to be differentiated through these.
        inputs: what every step reads.
        carry: the initial carry; each step keeps its structure, shapes and dtypes.
        xs: a tree whose leaves have the leading axis `length`; step t gets row t. Or a `Stream`:
            step t gets what it yields next, until it ends.
        length: number of steps; None for a `Stream`.
        memory: "full" keeps the graph of every step; "steps" keeps every carry and rebuilds one
            step at a time on the way back, which costs one more forward run; `Revolve(snapshots)`
            keeps few carries and recomputes the others. All are exact for first and second
            derivatives. A step that runs again draws the same global random numbers under the same
            autocast; the first tensor of its out shows whether it is the same step. Under
            `torch.compile` the loop is always unrolled, and the compiler decides what to keep.
        pullback: the derivative of `step`, a differentiable function of its tensors; by default
            torch's own. It is used where a step is rebuilt, so never by "full". Whoever gives it
            compiles it.
        compile: compile one step and its derivative, for any length. Inside another compiled
            function or scan this changes nothing.
        describe: returns the settings of `step`, by which a loop on disk knows that it is the one
            that was interrupted.
    """
    given = (inputs, carry, xs.first if isinstance(xs, Stream) else xs)
    tracing = torch.compiler.is_compiling()
    compile = compile and not tracing and not is_inside_step()
    # A compiler cannot ask who tracks a tensor, and nobody can ask a batch that has not come yet.
    needed = torch.is_grad_enabled() and (
        isinstance(xs, Stream) or tracing or _any_tracked(tree.leaves(given))
    )
    plain = tracing or not needed or memory == "full" or is_inside_step()
    if plain and not compile:
        return _plain_loop(step, inputs, carry, xs, length)
    for path, leaf in tree.named_leaves(carry):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"Parameters and optimizer state must be tensors to be kept from step to step, got "
                f"{type(leaf).__name__} "
                f'at {path}. Make it a tensor, or use memory="full" without `compile`.'
            )
    if plain:
        return _plain_loop(
            compiled(step), inputs, tree.map(_as_later, carry) if needed else carry, xs, length
        )
    leaves, structure = tree.flatten(given)
    plan = memory if isinstance(memory, Revolve) else Revolve(snapshots=length or sys.maxsize)
    disk = None if plan.directory is None else Disk(Path(plan.directory), describe())
    if pullback is None:
        pullback = functools.partial(_pull_back_step, step)
        pullback = compiled(_dense(pullback)) if compile else pullback
    step = compiled(step) if compile else step
    loop = Loop(
        step,
        pullback,
        structure,
        len(tree.leaves(inputs)),
        len(tree.leaves(carry)),
        length or 0,
        plan,
        disk,
    )
    outputs: Sequence[Any] = ()
    # a directory belongs to one loop with all its batches
    if isinstance(xs, Stream) and disk is not None:
        rows = list(xs.kept())
        leaves = [*leaves[: loop.shared + loop.carried], *tree.leaves(rows)]
        if not _any_tracked(leaves):
            return _plain_loop(step, inputs, carry, rows, None)
        loop = replace(loop, length=len(rows), streamed=True)
    elif isinstance(xs, Stream):
        loop, leaves, outputs = record(loop, leaves[: loop.shared + loop.carried], xs)
    elif disk is None:
        loop = replace(loop, times=kept(loop.length, plan.snapshots))
    if _any_tracked(leaves):
        outputs = ScanFunction.apply(loop, *leaves, *outputs)
    last, outs, _ = loop.parts(outputs)
    stacked = [torch.stack(column) for column in zip(*outs, strict=True)]
    return tree.unflatten(tree.flatten(carry)[1], last), tree.unflatten(loop.outs[0], stacked)


def check_memory(memory: Memory) -> None:
    """Raise ValueError for a memory mode that does not exist."""
    if not isinstance(memory, Revolve) and memory not in ("full", "steps"):
        raise ValueError(f'`memory` must be "full", "steps" or Revolve(snapshots), got {memory!r}.')


def _pull_back_step(
    step: Step, inputs: Tree, carry: Tree, x: Tree, cotangents: tuple[Tree, Tree], wanted: Tree
) -> tuple[tuple[Tree, Tree, Tree], Tree]:
    bars, value = pull_back_and_value(step, (inputs, carry, x), cotangents, wanted)
    return bars, None if value is None else value[1]


def _dense(pullback: Pullback) -> Pullback:
    """Give the carry's zero cotangents as tensors: None would make of the last step, which has
    many, a function of its own.
    """

    def call(
        inputs: Tree, carry: Tree, x: Tree, cotangents: tuple[Tree, Tree], wanted: Tree
    ) -> tuple[tuple[Tree, Tree, Tree], Tree]:
        of_carry, of_out = cotangents
        of_carry = tree.map(_or_zeros, of_carry, carry)
        return pullback(inputs, carry, x, (of_carry, of_out), wanted)

    return call


def _any_tracked(leaves: list[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and is_tracked(leaf) for leaf in leaves)


def _plain_loop(
    step: Step, inputs: Tree, carry: Tree, xs: Any, length: int | None
) -> tuple[Tree, Tree]:
    outs: list[Tree] = []
    for x in xs if length is None else (tree.index(xs, t) for t in range(length)):
        carry, out = step(inputs, carry, x)
        outs.append(out)
    if len(outs) == 1:
        return carry, tree.map(lambda out: out[None], outs[0])
    return carry, torch.stack(outs) if isinstance(outs[0], Tensor) else tree.stack(outs)


def _as_later(leaf: Tensor) -> Tensor:
    """Make of a leaf of the first carry what it is in later ones, no parameter and differentiable:
    one compiled step is for all.
    """
    if leaf.requires_grad or not is_differentiable(leaf):
        return leaf.view_as(leaf)
    return leaf.detach().requires_grad_()


def _or_zeros(cotangent: Tensor | None, like: Any) -> Tensor | None:
    return torch.zeros_like(like) if cotangent is None and is_differentiable(like) else cotangent

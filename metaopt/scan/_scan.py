"""The one differentiable loop: carry_{t+1}, out_t = step(inputs, carry_t, x_t) for t = 0, 1, ..."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.modes import noting_modes
from metaopt.autodiff.pullback import or_zeros, pull_back_and_value
from metaopt.compiled import compile_whole
from metaopt.scan.disk import Disk
from metaopt.scan.function import record, run_differentiably
from metaopt.scan.loop import Loop, ScanGiven, Step, StepPullback
from metaopt.scan.nesting import is_inside_step
from metaopt.scan.revolve import Revolve
from metaopt.scan.stream import Stream
from metaopt.transforms import is_differentiable
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
    pullback: StepPullback | None = None,
    compile: bool = False,
    describe: Callable[[], str] = str,  # str() is ""
) -> tuple[Tree, Tree]:
    """Run `step` over time and return (last carry, outs stacked), differentiable in every tensor.

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
    tracing = torch.compiler.is_compiling()
    compile = compile and not tracing and not is_inside_step()
    # A compiler cannot ask who tracks a tensor, and nobody can ask a batch that has not come yet.
    needed = torch.is_grad_enabled() and (
        tracing or isinstance(xs, Stream) or tree.is_any_tracked((inputs, carry, xs))
    )
    plain = tracing or not needed or memory == "full" or is_inside_step()
    if compile or not plain:
        _check_carry(carry)
    if not plain:
        plan = memory if isinstance(memory, Revolve) else Revolve(snapshots=length or sys.maxsize)
        if pullback is None:
            pullback = _compile_pullback(step) if compile else partial(_pull_back_step, step)
        step = compile_whole(step) if compile else step
        loop = Loop(step, pullback, plan, isinstance(xs, Stream))
        return _rebuild_steps(loop, ScanGiven(inputs, carry, xs), length, describe)
    if compile:
        step = compile_whole(step)
        carry = tree.map(_as_later, carry) if needed else carry
    rows = xs if length is None else (tree.index(xs, t) for t in range(length))
    return _run_plainly(step, inputs, carry, rows)


def check_memory(memory: Memory) -> None:
    """Raise ValueError for a memory mode that does not exist."""
    if not isinstance(memory, Revolve) and memory not in ("full", "steps"):
        raise ValueError(f'`memory` must be "full", "steps" or Revolve(snapshots), got {memory!r}.')


def _run_plainly(step: Step, inputs: Tree, carry: Tree, rows: Iterable[Tree]) -> tuple[Tree, Tree]:
    """Run a loop whose graph torch keeps, or that a compiler sees, or that has no derivative."""
    outs: list[Tree] = []
    for x in rows:
        carry, out = step(inputs, carry, x)
        outs.append(out)
    if len(outs) == 1:
        return carry, tree.map(lambda out: out[None], outs[0])
    return carry, torch.stack(outs) if isinstance(outs[0], Tensor) else tree.stack(outs)


def _rebuild_steps(
    loop: Loop, given: ScanGiven, length: int | None, describe: Callable[[], str]
) -> tuple[Tree, Tree]:
    """Run a loop whose steps are rebuilt on the way back."""
    disk, recorded, directory = None, None, loop.held.directory
    if directory is not None:
        disk = Disk(Path(directory), describe(), given.carry)
    with noting_modes() as modes:
        if loop.streamed and disk is None:
            given, recorded = record(loop, given)
        elif loop.streamed:  # a directory belongs to one loop with all its batches
            given = given._replace(xs=[*given.xs.watch()])
            if not tree.is_any_tracked(given):
                return _run_plainly(loop.step, *given)
        result = run_differentiably(loop, given, length or len(given.xs), disk, recorded, modes)
    return result.carry, tree.stack(result.outs)


def _pull_back_step(
    step: Step, inputs: Tree, carry: Tree, x: Tree, cotangents: tuple[Tree, Tree], wanted: Tree
) -> tuple[tuple[Tree, Tree, Tree], Tree]:
    bars, value = pull_back_and_value(step, (inputs, carry, x), cotangents, wanted)
    return bars, None if value is None else value[1]


def _compile_pullback(step: Step) -> StepPullback:
    """Return the derivative of a step, compiled.

    Zero cotangents of the carry are given to it as tensors: None would make of the last step, which
    has many, a function of its own.
    """

    def call(
        inputs: Tree, carry: Tree, x: Tree, cotangents: tuple[Tree, Tree], wanted: Tree
    ) -> tuple[tuple[Tree, Tree, Tree], Tree]:
        of_carry, of_out = cotangents
        of_carry = tree.map(or_zeros, of_carry, carry)
        return _pull_back_step(step, inputs, carry, x, (of_carry, of_out), wanted)

    return compile_whole(call)


def _check_carry(carry: Tree) -> None:
    """Raise TypeError if a leaf is no tensor: a rebuilt step would see that of another step."""
    for path, leaf in tree.named_leaves(carry):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"Parameters and optimizer state must be tensors to be kept from step to step, got "
                f"{type(leaf).__name__} at {path}. Make it a tensor, or use "
                'memory="full" without `compile`.'
            )


def _as_later(leaf: Tensor) -> Tensor:
    """Make a leaf of the first carry what it is in later ones: no parameter, and differentiable.

    One compiled step is then for all.
    """
    if leaf.requires_grad or not is_differentiable(leaf):
        return leaf.view_as(leaf)
    return leaf.detach().requires_grad_()

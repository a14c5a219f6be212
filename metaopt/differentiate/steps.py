"""Running a loop, with a graph of its steps and without; rules that differentiate the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.gradient import gradient
from metaopt.autodiff.pullback import vjp
from metaopt.differentiate.protocol import Given, InnerLoop, Inputs, Pullback, Result, Rule
from metaopt.exact_ops import any_order
from metaopt.scan import Memory, StepPullback, plain_loops_inside, scan
from metaopt.scan.stream import Stream
from metaopt.transforms import constant, is_unrecorded
from metaopt.tree import Tree

# (params -> (loss, aux), params, allow_unused=) -> (gradients, loss, aux)
TakeGradient = Callable[..., tuple[Tree, Tensor, Tree]]
# (inputs, params, state, batch) -> (gradients, loss, aux)
TakeMeanGradient = Callable[[Inputs, Tree, Any, Tree], tuple[Tree, Tensor, Tree]]


class StepsRule(Rule):
    """A rule that differentiates the steps themselves.

    The graph that torch keeps of them is the attached pullback, so these rules define `attach`.
    """

    def vjp(self, loop: InnerLoop) -> tuple[Result, Pullback]:
        """Return the loop's result, and the vjp of the graph of its steps."""

        def run_from(*given: Any) -> Result:
            return self.attach(loop.starting_from(Given(*given)))

        result, pullback = vjp(run_from, loop.given())
        return result, lambda cotangents, wanted: Given(*pullback(cotangents, wanted))

    def attach(self, loop: InnerLoop) -> Result:
        """Return the result of the steps, with their graph."""
        raise TypeError(f"{type(self).__name__} must define `attach(loop) -> result`.")


def unroll(
    loop: InnerLoop,
    memory: Memory,
    take_gradient: TakeGradient = gradient,
    take_mean_gradient: TakeMeanGradient | None = None,
    pullback: StepPullback | None = None,
) -> Result:
    """Run the loop, and keep of its steps what `memory` says.

    Args:
        loop: what runs.
        memory: as for `scan`.
        take_gradient: takes the gradient of a step.
        take_mean_gradient: takes it instead, as the mean over parts of the batch.
        pullback: of one step, for the way back; torch's own by default.
    """

    def step(inputs: Inputs, carry: Tree, batch: Tree) -> tuple[Tree, Tree]:
        params, state = carry
        if take_mean_gradient is None:
            grads, loss, aux = take_gradient(
                lambda at: loop.loss(inputs, at, state, batch), params, allow_unused=loop.skips
            )
        else:
            grads, loss, aux = take_mean_gradient(inputs, params, state, batch)
        after = loop.update(inputs, grads, state, params, loss, aux)
        return after, loop.emit(inputs, after, batch, loss, aux)

    (params, state), emitted = scan(
        step,
        loop.inputs,
        (loop.params, loop.state),
        loop.batches,
        loop.steps,
        memory,
        pullback=pullback,
        compile=loop.compile,
        describe=loop.describe,
    )
    return Result(params, state, emitted)


class LastStep(NamedTuple):
    """What the last step of a loop went from.

    Attributes:
        params: the parameters before it.
        state: the state before it.
        grads: the gradients there.
        loss: the loss there.
        aux: what else the loss gave.
    """

    params: Tree
    state: Any
    grads: Tree
    loss: Tensor
    aux: Tree


def run(loop: InnerLoop) -> Result:
    """Run the loop without a graph; what comes out is constant."""
    return run_noting_last(loop, False)[0]


def run_noting_last(loop: InnerLoop, notes: bool) -> tuple[Result, LastStep | None]:
    """Return what `run` does, and the last step, if there is one and it is to be noted.

    Of a compiled loop no step is seen: one that is to be noted is not compiled.
    """
    if notes:
        loop = replace(loop, compile=False)
    nobody_differentiates = is_unrecorded()
    if not nobody_differentiates:
        # `no_grad` below does not stop the transforms of torch.func around this: constants do
        parts = (loop.inputs, loop.params, loop.state, loop.batches)
        inputs, params, state, batches = tree.map(constant, parts)
        loop = replace(loop, inputs=inputs, params=params, state=state, batches=batches)
    params, state = loop.params, loop.state
    if loop.steps == 0:
        return Result(params, state, ()), None
    last: LastStep | None = None
    with torch.no_grad():
        if loop.compile:
            result = unroll(loop, "full")
        else:
            # As `unroll` does it, but written out: the traceback of an error in a user's loss has
            # four frames fewer.
            emitted = []
            for batch in _rows(loop.batches, loop.steps):
                last = None  # a step before the last is not kept
                # called at once, so it sees the state and the batch of this step
                grads, loss, aux = gradient(
                    lambda at: loop.loss(loop.inputs, at, state, batch),  # noqa: B023
                    params,
                    allow_unused=loop.skips,
                )
                if notes:
                    last = LastStep(params, state, grads, loss, aux)
                params, state = loop.update(loop.inputs, grads, state, params, loss, aux)
                emitted.append(loop.emit(loop.inputs, (params, state), batch, loss, aux))
            result = Result(params, state, tree.stack(emitted))
    if nobody_differentiates:
        return result, last
    ended = Result(*tree.map(constant, tuple(result)))
    return ended, None if last is None else LastStep(*tree.map(constant, tuple(last)))


def _rows(batches: Tree | Stream, steps: int | None) -> Iterable[Tree]:
    """Return the batch of each step."""
    if isinstance(batches, Stream):
        return batches
    return (tree.index(batches, step) for step in range(steps or 0))


def weigh_result(loop: InnerLoop, weights: Result) -> Tensor:
    """Run the loop and return <weights, result>, the sum over all that has a weight."""
    with plain_loops_inside(), any_order():
        result = unroll(replace(loop, compile=False), "full")
    terms: list[Tensor] = []

    def add(weight: Tensor | None, value: Tree) -> None:
        if weight is not None:
            terms.append(tree.as_real(value) * tree.as_real(weight))

    tree.map(add, weights, result)
    return tree.sum_leaves(torch.Tensor.sum, terms)

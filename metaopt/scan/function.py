"""The scan as one differentiable operation that keeps some of its carries.

A loop runs inside this operation, below the levels of `torch.func`, where it is fastest. Only a
stream runs outside and before it: the inputs of an operation must be known when it begins, while
nobody knows how many batches will come, nor which are computed from what requires grad.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.modes import Modes, in_modes
from metaopt.scan.backward import Reversal
from metaopt.scan.disk import Disk
from metaopt.scan.loop import Loop, ScanGiven, ScanResult, run_in_memory
from metaopt.scan.revolve import Online, plan_ahead
from metaopt.transforms import (
    constant,
    is_differentiable,
    tracking_levels,
    unwrap_ended,
    values_are_readable,
)
from metaopt.tree import Tree


def run_differentiably(
    loop: Loop,
    given: ScanGiven,
    length: int,
    disk: Disk | None,
    recorded: ScanResult | None,
    modes: Modes,
) -> ScanResult:
    """Run a loop such that what it gives can be differentiated in what it is given.

    Args:
        loop: what it is.
        given: what it starts from.
        length: number of steps.
        disk: where its states lie, if on disk.
        recorded: what it gave, if it has run already.
        modes: those that models are in on the way back.
    """
    arguments = (given, recorded or ())
    call = Call(loop, tree.nones(arguments), length, disk, modes)
    try:
        outputs = ScanFunction.apply(call, *tree.leaves(arguments))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "batched == nullptr" not in str(error):
            raise
        raise ValueError(
            "A loop whose steps are rebuilt on the way back must be given all that `vmap` batches, "
            "but its loss or optimizer reaches such a tensor by itself, through a closure. Pass it "
            'as `batches` or `meta`, or use memory="full".'
        ) from error
    result: ScanResult = tree.with_leaves(call.results[0], outputs)
    return result


def record(loop: Loop, given: ScanGiven) -> tuple[ScanGiven, ScanResult]:
    """Run a loop forward over a stream and return (it with the list of its batches, what it gave).

    The steps see constants, so that no level of autograd or `torch.func` keeps a graph. The batches
    are held, for the iterator gives each once, while the step on it is made again on the way back,
    with the same random numbers; a shuffling loader would draw others.
    """
    batches = list[Tree]()

    def rows() -> Iterator[Tree]:
        for batch in given.xs.watch():
            batches.append(batch)
            yield tree.map(constant, batch)

    start = tree.map(constant, given._replace(xs=None))
    result = run_in_memory(loop, start, rows(), Online(loop.held.snapshots).add)
    return given._replace(xs=batches), result


@dataclass
class Call:
    """One call of `ScanFunction`, apart from its tensors.

    Attributes:
        loop: what runs.
        arguments: (`ScanGiven`, `ScanResult` of a loop that has run already, else ()), with None
            for every leaf.
        length: number of steps.
        disk: where its states lie, if on disk.
        modes: those that models are in on the way back.
        results: the `ScanResult`, with None for every leaf, noted when there is one.
    """

    loop: Loop
    arguments: tuple[ScanGiven, ScanResult | tuple[()]]
    length: int
    disk: Disk | None
    modes: Modes
    results: list[ScanResult] = field(default_factory=list)

    def run(self, given: ScanGiven) -> ScanResult:
        """Run the loop forward."""
        if self.disk is not None:
            return self.disk.run(self.loop, given, self.length)
        rows = (self.loop.row(given.xs, t) for t in range(self.length))
        keep = plan_ahead(self.length, self.loop.held.snapshots)
        return run_in_memory(self.loop, given, rows, keep)


class ScanFunction(torch.autograd.Function):
    """Run the loop without a graph and return the last carry, the outs and the kept carries.

    The kept carries being outputs makes the backward differentiable again, with exact second
    derivatives. Of a loop that has run already, these outputs follow what it was given.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *leaves: Any) -> tuple[Tensor, ...]:
        given, recorded = tree.with_leaves(call.arguments, leaves)
        result = recorded or call.run(given)
        call.results.append(tree.nones(result))
        outputs = tree.leaves(result)
        if recorded:
            # The last carry is a copy, for a user may write to it, which views forbid.
            last = len(tree.leaves(recorded.carry))
            views = [tensor.view_as(tensor) for tensor in outputs[last:]]
            return *[tensor.clone() for tensor in outputs[:last]], *views
        seen = {id(leaf) for leaf in leaves}
        for place, tensor in enumerate(outputs):
            if id(tensor) in seen:  # a Function may not return one tensor twice, nor an input
                outputs[place] = tensor.clone()
            seen.add(id(tensor))
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *leaves = inputs
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[tensor for tensor in output if not is_differentiable(tensor)])
        given, _ = tree.with_leaves(call.arguments, leaves)
        result = tree.with_leaves(call.results[0], output)
        firsts = [tree.leaves(out)[0] for out in result.outs]  # to compare a rebuilt step with
        kept = (given, result.states, firsts)
        leaves, ctx.kept = tree.leaves(kept), tree.nones(kept)
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*[leaf if isinstance(leaf, Tensor) else None for leaf in leaves])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        pairs = zip(map(unwrap_ended, ctx.saved_tensors), ctx.constants, strict=True)
        kept = [constant if tensor is None else tensor for tensor, constant in pairs]
        given, states, firsts = tree.with_leaves(ctx.kept, kept)
        bars = tree.with_leaves(call.results[0], map(unwrap_ended, cotangents))
        needed, recorded = tree.with_leaves(call.arguments, ctx.needs_input_grad[1:])
        again = torch.is_grad_enabled() and _is_differentiated_again((given, states, bars))
        disk = call.disk
        files = nullcontext() if disk is None else disk.reopen(again)
        with torch.set_grad_enabled(again), files, in_modes(call.modes):
            store = call.loop.make_store(given.carry, states) if disk is None else disk
            found = Reversal(call.loop, given, needed, store, disk).run(bars, firsts)
        return None, *tree.leaves((found, tree.nones(recorded)))


def _is_differentiated_again(tensors: Tree) -> bool:
    """Return True if the backward pass itself must be recorded.

    `torch.func.grad` always asks for that, which would keep every rebuilt step. The graph is of use
    only to a level below the one whose backward pass this is. In plain autograd the caller says so
    by `create_graph`.
    """
    if values_are_readable():
        return True
    levels = [tracking_levels(leaf) for leaf in tree.leaves(tensors) if isinstance(leaf, Tensor)]
    return len(set[int]().union(*levels)) > 1

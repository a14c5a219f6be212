"""The scan as one differentiable operation that keeps some of its carries."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from metaopt.autodiff.replay import Ambient
from metaopt.scan.disk import Disk
from metaopt.scan.loop import Loop
from metaopt.scan.reversal import Reversal
from metaopt.scan.revolve import kept
from metaopt.scan.tensor_file import digest_of
from metaopt.transforms import alive, is_differentiable, tracking_levels, values_are_readable


class ScanFunction(torch.autograd.Function):
    """Run the loop without a graph and return the last carry, the outs and the kept carries.

    The kept carries being outputs makes the backward differentiable again, with exact second
    derivatives. Of a loop that has run already, these outputs follow the leaves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: Loop, *args: Any) -> tuple[Tensor, ...]:
        leaves, recorded = args[: loop.count], args[loop.count :]
        if recorded:
            # these may be written to
            last = tuple(tensor.clone() for tensor in recorded[: loop.carried])
            return *last, *[tensor.view_as(tensor) for tensor in recorded[loop.carried :]]
        shared, carry, xs = loop.split(leaves)
        if loop.disk is not None:
            facts = {
                "length": str(loop.length),
                "snapshots": str(loop.plan.snapshots),
                "inputs": digest_of(leaves),
            }
            held = [*kept(loop.length, loop.plan.snapshots), loop.length]
            near = [*shared, *carry, *[x[0] for x in xs]]

            def step(t: int, carry: list[Any]) -> tuple[list[Any], list[Any]]:
                return loop.run(shared, carry, [x[t] for x in xs])

            return _distinct(
                loop.disk.forward(step, carry, held, facts, near, loop.ambients),
                {id(leaf) for leaf in leaves},
            )
        times, outs, snapshots = set(loop.times), [], []
        for t in range(loop.length):
            if t in times:
                snapshots += loop.stored(carry)
            loop.ambients.append(Ambient.now(leaves, loop.ambients[-1] if t else None))
            carry, out = loop.run(shared, carry, [x[t] for x in xs])
            outs += out
        return _distinct([*carry, *outs, *snapshots], {id(leaf) for leaf in leaves})

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loop, *args = inputs
        leaves = args[: loop.count]
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[tensor for tensor in output if not is_differentiable(tensor)])
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        _, outs, snapshots = loop.parts(output)
        firsts = [out[0] for out in outs]  # by which a rebuilt step is compared
        given = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
        ctx.save_for_backward(*given, *chain(*snapshots.values()), *firsts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, cotangents = tuple(map(alive, ctx.saved_tensors)), tuple(map(alive, cotangents))
        tensors = saved[: len(saved) - ctx.loop.length]  # without the losses
        again = torch.is_grad_enabled() and _is_differentiated_again(tensors, cotangents)
        disk: Disk | None = ctx.loop.disk
        with torch.set_grad_enabled(again), nullcontext() if disk is None else disk.reopened(again):
            return Reversal(ctx, saved).run(cotangents)


def _is_differentiated_again(*tensors: Iterable[Tensor | None]) -> bool:
    """Say whether the backward pass itself must be recorded.

    `torch.func.grad` always asks for that, which would keep every rebuilt step. The graph is of use
    only to a level below the one whose backward pass this is. In plain autograd the caller says so
    by `create_graph`.
    """
    if values_are_readable():
        return True
    return (
        len(
            {
                level
                for tensor in chain(*tensors)
                if tensor is not None
                for level in tracking_levels(tensor)
            }
        )
        > 1
    )


def _distinct(tensors: list[Tensor], seen: set[int]) -> tuple[Tensor, ...]:
    """Clone the tensors met before: a Function may not return one tensor twice, nor an input as it
    is.
    """
    fresh = []
    for tensor in tensors:
        fresh.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(fresh[-1]))
    return tuple(fresh)

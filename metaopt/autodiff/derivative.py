"""Values with a derivative that somebody else knows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.modes import Modes, in_modes
from metaopt.autodiff.replay import Ambient
from metaopt.transforms import has_tangent, is_differentiable, is_inside_jvp, unwrap_ended
from metaopt.tree import Structure, Tree

# (w, inputs, cotangent of w, wanted) -> cotangents of the inputs, None where not wanted; `wanted`
# is a tree of bools like inputs
PullBack = Callable[[Tree, Tree, Tree, Tree], Tree]


def with_derivative(
    pull_back: PullBack,
    w: Tree,
    inputs: Tree,
    ambient: Ambient | None = None,
    modes: Modes | None = None,
) -> Tree:
    """Return the value w with the derivative in `inputs` that `pull_back` gives it.

    Reverse mode, under autograd, `torch.func.grad` and `vmap` in any nesting. The backward pass
    calls `pull_back` with w itself, not its value: where `pull_back` is differentiable in its
    tensors, so is the result, any number of times, and w's own part in that is again this
    derivative. Nothing is computed before a derivative is asked for.

    Args:
        pull_back: a function of its arguments alone; what it reaches otherwise is constant. It sees
            the same random numbers and autocast whenever it runs, and leaves no trace in the global
            generators.
        w: a tree of tensors; a constant. Integers among them stay constants, and have no cotangent
            (None).
        inputs: a tree; its floating-point and complex tensors can be differentiated.
        ambient: the random numbers that `pull_back` sees; by default those that would be drawn
            next.
        modes: those that models are in while it runs.

    Raises:
        ValueError: under `torch.compile` while gradients are enabled, or in forward mode.
    """
    is_compiling = torch.compiler.is_compiling()
    has_tangents = not is_compiling and any(map(has_tangent, tree.leaves(inputs)))
    if not torch.is_grad_enabled() and not has_tangents:
        return tree.map(torch.Tensor.detach, w)
    if is_compiling:
        raise ValueError(
            "A derivative that is not torch's own cannot be part of a `torch.func.grad` inside "
            "`torch.compile`: the compiler drops it, and the result would be zero. Compile the "
            "loss alone, or pass `compile=True` to `minimize`."
        )
    if has_tangents or is_inside_jvp():
        raise ValueError(
            "A loop whose rule knows its derivative in reverse mode alone (Implicit, T1T2, ..., "
            "ForwardMode itself) cannot be "
            "differentiated forward. For the loop around it use `Backprop()` in place of "
            '`ForwardMode()` or `hvp="forward"`.'
        )
    leaves, structure = tree.flatten((w, inputs))
    known = _Known(
        pull_back, structure, len(tree.leaves(w)), ambient or Ambient.now(leaves), modes or {}
    )
    values = [leaf.detach() for leaf in leaves[: known.values]]
    outputs = _Derivative.apply(known, *values, *leaves[known.values :])  # type: ignore[no-untyped-call]
    return tree.unflatten(tree.flatten(w)[1], outputs)


@dataclass(frozen=True)
class _Known:
    """What the Function is, apart from its tensors; leaves are flat: w, inputs."""

    pull_back: PullBack
    structure: Structure
    values: int  # leaves in w
    ambient: Ambient
    modes: Modes


class _Derivative(torch.autograd.Function):
    """Return w. That it is an output makes the backward pass a differentiable function of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(known: _Known, *leaves: Any) -> tuple[Tensor, ...]:
        return tuple(leaf.clone() for leaf in leaves[: known.values])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.known, *leaves = inputs
        given = leaves[ctx.known.values :]
        ctx.mark_non_differentiable(*[tensor for tensor in output if not is_differentiable(tensor)])
        ctx.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in given]
        ctx.save_for_backward(
            *output, *[leaf if isinstance(leaf, Tensor) else None for leaf in given]
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        known: _Known = ctx.known
        saved = [*map(unwrap_ended, ctx.saved_tensors)]
        values, given = saved[: known.values], saved[known.values :]
        leaves = [
            constant if tensor is None else tensor
            for tensor, constant in zip(given, ctx.constants, strict=True)
        ]
        w, inputs = tree.unflatten(known.structure, [*values, *leaves])
        bars = [unwrap_ended(bar) if is_differentiable(bar) else None for bar in cotangents]
        needed = [
            need and is_differentiable(leaf)
            for need, leaf in zip(ctx.needs_input_grad[1 + known.values :], leaves, strict=True)
        ]
        v, wanted = tree.unflatten(known.structure, [*bars, *needed])
        with known.ambient.restored(), in_modes(known.modes):
            pulled = known.pull_back(w, inputs, v, wanted)
        return (None, *[None] * known.values, *_leaves_like(inputs, pulled))


def _leaves_like(inputs: Tree, pulled: Tree) -> list[Tensor | None]:
    """Return the cotangents of the leaves of `inputs`; None may stand for a whole part of it."""

    def spread(bar: Tensor | None, part: Tree) -> Tree:
        return tree.nones(part) if bar is None else bar

    if not tree.is_alike(inputs, pulled):
        with suppress(ValueError):  # the next line says where they differ
            pulled = tree.map(spread, pulled, inputs)
    leaves = tree.leaves_like(inputs, pulled, "pullback(cotangents, wanted)")
    for like, bar in zip(tree.leaves(inputs), leaves, strict=True):
        # torch would take the sum over what is too much
        if isinstance(bar, Tensor) and bar.shape != like.shape:
            raise ValueError(
                "A rule's pullback must return cotangents of the shapes that the tensors have, got "
                f"{tuple(bar.shape)} for {tuple(like.shape)}."
            )
    return leaves

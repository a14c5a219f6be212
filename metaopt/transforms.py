"""What can be asked about a tensor inside `torch.func` transforms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def is_tracked(tensor: Tensor) -> bool:
    """Say whether autograd, at the top level or at any level of `torch.func.grad`, differentiates
    through `tensor`.
    """
    while not tensor.requires_grad:
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return True


def constant(leaf: Any) -> Any:
    """Return a tensor that nobody differentiates, or what is no tensor.

    To see that it is one already is faster than `detach`.
    """
    if not isinstance(leaf, Tensor) or not (torch.compiler.is_compiling() or is_tracked(leaf)):
        return leaf
    return leaf.detach()


def innermost(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside the wrappers of every level of `torch.func`; that of a `vmap`
    has all its rows.
    """
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def entries(tensor: Tensor) -> int:
    """Return how many numbers it holds, in all rows of a `vmap` together."""
    return innermost(tensor).numel()


def is_differentiable(leaf: Any) -> bool:
    """Say whether it is a tensor of a kind that has derivatives."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def tracking_levels(tensor: Tensor) -> set[int]:
    """Return the levels of `torch.func.grad` that differentiate through `tensor`; plain autograd is
    level 0.
    """
    levels = set()
    while True:
        wrapped = functorch.is_functorch_wrapped_tensor(tensor)
        if tensor.requires_grad:
            levels.add(functorch.maybe_get_level(tensor) if wrapped else 0)
        if not wrapped:
            return levels
        tensor = functorch.get_unwrapped(tensor)


def values_are_readable() -> bool:
    """Say whether a tensor's value may decide what Python does next: not under vmap, grad, jvp or
    compile.
    """
    return not torch.compiler.is_compiling() and functorch.peek_interpreter_stack() is None


def is_last() -> bool:
    """Say whether nobody differentiates what is computed now: no graph, no forward mode, no
    transform and no compiler.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def inside_jvp() -> bool:
    """Say whether `torch.func.jvp` is active."""
    return any(
        level.key() == functorch.TransformType.Jvp
        for level in retrieve_all_functorch_interpreters()
    )


def has_tangent(leaf: Any) -> bool:
    """Say whether forward mode, of `torch.func.jvp` or by dual numbers, differentiates through a
    tensor.
    """
    if forward_ad._current_level < 0 or not is_differentiable(leaf):
        return False
    # a batched one cannot be asked
    while functorch.is_batchedtensor(leaf) or forward_ad.unpack_dual(leaf).tangent is None:
        if not functorch.is_functorch_wrapped_tensor(leaf):
            return False
        leaf = functorch.get_unwrapped(leaf)
    return True


def outside_transforms() -> AbstractContextManager[object]:
    """While entered, operations on tensors made inside run as if no `vmap` or `grad` were active."""
    return temporarily_clear_interpreter_stack()


def without_levels(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside those of the levels of `torch.func.grad`.

    Raises:
        ValueError: there is a level of `vmap` among them.
    """
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            raise ValueError(
                'A loop with Revolve(store="disk") cannot run under `vmap` (nor `jacrev`), which '
                "hides the values that are to be written. Go through the batch in a loop "
                '(`meta_grad(..., chunk_size=1)`), or use store="cpu".'
            )
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Return True if a level of `torch.func` holds the tensor."""
    return functorch.is_functorch_wrapped_tensor(tensor)


def alive(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, or None, without the wrappers of `torch.func` levels that have ended.

    When `torch.func.vjp` has returned, its level is over, but what an `autograd.Function` saved
    there is still wrapped in it while the pullback runs. Operations see through that; a transform
    started inside `backward` fails ("escaped?").
    """
    return None if tensor is None else functorch.unwrap_if_dead(tensor)


def constant_when_compiled(fn: Function) -> Function:
    """Mark a function that a compiler calls and does not look into: its result is a constant.

    This is `torch.compiler.assume_constant_result` in all but time: to set one attribute, that one
    imports the compiler, which takes as long as torch itself and is of no use to those who never
    compile. A test compares the two.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn

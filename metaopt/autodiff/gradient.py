"""The gradient of a scalar function of a tree, by the cheaper of torch's two ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack

from metaopt import tree
from metaopt.autodiff.graph import VARIABLES
from metaopt.transforms import constant, is_tracked, values_are_readable
from metaopt.tree import Tree

_ENGINE = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]


def gradient(function: Callable[[Tree], tuple[Tensor, Tree]], at: Tree, *, allow_unused: bool = False) -> tuple[Tree, Tensor, Tree]:
    """Return (grad f(w), f(w), aux) for (f(w), aux) = function(w); differentiable again in whatever f reads.

    `torch.func.grad` records its backward pass, at its own level and at every level around it. Plain autograd records it
    once, or not at all where nobody differentiates it again: a second-order task of a convolution network took .86 of the
    time, and a meta-gradient of 300 steps a third of the memory. It stands in
    where no transform of `torch.func` is active and no compiler, and where w is differentiated if
    anything is: otherwise a graph would begin at w that nobody asked for.

    Args:
        function: from a tree to (a floating-point scalar, a tree of tensors).
        at: w, a tree of floating-point or complex tensors.
        allow_unused: return None, not zeros, for a leaf that f does not depend on, where plain autograd stands in.

    Cost:
        One evaluation and one backward pass.
    """
    leaves = tree.leaves(at)
    again = torch.is_grad_enabled()
    if _needs_transform(leaves, again):
        grads, (value, aux) = torch.func.grad_and_value(function, has_aux=True)(at)
        return grads, value, aux
    torch._C._set_grad_enabled(True)  # the context manager takes as long as a small operation
    # Aliases: the function may read the same tensors by another way, and that is not w.
    variables = [leaf.view_as(leaf) for leaf in leaves] if again else [leaf.detach().requires_grad_() for leaf in leaves]
    running = VARIABLES.set((*VARIABLES.get(), *variables))
    try:
        value, aux = function(tree.with_leaves(at, variables))
        depends = value.requires_grad
        found = _slopes(value, variables, again) if depends else [None] * len(leaves)
    finally:
        VARIABLES.reset(running)
        torch._C._set_grad_enabled(again)
    if not allow_unused and any(grad is None for grad in found):
        known = zip(found, leaves, strict=True)
        found = [torch.zeros_like(leaf, requires_grad=again and depends) if grad is None else grad for grad, leaf in known]
    if not again:
        value, aux = value.detach(), tree.map(constant, aux)
    return tree.with_leaves(at, found), value, aux


def _slopes(value: Tensor, variables: list[Tensor], again: bool) -> Sequence[Tensor | None]:
    """Return the derivatives of a scalar, None where it does not depend.

    `torch.autograd.grad` without its looks at what it is given, which took a tenth of the gradient of a small network.
    """
    if type(value) is not Tensor or value.ndim or value.is_complex() or _len_torch_function_stack():
        return torch.autograd.grad(value, variables, create_graph=again, allow_unused=True)
    one = torch.ones_like(value)
    return _ENGINE.run_backward((value,), (one,), again, again, tuple(variables), allow_unreachable=True, accumulate_grad=False)


def _needs_transform(leaves: list[Tensor], again: bool) -> bool:
    """Say whether plain autograd cannot stand in; in inference mode it would answer zero."""
    if not values_are_readable():  # first: a compiler cannot be asked the rest
        return True
    inference = torch.is_inference_mode_enabled() or any(map(Tensor.is_inference, leaves))
    return inference or (again and not all(map(is_tracked, leaves)))

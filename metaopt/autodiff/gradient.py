"""The gradient of a scalar function of a tree, by the cheaper of torch's two ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaopt import tree
from metaopt.transforms import is_tracked, values_are_readable
from metaopt.tree import Tree


def gradient(function: Callable[[Tree], tuple[Tensor, Tree]], at: Tree) -> tuple[Tree, Tensor, Tree]:
    """Return (grad f(w), f(w), aux) for (f(w), aux) = function(w); differentiable again in whatever f reads.

    `torch.func.grad` records its backward pass, at its own level and at every level around it. Plain autograd records it
    once, or not at all where nobody differentiates it again: a second-order task of a convolution network took .86 of the
    time, and a meta-gradient of 300 steps a third of the memory. It stands in
    where no transform of `torch.func` is active and no compiler, and where w is differentiated if
    anything is: otherwise a graph would begin at w that nobody asked for.

    Args:
        function: from a tree to (a floating-point scalar, a tree of tensors).
        at: w, a tree of floating-point or complex tensors.

    Cost:
        One evaluation and one backward pass.
    """
    leaves = tree.leaves(at)
    again = torch.is_grad_enabled()
    if _needs_transform(leaves, again):
        grads, (value, aux) = torch.func.grad_and_value(function, has_aux=True)(at)
        return grads, value, aux
    with torch.enable_grad():
        # Aliases: the function may read the same tensors by another way, and that is not w.
        variables = [leaf.view_as(leaf) for leaf in leaves] if again else [leaf.detach().requires_grad_() for leaf in leaves]
        value, aux = function(tree.with_leaves(at, variables))
        if not value.requires_grad:
            grads = [torch.zeros_like(leaf) for leaf in leaves]
        else:
            grads = torch.autograd.grad(value, variables, create_graph=again, materialize_grads=True)
    if not again:
        value, aux = value.detach(), tree.map(torch.Tensor.detach, aux)
    return tree.with_leaves(at, grads), value, aux


def _needs_transform(leaves: list[Tensor], again: bool) -> bool:
    """Say whether plain autograd cannot stand in; in inference mode it would answer zero."""
    if not values_are_readable():  # first: a compiler cannot be asked the rest
        return True
    inference = torch.is_inference_mode_enabled() or any(leaf.is_inference() for leaf in leaves)
    return inference or (again and not all(map(is_tracked, leaves)))

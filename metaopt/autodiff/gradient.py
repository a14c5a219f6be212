"""The gradient of a scalar function of a tree, by the cheaper of torch's two ways."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.graph import find_ancestors, goes_beyond
from metaopt.autodiff.plain import Recording, begin_at, cut, slopes_of_scalar, stands_in
from metaopt.distributed import OverlappedSums, is_shared
from metaopt.transforms import constant
from metaopt.tree import Tree

Valued = Callable[[Tree], tuple[Tensor, Tree]]  # w -> (f(w), aux)


def gradient(
    function: Valued, at: Tree, *, allow_unused: bool = False, is_constant: bool = False
) -> tuple[Tree, Tensor, Tree]:
    """Return (grad f(w), f(w), aux) for (f(w), aux) = function(w).

    It is differentiable again in whatever f reads.

    `torch.func.grad` records its backward pass, at its own level and at every level around it.
    Plain autograd records it once, or not at all where nobody differentiates it again: a
    second-order task of a convolution network took .86 of the time, and a meta-gradient of 300
    steps a third of the memory. It stands in where no transform of `torch.func` is active and no
    compiler.

    Args:
        function: from a tree to (a floating-point scalar, a tree of tensors).
        at: w, a tree of floating-point or complex tensors.
        allow_unused: return None, not zeros, for a leaf that f does not depend on.
        is_constant: whether grad f(w) is a constant, of which no graph is kept; f(w) and aux are
            differentiable.

    Cost:
        One evaluation and one backward pass.
    """
    leaves = tree.leaves(at)
    if not stands_in(leaves):
        return _transform(function, at, allow_unused, is_constant)
    again = torch.is_grad_enabled()
    variables = begin_at(leaves, again)
    # a first derivative, whose sums over ranks can go beside the backward pass
    sums = OverlappedSums(variables) if not again and is_shared() else None
    recorded = variables if sums is None else [*variables, *sums.copies]
    with Recording(recorded), sums or nullcontext():
        value, aux = function(tree.with_leaves(at, variables))
    goes_on = (
        again
        and not is_constant
        and value.requires_grad
        and (all(leaf.requires_grad for leaf in leaves) or goes_beyond(value))
    )
    backward = partial(slopes_of_scalar, value, again=goes_on, keep=again and is_constant)
    # also of a constant: on another rank it may be none, and that rank waits for this one's part
    found: Tree = backward(variables) if sums is None else sums.differentiate(backward)
    if not allow_unused and type(None) in map(type, found):
        known = zip(found, leaves, strict=True)
        found = [
            torch.zeros_like(leaf, requires_grad=goes_on) if grad is None else grad
            for grad, leaf in known
        ]
    if again:
        found, value, aux = cut((found, value, aux), leaves)
    else:  # without the graph, which nobody asked for
        value, aux = value.detach(), tree.map(constant, aux)
    return tree.with_leaves(at, found), value, aux


# the same with grad f(w) a constant
constant_gradient = partial(gradient, is_constant=True)


def _transform(
    function: Valued, at: Tree, allow_unused: bool, is_constant: bool
) -> tuple[Tree, Tensor, Tree]:
    noting = _Noting(function) if allow_unused else function
    if is_constant:
        value, pull, aux = torch.func.vjp(noting, at, has_aux=True)  # type: ignore[misc]
        with torch.no_grad():  # no graph of the backward pass for the levels around this one
            (grads,) = pull(torch.ones_like(value))
        grads = tree.map(torch.Tensor.detach, grads)
    else:
        grads, (value, aux) = torch.func.grad_and_value(noting, has_aux=True)(at)
    return noting.without_unused(grads) if isinstance(noting, _Noting) else grads, value, aux


class _Noting:
    """A function that notes which leaves its value depends on; a transform answers with zeros."""

    def __init__(self, function: Valued):
        self.function = function
        self._used: list[bool] = []

    def __call__(self, at: Tree) -> tuple[Tensor, Tree]:
        if torch.compiler.is_compiling():
            raise ValueError(
                'unused="skip" cannot be compiled, nor can what contains it: a compiler does not '
                "see what a loss depends on. Leave one of the two out, or freeze what is unused "
                'and write unused="zero".'
            )
        value, aux = self.function(at)
        below = find_ancestors(value)
        self._used = [id(leaf) in below or id(leaf.grad_fn) in below for leaf in tree.leaves(at)]
        return value, aux

    def without_unused(self, grads: Tree) -> Tree:
        """Return the gradients with None for what the value does not depend on."""
        pairs = zip(tree.leaves(grads), self._used, strict=True)
        return tree.with_leaves(grads, [grad if is_used else None for grad, is_used in pairs])

"""Plain autograd in the place of the transforms of `torch.func`, wherever none is active."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.graph import VARIABLES, begin_leaf, goes_beyond
from metaopt.torch_internals import is_autograd_excluded, run_backward, uses_dual_numbers
from metaopt.transforms import values_are_readable
from metaopt.tree import Tree


def stands_in(leaves: Sequence[Tensor]) -> bool:
    """Return True if plain autograd can differentiate a function of these leaves.

    Not inside a transform or a compiler; nor in inference mode, where it would answer zero; nor in
    forward mode, of which a fresh variable would lose the tangent. Elsewhere it can, and takes
    operators that a transform refuses: an `autograd.Function` of the old style, whose `forward` has
    a `ctx`.
    """
    if not values_are_readable():  # first: a compiler cannot be asked the rest
        return False
    return not uses_dual_numbers() and not (
        is_autograd_excluded() or any(map(Tensor.is_inference, leaves))
    )


def begin_at(leaves: Sequence[Tensor], again: bool) -> list[Tensor]:
    """Return variables with the values of the leaves, at which a graph begins.

    Args:
        leaves: tensors.
        again: whether the graph of the leaves goes on; where a leaf has none, it begins here.
    """
    # Aliases: a function may read the same tensors by another way, and these are not variables.
    if again:
        return [leaf.view_as(leaf) if leaf.requires_grad else begin_leaf(leaf) for leaf in leaves]
    return [leaf.detach().requires_grad_() for leaf in leaves]


class Recording:
    """While entered, a graph is kept of what is computed from these variables."""

    def __init__(self, variables: Sequence[Tensor]):
        self.variables = variables

    def __enter__(self) -> None:
        self._running = VARIABLES.set((*VARIABLES.get(), *self.variables))
        self._before = torch.is_grad_enabled()
        torch.set_grad_enabled(True)

    def __exit__(self, *_: object) -> None:
        VARIABLES.reset(self._running)
        torch.set_grad_enabled(self._before)


def slopes(
    results: Sequence[Tensor],
    variables: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    again: bool = False,
    keep: bool = False,
) -> Sequence[Tensor | None]:
    """Return the cotangents of the variables, None where no result depends on one.

    Args:
        results: tensors.
        variables: what they were computed from.
        cotangents: those of the results.
        again: whether the derivatives are differentiable.
        keep: whether the graph of the results is needed again.
    """
    reached, bars = results, cotangents
    if not all(result.requires_grad for result in results):
        pairs = zip(results, cotangents, strict=True)
        found = [(result, bar) for result, bar in pairs if result.requires_grad]
        if not found:
            return [None] * len(variables)
        reached, bars = zip(*found, strict=True)
    return run_backward(reached, bars, variables, keep=keep or again, again=again)


def slopes_of_scalar(
    value: Tensor, variables: Sequence[Tensor], *, again: bool, keep: bool = False
) -> Sequence[Tensor | None]:
    """Return the derivatives of a scalar, None where it does not depend on a variable."""
    if not value.requires_grad:
        return [None] * len(variables)
    if value.ndim or value.is_complex():  # torch's error, or its word for one entry
        return torch.autograd.grad(
            value, variables, retain_graph=keep or again, create_graph=again, allow_unused=True
        )
    one = (torch.ones_like(value),)
    return run_backward((value,), one, variables, keep=keep or again, again=again)


def cut(values: Tree, leaves: Sequence[Tensor]) -> Tree:
    """Detach what was computed from nothing but fresh variables, if some leaves were given one."""
    if all(leaf.requires_grad for leaf in leaves):
        return values
    return tree.map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) and not goes_beyond(leaf) else leaf,
        values,
    )

"""The graph of plain autograd: what a tensor was computed from, and which tensors are being differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

from torch import Tensor

from metaopt.transforms import innermost

# The variables of the calls of `gradient` and `pull_back` that are running, where plain autograd stands in for torch.func.
VARIABLES: ContextVar[tuple[Tensor, ...]] = ContextVar("variables", default=())


def ancestors(value: Tensor) -> dict[int, object]:
    """Return id -> object for `value`, the autograd nodes below it, and the leaf tensors that these end in.

    The objects are kept: Python makes one for a node when somebody asks, and would give its id to the next one.
    """
    found: dict[int, object] = {id(value): value}
    pending = [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and id(node) not in found:
            leaf = getattr(node, "variable", None)
            found |= {id(node): node} if leaf is None else {id(node): node, id(leaf): leaf}
            pending += [parent for parent, _ in node.next_functions]
    return found


def is_varied(tensor: Tensor) -> bool:
    """Say whether plain autograd, where it stands in for `torch.func`, differentiates through `tensor`.

    It is then computed from a variable of a running call, as a tensor at a level of `torch.func.grad` is from that level's.
    """
    variables = VARIABLES.get()
    if not variables:
        return False
    tensor = innermost(tensor)
    if not tensor.requires_grad:
        return False
    below = ancestors(tensor)
    return any(id(variable) in below or id(variable.grad_fn) in below for variable in variables)


def goes_beyond(tensor: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Say whether the graph of a tensor ends in other tensors than these leaves."""
    if tensor.grad_fn is None:
        return tensor.requires_grad and all(tensor is not leaf for leaf in leaves)
    own = {id(leaf) for leaf in leaves}
    seen: dict[int, object] = {}
    pending = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            return True
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return False

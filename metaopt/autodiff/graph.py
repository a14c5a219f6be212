"""What a tensor was computed from by plain autograd, and what is being differentiated."""

from __future__ import annotations

from contextvars import ContextVar

from torch import Tensor

from metaopt.transforms import unwrap

# The variables of the calls of `gradient` and `pull_back` that are running, where plain autograd
# stands in for torch.func.
VARIABLES: ContextVar[tuple[Tensor, ...]] = ContextVar("variables", default=())


def find_ancestors(value: Tensor) -> dict[int, object]:
    """Return id -> object for `value`, the autograd nodes below it, and the leaves at their ends.

    The objects are kept: Python makes one for a node when somebody asks, and would give its id to
    the next one.
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
    """Return True if plain autograd, in the place of `torch.func`, differentiates a tensor.

    It is then computed from a variable of a running call, as a tensor at a level of
    `torch.func.grad` is from that level's.
    """
    variables = VARIABLES.get()
    if not variables:
        return False
    tensor = unwrap(tensor)
    if not tensor.requires_grad:
        return False
    below = find_ancestors(tensor)
    return any(id(variable) in below or id(variable.grad_fn) in below for variable in variables)


def begin_leaf(leaf: Tensor) -> Tensor:
    """Return a variable with the value of a leaf without a graph, which begins at it."""
    variable = leaf.detach().requires_grad_()
    variable.is_beginning = True  # type: ignore[attr-defined]  # which autograd keeps with it
    return variable


def goes_beyond(tensor: Tensor) -> bool:
    """Return True if a tensor depends on anything but beginnings of calls that have ended."""
    if not tensor.requires_grad:
        return False
    running = [
        thing
        for variable in VARIABLES.get()
        for thing in (variable, variable.grad_fn)
        if thing is not None
    ]
    alive = {id(thing) for thing in running}
    if id(tensor) in alive or tensor.grad_fn is None:
        return id(tensor) in alive or not _is_beginning(tensor)
    seen: dict[int, object] = {}
    pending = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        leaf = getattr(node, "variable", None)
        if alive & {id(node), id(leaf)} or (isinstance(leaf, Tensor) and not _is_beginning(leaf)):
            return True
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return False


def _is_beginning(leaf: Tensor) -> bool:
    return getattr(leaf, "is_beginning", False)

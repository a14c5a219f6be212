"""Errors in the place of zeros: where what is differentiated has no derivative by a rule."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.derivative import with_derivative
from metaopt.autodiff.graph import is_varied
from metaopt.differentiate.protocol import Rule
from metaopt.transforms import is_tracked, tracking_levels
from metaopt.tree import Tree


def refuse_zeros(rule: Rule, ignored: dict[str, Tree], read: Tree) -> None:
    """Raise if the derivative in something is asked for that the rule ignores: it would be zero.

    So `torch.func.grad` asks, and `gradient` where plain autograd stands in for it. A backward pass
    says only when it comes what it asks for: see `attach_refusal`.

    Args:
        rule: the rule, for the message.
        ignored: what they are called -> tensors.
        read: what the rule has a derivative in.

    Raises:
        ValueError: and the message names the tensor.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for what, name, leaf in _find_unread(ignored, read):
        if tracking_levels(leaf) - {0} or is_varied(leaf):
            raise _refusal(rule, what, name, leaf)


def attach_refusal(rule: Rule, values: Tree, ignored: dict[str, Tree], read: Tree) -> Tree:
    """Return the values; a backward pass is an error if only what is ignored requires grad.

    Args:
        rule: the rule, for the message.
        values: a tree of tensors.
        ignored: what they are called -> tensors.
        read: what the rule has a derivative in.

    Raises:
        ValueError: in the backward pass. Nothing happens before.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or tree.is_any_tracked(values):
        return values
    tracked = [one for one in _find_unread(ignored, read) if is_tracked(one[2])]
    if not tracked:
        return values

    def refuse(*_: Tree) -> Tree:
        raise _refusal(rule, *tracked[0])

    return with_derivative(refuse, values, [leaf for *_, leaf in tracked])


def _find_unread(ignored: dict[str, Tree], read: Tree) -> list[tuple[str, str, Tensor]]:
    """Return (what, path, leaf) for the tensors that are not among those in `read`."""
    known = {id(leaf) for leaf in tree.leaves(read)}
    return [
        (what, name, leaf)
        for what, tensors in ignored.items()
        for name, leaf in tree.named_leaves(tensors)
        if isinstance(leaf, Tensor) and id(leaf) not in known
    ]


def _refusal(rule: Rule, what: str, name: str, leaf: Tensor) -> ValueError:
    return ValueError(
        f"{type(rule).__name__}: the {what} must not be differentiated, but {name} (shape "
        f"{tuple(leaf.shape)}) is. For this rule the result does not depend on them: the answer "
        "would be zeros. Detach them and pass what is to be learned as `meta`; or, as in iMAML, "
        "pass the same tensors as `meta` too, and let the loss depend on them."
    )

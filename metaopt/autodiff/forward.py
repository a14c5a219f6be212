"""Derivatives in forward mode."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from metaopt import tree
from metaopt.exact_ops import any_order
from metaopt.torch_internals import mark_constant_when_compiled
from metaopt.tree import Tree


def slope_along(
    function: Callable[[Tree], Tree], at: Tree, along: Tree, *, asked: str, instead: str
) -> tuple[Tree, Tree]:
    """Return (f(x), d/de f(x + e v)).

    Args:
        function: f, from a tree of tensors to another.
        at: x.
        along: v, a tree like x.
        asked: who asks, for the error.
        instead: what to use in its place.

    Raises:
        ValueError: torch has no forward derivative of an operator in f, or none of an
            `autograd.Function` of the old style.
    """
    load_formulas()
    at = tree.map(_unfold, at)
    try:
        # some losses are computed so that their gradient has a forward derivative
        with any_order():
            value, slope, *_ = torch.func.jvp(function, (at,), (along,))
    except NotImplementedError as error:
        name = re.search(r"forward AD with (\S+)", str(error))
        if name is None:
            raise
        raise ValueError(
            f"{asked} needs the forward derivative of every operator in the loss and its gradient, "
            f"got `{name[1]}`, which has none in torch. Use {instead}."
        ) from error
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
        raise ValueError(
            f"{asked} runs the loss inside a transform of `torch.func`, which takes no "
            f"`autograd.Function` whose `forward` has a `ctx`, got one. Give it a `setup_context` "
            f"and a `jvp`, or use {instead}."
        ) from error
    return value, slope


def _unfold(leaf: Tensor) -> Tensor:
    """Return a tensor each of whose entries has a place of its own, which a dual number needs."""
    is_folded = any(
        by == 0 and size > 1 for by, size in zip(leaf.stride(), leaf.shape, strict=True)
    )
    return leaf.clone(memory_format=torch.contiguous_format) if is_folded else leaf


@mark_constant_when_compiled
def load_formulas() -> None:
    """Let torch load its forward derivatives, without the warnings that this gives."""
    _load_once()


# `catch_warnings` takes time, and is not safe where threads run beside: once is enough
@functools.cache
def _load_once() -> None:
    with warnings.catch_warnings():
        # Some formulas go through `torch.jit.script`, which torch has deprecated: seen in 2.13 to
        # 2.15.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script(_method)?` is deprecated")
        torch.func.jvp(torch.neg, (torch.zeros(()),), (torch.zeros(()),))

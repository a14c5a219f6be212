"""Marking an activation as one to be differentiated: inside a transform it has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _mark(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    """Mark a tensor, but do nothing where torch refuses.

    A transform differentiates what it is asked for, marked or not. Hooks that stay behind mark
    activations: Hugging Face's and PEFT's `enable_input_require_grads`. Torch itself marks the
    inputs of its transforms in this way, and may: the call is tried, since its answer cannot be
    foreseen.
    """
    try:
        return tensor.requires_grad_(requires_grad)
    except RuntimeError as error:
        if "functorch transform" not in str(error):
            raise
        return tensor


def _set(tensor: Tensor, requires_grad: bool) -> None:
    _mark(tensor, requires_grad)


REQUIRES_GRAD: dict[Callable[..., object], Callable[..., Any]] = {
    torch.Tensor.requires_grad_: _mark,
    torch.Tensor.requires_grad.__set__: _set,  # type: ignore[attr-defined]
}

"""Attention on its plain kernel: the fused ones have no second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its fused kernels switched off."""

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return plain


# Modes are off inside a function of `F` that they have handed on to, hence the second entry.
ATTENTION: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _plain(function) for function in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
}

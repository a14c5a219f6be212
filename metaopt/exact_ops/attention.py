"""Attention from elementary operations, equal to torch's.

The fused kernels have no second derivative, and the plain one fails under `torch.func` inside a
bfloat16 autocast.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaopt.exact_ops.dropout import dropout


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(scale Q K' + mask) V.

    A query that may attend to nothing gets a row of zeros.
    """
    if is_causal and attn_mask is not None:  # torch's error
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = (x.to(wide) for x in (query, key, value))
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
        alone = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(alone, 0).softmax(-1).masked_fill(alone, 0)
    if dropout_p:
        weights = dropout(weights, dropout_p)
    found = weights @ value
    return found if dtype == wide else found.to(dtype)


def _multi_head(*args: Any, **kwargs: Any) -> Any:
    """Call torch's function with our attention inside it, where modes are off."""
    # A compiler cannot trace the function with other globals.
    if torch.compiler.is_compiling():
        with sdpa_kernel(SDPBackend.MATH):
            return F.multi_head_attention_forward(*args, **kwargs)
    return _with_our_attention(*args, **kwargs)


_with_our_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "scaled_dot_product_attention": _attention, "dropout": dropout},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

ATTENTION: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
}

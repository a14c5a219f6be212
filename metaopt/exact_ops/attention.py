"""Attention from elementary operations, equal to torch's.

The fused kernels have no second derivative, and the plain one fails under `torch.func` inside a
bfloat16 autocast.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaopt.exact_ops.dropout import dropout
from metaopt.exact_ops.recomputed import recomputed
from metaopt.torch_internals import uses_dual_numbers
from metaopt.transforms import is_inside_jvp

LONG = 1024**2  # scores a head: fewer are kept as a whole, which is faster up to about there
ROWS = 128  # queries at a time: 64 and 256 take as long, and more memory


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

    A query that may attend to nothing gets a row of zeros. The scores of `LONG` entries a head and
    more are never there as a whole: `ROWS` queries at a time are attended to, and again for each
    derivative. Not with dropout, in a compiler, or with dual numbers.
    """
    if is_causal and attn_mask is not None:  # torch's error
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    causal_from = 0 if is_causal else None
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    is_long = query.shape[-2] * key.shape[-2] >= LONG and query.shape[-2] > ROWS
    if not is_long or dropout_p or torch.compiler.is_compiling() or _has_plain_tangents():
        return _attend(scale, dropout_p, causal_from, *tensors)
    return _attend_in_parts(scale, is_causal, *tensors)


def _has_plain_tangents() -> bool:
    """Return True for dual numbers outside of `torch.func.jvp`, which does not nest in them."""
    return uses_dual_numbers() and not is_inside_jvp()


def _attend(
    scale: float,
    dropout_p: float,
    causal_from: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the attention of some queries; of causal ones the first has this position."""
    if causal_from is not None:
        # Keys behind the last query are seen by nobody.
        key, value = (x[..., : causal_from + query.shape[-2], :] for x in (key, value))
        mask = torch.ones(
            query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
        ).tril(causal_from)
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = (x.to(wide) for x in (query, key, value))
    scores = query * scale @ key.transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        allowed = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if allowed else scores + mask
        alone = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(alone, 0).softmax(-1).masked_fill(alone, 0)
    if dropout_p:
        weights = dropout(weights, dropout_p)
    found = weights @ value
    return found if dtype == wide else found.to(dtype)


def _attend_in_parts(
    scale: float,
    is_causal: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Return `_attend`, `ROWS` queries at a time.

    Each part is given all keys and values, and takes its own by itself: were they cut here, the
    cotangents of all cuts would wait for each other.
    """
    device = query.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    has_rows = mask is not None and mask.ndim > 1 and mask.shape[-2] > 1
    parts = []
    for first in range(0, query.shape[-2], ROWS):
        rows = slice(first, first + ROWS)
        masks = () if mask is None else (mask[..., rows, :] if has_rows else mask,)
        attend = partial(_attend_as_before, device, precision, scale, first if is_causal else None)
        parts.append(recomputed(attend, query[..., rows, :], key, value, *masks))
    return torch.cat(parts, -2)


def _attend_as_before(
    device: str,
    precision: torch.dtype | None,
    scale: float,
    causal_from: int | None,
    *tensors: Tensor,
) -> Tensor:
    """Return `_attend` in the autocast of the forward pass: a backward pass runs outside of it."""
    with torch.autocast(device, precision, enabled=precision is not None):
        return _attend(scale, 0.0, causal_from, *tensors)


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

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

from metaopt.exact_ops.attend import Attend
from metaopt.exact_ops.dropout import dropout
from metaopt.exact_ops.in_parts import InParts
from metaopt.exact_ops.recomputed import recomputed
from metaopt.torch_internals import uses_dual_numbers
from metaopt.transforms import is_inside_jvp, values_are_readable

LONG = 1024**2  # scores a head: fewer are kept as a whole, which is faster up to about there
ROWS = 128  # queries at a time: 64 take a tenth longer, 256 more memory


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
    derivative. Not with dropout, in a compiler, or with dual numbers. Of constants torch's own
    kernel is taken, but for masks, where it may see a row of nothing otherwise, and dropout.
    """
    is_error = is_causal and attn_mask is not None  # torch has it
    is_plain = attn_mask is None and not dropout_p and _are_constant(query, key, value)
    if is_error or is_plain:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    is_long = query.shape[-2] * key.shape[-2] >= LONG and query.shape[-2] > ROWS
    if not is_long or dropout_p or torch.compiler.is_compiling() or _has_plain_tangents():
        return Attend(scale, 0 if is_causal else None).attend(*tensors, dropout_p=dropout_p)
    return _attend_in_parts(scale, is_causal, *tensors)


def _are_constant(*tensors: Tensor) -> bool:
    """Return True if nobody differentiates the tensors, in any way."""
    if not values_are_readable() or uses_dual_numbers():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _has_plain_tangents() -> bool:
    """Return True for dual numbers outside of `torch.func.jvp`, which does not nest in them."""
    return uses_dual_numbers() and not is_inside_jvp()


def _attend_in_parts(scale: float, is_causal: bool, query: Tensor, *others: Tensor) -> Tensor:
    """Return the same, `ROWS` queries at a time."""
    device = query.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def attend(first: int) -> Attend:
        return Attend(scale, first if is_causal else None, precision)

    has_rows = [mask.ndim > 1 and mask.shape[-2] > 1 for mask in others[2:]]
    whole = InParts(attend, ROWS, [True, False, False, *has_rows], [True])
    found: Tensor = recomputed(whole, query, *others)[0]
    return found


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

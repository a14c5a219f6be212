"""Norms equal to torch's, with derivatives that are right at every order.

They are computed by torch's kernels where `fused_norms` can differentiate these, else from
elementary operations.

Torch's formula for the second derivative of layer, batch and instance norms takes the saved mean
and variance for constants, so that a third derivative, and the second through `grad(vmap(grad))`,
are silently wrong by per cents (pytorch issues 175754 and 186256). Of weight norm already the
second derivative is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.exact_ops.fused_norms import (
    Axes,
    BatchAxes,
    FusedAxes,
    LayerAxes,
    fused_norm,
    is_fusable,
)
from metaopt.torch_internals import weight_norm
from metaopt.transforms import constant


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # of `torch.layer_norm` only
) -> Tensor:
    axes = LayerAxes(tuple(range(-len(normalized_shape), 0)), tuple(normalized_shape), eps)
    return _normalize(axes, input, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if running_mean is not None or input.numel() == input.shape[1]:
        _update_statistics(F.batch_norm, input, running_mean, running_var, momentum)
    axes = BatchAxes((0, *range(2, input.ndim)), _per_channel(input), eps)
    return _normalize(axes, input, weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    if running_mean is not None or input.numel() == input.shape[0] * input.shape[1]:
        _update_statistics(F.instance_norm, input, running_mean, running_var, momentum)
    axes = Axes(tuple(range(2, input.ndim)), _per_channel(input), eps)
    return _elementary(axes, input, weight, bias)


def _update_statistics(
    norm: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> None:
    """Let torch's own norm update the statistics, or complain of a single value.

    It gets the same memory, to be written to: a loop that is run again has it among what it
    differentiates.
    """
    constants = (constant(leaf) for leaf in (running_mean, running_var))
    norm(input.detach(), *constants, None, None, True, momentum)


def _reorder(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a norm that takes its arguments as `torch.batch_norm` does, not as `F.batch_norm`."""

    def call(
        input: Tensor,
        weight: Any,
        bias: Any,
        running_mean: Any,
        running_var: Any,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        named = {name: value for name, value in named.items() if name != "cudnn_enabled"}
        return norm(input, running_mean, running_var, weight, bias, *rest[:3], **named)

    return call


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return v g / |v|, with one norm per index of `dim`, or of the whole tensor for dim = -1."""
    dims = tuple(i for i in range(v.ndim) if dim == -1 or i != dim % v.ndim)
    return v * (g * (v * v).sum(dims, keepdim=True).rsqrt())


def _per_channel(input: Tensor) -> tuple[int, ...]:
    """Return the shape in which one value per channel broadcasts against [n, channels, ...]."""
    return (1, input.shape[1], *[1] * (input.ndim - 2))


def _normalize(
    axes: FusedAxes, input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    if is_fusable(axes, input, (weight, bias)):
        return fused_norm(axes, input, (weight, bias))
    return _elementary(axes, input, weight, bias)


def _elementary(axes: Axes, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias.

    It is computed in float32 at least, as the kernels do.
    """
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    centred, scale = axes.standardize(x)
    if weight is not None:
        scale = scale * weight.reshape(axes.shape)
    if bias is None:
        x = centred * scale
    else:
        x = torch.addcmul(bias.reshape(axes.shape).to(x.dtype), centred, scale.to(x.dtype))
    return x.to(input.dtype)


# `torch.layer_norm` and the others are what `F.layer_norm` calls; the order of their arguments is
# their own.
NORMS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm,
    torch.batch_norm: _reorder(_batch_norm),
    torch.instance_norm: _reorder(_instance_norm),
    weight_norm: _weight_norm,
}

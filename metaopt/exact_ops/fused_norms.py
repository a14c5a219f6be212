"""Batch and layer norm by torch's fused kernels, with derivatives that are right at every order.

With h = (x - <x>) r, r = 1 / sqrt(variance + eps) and <.> the mean over the axes that are
normalized, let

    y = w h + b,    p(u) = r (u - <u> - h <u h>).

p is linear and its own adjoint, dh = p(dx) and dr = -r^2 <h dx>. So the cotangents of (x, w, b),
given that of y, g, are

    p(w g),    sum g h,    sum g,

and those of (g, x, w), given the cotangents (s, t, u) of these three, are

    w p(s) + t h + u,    p(t g - r (<w g h> s + <s h> w g)) - r h <w g p(s)>,    sum g p(s).

The kernels compute y, and p with the <x> and r that they have saved. Where a result is to be
differentiated again these are no constants: there h, r and p are computed from x by elementary
operations, which have every further derivative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.torch_internals import uses_dual_numbers
from metaopt.transforms import values_are_readable

aten = torch.ops.aten


Affine = tuple[Tensor | None, Tensor | None]  # weight and bias
Saved = tuple[Tensor, Tensor]  # <x> and r, which broadcast against x


@dataclass(frozen=True)
class Axes:
    """What is normalized.

    Attributes:
        over: the axes of the means.
        shape: that in which parameters broadcast against x.
        eps: what is added to the variance.
    """

    over: tuple[int, ...]
    shape: tuple[int, ...]
    eps: float

    def mean(self, u: Tensor) -> Tensor:
        """Return <u>."""
        return u.mean(self.over, keepdim=True)

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x - <x>, r)."""
        centred = x - self.mean(x)
        return centred, torch.rsqrt(self.mean(centred * centred) + self.eps)


class FusedAxes(Axes, ABC):
    """Those that torch has a kernel for."""

    @property
    def parameters(self) -> tuple[int, ...]:
        """Return the shape of weight and bias."""
        return self.shape

    @abstractmethod
    def forward(self, x: Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Return (y, <x>, r) by torch's kernel."""

    @abstractmethod
    def backward(self, g: Tensor, x: Tensor, affine: Affine, saved: Saved) -> Any:
        """Return (p(w g), sum g h, sum g) by torch's kernel, None for a parameter that is None."""


class BatchAxes(FusedAxes):
    """Each channel of [n, channels, ...]; the parameters are constant in what is normalized."""

    @property
    def parameters(self) -> tuple[int, ...]:
        """Return the shape of weight and bias, [channels]."""
        return self.shape[1:2]

    def forward(self, x: Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, r = torch.native_batch_norm(x, *affine, None, None, True, 0.0, self.eps)
        return y, mean.view(self.shape), r.view(self.shape)

    def backward(self, g: Tensor, x: Tensor, affine: Affine, saved: Saved) -> Any:
        mean, r = (statistic.view(-1) for statistic in saved)
        return aten.native_batch_norm_backward(
            g, x, affine[0], None, None, mean, r, True, self.eps, _list_wanted(affine)
        )


class LayerAxes(FusedAxes):
    """The last axes; the parameters are constant in all others."""

    def forward(self, x: Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, self.shape, *affine, self.eps)

    def backward(self, g: Tensor, x: Tensor, affine: Affine, saved: Saved) -> Any:
        return aten.native_layer_norm_backward(
            g, x, self.shape, *saved, *affine, _list_wanted(affine)
        )


def _list_wanted(affine: Affine) -> list[bool]:
    """Return which of the cotangents of (x, w, b) the kernels are to compute."""
    return [True, *(parameter is not None for parameter in affine)]


def is_fusable(axes: FusedAxes, x: Tensor, affine: Affine) -> bool:
    """Return True if `fused_norm` is for this.

    Not under a transform of `torch.func`, which may need forward derivatives or rules for batches,
    nor under a compiler, which fuses by itself; in half precision the sums of a second derivative
    would lose digits; wrong shapes are left to torch.
    """
    return (
        values_are_readable()
        and not uses_dual_numbers()
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and all(p is None or (p.dtype == x.dtype and p.shape == axes.parameters) for p in affine)
    )


def fused_norm(axes: FusedAxes, x: Tensor, affine: Affine) -> Tensor:
    """Return y, of the shape of x [...]; weight and bias are those of torch."""
    y: Tensor = _Norm.apply(axes, x, *affine)  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    """(x, w, b) -> y."""

    @staticmethod
    def forward(ctx: Any, axes: FusedAxes, x: Tensor, *affine: Tensor | None) -> Tensor:
        weight, bias = affine
        y, *saved = axes.forward(x, (weight, bias))
        ctx.axes = axes
        ctx.save_for_backward(x, weight, bias, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        axes, (x, weight, bias, mean, r) = ctx.axes, ctx.saved_tensors
        if values_are_readable() and not uses_dual_numbers():
            bars = _PullBack.apply(axes, g, x, weight, bias, mean, r)  # type: ignore[no-untyped-call]
        else:
            # Cotangents in a batch, or a transform or forward mode that began after the forward
            # pass.
            h, _, p = _elementary(axes, x)
            bars = p(_scale(axes, g, weight)), _sum_to(axes, g * h, weight), _sum_to(axes, g, bias)
        return None, *(
            bar if needed else None
            for bar, needed in zip(bars, ctx.needs_input_grad[1:], strict=True)
        )


class _PullBack(torch.autograd.Function):
    """(g, x, w) -> (p(w g), sum g h, sum g); the bias says only that there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        axes: FusedAxes,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        r: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.axes = axes
        ctx.save_for_backward(g, x, weight, mean, r)
        return tuple(axes.backward(g, x, (weight, bias), (mean, r)))

    @staticmethod
    def backward(
        ctx: Any, s: Tensor, t: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        axes, (g, x, weight, mean, r) = ctx.axes, ctx.saved_tensors
        again = torch.is_grad_enabled() or not values_are_readable()
        h, r, p = _elementary(axes, x) if again else _by_kernel(axes, x, (mean, r))
        wg, ps = _scale(axes, g, weight), p(s)
        to_g, to_h = _scale(axes, ps, weight), -r * (axes.mean(wg * h) * s + axes.mean(s * h) * wg)
        if t is not None:
            t = t.reshape(axes.shape)
            to_g, to_h = to_g + t * h, to_h + t * g
        if u is not None:
            to_g = to_g + u.reshape(axes.shape)
        to_x = p(to_h) - r * axes.mean(wg * ps) * h
        return None, to_g, to_x, _sum_to(axes, g * ps, weight), None, None, None


Parts = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]


def _elementary(axes: Axes, x: Tensor) -> Parts:
    """Return h, r and p, differentiable in x."""
    centred, r = axes.standardize(x)
    h = centred * r
    return h, r, lambda u: r * (u - axes.mean(u) - h * axes.mean(u * h))


def _by_kernel(axes: FusedAxes, x: Tensor, saved: Saved) -> Parts:
    """Return h, r and p from what the forward pass has saved."""
    mean, r = saved
    return torch.addcmul(-mean * r, x, r), r, lambda u: axes.backward(u, x, (None, None), saved)[0]


def _scale(axes: Axes, u: Tensor, weight: Tensor | None) -> Tensor:
    return u if weight is None else u * weight.reshape(axes.shape)


def _sum_to(axes: Axes, u: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Sum to the shape of the parameter."""
    return None if parameter is None else u.sum_to_size(axes.shape).reshape(parameter.shape)

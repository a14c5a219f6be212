"""A loss whose derivatives are computed s times as large, so that float16 does not lose them.

Between where tensors enter it and where its value leaves, all cotangents are scaled by s:

    enter: y = x    into the loss        cotangent leaves: dx = dy / s
    leave: y = x    out of the loss      cotangent enters: dx = s dy

The gradient g = s (dL/dw) / s is a value outside of the loss, and the loss in its derivative is
again one whose cotangents are scaled: what crosses the border inwards gets the factor s, what
crosses it outwards 1 / s. So the derivative of dy -> dy / s, above, is not 1 / s but s (1 / s) = 1,
and H v comes out as it is; with 1 / s it would be H v / s. Both maps, and all that come about by
differentiating them, have the form

    y = f x    cotangent: dx = f r dy, a map with the factors f r and 1 / r

with f = 1 and r = 1 / s to enter, r = s to leave. Tangents cross as values do, by the factor f.
Of a power of two every factor is exact.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from metaopt import tree
from metaopt.torch_internals import allow_in_compiled_graphs
from metaopt.transforms import is_differentiable
from metaopt.tree import Tree


class _Cross(Function):
    """(x, f, r) -> f x, whose cotangent is f r times that of the result."""

    @staticmethod
    def forward(x: Tensor, factor: float, ratio: float) -> Tensor:
        return x.view_as(x) if factor == 1 else x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        _, ctx.factor, ctx.ratio = inputs

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None, None]:
        return _cross(bar, ctx.factor * ctx.ratio, 1 / ctx.ratio), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: None) -> Tensor:
        return _cross(tangent, ctx.factor, ctx.ratio)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None, None], x: Tensor, factor: float, ratio: float
    ) -> tuple[Tensor, int | None]:
        return _cross(x, factor, ratio), in_dims[0]


# as the sums over ranks: a compiler that looked inside would get derivatives wrong
@allow_in_compiled_graphs
def _cross(x: Tensor, factor: float, ratio: float) -> Tensor:
    found: Tensor = _Cross.apply(x, factor, ratio)  # type: ignore[no-untyped-call]
    return found


def enter_scaled(values: Tree, scale: float) -> Tree:
    """Return the same numbers, for a loss in which cotangents are `scale` times as large."""
    return tree.map(lambda x: _cross(x, 1.0, 1 / scale) if is_differentiable(x) else x, values)


def leave_scaled(values: Tree, scale: float) -> Tree:
    """Return what such a loss returns, for the world outside of it."""
    return tree.map(lambda x: _cross(x, 1.0, scale) if is_differentiable(x) else x, values)

"""An identity whose cotangent is bounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.torch_internals import allow_in_compiled_graphs
from metaopt.transforms import has_tangent, is_differentiable, is_inside_jvp
from metaopt.tree import Tree


def clamp_cotangents(w: Tree, limit: float) -> Tree:
    """Return w; entries of its cotangents are clamped to [-limit, limit] on the way back.

    So are the real and the imaginary parts of complex ones.

    Raises:
        ValueError: in forward mode, where there are no cotangents.
    """
    return tree.map(lambda leaf: _clamp(leaf, limit) if is_differentiable(leaf) else leaf, w)


def _clamp(leaf: Tensor, limit: float) -> Tensor:
    if not torch.compiler.is_compiling() and (is_inside_jvp() or has_tangent(leaf)):
        raise ValueError(
            f"Backprop(clip={limit}) bounds the cotangents on the way back, and there are none in "
            "forward mode. Leave `clip` out there."
        )
    same = _pass(tree.as_real(leaf), limit)
    return tree.as_complex(same) if leaf.is_complex() else same


# A compiler that looked inside would refuse the batch of a `vmap`.
@allow_in_compiled_graphs
def _pass(x: Tensor, limit: float) -> Tensor:
    same: Tensor = _Clamp.apply(x, limit)  # type: ignore[no-untyped-call]
    return same


class _Clamp(torch.autograd.Function):
    """x, whose cotangent is clamped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.limit = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent.clamp(-ctx.limit, ctx.limit), None

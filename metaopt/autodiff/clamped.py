"""An identity whose cotangent is bounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.transforms import is_differentiable
from metaopt.tree import Tree


def clamp_cotangents(w: Tree, limit: float) -> Tree:
    """Return w; entries of its cotangents are clamped to [-limit, limit] on the way back.

    So are the real and the imaginary parts of complex ones.
    """
    return tree.map(lambda leaf: _clamp(leaf, limit) if is_differentiable(leaf) else leaf, w)


def _clamp(leaf: Tensor, limit: float) -> Tensor:
    same: Tensor = _Clamp.apply(tree.as_real(leaf), limit)  # type: ignore[no-untyped-call]
    return tree.as_complex(same) if leaf.is_complex() else same


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

"""Attention that is differentiated twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """A gradient of a gradient through one attention to a sequence.

    Of sum(sin(dL/dx)) where L = sum(sin(attention)), in queries, keys and values x. A query sees
    all keys, those up to its own place, or what a mask shows: three quarters of them.
    """

    tokens: int = 2048
    heads: int = 8
    width: int = 64  # of each head
    batch: int = 1
    sees: Literal["all", "causal", "masked"] = "all"

    def data(self) -> list[Tensor]:
        """Return queries, keys and values, [batch, heads, tokens, width]."""
        generator = torch.Generator().manual_seed(1)
        shape = (3, self.batch, self.heads, self.tokens, self.width)
        return [x.requires_grad_() for x in torch.randn(shape, generator=generator)]

    def mask(self) -> Tensor | None:
        """Return which keys each query may see, [tokens, tokens], if that is told by a mask."""
        if self.sees != "masked":
            return None
        generator = torch.Generator().manual_seed(2)
        return torch.rand(self.tokens, self.tokens, generator=generator) < 0.75


def gradient_of_gradient(
    problem: Attention, inputs: list[Tensor], mask: Tensor | None
) -> dict[str, Tensor]:
    """Return what `Attention` asks for, by the kernels that are chosen where it is called."""
    is_causal = problem.sees == "causal"
    seen = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=is_causal)
    value = seen.sin().sum()
    slopes = torch.autograd.grad(value, inputs, create_graph=True)
    bars = torch.autograd.grad(sum(slope.sin().sum() for slope in slopes), inputs)
    return dict(zip(("query", "key", "value"), bars, strict=True))

"""Attention that is differentiated twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """A gradient of a gradient through one attention to a sequence.

    Of sum(sin(dL/dx)) where L = sum(sin(attention)), in queries, keys and values x.
    """

    tokens: int = 2048
    heads: int = 8
    width: int = 64  # of each head
    batch: int = 1

    def data(self) -> list[Tensor]:
        """Return queries, keys and values, [batch, heads, tokens, width]."""
        generator = torch.Generator().manual_seed(1)
        shape = (3, self.batch, self.heads, self.tokens, self.width)
        return [x.requires_grad_() for x in torch.randn(shape, generator=generator)]


def gradient_of_gradient(inputs: list[Tensor]) -> dict[str, Tensor]:
    """Return what `Attention` asks for, by the kernels that are chosen where it is called."""
    value = F.scaled_dot_product_attention(*inputs).sin().sum()
    slopes = torch.autograd.grad(value, inputs, create_graph=True)
    found = torch.autograd.grad(sum(slope.sin().sum() for slope in slopes), inputs)
    return dict(zip(("query", "key", "value"), found, strict=True))

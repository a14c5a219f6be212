"""Dropout that draws the same mask however it is differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Draw the mask in the order of the indices.

    By itself torch draws it in the order of the input's memory in plain autograd, and in that of
    the indices under `torch.func`: a step run again in another way would see another mask.
    """
    if not training or not 0 < p <= 1:  # torch's error
        return F.dropout(input, p, training, inplace)
    if inplace:
        ones = torch.ones_like(input, memory_format=torch.contiguous_format)
        return input.mul_(torch.native_dropout(ones, p, True)[0])
    return torch.native_dropout(input, p, True)[0]


def _alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return F.alpha_dropout(input if inplace else input.contiguous(), p, training, inplace)


DROPOUT: dict[Callable[..., object], Callable[..., Tensor]] = {
    F.dropout: dropout,
    F.alpha_dropout: _alpha_dropout,
    torch.dropout: lambda input, p, train: dropout(input, p, train),
}

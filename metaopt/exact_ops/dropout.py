"""Dropout that draws the same mask however it is differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Draw the mask in the order of the indices, from one stream of random numbers.

    By itself torch draws it in the order of the input's memory in plain autograd, in that of the
    indices under `torch.func`, and on a GPU from another stream there: a step run again in another
    way would see another mask. And where two levels of `vmap` draw one mask for the rows of the
    inner one, `torch.native_dropout` is an error or ends the process (torch 2.13).
    """
    if not training or not 0 < p < 1:  # nothing is drawn, or torch's error
        return F.dropout(input, p, training, inplace)
    ones = torch.ones(input.shape, dtype=torch.bool, device=input.device)
    mask, scale = torch.bernoulli(ones, 1 - p), 1 / (1 - p)
    return input.mul_(mask).mul_(scale) if inplace else input.mul(mask).mul(scale)


def _alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return F.alpha_dropout(input if inplace else input.contiguous(), p, training, inplace)


DROPOUT: dict[Callable[..., object], Callable[..., Tensor]] = {
    F.dropout: dropout,
    F.alpha_dropout: _alpha_dropout,
    torch.dropout: lambda input, p, train: dropout(input, p, train),
}

"""Embeddings with dense gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _dense(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Return an embedding without its argument `sparse`, the one at `place`.

    What follows a sparse gradient, an optimizer or a second derivative, has no kernels for it. It is the same gradient.
    """

    def embed(*args: Any, sparse: bool = False, **kwargs: Any) -> Tensor:
        return function(*args[:place], False, *args[place + 1 :], **kwargs) if place < len(args) else function(*args, **kwargs)

    return embed


EMBEDDINGS: dict[Callable[..., object], Callable[..., Any]] = {
    F.embedding: _dense(F.embedding, 6),
    F.embedding_bag: _dense(F.embedding_bag, 7),
    torch.embedding: _dense(torch.embedding, 4),
    torch.embedding_bag: _dense(torch.embedding_bag, 5),
}

"""Embeddings whose gradient is dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Where `sparse` stands among the arguments.
_PLACES: dict[Callable[..., Any], int] = {F.embedding: 6, F.embedding_bag: 7, torch.embedding: 4}


def asks_for_sparse(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Return True if the gradient of this call would be sparse."""
    place = _PLACES[func]
    return bool(args[place] if len(args) > place else kwargs.get("sparse", False))


def _make_dense(func: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return the function with `sparse=False`.

    Optimizers compute with gradients, and of sparse ones torch can neither take roots nor map over
    them.
    """

    def call(*args: Any, **kwargs: Any) -> Tensor:
        place = _PLACES[func]
        if len(args) > place:
            args = (*args[:place], False, *args[place + 1 :])
        elif "sparse" in kwargs:
            kwargs["sparse"] = False
        result: Tensor = func(*args, **kwargs)
        return result

    return call


EMBEDDINGS: dict[Callable[..., object], Callable[..., Tensor]] = {
    func: _make_dense(func) for func in _PLACES
}

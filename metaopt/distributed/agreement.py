"""What all ranks must have alike, looked at before they go on with it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.distributed.all_reduce import gather_rows
from metaopt.distributed.ranks import Ranks
from metaopt.transforms import is_sharded
from metaopt.tree import Tree

# Of the same width as a number with so many bytes, so that its bits can be added up.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_agreement(owner: str, parts: Mapping[str, Tree], ranks: Ranks, fix: str) -> None:
    """Raise ValueError, on all ranks, if they were given different values.

    Ranks that begin apart stay apart: the sums over them would belong to no model at all, and
    nothing else would say so.

    Args:
        owner: who asks, for the message.
        parts: what it is for the message -> trees of tensors and numbers.
        ranks: from `join_ranks`.
        fix: what to do about it.

    Cost:
        One pass over the tensors, and one message of a number for each part.
    """
    if not ranks.are_many:
        return
    mine = torch.tensor([[_digest(part) for part in parts.values()]])
    each = gather_rows(mine, ranks.size, ranks)
    for place, name in enumerate(parts):
        others = (each[:, place] != each[0, place]).nonzero()[:, 0].tolist()
        if others:
            raise ValueError(
                f"{owner}: all ranks must have the same {name}, got others on {others} than on "
                f"rank 0. {fix}"
            )


def _digest(values: Tree) -> int:
    """Return a number of 32 bits that other values are unlikely to have."""
    found = [_describe(leaf) for leaf in tree.leaves(values)]
    return zlib.crc32(json.dumps(found).encode())


def _describe(leaf: Any) -> list[Any]:
    if not isinstance(leaf, Tensor):
        return [repr(leaf)]
    if is_sharded(leaf):  # each rank has other entries
        return [str(leaf.dtype), list(leaf.shape)]
    bits = tree.as_real(leaf.detach()).contiguous()
    bits = bits.view(_BITS[bits.element_size()])
    total = bits.sum(dtype=torch.int64)  # wraps around, and keeps all the bits
    return [str(leaf.dtype), list(leaf.shape), total.tolist()]

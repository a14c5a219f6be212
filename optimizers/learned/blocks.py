"""Blocks of coordinates, as large as a CPU's caches hold: parts of large tensors, or small tensors.

An operation then finds in the caches what the one before it wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.optimizer import Leaves

ENTRIES = 2**15  # of a block


class Piece(NamedTuple):
    """Neighbours along the first axis of a tensor, all of them for a small one.

    Args:
        tensor: which tensor.
        start: the first index along the axis.
        stop: behind the last one.
        width: number of entries at each index.
    """

    tensor: int
    start: int
    stop: int
    width: int

    @property
    def size(self) -> int:
        """The number of entries."""
        return (self.stop - self.start) * self.width

    def cut(self, x: Tensor) -> Tensor:
        """Return the part of x [rows, *shape] that belongs to the piece.

        x may have a first axis of 1 where the tensor has a longer one: then it is all of x.
        """
        return x if x.ndim == 1 or x.shape[1] == 1 else x[:, self.start : self.stop]


class Block(tuple[Piece, ...]):
    """Pieces whose entries are the columns of one matrix."""

    __slots__ = ()

    def take(self, leaves: Leaves) -> Tensor:
        """Return the columns of the block, [rows, columns], out of tensors [rows, entries]."""
        parts = [
            leaves[piece.tensor][:, piece.start * piece.width : piece.stop * piece.width]
            for piece in self
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def part(self, x: Tensor) -> Leaves:
        """Return the columns of each piece."""
        return list(x.split([piece.size for piece in self], dim=1))


def find_blocks(leaves: Leaves) -> list[Block]:
    """Return blocks that hold all entries of the tensors, in their order."""
    blocks: list[list[Piece]] = []
    room = 0
    for place, leaf in enumerate(leaves):
        length = leaf.shape[0] if leaf.ndim else 1
        width = leaf.numel() // max(length, 1)
        step = max(ENTRIES // max(width, 1), 1)
        for start in range(0, max(length, 1), step):
            piece = Piece(place, start, min(start + step, length), width)
            if not blocks or piece.size > room:
                blocks.append([])
                room = ENTRIES
            blocks[-1].append(piece)
            room -= piece.size
    return [Block(pieces) for pieces in blocks]


def gather(blocks: list[Block], columns: list[Tensor], like: Leaves) -> Leaves:
    """Return tensors [rows, *shape], shapes as in `like`, from the columns of all blocks."""
    parts: list[Leaves] = [[] for _ in like]
    for block, x in zip(blocks, columns, strict=True):
        for piece, part in zip(block, block.part(x), strict=True):
            parts[piece.tensor].append(part)
    whole = [own[0] if len(own) == 1 else torch.cat(own, dim=1) for own in parts]
    return [x.reshape(len(x), *leaf.shape) for x, leaf in zip(whole, like, strict=True)]

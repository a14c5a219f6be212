"""Large tensors in blocks that a processor's caches hold.

An elementwise update is a dozen operations, each of which would read and write all tensors from
memory, and ask for new ones. Block by block the operations find their operands in the caches, and
what is new lies only where the results go. For AdamW on 22 million parameters, one thread, that is
a third of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from metaopt.optimizer.state import Arguments, Leaves, Slots, UpdateFn
from metaopt.spare import empty_like
from metaopt.torch_internals import foreach_copy_
from metaopt.transforms import is_unrecorded

LEAST_TOGETHER = 2**20  # entries of all tensors; what is below lies in the caches anyway
MOST_TOGETHER = 2**17  # entries of a block: half a MiB of each tensor


class Piece(NamedTuple):
    """Some neighbouring entries of a tensor.

    Attributes:
        place: which of the tensors.
        entries: which of its entries, in a row.
    """

    place: int
    entries: slice


def cut(leaves: Sequence[Tensor]) -> Iterator[list[Piece]]:
    """Yield the entries of all tensors in blocks, pieces of one or several of them."""
    block: list[Piece] = []
    room = MOST_TOGETHER
    for place, leaf in enumerate(leaves):
        begin, count = 0, leaf.numel()
        while begin < count:
            end = min(begin + room, count)
            block.append(Piece(place, slice(begin, end)))
            room -= end - begin
            begin = end
            if room == 0:
                yield block
                block, room = [], MOST_TOGETHER
    if block:
        yield block


def call_in_blocks(update_fn: UpdateFn, given: Arguments) -> tuple[Leaves, Slots]:
    """Return what an elementwise `update_fn` does, called on block after block."""
    grads, params, memory, hyper, step = given
    like = grads if params is None else params
    own = {name: slot for name, slot in memory.items() if isinstance(slot, list)}
    rows = [flatten(row) for row in (grads, like, *own.values())]
    results, after = [empty_like(leaf) for leaf in like], {}
    into: list[Leaves] = []
    for block in cut(grads):
        g, w, *taken = [take(row, block) for row in rows]
        slots = {**memory, **dict(zip(own, taken, strict=True))}
        moved, after_block = update_fn(g, None if params is None else w, slots, hyper, step)
        lists = {name: slot for name, slot in after_block.items() if isinstance(slot, list)}
        if not into:  # the first block says which memory there will be
            after = {name: [empty_like(leaf) for leaf in own.get(name, like)] for name in lists}
            into = [flatten(row) for row in (results, *after.values())]
        for row, values in zip(into, (moved, *lists.values()), strict=True):
            foreach_copy_(take(row, block), values)
    # memory over all entries is the same after each block
    return results, {name: after.get(name, slot) for name, slot in after_block.items()}


def is_divisible(rows: Sequence[Leaves]) -> bool:
    """Return True if an elementwise update of these lists can be made in blocks, and is faster so.

    Args:
        rows: the gradients, and what else is to be divided as they are.
    """
    first = rows[0]
    if sum(map(Tensor.numel, first)) < LEAST_TOGETHER or not is_unrecorded():
        return False
    shapes = [leaf.shape for leaf in first]
    return all([leaf.shape for leaf in row] == shapes and all(map(is_plain, row)) for row in rows)


def is_plain(leaf: Tensor) -> bool:
    """Return True if the entries lie in a row in the memory of the CPU."""
    return (
        type(leaf) in (Tensor, Parameter)
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and leaf.is_contiguous()
    )


def flatten(leaves: Leaves) -> Leaves:
    """Return each tensor as a row of its entries, in the same memory."""
    return [leaf.view(-1) for leaf in leaves]


def take(leaves: Leaves, block: list[Piece]) -> Leaves:
    """Return the pieces of a block, of tensors that are rows, in the same memory."""
    return [leaves[place][entries] for place, entries in block]

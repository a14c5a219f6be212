"""Many small tensors joined to one, on which an elementwise update is a few operations in all.

One by one it is a few operations for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import DisableTorchFunction, Tensor
from torch.nn import Parameter

from metaopt.optimizer.blocks import call_in_blocks, is_divisible
from metaopt.optimizer.state import Arguments, Hyper, Leaves, Slots, UpdateFn
from metaopt.transforms import count_entries, is_unrecorded

if TYPE_CHECKING:
    from metaopt.optimizer.optimizer import Optimizer

LEAST_TENSORS = 8
MOST_ENTRIES = 2**12  # of a tensor on average
# of all tensors; beyond, a CPU's caches do not hold what the next operation reads
MOST_TOGETHER = 2**20


def is_joinable(kind: type) -> bool:
    """Return True if the class says of its own `update` or `direction` that tensors may be joined.

    It says so by `joinable = True`: every entry is treated alike, whatever tensor it is in, and
    takes about ten operations. (Of SGD and ASGD the plain forms take few, and were up to 1.4 times
    slower.) This is not inherited: a subclass may override what `update` calls.
    """
    return bool(vars(kind).get("joinable", False))


def call_joined(
    optimizer: Optimizer, update_fn: UpdateFn, given: Arguments
) -> tuple[Leaves, Slots]:
    """Return what `update_fn` does, called on joined tensors where that is the same and faster."""
    # a compiler fuses the loop over tensors itself
    if torch.compiler.is_compiling() or not is_joinable(type(optimizer)):
        return update_fn(*given)
    if _is_divisible(optimizer, given):
        return call_in_blocks(update_fn, given)
    if len(given.grads) < LEAST_TENSORS or not _is_faster(optimizer, given):
        return update_fn(*given)
    with DisableTorchFunction():
        params = None if given.params is None else join(given.params)
        slots = {n: join(s) if isinstance(s, list) else s for n, s in given.slots.items()}
        row = join(given.grads)
    results, after = update_fn(row, params, slots, given.hyper, given.step)
    with DisableTorchFunction():
        parts = {n: part(s, given.grads) if isinstance(s, list) else s for n, s in after.items()}
        return part(results, given.grads), parts


def _is_faster(optimizer: Optimizer, given: Arguments) -> bool:
    with DisableTorchFunction():
        return prefers_joined(_find_rows(given)) and is_elementwise(optimizer, given.hyper)


def _is_divisible(optimizer: Optimizer, given: Arguments) -> bool:
    with DisableTorchFunction():
        return is_divisible(_find_rows(given)) and is_elementwise(optimizer, given.hyper)


def _find_rows(given: Arguments) -> list[Leaves]:
    rows = [given.grads, given.params, *given.slots.values()]
    return [row for row in rows if isinstance(row, list)]


def is_elementwise(optimizer: Optimizer, hyper: Hyper) -> bool:
    """Return True if one of a joinable class does as that says, with numbers that entries share."""
    is_replaced = "update" in vars(optimizer) or "direction" in vars(optimizer)
    has_axes = any(isinstance(value, Tensor) and value.ndim for value in hyper.values())
    return not is_replaced and not has_axes


def prefers_joined(lists: Sequence[list[Tensor]]) -> bool:
    """Return True if an elementwise update is the same and faster on lists joined to a tensor each.

    It is the same where all lists have the same shapes, and each has one dtype and one device. It
    is faster for many small tensors, unless nobody differentiates the update: then torch's kernels
    for lists are. Time joined over time one by one, for two steps of Adam without a graph | with
    one and its backward pass, torch 2.13 on one thread of a CPU:

    ```
    tensors   10 entries    1,000         3,000         10,000        30,000
    4         1.2 | .83     1.1 | .89     1.2 | .97     1.4 | 1.1     1.6 | 1.3
    16        .97 | .54     1.0 | .63     1.2 | .75     2.3 | 1.2     2.1 | 1.3
    160       .83 | .40     .90 | .48     1.7 | .93     1.9 | 1.2     1.9 | 1.5
    ```

    Under `torch.func.vjp` it is as with a graph; under `vmap`, where the entries of all rows count
    and there are no kernels for lists, joining was faster too. Memory is the same.

    Args:
        lists: of equal length: the gradients, and what else is to be joined.
    """
    first = lists[0]
    if len(first) < LEAST_TENSORS or is_unrecorded():
        return False
    if sum(map(count_entries, first)) > min(len(first) * MOST_ENTRIES, MOST_TOGETHER):
        return False
    shapes = [leaf.shape for leaf in first]
    return all(_are_alike(leaves) and [leaf.shape for leaf in leaves] == shapes for leaves in lists)


def join(leaves: list[Tensor]) -> list[Tensor]:
    """Return the entries of all tensors in a row, [n], as a list of one."""
    return [torch.cat([leaf.ravel() for leaf in leaves])]


def part(joined: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Invert `join`, for tensors with the shapes of `like`."""
    parts = torch.split(joined[0], [leaf.numel() for leaf in like])
    return [part.view_as(leaf) for part, leaf in zip(parts, like, strict=True)]


def _are_alike(leaves: list[Tensor]) -> bool:
    """Return True if they are of one dtype on one device, dense, and of torch's own class.

    One of a class of its own may be spread over processes.
    """
    kinds = {(leaf.dtype, leaf.device) for leaf in leaves}
    return len(kinds) == 1 and all(
        type(leaf) in (Tensor, Parameter) and leaf.layout is torch.strided for leaf in leaves
    )

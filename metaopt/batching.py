"""Whether a batch of tasks is faster under `vmap` or in a loop, and values for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaopt import tree
from metaopt.exact_ops import any_order
from metaopt.tree import Tree

# The number of parameters of a task from which on a CPU's caches no longer hold a batch of them.
MOST_ENTRIES = 2**18


def prefers_loop(batched: Callable[[Tree, Tree], Any], params: Tree, tasks: Tree) -> bool:
    """Return True if `batched(params, tasks)`, mapped over tasks by `vmap`, is slower than a loop.

    This is the case on a CPU for convolutions, whose batched form is a grouped convolution, and for
    large models. Measured with torch 2.13 on one thread, time of `vmap` over time of the loop, 8
    tasks of 16 examples, 3 inner steps of an MLP with three square layers: width 16 .19, 64 .27,
    128 .46, 256 (197,000 parameters) .79, 512 (786,000) 1.33; with 128 examples, width 64 .32, 256
    .85. Accelerators always take the batch.

    Cost:
        One evaluation of `batched` (two tasks are enough), up to the first convolution. What it
        draws at random is put back.
    """
    on_cpu = [leaf for leaf in tree.leaves(params) if isinstance(leaf, Tensor) and leaf.is_cpu]
    if not on_cpu:
        return False
    if sum(leaf.numel() for leaf in on_cpu) > MOST_ENTRIES:
        return True
    with torch.random.fork_rng(devices=[]):
        try:
            # In this order: `any_order` has to see the calls last.
            with any_order(), _StopAtConvolution():
                batched(params, tasks)
        except _ConvolutionFound:
            return True
    return False


def widen(memory: Tree, like: Tree) -> Tree:
    """Return `memory` with every batch axis of a `vmap` that is in `like`.

    Batched values can then be written into it.
    """
    known = [leaf for leaf in tree.leaves(like) if isinstance(leaf, Tensor)]
    zero = tree.sum_leaves(lambda leaf: leaf.new_zeros(()), known)

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf + zero.to(leaf.dtype)

    return tree.map(widen, memory)


class _ConvolutionFound(Exception):
    """Ends an evaluation early."""


class _StopAtConvolution(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONVOLUTIONS:
            raise _ConvolutionFound
        return func(*args, **(kwargs or {}))


_CONVOLUTIONS = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}

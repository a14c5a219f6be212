"""Minibatches in an order that is a function of a seed and of their number."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_count
from metaopt.tree import Tree


class Shuffled:
    """Minibatches of examples in memory: batch n is a function f(seed, n).

    Each pass is in an order of its own, and without the last examples if they do not fill a batch.
    No random number comes from anywhere else, so that a training goes on at any place of it at
    once: with a `DataLoader`, the batches before that place are read again.

    Args:
        examples: tensors or a tree of them, leaves [examples, ...].
        batch_size: examples in a batch.
        seed: of the orders.

    Attributes:
        batches_in_pass: number of batches after which another order begins.

    Raises:
        ValueError: the leaves have different numbers of examples, or fewer than a batch.
        TypeError: a leaf is no tensor, or has no axis of examples.
    """

    def __init__(self, examples: Tree, batch_size: int, seed: int = 0):
        self.examples, self.seed = examples, check_count(self, "seed", seed, least=0)
        self.batch_size = check_count(self, "batch_size", batch_size)
        counts = tree.leading_axes(examples)
        others = [path for path, count in counts.items() if count < 0]
        if others:
            raise TypeError(
                f"Shuffled: `examples` must be a tree of tensors with a row for each example, got "
                f"something else at {others}. Write torch.as_tensor(...); of a data set, "
                "stack its examples."
            )
        if len({*counts.values()}) != 1 or min(counts.values()) < batch_size:
            raise ValueError(
                "Shuffled: the leaves of `examples` must have one number of rows, at least the "
                f"batch_size {batch_size}, got {counts}."
            )
        self.count = next(iter(counts.values()))
        self.batches_in_pass = self.count // batch_size
        self._pass = (-1, torch.empty(0))

    def batch_at(self, number: int) -> Tree:
        """Return batch `number`."""
        at, row = divmod(number, self.batches_in_pass)
        if self._pass[0] != at:
            self._pass = (at, self._draw_order(at))
        rows = self._pass[1][row * self.batch_size : (row + 1) * self.batch_size]
        return tree.map(lambda leaf: leaf[rows.to(leaf.device)], self.examples)

    def _draw_order(self, at: int) -> Tensor:
        # by a hash: torch's generator looks at 32 bits of its seed alone
        digest = hashlib.sha256(f"{self.seed}, {at}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
        return torch.randperm(self.count, generator=generator)

    def __iter__(self) -> Iterator[Tree]:
        """Yield all batches in their order, without an end."""
        return map(self.batch_at, itertools.count())

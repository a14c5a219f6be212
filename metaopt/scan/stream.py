"""Batches that come one by one, nobody knows how many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from metaopt import tree
from metaopt.torch_internals import version
from metaopt.tree import Tree


class Stream:
    """The batches of an iterator, checked to be alike; can be gone through once.

    Shapes may differ from batch to batch, as the last one of a DataLoader's does; structure and
    dtypes may not.

    Args:
        batches: any iterable; its first batch is taken at once.

    Raises:
        ValueError: there is no batch.
    """

    def __init__(self, batches: Iterable[Tree]):
        rest = iter(batches)
        try:
            self.first = self.last = next(rest)  # the last one seen so far
        except StopIteration:
            raise ValueError(
                f"`batches` must hold at least one step, got an empty {type(batches).__name__}. An "
                "iterator can be gone through once: make a fresh one for each call."
            ) from None
        self._batches = chain([self.first], rest)

    def __iter__(self) -> Iterator[Tree]:
        """Yield the batches.

        Raises:
            ValueError: a batch has another structure or other dtypes than the first one.
        """
        expected, structure = _kinds(self.first)
        for t, batch in enumerate(self._batches):
            found, own = _kinds(batch)
            if own != structure or found != expected:
                raise ValueError(
                    f"`batches` must yield batches of one structure and of the same dtypes, got "
                    f"{found or batch!r} at step {t} after {expected or self.first!r} at step 0. "
                    f"Yield the same tree every time."
                )
            self.last = batch
            yield batch

    def watch(self) -> Iterator[Tree]:
        """Yield the batches to one who needs them again afterwards.

        Raises:
            ValueError: a batch was written to after it came.
        """
        leaves, versions = list[Any](), list[int]()
        for batch in self:
            leaves += tree.leaves(batch)
            versions += [version(leaf) for leaf in tree.leaves(batch)]
            yield batch
        for leaf, before in zip(leaves, versions, strict=True):
            if version(leaf) != before:
                raise ValueError(
                    f"`batches` must not change a batch after yielding it, got one of shape "
                    f"{tuple(leaf.shape)} that was written to. Batches are kept for the way back. "
                    "Yield a fresh tensor, or a `clone()`."
                )


def first_row(batches: Tree | Stream) -> Tree:
    """Return the batch of the first step."""
    return batches.first if isinstance(batches, Stream) else tree.index(batches, 0)


def last_row(batches: Tree | Stream) -> Tree:
    """Return the batch of the last step; of a stream, the last one that it has yielded."""
    return batches.last if isinstance(batches, Stream) else tree.index(batches, -1)


def _kinds(batch: Tree) -> tuple[dict[str, Any], tree.Structure]:
    """Return (path -> dtype of a tensor, or the type of anything else), and the structure."""
    kinds = {
        path: leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        for path, leaf in tree.named_leaves(batch)
    }
    return kinds, tree.flatten(batch)[1]

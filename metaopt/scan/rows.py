"""What each step of a loop sees.

One batch for all of them, a row of stacked batches, or the next batch of an iterator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from metaopt import tree
from metaopt.checks import check_count
from metaopt.scan.stream import Stream
from metaopt.tree import Tree


def rows_of(
    batches: Tree | Iterable[Tree], steps: int | None
) -> tuple[Tree | Stream, Tree, int | None]:
    """Return (rows to scan over, the batch of every step, number of steps if known).

    One of the first two is empty.

    Args:
        batches: with `steps`, the batch of every step; else a list or an iterator of batches, or a
            tree whose leaves all have time as their leading axis.
        steps: number of steps.

    Raises:
        ValueError: leading axes differ, `steps` is missing, or it cannot be told what is meant.
    """
    streams = _is_stream(batches)
    if steps is not None:
        steps = check_count(None, "steps", steps)
        if streams:
            raise ValueError(
                f"`steps` must be left out when `batches` is an iterator, got {steps}: the loop "
                "ends when the iterator does. Pass `itertools.islice(batches, steps)` to end it "
                "earlier."
            )
        return (), batches, steps
    if isinstance(batches, list):
        _refuse_bare_tensors(batches)
        streams = True
    if streams:
        return Stream(batches), None, None
    lengths = tree.leading_axes(batches)
    if not lengths or -1 in lengths.values():
        without = [path for path, length in lengths.items() if length < 0]
        raise ValueError(
            "`steps` is missing: without it every leaf of `batches` needs the leading axis time, "
            f"which {without or 'an empty tree'} has not. Pass `steps=` to use the same batch at "
            "every step."
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The leading axis of every leaf of `batches` must be the number of steps, got "
            f"{lengths}. Stack one batch per step, pass a list of batches, or pass `steps=` to use "
            "the same batch at every step."
        )
    (length,) = set(lengths.values())
    if length == 0:
        raise ValueError("`batches` must hold at least one step, got the leading axis 0.")
    return batches, None, length


@contextmanager
def explain_first_row(batches: Tree, steps: int | None, first: Tree) -> Iterator[None]:
    """Add how the first batch came about to whatever is raised inside.

    torch's own error cannot know it.
    """
    try:
        yield
    except Exception as error:
        if steps is None and not isinstance(batches, list) and not _is_stream(batches):
            shapes = {
                path: tuple(leaf.shape)
                for path, leaf in tree.named_leaves(first)
                if isinstance(leaf, Tensor)
            }
            length = next(iter(tree.leading_axes(batches).values()))
            error.add_note(
                f"minimize: without `steps=` the leading axis of `batches` is time, so that there "
                f"are {length} steps and the first batch has the shapes {shapes}. If `batches` is "
                f"one batch, for every step, pass `steps=`."
            )
        raise


def _is_stream(batches: Tree) -> bool:
    leaves = tree.leaves(batches)
    is_leaf = len(leaves) == 1 and leaves[0] is batches  # no dict, list or tuple: these are trees
    return is_leaf and isinstance(batches, Iterable) and not isinstance(batches, Tensor | str)


def _refuse_bare_tensors(batches: list[Tree]) -> None:
    if not batches:
        raise ValueError("`batches` must hold at least one step, got an empty list.")
    if all(isinstance(batch, Tensor) for batch in batches):
        raise ValueError(
            f"`batches` must not be a list of tensors, got {len(batches)}: is it one batch, or one "
            "tensor a step? For one batch pass `steps=`; for stacked batches a tuple, "
            "`tuple(batches)`; for one tensor a step `torch.stack(batches)`."
        )

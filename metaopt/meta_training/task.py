"""What an optimizer is trained and judged on."""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metaopt import tree
from metaopt.distributed import Ranks
from metaopt.tree import Tree


class Task(NamedTuple):
    """One inner problem.

    Attributes:
        params: initial parameters.
        batches: a batch for every step, leading axis time.
        held_out: a batch that no step sees, on which the result may be judged; () for none.
    """

    params: Tree
    batches: Tree
    held_out: Tree = ()


class TaskFamily(Protocol):
    """A distribution of tasks that share a loss."""

    def loss(self, params: Tree, batch: Tree) -> Tensor:
        """Return the scalar inner loss."""
        ...

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw a task with `steps` batches; all randomness comes from the generator."""
        ...


def sample_tasks(family: TaskFamily, generator: torch.Generator, count: int, steps: int) -> Task:
    """Draw `count` tasks and stack them along a new leading axis.

    Raises:
        ValueError: a leaf of the batches does not have `steps` rows.
    """
    drawn = [family.sample(generator, steps) for _ in range(count)]
    lengths = tree.leading_axes(drawn[0].batches)
    if set(lengths.values()) != {steps}:
        raise ValueError(
            f"{type(family).__name__}: every leaf of a task's batches must have {steps} rows, one "
            f"for each step, got {lengths} (-1: no rows). For the same batch at every step, "
            "`expand` it."
        )
    _check_alike(family, drawn)
    return Task(*tree.stack([tuple(task) for task in drawn]))


def draw_own_tasks(
    family: TaskFamily, generator: torch.Generator, count: int, steps: int, ranks: Ranks
) -> Task:
    """Draw `count` tasks on every rank, the same ones, and keep this rank's.

    Raises:
        ValueError: there are fewer tasks than ranks, or as in `sample_tasks`.
    """
    part = ranks.share(count, "tasks")
    drawn = sample_tasks(family, generator, count, steps)
    return Task(*tree.map(lambda leaf: leaf[part], tuple(drawn))) if ranks.are_many else drawn


def _check_alike(family: TaskFamily, drawn: list[Task]) -> None:
    """Raise ValueError if tasks of a family have different shapes."""
    first = [(name, leaf.shape) for name, leaf in tree.named_leaves(tuple(drawn[0]))]
    for task in drawn[1:]:
        other = [(name, leaf.shape) for name, leaf in tree.named_leaves(tuple(task))]
        if other != first:
            pairs = itertools.zip_longest(first, other, fillvalue=("nothing", ()))
            (name, shape), (_, found) = next(pair for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"{type(family).__name__}: the tasks of a family must have the same shapes, to be "
                f"batched, got {tuple(shape)} and {tuple(found)} at {name}. Make a family for each "
                "shape, and draw from several with `Mixture`."
            )

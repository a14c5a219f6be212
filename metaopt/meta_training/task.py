"""What an optimizer is trained and judged on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree


class Task(NamedTuple):
    """One inner problem: initial parameters, and a batch for every step (leading axis time)."""

    params: Tree
    batches: Tree


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
    return Task(*tree.stack([tuple(task) for task in drawn]))

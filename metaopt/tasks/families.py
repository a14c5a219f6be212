"""Distributions of families of tasks, to train optimizers that carry over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_count
from metaopt.meta_training.groups import Families, draw_family
from metaopt.meta_training.task import Task, TaskFamily
from metaopt.tasks.examples import Classes, Data, Teacher
from metaopt.tasks.networks import ACTIVATIONS, MLP
from metaopt.tasks.supervised import Supervised
from metaopt.tree import Tree

Item = TypeVar("Item")


@dataclass(frozen=True)
class Mixture:
    """Families of several kinds, one of which is drawn.

    Args:
        families: each with its weight: (weight, family or distribution of families).

    Raises:
        ValueError: there is none, or a weight is not positive.
    """

    families: tuple[tuple[float, TaskFamily | Families], ...]

    def __post_init__(self) -> None:
        if not self.families or not all(weight > 0 for weight, _ in self.families):
            raise ValueError(
                "Mixture: `families` must hold (weight, family) with positive weights, got "
                f"{self.families!r}."
            )

    def draw(self, generator: torch.Generator) -> TaskFamily:
        """Draw one, with a probability in proportion to its weight."""
        weights = torch.tensor([weight for weight, _ in self.families])
        index = int(torch.multinomial(weights, 1, generator=generator))
        return draw_family(self.families[index][1], generator)


@dataclass(frozen=True)
class Rescaled:
    """A family whose parameters are w / c in place of w, with a factor c for each tensor.

    The functions are the same and the gradients of each tensor are c times as large: the step sizes
    that are right differ from tensor to tensor.

    Args:
        family: what is rescaled.
        scales: c for each tensor of the parameters.

    Raises:
        ValueError: a scale that is not positive; or another number of tensors.
    """

    family: TaskFamily
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(scale > 0 for scale in self.scales):
            raise ValueError(f"Rescaled: `scales` must be positive, got {self.scales}.")

    def _times(self, params: Tree, scales: Sequence[float]) -> Tree:
        leaves = tree.leaves(params)
        if len(leaves) != len(scales):
            raise ValueError(
                f"Rescaled: `scales` must be one for each tensor of the parameters, {len(leaves)}, "
                f"got {len(scales)}."
            )
        scaled = [scale * leaf for scale, leaf in zip(scales, leaves, strict=True)]
        return tree.with_leaves(params, scaled)

    def loss(self, params: Tree, batch: Tree) -> Tensor:
        """Return the family's loss at c w."""
        return self.family.loss(self._times(params, self.scales), batch)

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw one of the family's tasks, with parameters w / c."""
        task = self.family.sample(generator, steps)
        inverse = [1 / scale for scale in self.scales]
        return task._replace(params=self._times(task.params, inverse))


@dataclass(frozen=True)
class RandomMLPs:
    """`Supervised` training of MLPs of random depth, width, activation, gain and batch size.

    Widths and batch sizes are log-uniform integers, gains exp(gain N(0, 1)). Each tensor is
    `Rescaled` by exp(s N(0, 1)), with s drawn from `spreads`.

    Args:
        examples: one of them is drawn; or distributions of data, with a method `draw_data`.
        depths: fewest and most hidden layers.
        widths: smallest and largest.
        batch_sizes: smallest and largest.
        gain: spread of the logarithm of the gain.
        spreads: of the logarithm of the scales.
        held_out: examples that each task holds out.

    Raises:
        ValueError: a range that is none.
    """

    examples: tuple[Data | RandomTeachers, ...] = (Classes(),)
    depths: tuple[int, int] = (0, 3)
    widths: tuple[int, int] = (8, 40)
    batch_sizes: tuple[int, int] = (8, 64)
    gain: float = 0.35
    spreads: tuple[float, ...] = (0.0, 0.0, 0.5, 1.0)
    held_out: int = 0

    def __post_init__(self) -> None:
        for name, least in (("depths", 0), ("widths", 1), ("batch_sizes", 1)):
            low, high = getattr(self, name)
            check_count(self, name, low, least=least)
            check_count(self, name, high, least=low)

    def draw(self, generator: torch.Generator) -> TaskFamily:
        """Draw a family."""
        data = pick(self.examples, generator)
        data = data.draw_data(generator) if isinstance(data, RandomTeachers) else data
        low, high = self.depths
        depth = int(torch.randint(low, high + 1, (), generator=generator))
        hidden = tuple(log_uniform(self.widths, generator) for _ in range(depth))
        activation = pick(tuple(ACTIVATIONS), generator)
        gain = math.exp(self.gain * float(torch.randn((), generator=generator)))
        size = log_uniform(self.batch_sizes, generator)
        family = Supervised(MLP(hidden, activation, gain), data, size, self.held_out)
        spread = pick(self.spreads, generator)
        if not spread:
            return family
        normal = torch.randn(2 * (depth + 1), generator=generator)
        return Rescaled(family, tuple((spread * normal).exp().tolist()))


@dataclass(frozen=True)
class RandomTeachers:
    """`Teacher`s of random size, with 4 to 64 inputs and 2 to 10 outputs.

    Args:
        regression: as for `Teacher`.
        noises: of which one is drawn.
    """

    regression: bool = False
    noises: tuple[float, ...] = field(default=(0.0, 0.1, 0.3))

    def draw_data(self, generator: torch.Generator) -> Teacher:
        """Draw a size and a noise."""
        inputs, outputs = log_uniform((4, 64), generator), log_uniform((2, 10), generator)
        width = log_uniform((4, 32), generator)
        noise = pick(self.noises, generator)
        return Teacher(inputs, outputs, self.regression, noise, MLP((width,), "tanh", 2.0))


def small_networks(held_out: int = 0) -> Mixture:
    """Return the mixture that the shipped optimizer is trained on: small MLPs, and nothing else.

    56 % on digits, 28 % on random teachers that classify, 16 % on teachers with values.
    """
    kinds: tuple[tuple[float, Data | RandomTeachers], ...] = (
        (0.56, Classes()),
        (0.28, RandomTeachers()),
        (0.16, RandomTeachers(regression=True)),
    )
    return Mixture(
        tuple((weight, RandomMLPs((data,), held_out=held_out)) for weight, data in kinds)
    )


def pick(items: Sequence[Item], generator: torch.Generator) -> Item:
    """Return one of the items."""
    return items[int(torch.randint(len(items), (), generator=generator))]


def log_uniform(bounds: tuple[int, int], generator: torch.Generator) -> int:
    """Return an integer whose logarithm is uniform, both bounds included."""
    low, high = math.log(bounds[0] - 0.499), math.log(bounds[1] + 0.499)
    return round(math.exp(low + (high - low) * float(torch.rand((), generator=generator))))

"""Regression of sine waves from a few points."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from metaopt.tasks.episode import Episode


class Sinusoids:
    """The family y = a sin(x - p), with a ~ U(0.1, 5), p ~ U(0, pi) and x ~ U(-5, 5).

    Reference:
        Finn, Abbeel, Levine 2017, arXiv:1703.03400, section 5.1.
    """

    amplitude = (0.1, 5.0)
    phase = (0.0, math.pi)
    interval = (-5.0, 5.0)

    def sample(
        self, generator: torch.Generator, tasks: int, *, shots: int, queries: int
    ) -> Episode:
        """Draw waves, and points on each.

        Args:
            generator: source of all randomness; the tensors are on its device.
            tasks: number of waves.
            shots: points of each wave to adapt on.
            queries: further points of each wave.

        Returns:
            support = (x, y), each [tasks, shots, 1]; query = (x, y), each [tasks, queries, 1].

        Raises:
            ValueError: a count is not positive.
        """
        if min(tasks, shots, queries) < 1:
            raise ValueError(
                f"`tasks`, `shots` and `queries` must be positive, got {tasks}, {shots} and "
                f"{queries}."
            )
        amplitude = _uniform(generator, self.amplitude, (tasks, 1, 1))
        phase = _uniform(generator, self.phase, (tasks, 1, 1))
        x = _uniform(generator, self.interval, (tasks, shots + queries, 1))
        y = amplitude * torch.sin(x - phase)
        return Episode(support=(x[:, :shots], y[:, :shots]), query=(x[:, shots:], y[:, shots:]))


def sinusoid_mlp(hidden_size: int = 40) -> nn.Module:
    """Return the network of section 5.1: two hidden layers with ReLU, one input, one output."""
    layers = [
        ("hidden1", nn.Linear(1, hidden_size)),
        ("relu1", nn.ReLU()),
        ("hidden2", nn.Linear(hidden_size, hidden_size)),
        ("relu2", nn.ReLU()),
        ("head", nn.Linear(hidden_size, 1)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _uniform(
    generator: torch.Generator, bounds: tuple[float, float], shape: tuple[int, ...]
) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)

"""Training a network on labelled examples is a task."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaopt._functional import Params
from metaopt.checks import check_count
from metaopt.meta_training.task import Task
from metaopt.tasks.examples import Batch, Classes, Data
from metaopt.tasks.networks import MLP, Network


@dataclass(frozen=True)
class Supervised:
    """Minibatch training of a network from a fresh initialisation.

    Args:
        network: `MLP(...)`, `ConvNet(...)`, or another.
        examples: `Classes("digits")`, `Reconstruction(...)`, `Teacher(...)`, or other.
        batch_size: examples per step.
        held_out: examples that are held out, for `ValidationLoss`; 0 for none.

    Raises:
        ValueError: a number is not positive.
    """

    network: Network = field(default=MLP())
    examples: Data = field(default=Classes())
    batch_size: int = 64
    held_out: int = 0

    def __post_init__(self) -> None:
        check_count(self, "batch_size", self.batch_size)
        check_count(self, "held_out", self.held_out, least=0)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the loss of a batch (x, y)."""
        x, y = batch
        return self.examples.loss(self.network(params, x), y)

    def accuracy(self, params: Params) -> Tensor | None:
        """Return the part of rows that no task sees which are classified rightly, if there are."""
        judged = self.examples.judged() if isinstance(self.examples, Classes) else None
        if judged is None:
            return None
        return (self.network(params, judged[0]).argmax(-1) == judged[1]).float().mean()

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw parameters, and a minibatch for every step."""
        params = self.network.init(generator, self.examples.inputs, self.examples.outputs)
        batches, held_out = self.examples.draw(generator, steps, self.batch_size, self.held_out)
        return Task(params, batches, held_out if self.held_out else ())

"""Data that networks are trained on: labelled examples that need no download, and random ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.checks import check_choice, check_count, check_flag, check_positive
from metaopt.extras import extra
from metaopt.tasks.digits import digits
from metaopt.tasks.networks import MLP
from metaopt.tasks.sinusoid import Sinusoids

Batch = tuple[Tensor, Tensor]
TABLES = ("digits", "wine", "breast_cancer")
TRAINING = 1347  # digits to train on, of 1,797
HELD_OUT = 5  # one part in this many of the training examples is held out, where a task asks for it


class Data(Protocol):
    """Where batches come from, and what is small when a network has learned them."""

    @property
    def inputs(self) -> int:
        """Number of features."""
        ...

    @property
    def outputs(self) -> int:
        """Number of outputs of a network."""
        ...

    def draw(
        self, generator: torch.Generator, steps: int, size: int, held_out: int
    ) -> tuple[Batch, Batch]:
        """Return batches (x [steps, size, inputs], y [steps, size, ...]), and one held out.

        The latter has `held_out` examples, of the same task, that no step sees.
        """
        ...

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the loss of outputs [n, outputs], a scalar."""
        ...


@functools.cache
def table(name: str) -> Batch:
    """Return (features [n, d], float32; classes [n], int64) of a table bundled with scikit-learn.

    Digits are divided by 16; columns of the others are standardised. Do not change them in place.

    Raises:
        ValueError: there is no such table.

    Reference:
        Wine: Aeberhard and Forina 1991; breast cancer: Wolberg, Mangasarian, Street 1993; both UCI
        Machine Learning Repository.
    """
    check_choice(None, "table", name, TABLES)
    if name == "digits":
        return digits()
    with extra("`table`"):
        from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32), torch.tensor(y)


@functools.cache
def digits_part(is_training: bool) -> Batch:
    """Return a fixed random 1,347 of the digits, to train on, or the other 450."""
    order = torch.randperm(len(digits()[1]), generator=torch.Generator().manual_seed(0))
    rows = order[:TRAINING] if is_training else order[TRAINING:]
    return digits()[0][rows], digits()[1][rows]


@dataclass(frozen=True)
class Classes:
    """Classification of the rows of a table: the cross-entropy of minibatches.

    Rows are drawn with replacement. Of the digits, 450 are for judging alone and never drawn.

    Args:
        table: "digits", "wine" or "breast_cancer".

    Raises:
        ValueError: there is no such table.
    """

    table: str = "digits"

    def __post_init__(self) -> None:
        check_choice(self, "table", self.table, TABLES)

    def rows(self) -> Batch:
        """Return all rows that may be drawn."""
        return digits_part(True) if self.table == "digits" else table(self.table)

    def judged(self) -> Batch | None:
        """Return rows that are never drawn, if there are."""
        return digits_part(False) if self.table == "digits" else None

    @property
    def inputs(self) -> int:
        """Number of columns."""
        return self.rows()[0].shape[1]

    @property
    def outputs(self) -> int:
        """Number of classes."""
        return int(self.rows()[1].max()) + 1

    def draw(
        self, generator: torch.Generator, steps: int, size: int, held_out: int
    ) -> tuple[Batch, Batch]:
        """Draw batches; those held out are from a fifth of the rows, drawn anew for each task."""
        x, y = self.rows()
        order, kept = torch.arange(len(y)), 0
        if held_out:
            order = torch.randperm(len(y), generator=generator)
            kept = len(y) // HELD_OUT
        chosen = order[kept + torch.randint(len(y) - kept, (steps, size), generator=generator)]
        others = order[torch.randint(max(kept, 1), (held_out,), generator=generator)]
        return (x[chosen], y[chosen]), (x[others], y[others])

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(outputs, y)


@dataclass(frozen=True)
class Reconstruction:
    """The inputs of other data are to be reproduced: weight times the mean squared error.

    Args:
        examples: whose inputs they are.
        weight: factor on the loss.

    Raises:
        ValueError: a weight that is not positive.
    """

    examples: Data = field(default=Classes())
    weight: float = 10.0

    def __post_init__(self) -> None:
        check_positive(self, "weight", self.weight)

    @property
    def inputs(self) -> int:
        """Number of features."""
        return self.examples.inputs

    @property
    def outputs(self) -> int:
        """Number of features."""
        return self.examples.inputs

    def draw(
        self, generator: torch.Generator, steps: int, size: int, held_out: int
    ) -> tuple[Batch, Batch]:
        """Draw batches of the other data, with the inputs as targets."""
        (x, _), (other, _) = self.examples.draw(generator, steps, size, held_out)
        return (x, x), (other, other)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the weighted mean squared error."""
        return self.weight * F.mse_loss(outputs, y)


@dataclass(frozen=True)
class Teacher:
    """What a random network says of normal inputs; each task has a teacher of its own.

    Args:
        inputs: number of features.
        outputs: number of classes, or of values.
        regression: whether the values are to be learned, by their mean squared error; else the
            largest of them is the class, by cross-entropy.
        noise: part of the labels that are drawn at random; of values, the standard deviation of
            normal noise.
        network: the teacher.

    Raises:
        ValueError: a number is not positive, or the noise is negative.
    """

    inputs: int = 16
    outputs: int = 4
    regression: bool = False
    noise: float = 0.0
    network: MLP = field(default=MLP((16,), "tanh", 2.0))

    def __post_init__(self) -> None:
        check_count(self, "inputs", self.inputs)
        check_count(self, "outputs", self.outputs)
        check_flag(self, "regression", self.regression)
        if not self.noise >= 0:
            raise ValueError(f"Teacher: `noise` must not be negative, got {self.noise}.")

    def draw(
        self, generator: torch.Generator, steps: int, size: int, held_out: int
    ) -> tuple[Batch, Batch]:
        """Draw a teacher, inputs, and what it says of them."""
        params = self.network.init(generator, self.inputs, self.outputs)

        def label(x: Tensor) -> Tensor:
            values = self.network(params, x)
            if self.regression:
                return values + self.noise * torch.randn(values.shape, generator=generator)
            is_random = torch.rand(x.shape[:-1], generator=generator) < self.noise
            any_class = torch.randint(self.outputs, x.shape[:-1], generator=generator)
            return torch.where(is_random, any_class, values.argmax(-1))

        x = torch.randn(steps, size, self.inputs, generator=generator)
        other = torch.randn(held_out, self.inputs, generator=generator)
        return (x, label(x)), (other, label(other))

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy, or the mean squared error."""
        return F.mse_loss(outputs, y) if self.regression else F.cross_entropy(outputs, y)


@dataclass(frozen=True)
class Waves:
    """Regression of a sine wave from a few points, the same at every step; see `Sinusoids`.

    Points that are held out are others of the same wave.
    """

    inputs: int = field(default=1, init=False)
    outputs: int = field(default=1, init=False)

    def draw(
        self, generator: torch.Generator, steps: int, size: int, held_out: int
    ) -> tuple[Batch, Batch]:
        """Draw a wave, `size` points to learn from and others."""
        (x, y), (other, other_y) = Sinusoids().sample(
            generator, 1, shots=size, queries=max(held_out, 1)
        )
        batches = x.expand(steps, -1, -1), y.expand(steps, -1, -1)
        return batches, (other[0, :held_out], other_y[0, :held_out])

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(outputs, y)

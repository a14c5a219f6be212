"""The problems that are compared: sizes, data, initial weights.

Everyone gets the same float32 numbers.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt import tree
from metaopt.meta_training.noise import Noise
from metaopt.meta_training.task import Task
from metaopt.tasks import MLP, Classes, Supervised
from metaopt.tasks.episode import Episode
from metaopt.tasks.omniglot import conv4
from metaopt.tasks.sinusoid import Sinusoids, sinusoid_mlp

VOCABULARY = 256


@dataclass(frozen=True)
class Sinusoid:
    """MAML on sine waves.

    The gradient of the query loss after SGD steps, averaged over tasks, in the initial weights.
    """

    tasks: int = 25
    shots: int = 10
    queries: int = 10
    steps: int = 5
    lr: float = 0.01
    hidden: int = 40

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return sinusoid_mlp(self.hidden)

    def data(self) -> Episode:
        return Sinusoids().sample(
            torch.Generator().manual_seed(1), self.tasks, shots=self.shots, queries=self.queries
        )


@dataclass(frozen=True)
class Omniglot:
    """MAML on images with the four-layer convolution network.

    What is drawn on the images does not matter for the time.
    """

    tasks: int = 8
    ways: int = 5
    shots: int = 1
    queries: int = 15
    steps: int = 5
    lr: float = 0.1
    filters: int = 64

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return conv4(self.ways, self.filters)

    def data(self) -> Episode:
        generator = torch.Generator().manual_seed(1)

        def part(count: int) -> tuple[Tensor, Tensor]:
            images = torch.rand(self.tasks, self.ways * count, 1, 28, 28, generator=generator)
            return images, torch.arange(self.ways).repeat_interleave(count).expand(
                self.tasks, -1
            ).contiguous()

        return Episode(support=part(self.shots), query=part(self.queries))

    def channels_last(self) -> tuple[nn.Module, Episode]:
        """Return model and data in that layout.

        `contiguous(memory_format=...)` would not put images of one channel there.
        """

        def laid_out(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            images, labels = part
            return images.movedim(-3, -1).clone(memory_format=torch.contiguous_format).movedim(
                -1, -3
            ), labels

        support, query = self.data()
        return self.model().to(memory_format=torch.channels_last), Episode(
            support=laid_out(support), query=laid_out(query)
        )


@dataclass(frozen=True)
class LSTM:
    """A coordinatewise LSTM trains a perceptron.

    The gradient of the sum of losses in the LSTM's weights, first order.
    """

    steps: int = 20
    batch: int = 128
    sizes: tuple[int, int, int] = (784, 20, 10)
    hidden: int = 20

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        inputs, hidden, outputs = self.sizes
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Sigmoid(), nn.Linear(hidden, outputs))

    def data(self) -> tuple[Tensor, Tensor]:
        """Return (inputs [steps, batch, ...], labels [steps, batch])."""
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(self.steps, self.batch, self.sizes[0], generator=generator)
        return x, torch.randint(self.sizes[-1], (self.steps, self.batch), generator=generator)


@dataclass(frozen=True)
class MetaTraining:
    """A coordinatewise LSTM learns to train networks on digits, many side by side.

    One estimate of the meta-gradient of the mean loss over whole episodes: backpropagated, first
    order; or by antithetic pairs, one to a task, whose noise every side gets alike.
    """

    estimator: Literal["backprop", "nres"]
    tasks: int = 16
    steps: int = 20
    batch: int = 32
    hidden: tuple[int, ...] = (32,)
    size: int = 20
    std: float = 0.1

    @property
    def inner_steps(self) -> int:
        """Number of steps, over all tasks, and of both halves of pairs."""
        return self.tasks * self.steps * (2 if self.estimator == "nres" else 1)

    def family(self) -> Drawn:
        family = Supervised(MLP(self.hidden), Classes("digits"), self.batch)
        generator = torch.Generator().manual_seed(1)
        return Drawn(family, [family.sample(generator, self.steps) for _ in range(self.tasks)])

    def generator(self) -> torch.Generator:
        """Return what an estimate draws from, first of all the seed of its noise."""
        return torch.Generator().manual_seed(2)

    def noise(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return epsilon of the first estimate, leaves [tasks, ...]."""
        seed = int(torch.randint(2**62, (), generator=self.generator()))
        tasks = torch.arange(self.tasks)
        return Noise(seed, self.std, theta)(torch.zeros_like(tasks), tasks)


class Drawn:
    """A family of which the same tasks come again and again, so that drawing costs nothing."""

    def __init__(self, family: Supervised, tasks: list[Task]):
        self.loss, self.tasks = family.loss, tasks
        self._next = itertools.cycle(tasks)

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        return next(self._next)


@dataclass(frozen=True)
class Transformer:
    """SGD on a language model of bytes.

    The gradient of a validation loss in a rate for each tensor and a weight for each example.
    """

    steps: int = 16
    batch: int = 8
    length: int = 64
    width: int = 128
    layers: int = 2
    heads: int = 4
    lr: float = 0.1

    def model(self) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(self.length, self.width, self.layers, self.heads)

    def data(self) -> tuple[Tensor, Tensor]:
        """Return the bytes to train on and those to validate on.

        They are [steps, batch, length + 1] and [batch, length + 1].
        """
        rows = (self.steps + 1) * self.batch
        text = library_source(rows * (self.length + 1)).view(
            self.steps + 1, self.batch, self.length + 1
        )
        return text[:-1], text[-1]

    def rates(self) -> dict[str, Tensor]:
        return {name: torch.tensor(self.lr) for name, _ in self.model().named_parameters()}

    def weights(self) -> Tensor:
        """Return one weight for each example, [steps, batch], by which its loss is multiplied."""
        return torch.linspace(0.5, 1.5, self.steps * self.batch).view(self.steps, self.batch)


@dataclass(frozen=True)
class MetaWeightNet:
    """One iteration of meta-weight-net.

    A step of the learner, the hypergradient by finite differences, a step of the weights.
    """

    batch: int = 100
    sizes: tuple[int, int, int] = (784, 200, 10)
    hidden: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    outer_lr: float = 1e-3
    radius: float = 0.01

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        inputs, hidden, outputs = self.sizes
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def weights(self) -> nn.Module:
        """Return the network that gives an example a weight, from its loss."""
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(1, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1), nn.Sigmoid()
        )

    def data(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return a batch of (inputs, labels) for the learner and one for the weights."""
        generator = torch.Generator().manual_seed(2)

        def part() -> tuple[Tensor, Tensor]:
            x = torch.rand(self.batch, self.sizes[0], generator=generator)
            return x, torch.randint(self.sizes[-1], (self.batch,), generator=generator)

        return part(), part()


@dataclass(frozen=True)
class IMAML:
    """Implicit MAML on one sine wave.

    SGD near the initial weights, conjugate gradients, a step of the initial weights.
    """

    shots: int = 10
    queries: int = 10
    steps: int = 5
    lr: float = 0.01
    hidden: int = 40
    pull: float = 2.0
    cg_steps: int = 5
    outer_lr: float = 1e-3

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return sinusoid_mlp(self.hidden)

    def data(self) -> Episode:
        generator = torch.Generator().manual_seed(1)
        tasks = Sinusoids().sample(generator, 1, shots=self.shots, queries=self.queries)
        return tree.index(tasks, 0)

    def distance(self, params: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
        """Return pull / 2 |w - w0|^2, which keeps the solution near the initial weights."""
        pairs = zip(params, start, strict=True)
        return self.pull / 2 * sum((param - at).square().sum() for param, at in pairs)


@dataclass(frozen=True)
class LogisticRegression:
    """Logistic regression with a learned decay for each weight, as in Betty's example.

    SGD from zero, one hypergradient.
    """

    rule: Literal["darts", "cg", "neumann"]
    examples: int = 500
    features: int = 20
    steps: int = 100
    lr: float = 0.1
    outer_lr: float = 0.1
    radius: float = 0.01
    products: int = 3
    alpha: float = 0.1

    def model(self) -> Vector:
        return Vector(torch.zeros(self.features))

    def decay(self) -> Vector:
        return Vector(torch.ones(self.features))

    def data(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (inputs, labels) for the weights and for the decay."""
        generator = torch.Generator().manual_seed(1)
        true = torch.randn(self.features, generator=generator)
        x = torch.randn(2, self.examples, self.features, generator=generator)
        y = (x @ true + 0.1 * torch.randn(2, self.examples, generator=generator) > 0).float()
        return (x[0], y[0]), (x[1], y[1])


@dataclass(frozen=True)
class ManyTensors:
    """MAML with Adam on a narrow network of many layers.

    The gradient of a loss after Adam's steps, in the initial weights.
    """

    layers: int = 32
    width: int = 16
    batch: int = 16
    steps: int = 5
    lr: float = 0.01
    eps: float = 1e-3

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[Shortcut(self.width) for _ in range(self.layers)])

    def data(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (inputs, targets) for the steps and for the loss after them."""
        generator = torch.Generator().manual_seed(1)
        (x, other_x), (y, other_y) = torch.randn(2, 2, self.batch, self.width, generator=generator)
        return (x, y), (other_x, other_y)


class Vector(nn.Module):
    """A vector of weights alone: x @ w."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.w = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Shortcut(nn.Module):
    """x + tanh(W x + b)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def weighted_loss(losses: Tensor, weights: nn.Module) -> Tensor:
    """Return the mean of losses [batch], each times the weight that it is given."""
    return (weights(losses.detach()[:, None]).squeeze(-1) * losses).mean()


def decayed_loss(logits: Tensor, y: Tensor, w: Tensor, decay: Tensor) -> Tensor:
    """Return the logistic loss with the penalty 1/2 sum_i decay_i w_i^2."""
    return F.binary_cross_entropy_with_logits(logits, y) + 0.5 * (decay * w * w).sum()


def library_source(count: int) -> Tensor:
    """Return the first `count` bytes of the Python library's own sources, as int64."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= count:
            return torch.frombuffer(text, dtype=torch.uint8)[:count].long()
    raise ValueError(
        f"The library's sources hold only {len(text)} bytes, {count} are needed. Take fewer steps."
    )


def next_byte_losses(logits: Tensor, text: Tensor) -> Tensor:
    """Return the mean cross-entropy of each example, [batch], for text [batch, length + 1]."""
    return F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").mean(1)


class LanguageModel(nn.Module):
    """A decoder-only transformer that predicts the next byte."""

    def __init__(self, length: int, width: int, layers: int, heads: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, heads, length) for _ in range(layers)])
        self.head = nn.Sequential(
            OrderedDict(norm=nn.LayerNorm(width), out=nn.Linear(width, VOCABULARY))
        )

    def forward(self, text: Tensor) -> Tensor:
        """Return logits [batch, length, vocabulary] for text [batch, length + 1].

        The last byte of the text is not read.
        """
        return self.head(self.blocks(self.embed(text[:, :-1]) + self.position))


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a layer norm and beside a shortcut.

    Attention is written out: the fused kernels have no second derivative.
    """

    def __init__(self, width: int, heads: int, length: int):
        super().__init__()
        self.heads = heads
        self.attend = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(width),
                "qkv": nn.Linear(width, 3 * width),
                "out": nn.Linear(width, width),
            }
        )
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.register_buffer("future", torch.full((length, length), -1e9).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.attend["qkv"](self.attend["norm"](x))
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.future
        x = x + self.attend["out"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.think(x)

"""Small language models of characters: training one on the sources of Python modules is a task."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt._functional import Params
from metaopt.checks import check_count
from metaopt.meta_training.task import Task
from metaopt.tasks.text import encoded_sources

MODULES = ("argparse", "inspect", "textwrap", "pydoc")
EPSILON = 1e-6  # in the root mean square


@dataclass(frozen=True)
class CharacterTransformer:
    """Cross-entropy of the next character under a transformer of one block.

    The block is x + attention(norm x), then x + MLP(norm x), with causal attention, a GELU network
    four times as wide, and norm x = gain x / rms(x); a last norm and a readout follow. Positions
    are learned. Everything is written as plain products of matrices, characters as rows of the
    identity, so that derivatives of any order and `vmap` over models cost what they must.

    Args:
        width: of the embeddings.
        heads: of the attention; they divide the width.
        length: characters that are read, and predicted, in one sequence.
        batch_size: sequences per step, drawn with replacement.
        symbols: size of the alphabet: the most frequent characters, and one symbol for the rest.
        modules: whose sources are the text.

    Raises:
        ValueError: a number is not positive, or `heads` does not divide `width`.

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762; norms in front as in Xiong et al. 2020,
        arXiv:2002.04745, by the root mean square as in Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    width: int = 16
    heads: int = 2
    length: int = 24
    batch_size: int = 8
    symbols: int = 48
    modules: tuple[str, ...] = MODULES

    def __post_init__(self) -> None:
        for name in ("width", "heads", "length", "batch_size", "symbols"):
            check_count(self, name, getattr(self, name))
        if self.width % self.heads:
            raise ValueError(
                f"CharacterTransformer: `heads` must divide `width`, got {self.heads} and "
                f"{self.width}."
            )

    def loss(self, params: Params, batch: Tensor) -> Tensor:
        """Return the mean cross-entropy of batch [n, length + 1], each character but the first."""
        x = one_hot(batch[:, :-1], params["embedding"]) @ params["embedding"] + params["position"]
        x = x + self._attend(params, rms_norm(x, params["attention.gain"]))
        hidden = rms_norm(x, params["mlp.gain"]) @ params["mlp.weight0"] + params["mlp.bias0"]
        x = x + F.gelu(hidden) @ params["mlp.weight1"] + params["mlp.bias1"]
        logits = rms_norm(x, params["readout.gain"]) @ params["readout.weight"]
        return cross_entropy(logits + params["readout.bias"], batch[:, 1:])

    def _attend(self, params: Params, x: Tensor) -> Tensor:
        """Return the attention of x [n, length, width] to itself and what came before."""

        def split(name: str) -> Tensor:
            rows = x @ params[f"attention.{name}"]
            by_head: Tensor = rows.unflatten(-1, (self.heads, -1))
            return by_head.transpose(-2, -3)

        query, key, value = split("query"), split("key"), split("value")
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.width // self.heads)
        future = torch.ones(self.length, self.length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        attended = (weights @ value).transpose(-2, -3).flatten(-2)
        return attended @ params["attention.output"]

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw weights and a batch for every step.

        Embeddings have standard deviation .3, positions .1, matrices 1 / sqrt(fan in); biases are 0
        and gains 1.
        """
        width, hidden = self.width, 4 * self.width
        shapes = {
            "embedding": ((self.symbols, width), 0.3),
            "position": ((self.length, width), 0.1),
            **{
                f"attention.{name}": ((width, width), 1 / math.sqrt(width))
                for name in ("query", "key", "value", "output")
            },
            "mlp.weight0": ((width, hidden), 1 / math.sqrt(width)),
            "mlp.weight1": ((hidden, width), 1 / math.sqrt(hidden)),
            "readout.weight": ((width, self.symbols), 1 / math.sqrt(width)),
        }
        params = normal(shapes, generator)
        for name in ("attention", "mlp", "readout"):
            params[f"{name}.gain"] = torch.ones(width)
        params |= {"mlp.bias0": torch.zeros(hidden), "mlp.bias1": torch.zeros(width)}
        params["readout.bias"] = torch.zeros(self.symbols)
        return Task(params, draw(self, generator, steps))


@dataclass(frozen=True)
class CharacterLSTM:
    """Cross-entropy of the next character under an LSTM that reads each sequence from zeros.

    The steps of the LSTM are a plain loop.

    Args:
        width: of the embeddings and of the state.
        length: characters that are read, and predicted, in one sequence.
        batch_size: sequences per step, drawn with replacement.
        symbols: size of the alphabet: the most frequent characters, and one symbol for the rest.
        modules: whose sources are the text.

    Raises:
        ValueError: a number is not positive.

    Reference:
        Hochreiter and Schmidhuber, Neural Computation 9, 1997; with forget gates, Gers,
        Schmidhuber, Cummins, Neural Computation 12, 2000.
    """

    width: int = 24
    length: int = 16
    batch_size: int = 8
    symbols: int = 48
    modules: tuple[str, ...] = MODULES

    def __post_init__(self) -> None:
        for name in ("width", "length", "batch_size", "symbols"):
            check_count(self, name, getattr(self, name))

    def loss(self, params: Params, batch: Tensor) -> Tensor:
        """Return the mean cross-entropy of batch [n, length + 1], each character but the first."""
        x = one_hot(batch[:, :-1], params["embedding"]) @ params["embedding"]
        given = x @ params["input.weight"] + params["input.bias"]
        h = c = torch.zeros_like(x[:, 0])
        states = []
        for t in range(self.length):
            gates = given[:, t] + h @ params["state.weight"]
            take, keep, show, new = gates.chunk(4, -1)
            c = keep.sigmoid() * c + take.sigmoid() * new.tanh()
            h = show.sigmoid() * c.tanh()
            states.append(h)
        logits = torch.stack(states, 1) @ params["readout.weight"] + params["readout.bias"]
        return cross_entropy(logits, batch[:, 1:])

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw weights and a batch for every step.

        Embeddings have standard deviation .5, matrices 1 / sqrt(width); biases are 0.
        """
        width, std = self.width, 1 / math.sqrt(self.width)
        shapes = {
            "embedding": ((self.symbols, width), 0.5),
            "input.weight": ((width, 4 * width), std),
            "state.weight": ((width, 4 * width), std),
            "readout.weight": ((width, self.symbols), std),
        }
        params = normal(shapes, generator)
        params["input.bias"] = torch.zeros(4 * width)
        params["readout.bias"] = torch.zeros(self.symbols)
        return Task(params, draw(self, generator, steps))


def one_hot(symbols: Tensor, table: Tensor) -> Tensor:
    """Return the rows of the identity that choose rows of the table, in its precision."""
    numbers = torch.arange(table.shape[-2], device=symbols.device)
    return (symbols[..., None] == numbers).to(table.dtype)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Return gain x / rms(x), over the last axis."""
    return gain * x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def cross_entropy(logits: Tensor, symbols: Tensor) -> Tensor:
    """Return the mean of -log p(symbol), in nats, for logits [..., symbols]."""
    return F.cross_entropy(logits.flatten(0, -2), symbols.flatten())


def normal(shapes: dict[str, tuple[tuple[int, int], float]], generator: torch.Generator) -> Params:
    """Draw matrices with mean 0: name -> (shape, standard deviation)."""
    return {
        name: std * torch.randn(shape, generator=generator) for name, (shape, std) in shapes.items()
    }


def draw(
    family: CharacterTransformer | CharacterLSTM, generator: torch.Generator, steps: int
) -> Tensor:
    """Draw sequences of the text, with replacement: [steps, batch_size, length + 1], int64."""
    _, text = encoded_sources(family.modules, family.symbols)
    starts = torch.randint(
        len(text) - family.length, (steps, family.batch_size, 1), generator=generator
    )
    return text[starts + torch.arange(family.length + 1)]

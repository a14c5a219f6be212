"""Gaussian noise that is a function of counters: nobody has to keep it, or to send it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt._functional import Params

# Of Philox 4x32: the multipliers, and what the key grows by from round to round.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
GROWTH = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Noise:
    """epsilon ~ N(0, std^2 I), one tree like `like` for each (step, particle).

    The same numbers come out whoever asks for them, in any order and in any company: another
    process that knows the seed needs only to be told which ones are meant.

    Args:
        seed: of all of it, a 64-bit number.
        std: standard deviation of each entry.
        like: name -> tensor; shapes, dtypes and the device.
        rank: for tensors with two axes or more, seen as matrices [m, n], a product A B' /
            sqrt(rank) with A [m, rank] and B [n, rank] from N(0, 1), of which fewer numbers are
            drawn. Its entries are uncorrelated, with variance 1, but not Gaussian.

    Reference:
        Salmon, Moraes, Dror, Shaw 2011, doi:10.1145/2063384.2063405, Philox 4x32-10; low rank:
        Sarkar et al. 2025, arXiv:2511.16652.
    """

    seed: int
    std: float
    like: Params
    rank: int | None = None

    def __call__(self, steps: Tensor, particles: Tensor) -> Params:
        """Return the noise of each pair in steps [n], particles [n]: leaves [n, ...]."""
        sizes = [self._draws(leaf) for leaf in self.like.values()]
        rows = normal(self.seed, steps, particles, sum(sizes))
        return {
            name: (self.std * self._shape(part, leaf)).to(leaf)
            for (name, leaf), part in zip(self.like.items(), rows.split(sizes, 1), strict=True)
        }

    def _draws(self, leaf: Tensor) -> int:
        if self._is_factored(leaf):
            rank: int = self.rank  # type: ignore[assignment]
            return rank * (len(leaf) + leaf.numel() // len(leaf))
        return leaf.numel()

    def _is_factored(self, leaf: Tensor) -> bool:
        return self.rank is not None and leaf.ndim >= 2 and leaf.numel() > 0

    def _shape(self, numbers: Tensor, leaf: Tensor) -> Tensor:
        if not self._is_factored(leaf):
            return numbers.reshape(-1, *leaf.shape)
        rank: int = self.rank  # type: ignore[assignment]
        left, right = numbers.reshape(len(numbers), -1, rank).split(
            [len(leaf), leaf.numel() // len(leaf)], 1
        )
        found: Tensor = left @ right.mT / math.sqrt(rank)
        return found.reshape(-1, *leaf.shape)


def normal(seed: int, steps: Tensor, particles: Tensor, size: int) -> Tensor:
    """Return independent numbers from N(0, 1), [n, size], float64, for steps [n], particles [n]."""
    blocks = torch.arange(-(-size // 4), device=steps.device)
    counter = torch.broadcast_tensors(
        blocks, particles[:, None], steps[:, None] & WORD, steps[:, None] >> 32
    )
    words = philox([*counter], (seed & WORD, seed >> 32 & WORD))
    first, angle, second, other = [(word.double() + 0.5) / 2**32 for word in words]
    radii = [(-2 * u.log()).sqrt() for u in (first, second)]
    turns = [2 * math.pi * u for u in (angle, other)]
    pairs = [
        value for r, a in zip(radii, turns, strict=True) for value in (r * a.cos(), r * a.sin())
    ]
    return torch.stack(pairs, -1).flatten(1)[:, :size]


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Return four random words for each counter of four words; all are int64 below 2^32."""
    a, b, c, d = counter
    for turn in range(ROUNDS):
        left, right = [(start + turn * by) & WORD for start, by in zip(key, GROWTH, strict=True)]
        high, low = _multiply(a, MULTIPLIERS[0])
        high_2, low_2 = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_2 ^ b ^ left, low_2, high ^ d ^ right, low
    return [a, b, c, d]


def _multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a product; int64 wraps around, and keeps all the bits."""
    product = x * by
    return product >> 32 & WORD, product & WORD

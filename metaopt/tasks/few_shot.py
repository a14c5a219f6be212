"""N-way K-shot classification of handwritten characters, as data of a task family."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Generator, Tensor

from metaopt.checks import check_choice, check_count
from metaopt.tasks.examples import Batch
from metaopt.tasks.omniglot import SIZE, CharacterTasks, read_omniglot, split_alphabets

PARTS = ("train", "test")


@dataclass(frozen=True)
class OmniglotClasses:
    """A few drawings of each of some characters, the same at every step; others are held out.

    `Supervised(ConvNet((8, 16)), OmniglotClasses(path, ways=5), batch_size=25, held_out=75)` is
    5-way 5-shot classification with 15 queries of each character: a batch holds `ways` times as
    many examples as there are shots. Each task draws its own characters, of one part of the
    alphabets. Pixels are in [0, 1], ink is 1.

    Args:
        path: an official `images_*.zip`, or a folder of such.
        ways: characters of a task.
        part: "train", or "test": the alphabets that `split_alphabets` holds out.

    Raises:
        FileNotFoundError: there is no archive.
        ValueError: a damaged one, more ways than there are characters in this part, an unknown
            part; at a draw: a number of examples that is no multiple of `ways`, or that needs more
            drawings of a character than there are.

    Cost:
        Each archive is read once.

    Reference:
        Vinyals et al. 2016, arXiv:1606.04080, section 4.1.1.
    """

    path: str | Path
    ways: int = 5
    part: str = "train"

    inputs: ClassVar[int] = SIZE * SIZE

    def __post_init__(self) -> None:
        check_choice(self, "part", self.part, PARTS)
        check_count(self, "ways", self.ways, least=2)
        known = _read(self.path, self.part).characters
        if self.ways > known:
            raise ValueError(
                f"OmniglotClasses: `ways` must be at most {known}, the characters of the part "
                f"{self.part!r} of {self.path}, got {self.ways}. Add alphabets."
            )

    @property
    def outputs(self) -> int:
        """Number of classes."""
        return self.ways

    def draw(
        self, generator: Generator, steps: int, size: int, held_out: int
    ) -> tuple[Batch, Batch]:
        """Draw characters, `size` drawings of them to learn from and others."""
        shots, queries = (self._each(count) for count in (size, held_out))
        (x, y), (other, other_y) = _read(self.path, self.part).sample(
            generator, 1, ways=self.ways, shots=shots, queries=queries
        )
        batches = x.flatten(2).expand(steps, -1, -1), y.expand(steps, -1)
        return batches, (other[0].flatten(1), other_y[0])

    def _each(self, count: int) -> int:
        each, rest = divmod(count, self.ways)
        if rest:
            raise ValueError(
                "OmniglotClasses: `batch_size` and `held_out` must be multiples of the "
                f"{self.ways} ways, got {count}. For K shots, write batch_size={self.ways} * K."
            )
        return each

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(outputs, y)


def _read(path: str | Path, part: str) -> CharacterTasks:
    return _read_parts(Path(path))[PARTS.index(part)]


@functools.cache
def _read_parts(path: Path) -> tuple[CharacterTasks, ...]:
    return tuple(CharacterTasks(part) for part in split_alphabets(read_omniglot(path)))

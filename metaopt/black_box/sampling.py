"""Points that do not depend on what was found: at random, or evenly spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.quasirandom import SobolEngine

from metaopt.black_box.backend import Backend
from metaopt.black_box.isolation import derive_seed
from metaopt.black_box.space import Space, Values
from metaopt.black_box.trial import Trial
from metaopt.checks import check_count


@dataclass(frozen=True)
class RandomSearch(Backend):
    """Independent points, uniform in the space (in its logarithm where log=True).

    Args:
        seed: of the points.

    Reference:
        Bergstra, Bengio 2012, Random search for hyper-parameter optimization, JMLR 13.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "seed", self.seed, least=0)

    def suggest(self, space: Space, trials: Sequence[Trial]) -> Values:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, len(trials)))
        point = torch.rand(len(space), generator=generator, dtype=torch.float64)
        return space.place(dict(zip(space, point.tolist(), strict=True)))


@dataclass(frozen=True)
class Sobol(Backend):
    """The points of a scrambled Sobol sequence, which fill the space more evenly than random ones.

    Args:
        seed: of the scrambling.

    Raises:
        ValueError: on the first suggestion, a space of more than 21,201 parameters.

    Reference:
        Owen 1998, Scrambling Sobol' and Niederreiter-Xing points, Journal of Complexity 14.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "seed", self.seed, least=0)

    def suggest(self, space: Space, trials: Sequence[Trial]) -> Values:
        engine = SobolEngine(len(space), scramble=True, seed=derive_seed(self.seed, 0))
        (point,) = engine.fast_forward(len(trials)).draw(1, dtype=torch.float64).tolist()
        return space.place(dict(zip(space, point, strict=True)))

"""Estimators of the meta-gradient from losses alone, by pairs of perturbed optimizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt._functional import Params
from metaopt.checks import check_count, check_flag, check_positive
from metaopt.distributed import current_ranks
from metaopt.meta_training.objective import MeanLoss, Objective, check_objective
from metaopt.meta_training.pairs import Crowd, Differences
from metaopt.meta_training.task import TaskFamily
from metaopt.optimizer import Optimizer


@dataclass(frozen=True)
class EvolutionEstimator:
    """What ES, TruncatedES, PES and NRES have in common.

    The loss of an episode, J(theta), is smoothed: the derivative is that of E J(theta + epsilon),
    epsilon ~ N(0, std^2 I). Of each pair one half runs with theta + epsilon, the other with
    theta - epsilon; task, batches, random numbers in the loss and resets are the same. No
    derivative of the loss in theta is taken, so chaotic and discontinuous losses are no trouble.
    The noise is a function of (seed, number of the estimate, pair), see `Noise`: ranks that share
    the pairs tell each other two numbers of each, and make the others' noise themselves.
    """

    std: float
    pairs: int = 8
    objective: Objective = field(default=MeanLoss(), kw_only=True)
    rank: int | None = field(default=None, kw_only=True)
    chunk_size: int | None = field(default=None, kw_only=True)
    compile: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self, "std", self.std)
        check_count(self, "pairs", self.pairs)
        check_objective(self, self.objective)
        check_flag(self, "compile", self.compile)
        for name in ("rank", "chunk_size"):
            if getattr(self, name) is not None:
                check_count(self, name, getattr(self, name), or_none=True)

    def init(self) -> None:
        """Return the state before the first estimate; later it is a dict of tensors and numbers."""
        return None

    def __call__(
        self,
        optimizer: Optimizer,
        theta: Params,
        family: TaskFamily,
        horizon: int,
        state: Any,
        generator: torch.Generator,
    ) -> Differences:
        """Estimate over the next window of each pair's episode."""
        ranks = current_ranks()
        ranks.share(self.pairs, "pairs")
        with torch.no_grad():
            crowd = Crowd(self, optimizer, theta, family, horizon, generator, ranks)
            return crowd.estimate(crowd.begin() if state is None else state)

    def window_of(self, horizon: int) -> int:
        """Return the number of steps of one estimate."""
        return horizon

    def windows(self, horizon: int) -> int:
        """Return the number of windows of an episode."""
        return -(-horizon // self.window_of(horizon))

    def places(self, horizon: int) -> Tensor:
        """Return the step at which each pair begins, [pairs]."""
        return torch.zeros(self.pairs, dtype=torch.int64)

    def seen(self, start: Tensor, now: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (the number whose noise is in force, the first and the last that count).

        Args:
            start: number of the estimate with which each pair's episode began, [pairs].
            now: number of this estimate.
        """
        all_now = torch.full_like(start, now)
        return all_now, all_now, all_now

    @property
    def halves_go_on(self) -> bool:
        """Whether each half of a pair keeps its inner problem; or both begin at a shared one."""
        return True


@dataclass(frozen=True)
class ES(EvolutionEstimator):
    """g = 1/N sum_i epsilon_i (J(theta + epsilon_i) - J(theta - epsilon_i)) / (2 std^2).

    J is the loss of a whole episode; each estimate draws new tasks.

    **Bias**: none for the smoothed loss, whose derivative differs from that of J by O(std^2).

    Args:
        std: standard deviation of the noise. Variance grows with the number of parameters; and like
            1 / std^2 where the losses are random.
        pairs: N.
        objective: J: `MeanLoss()`, `LastLoss()` or `ValidationLoss()`.
        rank: of the noise of matrices, see `Noise`; by default it is full.
        chunk_size: pairs that run at a time, by `vmap`; by default all.
        compile: compile one step of all pairs that run at a time. It is compiled anew for another
            number of them (where the last windows of `stagger`ed episodes are shorter), and for
            each shape, so not for `Groups` of families that are drawn.

    Raises:
        ValueError: a number is not positive, or there is no such objective.

    Cost:
        2 N episodes, forward only. Memory: the inner problems of the pairs that run at a time.

    Reference:
        Salimans et al. 2017, arXiv:1703.03864, section 2; antithetic pairs section 2.1.
    """


@dataclass(frozen=True)
class Windowed(EvolutionEstimator):
    """An estimator that looks at `window` steps at a time, of episodes that go on.

    The last window of an episode is shorter if the horizon is no multiple of it.
    """

    window: int = field(default=20, kw_only=True)
    stagger: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window", self.window)
        check_flag(self, "stagger", self.stagger)

    def places(self, horizon: int) -> Tensor:
        """Return the step at which each pair begins, [pairs]: spread over the windows, if so."""
        place = torch.arange(self.pairs) * self.windows(horizon) // self.pairs
        return self.stagger * self.window_of(horizon) * place

    def window_of(self, horizon: int) -> int:
        """Return the window, or an episode that is shorter."""
        return min(self.window, horizon)


@dataclass(frozen=True)
class TruncatedES(Windowed):
    """ES over a window, of which both halves begin where theta itself has come to.

    **Bias**: what the parameters do to the inner state before the window does not count, as in
    `TruncatedBackprop`.

    Args:
        std: standard deviation of the noise.
        pairs: number of pairs.
        window: steps per estimate.
        stagger: whether the pairs begin at different places of their episodes, spread over its
            windows, to which theta itself runs before the first estimate. If all begin at step 0,
            an estimate sees one part of the episode alone, first its beginning: with long
            episodes, training learns greed.
        objective: as in `ES`, of the steps of the window.
        rank: as in `ES`.
        chunk_size: as in `ES`.
        compile: as in `ES`.

    Cost:
        3 windows per pair, forward only.

    Reference:
        Metz et al. 2019, arXiv:1810.10180, section 3.
    """

    @property
    def halves_go_on(self) -> bool:
        """Both begin at a shared inner problem, which theta itself takes on."""
        return False


@dataclass(frozen=True)
class PES(Windowed):
    """g = 1/N sum_i xi_i (L_i(+) - L_i(-)) / (2 std^2) over a window, with persistent noise.

    Each window has noise epsilon_i of its own, and xi_i is the sum of all that the pair has seen in
    its episode, this window's included. L is the window's part of the episode's loss.

    **Bias**: none for the smoothed loss of the episode and every window, if theta stands still
    meanwhile.

    Args:
        std: standard deviation of the noise.
        pairs: N.
        window: steps per estimate.
        stagger: as in `TruncatedES`.
        objective: as in `ES`.
        rank: as in `ES`.
        chunk_size: as in `ES`.
        compile: as in `ES`.

    Cost:
        2 windows per pair, forward only. The noise of an episode so far is made again at each
        estimate; `NRES` has no such sum.

    Reference:
        Vicol, Metz, Sohl-Dickstein 2021, arXiv:2112.13835, algorithm 2.
    """

    def seen(self, start: Tensor, now: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return this estimate's noise, and all since the episode began."""
        all_now = torch.full_like(start, now)
        return all_now, start, all_now


@dataclass(frozen=True)
class NRES(Windowed):
    """PES with one epsilon_i for a whole episode: noise-reusing evolution strategies.

    The multiplier is epsilon_i. It is drawn anew when the pair's episode begins.

    **Bias**: none for the smoothed loss of the episode and every window, if theta stands still
    meanwhile.

    Args:
        std: standard deviation of the noise.
        pairs: number of pairs.
        window: steps per estimate.
        stagger: as in `TruncatedES`.
        objective: as in `ES`.
        rank: as in `ES`.
        chunk_size: as in `ES`.
        compile: as in `ES`.

    Cost:
        2 windows per pair, forward only.

    Reference:
        Li, Harrison, Sohl-Dickstein, Smith, Metz 2023, arXiv:2304.12180, algorithm 3.
    """

    def seen(self, start: Tensor, now: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noise with which the episode began."""
        return start, start, start

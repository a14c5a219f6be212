"""Estimates over several families of tasks at once, each of a size of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from metaopt._functional import Params
from metaopt.checks import check_count, check_flag
from metaopt.meta_training.estimate import Estimate, Estimator
from metaopt.meta_training.task import TaskFamily
from metaopt.optimizer import Optimizer
from metaopt.optimizer.horizon import with_steps

Horizon = int | tuple[int, int]


class Families(Protocol):
    """A distribution of families of tasks."""

    def draw(self, generator: torch.Generator) -> TaskFamily:
        """Draw a family; all randomness comes from the generator."""
        ...


@dataclass(frozen=True)
class Groups:
    """An estimator over groups of tasks: those of one group are of one family, and batched.

    When the episodes of a group are over, it draws a family anew, and a horizon: log-uniformly, if
    training has a pair (shortest, longest). The optimizer is told the horizon, see `with_steps`.

    Args:
        estimator: what each group has. All of its tasks are at the same place of their episodes.
        groups: number of groups under way.
        at_a_time: how many of them an estimate looks at, in turns; by default all.
        stagger: whether the groups begin at different places of their episodes, to which their own
            estimator takes them before the first estimate. Else an estimate sees one part of
            episodes alone, first their beginning: training learns greed.

    Raises:
        ValueError: a number is not positive, or more groups at a time than there are.

    Cost:
        That of the estimator, `at_a_time` times.
    """

    estimator: Estimator
    groups: int = 6
    at_a_time: int | None = field(default=None, kw_only=True)
    stagger: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_count(self, "groups", self.groups)
        check_flag(self, "stagger", self.stagger)
        if self.at_a_time is not None:
            check_count(self, "at_a_time", self.at_a_time, or_none=True)
            if self.at_a_time > self.groups:
                raise ValueError(
                    f"Groups: `at_a_time` must be at most the number of groups, {self.groups}, got "
                    f"{self.at_a_time}."
                )
        if getattr(self.estimator, "stagger", False):
            # within a group all are at one place; the groups are not
            object.__setattr__(self, "estimator", replace(self.estimator, stagger=False))  # type: ignore[type-var]

    def init(self) -> None:
        """Return the state before the first estimate.

        Later it is a dict: "next", the group that is looked at next, and "groups", for each the
        "seed" of its family and horizon, the number of "estimates" of its episodes so far, and the
        estimator's own "state".
        """
        return None

    def windows(self, horizon: int) -> int:
        """Return the number of estimates of an episode."""
        return self.estimator.windows(horizon)

    def __call__(
        self,
        optimizer: Optimizer,
        theta: Params,
        family: TaskFamily | Families,
        horizon: Horizon,
        state: Any,
        generator: torch.Generator,
    ) -> Estimate:
        """Estimate over the next window of some groups."""

        def estimate(group: dict[str, Any]) -> tuple[Estimate, dict[str, Any]]:
            own = torch.Generator().manual_seed(group["seed"])
            steps = draw_horizon(horizon, own)
            tasks = draw_family(family, own)
            told = with_steps(optimizer, steps)
            found = self.estimator(told, theta, tasks, steps, group["state"], generator)
            count = group["estimates"] + 1
            if count == self.estimator.windows(steps):
                return found, self._begin(generator)
            return found, {**group, "estimates": count, "state": found.state}

        if state is None:
            groups = [self._begin(generator) for _ in range(self.groups)]
            for i, group in enumerate(groups):
                own = torch.Generator().manual_seed(group["seed"])
                windows = self.estimator.windows(draw_horizon(horizon, own))
                for _ in range(self.stagger * (i * windows // self.groups)):
                    _, groups[i] = estimate(groups[i])
            state = {"next": 0, "groups": groups}
        groups, parts = list(state["groups"]), []
        count = self.at_a_time or self.groups
        for i in range(state["next"], state["next"] + count):
            found, groups[i % self.groups] = estimate(groups[i % self.groups])
            parts.append(found)
        after = {"next": (state["next"] + count) % self.groups, "groups": groups}
        return Together(parts, after)

    def _begin(self, generator: torch.Generator) -> dict[str, Any]:
        seed = int(torch.randint(2**62, (), generator=generator))
        return {"seed": seed, "estimates": 0, "state": self.estimator.init()}


@dataclass(frozen=True)
class Together:
    """The estimates of several groups as one."""

    parts: list[Estimate]
    state: Any

    @property
    def losses(self) -> Tensor:
        """Those of each group, one behind the other."""
        return torch.cat([part.losses for part in self.parts])

    @property
    def norms(self) -> Tensor:
        """Those of each group, one behind the other."""
        return torch.cat([part.norms for part in self.parts])

    def weighted_sum(self, weights: Tensor) -> Params:
        """Return the sum over all groups."""
        rows = weights.split([len(part.losses) for part in self.parts])
        sums = [part.weighted_sum(row) for part, row in zip(self.parts, rows, strict=True)]
        return {name: sum(one[name] for one in sums) for name in sums[0]}  # type: ignore[misc]


def draw_family(family: TaskFamily | Families, generator: torch.Generator) -> TaskFamily:
    """Return a family, drawn if there are several."""
    return family.draw(generator) if hasattr(family, "draw") else family


def draw_horizon(horizon: Horizon, generator: torch.Generator) -> int:
    """Return the horizon, drawn log-uniformly if it is a pair (shortest, longest)."""
    if isinstance(horizon, int):
        return horizon
    low, high = map(math.log, horizon)
    return round(math.exp(low + (high - low) * float(torch.rand((), generator=generator))))

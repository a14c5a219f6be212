"""What of an episode is to be small: the objective J that estimators differentiate.

J is a sum over the steps of an episode, so that a window of them has a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metaopt._minimize import Minimized, minimize
from metaopt.checks import check_positive
from metaopt.optimizer import Optimizer
from metaopt.tree import Tree

LATE = 0.8  # where the last fifth of an episode begins

Loss = Callable[[Tree, Tree], Tensor]


class Window(NamedTuple):
    """Some steps of an episode.

    Attributes:
        losses: before each step, [n].
        first: the loss before the first step of the episode.
        start: index of the first of these steps in the episode, an integer tensor.
        horizon: number of steps of the episode.
        before: the parameters to evaluate at, before these steps; see `Optimizer.evaluated`.
        after: the same after them.
        last_batch: the batch of the last step of the episode.
        held_out: the task's batch that no step sees, or ().
    """

    losses: Tensor
    first: Tensor
    start: Tensor
    horizon: int
    before: Tree
    after: Tree
    last_batch: Tree
    held_out: Tree


class Objective(Protocol):
    """An objective J, the sum of the parts of an episode's windows."""

    def part(self, window: Window, loss: Loss) -> Tensor:
        """Return the window's part of J, a scalar."""
        ...

    @property
    def is_bounded(self) -> bool:
        """Whether a part is a finite number even where losses are none."""
        ...


def run_evaluated(
    loss: Loss,
    optimizer: Optimizer,
    params: Tree,
    rows: Tree,
    opt_state: Any,
    **options: Any,
) -> tuple[Minimized, Tree, Tree]:
    """Return (the result of some steps, the parameters to evaluate at before them, and after).

    The options are those of `minimize`.
    """
    out = minimize(loss, optimizer, params, rows, opt_state=opt_state, **options)
    before = optimizer.evaluated(opt_state, params)
    return out, before, optimizer.evaluated(out.opt_state, out.params)


def check_objective(owner: object, objective: Any) -> None:
    """Raise TypeError if it is none."""
    if not callable(getattr(objective, "part", None)):
        raise TypeError(
            f"{type(owner).__name__}: `objective` must be an objective, got {objective!r}. For "
            "example `MeanLoss()`, `LastLoss()` or `ValidationLoss()`."
        )


@dataclass(frozen=True)
class Relative:
    """l -> min(ln((l + floor l_0 + 1e-4) / (l_0 + 1e-4)), cap), with the first loss l_0.

    Losses of all tasks are then of one size without any reference run, and to estimators by pairs
    a run that diverges counts as `cap`. (Backpropagation has no derivative of it, and leaves it
    out.)

    Args:
        floor: part of the first loss beyond which a lower loss hardly counts.
        cap: the largest value.

    Raises:
        ValueError: a number is not positive.
    """

    floor: float = 0.01
    cap: float = 0.7

    def __post_init__(self) -> None:
        check_positive(self, "floor", self.floor)
        check_positive(self, "cap", self.cap)

    def __call__(self, loss: Tensor, first: Tensor) -> Tensor:
        """Return what a loss counts."""
        first = first.clamp(min=0)
        ratio = (loss.clamp(min=0) + self.floor * first + 1e-4) / (first + 1e-4)
        return torch.where(ratio.isfinite(), ratio.log().clamp(max=self.cap), self.cap)


@dataclass(frozen=True)
class OfLosses:
    """What the objectives here have in common: losses, or relative ones."""

    relative: Relative | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether losses are relative."""
        return self.relative is not None


@dataclass(frozen=True)
class MeanLoss(OfLosses):
    """J = 1/T sum_t w_t L_t, the mean training loss: the area under the curve.

    Args:
        relative: what is summed up in place of the loss L_t itself.
        late: weight w of the last fifth of the steps, over that of the others; their mean is 1.

    Raises:
        ValueError: a weight that is not positive.
    """

    late: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self, "late", self.late)

    def part(self, window: Window, loss: Loss) -> Tensor:
        """Return 1/T sum of w_t L_t over the window."""
        return self._sum(window.losses, window.first, window.start, window.horizon)

    def of(self, losses: Tensor) -> Tensor:
        """Return J of a whole episode with these losses, [T]."""
        return self._sum(losses, losses[0], torch.zeros((), dtype=torch.int64), len(losses))

    def _sum(self, values: Tensor, first: Tensor, start: Tensor, horizon: int) -> Tensor:
        if self.relative is not None:
            values = self.relative(values, first)
        if self.late != 1:
            begin = math.ceil(LATE * horizon)
            mean = 1 + (self.late - 1) * (1 - begin / horizon)
            steps = start + torch.arange(len(values), device=values.device)
            values = values * torch.where(steps >= begin, self.late / mean, 1 / mean)
        return values.sum() / horizon


@dataclass(frozen=True)
class LastLoss(OfLosses):
    """J = L(w_T), where an episode ends, on the batch of its last step.

    It is summed up from its changes over the windows.

    Args:
        relative: what is taken in place of the loss.
    """

    def part(self, window: Window, loss: Loss) -> Tensor:
        """Return how much the loss changes over the window."""
        return _change(window, loss, window.last_batch, self.relative)


@dataclass(frozen=True)
class ValidationLoss(OfLosses):
    """J = L(w_T), where an episode ends, on the batch that the task holds out.

    It is summed up from its changes over the windows.

    Args:
        relative: what is taken in place of the loss.

    Raises:
        ValueError: at an estimate: the tasks hold nothing out.
    """

    def part(self, window: Window, loss: Loss) -> Tensor:
        """Return how much the loss changes over the window."""
        if isinstance(window.held_out, tuple) and not window.held_out:
            raise ValueError(
                "ValidationLoss needs tasks that hold a batch out, got none. Give it as the third "
                "part of a task: `Task(params, batches, held_out)`."
            )
        return _change(window, loss, window.held_out, self.relative)


def _change(window: Window, loss: Loss, batch: Tree, relative: Relative | None) -> Tensor:
    before, after = loss(window.before, batch), loss(window.after, batch)
    if relative is not None:
        before, after = relative(before, window.first), relative(after, window.first)
    return after - before

"""Learning rate schedulers of torch as schedules of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from metaopt.optimizer.by_name import Value
from metaopt.optimizer.hyperparameter import set_value
from metaopt.optimizer.schedule import Schedule


def continue_scheduler(scheduler: Any, group: int, step: int) -> Schedule:
    """Return a scheduler's rates for a group from now on, as a schedule.

    Args:
        scheduler: of torch; it has made `last_epoch` steps.
        group: index of the parameter group.
        step: number of steps that the optimizer has made.

    Raises:
        ValueError: a kind of scheduler that is not known here, or the group's rate is not the
            scheduler's.
    """
    known = kinds()
    if type(scheduler) not in known:
        raise ValueError(
            f"`scheduler` must be one of {', '.join(sorted(kind.__name__ for kind in known))}, got "
            f"{type(scheduler).__name__}. Others are not carried over. Leave it out and give each "
            "optimizer a schedule of ours: `pure.optimizers[0].lr = OneCycle(0.1, steps=100)`."
        )
    schedule = known[type(scheduler)](scheduler, group)
    like = torch.zeros((), dtype=torch.float64)
    value, _ = schedule(
        schedule.init(like), step=torch.tensor(scheduler.last_epoch), loss=None, grads=[like]
    )
    now = float(scheduler.optimizer.param_groups[group]["lr"])
    if not math.isclose(float(value), now, rel_tol=1e-6, abs_tol=1e-12):
        raise ValueError(
            f"The rate of group {group} must be that of `scheduler`, {float(value):.6g} after its "
            f"{scheduler.last_epoch} steps, got {now:.6g}. Another scheduler, or somebody, changed "
            "it too. Leave `scheduler` out and give each optimizer a schedule of ours: "
            "`pure.optimizers[0].lr = Cosine(0.1, steps=100)`."
        )
    ahead = scheduler.last_epoch - step
    return Ahead(schedule, ahead) if ahead else schedule


def kinds() -> dict[type[Any], Callable[[Any, int], Schedule]]:
    """Return class of torch -> what makes our equal of one, for a group."""
    import metaopt.optimizers as ours

    def constant(s: lr_scheduler.ConstantLR, group: int) -> Schedule:
        return _in_pieces({0: s.factor, s.total_iters: 1.0}, s.base_lrs[group])

    def linear(s: lr_scheduler.LinearLR, group: int) -> Schedule:
        base = s.base_lrs[group]
        return ours.Linear(base * s.start_factor, s.total_iters, final=base * s.end_factor)

    def multi_step(s: lr_scheduler.MultiStepLR, group: int) -> Schedule:
        factors, factor = {0: 1.0}, 1.0
        for milestone, times in sorted(s.milestones.items()):
            factor *= s.gamma**times
            factors[milestone] = factor
        return _in_pieces(factors, s.base_lrs[group])

    return {
        lr_scheduler.ConstantLR: constant,
        lr_scheduler.LinearLR: linear,
        lr_scheduler.MultiStepLR: multi_step,
        lr_scheduler.StepLR: lambda s, group: ours.Staircase(
            s.base_lrs[group], s.step_size, gamma=s.gamma
        ),
        lr_scheduler.ExponentialLR: lambda s, group: ours.Exponential(s.base_lrs[group], s.gamma),
        lr_scheduler.PolynomialLR: lambda s, group: ours.Polynomial(
            s.base_lrs[group], s.total_iters, power=s.power
        ),
        lr_scheduler.CosineAnnealingLR: lambda s, group: Wave(
            s.base_lrs[group], s.T_max, s.eta_min
        ),
    }


def _in_pieces(factors: dict[int, float], base: Value) -> Schedule:
    """Return the schedule with the rate factor * base from each of the steps on."""
    import metaopt.optimizers as ours

    boundaries = tuple(step for step in sorted(factors) if step > 0)
    return ours.Piecewise(tuple(base * factors[step] for step in (0, *boundaries)), boundaries)


class Wave(Schedule):
    """value_t = final + (initial - final) (1 + cos(pi t / steps)) / 2, up again after t = steps.

    Equal to `torch.optim.lr_scheduler.CosineAnnealingLR`; `Cosine` stays at its end.

    Args:
        initial: the value at step 0.
        steps: steps until the lowest value.
        final: the lowest value.
    """

    initial: Value
    final: Value

    def __init__(self, initial: Value, steps: int, final: Value):
        super().__init__()
        set_value(self, "initial", initial)
        set_value(self, "final", final)
        self.steps = steps

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        angle = math.pi / self.steps * _precise(step, grads[0])
        return self.final + (self.initial - self.final) * (1 + angle.cos()) / 2, state


class Ahead(Schedule):
    """value_t = schedule_{t + by}: a schedule that is ahead of the optimizer's step count.

    Args:
        schedule: what is evaluated there.
        by: number of steps.
    """

    schedule: Schedule

    def __init__(self, schedule: Schedule, by: int):
        super().__init__()
        self.schedule, self.by = schedule, by

    def init(self, like: Tensor) -> Any:
        return self.schedule.init(like)

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        value, state = self.schedule(state, step=step + self.by, loss=loss, grads=grads)
        return value, state


def _precise(step: Tensor, like: Tensor) -> Tensor:
    return step.to(torch.float64 if like.dtype == torch.float64 else torch.float32)

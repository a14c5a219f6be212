"""The score-function estimator: the meta-gradient of schedules that act at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.func import grad, vmap

from metaopt import tree
from metaopt._functional import Params, lend
from metaopt._minimize import minimize
from metaopt.checks import check_count
from metaopt.distributed import current_ranks, work_alone
from metaopt.meta_training.estimate import Estimate, Gradients
from metaopt.meta_training.shared import Shared
from metaopt.meta_training.task import Task, TaskFamily, draw_own_tasks
from metaopt.optimizer import Optimizer
from metaopt.optimizer.by_name import ByName
from metaopt.optimizer.values import find_schedules
from metaopt.tree import Tree


@runtime_checkable
class Policy(Protocol):
    """A schedule whose state is a dict with "noise" [steps], and a record of what it did.

    With noise from N(0, I) its actions are random, with the noise 0 that `init` has they are not.
    """

    def log_probs(self, state: Any) -> Tensor:
        """Return log p(action | what was observed) of each step in the record, [steps]."""
        ...


class _Place(NamedTuple):
    """A policy, and the keys that lead to its state in that of the optimizer."""

    policy: Policy
    path: tuple[str, ...]


@dataclass(frozen=True)
class Reinforce:
    """g = 1/n sum_i sum_t (G_it - b_it) d/dtheta log p_theta(a_it | o_it): REINFORCE.

    a_it is what the policy does at step t of rollout i, o_it what it observes, and G_it = sum_{s>t}
    w_s L_is what the losses after it have in the objective J = sum_s w_s L_s. The baseline b_it is
    the mean of the others' G_jt on the same task. No derivative of the steps is taken: the loss may
    be chaotic or discontinuous, and what the optimizer does need not be differentiable.

    **Bias**: none for E J, the mean over the policy's actions. It acts without noise afterwards,
    and J there is another one, by O(std^2).

    Args:
        tasks: number of tasks.
        rollouts: n, of each task, with the same batches and the same random numbers in the loss.
        tail: J is the mean of the last `tail` training losses of an episode; by default of all.

    Raises:
        ValueError: a number is too small, no hyperparameter is a policy, the optimizer has other
            parameters that are learned, or episodes are longer than a policy's record.

    Cost:
        tasks x rollouts episodes, forward only, side by side by `vmap`; and one derivative of the
        policy itself, for all steps at once.

    Reference:
        Williams 1992, doi:10.1007/BF00992696; the baseline: Kool, van Hoof, Welling 2019, "Buy 4
        REINFORCE Samples, Get a Baseline for Free!".
    """

    tasks: int = 4
    rollouts: int = 8
    tail: int | None = None

    def __post_init__(self) -> None:
        check_count(self, "tasks", self.tasks)
        check_count(self, "rollouts", self.rollouts, least=2)
        if self.tail is not None:
            check_count(self, "tail", self.tail, or_none=True)

    def init(self) -> None:
        """Return nothing: there is nothing to remember."""
        return None

    def windows(self, horizon: int) -> int:
        """Return 1: an estimate looks at whole episodes."""
        return 1

    def __call__(
        self,
        optimizer: Optimizer,
        theta: Params,
        family: TaskFamily,
        horizon: int,
        state: None,
        generator: torch.Generator,
    ) -> Estimate:
        """Run the rollouts of new tasks."""
        places = _find_policies(optimizer)
        ranks = current_ranks()
        drawn = draw_own_tasks(family, generator, self.tasks, horizon, ranks)
        start = vmap(optimizer.init)(drawn.params)
        _check(optimizer, theta, places, tree.index(start, 0), horizon)
        noises = [
            ranks.own(
                torch.randn(self.tasks, self.rollouts, rows.shape[1], generator=generator).to(rows)
            )
            for rows in (_get(start, place.path)["noise"] for place in places)
        ]
        run = partial(_roll_out, optimizer, theta, family, places)
        with torch.no_grad(), work_alone():
            over_rollouts = vmap(run, in_dims=(None, None, 0), randomness="same")
            over_tasks = vmap(over_rollouts, randomness="different")
            losses, records = over_tasks(drawn, start, noises)
            advantages = self._advantages(losses)
        score = partial(_score, optimizer, places)
        grads = vmap(grad(score), in_dims=(None, 0, 0))(theta, records, advantages)
        own = Gradients(grads, losses.mean((1, 2)), None)
        return Shared(own, self.tasks, ranks) if ranks.are_many else own

    def _advantages(self, losses: Tensor) -> Tensor:
        """Return (G - b) / n for losses [tasks, rollouts, horizon]."""
        horizon = losses.shape[-1]
        tail = min(self.tail or horizon, horizon)
        counted = torch.arange(horizon, device=losses.device) >= horizon - tail
        parts = torch.where(counted, losses, 0) / tail
        after = parts.flip(-1).cumsum(-1).flip(-1) - parts
        # G_i - the mean of the others = (G_i - the mean of all) n / (n - 1)
        return (after - after.mean(1, keepdim=True)) / (self.rollouts - 1)


def _roll_out(
    optimizer: Optimizer,
    theta: Params,
    family: TaskFamily,
    places: Sequence[_Place],
    task: Task,
    state: Any,
    noises: list[Tensor],
) -> tuple[Tensor, list[Any]]:
    """Return (losses [horizon], what each policy has recorded) with this noise."""
    for place, noise in zip(places, noises, strict=True):
        state = _put(state, place.path, {**_get(state, place.path), "noise": noise})
    out = lend(
        optimizer,
        theta,
        minimize,
        family.loss,
        optimizer,
        task.params,
        task.batches,
        opt_state=state,
    )
    return out.losses, [_get(out.opt_state, place.path) for place in places]


def _score(
    optimizer: Optimizer,
    places: Sequence[_Place],
    theta: Params,
    records: list[Any],
    weights: Tensor,
) -> Tensor:
    """Return sum_it weights_it log p(a_it), for records and weights [rollouts, horizon]."""

    def log_probs() -> list[Tensor]:
        return [vmap(p.policy.log_probs)(row) for p, row in zip(places, records, strict=True)]

    rows = lend(optimizer, theta, log_probs)
    return torch.stack([(weights * row[:, : weights.shape[1]]).sum() for row in rows]).sum()


def _find_policies(optimizer: Optimizer) -> list[_Place]:
    """Return the policies among the hyperparameters."""
    places = []
    for name, value in find_schedules(optimizer).items():
        parts = value.schedules if isinstance(value, ByName) else {None: value}
        for pattern, schedule in parts.items():
            if isinstance(schedule, Policy):
                path = ("schedules", name) if pattern is None else ("schedules", name, pattern)
                places.append(_Place(schedule, path))
    if not places:
        raise ValueError(
            f"`Reinforce` trains policies, got {type(optimizer).__name__} without one among its "
            "own hyperparameters (those of an optimizer behind a transform are not seen). Write "
            "`SGD(lr=PolicySchedule(0.1, steps=100))`."
        )
    return places


def _check(
    optimizer: Optimizer, theta: Params, places: Sequence[_Place], state: Any, horizon: int
) -> None:
    """Raise ValueError if a record is too short, or a parameter is not a policy's."""
    records = [_get(state, place.path) for place in places]
    steps = min(len(record["noise"]) for record in records)
    if horizon > steps:
        raise ValueError(
            f"`Reinforce` needs the record of a whole episode, got {horizon} steps and a policy "
            f"with steps={steps}. Write `PolicySchedule(0.1, steps={horizon})`."
        )
    with torch.enable_grad():
        tracked = {name: value.detach().requires_grad_() for name, value in theta.items()}
        batched = [tree.map(lambda leaf: leaf[None], record) for record in records]
        weights = torch.ones(1, horizon, device=records[0]["noise"].device)
        total = _score(optimizer, places, tracked, batched, weights)
        found = torch.autograd.grad(total, list(tracked.values()), allow_unused=True)
    others = [name for name, one in zip(tracked, found, strict=True) if one is None]
    if others:
        raise ValueError(
            f"`Reinforce` has a derivative only for what the probabilities of a policy's actions "
            f"depend on, got the parameters {others} of {type(optimizer).__name__}. Call "
            "`requires_grad_(False)` on them, or train them with another estimator."
        )


def _get(state: Any, path: Sequence[str]) -> Any:
    for key in path:
        state = state[key]
    return state


def _put(state: Tree, path: Sequence[str], value: Any) -> Any:
    """Return a state with another value at a path."""
    if not path:
        return value
    inner = cast(dict[str, Any], state)
    return {**inner, path[0]: _put(inner[path[0]], path[1:], value)}

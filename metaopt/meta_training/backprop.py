"""Estimators of the meta-gradient by backpropagation: whole episodes, or windows of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from metaopt import tree
from metaopt._functional import Params, lend
from metaopt._minimize import minimize
from metaopt.autodiff.gradient import gradient
from metaopt.batching import prefers_loop
from metaopt.checks import check_count
from metaopt.differentiate import FirstOrder, Rule
from metaopt.meta_training.estimate import Gradients
from metaopt.meta_training.task import Task, TaskFamily, sample_tasks
from metaopt.optimizer import Optimizer
from metaopt.tree import Tree

End = tuple[Tree, Any]  # parameters and state of the optimizer where an episode ends


class _Way:
    """How several tasks are differentiated: batched, or one after the other.

    The first look at a family of tasks decides.
    """

    def __init__(self) -> None:
        self._family: TaskFamily | None = None
        self._loops = False

    def gradients(
        self,
        optimizer: Optimizer,
        theta: Params,
        family: TaskFamily,
        tasks: Task,
        opt_states: Any,
        rule: Rule,
    ) -> tuple[Params, Tensor, End]:
        """Return (gradients, mean losses, end), with the leading axis of the tasks."""
        given = (tuple(tasks), opt_states)
        one = partial(_run_episode, optimizer, family, rule)
        batched = vmap(grad_and_value(one, has_aux=True), in_dims=(None, 0), randomness="different")
        count = len(tree.leaves(tasks.params)[0])
        # Asked once for each family: the answer costs an evaluation.
        if count > 1 and self._family is not family:
            two = tree.index(given, slice(2))
            first = tree.index(two[0][0], 0)
            self._loops = prefers_loop(lambda _, two: batched(theta, two), first, two)
            self._family = family
        if count > 1 and not self._loops:
            grads, (losses, ends) = batched(theta, given)
            return grads, losses, ends
        with torch.no_grad():  # a meta-gradient is not differentiated again
            found = [
                gradient(partial(one, given=tree.index(given, i)), theta) for i in range(count)
            ]
        grads, losses, ends = tree.stack(found)
        return grads, losses, ends


def _run_episode(
    optimizer: Optimizer, family: TaskFamily, rule: Rule, theta: Params, given: Tree
) -> tuple[Tensor, End]:
    """Return (mean loss, end) of the optimizer with parameters theta on one task.

    Args:
        optimizer: what is trained.
        family: where the task is from.
        rule: how gradients pass through the steps.
        theta: the optimizer's parameters.
        given: ((parameters, batches) of the task, state of the optimizer).
    """
    (params, batches), opt_state = given
    out = lend(
        optimizer,
        theta,
        minimize,
        family.loss,
        optimizer,
        params,
        batches,
        opt_state=opt_state,
        differentiate=rule,
    )
    # Detached: what goes on into the next window is a constant there.
    return out.losses.mean(), tree.map(torch.Tensor.detach, (out.params, out.opt_state))


@dataclass(frozen=True)
class FullUnroll:
    """g = d/dtheta 1/T sum_t L_t, backpropagated through whole episodes.

    Args:
        tasks: number of episodes, batched by `vmap` where that is faster than one after the other,
            see `prefers_loop`.
        differentiate: how gradients pass through the inner loop.

    Cost:
        `tasks` times T inner steps, and what `differentiate` costs on top.
    """

    tasks: int = 8
    differentiate: Rule = field(default=FirstOrder())
    _way: _Way = field(default_factory=_Way, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self, "tasks", self.tasks)

    def init(self) -> None:
        """Return nothing: there is nothing to remember."""
        return None

    def __call__(
        self,
        optimizer: Optimizer,
        theta: Params,
        family: TaskFamily,
        horizon: int,
        state: None,
        generator: torch.Generator,
    ) -> Gradients:
        return _estimate(self, horizon, optimizer, theta, family, horizon, None, generator)


@dataclass(frozen=True)
class TruncatedBackprop:
    """g = d/dtheta 1/window sum of L_t over a window, the inner state at its start held constant.

    Episodes go on from window to window and start afresh at the horizon; the last window of an
    episode is shorter if the horizon is not a multiple of the window. Biased towards short-sighted
    updates, so select by validation (Wu, Ren, Liao, Grosse 2018, arXiv:1803.02021).

    Args:
        window: steps per estimate.
        tasks: number of episodes, batched by `vmap` where that is faster than one after the other,
            see `prefers_loop`.
        differentiate: how gradients pass through a window.

    Cost:
        `tasks` times `window` inner steps, and what `differentiate` costs on top.
    """

    window: int
    tasks: int = 8
    differentiate: Rule = field(default=FirstOrder())
    _way: _Way = field(default_factory=_Way, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self, "window", self.window)
        check_count(self, "tasks", self.tasks)

    def init(self) -> None:
        """Return the state before the first episode.

        Later it is a dict of tasks, optimizer states and the step.
        """
        return None

    def __call__(
        self,
        optimizer: Optimizer,
        theta: Params,
        family: TaskFamily,
        horizon: int,
        state: Any,
        generator: torch.Generator,
    ) -> Gradients:
        return _estimate(self, self.window, optimizer, theta, family, horizon, state, generator)


def _estimate(
    estimator: FullUnroll | TruncatedBackprop,
    window: int,
    optimizer: Optimizer,
    theta: Params,
    family: TaskFamily,
    horizon: int,
    state: Any,
    generator: torch.Generator,
) -> Gradients:
    """Estimate over the next `window` steps of the episodes in the state, or of new ones."""
    if state is None:
        drawn = sample_tasks(family, generator, estimator.tasks, horizon)
        opt_states = vmap(optimizer.init)(drawn.params)
        state = {"task": tuple(drawn), "optimizer": opt_states, "step": 0}
    tasks, opt_states, start = Task(*state["task"]), state["optimizer"], state["step"]
    stop = min(start + window, horizon)
    seen = Task(tasks.params, tree.map(lambda leaf: leaf[:, start:stop], tasks.batches))
    grads, losses, (params, opt_states) = estimator._way.gradients(
        optimizer, theta, family, seen, opt_states, estimator.differentiate
    )
    # At the horizon the next window begins new episodes.
    after = None
    if stop < horizon:
        after = {"task": (params, tasks.batches), "optimizer": opt_states, "step": stop}
    return Gradients(grads, losses, after)

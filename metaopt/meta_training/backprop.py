"""Estimators of the meta-gradient by backpropagation: whole episodes, or windows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from metaopt import tree
from metaopt._functional import Params, lend
from metaopt.autodiff.gradient import gradient
from metaopt.batching import prefers_loop
from metaopt.checks import NonFiniteError, check_count, check_flag
from metaopt.differentiate import FirstOrder, Rule
from metaopt.distributed import current_ranks, work_alone
from metaopt.meta_training.estimate import Estimate, Gradients
from metaopt.meta_training.objective import (
    MeanLoss,
    Objective,
    Window,
    check_objective,
    run_evaluated,
)
from metaopt.meta_training.shared import Shared
from metaopt.meta_training.task import TaskFamily, draw_own_tasks
from metaopt.optimizer import Optimizer, begin
from metaopt.tree import Tree

# where a window ends: parameters, state of the optimizer, the first loss of the episode; and the
# mean loss
End = tuple[tuple[Tree, Any, Tensor], Tensor]


MOST_KINDS = 256  # of tasks, that are remembered


class _Way:
    """How several tasks are differentiated: batched, or one after the other.

    The first look at a kind of task decides: a class of families, and shapes.
    """

    def __init__(self) -> None:
        self._loops: dict[Any, bool] = {}

    def gradients(
        self,
        theta: Params,
        family: TaskFamily,
        one: Callable[..., tuple[Tensor, End]],
        given: Tree,
        *,
        one_by_one: bool,
    ) -> tuple[Params, Tensor, End]:
        """Return (gradients, values, ends), with the leading axis of the tasks.

        Args:
            theta: the optimizer's parameters.
            family: where the tasks are from.
            one: (theta, what it is given) -> (value, end) of one task.
            given: what each of the tasks is given, leaves [tasks, ...].
            one_by_one: whether there is no choice.
        """
        batched = vmap(grad_and_value(one, has_aux=True), in_dims=(None, 0), randomness="different")
        count = len(tree.leaves(given)[0])
        if count > 1 and not one_by_one and not self._prefers_loop(batched, theta, family, given):
            grads, (values, ends) = batched(theta, given)
            return grads, values, ends
        with torch.no_grad():  # a meta-gradient is not differentiated again
            found = [_differentiate(one, theta, tree.index(given, i)) for i in range(count)]
        grads, values, ends = tree.stack(found)
        return grads, values, ends

    def _prefers_loop(
        self, batched: Callable[..., Tree], theta: Params, family: TaskFamily, given: Tree
    ) -> bool:
        # Asked once for each kind: the answer costs an evaluation.
        kind = (type(family), tuple(leaf.shape for leaf in tree.leaves(given)))
        if kind not in self._loops:
            if len(self._loops) == MOST_KINDS:
                self._loops.clear()
            two = tree.index(given, slice(2))
            first = tree.index(two[0], 0)
            self._loops[kind] = prefers_loop(lambda _, two: batched(theta, two), first, two)
        return self._loops[kind]


def _differentiate(
    one: Callable[..., tuple[Tensor, End]], theta: Params, given: Tree
) -> tuple[Params, Tensor, End]:
    """Return (gradient, value, end) of one task; all nan if it is not finite, as in a batch."""
    try:
        return gradient(partial(one, given=given), theta)
    except NonFiniteError:
        carry = tree.map(_spoil, given[0])
        return tree.map(_spoil, theta), carry[2], (carry, carry[2])


def _spoil(leaf: Tensor) -> Tensor:
    return torch.full_like(leaf, torch.nan) if leaf.is_floating_point() else leaf


@dataclass(frozen=True)
class FullUnroll:
    """g = dJ/dtheta, backpropagated through whole episodes.

    Args:
        tasks: number of episodes, batched by `vmap` where that is faster than one after the other,
            see `prefers_loop`.
        differentiate: how gradients pass through the inner loop.
        objective: J: `MeanLoss()`, `LastLoss()` or `ValidationLoss()`.
        compile: compile one step and its derivative, as `minimize` does, for each shape. The tasks
            then run one after the other, which for small networks takes back what it gains.

    Cost:
        `tasks` times T inner steps, and what `differentiate` costs on top.
    """

    tasks: int = 8
    differentiate: Rule = field(default=FirstOrder())
    objective: Objective = field(default=MeanLoss(), kw_only=True)
    compile: bool = field(default=False, kw_only=True)
    _way: _Way = field(default_factory=_Way, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self, "tasks", self.tasks)
        check_objective(self, self.objective)
        check_flag(self, "compile", self.compile)

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
        return _estimate(self, horizon, optimizer, theta, family, horizon, None, generator)


@dataclass(frozen=True)
class TruncatedBackprop:
    """g = d/dtheta of a window's part of J, the inner state at its start held constant.

    J is the mean of such parts over the windows. Episodes go on from window to window and start
    afresh at the horizon; the last window of an episode is shorter if the horizon is not a multiple
    of the window. Biased towards short-sighted updates, so select by validation (Wu, Ren, Liao,
    Grosse 2018, arXiv:1803.02021).

    Args:
        window: steps per estimate.
        tasks: number of episodes, batched by `vmap` where that is faster than one after the other,
            see `prefers_loop`.
        differentiate: how gradients pass through a window.
        objective: as in `FullUnroll`.
        compile: as in `FullUnroll`.

    Cost:
        `tasks` times `window` inner steps, and what `differentiate` costs on top.
    """

    window: int
    tasks: int = 8
    differentiate: Rule = field(default=FirstOrder())
    objective: Objective = field(default=MeanLoss(), kw_only=True)
    compile: bool = field(default=False, kw_only=True)
    _way: _Way = field(default_factory=_Way, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self, "window", self.window)
        check_count(self, "tasks", self.tasks)
        check_objective(self, self.objective)
        check_flag(self, "compile", self.compile)

    def init(self) -> None:
        """Return the state before the first episode.

        Later it is a dict: "carry", (parameters, state of the optimizer, first loss), leaves
        [tasks, ...]; "batches", "held_out" and the "step".
        """
        return None

    def windows(self, horizon: int) -> int:
        """Return the number of windows of an episode."""
        return -(-horizon // self.window)

    def __call__(
        self,
        optimizer: Optimizer,
        theta: Params,
        family: TaskFamily,
        horizon: int,
        state: Any,
        generator: torch.Generator,
    ) -> Estimate:
        return _estimate(self, self.window, optimizer, theta, family, horizon, state, generator)


def _estimate(
    estimator: FullUnroll | TruncatedBackprop,
    length: int,
    optimizer: Optimizer,
    theta: Params,
    family: TaskFamily,
    horizon: int,
    state: Any,
    generator: torch.Generator,
) -> Estimate:
    """Estimate over the next `length` steps of the episodes in the state, or of new ones."""
    ranks = current_ranks()
    if state is None:
        task = draw_own_tasks(family, generator, estimator.tasks, horizon, ranks)
        some = tree.leaves(task.params)[0]
        first = some.new_full((len(some),), torch.nan)
        carry = (task.params, vmap(optimizer.init)(task.params), first)
        state = {"carry": carry, "batches": task.batches, "held_out": task.held_out, "step": 0}
    start, batches, held_out = state["step"], state["batches"], state["held_out"]
    stop = min(start + length, horizon)
    rows = tree.map(lambda leaf: leaf[:, start:stop], batches)
    last = tree.map(lambda leaf: leaf[:, -1], batches)
    place = (start, horizon, estimator.windows(horizon))
    one = partial(_run_window, estimator, optimizer, family, place)
    given = (state["carry"], rows, last, held_out)
    with work_alone():
        grads, values, (carry, losses) = estimator._way.gradients(
            theta, family, one, given, one_by_one=estimator.compile
        )
    # At the horizon the next window begins new episodes.
    after = None if stop == horizon else {**state, "carry": carry, "step": stop}
    own = Gradients(grads, values if estimator.objective.is_bounded else losses, after)
    return Shared(own, estimator.tasks, ranks) if ranks.are_many else own


def _run_window(
    estimator: FullUnroll | TruncatedBackprop,
    optimizer: Optimizer,
    family: TaskFamily,
    place: tuple[int, int, int],
    theta: Params,
    given: Tree,
) -> tuple[Tensor, End]:
    """Return (the window's part of J, end) of the optimizer with parameters theta on one task.

    Args:
        estimator: says how gradients pass through the steps, and what J is.
        optimizer: what is trained.
        family: where the task is from.
        place: (index of the first step, number of steps of the episode, number of windows).
        theta: the optimizer's parameters.
        given: (carry, batches of the window, last batch of the episode, held-out batch).
    """
    (params, opt_state, first), rows, last, held_out = given
    start, horizon, windows = place
    if not start:  # the initial parameters, and so the state, may be learned too
        params, opt_state = lend(optimizer, theta, begin, optimizer, params)
    out, before, after = lend(
        optimizer,
        theta,
        run_evaluated,
        family.loss,
        optimizer,
        params,
        rows,
        opt_state,
        differentiate=estimator.differentiate,
        compile=estimator.compile,
    )
    first = first if start else out.losses[0].detach().to(first)
    at = torch.tensor(start, device=first.device)
    window = Window(out.losses, first, at, horizon, before, after, last, held_out)
    value = windows * estimator.objective.part(window, family.loss)
    # Detached: what goes on into the next window is a constant there.
    carry = tree.map(torch.Tensor.detach, (out.params, out.opt_state, first))
    return value, (carry, out.losses.mean().detach())

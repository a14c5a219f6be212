"""Training an optimizer's own parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params
from metaopt.checks import NonFiniteError, check_count
from metaopt.distributed import check_agreement, current_ranks
from metaopt.meta_training.estimate import Estimate, Estimator
from metaopt.meta_training.groups import Families, Groups, Horizon
from metaopt.meta_training.task import TaskFamily
from metaopt.optimizer import Optimizer, apply_updates, with_steps
from metaopt.tree import Tree

MOST_LOST = 20  # steps in a row without a finite task, after which there is no hope


class MetaTraining:
    """Steps theta_{k+1} = theta_k + outer update of the estimated meta-gradient.

    theta are the optimizer's `nn.Parameter`s. A task whose loss or gradient is not finite is left
    out of the mean, and counted. The gradient of each other task is clipped to the norm `clip`
    before the mean, so that one wild episode does not decide a step.

    Inside of `join_ranks` the ranks share the tasks or pairs of every estimate, and make the same
    step. `state_dict` has then the inner problems of this rank: each rank keeps its own.

    Args:
        optimizer: what is trained, in place: a learned optimizer, or a hand-designed one with
            parameters or learned schedules.
        tasks: the tasks it is trained on.
        estimator: `FullUnroll()`, `TruncatedBackprop(window)`, ...; `Groups(...)` of one of them
            for tasks of several families.
        outer: the optimizer of theta. With `EMA` around it, use what `evaluated()` returns.
        horizon: steps per episode; with `Groups`, also (shortest, longest). An optimizer, or
            schedule, made with `steps=None` is told it.
        clip: largest norm of one task's meta-gradient; None for no limit.
        seed: of all randomness in training (on a GPU, apart from what a loss draws from torch's
            generator there).

    Raises:
        ValueError: the optimizer has nothing to train, a number is out of range, a horizon is
            shorter than the window of the estimator, or `tasks` or `horizon` are to be drawn
            without `Groups`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: TaskFamily | Families,
        *,
        estimator: Estimator | Groups,
        outer: Optimizer,
        horizon: Horizon,
        clip: float | None = 1.0,
        seed: int = 0,
    ):
        _check_plan(estimator, tasks, horizon)
        if not isinstance(outer, Optimizer):
            raise TypeError(
                f"`outer` must be a metaopt Optimizer, got {type(outer).__name__}. For example "
                "`outer=Adam(3e-3)`."
            )
        if clip is not None and clip <= 0:
            raise ValueError(f"`clip` must be positive or None, got {clip}.")
        self.optimizer, self.tasks, self.estimator, self.outer = optimizer, tasks, estimator, outer
        self.horizon, self.clip = horizon, clip
        self.generator = torch.Generator().manual_seed(seed)
        if not self._theta():
            raise ValueError(
                f"{type(optimizer).__name__} has nothing to train. Make a hyperparameter an "
                "nn.Parameter, for example `SGD(lr=nn.Parameter(torch.tensor(0.1)))`, or use a "
                "learned optimizer."
            )
        self.outer_state = outer.init(self._theta())
        self.estimator_state = estimator.init()
        self._lost = 0  # steps in a row in which no task was good
        self._has_agreed = False  # whether all ranks were seen to be alike

    def step(self) -> dict[str, float | Tensor]:
        """Make one outer step.

        Returns:
            The mean loss of its tasks, the norm of the meta-gradient, and the number of tasks left
            out.

        Raises:
            NonFiniteError: no task was good in this and many steps before.
        """
        theta = self._theta()
        self._check_ranks(theta)
        estimate = self._estimate(theta)
        norms = estimate.norms
        good = norms.isfinite() & estimate.losses.isfinite()
        weights = good / good.sum().clamp(min=1)
        # Each task is clipped by itself: one wild episode then does not decide a step.
        if self.clip is not None:
            weights = weights * (self.clip / norms.clamp(min=self.clip))
        grads = estimate.weighted_sum(weights.masked_fill(~good, 0))
        loss = estimate.losses[good].mean()
        if good.any():
            self._update(grads, theta, loss)
        self._lost = 0 if good.any() else self._lost + 1
        if self._lost == MOST_LOST:
            raise NonFiniteError(
                "MetaTraining",
                int(self.outer_state["step"]),
                float(estimate.losses.mean()),
                unit="outer step",
                what=f"loss of every task, in each of {MOST_LOST} outer steps",
            )
        self.estimator_state = estimate.state
        return {
            "loss": loss,
            "gradient norm": tree.norm(grads),
            "tasks left out": (~good).sum(),
        }

    def evaluated(self) -> Optimizer:
        """Return a copy of the optimizer as it is to be used now.

        Its parameters are those that `outer` says are the ones to evaluate at: an average of the
        last ones for `EMA(0.95, Adam(1e-2))`, which is often better than the last.
        """
        # deepcopy refuses computed tensors
        constants = {id(one): one.detach().clone() for one in self.optimizer.buffers()}
        found = copy.deepcopy(self.optimizer, constants)
        with torch.no_grad():
            for name, leaf in self.outer.evaluated(self.outer_state, self._theta()).items():
                found.get_parameter(name).copy_(leaf)
        return found

    def _check_ranks(self, theta: Params) -> None:
        """Raise at the first step if ranks have different parameters or random states."""
        if not self._has_agreed:
            given = {"parameters of the optimizer": theta, "seed": self.generator.get_state()}
            fix = "Make the optimizer, and the training, with the same seeds on every rank."
            check_agreement("MetaTraining", given, current_ranks(), fix)
            self._has_agreed = True

    def _estimate(self, theta: Params) -> Estimate:
        """Return the estimator's next estimate, which draws at random from our generator only."""
        # The estimator draws tasks from our generator, so the losses' draws need one of their own.
        seed = int(torch.randint(2**62, (), generator=self.generator))
        # What a loss draws from torch's own generator, dropout for example.
        with torch.random.fork_rng(devices=[]):
            seed += current_ranks().rank  # each rank draws for other tasks
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            optimizer, steps = self.optimizer, self.horizon
            return self.estimator(
                with_steps(optimizer, steps) if isinstance(steps, int) else optimizer,
                theta,
                self.tasks,  # type: ignore[arg-type]  # likewise
                steps,  # type: ignore[arg-type]  # checked: a pair is for `Groups`
                self.estimator_state,
                self.generator,
            )

    def _update(self, grads: Params, theta: Params, loss: Tensor) -> None:
        """Let the outer optimizer write new values into the optimizer's parameters."""
        with torch.no_grad():
            updates, self.outer_state = self.outer(grads, self.outer_state, theta, loss=loss)
            for name, value in apply_updates(theta, updates).items():
                self.optimizer.get_parameter(name).copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "theta": {name: value.clone() for name, value in self.optimizer.state_dict().items()},
            "outer": self.outer_state,
            "estimator": self.estimator_state,
            "generator": self.generator.get_state(),
            "lost": self._lost,
            "made with": _describe(self.estimator),
            "ranks": current_ranks().size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state_dict` returned.

        Raises:
            ValueError: it is that of another training; then nothing is changed.
        """
        self._check_state(state)
        self.optimizer.load_state_dict(state["theta"])
        self.outer_state, self.estimator_state = state["outer"], state["estimator"]
        self.generator.set_state(state["generator"])
        self._lost = state["lost"]

    def _check_state(self, state: Any) -> None:
        """Raise ValueError unless a state has the parts of our own, with tensors of their shapes.

        Of the estimator's part, which may be empty, it is the kind of estimator that must agree.
        """
        own = self.state_dict()
        if not isinstance(state, dict) or state.keys() != own.keys():
            raise ValueError(
                f"MetaTraining: a state must have the parts {sorted(own)}, got "
                f"{sorted(state) if isinstance(state, dict) else type(state).__name__}."
            )
        for part in ("theta", "outer", "generator", "lost", "made with"):
            one, other = _find_kinds(state[part]), _find_kinds(own[part])
            for path in [*other, *one]:
                if one.get(path) != other.get(path):
                    raise ValueError(
                        f"MetaTraining: the state is that of another training. At {part}{path} it "
                        f"has {one.get(path, 'nothing')}, where this one has "
                        f"{other.get(path, 'nothing')}. Build it as it was when it was saved."
                    )
        problems = tree.leaves(state["estimator"])
        if state["ranks"] != own["ranks"] and any(isinstance(one, Tensor) for one in problems):
            raise ValueError(
                f"MetaTraining: the state has the inner problems of one of {state['ranks']} ranks, "
                f"and there are {own['ranks']}: go on with {state['ranks']} processes."
            )

    def _theta(self) -> Params:
        return {
            name: value.detach()
            for name, value in self.optimizer.named_parameters()
            if value.requires_grad
        }


def _describe(estimator: Any) -> str:
    """Return the kind of an estimator: states of others do not fit it."""
    inner = f"({_describe(estimator.estimator)})" if isinstance(estimator, Groups) else ""
    return f"{type(estimator).__name__}{inner}"


def _find_kinds(values: Tree) -> dict[str, str]:
    """Return path -> what stands there: dtype and shape of a tensor, a text itself."""
    return {
        path: f"{leaf.dtype} {tuple(leaf.shape)}"
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, str)
        else type(leaf).__name__
        for path, leaf in tree.named_leaves(values)
    }


def _check_plan(estimator: Any, tasks: Any, horizon: Any) -> None:
    """Raise ValueError if estimator, tasks and horizon do not go together."""
    drawn = [
        name
        for name, is_drawn in (
            ("tasks", not hasattr(tasks, "sample")),
            ("horizon", isinstance(horizon, tuple)),
        )
        if is_drawn
    ]
    if drawn and not isinstance(estimator, Groups):
        raise ValueError(
            f"`{drawn[0]}` is drawn anew for each group of tasks, got {type(estimator).__name__} "
            f"without groups. Write `estimator=Groups({type(estimator).__name__}(...))`."
        )
    if isinstance(horizon, tuple) and len(horizon) != 2:
        raise ValueError(f"`horizon` must be a number or (shortest, longest), got {horizon}.")
    low, high = horizon if isinstance(horizon, tuple) else (horizon, horizon)
    for steps in (low, high):
        check_count(None, "horizon", steps)
    if low > high:
        raise ValueError(f"`horizon` must be (shortest, longest), got {horizon}.")
    own = estimator.estimator if isinstance(estimator, Groups) else estimator
    window = getattr(own, "window", None)
    if window is not None and window > low:
        raise ValueError(
            f"The horizon {low} is shorter than the window of {window} steps. Take window={low}, "
            "or an estimator of whole episodes, `FullUnroll` or `ES`."
        )

"""Training an optimizer's own parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params
from metaopt.checks import check_count
from metaopt.meta_training.estimate import Estimate, Estimator
from metaopt.meta_training.task import TaskFamily
from metaopt.optimizer import Optimizer, apply_updates


class MetaTraining:
    """Steps theta_{k+1} = theta_k + outer update of the estimated meta-gradient.

    theta are the optimizer's `nn.Parameter`s. A task whose loss or gradient is not finite is left
    out of the mean, and counted. The gradient of each other task is clipped to the norm `clip`
    before the mean, so that one wild episode does not decide a step.

    Args:
        optimizer: what is trained, in place: a learned optimizer, or a hand-designed one with
            parameters or learned schedules.
        tasks: the tasks it is trained on.
        estimator: `FullUnroll()`, `TruncatedBackprop(window)`, ...
        outer: the optimizer of theta.
        horizon: steps per episode.
        clip: largest norm of one task's meta-gradient; None for no limit.
        seed: of all randomness in training (on a GPU, apart from what a loss draws from torch's
            generator there).

    Raises:
        ValueError: the optimizer has nothing to train, or a number is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: TaskFamily,
        *,
        estimator: Estimator,
        outer: Optimizer,
        horizon: int,
        clip: float | None = 1.0,
        seed: int = 0,
    ):
        check_count(self, "horizon", horizon)
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

    def step(self) -> dict[str, float | Tensor]:
        """Make one outer step.

        Returns:
            The mean loss of its tasks, the norm of the meta-gradient, and the number of tasks left
            out.
        """
        theta = self._theta()
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
        self.estimator_state = estimate.state
        return {
            "loss": loss,
            "gradient norm": tree.norm(grads),
            "tasks left out": (~good).sum(),
        }

    def _estimate(self, theta: Params) -> Estimate:
        """Return the estimator's next estimate, which draws at random from our generator only."""
        # The estimator draws tasks from our generator, so the losses' draws need one of their own.
        seed = int(torch.randint(2**62, (), generator=self.generator))
        # What a loss draws from torch's own generator, dropout for example.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            return self.estimator(
                self.optimizer,
                theta,
                self.tasks,
                self.horizon,
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state_dict` returned."""
        self.optimizer.load_state_dict(state["theta"])
        self.outer_state, self.estimator_state = state["outer"], state["estimator"]
        self.generator.set_state(state["generator"])

    def _theta(self) -> Params:
        return {
            name: value.detach()
            for name, value in self.optimizer.named_parameters()
            if value.requires_grad
        }

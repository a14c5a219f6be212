"""What an estimator of the meta-gradient is, and what it returns."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metaopt._functional import Params
from metaopt.meta_training.task import TaskFamily
from metaopt.optimizer import Optimizer


class Estimate(Protocol):
    """Several estimates g_i of the meta-gradient, whose mean is the estimate.

    Whoever averages them may first leave some out, or make them shorter.
    """

    @property
    def losses(self) -> Tensor:
        """The mean loss that each of them saw, [n]."""
        ...

    @property
    def norms(self) -> Tensor:
        """|g_i|, [n]."""
        ...

    @property
    def state(self) -> Any:
        """The estimator's next state: tensors and numbers."""
        ...

    def weighted_sum(self, weights: Tensor) -> Params:
        """Return sum_i weights_i g_i for weights [n]; where a weight is 0, g_i is not looked at."""
        ...


class Estimator(Protocol):
    """Estimates the derivative of the loss of an episode in an optimizer's parameters.

    Whatever it remembers (inner problems under way) is its explicit state.
    """

    def init(self) -> Any:
        """Return the state before the first estimate."""
        ...

    def windows(self, horizon: int) -> int:
        """Return the number of estimates that look at an episode of this length."""
        ...

    def __call__(
        self,
        optimizer: Optimizer,
        theta: Params,
        family: TaskFamily,
        horizon: int,
        state: Any,
        generator: torch.Generator,
    ) -> Estimate:
        """Estimate at theta, for episodes of `horizon` steps."""
        ...


class Gradients(NamedTuple):
    """An estimate that has all g_i at once.

    Attributes:
        grads: a gradient per task, leaves [tasks, ...].
        losses: the mean loss of each task, [tasks].
        state: the estimator's next state.
    """

    grads: Params
    losses: Tensor
    state: Any

    @property
    def norms(self) -> Tensor:
        """The norm of each task's gradient, [tasks]."""
        squares = [grad.reshape(len(grad), -1).square().sum(1) for grad in self.grads.values()]
        return torch.stack(squares).sum(0).sqrt()

    def weighted_sum(self, weights: Tensor) -> Params:
        """Return the weighted sum of the gradients."""
        # A weight of 0 is not enough, since 0 times nan is nan: the gradient is masked too.
        found = {}
        for name, grad in self.grads.items():
            seen = (weights != 0).view(-1, *[1] * (grad.ndim - 1))
            found[name] = torch.einsum(
                "t,t...->...", weights.to(grad.dtype), torch.where(seen, grad, 0)
            )
        return found

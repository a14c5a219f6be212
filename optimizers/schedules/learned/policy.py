"""A learned schedule that acts at random while it is trained: a policy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metaopt.checks import check_count, check_number, check_positive
from metaopt.optimizer import Schedule

from .mlp import Net
from .observing import OBSERVED, ObservingSchedule


class PolicySchedule(ObservingSchedule):
    """proposal_t = a_t ~ N(MLP(observations_t), std^2): a stochastic policy, for `mo.Reinforce`.

    The noise is in the state, a row of `steps` numbers from N(0, 1) that the estimator draws;
    `init` has zeros, so by default, and beyond `steps`, it acts by its mean. The state also records
    what was observed and done, from which `log_probs` computes the probabilities again: REINFORCE
    needs no derivative of the steps. The value is differentiable all the same, with the noise as a
    constant, so `FullUnroll` trains it too, as an `MLPSchedule`.

    The value moves by the proposals, and what is observed: see `ObservingSchedule`. The last layer
    starts at zero, so the mean of an untrained one is `initial`. The scale of `initial` is not
    learned, since no action depends on it. The optimizer must be given `loss=`.

    Args:
        initial: the value at the start, or a schedule to start from.
        steps: the number of steps that makes the step fraction 1, and that are recorded.
        std: of the actions.
        hidden_size: width of the hidden layers.
        max_change: bound on the change in one step, as for `LSTMSchedule`.
        change: "multiplicative" or "additive", see `LearnedSchedule`.
        seed: of the initial weights.

    Raises:
        ValueError: an argument that is not positive, or another word.

    Cost:
        That of `MLPSchedule`, and a write to 5 rows of `steps` numbers.

    Reference:
        Xu, Dai, Kemp, Metz 2019, arXiv:1909.09712, section 3.
    """

    def __init__(
        self,
        initial: float | Schedule = 0.1,
        steps: int = 100,
        *,
        std: float = 1.0,
        hidden_size: int = 16,
        max_change: float = 0.05,
        change: str = "multiplicative",
        seed: int = 0,
    ):
        super().__init__(initial, steps, max_change, change)
        self.std = check_positive(self, "std", check_number(self, "std", std))
        self.hidden_size = check_count(self, "hidden_size", hidden_size)
        self.seed = check_count(self, "seed", seed, least=0)
        self.net = Net(OBSERVED, hidden_size, torch.Generator().manual_seed(seed))
        self.log_initial.requires_grad_(False)

    def memory(self, like: Tensor) -> dict[str, Tensor]:
        row = self.log_initial.new_zeros(self.steps, device=like.device)
        return {
            "noise": row,
            "actions": row.clone(),
            "seen": row.new_zeros(self.steps, OBSERVED),
        }

    def propose(
        self, observed: Tensor, memory: dict[str, Tensor], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        is_now = torch.arange(self.steps, device=step.device) == step
        # indexing by a tensor would read its value
        noise = torch.where(is_now, memory["noise"], 0).sum()
        action = self.net(observed) + self.std * noise
        return action, {
            "noise": memory["noise"].clone(),  # a result shares no memory with what is given
            "actions": torch.where(is_now, action, memory["actions"]),
            "seen": torch.where(is_now[:, None], observed, memory["seen"]),
        }

    def log_probs(self, state: Any) -> Tensor:
        """Return log p(a_t | observations_t) of each step in a state's record, [steps].

        The record is a constant; a step that was not taken counts as an action 0 on zeros.
        """
        means = self.net(state["seen"].detach())
        distances = (state["actions"].detach() - means) / self.std
        found: Tensor = -distances.square() / 2 - math.log(self.std * math.sqrt(2 * math.pi))
        return found

"""Adam with Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.checks import check_flag
from metaopt.optimizer import Hyper, Leaves, Slots
from metaopt.optimizer.hyperparameter import Hyperparameter, set_hyperparameter

from .adam import Adam, bias_correction, moments
from .betas import Pair
from .moving import roots
from .precision import scalar_dtype
from .weight_decay import decayed, penalized


class NAdam(Adam):
    """u = -lr (c g + d m) / (sqrt(v^ + eps_root) + eps),  c = (1 - mu_t) / (1 - M_t),  d = mu_{t+1}
    / (1 - M_t mu_{t+1}).

    m, v and v^ as in `Adam`; mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2) and M_t = mu_1 ...
    mu_t. Equal to `torch.optim.NAdam`.

    Args:
        lr: step size.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        eps_root: added under the root; a positive value smooths the meta-gradient.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient, or, if decoupled, u = ... -
            lr weight_decay w.
        momentum_decay: how fast the momentum grows to beta1.
        decoupled_weight_decay: decay the weights as `AdamW` does.

    Raises:
        ValueError: a number out of range.

    Cost:
        Two copies of the parameters.

    Reference:
        Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop 2016, algorithm 8.
    """

    hyperparameters = (*Adam.hyperparameters, "momentum_decay")
    joinable = True

    def __init__(
        self,
        lr: Hyperparameter = 2e-3,
        betas: Pair = (0.9, 0.999),
        *,
        eps: Hyperparameter = 1e-8,
        eps_root: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        momentum_decay: Hyperparameter = 4e-3,
        decoupled_weight_decay: bool = False,
    ):
        super().__init__(lr, betas, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
        set_hyperparameter(self, "momentum_decay", momentum_decay)
        self.decoupled_weight_decay = check_flag(
            self, "decoupled_weight_decay", decoupled_weight_decay
        )

    def slots(self, params: Leaves) -> Slots:
        product = torch.ones((), dtype=scalar_dtype(params[0]), device=params[0].device)
        return {**super().slots(params), "product": product}

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, beta1, beta2, eps, eps_root, decay, momentum_decay = (
            hyper[name] for name in self.hyperparameters
        )
        if not self.decoupled_weight_decay:
            grads = penalized(self, grads, params, decay)
        after = moments(grads, slots, hyper)
        t = step.to(slots["product"].dtype)
        momentum = beta1 * (1 - 0.96 ** (t * momentum_decay) / 2)
        following = beta1 * (1 - 0.96 ** ((t + 1) * momentum_decay) / 2)
        product = slots["product"] * momentum
        of_grad = -lr * (1 - momentum) / (1 - product)
        of_mean = -lr * following / (1 - product * following)
        unbias = 1 / bias_correction(beta2, step, grads[0])
        spread = roots([v * unbias for v in after["square"]], eps_root, eps)
        updates = [
            (of_grad * g + of_mean * m) / root
            for g, m, root in zip(grads, after["mean"], spread, strict=True)
        ]
        if self.decoupled_weight_decay:
            updates = decayed(self, updates, params, lr, decay)
        return updates, {**after, "product": product}

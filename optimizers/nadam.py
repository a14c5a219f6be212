"""Adam with Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.checks import check_flag
from metaopt.optimizer import Hyper, Hyperparameter, Leaves, Slots, Value, set_hyperparameter

from .adam import Adam, MaybeDecoupled, moments
from .betas import Pair
from .moving import roots
from .scalars import bias_correction, scalar_dtype


class NAdam(MaybeDecoupled):
    """u = -lr (c g + d m) / (sqrt(v^ + eps_root) + eps).

    c = (1 - mu_t) / (1 - M_t) and d = mu_{t+1} / (1 - M_t mu_{t+1}); m, v and v^ as in `Adam`; mu_t
    = beta1 (1 - 0.96^(t momentum_decay) / 2) and M_t = mu_1 ... mu_t. Equal to `torch.optim.NAdam`.

    Args:
        lr: step size.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        eps_root: added under the root; a positive value smooths the meta-gradient.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient, or, if decoupled,
            u = ... - lr weight_decay w.
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

    def _adam(
        self, grads: Leaves, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Value, Leaves, Slots]:
        lr, beta1, beta2, eps, eps_root, _, momentum_decay = (
            hyper[name] for name in self.hyperparameters
        )
        after = moments(grads, slots, hyper)
        t = step.to(slots["product"].dtype)
        momentum = beta1 * (1 - 0.96 ** (t * momentum_decay) / 2)
        following = beta1 * (1 - 0.96 ** ((t + 1) * momentum_decay) / 2)
        product = slots["product"] * momentum
        of_grad = (1 - momentum) / (1 - product)
        of_mean = following / (1 - product * following)
        unbias = 1 / bias_correction(beta2, step, grads[0])
        spread = roots([v * unbias for v in after["square"]], eps_root, eps)
        triples = zip(grads, after["mean"], spread, strict=True)
        directions = [(of_grad * g + of_mean * m) / root for g, m, root in triples]
        return -lr, directions, {**after, "product": product}

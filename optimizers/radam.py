"""Rectified Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.checks import check_flag
from metaopt.optimizer import Hyper, Hyperparameter, Leaves, Slots, Value

from .adam import MaybeDecoupled, moments
from .betas import Pair
from .moving import roots
from .scalars import bias_correction


class RAdam(MaybeDecoupled):
    """u = -lr m^ r sqrt(1 - beta2^t) / (sqrt(v + eps_root) + eps) where rho_t > 5, else u = -lr m^.

    m, m^ and v as in `Adam`; rho = 2 / (1 - beta2) - 1, rho_t = rho - 2 t beta2^t / (1 - beta2^t),
    and the rectification r^2 = (rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t). Equal to
    `torch.optim.RAdam`. The jump at rho_t = 5 is not differentiated; on each side of it the
    derivative is exact.

    Args:
        lr: step size.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        eps_root: added under the root; a positive value smooths the meta-gradient.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient, or, if decoupled,
            u = ... - lr weight_decay w.
        decoupled_weight_decay: decay the weights as `AdamW` does.

    Raises:
        ValueError: a number out of range.

    Cost:
        Two copies of the parameters.

    Reference:
        Liu, Jiang, He, Chen, Liu, Gao, Han, ICLR 2020, arXiv:1908.03265, algorithm 2 (threshold 5
        in place of 4, as in the authors' program and in torch).
    """

    joinable = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: Pair = (0.9, 0.999),
        *,
        eps: Hyperparameter = 1e-8,
        eps_root: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        decoupled_weight_decay: bool = False,
    ):
        super().__init__(lr, betas, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
        self.decoupled_weight_decay = check_flag(
            self, "decoupled_weight_decay", decoupled_weight_decay
        )

    def _adam(
        self, grads: Leaves, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Value, Leaves, Slots]:
        after = moments(grads, slots, hyper)
        rectified, scale = rectification(hyper["beta2"], step)
        spread = roots(after["square"], hyper["eps_root"], hyper["eps"])
        pairs = zip(after["mean"], spread, strict=True)
        directions = [m * torch.where(rectified, scale / root, 1) for m, root in pairs]
        return -hyper["lr"] / bias_correction(hyper["beta1"], step, grads[0]), directions, after


def rectification(beta: Value, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rho_t > 5, r sqrt(1 - beta^t)).

    In float64: rho_t of about 5 is a difference of numbers of about 2000.
    """
    base, t = torch.as_tensor(beta, dtype=torch.float64, device=step.device), step.double()
    power = base**t
    limit = 2 / (1 - base) - 1
    rho = limit - 2 * t * power / (1 - power)
    rectified = rho > 5
    # 6 in place of both gives r = 1, and keeps roots of negative numbers out of the graph.
    limit, rho = torch.where(rectified, limit, 6), torch.where(rectified, rho, 6)
    square = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
    return rectified, (square * (1 - power)).sqrt()

"""A moving average of the parameters."""

from __future__ import annotations

from torch import Tensor

from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    set_hyperparameter,
)

from .beside import Beside, moves


class EMA(Beside):
    """a_t = decay a_{t-1} + (1 - decay) w_t, and a_0 = w_0: an average to evaluate at.

    `optimizer.evaluated(state, params)` is a_t. The inner optimizer moves w as if it were alone.
    The average begins at the initial parameters, so no bias is to be corrected. As
    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`, updated before the
    first step and after each.

    Args:
        decay: of the average, in [0, 1]; 0 is the parameters themselves.
        optimizer: what moves the parameters.

    Raises:
        ValueError: a number out of range, or `params` is missing.

    Cost:
        One copy of the parameters, in float32 at least.

    Reference:
        Polyak and Juditsky, SIAM J. Control and Optimization 30, 1992, with weights that decay;
        Tarvainen and Valpola 2017, arXiv:1703.01780.
    """

    hyperparameters = ("decay",)

    def __init__(self, decay: Hyperparameter, optimizer: Optimizer):
        super().__init__(optimizer)
        set_hyperparameter(self, "decay", decay, high=1.0)

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        # a_t - w_t = decay (a_{t-1} - w_t), and w_t = w_{t-1} + what it moved
        rows = zip(slots["offset"], moves(self, grads, params), strict=True)
        return grads, {"offset": [hyper["decay"] * (offset - moved) for offset, moved in rows]}

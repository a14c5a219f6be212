"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt.checks import check_flag
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Slots,
    Value,
    is_zero,
    set_hyperparameter,
)
from metaopt.optimizer.blocks import is_plain
from metaopt.torch_internals import fused_adam_, fused_adamw_
from metaopt.transforms import is_unrecorded

from .betas import Pair, WithBetas
from .moving import averages, averages_of_squares, roots, zeros
from .scalars import bias_correction, precise
from .weight_decay import decayed, penalized

LEAST_FUSED = 2**16  # entries; fewer are as fast one operation after another


class Adam(WithBetas):
    """u = -lr m^ / (sqrt(v^ + eps_root) + eps).

    m = beta1 m + (1 - beta1) g and v = beta2 v + (1 - beta2) g^2; m^ = m / (1 - beta1^t) and
    v^ = v / (1 - beta2^t); with `amsgrad`, v^ = max(v_1, ..., v_t) / (1 - beta2^t). Equal to
    `torch.optim.Adam`; unlike it, the derivative with respect to the gradient is finite where v = 0
    (there sqrt has derivative 0, and what remains is the exact 1 / eps at the first step).

    Args:
        lr: step size.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        eps_root: added under the root; a positive value smooths the meta-gradient.
        weight_decay: coefficient of 1/2 |w|^2, added to the gradient.
        amsgrad: divide by the largest second moment so far.

    Raises:
        ValueError: a number out of range.

    Cost:
        Two copies of the parameters, three with `amsgrad`.

    Reference:
        Kingma and Ba, ICLR 2015, arXiv:1412.6980, algorithm 1; `amsgrad`: Reddi, Kale, Kumar, ICLR
        2018, arXiv:1904.09237.
    """

    hyperparameters: tuple[str, ...] = ("lr", "beta1", "beta2", "eps", "eps_root", "weight_decay")
    joinable = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: Pair = (0.9, 0.999),
        *,
        eps: Hyperparameter = 1e-8,
        eps_root: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        amsgrad: bool = False,
    ):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        self._set_betas(betas)
        set_hyperparameter(self, "eps", eps)
        set_hyperparameter(self, "eps_root", eps_root)
        set_hyperparameter(self, "weight_decay", weight_decay)
        self.amsgrad = check_flag(self, "amsgrad", amsgrad)

    def slots(self, params: Leaves) -> Slots:
        return zeros(params, "mean", "square", *["largest"] * self.amsgrad)

    def direction(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Value, Leaves, Slots]:
        return self._adam(penalized(self, grads, params, hyper["weight_decay"]), slots, hyper, step)

    def move(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        if params is None or not self._is_fused([grads, params, *slots.values()], hyper):
            return super().move(grads, params, slots, hyper, step)
        moved = [w.clone() for w in params]
        after = {name: [memory.clone() for memory in slot] for name, slot in slots.items()}
        self._move_fused(grads, moved, after, hyper, step)
        return moved, after

    def move_in_place(
        self, grads: Leaves, params: Leaves, slots: Slots, hyper: Hyper, step: Tensor
    ) -> Slots:
        if not self._is_fused([grads, params, *slots.values()], hyper):
            return super().move_in_place(grads, params, slots, hyper, step)
        self._move_fused(grads, params, slots, hyper, step)
        return slots

    def _move_fused(
        self, grads: Leaves, params: Leaves, slots: Slots, hyper: Hyper, step: Tensor
    ) -> None:
        """Move parameters and slots in place, by one operation of torch."""
        memories = slots["mean"], slots["square"], slots.get("largest", [])
        steps = [step.to("cpu", torch.float32)] * len(grads)
        options = {name: hyper[name] for name in ("lr", "beta1", "beta2", "weight_decay", "eps")}
        step_in_place = fused_adamw_ if isinstance(self, AdamW) else fused_adam_
        step_in_place(
            params, grads, *memories, steps, amsgrad=self.amsgrad, maximize=False, **options
        )

    def _is_fused(self, rows: Sequence[Leaves], hyper: Hyper) -> bool:
        """Return True if torch has all of it as one operation, and that is faster.

        It knows no variant of the update, no `eps_root`, and no derivative.
        """
        numbers = {name: value for name, value in hyper.items() if name != "lr"}
        lr = hyper["lr"]
        return (
            type(self) in (Adam, AdamW)
            and not {"update", "direction"} & vars(self).keys()
            and is_zero(hyper["eps_root"])
            and all(isinstance(value, float) for value in numbers.values())
            and (isinstance(lr, float) or (lr.ndim == 0 and lr.device.type == "cpu"))
            and is_unrecorded()
            and sum(map(Tensor.numel, rows[0])) >= LEAST_FUSED
            and all(is_plain(leaf) for row in rows for leaf in row)
            and len({leaf.dtype for row in rows for leaf in row}) == 1
        )

    def diagonal(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> Leaves:
        penalty = penalized(self, grads, params, hyper["weight_decay"])
        return self._adam_diagonal(penalty, slots, hyper, step)

    def _adam_diagonal(self, grads: Leaves, slots: Slots, hyper: Hyper, step: Tensor) -> Leaves:
        """Return du/dg of each entry; see `_adam`.

        u = -lr m^ / d with d = r + eps and r = sqrt(v^ + eps_root). So du/dg = -lr / (1 - beta1^t)
        (1 - beta1 - m r' / d) / d, where r' = (1 - beta2) / (1 - beta2^t) g / r, or 0 at r = 0.
        """
        after, shares = moments(grads, slots, hyper), [1.0] * len(grads)
        spread = after["square"]
        if self.amsgrad:
            pairs = [*zip(slots["largest"], spread, strict=True)]
            spread = [torch.maximum(old, v) for old, v in pairs]
            # of two equal ones autograd gives each a half
            shares = [((v > old) * 0.5 + (v >= old) * 0.5).to(v.dtype) for old, v in pairs]
        # With s^2 = 1 - beta2^t, R = s r and D = s d it is scale s (1 - beta1 - (1 - beta2) m g /
        # (R D)) / D: a pass less over the entries.
        bias = bias_correction(hyper["beta2"], step, grads[0])
        s = bias**0.5
        scale = -hyper["lr"] * s / bias_correction(hyper["beta1"], step, grads[0])
        of_mean, of_square = 1 - hyper["beta1"], 1 - hyper["beta2"]
        found = []
        # in place, for the caches
        for g, m, v, share in zip(grads, after["mean"], spread, shares, strict=True):
            if is_zero(hyper["eps_root"]):
                root = v.sqrt()
            else:
                root = (v + hyper["eps_root"] * bias).sqrt_()
            denominator = root + hyper["eps"] * s
            # 0 / 0 and x / 0 where r = 0; a mask takes longer than the rest
            slope = (m * g).div_(root.mul_(denominator)).nan_to_num_(0.0, 0.0, 0.0)
            slope.mul_(-of_square * share).add_(of_mean).div_(denominator)
            found.append(slope.mul_(scale))
        return found

    def _adam(
        self, grads: Leaves, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Value, Leaves, Slots]:
        """Return (scale, directions, next slots), without any decay of the weights.

        This is what the variants of Adam change.
        """
        after = moments(grads, slots, hyper)
        spread = after["square"]
        if self.amsgrad:
            spread = after["largest"] = [
                torch.maximum(old, v) for old, v in zip(slots["largest"], spread, strict=True)
            ]
        step = precise(step, grads[0])  # once for both
        scale = -hyper["lr"] / bias_correction(hyper["beta1"], step, grads[0])
        bias = bias_correction(hyper["beta2"], step, grads[0])
        # sqrt(v / bias) + eps = (sqrt(v) + eps sqrt(bias)) / sqrt(bias)
        if is_zero(hyper["eps_root"]):
            root = bias.sqrt()
            scale = scale * root
            spread = roots(spread, 0.0, hyper["eps"] * root)
        else:
            spread = roots([v / bias for v in spread], hyper["eps_root"], hyper["eps"])
        return scale, [m / root for m, root in zip(after["mean"], spread, strict=True)], after


class MaybeDecoupled(Adam):
    """A variant of Adam whose weight decay may be decoupled: u = scale d - lr weight_decay w."""

    decoupled_weight_decay = True

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        if not self.decoupled_weight_decay:
            return super().update(grads, params, slots, hyper, step)
        scale, directions, after = self._adam(grads, slots, hyper, step)
        updates = [scale * d for d in directions]
        return decayed(self, updates, params, hyper["lr"], hyper["weight_decay"]), after


class AdamW(MaybeDecoupled):
    """Adam with decoupled decay: u = -lr (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay w).

    Equal to `torch.optim.AdamW`. Arguments, cost and errors as for `Adam`.

    Reference:
        Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101, algorithm 2.
    """

    joinable = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: Pair = (0.9, 0.999),
        *,
        eps: Hyperparameter = 1e-8,
        eps_root: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 1e-2,
        amsgrad: bool = False,
    ):
        super().__init__(
            lr, betas, eps=eps, eps_root=eps_root, weight_decay=weight_decay, amsgrad=amsgrad
        )

    def diagonal(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> Leaves:
        return self._adam_diagonal(grads, slots, hyper, step)  # the decay does not depend on g


def moments(grads: Leaves, slots: Slots, hyper: Hyper) -> Slots:
    """Return the next averages of the gradients, "mean", and of their squares, "square"."""
    return {
        "mean": averages(slots["mean"], grads, hyper["beta1"]),
        "square": averages_of_squares(slots["square"], grads, hyper["beta2"]),
    }

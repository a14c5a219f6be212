"""Muon: momentum, orthogonalized by Newton-Schulz iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from metaopt import tree
from metaopt.checks import check_choice, check_count, check_flag
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    Slots,
    Value,
    set_hyperparameter,
)

from .moving import averages, zeros
from .weight_decay import decayed

FACTORS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}
Coefficients = tuple[Hyperparameter, Hyperparameter, Hyperparameter]


class Muon(Optimizer):
    """m = momentum m + (1 - momentum) g;  u = -lr (s NS(m) + weight_decay w), for matrices.

    NS(X) replaces the singular values of X by numbers near 1: X / max(|X|, eps), then `ns_steps`
    times X = a X + (b G + c G^2) X with G = X X^T. With `nesterov`, m in u is replaced by momentum
    m + (1 - momentum) g. The factor s is sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows,
    columns)) for "match_rms_adamw", or sqrt(rows / columns) for "spectral_unclamped".

    Equal to `torch.optim.Muon` but for its rounding: it iterates in bfloat16, this in the dtype of
    the parameters, so that the derivative (exact, also in a, b, c) can be trusted. Other parameters
    than matrices need another optimizer: `Grouped({"*.weight": Muon(), "*": AdamW()})`.

    Args:
        lr: step size.
        weight_decay: decoupled, as in `AdamW`.
        momentum: decay of the mean, in [0, 1).
        nesterov: look ahead along the mean.
        ns_coefficients: (a, b, c).
        eps: least norm to divide by.
        ns_steps: number of iterations.
        adjust_lr_fn: how s depends on the shape.

    Raises:
        ValueError: a number out of range, or (in `init`) a parameter that is not a matrix.

    Cost:
        One copy of the parameters; 3 `ns_steps` matrix products a step.

    Reference:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; "match_rms_adamw": Liu et al.
        2025, arXiv:2502.16982, eq. 4;
        "spectral_unclamped": Bernstein 2025, https://jeremybernste.in/writing/deriving-muon.
    """

    hyperparameters = ("lr", "weight_decay", "momentum", "a", "b", "c", "eps")
    a: Hyperparameter
    b: Hyperparameter
    c: Hyperparameter

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        *,
        weight_decay: Hyperparameter = 0.1,
        momentum: Hyperparameter = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: Hyperparameter = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_unclamped"] = "original",
    ):
        super().__init__()
        if not isinstance(ns_coefficients, tuple | list) or len(ns_coefficients) != 3:
            raise ValueError(
                f"Muon: `ns_coefficients` must be three numbers (a, b, c), got {ns_coefficients!r}."
            )
        set_hyperparameter(self, "lr", lr)
        set_hyperparameter(self, "weight_decay", weight_decay)
        set_hyperparameter(self, "momentum", momentum, below=1.0)
        for name, value in zip("abc", ns_coefficients, strict=True):
            set_hyperparameter(self, name, value, low=-math.inf)
        set_hyperparameter(self, "eps", eps)
        self.nesterov = check_flag(self, "nesterov", nesterov)
        self.ns_steps = check_count(self, "ns_steps", ns_steps)
        self.adjust_lr_fn = check_choice(self, "adjust_lr_fn", adjust_lr_fn, tuple(FACTORS))

    @property
    def ns_coefficients(self) -> Coefficients:
        """The coefficients of an iteration."""
        return self.a, self.b, self.c

    def slots(self, params: Leaves) -> Slots:
        for p in params:
            if p.ndim != 2:
                raise ValueError(
                    f"Muon: `params` must be matrices, got shape {tuple(p.shape)}. Only matrices "
                    "have singular values. Give the others to another optimizer: "
                    '`Grouped({"*.weight": Muon(), "*": AdamW()})`.'
                )
        return zeros(params, "mean")

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        lr, decay, momentum, *coefficients, eps = (hyper[name] for name in self.hyperparameters)
        mean = averages(slots["mean"], grads, momentum)
        ahead = averages(mean, grads, momentum) if self.nesterov else mean
        factor = FACTORS[self.adjust_lr_fn]
        updates = [
            -lr * factor(*x.shape) * orthogonalized(x, coefficients, eps, self.ns_steps)
            for x in ahead
        ]
        return decayed(self, updates, params, lr, decay), {"mean": mean}


def orthogonalized(matrix: Tensor, coefficients: Sequence[Value], eps: Value, steps: int) -> Tensor:
    """Return NS(X), [rows, columns]; smooth at X = 0, where it is X / eps to first order."""
    a, b, c = coefficients
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.mT
    x = x / tree.norm(x).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT

"""What the optimizers with two decays share."""

from __future__ import annotations

from typing import Any

from metaopt.optimizer import Hyperparameter, Optimizer, set_hyperparameter

Pair = tuple[Hyperparameter, Hyperparameter]


class WithBetas(Optimizer):
    """An optimizer with `betas`, the decays of two moving averages.

    They are the hyperparameters `beta1` and `beta2`.
    """

    beta1: Hyperparameter
    beta2: Hyperparameter

    @property
    def betas(self) -> Pair:
        """The decays of the two moving averages."""
        return self.beta1, self.beta2

    def _set_betas(self, betas: Pair) -> None:
        first, second = as_pair(self, "betas", betas, "(0.9, 0.999)")
        set_hyperparameter(self, "beta1", first, below=1.0)
        set_hyperparameter(self, "beta2", second, below=1.0)


def as_pair(owner: Optimizer, name: str, value: Any, example: str) -> Pair:
    """Return the two items of `value`.

    Raises:
        ValueError: it is not a pair.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(
            f"{type(owner).__name__}: `{name}` must be a pair, got {value!r}. Write "
            f"{name}={example}."
        )
    return value[0], value[1]

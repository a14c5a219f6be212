"""What a hyperparameter that changes over time is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.optimizer.module import Configurable


class Schedule(Configurable):
    """A hyperparameter as a function of the step and of what the optimizer observes; a module, so it can be learned.

    A subclass defines `forward`, and `init` if it remembers something. Any optimizer takes it wherever it takes a
    number: `SGD(lr=Cosine(0.1, steps=100))`.
    """

    def init(self, like: Tensor) -> Any:
        """Return the state before the first step: a tree of tensors on the device of `like`."""
        return {}

    def forward(self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]) -> tuple[float | Tensor, Any]:
        """Return (the value at this step, the next state).

        Args:
            state: from `init` or the step before.
            step: index of the step, from 0; a scalar integer tensor.
            loss: the loss at the current parameters, if the caller of the optimizer gave it.
            grads: the gradients, one tensor per parameter.
        """
        raise TypeError(f"{type(self).__name__} must define `forward(state, *, step, loss, grads)`.")

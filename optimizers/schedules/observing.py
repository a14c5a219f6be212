"""What schedules that observe the loss share."""

from __future__ import annotations

from torch import Tensor

from metaopt.optimizer import Schedule


def require_loss(owner: Schedule, loss: Tensor | None) -> Tensor:
    """Return the loss that a schedule observes.

    Raises:
        ValueError: it was not given.
    """
    if loss is None:
        raise ValueError(
            f"{type(owner).__name__} observes the loss, got None. Call `optimizer(grads, state, "
            "params, loss=loss)` or `step(closure)`."
        )
    return loss

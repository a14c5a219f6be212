"""What a hyperparameter that changes over time is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer.module import Configurable


class Schedule(Configurable):
    """A hyperparameter as a function of the step and of what the optimizer observes.

    It is a module, so it can be learned. A subclass defines `forward`, and `init` if it remembers
    something. Any optimizer takes it wherever it takes a number: `SGD(lr=Cosine(0.1, steps=100))`.
    """

    def init(self, like: Tensor) -> Any:
        """Return the state before the first step: a tree of tensors on the device of `like`."""
        return {}

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[float | Tensor, Any]:
        """Return (the value at this step, the next state).

        Args:
            state: from `init` or the step before.
            step: index of the step, from 0; a scalar integer tensor.
            loss: the loss at the current parameters, if the caller of the optimizer gave it.
            grads: the gradients, one tensor per parameter.
        """
        raise TypeError(
            f"{type(self).__name__} must define `forward(state, *, step, loss, grads)`."
        )

    def value_at(
        self,
        state: Any,
        *,
        step: Tensor,
        loss: Tensor | None,
        grads: list[Tensor] | None,
        like: Tensor,
    ) -> float | Tensor:
        """Return the value at this step, for somebody who only looks.

        A subclass that observes answers with its last value.

        Args:
            state: from `init` or the step before.
            step: index of the step, from 0.
            loss: as for `forward`; None if it is not known.
            grads: as for `forward`; None if they are not known.
            like: a scalar in the precision of the gradients. It is nan, and so is a value that
                depends on unknown gradients.

        Raises:
            ValueError: there is no value without the loss.
        """
        try:
            seen = [like] if grads is None else grads
            value: float | Tensor = self(state, step=step, loss=loss, grads=seen)[0]
            return value
        except (AttributeError, TypeError) as error:
            if loss is not None:
                raise
            raise ValueError(
                f"{type(self).__name__}: its value needs the loss, got None. Call "
                "`optimizer.values(state, loss=loss, grads=grads)`, or define `value_at`, with "
                "the value that it had last."
            ) from error


def advance(
    schedule: Schedule, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
) -> tuple[float | Tensor, Any]:
    """Return what `schedule(state, ...)` does, and see that the state is its own.

    Raises:
        ValueError: the state is another schedule's, or the schedule's own errors.
    """
    if isinstance(loss, float | int):
        loss = torch.as_tensor(loss, device=step.device)
    if loss is not None and (not isinstance(loss, Tensor) or loss.ndim):
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"`loss` must be a scalar for {type(schedule).__name__} to observe, got {found}. Take "
            "the mean."
        )
    if type(schedule).init is Schedule.init and (type(state) is not dict or state):
        _check_state(schedule, state, grads[0])
    try:
        value, after = schedule(state, step=step, loss=loss, grads=grads)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError):
        _check_state(schedule, state, grads[0])
        raise
    if after is not state and not tree.is_alike(state, after):
        _check_state(schedule, state, grads[0])
        raise ValueError(
            f"{type(schedule).__name__}: `forward` must return a state like that from `init`, "
            f"{_shapes(state)}, got {_shapes(after)}."
        )
    return value, after


def read(schedule: Schedule, state: Any, *, like: Tensor, **seen: Any) -> float | Tensor:
    """Return what `schedule.value_at(state, ...)` does.

    Raises:
        ValueError: the state is another schedule's, or the schedule's own errors.
    """
    _check_state(schedule, state, like)
    return schedule.value_at(state, like=like, **seen)


def _check_state(schedule: Schedule, state: Any, like: Tensor) -> None:
    """Raise ValueError if the state has not the structure and shapes of the schedule's own."""
    own, given = _shapes(schedule.init(like)), _shapes(state)
    if own != given:
        raise ValueError(
            f"`state` must be that of this {type(schedule).__name__}, a tree {own}, got {given}. "
            "Pass what `init` of this optimizer, or the step before, returned."
        )


def _shapes(state: Any) -> Any:
    """Return the tree of shapes."""

    def describe(leaf: Any) -> Any:
        return tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__

    return tree.map(describe, state)

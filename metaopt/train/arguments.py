"""What a `Trainer` is given: what these things must be able to do, and errors where they cannot."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from metaopt.checks import check_flag, check_positive

if TYPE_CHECKING:
    from metaopt.train.trainer import Trainer


class Training(Protocol):
    """What can be trained: something that steps, and whose whole state is one tree."""

    def step(self) -> Mapping[str, float | Tensor]:
        """Make one step and return its metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        ...


class Callback(Protocol):
    """What is called after each step."""

    def __call__(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Look at the step `trainer.step`; `trainer.stop()` makes it the last one."""
        ...


class InnerCallback(Protocol):
    """What is called inside a step, after each step of each level."""

    def __call__(
        self, trainer: Trainer, level: str, step: int, metrics: Mapping[str, Tensor]
    ) -> None:
        """Look at the level's step of this number, as `LevelGraph.step` tells of it."""
        ...


def check_parts(
    training: Any, logger: Any, validate: Any, callbacks: Any, inner_callbacks: Any
) -> None:
    """Raise TypeError unless these are what a `Trainer` calls, or None where nothing is called."""
    _check_methods("training", training, ("step", "state_dict", "load_state_dict"))
    if logger is not None:
        _check_methods("logger", logger, ("log", "close"))
    if validate is not None and not callable(validate):
        raise TypeError(
            f"`validate` must be a function that returns a number, got {validate!r}. Write "
            "validate=lambda: ..."
        )
    _check_functions("callbacks", callbacks, "(trainer, metrics)")
    _check_functions("inner_callbacks", inner_callbacks, "(trainer, level, step, metrics)")
    if inner_callbacks and "on_step" not in inspect.signature(training.step).parameters:
        raise TypeError(
            f"`inner_callbacks` need a training whose `step` takes `on_step`, as a `LevelGraph`'s "
            f"does, got {type(training).__name__}. Use `callbacks`, which see each of its steps."
        )


def _check_methods(name: str, given: Any, methods: tuple[str, ...]) -> None:
    missing = [method for method in methods if not callable(getattr(given, method, None))]
    if missing:
        raise TypeError(
            f"`{name}` must have the methods {', '.join(methods)}, got {type(given).__name__} "
            f"without {missing}."
        )
    if isinstance(given, type):
        raise TypeError(f"`{name}` must be an object, got the class. Write {given.__name__}(...).")


def _check_functions(name: str, given: Any, arguments: str) -> None:
    if not isinstance(given, Sequence) or not all(map(callable, given)):
        raise TypeError(f"`{name}` must be functions of {arguments} in a list, got {given!r}.")


def as_count(name: str, value: Any) -> int:
    """Return a positive integer, of Python or of another library."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, got {value!r}. Write {name}=100.")
    count = operator.index(value)
    if count < 1:
        raise ValueError(f"`{name}` must be positive, got {count}.")
    return count


def check_limits(
    time_limit: float | None, patience: int | None, validate: Any, resume: bool, checkpoint: Any
) -> None:
    """Raise if a limit is not positive, or what it or `resume` needs is missing."""
    check_flag(None, "resume", resume)
    if time_limit is not None:
        check_positive(None, "time_limit", time_limit)
    if patience is not None and validate is None:
        raise ValueError(f"`patience={patience}` counts validations: give `validate=`.")
    if resume and checkpoint is None:
        raise ValueError("`resume=True` needs a folder to go on from: give `checkpoint=`.")


def check_idle(is_running: bool, step: int, max_steps: int) -> None:
    """Raise if a loop over a trainer is not over yet."""
    if is_running:
        raise RuntimeError(
            f"A loop over this trainer is at step {step} of {max_steps}, and a second one would "
            "move the same training. End the first one (`break`, or `close()` of its iterator), "
            "or make a `Trainer` of its own for the second."
        )

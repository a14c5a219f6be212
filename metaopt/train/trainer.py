"""The training loop: step, log, validate, keep the best."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from metaopt.checks import check_flag
from metaopt.train.loggers import Logger
from metaopt.train.progress import Bar, Lines, show_progress


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


class Trainer:
    """Steps a training `max_steps` times and shows how far it is.

    In a terminal that is a progress bar; where stderr is a pipe or a file, a line every 30 seconds
    and one at the end.

    Args:
        training: what to train.
        max_steps: number of steps.
        logger: takes the metrics of each step, and "validation"; and, of a training that has a
            method `values`, as a `LevelGraph` has, the numbers that it returns before the step:
            those of schedules and learned rates.
        validate: returns a number, lower is better; called before the first step, every
            `validate_every` steps, and after the last. After `fit` the training is back in the
            state that validated best.
        validate_every: steps between validations.
        label: text in front of the progress.
        progress: False to show nothing.

    Raises:
        ValueError: `max_steps` or `validate_every` is not positive.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        training: Training,
        *,
        max_steps: int,
        logger: Logger | None = None,
        validate: Callable[[], float] | None = None,
        validate_every: int = 100,
        label: str = "training",
        progress: bool = True,
    ):
        _require_methods("training", training, ("step", "state_dict", "load_state_dict"))
        if logger is not None:
            _require_methods("logger", logger, ("log", "close"))
        if validate is not None and not callable(validate):
            raise TypeError(
                f"`validate` must be a function that returns a number, got {validate!r}. Write "
                "validate=lambda: ..."
            )
        check_flag(None, "progress", progress)
        self.training, self.logger, self.validate = training, logger, validate
        self.max_steps = _as_count("max_steps", max_steps)
        self.validate_every = _as_count("validate_every", validate_every)
        self.label, self.progress = label, progress
        self.best = math.inf
        self.best_step = 0
        self._best_state: dict[str, Any] | None = None

    def fit(self) -> None:
        """Train, and go back to the state that validated best.

        `best` and `best_step` then say which it was. The same happens if a step raises or the user
        interrupts: what was best by then is kept.

        Raises:
            TypeError: a metric, or what `validate` returned, is not one number.
        """
        progress = show_progress(self.label, self.max_steps, shown=self.progress)
        try:
            self._validate(0, progress)
            for step in range(1, self.max_steps + 1):
                # Before the step: these are the values that it uses.
                values = {} if self.logger is None else _read_values(self.training)
                metrics = {
                    name: _as_number(f"The metric {name!r}", value)
                    for name, value in self.training.step().items()
                }
                if self.logger is not None:
                    self.logger.log(step, values | metrics)
                progress.advance()
                if step % self.validate_every == 0 or step == self.max_steps:
                    self._validate(step, progress)
        finally:
            progress.close()
            # Also after an interruption: what was best by then is kept.
            if self._best_state is not None:
                self.training.load_state_dict(self._best_state)
            if self.logger is not None:
                self.logger.close()

    def _validate(self, step: int, progress: Bar | Lines) -> None:
        if self.validate is None:
            return
        value = _as_number("What `validate` returns", self.validate())
        if self.logger is not None:
            self.logger.log(step, {"validation": value})
        if value < self.best:  # a nan is never best
            self.best, self.best_step = value, step
            self._best_state = copy.deepcopy(self.training.state_dict())
        progress.note({"validation": f"{value:.4g}", "best": f"{self.best:.4g}@{self.best_step}"})


def _require_methods(name: str, given: Any, methods: tuple[str, ...]) -> None:
    missing = [method for method in methods if not callable(getattr(given, method, None))]
    if missing:
        raise TypeError(
            f"`{name}` must have the methods {', '.join(methods)}, got {type(given).__name__} "
            f"without {missing}."
        )


def _read_values(training: Any) -> dict[str, float]:
    """Return the hyperparameters that are single numbers, of a training that tells them."""
    tell = getattr(training, "values", None)
    found: Mapping[str, Any] = tell() if callable(tell) else {}
    return {
        name: float(value)
        for name, value in found.items()
        if not isinstance(value, Tensor) or value.numel() == 1
    }


def _as_count(name: str, value: Any) -> int:
    """Return a positive integer, of Python or of another library."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, got {value!r}. Write {name}=100.")
    count = operator.index(value)
    if count < 1:
        raise ValueError(f"`{name}` must be positive, got {count}.")
    return count


def _as_number(what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise TypeError(f"{what} must be one number, got {kind}. Take its mean.") from error

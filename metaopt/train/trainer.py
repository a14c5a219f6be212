"""The training loop: step, log, validate, keep the best."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from metaopt.train.loggers import Logger


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
    """Steps a training `max_steps` times under a progress bar.

    Args:
        training: what to train.
        max_steps: number of steps.
        logger: takes the metrics of each step, and "validation".
        validate: returns a number, lower is better; called before the first step, every `validate_every` steps, and after the last.
            After `fit` the training is back in the state that validated best.
        validate_every: steps between validations.
        label: text in front of the progress bar.
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
    ):
        if max_steps < 1 or validate_every < 1:
            raise ValueError(f"`max_steps` and `validate_every` must be positive, got {max_steps} and {validate_every}.")
        self.training, self.max_steps, self.logger = training, max_steps, logger
        self.validate, self.validate_every, self.label = validate, validate_every, label
        self.best = math.inf
        self.best_step = 0
        self._best_state: dict[str, Any] | None = None

    def fit(self) -> None:
        """Train; on return the best validated state is in place, and `best` and `best_step` say which it was.

        So it is if a step raises or the user interrupts: what was best by then is kept.
        """
        try:
            with tqdm(total=self.max_steps, desc=self.label, mininterval=0.5) as bar:
                self._validate(0, bar)
                for step in range(1, self.max_steps + 1):
                    metrics = {name: float(value) for name, value in self.training.step().items()}
                    if self.logger is not None:
                        self.logger.log(step, metrics)
                    bar.update()
                    if step % self.validate_every == 0 or step == self.max_steps:
                        self._validate(step, bar)
        finally:
            if self._best_state is not None:
                self.training.load_state_dict(self._best_state)
            if self.logger is not None:
                self.logger.close()

    def _validate(self, step: int, bar: tqdm) -> None:
        if self.validate is None:
            return
        value = self.validate()
        if self.logger is not None:
            self.logger.log(step, {"validation": value})
        if value < self.best:  # a nan is never best
            self.best, self.best_step = value, step
            self._best_state = copy.deepcopy(self.training.state_dict())
        bar.set_postfix(validation=f"{value:.4g}", best=f"{self.best:.4g}@{self.best_step}")

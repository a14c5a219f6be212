"""The training loop: step, log, validate, save, stop."""

from __future__ import annotations

import copy
import operator
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metaopt.checks import check_flag, check_positive
from metaopt.distributed import current_ranks, gather_rows
from metaopt.random_state import read_random_state, restore_random_state
from metaopt.train.checkpoint import Checkpoints
from metaopt.train.interrupt import Interrupt
from metaopt.train.loggers import Logger
from metaopt.train.progress import Bar, Lines, show_progress
from metaopt.train.reporting import Reporting
from metaopt.train.selection import Selection
from metaopt.train.state_file import CheckpointError

Metrics = dict[str, float]


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


class Trainer:
    """Steps a training `max_steps` times, and saves, validates, logs and shows how far it is.

    `fit()` does it all; `for metrics in trainer:` does the same, a step at a time, for a loop of
    another library. In a terminal the progress is a bar; where stderr is a pipe or a file, a line
    every 30 seconds and one at the end.

    The first SIGINT or SIGTERM lets the step end, saves, and raises KeyboardInterrupt with what to
    do to go on; a second one ends the program at once.

    In several processes (see `join_ranks`) rank 0 shows and logs, each rank saves, and what ends
    the training on one rank ends it on all.

    Args:
        training: what to train.
        max_steps: number of steps, those before a resumption included.
        logger: takes the metrics of each step, and "validation"; and, of a training that has a
            method `values`, as a `LevelGraph` has, the numbers that it returns before the step:
            those of schedules and learned rates. At most once a second also "steps per second" and
            "peak memory (MiB)". One that raises is reported once, and the training goes on.
        validate: returns a number, lower is better, or several by name, of which "loss" decides;
            called before the first step, every `validate_every` steps, and after the last. After
            `fit` the training is back in the state that validated best.
        validate_every: steps between validations.
        patience: number of validations in a row that are not better, after which it ends; a nan is
            not better. None: it does not end for this.
        min_change: how much lower than the best a validation must be to count as better for
            `patience`.
        checkpoint: a directory for checkpoints, of which the last two and the best are kept; or
            `Checkpoints`, which can say more. Everything is in them: the training's state, torch's,
            numpy's and Python's random state, and what `fit` knows.
        checkpoint_every: steps between checkpoints; one is also written where the validation is
            best, and at the end.
        resume: go on from the newest checkpoint that can be read, or begin if there is none.
        time_limit: seconds after which it saves and ends.
        callbacks: called after each step, with the metrics, and those of a validation after it.
        label: text in front of the progress.
        progress: False to show nothing.

    Attributes:
        step: number of steps so far.
        stopped_by: what ended the training: "max_steps", "patience", "time_limit" or "stop"; None
            before, and after an interruption.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument of another type.
        CheckpointError: the directory cannot be written to, or it has checkpoints and `resume` is
            False.

    Cost:
        Beside the steps, a few microseconds for each, and the checkpoints.
    """

    step: int
    stopped_by: str | None

    def __init__(
        self,
        training: Training,
        *,
        max_steps: int,
        logger: Logger | None = None,
        validate: Callable[[], float | Mapping[str, float]] | None = None,
        validate_every: int = 100,
        patience: int | None = None,
        min_change: float = 0.0,
        checkpoint: str | Path | Checkpoints | None = None,
        checkpoint_every: int = 1000,
        resume: bool = False,
        time_limit: float | None = None,
        callbacks: Sequence[Callback] = (),
        label: str = "training",
        progress: bool = True,
    ):
        _require_methods("training", training, ("step", "state_dict", "load_state_dict"))
        if logger is not None:
            _require_methods("logger", logger, ("log", "close"))
        _require_functions(validate, callbacks)
        check_flag(None, "progress", progress)
        check_positive(None, "min_change", min_change, or_zero=True)
        self.training, self.logger, self.validate = training, logger, validate
        self.max_steps = _as_count("max_steps", max_steps)
        self.validate_every = _as_count("validate_every", validate_every)
        self.patience = None if patience is None else _as_count("patience", patience)
        self.min_change = min_change
        self.time_limit = time_limit
        if time_limit is not None:
            check_positive(None, "time_limit", time_limit)
        self.checkpoints = _open(checkpoint, check_flag(None, "resume", resume))
        if resume and checkpoint is None:
            raise ValueError("`resume=True` needs a folder to go on from: give `checkpoint=`.")
        if patience is not None and validate is None:
            raise ValueError(f"`patience={patience}` counts validations: give `validate=`.")
        self.checkpoint_every = _as_count("checkpoint_every", checkpoint_every)
        self.resume, self.callbacks = resume, tuple(callbacks)
        self.label, self.progress = label, progress
        self._begin()

    def fit(self) -> None:
        """Train, and go back to the state that validated best.

        `step`, `best` and `best_step` then say how it went. The same happens if a step raises or
        the user interrupts: what was best by then is kept.

        Raises:
            TypeError: a metric, or what `validate` returned, is not one number.
            CheckpointError: there is no checkpoint to go on from that can be read and is of this
                training.
            OSError: a checkpoint could not be written, for example on a full disk; those before are
                as they were.
            KeyboardInterrupt: a signal to stop came; everything is saved.
        """
        for _ in self:
            pass

    def __iter__(self) -> Iterator[Metrics]:
        """Yield the metrics of each step when all that belongs to it is done; as `fit` otherwise.

        A loop that is left early leaves the training in the best state by then, as `fit` does.
        """
        self._begin()
        is_resumed = self._resume()
        # one rank is enough: all come to the same metrics
        self._reporting = Reporting(None if self._ranks.rank else self.logger, self.step)
        progress = show_progress(
            self.label, self.max_steps, done=self.step, shown=self.progress and not self._ranks.rank
        )
        try:
            with Interrupt() as interrupt:
                if is_resumed:  # perhaps from the end
                    self.stopped_by, _ = self._decide(interrupt)
                else:
                    self._validate(progress)
                    self._end_step(interrupt)
                while self.stopped_by is None:
                    metrics = self._step(progress)
                    self._end_step(interrupt)
                    yield metrics
                    if self.stopped_by is None and self._stopped:
                        self._save()  # not yet done: the body of the loop has stopped it
                        self.stopped_by = "stop"
        finally:
            progress.close()
            self._close()

    def stop(self) -> None:
        """Make the present step the last one, from a callback or the body of a loop."""
        self._stopped = True

    @property
    def best(self) -> float:
        """The lowest validation so far."""
        return self._selection.best

    @property
    def best_step(self) -> int:
        """The step at which that was."""
        return self._selection.best_step

    def _begin(self) -> None:
        self.stopped_by = None
        self._ranks = current_ranks()
        if self.checkpoints is not None:
            self.checkpoints.check_ranks(self._ranks)
        self.step = 0
        self._selection = Selection(self.patience, self.min_change)
        self._stopped = self._is_best = False
        self._started = time.perf_counter()

    def _resume(self) -> bool:
        """Go to the newest checkpoint; return False if that is not asked for or there is none."""
        _require_fresh(self.checkpoints, self.resume)  # `fit` may be called again
        found = None
        if self.checkpoints and self.resume:
            found = self.checkpoints.load({"training": self.training.state_dict()})
        if found is None:
            return False
        try:
            # a copy: it may be the same tree as the state that goes on
            best = None if found.best is None else copy.deepcopy(found.best["training"])
            self._selection.load_state_dict(found.state["selection"], best)
            self.training.load_state_dict(found.state["training"])
            restore_random_state(found.state["random"])
        except (TypeError, LookupError, ValueError, RuntimeError, AttributeError) as error:
            assert self.checkpoints
            raise CheckpointError(
                f"{self.checkpoints.path(found.step)} is not a checkpoint of this training: "
                f"{error} Go on with the training that wrote it, or begin in another directory."
            ) from error
        self.step = found.step
        return True

    def _step(self, progress: Bar | Lines) -> Metrics:
        # Before the step: these are the values that it uses.
        values = {} if self.logger is None else _read_values(self.training)
        metrics = {
            name: _as_number(f"The metric {name!r}", value)
            for name, value in self.training.step().items()
        }
        self.step += 1
        self._is_best = False
        self._reporting.log_step(self.step, values | metrics)
        progress.advance(metrics)
        if self.step % self.validate_every == 0 or self.step == self.max_steps:
            metrics |= self._validate(progress)
        for callback in self.callbacks:
            callback(self, metrics)
        return metrics

    def _end_step(self, interrupt: Interrupt) -> None:
        """Save if it is time for it, the step the best, or the last; raise if a signal came."""
        ends, is_interrupted = self._decide(interrupt)
        self.stopped_by = ends
        is_due = self.step % self.checkpoint_every == 0 and self.step
        if is_due or ends or is_interrupted or self._is_best:
            self._save()
        saved = "" if self.checkpoints is None else f" It is saved in {self.checkpoints.directory}."
        again = f"{saved} Run it again with `resume=True` to go on." if saved else ""
        if ends == "time_limit" and self.progress and not self._ranks.rank:
            print(f"The time is up at step {self.step}.{again}", file=sys.stderr)
        if is_interrupted:
            signal = interrupt.received or "A signal to another rank"
            raise KeyboardInterrupt(f"{signal} after step {self.step} of {self.max_steps}.{again}")

    def _decide(self, interrupt: Interrupt) -> tuple[str | None, bool]:
        """Return (what ends the training after this step, whether it is interrupted).

        What happens to one rank, a signal or the end of its time, is for all of them: the others
        would wait for it in the next step.
        """
        passed = time.perf_counter() - self._started
        reasons = {
            "stop": self._stopped,
            "max_steps": self.step >= self.max_steps,
            "patience": self._selection.is_over,
            "time_limit": self.time_limit is not None and passed >= self.time_limit,
            "": interrupt.received is not None,
        }
        if self._ranks.are_many:
            mine = torch.tensor([[*reasons.values()]])
            anywhere = gather_rows(mine, self._ranks.size, self._ranks).any(0).tolist()
            reasons = dict(zip(reasons, anywhere, strict=True))
        is_interrupted = reasons.pop("")
        return next((name for name, ends in reasons.items() if ends), None), is_interrupted

    def _validate(self, progress: Bar | Lines) -> Metrics:
        """Validate if there is something to do it with; return the values by name."""
        if self.validate is None:
            return {}
        given = self.validate()
        values = _name_values(given)
        self._reporting.log(self.step, values)
        value = values["validation/loss" if isinstance(given, Mapping) else "validation"]
        self._is_best = self._selection.take(self.step, value, self.training.state_dict())
        progress.note({"validation": f"{value:.4g}", "best": f"{self.best:.4g}@{self.best_step}"})
        return values

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        state = {
            "training": self.training.state_dict(),
            "selection": self._selection.state_dict(),
            "random": read_random_state(),
        }
        has_best = self._selection.best_state is not None
        self.checkpoints.save(self.step, state, self.best_step if has_best else None)

    def _close(self) -> None:
        """Go back to what was best, also after an interruption."""
        if self._selection.best_state is not None:
            self.training.load_state_dict(self._selection.best_state)
        self._reporting.close(self.step)


def _open(checkpoint: str | Path | Checkpoints | None, resume: bool) -> Checkpoints | None:
    """Return the directory of the checkpoints.

    Raises:
        CheckpointError: there are some that nobody said to go on from.
    """
    if checkpoint is None:
        return None
    found = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    _require_fresh(found, resume)
    return found


def _require_fresh(checkpoints: Checkpoints | None, resume: bool) -> None:
    """Raise CheckpointError if there are some that nobody said to go on from."""
    steps = checkpoints.steps() if checkpoints and not resume else []
    if steps:
        assert checkpoints
        raise CheckpointError(
            f"{checkpoints.directory} has checkpoints, up to step {steps[-1]}. Go on from there "
            "with `resume=True`, or delete them, or take another directory."
        )


def _require_methods(name: str, given: Any, methods: tuple[str, ...]) -> None:
    missing = [method for method in methods if not callable(getattr(given, method, None))]
    if missing:
        raise TypeError(
            f"`{name}` must have the methods {', '.join(methods)}, got {type(given).__name__} "
            f"without {missing}."
        )


def _require_functions(validate: Any, callbacks: Any) -> None:
    if validate is not None and not callable(validate):
        raise TypeError(
            f"`validate` must be a function that returns a number, got {validate!r}. Write "
            "validate=lambda: ..."
        )
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(
            f"`callbacks` must be functions of (trainer, metrics) in a list, got {callbacks!r}."
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


def _name_values(given: Any) -> Metrics:
    """Return what `validate` returned, by name."""
    if not isinstance(given, Mapping):
        return {"validation": _as_number("What `validate` returns", given)}
    if "loss" not in given:
        raise TypeError(
            f"What `validate` returns must have 'loss', which decides what is best, got "
            f"{sorted(given)}."
        )
    return {
        f"validation/{name}": _as_number(f"The validation {name!r}", value)
        for name, value in given.items()
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

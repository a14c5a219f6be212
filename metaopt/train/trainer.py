"""The training loop: step, log, validate, save, stop."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from metaopt.checks import check_flag, check_positive
from metaopt.distributed import current_ranks
from metaopt.random_state import read_random_state, restore_random_state
from metaopt.train.arguments import (
    Callback,
    InnerCallback,
    Training,
    as_count,
    check_idle,
    check_limits,
    check_parts,
)
from metaopt.train.checkpoint import Checkpoints
from metaopt.train.ending import find_reasons, tell_how_to_go_on
from metaopt.train.interrupt import Interrupt
from metaopt.train.loggers import Logger
from metaopt.train.metrics import (
    Metrics,
    read_metrics,
    read_numbers,
    read_validation,
    read_values,
)
from metaopt.train.progress import Bar, Lines, show_progress
from metaopt.train.reporting import Reporting
from metaopt.train.selection import Selection
from metaopt.train.state_file import CheckpointError


class Trainer:
    """Steps a training `max_steps` times, and saves, validates, logs and shows how far it is.

    `fit()` does it all; `for metrics in trainer:` does the same, a step at a time, for a loop of
    another library. In a terminal the progress is a bar; where stderr is a pipe or a file, a line
    every 30 seconds and one at the end.

    The first SIGINT or SIGTERM lets the step end, saves, and raises KeyboardInterrupt with what to
    do to go on; a second one ends the program at once. Between two steps, in the body of a loop, it
    saves and raises at once, as long as the iterator is there; on several ranks, after the next
    step of all.

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
        inner_callbacks: called inside each step, after each step of each level of a `LevelGraph`,
            as its `step` tells of it.
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
        inner_callbacks: Sequence[InnerCallback] = (),
        label: str = "training",
        progress: bool = True,
    ):
        check_parts(training, logger, validate, callbacks, inner_callbacks)
        check_flag(None, "progress", progress)
        check_positive(None, "min_change", min_change, or_zero=True)
        self.training, self.logger, self.validate = training, logger, validate
        self.max_steps = as_count("max_steps", max_steps)
        self.validate_every = as_count("validate_every", validate_every)
        self.patience = None if patience is None else as_count("patience", patience)
        self.min_change = min_change
        self.time_limit = time_limit
        check_limits(time_limit, patience, validate, resume, checkpoint)
        self.checkpoints = _open(checkpoint, resume)
        self.checkpoint_every = as_count("checkpoint_every", checkpoint_every)
        self.callbacks, self.inner_callbacks = tuple(callbacks), tuple(inner_callbacks)
        self.resume, self.label, self.progress = resume, label, progress
        self._is_running = False
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
            RuntimeError: a loop over this trainer is not over yet.
            KeyboardInterrupt: a signal to stop came; everything is saved.
        """
        for _ in self:
            pass

    def __iter__(self) -> Iterator[Metrics]:
        """Yield the metrics of each step when all that belongs to it is done; as `fit` otherwise.

        A loop that is left early leaves the training in the best state by then, as `fit` does.

        Raises:
            RuntimeError: another loop over this trainer is not over yet.
        """
        check_idle(self._is_running, self.step, self.max_steps)
        self._begin()
        is_resumed = self._resume()
        # one rank is enough: all come to the same metrics
        self._reporting = Reporting(None if self._ranks.rank else self.logger, self.step)
        progress = show_progress(
            self.label, self.max_steps, done=self.step, shown=self.progress and not self._ranks.rank
        )
        try:
            self._is_running = True
            with Interrupt(self._leave) as interrupt:
                if is_resumed:  # perhaps from the end
                    self.stopped_by, _ = self._decide(interrupt)
                else:
                    self._validate(progress)
                    self._end_step(interrupt)
                while self.stopped_by is None:
                    metrics = self._step(progress)
                    self._end_step(interrupt)
                    # The body of the loop may be long, or never end: it is not waited for. But of
                    # several ranks, the others would wait in the next step.
                    interrupt.is_awaited = self._ranks.are_many
                    yield metrics
                    interrupt.is_awaited = True
                    if self._stopped and self.stopped_by is None and not self._ranks.are_many:
                        self._save()  # not yet done: the body of the loop has stopped it
                        self.stopped_by = "stop"
        finally:
            self._close(progress)

    def stop(self) -> None:
        """Make the present step the last one, from a callback or the body of a loop.

        From the body of a loop on several ranks, the next one: the others are on their way to it.
        """
        self._stopped = True

    def log(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Hand a callback's numbers to the logger, if there is one; of several ranks rank 0 does.

        Raises:
            TypeError: a value is not one number.
        """
        if self._reporting.is_heard:
            self._reporting.log(step, read_numbers(metrics))

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
        self._reporting = Reporting(None, 0)
        self._selection = Selection(self.patience, self.min_change)
        self._stopped = self._is_best = False
        self._started = time.perf_counter()

    def _resume(self) -> bool:
        """Go to the newest checkpoint; return False if that is not asked for or there is none."""
        _require_fresh(self.checkpoints, self.resume)  # `fit` may be called again
        if self.checkpoints is None or not self.resume:
            return False
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
            raise CheckpointError(
                f"{self.checkpoints.path(found.step)} is not a checkpoint of this training: "
                f"{error} Go on with the training that wrote it, or begin in another directory."
            ) from error
        self.step = found.step
        return True

    def _step(self, progress: Bar | Lines) -> Metrics:
        # Before the step: these are the values that it uses.
        values = {} if self.logger is None else read_values(self.training)
        inner = {"on_step": self._tell_inner} if self.inner_callbacks else {}
        metrics = read_metrics(self.training, self.training.step(**inner))
        self.step += 1
        self._is_best = False
        self._reporting.log_step(self.step, values, metrics)
        progress.advance(metrics)
        if self.step % self.validate_every == 0 or self.step == self.max_steps:
            metrics |= self._validate(progress)
        for callback in self.callbacks:
            callback(self, metrics)
        return metrics

    def _tell_inner(self, level: str, step: int, metrics: Mapping[str, Tensor]) -> None:
        for callback in self.inner_callbacks:
            callback(self, level, step, metrics)

    def _end_step(self, interrupt: Interrupt) -> None:
        """Save if it is time for it, the step the best, or the last; raise if a signal came."""
        ends, is_interrupted = self._decide(interrupt)
        if is_interrupted:
            self._leave(interrupt.received or "A signal to another rank")
        self.stopped_by = ends
        is_due = self.step % self.checkpoint_every == 0 and self.step
        if is_due or ends or self._is_best:
            self._save()
        if ends == "time_limit" and self.progress and not self._ranks.rank:
            how = tell_how_to_go_on(self.checkpoints)
            print(f"The time is up at step {self.step}.{how}", file=sys.stderr)

    def _leave(self, signal: str) -> NoReturn:
        """Save and end, where a signal came after a step."""
        self._save()
        how = tell_how_to_go_on(self.checkpoints)
        raise KeyboardInterrupt(f"{signal} after step {self.step} of {self.max_steps}.{how}")

    def _decide(self, interrupt: Interrupt) -> tuple[str | None, bool]:
        """Return (what ends the training after this step, whether it is interrupted)."""
        passed = time.perf_counter() - self._started
        reasons = {
            "stop": self._stopped,
            "max_steps": self.step >= self.max_steps,
            "patience": self._selection.is_over,
            "time_limit": self.time_limit is not None and passed >= self.time_limit,
            "": interrupt.received is not None,
        }
        found = find_reasons(reasons, self._ranks)
        return next(iter(found), None) or None, "" in found

    def _validate(self, progress: Bar | Lines) -> Metrics:
        """Validate if there is something to do it with; return the values by name."""
        if self.validate is None:
            return {}
        given = self.validate()
        values = read_validation(given)
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

    def _close(self, progress: Bar | Lines) -> None:
        """Go back to what was best, also after an error, and end the rest if a part of it fails."""
        self._is_running = False
        with ExitStack() as stack:  # the last one first
            stack.callback(self._reporting.close, self.step)
            if self._selection.best_state is not None:
                stack.callback(self.training.load_state_dict, self._selection.best_state)
            stack.callback(progress.close)


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

"""A level without gradients: a search over the values of named parameters."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from metaopt.black_box import show
from metaopt.black_box.backend import Backend
from metaopt.black_box.evaluation import Facts, Function, read_error, read_result
from metaopt.black_box.journal import Journal, JsonLines, Memory
from metaopt.black_box.running import run_all
from metaopt.black_box.sampling import RandomSearch
from metaopt.black_box.space import Parameter, Space, Values
from metaopt.black_box.trial import Trial, find_best
from metaopt.checks import check_count


class BlackBox:
    """min_x L(x) over a space of numbers and choices, where L is any program and has no gradient.

    It is the top level of a graph that gradients do not reach: L builds the `LevelGraph` below it
    with the values x, trains it and returns a validation loss.

        search = mo.BlackBox("search", {"rate": mo.Float(1e-4, 1.0, log=True)}, backend=mo.Ax())
        best = search.run(train_and_validate, trials=20)      # train_and_validate({"rate": ...})

    Or by hand, where evaluations happen elsewhere:

        trial = search.ask()
        search.tell(trial, measure(trial.values))

    Args:
        name: for texts, and the name of the study in a shared journal.
        space: parameter -> `Float`, `Int` or `Choice`.
        objective: the name of what is minimised, where evaluations return a dict of numbers.
        backend: who suggests values: `RandomSearch()`, `Sobol()`, `Ax()`, `BoTorch()`, `Optuna()`.
        journal: where trials are written down: a file (see `JsonLines`), an `OptunaJournal` that
            many processes share, or None, memory. A search goes on with the trials that are there,
            and then suggests what it would have suggested without an interruption.

    Raises:
        ValueError: the space has an empty range or a condition that never holds, or the journal is
            of another search or damaged.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        name: str,
        space: Mapping[str, Parameter],
        objective: str = "loss",
        backend: Backend | None = None,
        *,
        journal: str | Path | Journal | None = None,
    ):
        for what, text in (("name", name), ("objective", objective)):
            if not isinstance(text, str) or not text:
                fix = " The function is the argument of `run`." if callable(text) else ""
                raise TypeError(f"BlackBox: `{what}` must be a text, got {text!r}.{fix}")
        backend = RandomSearch() if backend is None else backend
        if not isinstance(backend, Backend):
            raise TypeError(
                f"BlackBox: `backend` must be a Backend, got {backend!r}. Write mo.RandomSearch()."
            )
        self.name, self.objective, self.backend = name, objective, backend
        self.space = Space(space)
        if journal is None:
            journal = Memory()
        self.journal = journal if isinstance(journal, Journal) else JsonLines(journal)
        self.journal.open(name, self.space, objective)
        self._begun: dict[int, float] = {}  # number of a trial -> when it was begun here

    @property
    def trials(self) -> list[Trial]:
        """All trials by number, also those of other processes."""
        return self.journal.read()

    @property
    def best(self) -> Trial:
        """The trial with the least loss.

        Raises:
            RuntimeError: there is none.
        """
        trials = self.trials
        best = find_best(trials)
        if best is None:
            errors = [f" Trial {t.number}: {t.error}." for t in trials if t.error]
            raise RuntimeError(
                f"{self.name}: none of {len(trials)} trials has a finite loss.{(*errors, '')[0]}"
            )
        return best

    def ask(self) -> Trial:
        """Return a trial to be evaluated, and told by `tell`, `fail` or `report`.

        A trial whose process has died comes first.
        """
        trial = self.begin(None)
        assert trial is not None  # without a limit there always is one
        return trial

    def begin(self, limit: int | None) -> Trial | None:
        """Return a trial as `ask` does, or None if there are `limit` trials and none is left."""
        trial = self.journal.begin(self._suggest, limit)
        if trial is not None:
            self._begun[trial.number] = time.monotonic()
        return trial

    def tell(self, trial: Trial, result: Any, *, stopped: bool = False) -> Trial:
        """Write down what a trial has come to, and return it as it is now.

        Args:
            trial: from `ask`.
            result: the loss, a number or a tensor with one entry; or a dict of such with
                `objective` among its names.
            stopped: it was stopped early: the loss is that of the last report.

        Raises:
            TypeError: it is something else.
            ValueError: the objective is not in the dict, or the trial has ended before.
        """
        return self.end(trial, read_result(self.objective, result, stopped=stopped))

    def fail(self, trial: Trial, error: str | BaseException) -> Trial:
        """Write down that a trial has failed; after a `NonFiniteError`, that it is not finite."""
        return self.end(trial, read_error(error))

    def end(self, trial: Trial, facts: Facts) -> Trial:
        """Write down how a trial has ended, as `evaluate` found it, and return it as it is now."""
        now = self.trials
        if not isinstance(trial, Trial) or trial.number >= len(now):
            raise ValueError(f"{self.name}: the trial must be one from `ask`, got {trial!r}.")
        if now[trial.number].has_ended and trial.number not in self._begun:
            raise ValueError(
                f"{self.name}: trial {trial.number} has ended before, {now[trial.number].status}."
            )
        begun = self._begun.get(trial.number)
        seconds = None if begun is None else time.monotonic() - begun
        self.journal.end(dataclasses.replace(now[trial.number], seconds=seconds, **facts))
        self._begun.pop(trial.number, None)
        return self.trials[trial.number]

    def release(self, trial: Trial, *, died: bool = False) -> None:
        """Give a trial back: it is begun again, here or elsewhere.

        Args:
            trial: from `ask`.
            died: the process that ran it is gone. After three times the trial has failed.
        """
        self._begun.pop(trial.number, None)
        self.journal.release(trial, died=died)

    def report(self, trial: Trial, step: int, loss: Any) -> bool:
        """Write down a loss on the way, and return True if the trial should be stopped.

        Then `tell` its last loss, with `stopped=True`. A loss that is not finite stops a trial too.
        """
        value = read_result(self.objective, loss).get("loss")
        if value is None:  # not finite
            return True
        self.journal.report(trial, step, value)
        trials = self.trials
        return self.backend.should_stop(self.space, trials, trials[trial.number])

    def run(
        self,
        function: Function,
        trials: int,
        *,
        executor: Executor | None = None,
        parallel: int | None = None,
        progress: bool = True,
    ) -> Trial:
        """Evaluate trials until there are a number of them, and return the best.

        A trial whose evaluation raises has failed, and the search goes on; an interruption ends the
        search, and the next one begins with its trial.

        Args:
            function: takes the values, a dict, and returns what `tell` takes. Or a generator of
                such: each is a report, the last is the result, and the backend may stop it early.
            trials: how many there shall be, those in the journal included.
            executor: where evaluations happen: `ProcessPoolExecutor`, or what else has its methods.
                None: here, one after the other.
            parallel: number of trials at once on the executor.
            progress: False to show nothing.

        Raises:
            TypeError: an evaluation returns no number.
            ValueError: an argument is out of range, or a generator shall run on an executor.
            RuntimeError: no trial has a finite loss.
            BrokenExecutor: the executor has lost its workers; to run again goes on.
        """
        check_count(None, "trials", trials)
        if not callable(function):
            raise TypeError(f"`function` must be a function of the values, got {function!r}.")
        if executor is not None:
            check_count(None, "parallel", parallel)
            if inspect.isgeneratorfunction(function):
                raise ValueError(
                    "`function` must return a number on an executor, got a generator. To stop "
                    "trials early on many processes, run this without executor in each, with "
                    "journal=mo.OptunaJournal(path)."
                )
        run_all(self, function, trials, executor, parallel or 1, shown=progress)
        return self.best

    def find_importance(self) -> dict[str, float]:
        """Return how much each parameter matters, as the backend says; {} if it does not."""
        return self.backend.find_importance(self.space, self.trials)

    def table(self, rows: int = 10) -> str:
        """Return the best trials, and then those without a loss, as text."""
        return show.write_trials(self.space, self.objective, self.trials, rows)

    def plot(self, path: str | Path) -> None:
        """Draw into a file: the best loss so far, the loss over each parameter, importances."""
        facts = self.space, self.objective, self.trials, self.find_importance()
        show.draw(path, self.name, *facts)

    def write_tensorboard(self, directory: str | Path) -> None:
        """Write the trials that are done for TensorBoard's page of hyperparameters."""
        show.write_hparams(directory, self.objective, self.trials)

    def _suggest(self, trials: Any) -> Values:
        values = self.backend.suggest(self.space, trials)
        self.space.check(values)
        return values

"""Trials one after the other, or several at once on an executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, Executor
from typing import Any, Protocol

from metaopt.black_box.journal import Journal
from metaopt.black_box.space import Values
from metaopt.black_box.trial import Trial, find_best
from metaopt.train.progress import Bar, Lines, show_progress

Function = Callable[[Values], Any]
NAP = 0.02  # seconds between two looks at what runs on an executor


class Search(Protocol):
    """What gives out trials: a `BlackBox`."""

    name: str
    journal: Journal

    @property
    def trials(self) -> list[Trial]: ...
    def begin(self, limit: int | None) -> Trial | None: ...
    def tell(self, trial: Trial, result: Any, *, stopped: bool = False) -> Trial: ...
    def fail(self, trial: Trial, error: str | BaseException) -> Trial: ...
    def report(self, trial: Trial, step: int, loss: Any) -> bool: ...
    def release(self, trial: Trial) -> None: ...


def run_all(
    search: Search,
    function: Function,
    limit: int,
    executor: Executor | None,
    parallel: int,
    *,
    shown: bool,
) -> None:
    """Run trials until there are `limit` and all have ended, elsewhere too."""
    bar = show_progress(search.name, limit, shown=shown)
    try:
        _advance(search, bar, sum(trial.has_ended for trial in search.trials))
        while True:
            if executor is None:
                _run_here(search, function, limit, bar)
            else:
                _run_on(executor, parallel, search, function, limit, bar)
            if not search.journal.wait():
                return
    finally:
        bar.close()


def _run_here(search: Search, function: Function, limit: int, bar: Bar | Lines) -> None:
    while (trial := search.begin(limit)) is not None:
        try:
            result, stopped = _evaluate(search, function, trial)
        except Exception as error:
            search.fail(trial, error)
        except BaseException:
            search.release(trial)
            raise
        else:
            _take(search, trial, result, stopped=stopped)
        _advance(search, bar, 1)


def _evaluate(search: Search, function: Function, trial: Trial) -> tuple[Any, bool]:
    """Return what the function returns, and whether it was stopped early."""
    result = function(dict(trial.values))
    if not isinstance(result, Generator):
        return result, False
    last = None
    for step, last in enumerate(result, start=1):
        if search.report(trial, step, last):
            result.close()
            return last, True
    return last, False


def _run_on(
    executor: Executor,
    parallel: int,
    search: Search,
    function: Function,
    limit: int,
    bar: Bar | Lines,
) -> None:
    flying: dict[Any, Trial] = {}
    try:
        while True:
            while len(flying) < parallel and (trial := search.begin(limit)) is not None:
                try:
                    flying[executor.submit(function, dict(trial.values))] = trial
                except BaseException:
                    search.release(trial)
                    raise
            if not flying:
                return
            # asked and not waited for, since not every executor's futures are those of Python
            while not (done := [future for future in flying if future.done()]):
                time.sleep(NAP)
            for future in done:
                error = future.exception()
                if isinstance(error, BrokenExecutor):
                    raise error
                trial = flying.pop(future)
                if error is None:
                    _take(search, trial, future.result())
                else:
                    search.fail(trial, error)
                _advance(search, bar, 1)
    except BaseException:
        for future, trial in flying.items():
            future.cancel()
            search.release(trial)
        raise


def _take(search: Search, trial: Trial, result: Any, *, stopped: bool = False) -> None:
    """Tell a result; one that is no number ends the search too, since all would be."""
    try:
        search.tell(trial, result, stopped=stopped)
    except (TypeError, ValueError) as error:
        search.fail(trial, error)
        raise


def _advance(search: Search, bar: Bar | Lines, steps: int) -> None:
    for _ in range(steps):
        bar.advance()
    best = find_best(search.trials)
    if best is not None:
        bar.note({"best": f"{best.loss:.4g}@{best.number}"})

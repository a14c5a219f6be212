"""Trials one after the other, or several at once on an executor."""

from __future__ import annotations

import time
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from functools import partial
from typing import Any, Protocol

from metaopt.black_box.evaluation import Facts, Function, Outcome, evaluate, read_error
from metaopt.black_box.journal import Journal
from metaopt.black_box.termination import hear_termination
from metaopt.black_box.trial import Trial, find_best
from metaopt.train.progress import Bar, Lines, show_progress

NAP = 0.02  # seconds between two looks at what runs on an executor


class Search(Protocol):
    """What gives out trials: a `BlackBox`."""

    name: str
    objective: str
    journal: Journal

    @property
    def trials(self) -> list[Trial]: ...
    def begin(self, limit: int | None) -> Trial | None: ...
    def end(self, trial: Trial, facts: Facts) -> Trial: ...
    def report(self, trial: Trial, step: int, loss: Any) -> bool: ...
    def release(self, trial: Trial, *, died: bool = False) -> None: ...


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
    if executor is not None:
        _try_out(executor, function)
    bar = show_progress(search.name, limit, shown=shown)
    try:
        _advance(search, bar, sum(trial.has_ended for trial in search.trials))
        with hear_termination():
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
            report = partial(search.report, trial)
            _take(search, trial, evaluate(function, dict(trial.values), search.objective, report))
        except BaseException:
            search.release(trial)
            raise
        _advance(search, bar, 1)


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
            while _has_room(flying, parallel) and (trial := search.begin(limit)) is not None:
                try:
                    values = dict(trial.values)
                    flying[executor.submit(evaluate, function, values, search.objective)] = trial
                except BaseException:
                    search.release(trial)
                    raise
            if not flying:
                return
            # asked and not waited for, since not every executor's futures are those of Python
            while not (done := [future for future in flying if future.done()]):
                time.sleep(NAP)
            for future in done:
                try:
                    outcome = future.result()
                except Exception as error:  # the executor's: see `evaluate`
                    if not isinstance(error, BrokenExecutor | CancelledError):
                        search.release(flying.pop(future), died=True)
                    raise
                _take(search, flying[future], outcome)
                del flying[future]
                _advance(search, bar, 1)
    except BaseException as error:
        for future, trial in flying.items():
            future.cancel()
            search.release(trial, died=isinstance(error, BrokenExecutor))
        raise


def _has_room(flying: dict[Any, Trial], parallel: int) -> bool:
    """Return True if another trial may begin.

    One during which a process died runs alone: if it dies again, the others do not count with it.
    """
    suspect = any(trial.attempt > 1 for trial in flying.values())
    return len(flying) < parallel and not suspect


def _try_out(executor: Executor, function: Function) -> None:
    """Send the function to a worker without a trial.

    What can be sent is for the executor to say: a process pool's pickle takes no lambda, a
    cluster's may.

    Raises:
        TypeError: it does not arrive.
    """
    future: Any = None
    try:
        future = executor.submit(_receive, function)
        while not future.done():
            time.sleep(NAP)
        future.result()
    except Exception as error:
        was_shut = future is None and isinstance(error, RuntimeError)
        if was_shut or isinstance(error, CancelledError):
            raise
        raise TypeError(
            f"`function`, {function!r}, does not reach the workers of {type(executor).__name__} "
            f"({type(error).__name__}: {error}). Define it at the top level of a module that they "
            'can import, in a script that starts them under `if __name__ == "__main__":`; or use '
            "a ThreadPoolExecutor."
        ) from error


def _receive(function: Function) -> None:
    """Do nothing: it has arrived."""


def _take(search: Search, trial: Trial, outcome: Outcome) -> None:
    """Write down how a trial ends; a result that is no number ends the search, as all would be."""
    if isinstance(outcome, dict):
        search.end(trial, outcome)
    else:
        search.end(trial, read_error(outcome))
        raise outcome


def _advance(search: Search, bar: Bar | Lines, steps: int) -> None:
    for _ in range(steps):
        bar.advance()
    best = find_best(search.trials)
    if best is not None:
        bar.note({"best": f"{best.loss:.4g}@{best.number}"})

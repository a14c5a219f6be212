"""The black-box level: spaces, trials, journals, and searches that go on after a crash."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import metaopt as mo
from metaopt.extras import SEARCH_PACKAGES

SPACE = {
    "rate": mo.Float(1e-4, 1.0, log=True),
    "width": mo.Int(8, 256, log=True),
    "optimizer": mo.Choice("adam", "sgd"),
    "momentum": mo.Float(0.0, 0.99, when={"optimizer": "sgd"}),
}
FORK = multiprocessing.get_context("fork")
# Other tests of this process may have started JAX, whose threads no child here has to do with.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")


def loss(values: dict[str, Any]) -> float:
    """Return a smooth function with the minimum 0 at rate .01, width 32, sgd, momentum .9."""
    return (
        (math.log10(values["rate"]) + 2) ** 2
        + (math.log2(values["width"]) - 5) ** 2 / 10
        + (values.get("momentum", 0.0) - 0.9) ** 2
    )


def branin(values: dict[str, Any]) -> float:
    """Return Branin's function, with the minimum .398 at three points."""
    x, y = values["x"], values["y"]
    parabola = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return parabola**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


BRANIN = {"x": mo.Float(-5, 10), "y": mo.Float(0, 15)}


def crash(values: dict[str, Any]) -> float:
    os._exit(1)


def make(backend: Any = None, journal: Any = None, space: Any = SPACE) -> mo.BlackBox:
    return mo.BlackBox("search", space, "loss", backend, journal=journal)


def run(search: mo.BlackBox, trials: int, function: Any = loss, **settings: Any) -> mo.Trial:
    return search.run(function, trials, progress=False, **settings)


def known(search: mo.BlackBox) -> list[tuple[Any, ...]]:
    """Return what does not depend on time or on the number of attempts."""
    return [(t.number, t.values, t.status, t.loss) for t in search.trials]


def close(found: Any, expected: Any) -> bool:
    """Return True for equal values, and real numbers that differ by rounding."""
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-12)
    return bool(found == expected)


# the space


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        (mo.Float(-1.0, 3.0), [-1.0, 0.0, 1.0, 3.0]),
        (mo.Float(1e-4, 1.0, log=True), [1e-4, 1e-2, 1.0]),
        (mo.Int(2, 4), [2, 3, 4]),
        (mo.Int(1, 1000, log=True), [1, 30, 1000]),
        (mo.Choice("a", 2, True), ["a", 2, True]),
    ],
)
def test_values_and_places_are_inverse(parameter: Any, values: list[Any]) -> None:
    for value in values:
        assert 0 <= parameter.to_unit(value) <= 1
        assert close(parameter.from_unit(parameter.to_unit(value)), value)
        assert type(parameter.from_unit(parameter.to_unit(value))) is type(value)
        assert parameter.holds(value)
    assert close(parameter.from_unit(0.0), values[0])
    assert close(parameter.from_unit(1.0), values[-1])


def test_each_integer_and_option_has_its_share_of_the_interval() -> None:
    places = [i / 999 for i in range(1000)]
    three = [mo.Int(1, 3).from_unit(place) for place in places]
    assert [three.count(value) for value in (1, 2, 3)] == pytest.approx([333] * 3, abs=2)
    rates = [mo.Float(1e-4, 1.0, log=True).from_unit(place) for place in places]
    assert sum(rate < 1e-2 for rate in rates) == 500


def test_parameters_are_values() -> None:
    assert mo.Float(0, 1) == mo.Float(0.0, 1.0) != mo.Float(0, 2)
    assert repr(mo.Float(0, 1)) == repr(mo.Float(0.0, 1.0))
    assert mo.Choice("a", "b") == mo.Choice("a", "b") != mo.Choice("b", "a")
    assert mo.Int(1, 2, when={"a": "b"}) != mo.Int(1, 2) == mo.Int(np.int64(1), 2)
    assert mo.Int(1, 2, when={"a": ["b", "c"]}) == mo.Int(1, 2, when={"a": ("b", "c")})
    for kind in (mo.RandomSearch, mo.Sobol, mo.Ax, mo.BoTorch, mo.Optuna):
        assert kind() == kind() != kind(seed=1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mo.Int(5, 3), "Int: the range from `low` to `high` is empty, got 5 and 3"),
        (lambda: mo.Float(1.0, 1.0), "Float: the range from `low` to `high` is empty, got 1.0 and"),
        (lambda: mo.Float(0.0, 1.0, log=True), "`low` must be positive where log=True, got 0.0"),
        (lambda: mo.Float(0.0, math.inf), r"Float: `high` must lie in .*, got inf"),
        (lambda: mo.Int(0, 10**30), "Int: `high` must lie in -2.53, ..., 2.53, got 10+. Models"),
        (lambda: mo.Int(-(10**400), 3), "Int: `low` must lie in -2.53, ..., 2.53, got -10"),
        (lambda: mo.Float(-1e308, 1e308), "must have a finite width, got -1e.308 and 1e.308"),
        (lambda: mo.Choice("a"), "at least two options, all different"),
        (lambda: mo.Choice(1, True), "at least two options, all different"),
        (lambda: make(space={}), "the search space must have a parameter, got {}"),
        (
            lambda: make(space={"m": mo.Float(0, 1, when={"o": "a"}), "o": mo.Choice("a", "b")}),
            r"Parameter 'm': `when` must name a Choice that stands before it, got 'o'",
        ),
        (
            lambda: make(space={"o": mo.Choice("a", "b"), "m": mo.Float(0, 1, when={"o": "c"})}),
            r"Parameter 'm' is never active: 'o' is one of \('a', 'b'\), got 'c'",
        ),
        (
            lambda: make(space={"o": mo.Choice("a", "b"), "m": mo.Float(0, 1, when={"o": []})}),
            r"Parameter 'm' is never active: 'o' is one of \('a', 'b'\), got \(\)",
        ),
        (lambda: mo.RandomSearch(seed=-1), "`seed` must be an integer of at least 0, got -1"),
        (lambda: mo.BoTorch(initial=0), "`initial` must be a positive integer, got 0"),
        (lambda: mo.OptunaJournal("x", patience=0), "`patience` must be a positive number, got 0"),
        (lambda: run(make(), 0), "`trials` must be a positive integer, got 0"),
        (
            lambda: run(make(), 1, executor=ThreadPoolExecutor(1)),
            "`parallel` must be a positive integer, got None",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){message}"):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mo.Int(1.0, 3), "Int: `low` must be an integer, got 1.0"),
        (lambda: mo.Float("a", 1.0), "Float: `low` must be a number, got 'a'"),
        (lambda: mo.Choice("a", None), "an option must be a text, a number or a truth value"),
        (lambda: mo.Float(0, 1, when="sgd"), "Float: `when` must be a dict, got 'sgd'"),
        (lambda: mo.Int(0, 1, when={"o": {"a"}}), "Int: a value of `when` must be a text, .*{'a'}"),
        (lambda: mo.Int(True, 3), "Int: `low` must be an integer, got True"),
        (lambda: make(space={"a": 3}), "names with Float, Int or Choice, got 'a': 3"),
        (lambda: mo.BlackBox("s", SPACE, loss), "`objective` must be a text.* argument of `run`"),
        (lambda: make("random"), "`backend` must be a Backend, got 'random'"),
        (lambda: run(make(), 1, "loss"), "`function` must be a function of the values"),
        (lambda: mo.Ax(constraints="x <= 1"), "`constraints` must be a tuple of texts"),
        (lambda: mo.Optuna(sampler=3), "`sampler` must be a function that makes the sampler"),
    ],
)
def test_what_is_of_another_type_is_refused(build: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build()


def test_a_parameter_is_there_only_where_its_condition_holds() -> None:
    search = make()
    run(search, 20)
    seen = {(t.values["optimizer"], "momentum" in t.values) for t in search.trials}
    assert seen == {("adam", False), ("sgd", True)}
    with pytest.raises(ValueError, match=r"The values \['momentum'\] are of no active parameter"):
        search.space.check({"rate": 0.1, "width": 8, "optimizer": "adam", "momentum": 0.5})
    with pytest.raises(ValueError, match=r"Parameter 'width' must lie in Int.*, got 300"):
        search.space.check({"rate": 0.1, "width": 300, "optimizer": "adam"})


def test_sobol_points_are_more_even_than_random_ones() -> None:
    """One of n = 32 points in each of 32 equal intervals of each axis, which a net guarantees."""
    search = make(mo.Sobol(seed=3), space=BRANIN)
    points = torch.tensor([list(search.ask().values.values()) for _ in range(32)])
    cells = ((points - torch.tensor([-5.0, 0.0])) / 15 * 32).long()
    assert all(len(set(axis.tolist())) == 32 for axis in cells.T)


# trials


def test_by_hand() -> None:
    search = mo.BlackBox("by hand", SPACE, "error", mo.RandomSearch(seed=2))
    first, second = search.ask(), search.ask()
    assert (first.number, second.number, first.status) == (0, 1, "running")
    search.tell(second, {"error": torch.tensor(0.5), "accuracy": 0.9})
    search.tell(first, np.float32(0.75))
    assert search.best.number == 1
    assert search.best.metrics == {"accuracy": 0.9}
    with pytest.raises(ValueError, match="trial 1 has ended before, done"):
        search.tell(second, 0.1)
    with pytest.raises(ValueError, match=r"result of a trial must have 'error', got \['loss'\]"):
        search.tell(search.ask(), {"loss": 1.0})
    with pytest.raises(ValueError, match="the trial must be one from `ask`, got 7"):
        search.tell(7, 1.0)  # type: ignore[arg-type]


def test_failed_and_non_finite_trials_are_recorded_and_survived(tmp_path: Path) -> None:
    def function(values: dict[str, Any]) -> Any:
        count = len(search.trials)
        if count == 2:
            raise RuntimeError("out of memory")
        if count == 3:
            raise mo.NonFiniteError("level 'learner'", 3, math.inf)
        return {1: math.nan, 4: -math.inf}.get(count, loss(values))

    for journal in (None, tmp_path / "trials.jsonl"):
        search = make(journal=journal)
        best = run(search, 6, function)
        expected = ["non-finite", "failed", "non-finite", "non-finite", "done", "done"]
        assert [trial.status for trial in search.trials] == expected
        assert [trial.loss is None for trial in search.trials] == [True] * 4 + [False] * 2
        assert best.status == "done"
        assert search.trials[1].error == "RuntimeError: out of memory"
        assert "trial 0: non-finite, the loss is nan" in search.table()
    assert known(make(journal=tmp_path / "trials.jsonl")) == known(search)


def test_a_search_in_which_all_fail_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"none of 2 trials has a finite loss\. Trial 0: KeyE"):
        run(make(), 2, lambda values: values["rat"])


@pytest.mark.parametrize(
    "result",
    [
        "good",
        None,
        [0.5],
        torch.ones(2),
        True,
        1j,
        np.ones(2),
        np.True_,
        torch.tensor(True),
        np.array("a"),
        torch.ones((), dtype=torch.complex64),
        torch.ones((), device="meta"),
        {"loss": "good"},
        {"loss": 0.5, 3: 0.5},
    ],
)
def test_an_objective_that_returns_no_number_ends_the_search(result: Any) -> None:
    search = make()
    message = "The loss of a trial must be one number, got |names .* must be texts, got 3"
    with pytest.raises(TypeError, match=message):
        run(search, 5, lambda values: result)
    with pytest.raises(TypeError, match=message):
        run(search, 5, lambda values: iter_once(result))
    assert [trial.status for trial in search.trials] == ["failed"] * 2


def iter_once(result: Any) -> Iterator[Any]:
    yield result


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (np.array(0.5), 0.5),
        (np.array([0.5], dtype=np.float16), 0.5),
        (np.int64(2), 2.0),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor([[2]]), 2.0),
        (Fraction(1, 2), 0.5),
        (-(10**400), None),
    ],
)
def test_one_number_of_any_library_is_a_loss(result: Any, expected: float | None) -> None:
    search = make()
    assert search.tell(search.ask(), {"loss": result, "other": result}).loss == expected


def test_reports_on_the_way(tmp_path: Path) -> None:
    """Without a backend that stops early, a loss that is not finite does."""

    def curve(values: dict[str, Any]) -> Iterator[float]:
        yield 3.0
        yield math.nan if len(search.trials) == 2 else 2.0
        yield 1.0

    search = make(journal=tmp_path / "trials.jsonl")
    run(search, 2, curve)
    assert [trial.reports for trial in search.trials] == [{1: 3.0, 2: 2.0, 3: 1.0}, {1: 3.0}]
    assert [trial.status for trial in search.trials] == ["done", "non-finite"]
    assert make(journal=tmp_path / "trials.jsonl").trials == search.trials
    with pytest.raises(ValueError, match="must return a number on an executor, got a generator"):
        run(make(), 1, curve, executor=ThreadPoolExecutor(1), parallel=1)

    def failing(values: dict[str, Any]) -> Iterator[float]:
        try:
            yield math.inf
        finally:
            if len(search.trials) == 1:
                raise KeyError("as it is stopped")

    search = make()
    with pytest.raises(RuntimeError, match="none of 2 trials has a finite loss"):
        run(search, 2, failing)
    assert [trial.status for trial in search.trials] == ["failed", "non-finite"]


def test_a_table_a_picture_and_tensorboard(tmp_path: Path) -> None:
    search = make()
    run(search, 5)
    lines = search.table(rows=3).splitlines()
    assert lines[0].split() == ["trial", *SPACE, "loss", "seconds"]
    losses = sorted(trial.loss for trial in search.trials)  # type: ignore[type-var]
    assert f"{losses[0]:.6g}" in lines[2]
    assert lines[-1] == "and 2 more that are done"
    search.plot(tmp_path / "plots/search.png")
    assert (tmp_path / "plots/search.png").stat().st_size > 10_000
    search.write_tensorboard(tmp_path / "board")
    assert len(list((tmp_path / "board").glob("trial-*"))) == 5
    board = EventAccumulator(str(tmp_path / f"board/trial-{search.best.number}"))
    board.Reload()
    (point,) = board.Scalars("metrics/loss")
    assert point.value == pytest.approx(search.best.loss)


# several at once


def slow_loss(values: dict[str, Any]) -> float:
    time.sleep(0.05)
    return loss(values)


class Job:
    """What a cluster's executor returns: no future of Python's."""

    def __init__(self, value: float):
        self.value, self.looks = value, 0

    def done(self) -> bool:
        self.looks += 1
        return self.looks > 2

    def exception(self) -> None: ...

    def result(self) -> float:
        return self.value


class Cluster(Executor):
    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Any:
        return Job(function(*arguments, **named))


@pytest.mark.parametrize(
    "make_pool",
    [partial(ThreadPoolExecutor, 2), partial(ProcessPoolExecutor, 2, FORK), Cluster],
    ids=["threads", "processes", "cluster"],
)
def test_trials_run_at_once_on_an_executor(make_pool: Any) -> None:
    search = make()
    with make_pool() as pool:
        run(search, 7, slow_loss, executor=pool, parallel=2)
    alone = make()
    run(alone, 7)
    assert known(search) == known(alone)


def test_a_broken_pool_loses_no_trial() -> None:
    search = make()
    with ProcessPoolExecutor(2, FORK) as pool, pytest.raises(BrokenProcessPool):
        run(search, 4, crash, executor=pool, parallel=2)
    assert {trial.status for trial in search.trials} == {"running"}
    run(search, 4)
    alone = make()
    run(alone, 4)
    assert known(search) == known(alone)
    assert search.trials[0].attempt == 2


def crash_at(rate: float, values: dict[str, Any]) -> float:
    if values["rate"] == rate:
        os._exit(1)
    return loss(values)


def test_a_trial_that_breaks_pools_fails_alone() -> None:
    """Those that ran beside it the first time are not suspected for ever."""
    alone, search = make(), make()
    run(alone, 4)
    function = partial(crash_at, alone.trials[1].values["rate"])
    for _ in range(3):
        with ProcessPoolExecutor(2, FORK) as pool, pytest.raises(BrokenProcessPool):
            run(search, 4, function, executor=pool, parallel=4)
    with ProcessPoolExecutor(2, FORK) as pool:
        run(search, 4, function, executor=pool, parallel=4)
    assert [trial.status for trial in search.trials] == ["done", "failed", "done", "done"]


class Bomb:
    """A function that kills who unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)

    def __call__(self, values: dict[str, Any]) -> float:
        return loss(values)


def test_a_function_that_a_pool_cannot_send_spends_no_trial() -> None:
    def local(values: dict[str, Any]) -> float:
        return loss(values)

    search = make()
    with ProcessPoolExecutor(1, FORK) as pool:
        for function in (lambda values: 1.0, local, partial(local), partial(loss, Lock())):
            with pytest.raises(
                TypeError, match=r"does not reach .* ProcessPoolExecutor \(.*top level"
            ):
                run(search, 3, function, executor=pool, parallel=1)
        assert run(make(), 1, loss, executor=pool, parallel=1).status == "done"  # it still works
    with ProcessPoolExecutor(1, FORK) as pool, pytest.raises(TypeError, match="BrokenProcessPool"):
        run(search, 3, Bomb(), executor=pool, parallel=1)
    with pytest.raises(BrokenProcessPool, match="not usable"):
        run(search, 3, loss, executor=pool, parallel=1)
    assert search.trials == []
    with ThreadPoolExecutor(1) as pool:
        assert run(search, 3, local, executor=pool, parallel=1).status == "done"


class OddError(Exception):
    """One that cannot be unpickled."""

    def __init__(self, first: int, second: int):
        super().__init__(f"{first} and {second}")


def fail_oddly(values: dict[str, Any]) -> float:
    if values["optimizer"] == "sgd":
        raise OddError(1, 2)
    return loss(values)


def give_a_function(values: dict[str, Any]) -> Any:
    return lambda: 3


def test_what_a_worker_sends_back_never_breaks_its_pool() -> None:
    search = make()
    with ProcessPoolExecutor(1, FORK) as pool:
        run(search, 6, fail_oddly, executor=pool, parallel=1)
        with pytest.raises(TypeError, match="The loss of a trial must be one number, got <func"):
            run(make(), 2, give_a_function, executor=pool, parallel=1)
    assert {trial.error for trial in search.trials} == {None, "OddError: 1 and 2"}


class Cancelled(Job):
    def __init__(self, error: BaseException):
        super().__init__(0.0)
        self.error = error

    def result(self) -> float:
        raise self.error

    def cancel(self) -> None: ...


class Stopping(Cluster):
    """A cluster of which one job ends in an error of its own."""

    def __init__(self, error: BaseException):
        self.jobs, self.error = 0, error

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Any:
        self.jobs += 1
        if self.jobs == 3:  # the second trial: the first job brings the function
            return Cancelled(self.error)
        return super().submit(function, *arguments, **named)


@pytest.mark.parametrize(
    ("error", "attempt"),
    [(KeyboardInterrupt(), 1), (CancelledError(), 1), (OSError("the node is gone"), 2)],
)
def test_an_error_of_the_executor_is_none_of_the_trial(error: BaseException, attempt: int) -> None:
    """It ends the search; what the worker did not survive counts as a death."""
    search = make()
    with pytest.raises(type(error)):
        run(search, 4, loss, executor=Stopping(error), parallel=1)
    assert [trial.status for trial in search.trials] == ["done", "running"]
    run(search, 4, loss, executor=Cluster(), parallel=2)
    assert [trial.status for trial in search.trials] == ["done"] * 4
    assert search.trials[1].attempt == attempt


# resumed from a file


def global_states() -> tuple[Any, ...]:
    """Return the states of the global generators of torch, numpy and Python."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), random.getstate()


def stop_at(number: int) -> Any:
    """Return the loss as a function that is interrupted in a trial."""
    left = iter(range(number))

    def function(values: dict[str, Any]) -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return loss(values)

    return function


@pytest.mark.parametrize(
    ("backend", "trials"),
    [
        (mo.RandomSearch(seed=5), 8),
        (mo.Sobol(seed=5), 8),
        (mo.Optuna(seed=5), 14),
        (mo.BoTorch(seed=5, initial=3), 4),
        (mo.Ax(seed=5, initial=2), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_resumed_search_suggests_what_it_would_have(
    backend: Any, trials: int, tmp_path: Path
) -> None:
    """The global generators do not matter, and are left as they were."""
    straight = make(backend, space=SPACE)
    before = global_states()
    run(straight, trials)
    assert global_states() == before

    path = tmp_path / "runs/trials.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(make(backend, path), trials, stop_at(trials - 2))
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002 - the global one
    path.write_bytes(path.read_bytes() + b'{"event": "end", "num')  # a crash while writing
    resumed = make(backend, path)
    run(resumed, trials)
    assert known(resumed) == known(straight)
    assert resumed.trials[trials - 2].attempt == 1  # an interruption is no death
    assert known(make(backend, path)) == known(straight)


def test_a_file_is_cut_off_anywhere(tmp_path: Path) -> None:
    """Whatever a crash leaves of the file, the search ends as it would have."""
    path, straight = tmp_path / "whole.jsonl", make()
    run(make(journal=path), 4)
    run(straight, 4)
    whole = path.read_bytes()
    for size in range(0, len(whole), 29):
        path.write_bytes(whole[:size])
        resumed = make(journal=path)
        run(resumed, 4)
        assert known(resumed) == known(straight)


def test_a_trial_is_told_by_a_later_process(tmp_path: Path) -> None:
    first = make(journal=tmp_path / "trials.jsonl")
    asked = [first.ask() for _ in range(3)]
    later = make(journal=tmp_path / "trials.jsonl")
    later.tell(later.trials[1], 0.5)
    assert later.best.values == asked[1].values
    assert [later.ask().number for _ in range(3)] == [0, 2, 3]


def interrupt(values: dict[str, Any]) -> float:
    raise KeyboardInterrupt


def terminate(values: dict[str, Any]) -> float:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    return 0.0


def kill(values: dict[str, Any]) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


@pytest.mark.parametrize("kind", ["file", "shared", "memory"])
def test_an_interrupted_trial_is_not_one_that_killed_its_process(kind: str, tmp_path: Path) -> None:
    """However often it is interrupted, its number of attempts stays."""
    search = make()
    for stop in (interrupt, terminate, interrupt, terminate):
        journals = {"file": tmp_path / "file", "shared": mo.OptunaJournal(tmp_path / "shared")}
        search = search if kind == "memory" else make(journal=journals[kind])
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            run(search, 2, stop)
        assert signal.getsignal(signal.SIGTERM) is before
    run(search, 2)
    assert [(t.status, t.attempt) for t in search.trials] == [("done", 1)] * 2


def test_a_trial_that_kills_its_process_fails_in_the_end(tmp_path: Path) -> None:
    """Interruptions between the deaths change nothing."""
    path = tmp_path / "trials.jsonl"
    for attempt in (1, 2, 3):
        worker = FORK.Process(target=lambda: run(make(journal=path), 2, kill))
        worker.start()
        worker.join(30)
        assert worker.exitcode == -signal.SIGKILL
        assert make(journal=path).trials[0].attempt == attempt
        if attempt < 3:
            with pytest.raises(KeyboardInterrupt):
                run(make(journal=path), 2, interrupt)
    search = make(journal=path)
    run(search, 2)
    assert [trial.status for trial in search.trials] == ["failed", "done"]
    assert search.trials[0].error == "the process that ran it died 3 times"


def test_an_interruption_of_a_trial_whose_end_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, update = tmp_path / "trials.jsonl", mo.JsonLines._update

    def stop(journal: mo.JsonLines, event: Any) -> None:
        if event["event"] == "end":
            raise KeyboardInterrupt
        update(journal, event)

    search = make(journal=path)
    with monkeypatch.context() as patch:
        patch.setattr(mo.JsonLines, "_update", stop)
        with pytest.raises(KeyboardInterrupt):
            run(search, 1)
    resumed = make(journal=path)
    run(resumed, 2)
    straight = make()
    run(straight, 2)
    assert known(resumed) == known(straight)
    assert path.read_bytes().count(b'"end"') == 2


def test_the_file_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    run(make(journal=path), 1)
    other = SPACE | {"width": mo.Int(8, 512, log=True)}
    with pytest.raises(ValueError, match=r"is of another search \(parameter 'width': Int\(low=8, "):
        make(journal=path, space=other)
    with pytest.raises(ValueError, match=r"\(objective: loss there, error here\)"):
        mo.BlackBox("search", SPACE, "error", journal=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [b"hello", *lines[1:]], "line 1 is not an event of a search"),
        (lambda lines: [*lines[:2], b"[]", *lines[2:]], "line 3 is not an event"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], "attempt 1 of trial 0, where 2 fol"),
        (lambda lines: [*lines, lines[2]], "trial 0 has ended before"),
        (lambda lines: [lines[0], *lines[2:]], "trial 0, where there are 0 before it"),
        (lambda lines: [lines[0], lines[1].replace(b"rate", b"rat")], "Parameter 'rate' must lie"),
        (lambda lines: [*lines[:2], lines[2].replace(b"done", b"good")], "the status 'good'"),
        (lambda lines: [*lines[:2], lines[2].replace(b"metrics", b"x")], "line 3 is not an event"),
        (lambda lines: [*lines[:2], re.sub(rb"loss.: .*?,", b'loss": NaN,', lines[2])], "loss nan"),
        (lambda lines: [*lines[:2], b"[" * 10**5], "line 3 is not an event"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    run(make(journal=path), 2)
    path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))
    with pytest.raises(ValueError, match=message):
        make(journal=path)


@pytest.mark.parametrize("content", [b"weights", b"{}\nweights", b'{"event": "search"}\n', b"\n"])
def test_a_file_of_something_else_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(content)
    for kind in (mo.JsonLines, mo.OptunaJournal):
        with pytest.raises(ValueError, match=r"weights.bin.* is not"):
            make(journal=kind(tmp_path / "weights.bin"))
    assert (tmp_path / "weights.bin").read_bytes() == content


def test_another_backend_goes_on_with_a_file(tmp_path: Path) -> None:
    """What is known is the same; who suggests may change."""
    path = tmp_path / "trials.jsonl"
    run(make(mo.RandomSearch(seed=1), path), 3)
    for trials, backend in enumerate((mo.Sobol(), mo.Optuna(seed=3), mo.RandomSearch(seed=2)), 4):
        run(make(backend, path), trials)
    first = make(mo.RandomSearch(seed=1))
    run(first, 3)
    assert known(make(journal=path))[:3] == known(first)
    assert [t.status for t in make(journal=path).trials] == ["done"] * 6


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    first, second = (make(journal=tmp_path / "trials.jsonl") for _ in range(2))
    run(second, 1)
    with pytest.raises(RuntimeError, match="was written by another process"):
        run(first, 1)
    assert known(make(journal=tmp_path / "trials.jsonl")) == known(second)


@pytest.mark.parametrize("room", [20, 200], ids=["begin", "end"])
def test_a_full_disk_leaves_whole_lines(room: int, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / "trials.jsonl"
    search = make(journal=path)
    run(search, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, before[1]))
        with pytest.raises(OSError, match=r"(?i)no space|too large"):
            run(search, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    run(search, 3)
    straight = make()
    run(straight, 3)
    assert known(search) == known(straight) == known(make(journal=path))


# shared by processes


def work(path: Path, victim: bool) -> None:
    """Run trials until there are nine; the victim stays in its second trial for ever."""

    def function(values: dict[str, Any]) -> float:
        time.sleep(0.02)
        if victim and (path.parent / "begun").exists():
            (path.parent / "inside").touch()
            time.sleep(60)
        (path.parent / "begun").touch()
        return loss(values)

    journal = mo.OptunaJournal(path, patience=0.4)
    run(make(mo.Optuna(seed=1), journal), 9, function)


def test_a_killed_worker_loses_no_trial_and_doubles_none(tmp_path: Path) -> None:
    path = tmp_path / "search.log"
    victim, other = (FORK.Process(target=work, args=(path, kind)) for kind in (True, False))
    victim.start()
    while not (tmp_path / "inside").exists():
        assert victim.is_alive()
        time.sleep(0.01)
    other.start()
    time.sleep(0.1)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    for process in (victim, other):
        process.join(60)
    assert (victim.exitcode, other.exitcode) == (-signal.SIGKILL, 0)

    shared = make(mo.Optuna(seed=1), mo.OptunaJournal(path))
    alone = make(mo.Optuna(seed=1))
    run(alone, 9)
    assert known(shared) == known(alone)  # of Optuna the first ten points are random
    assert [trial.attempt for trial in shared.trials] == [1, 2, *[1] * 7]
    ended = [json.loads(line) for line in path.read_text().splitlines()]
    assert len([event for event in ended if event.get("values")]) == 9


def test_a_shared_journal_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path, straight = tmp_path / "search.log", make()
    run(make(journal=mo.OptunaJournal(path)), 3)
    whole = path.read_bytes()
    run(straight, 3)
    for kept in (len(whole) - 1, len(whole) - 60, 4):
        path.write_bytes(whole[:kept])
        # the cut line is the end of trial 2, whose worker counts as dead, or the first of all
        resumed = make(journal=mo.OptunaJournal(path, patience=0.05))
        run(resumed, 3)
        assert known(make(journal=mo.OptunaJournal(path))) == known(straight)


def test_a_shared_journal_keeps_all_that_is_known_of_a_trial(tmp_path: Path) -> None:
    def function(values: dict[str, Any]) -> Any:
        count = len(search.trials)
        if count == 2:
            raise RuntimeError("out of memory")
        return {"loss": math.nan if count == 3 else loss(values), "accuracy": 0.5}

    for journal in (None, mo.OptunaJournal(tmp_path / "search.log")):
        search = make(mo.RandomSearch(seed=4), journal)
        run(search, 4, function)
        if journal is None:
            local = search
    assert known(search) == known(local)
    for a, b in zip(search.trials, local.trials, strict=True):
        assert (a.metrics, a.error, a.attempt) == (b.metrics, b.error, b.attempt)
    with pytest.raises(ValueError, match="is of another search"):
        make(journal=mo.OptunaJournal(tmp_path / "search.log"), space=BRANIN)

    released = search.ask()
    search.release(released)
    again = make(mo.RandomSearch(seed=4), mo.OptunaJournal(tmp_path / "search.log")).ask()
    assert (again.number, again.values, again.attempt) == (4, released.values, 1)
    search.tell(released, 0.25)  # its first worker lives: the result that comes first counts
    assert search.trials[4].loss == 0.25


# backends


@pytest.mark.parametrize("backend", [mo.BoTorch(), mo.Ax(seed=4)], ids=["BoTorch", "Ax"])
def test_branin(backend: Any) -> None:
    """The minimum is .398. docs/pages/guides/black-box.md has medians of five seeds.

    Once a search is there it need not go on to trial 20.
    """
    random_search, search = make(mo.RandomSearch(), space=BRANIN), make(backend, space=BRANIN)
    assert run(random_search, 20, branin).loss > 0.6  # type: ignore[operator]
    reached = (trials for trials in range(6, 21) if run(search, trials, branin).loss <= 0.6)  # type: ignore[operator]
    assert next(reached, None) is not None


@pytest.mark.parametrize("backend", [mo.BoTorch(initial=3), mo.Ax(initial=3), mo.Optuna()])
def test_suggestions_know_of_trials_that_still_run(backend: Any) -> None:
    search = make(backend, space={"x": mo.Float(0, 1)})
    for x in (0.0, 0.4, 1.0):
        search.tell(ask_for(search, {"x": x}), (x - 0.3) ** 2)
    places = [search.ask().values["x"] for _ in range(2)]
    assert abs(places[0] - places[1]) > 0.01  # type: ignore[operator]


def test_a_loss_that_blew_up_does_not_hide_the_others() -> None:
    def function(values: dict[str, Any]) -> float:
        x, y = values["x"], values["y"]
        return 1e9 * (x - 0.7) if x > 0.7 else (x - 0.2) ** 2 + (y - 0.7) ** 2

    search = make(mo.BoTorch(seed=2), space={"x": mo.Float(0, 1), "y": mo.Float(0, 1)})
    assert run(search, 12, function).loss < 1e-3  # type: ignore[operator]  # else 4e-2


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e300])
def test_a_model_takes_losses_of_any_size(scale: float) -> None:
    search = make(mo.BoTorch(initial=4), space={"x": mo.Float(0, 1)})
    run(search, 5, lambda values: scale * (values["x"] - 0.5))
    assert search.trials[4].status == "done"


def test_ax_comes_to_the_end_of_a_space_and_takes_one_of_any_size() -> None:
    search = make(mo.Ax(initial=2), space={"c": mo.Choice("a", "b")})
    options = [
        run(search, trials, lambda _: 1.0) and search.trials[-1].values for trials in (1, 2, 3, 4)
    ]
    assert options[:2] == options[2:]
    assert options[0] != options[1]
    wide = make(mo.Ax(initial=2), space={"n": mo.Int(-(2**53), 2**53)})
    numbers = [wide.ask().values["n"] for _ in range(2)]
    assert all(type(number) is int and abs(number) > 1e9 for number in numbers)


def test_ax_keeps_constraints_and_takes_what_a_developer_sets() -> None:
    from ax.adapter.registry import Generators
    from ax.generation_strategy.generation_node import GenerationNode
    from ax.generation_strategy.generation_strategy import GenerationStrategy
    from ax.generation_strategy.generator_spec import GeneratorSpec

    made = []

    def configure(client: Any) -> None:
        spec = GeneratorSpec(generator_enum=Generators.UNIFORM)
        node = GenerationNode(name="uniform", generator_specs=[spec])
        client.set_generation_strategy(GenerationStrategy(name="own", nodes=[node]))
        made.append(client)

    search = make(mo.Ax(constraints=("x + y <= 3",)), space=BRANIN)
    for _ in range(4):
        values = search.ask().values
        assert values["x"] + values["y"] <= 3  # type: ignore[operator]
    own = make(mo.Ax(constraints=("x + y <= 3",), configure=configure), space=BRANIN)
    points = [own.ask().values for _ in range(3)]
    assert len(made) == 3
    assert len({point["x"] for point in points}) == 3
    assert all(point["x"] + point["y"] <= 3 for point in points)  # type: ignore[operator]


def test_optuna_takes_another_sampler() -> None:
    import optuna

    seeds = []

    def sampler(seed: int) -> Any:
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed)

    search = make(mo.Optuna(sampler=sampler), space=BRANIN)
    run(search, 3, branin)
    assert len(set(seeds)) == len({trial.values["x"] for trial in search.trials}) == 3


def curve(values: dict[str, Any]) -> Iterator[float]:
    for step in range(1, 13):
        yield values["x"] + 10 / step


@pytest.mark.parametrize("backend", [mo.Optuna(), mo.Ax()], ids=["Optuna", "Ax"])
def test_bad_trials_are_stopped_early(backend: Any) -> None:
    """By hand, with chosen values: five good curves, then a bad one and a better one."""
    search = make(backend, space={"x": mo.Float(0, 100), "y": mo.Float(0, 1)})
    for number, x in enumerate((1.0, 2.0, 3.0, 4.0, 5.0)):
        trial = ask_for(search, {"x": x, "y": 0.5})
        for step, value in enumerate(curve(trial.values), start=1):
            search.journal.report(trial, step, value)
        search.tell(trial, value)
        assert search.trials[number].status == "done"
    bad, good = ask_for(search, {"x": 50.0, "y": 0.5}), ask_for(search, {"x": 0.5, "y": 0.5})
    for step, value in enumerate(curve(bad.values), start=1):
        if step < 11:
            search.journal.report(bad, step, value)
    for step, value in enumerate(curve(good.values), start=1):
        if step < 11:
            search.journal.report(good, step, value)
    assert search.report(bad, 11, 51.0)
    assert not search.report(good, 11, 1.4)
    assert search.tell(bad, 51.0, stopped=True).status == "stopped early"
    assert search.best.number != bad.number
    search.tell(ask_for(search, {"x": 60.0, "y": 0.5}), 60.0, stopped=True)  # without a report
    search.space.check(search.ask().values)  # goes on with such trials in the history


def ask_for(search: mo.BlackBox, values: dict[str, Any]) -> mo.Trial:
    trial = search.journal.begin(lambda trials: values, None)
    assert trial is not None
    return trial


def test_models_say_which_parameter_matters() -> None:
    for backend in (mo.Optuna(), mo.BoTorch(), mo.Ax()):
        space = {"x": mo.Float(0, 1), "y": mo.Float(0, 1), "c": mo.Choice("a", "b", "d")}
        search = make(backend, space=space)
        for trial in range(12):
            x, y, c = trial % 4 / 3, trial // 4 / 2, "abd"[trial % 3]
            search.tell(ask_for(search, {"x": x, "y": y, "c": c}), (x - 0.3) ** 2)
        found = search.find_importance()
        assert sum(found.values()) == pytest.approx(1)
        assert found["x"] > 0.8
        assert set(found) <= set(space)
    assert make().find_importance() == {}


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in SEARCH_PACKAGES:
            monkeypatch.delitem(sys.modules, name)
    for name in SEARCH_PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    install = r'It comes with the extra: pip install "torch-metaopt\[blackbox\]"'
    for backend, package in ((mo.Ax(), "ax-platform"), (mo.Optuna(), "optuna")):
        message = f"`{type(backend).__name__}` needs {package}, which is not installed. {install}"
        with pytest.raises(ModuleNotFoundError, match=message):
            make(backend).ask()
    assert make(mo.Sobol()).ask().number == 0


def test_options_are_those_that_a_file_gives_back() -> None:
    choice = mo.Choice(*np.logspace(-2, -1, 2), np.int64(3))
    assert choice == mo.Choice(*[float(x) for x in np.logspace(-2, -1, 2)], 3)
    assert [type(one) for one in choice.options] == [float, float, int]
    with pytest.raises(ValueError, match="an option must be finite, got inf"):
        mo.Choice(1.0, math.inf)

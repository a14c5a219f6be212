"""How a training shows how far it is, and what it says of wrong arguments."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import metaopt as mo
from metaopt.train import progress
from optimizers import Adam


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and a trainer leaves that as it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Counter:
    """A training that counts."""

    def __init__(self, metrics: Any = None):
        self.value, self.metrics = 0, metrics or {}

    def step(self) -> dict[str, Any]:
        self.value += 1
        return self.metrics

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_file_gets_a_line_every_thirty_seconds_and_one_at_the_end(
    capsys: Any, monkeypatch: Any
) -> None:
    """A case of a bar drawn twice a second into a log file: here one step takes 12 seconds."""
    now = iter(range(0, 10_000, 12))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    mo.Trainer(
        Counter(), max_steps=10, label="outer", validate=lambda: 0.25, validate_every=5
    ).fit()
    written = capsys.readouterr().err
    lines = written.splitlines()
    assert "\r" not in written
    assert len(lines) == 4
    assert lines[0].startswith(
        "outer: step 3 of 10, 48 s, 0.0625 steps/s, validation 0.25, best 0.25@0"
    )
    assert lines[-1].startswith("outer: step 10 of 10")


def test_a_quick_training_writes_one_line(capsys: Any) -> None:
    mo.Trainer(Counter(), max_steps=50).fit()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training: step 50 of 50")


def test_an_interrupted_training_says_where(capsys: Any) -> None:
    class Interrupted(Counter):
        def step(self) -> dict[str, Any]:
            if self.value == 3:
                raise KeyboardInterrupt
            return super().step()

    with pytest.raises(KeyboardInterrupt):
        mo.Trainer(Interrupted(), max_steps=50).fit()
    assert "training: step 3 of 50" in capsys.readouterr().err


def test_it_can_be_switched_off(capsys: Any) -> None:
    training = Counter()
    mo.Trainer(training, max_steps=5, validate=lambda: 1.0, progress=False).fit()
    captured = capsys.readouterr()
    assert (captured.err, captured.out) == ("", "")
    assert training.value == 0  # back at the best


def test_a_terminal_gets_a_bar(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    mo.Trainer(Counter(), max_steps=5, label="outer", validate=lambda: 0.5).fit()
    written = capsys.readouterr().err
    assert "\router: 100%" in written
    assert "best=0.5@0" in written


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"max_steps": True},
            TypeError,
            r"`max_steps` must be an integer, got True. Write max_steps=100",
        ),
        ({"max_steps": 2.0}, TypeError, r"`max_steps` must be an integer, got 2.0"),
        ({"max_steps": -1}, ValueError, r"`max_steps` must be positive, got -1"),
        (
            {"max_steps": 1, "validate_every": 0.5},
            TypeError,
            r"`validate_every` must be an integer, got 0.5",
        ),
        (
            {"max_steps": 1, "validate_every": None},
            TypeError,
            r"`validate_every` must be an integer, got None",
        ),
        (
            {"max_steps": 1, "validate_every": 0},
            ValueError,
            r"`validate_every` must be positive, got 0",
        ),
        (
            {"max_steps": 1, "validate": 0.5},
            TypeError,
            r"`validate` must be a function that returns a number, got 0.5",
        ),
        (
            {"max_steps": 1, "progress": "no"},
            TypeError,
            r"`progress` must be True or False, got 'no'",
        ),
        (
            {"max_steps": 1, "patience": 0},
            ValueError,
            r"`patience` must be positive, got 0",
        ),
        (
            {"max_steps": 1, "min_change": -1},
            ValueError,
            r"`min_change` must be a finite number, at least 0, got -1",
        ),
        (
            {"max_steps": 1, "time_limit": -3},
            ValueError,
            r"`time_limit` must be a positive number, got -3",
        ),
        (
            {"max_steps": 1, "checkpoint_every": 0.5},
            TypeError,
            r"`checkpoint_every` must be an integer, got 0.5",
        ),
        (
            {"max_steps": 1, "resume": "yes"},
            TypeError,
            r"`resume` must be True or False, got 'yes'",
        ),
        (
            {"max_steps": 1, "callbacks": [3]},
            TypeError,
            r"`callbacks` must be functions of \(trainer, metrics\) in a list, got \[3\]",
        ),
        (
            {"max_steps": 1, "logger": print},
            TypeError,
            r"`logger` must have the methods log, close, got builtin_function_or",
        ),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mo.Trainer(Counter(), **options)


def test_integers_of_other_libraries_are_integers() -> None:
    training = Counter()
    mo.Trainer(training, max_steps=np.int64(3), validate_every=np.int32(2), progress=False).fit()
    assert training.value == 3


def test_what_cannot_be_trained_is_named() -> None:
    with pytest.raises(
        TypeError,
        match=r"`training` must have the methods step, state_dict, load_state_dict, got Linear "
        r"without",
    ):
        mo.Trainer(torch.nn.Linear(1, 1), max_steps=1)


def test_a_metric_is_one_number() -> None:
    with pytest.raises(
        TypeError,
        match=r"The metric 'loss' must be one number, got a tensor of shape \(3,\). Take its mean",
    ):
        mo.Trainer(Counter({"loss": torch.ones(3)}), max_steps=1, progress=False).fit()
    with pytest.raises(
        TypeError, match=r"What `validate` returns must have 'loss', .* got \['accuracy'\]"
    ):
        mo.Trainer(Counter(), max_steps=1, validate=lambda: {"accuracy": 1.0}, progress=False).fit()
    with pytest.raises(TypeError, match=r"What `validate` returns must be one number, got None"):
        mo.Trainer(Counter(), max_steps=1, validate=lambda: None, progress=False).fit()  # type: ignore[arg-type,return-value]


class Notes:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, step: int, metrics: Any) -> None:
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("values", "patience", "min_change", "ends"),
    [
        ([5, 4, 3, 2, 1, 0], 2, 0.0, (5, "max_steps", 0)),
        ([5, 4, 4, 4, 3, 2], 2, 0.0, (3, "patience", 4)),
        ([5, 4, 3.9, 3.8, 1, 0], 2, 0.5, (3, "patience", 3.8)),
        ([5, 4.6, 4.2, 3.8, 1, 0], 2, 0.5, (5, "max_steps", 0)),
        ([math.nan, 4, math.nan, math.nan, 3, 2], 2, 0.0, (3, "patience", 4)),
        ([math.nan] * 6, 3, 0.0, (2, "patience", math.inf)),
    ],
)
def test_it_ends_when_nothing_gets_better(
    values: list[float], patience: int, min_change: float, ends: Any
) -> None:
    """Small changes add up; a nan is no change for the better."""
    each = iter(values)
    trainer = mo.Trainer(
        Counter(),
        max_steps=5,
        validate=lambda: next(each),
        validate_every=1,
        patience=patience,
        min_change=min_change,
        progress=False,
    )
    trainer.fit()
    assert (trainer.step, trainer.stopped_by, trainer.best) == ends


def test_several_validations_are_logged_and_the_loss_decides() -> None:
    notes, training = Notes(), Counter()
    seen: list[Any] = []
    trainer = mo.Trainer(
        training,
        max_steps=4,
        validate=lambda: {"accuracy": training.value, "loss": abs(training.value - 2)},
        validate_every=2,
        logger=notes,
        callbacks=[lambda _, metrics: seen.append(dict(metrics))],
        progress=False,
    )
    trainer.fit()
    assert (trainer.best, trainer.best_step, training.value) == (0, 2, 2)
    assert (4, {"validation/accuracy": 4.0, "validation/loss": 2.0}) in notes.rows
    assert seen[0] == {}
    assert seen[1] == {"validation/accuracy": 2.0, "validation/loss": 0.0}


def test_a_loop_from_outside_is_the_same_as_fit(tmp_path: Path) -> None:
    one, other = Counter({"loss": 1.5}), Counter({"loss": 1.5})
    notes = Notes()
    mo.Trainer(one, max_steps=5, progress=False).fit()
    trainer = mo.Trainer(
        other, max_steps=5, logger=notes, checkpoint=tmp_path, checkpoint_every=2, progress=False
    )
    assert [metrics["loss"] for metrics in trainer] == [1.5] * 5
    assert (one.value, other.value, trainer.stopped_by) == (5, 5, "max_steps")
    assert notes.closed == 1
    again = mo.Trainer(
        other, max_steps=9, logger=notes, checkpoint=tmp_path, resume=True, progress=False
    )
    for _ in again:
        if again.step == 7:
            break
    assert (other.value, notes.closed) == (7, 2)


def test_two_loops_at_once_are_refused() -> None:
    training = Counter()
    trainer = mo.Trainer(training, max_steps=3, progress=False)
    first = iter(trainer)
    next(first)
    for second in (trainer.fit, lambda: next(iter(trainer))):
        with pytest.raises(RuntimeError, match=r"is at step 1 of 3, and a second one would move"):
            second()
    assert training.value == trainer.step == 1
    next(first)  # the refusal leaves it as it was
    first.close()
    trainer.fit()
    assert trainer.step == 3


def test_an_error_at_the_end_leaves_no_loop_open(monkeypatch: Any) -> None:
    """A bar whose pipe is closed: the best state comes back, and another loop may begin."""

    def fail(self: Any) -> None:
        raise OSError("broken pipe")

    training = Counter()
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    trainer = mo.Trainer(
        training, max_steps=2, validate=lambda: next(losses), validate_every=1, progress=False
    )
    with monkeypatch.context() as patch:
        patch.setattr(progress.Bar, "close", fail)
        with pytest.raises(OSError, match="broken pipe"):
            trainer.fit()
    assert training.value == trainer.best_step == 1
    trainer.fit()
    assert trainer.step == 2


def test_a_refused_trainer_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`time_limit` must be a positive number, got -1"):
        mo.Trainer(Counter(), max_steps=2, checkpoint=tmp_path / "run", time_limit=-1.0)
    assert not (tmp_path / "run").exists()


def test_a_callback_can_stop_it() -> None:
    def stop(trainer: mo.Trainer, metrics: Any) -> None:
        if trainer.step == 3:
            trainer.stop()

    training = Counter()
    trainer = mo.Trainer(training, max_steps=50, callbacks=[stop], progress=False)
    trainer.fit()
    assert (training.value, trainer.stopped_by) == (3, "stop")


def test_the_time_is_up(tmp_path: Path, capsys: Any) -> None:
    class Slow(Counter):
        def step(self) -> dict[str, Any]:
            time.sleep(0.02)
            return super().step()

    training = Slow()
    trainer = mo.Trainer(training, max_steps=500, time_limit=0.05, checkpoint=tmp_path)
    trainer.fit()
    assert trainer.stopped_by == "time_limit"
    assert 1 <= training.value <= 4
    assert mo.Checkpoints(tmp_path).steps() == [training.value]
    assert (
        f"The time is up at step {training.value}. It is saved in {tmp_path}. Run it again with"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves(number: signal.Signals, tmp_path: Path) -> None:
    class Signalled(Counter):
        def step(self) -> dict[str, Any]:
            if self.value == 3:
                os.kill(os.getpid(), number)
            return super().step()

    before = signal.getsignal(number)
    training = Signalled()
    trainer = mo.Trainer(training, max_steps=50, checkpoint=tmp_path, progress=False)
    with pytest.raises(
        KeyboardInterrupt,
        match=f"{number.name} after step 4 of 50. It is saved in .* again with `resume=True` to go",
    ):
        trainer.fit()
    assert training.value == 4
    assert mo.Checkpoints(tmp_path).steps() == [4]
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_it_at_once() -> None:
    class Signalled(Counter):
        def step(self) -> dict[str, Any]:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            return super().step()

    training = Signalled()
    with pytest.raises(KeyboardInterrupt):
        mo.Trainer(training, max_steps=50, progress=False).fit()
    assert training.value == 0


def test_a_logger_that_fails_is_reported_once() -> None:
    class Broken(Notes):
        def log(self, step: int, metrics: Any) -> None:
            raise ConnectionError("no network")

        close = None  # type: ignore[assignment]

    class BrokenToo(Broken):
        def close(self) -> None:
            raise OSError("no disk")

    training = Counter({"loss": 1.0})
    with pytest.warns(
        UserWarning, match=r"The logger BrokenToo failed at step 1: ConnectionError\('no network'\)"
    ) as caught:
        mo.Trainer(training, max_steps=5, logger=BrokenToo(), progress=False).fit()
    assert training.value == 5
    assert len(caught) == 1


def test_a_logger_gets_pace_and_memory(monkeypatch: Any) -> None:
    from metaopt.train import reporting as module

    monkeypatch.setattr(module, "SECONDS_BETWEEN_MEASURES", 0.0)
    notes = Notes()
    mo.Trainer(Counter({"loss": 2.0}), max_steps=2, logger=notes, progress=False).fit()
    assert [step for step, row in notes.rows if "loss" in row] == [1, 2]
    measured = [row for _, row in notes.rows if "steps per second" in row]
    assert len(measured) == 2
    assert measured[0]["steps per second"] > 0
    assert 50 < measured[0]["peak memory (MiB)"] < 1e6


def test_the_progress_shows_the_loss_and_goes_on_where_it_was(tmp_path: Path, capsys: Any) -> None:
    training = Counter({"low/loss": 9.0, "top/loss": torch.tensor(0.125), "norm": 1.0})
    mo.Trainer(training, max_steps=2, checkpoint=tmp_path).fit()
    assert ", top/loss 0.125" in capsys.readouterr().err
    mo.Trainer(training, max_steps=3, checkpoint=tmp_path, resume=True).fit()
    assert "training: step 3 of 3" in capsys.readouterr().err
    assert training.value == 3


def test_it_costs_a_few_microseconds_a_step(tmp_path: Path) -> None:
    """At most 3 % of steps of 1 ms, with a checkpoint after every 1000 of them.

    The processor's time, the best of three: others are at work on the machine.
    """
    training = Counter({"loss": 1.0, "norm": torch.tensor(2.0)})

    def spend(place: Path) -> float:
        began = time.process_time()
        mo.Trainer(training, max_steps=3000, checkpoint=place, progress=False).fit()
        return time.process_time() - began

    assert min(spend(tmp_path / str(i)) for i in range(3)) < 0.03 * 3000 * 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_a_loss_leaves_state_and_gradients_in_float32(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def loss(params: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            out = torch.nn.functional.linear(batch, params["w"]).relu()
        seen.append(out.dtype)
        return out.float().square().mean()

    w, x = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    out = mo.minimize(loss, Adam(0.01), {"w": w}, x, steps=3)
    (found,) = torch.autograd.grad(loss(out.params, x), w)
    assert set(seen) == {dtype}
    leaves = mo.tree.leaves((out.params, out.opt_state["slots"], found))
    assert {leaf.dtype for leaf in leaves} == {torch.float32}
    full = mo.minimize(
        lambda p, x: torch.nn.functional.linear(x, p["w"]).relu().square().mean(),
        Adam(0.01),
        {"w": w},
        x,
        steps=3,
    )
    # Adam's steps are of one size whatever the gradient's, so that rounding shows little
    torch.testing.assert_close(out.params["w"], full.params["w"], rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_compute_in_a_precision_and_keep_their_state_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3)

    def loss(levels: mo.Levels, batch: Any) -> torch.Tensor:
        return (levels.low(batch) * levels.top(batch)).float().square().mean()

    low = mo.Level("low", torch.nn.Linear(3, 2), loss, Adam(0.01), [x], precision=dtype)
    top = mo.Level(
        "top",
        torch.nn.Linear(3, 2),
        lambda s, b: s.low(b).float().square().mean(),
        Adam(0.01),
        [x],
        precision=dtype,
    )
    graph = mo.LevelGraph([mo.Edge(top, low)])
    mo.Trainer(graph, max_steps=3, progress=False).fit()
    state = graph.state_dict()["levels"]["top"]
    tensors = (state["params"], state["optimizer"]["slots"], state["below"]["low"]["params"])
    assert {leaf.dtype for leaf in mo.tree.leaves(tensors)} == {torch.float32}
    grads = graph.hypergradient("top")
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


def test_a_loss_that_is_not_finite_ends_it_with_where_it_was(tmp_path: Path) -> None:
    """At the lower level; the checkpoint before is there."""
    data = [torch.ones(2, 3)] * 4 + [torch.full((2, 3), torch.nan)]
    low = mo.Level(
        "low",
        torch.nn.Linear(3, 1),
        lambda s, b: (s.low(b) * s.top(torch.ones(3))).square().mean(),
        Adam(0.01),
        data,
    )
    top = mo.Level(
        "top", torch.nn.Linear(3, 1), lambda s, _: s.low(torch.ones(3)).sum(), Adam(0.01)
    )
    graph = mo.LevelGraph([mo.Edge(top, low)])
    trainer = mo.Trainer(
        graph, max_steps=9, checkpoint=tmp_path, checkpoint_every=2, progress=False
    )
    with pytest.raises(mo.NonFiniteError, match="level 'low', step 4"):
        trainer.fit()
    assert mo.Checkpoints(tmp_path).steps() == [2, 4]


def test_a_solver_says_how_it_did_at_its_edge() -> None:
    """Conjugate gradients on a quadratic with two different eigenvalues: exact in two steps."""
    scales = torch.tensor([1.0, 3.0, 3.0], dtype=torch.float64)

    class Value(torch.nn.Module):
        def __init__(self, value: list[float]):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))

        def forward(self) -> torch.Tensor:
            return self.w

    low = mo.Level(
        "low",
        Value([0.0, 0.0, 0.0]),
        lambda s, _: (scales * (s.low() - s.top()) ** 2).sum() / 2,
        Adam(0.1),
    )
    top = mo.Level(
        "top", Value([1.0, 2.0, 3.0]), lambda s, _: (s.low() ** 2 + s.low()).sum(), Adam(0.1)
    )
    rule = mo.Implicit(mo.ConjugateGradient(max_steps=9, rtol=1e-12))
    notes = Notes()
    graph = mo.LevelGraph([mo.Edge(top, low, steps=3, differentiate=rule)])
    mo.Trainer(graph, max_steps=2, logger=notes, progress=False).fit()
    _, row = notes.rows[-1]
    assert row["low/solver steps"] == 2
    assert 0 <= row["low/solver residual"] < 1e-10
    assert row["top/gradient norm"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": True}, "needs a folder to go on from: give `checkpoint=`"),
        ({"patience": 2}, "`patience=2` counts validations: give `validate=`"),
        ({"time_limit": 0}, "`time_limit` must be a positive number, got 0"),
    ],
)
def test_what_would_do_nothing_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mo.Trainer(Counter(), max_steps=3, **options)


def test_a_signal_in_the_last_step_is_heard() -> None:
    """What comes after the training, another one perhaps, is not to begin."""

    def signal_at_the_end(trainer: mo.Trainer, metrics: Any) -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = mo.Trainer(Counter(), max_steps=2, callbacks=[signal_at_the_end], progress=False)
    with pytest.raises(KeyboardInterrupt, match="SIGINT after step 2 of 2"):
        trainer.fit()


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = mo.Trainer(
            Counter(),
            max_steps=2,
            callbacks=[lambda *_: os.kill(os.getpid(), signal.SIGINT)],
            progress=False,
        )
        trainer.fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.stopped_by == "max_steps"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_body_of_a_loop_saves_and_ends_it_there(
    number: signal.Signals, tmp_path: Path
) -> None:
    training, before = Counter(), signal.getsignal(number)
    steps = iter(mo.Trainer(training, max_steps=50, checkpoint=tmp_path, progress=False))
    next(steps), next(steps)
    with pytest.raises(KeyboardInterrupt, match=f"{number.name} after step 2 of 50. It is saved"):
        os.kill(os.getpid(), number)
    assert mo.Checkpoints(tmp_path).steps() == [2]
    assert signal.getsignal(number) is before  # though the iterator is still there
    again = Counter()
    mo.Trainer(again, max_steps=3, checkpoint=tmp_path, resume=True, progress=False).fit()
    assert again.value == 3
    with pytest.raises(KeyboardInterrupt, match=f"{number.name} after step 3 of 50"):
        next(steps)  # it is not forgotten


def test_an_iterator_that_is_dropped_gives_the_signals_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    for drop in ("close", "forget", "never begin"):
        steps: Any = iter(mo.Trainer(Counter(), max_steps=50, progress=False))
        if drop != "never begin":
            next(steps)
            assert signal.getsignal(signal.SIGINT) is not before
        if drop == "close":
            steps.close()
        del steps
        assert signal.getsignal(signal.SIGINT) is before


def test_a_step_must_return_metrics() -> None:
    class Silent(Counter):
        def step(self) -> Any:
            self.value += 1

    with pytest.raises(
        TypeError, match=r"`step` of Silent must return its metrics, .* got None. Return \{\} if"
    ):
        mo.Trainer(Silent(), max_steps=2, progress=False).fit()


def test_inner_callbacks_see_each_step_of_each_level(tmp_path: Path) -> None:
    """Every second step of the lower level is logged; a trainer can be stopped from inside."""

    def loss(levels: mo.Levels, batch: Any) -> torch.Tensor:
        return (levels.low(batch) - levels.top(batch)).square().mean()

    x = torch.randn(4, 3)
    low = mo.Level("low", torch.nn.Linear(3, 1), loss, Adam(0.01), [x])
    top = mo.Level("top", torch.nn.Linear(3, 1), lambda s, b: s.low(b).mean(), Adam(0.01), [x])
    graph = mo.LevelGraph([mo.Edge(top, low, steps=3)])
    notes, seen = Notes(), list[Any]()

    def log(trainer: mo.Trainer, level: str, step: int, metrics: Any) -> None:
        seen.append((trainer.step, level, step))
        if level == "low" and step % 2 == 0:
            trainer.log(step, {"low/inner loss": metrics["loss"]})
        if step == 5:
            trainer.stop()

    trainer = mo.Trainer(graph, max_steps=4, logger=notes, inner_callbacks=[log], progress=False)
    trainer.fit()
    assert (trainer.step, trainer.stopped_by) == (2, "stop")
    rows = [(step, *row) for step, row in notes.rows if "low/inner loss" in row]
    assert rows == [(step, "low/inner loss") for step in (2, 4, 6)]
    assert dict(notes.rows)[6]["low/inner loss"] == notes.rows[-1][1]["low/loss"]
    lows = [(step // 3, "low", step + 1) for step in range(6)]
    assert seen == [*lows[:3], (0, "top", 1), *lows[3:], (1, "top", 2)]
    mo.Trainer(Counter(), max_steps=1).log(1, {"nobody": 1.0})  # hears it


def test_inner_callbacks_need_inner_steps() -> None:
    with pytest.raises(
        TypeError, match=r"`inner_callbacks` need a training whose `step` takes `on_step`.*Counter"
    ):
        mo.Trainer(Counter(), max_steps=1, inner_callbacks=[print])
    with pytest.raises(TypeError, match=r"`inner_callbacks` must be functions of .*, got \[3\]"):
        mo.Trainer(Counter(), max_steps=1, inner_callbacks=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"`logger` must be an object, .* Write Notes\(\.\.\.\)"):
        mo.Trainer(Counter(), max_steps=1, logger=Notes)  # type: ignore[arg-type]

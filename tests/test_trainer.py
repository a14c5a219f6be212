"""How a training shows how far it is, and what it says of wrong arguments."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

import metaopt as mo
from metaopt.train import progress


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
    with pytest.raises(TypeError, match=r"What `validate` returns must be one number, got None"):
        mo.Trainer(Counter(), max_steps=1, validate=lambda: None, progress=False).fit()  # type: ignore[arg-type,return-value]

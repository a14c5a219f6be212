"""Who is told of each step of each level, and of what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD


class Value(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, *_: Any) -> Tensor:
        return self.w


def make_graph(rule: mo.Rule, copies: int | None = None, **options: Any) -> mo.LevelGraph:
    """Return max w, the lower level, drawn to x v, which is that of the upper: v -> w."""

    def low_loss(levels: mo.Levels, x: Tensor) -> Any:
        error = levels.low() - x * levels.top()
        return {"loss": error**2 / 2, "error": error}

    data = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    batches = [*data] if copies is None else [row.repeat(copies) for row in data]
    low = mo.Level("low", Value(0.0), low_loss, SGD(0.5), data=batches, copies=copies)
    top = mo.Level("top", Value(1.0), lambda s, _: (s.low() - 2) ** 2 / 2, SGD(0.1))
    return mo.LevelGraph([mo.Edge(top, low, steps=3, differentiate=rule)], **options)


RULES = [
    mo.Backprop(),
    mo.Backprop(memory="steps"),
    mo.Backprop(memory=mo.Revolve(1)),
    mo.ForwardMode(),
    mo.T1T2(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_step_is_told_once_with_its_own_loss(rule: mo.Rule) -> None:
    """w' = w - (w - x v) / 2 by hand; steps that are made again on the way back are not told."""
    graph, told = make_graph(rule), []

    def note(level: str, step: int, metrics: dict[str, Tensor]) -> None:
        assert not any(value.requires_grad for value in metrics.values())
        assert not torch.is_grad_enabled()
        told.append((level, step, {name: value.item() for name, value in metrics.items()}))

    w, v = 0.0, 1.0
    for k in range(2):
        found = graph.step(note)
        for i in range(3):
            error = w - (3 * k + i + 1) * v
            level, step, metrics = told.pop(0)
            assert (level, step) == ("low", 3 * k + i + 1)
            assert metrics == pytest.approx({"loss": error**2 / 2, "error": error}, rel=1e-12)
            w -= error / 2
        level, step, metrics = told.pop(0)
        assert (level, step) == ("top", k + 1)
        assert metrics == pytest.approx(
            {name: float(found[f"top/{name}"]) for name in ("loss", "gradient norm")}
        )
        assert metrics["loss"] == pytest.approx((w - 2) ** 2 / 2)
        v = graph.params("top")["w"].item()
    assert not told
    assert graph.state_dict()["steps"] == 2


@pytest.mark.parametrize("one_by_one", [False, True])
def test_copies_are_told_together_or_one_after_the_other(
    one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has one number in both cases."""
    monkeypatch.setattr("metaopt.levels.graph.prefers_loop", lambda *_: one_by_one)
    told: list[tuple[str, int, list[int]]] = []
    graph = make_graph(mo.Backprop(), copies=2)
    for _ in range(2):
        graph.step(lambda level, step, now: told.append((level, step, list(now["loss"].shape))))
    if one_by_one:
        expected = [("low", step, []) for _ in range(2) for step in (1, 2, 3)]
        later = [(level, step + 3, shape) for level, step, shape in expected]
    else:
        expected = [("low", step, [2]) for step in (1, 2, 3)]
        later = [("low", step, [2]) for step in (4, 5, 6)]
    assert told == [*expected, ("top", 1, []), *later, ("top", 2, [])]


def test_a_step_that_is_stopped_by_who_is_told_changes_nothing() -> None:
    graph = make_graph(mo.Backprop())

    def refuse(level: str, step: int, metrics: dict[str, Tensor]) -> None:
        if step == 2:
            raise RuntimeError("enough")

    before = graph.params("low")["w"].clone()
    with pytest.raises(RuntimeError, match="enough"):
        graph.step(refuse)
    assert torch.equal(graph.params("low")["w"], before)
    told = []
    graph.step(lambda level, step, now: told.append(step))
    assert told == [1, 2, 3, 1]  # nobody is told twice, and nobody of the last time


def test_compiled_loops_tell_nobody() -> None:
    graph = make_graph(mo.Backprop(), compile=True)
    with pytest.raises(ValueError, match=r"cannot report each .* compile=True\. Leave `comp"):
        graph.step(print)

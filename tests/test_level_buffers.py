"""Derivatives through the buffers of a level.

Averages of weights that losses read, against autograd through loops by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from level_problems import CG, Value, batches, level
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD

LR = 0.2


class Averaged(nn.Module):
    """w, and a buffer with a moving average of it, which every call moves on."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = nn.Parameter(torch.as_tensor(value).clone())
        self.register_buffer("ema", torch.zeros_like(self.value.detach()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        self.ema = 0.5 * self.ema + 0.5 * self.value
        self.calls.add_(1)
        return self.value


class Filled(Averaged):
    """The same with an average that begins at w, as a constant, when it is called first."""

    def forward(self) -> Tensor:
        if self.calls > 0:
            return super().forward()
        self.ema = self.value.detach().clone()
        self.calls.add_(1)
        return self.value


def low_loss(w: Tensor, ema: Tensor | None, v: Tensor, x: Tensor) -> Tensor:
    """Return a loss of the lower level, which pulls w towards its average if it is given."""
    loss = (torch.sin(w) - v * x).square().sum() + 0.1 * (w * w * v).sum()
    return loss if ema is None else loss + 0.3 * (w - ema).square().sum()


def up_loss(v: Tensor, seen: Tensor, x: Tensor) -> Tensor:
    return (torch.tanh(seen) - x).square().sum() + 0.05 * v.square().sum()


READERS = {"above": (True, False), "itself": (False, True), "both": (True, True)}


def problem(
    reader: str,
    rule: Any,
    *,
    steps: int = 3,
    accumulate: int = 1,
    copies: int | None = None,
    model: type[Averaged] = Averaged,
    **edge: Any,
) -> mo.LevelGraph:
    above, itself = READERS[reader]
    rows, tests = batches(5, 1), batches(4, 2)
    if copies:
        rows, tests = (
            [torch.stack([row, 0.5 - row]) for row in rows],
            [torch.stack([row, row.cos()]) for row in tests],
        )

    def of_low(levels: Any, x: Tensor) -> Tensor:
        w = levels.low()
        return low_loss(w, levels.low.buffers["ema"] if itself else None, levels.up(), x)

    def of_up(levels: Any, x: Tensor) -> Tensor:
        seen = levels.low.buffers["ema"] if above else levels.low()
        return up_loss(levels.up(), seen, x)

    start = batches(2, 3)
    low = mo.Level(
        "low", model(start[0]), of_low, SGD(LR), data=rows, accumulate=accumulate, copies=copies
    )
    up = level("up", start[1], of_up, 0.1, data=tests)
    return mo.LevelGraph([mo.Edge(up, low, steps=steps, differentiate=rule, **edge)])


def by_hand(
    reader: str,
    *,
    steps: int = 3,
    accumulate: int = 1,
    outer: int = 2,
    first_order: bool = False,
    window: int | None = None,
) -> list[Tensor]:
    """Return the hypergradients of several upper steps, by autograd through everything."""
    above, itself = READERS[reader]
    rows, tests = batches(5, 1), batches(4, 2)
    w, v = batches(2, 3)
    ema, taken, found = torch.zeros_like(w), 0, []
    for t in range(outer):
        v = v.detach().requires_grad_()
        w, ema = w.detach().requires_grad_(), ema.detach()
        for k in range(steps):
            if window is not None and k == steps - window:
                w, ema = w.detach().requires_grad_(), ema.detach()
            at = w
            losses = []
            for _ in range(accumulate):
                ema = 0.5 * ema + 0.5 * at
                losses.append(low_loss(at, ema if itself else None, v, rows[taken % 5]))
                taken += 1
            (grad,) = torch.autograd.grad(sum(losses) / accumulate, at, create_graph=True)
            w = at - LR * (grad.detach() if first_order else grad)
        (grad,) = torch.autograd.grad(up_loss(v, ema if above else w, tests[t % 4]), v)
        found.append(grad)
        v = v.detach() - 0.1 * grad
    return found


RULES: list[tuple[Any, dict[str, Any]]] = [
    (mo.Backprop(), {}),
    (mo.Backprop(memory="steps"), {}),
    (mo.Backprop(memory=mo.Revolve(1)), {}),
    (mo.ForwardMode(), {}),
    (mo.Backprop(window=1), {"window": 1}),
    (mo.Backprop(memory="steps", window=2), {"window": 2}),
    (mo.FirstOrder(), {"first_order": True}),
    (mo.FirstOrder(memory="steps"), {"first_order": True}),
]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("rule", "by"), RULES, ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_a_loss_that_depends_on_an_average_of_weights(
    reader: str, rule: Any, by: dict[str, Any], accumulate: int
) -> None:
    """Its derivative was dropped between two evaluations of the lower loss."""
    graph = problem(reader, rule, accumulate=accumulate)
    for expected in by_hand(reader, accumulate=accumulate, **by):
        found = graph.hypergradient("up", after_steps=True)["value"]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        graph.step()


@pytest.mark.parametrize("model", [Averaged, Filled])
@pytest.mark.parametrize("rule", [mo.Backprop(), mo.Backprop("steps")], ids=["full", "steps"])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("reader", READERS)
def test_the_derivative_is_that_of_differences(
    reader: str, steps: int, rule: Any, model: type[Averaged]
) -> None:
    """Also if the buffer moves from the second step on alone."""
    graph = problem(reader, rule, model=model)
    for _ in range(steps):
        graph.step()
    found, at = graph.hypergradient("up")["value"], graph.params("up")["value"]
    for i in range(3):
        e = torch.zeros_like(at)
        e[i] = 1e-5
        ahead, behind = (graph.objective("up", {"value": at + sign * e}) for sign in (1, -1))
        torch.testing.assert_close(found[i], (ahead - behind) / 2e-5, rtol=1e-8, atol=1e-9)


def test_an_evolution_strategy_sees_it_too() -> None:
    (expected,) = by_hand("above", outer=1)
    found = problem("above", mo.EvolutionStrategy(1e-3, 4000)).hypergradient(
        "up", after_steps=True
    )["value"]
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("rule", [mo.Backprop(), mo.Backprop(memory="steps")], ids=str)
def test_each_copy_has_an_average_of_its_own(rule: Any) -> None:
    graph = problem("both", rule, copies=2)
    found = graph.hypergradient("up")["value"]
    w, v = batches(2, 3)
    v.requires_grad_()
    totals = []
    for i in range(2):
        at, ema = w.clone().requires_grad_(), torch.zeros_like(w)
        for row in batches(5, 1)[:3]:
            ema = 0.5 * ema + 0.5 * at
            (grad,) = torch.autograd.grad(
                low_loss(at, ema, v, [row, 0.5 - row][i]), at, create_graph=True
            )
            at = at - LR * grad
        test = batches(4, 2)[0]
        totals.append(up_loss(v, ema, [test, test.cos()][i]))
    (expected,) = torch.autograd.grad(sum(totals) / 2, v)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def graph_of(rules: tuple[Any, Any], reads: str) -> mo.LevelGraph:
    """Return top -> mid -> low, of which mid and low have averages.

    `reads` says who reads whose.
    """
    start = batches(3, 5)

    def seen(levels: Any, reader: str, name: str) -> Tensor:
        return (
            getattr(levels, name).buffers["ema"]
            if f"{reader}:{name}" in reads
            else getattr(levels, name)()
        )

    def of_low(levels: Any, x: Tensor) -> Tensor:
        return low_loss(levels.low(), None, levels.mid() + 0.5 * seen(levels, "low", "mid"), x)

    def of_mid(levels: Any, x: Tensor) -> Tensor:
        return low_loss(levels.mid(), None, levels.top(), x) + up_loss(
            levels.top(), seen(levels, "mid", "low"), x
        )

    def of_top(levels: Any, x: Tensor) -> Tensor:
        return (
            up_loss(levels.top(), seen(levels, "top", "mid"), x)
            + (seen(levels, "top", "low") if "top:low" in reads else x).sum()
        )

    low = mo.Level("low", Averaged(start[0]), of_low, SGD(LR), data=batches(2, 6))
    mid = mo.Level(
        "mid", Averaged(start[1]), of_mid, SGD(LR), data=batches(3, 7), allow_unused=True
    )
    top = mo.Level("top", Value(start[2]), of_top, SGD(0.1), data=batches(4, 8))
    return mo.LevelGraph(
        [mo.Edge(top, mid, differentiate=rules[0]), mo.Edge(mid, low, differentiate=rules[1])]
    )


REFUSED = {
    "read from above": (
        (mo.Backprop(), mo.T1T2()),
        "mid:low",
        "mid -> low: the loss of 'mid' .* 'ema' of 'low'",
    ),
    "read from far above": (
        (mo.Backprop(), CG),
        "top:low",
        "mid -> low: the loss of 'top' .* 'ema' of 'low'",
    ),
    "read from below": (
        (mo.SAMA(), mo.Backprop()),
        "low:mid",
        "top -> mid: the loss of 'low' .* 'ema' of 'mid'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rules_that_look_at_a_point_refuse_a_buffer_whose_derivative_they_would_drop(
    kind: str,
) -> None:
    rules, reads, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message + r".*levels\.\w+\.buffers\['ema'\]\.detach\(\)"):
        graph_of(rules, reads)


@pytest.mark.parametrize("model", [Averaged, Filled])
def test_an_own_average_is_refused_too(model: type[Averaged]) -> None:
    with pytest.raises(
        ValueError, match="up -> low: the loss of 'low' depends on the buffer 'ema' of 'low'"
    ):
        problem("itself", CG, model=model)


@pytest.mark.parametrize(
    ("rules", "reads"),
    [
        ((mo.T1T2(), mo.Backprop()), "mid:low"),
        ((mo.Backprop(), mo.T1T2()), "low:mid"),
        ((CG, CG), ""),
    ],
    ids=str,
)
def test_nothing_else_is_refused(rules: tuple[Any, Any], reads: str) -> None:
    """A point below what reads the average, or above what has it, loses no derivative.

    Nor does an average that nobody reads.
    """
    graph = graph_of(rules, reads)
    graph.step()
    assert all(value.isfinite() for value in graph.step().values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "rule",
    [
        mo.Backprop(),
        mo.Backprop(memory="steps"),
        mo.Backprop(memory=mo.Revolve(1)),
        mo.ForwardMode(),
        CG,
    ],
    ids=str,
)
def test_running_statistics_are_constants(rule: Any, training: bool) -> None:
    """They have no derivative in torch.

    It refused them where they came out of a loop that is one Function.
    """
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().train(training)
    )
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()

    def of_low(levels: Any, _: Any) -> Tensor:
        return (levels.low(x) - y * levels.up()).square().mean() + 0.1 * sum(
            p.square().sum() for p in levels.low.params.values()
        )

    def of_up(levels: Any, _: Any) -> Tensor:
        params, buffers = levels.low.params, levels.low.buffers
        hidden = torch.nn.functional.linear(x, params["0.weight"])
        normed = torch.nn.functional.batch_norm(
            hidden, buffers["1.running_mean"], buffers["1.running_var"]
        )
        return normed.square().mean() + (levels.low(x) - y).square().mean()

    low = mo.Level("low", net, of_low, SGD(0.1))
    up = level("up", torch.tensor(0.5).double(), of_up)
    graph = mo.LevelGraph([mo.Edge(up, low, steps=2, differentiate=rule)])
    assert not graph.plan.carried
    expected = mo.Backprop() if rule is not CG else CG
    graph.step()
    found = graph.hypergradient("up", after_steps=True)["value"]
    other = mo.LevelGraph([mo.Edge(up, low, steps=2, differentiate=expected)])
    torch.testing.assert_close(
        found, other.hypergradient("up", after_steps=True)["value"], rtol=1e-9, atol=1e-12
    )

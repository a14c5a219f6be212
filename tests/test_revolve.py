"""Binomial checkpointing: optimal by dynamic programming, exact, and as thrifty as it says."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from binomial import advances
from peak_memory import printed
from torch import Tensor, nn
from torch.func import grad, vmap

import metaopt as mo
from metaopt.scan.revolve import choose_times, split
from optimizers import SGD, Adam


@functools.cache
def fewest(steps: int, snapshots: int) -> int:
    """The definition.

    Advance m steps, reverse the rest with one snapshot less, then the first m with all.
    """
    if steps == 1:
        return 0
    if snapshots == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, snapshots - 1) + fewest(m, snapshots) for m in range(1, steps))


@functools.cache
def ours(steps: int, snapshots: int) -> int:
    """What the splits that we choose cost."""
    if steps == 1:
        return 0
    m = split(steps, snapshots)
    assert 1 <= m < steps
    return m + ours(steps - m, snapshots - 1) + ours(m, snapshots)


def test_the_schedule_is_optimal() -> None:
    for steps in range(1, 80):
        for snapshots in range(1, 12):
            assert (
                fewest(steps, snapshots) == ours(steps, snapshots) == advances(steps, snapshots)
            ), (steps, snapshots)
            assert len(choose_times(steps, snapshots)) <= snapshots
    # 2.5 and 3.5 runs: arXiv:2503.13751 needs 2.8 and 5.4
    assert (advances(1000, 28), advances(1000, 11)) == (2535, 3545)


def problem(steps: int) -> tuple[mo.Functional, Any, tuple[Tensor, Tensor]]:
    net = mo.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))

    def loss(params, batch, meta):
        return (net(params, batch[0]) - batch[1]).square().mean() + meta.exp() * sum(
            p.square().sum() for p in params.values()
        )

    return net, loss, (torch.randn(steps, 5, 3), torch.randn(steps, 5, 2))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "memory", [mo.Revolve(1), mo.Revolve(3), mo.Revolve(3, store="cpu"), mo.Revolve(100)], ids=str
)
@pytest.mark.parametrize("rule", [mo.Backprop, mo.FirstOrder])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_equals_the_full_graph(rule: Any, memory: mo.Revolve, steps: int) -> None:
    net, loss, (x, y) = problem(steps)
    meta, lr = torch.tensor(-3.0, requires_grad=True), nn.Parameter(torch.tensor(0.1))
    inputs = [*net.params.values(), meta, lr, x.requires_grad_()]

    def value(mode: Any, meta: Tensor = meta) -> Tensor:
        optimizer = Adam(lr, (0.8, 0.95), eps=1e-2)
        out = mo.minimize(
            loss, optimizer, net.params, (x, y), meta=meta, differentiate=rule(memory=mode)
        )
        return out.losses.sum() + sum(p.sin().sum() for p in out.params.values())

    def derivatives(mode: Any) -> list[Tensor]:
        first = torch.autograd.grad(value(mode), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)]

    for ours, theirs in zip(derivatives(memory), derivatives("full"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    points = torch.tensor([-3.0, -1.0])
    for transform, at in (
        (grad, points[0]),
        (lambda f: grad(grad(f)), points[0]),
        (lambda f: vmap(grad(f)), points),
    ):
        ours, theirs = (
            transform(lambda meta, mode=mode: value(mode, meta))(at) for mode in (memory, "full")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("steps", "snapshots"), [(1, 1), (2, 1), (7, 2), (30, 3), (40, 5), (6, 50)]
)
def test_runs_as_many_steps_as_it_says(steps: int, snapshots: int) -> None:
    calls = 0

    def loss(params, batch):
        nonlocal calls
        calls += 1
        return (params - batch).square().sum()

    start = torch.ones(2, requires_grad=True)
    rule = mo.Backprop(memory=mo.Revolve(snapshots))
    out = mo.minimize(loss, SGD(0.1), start, torch.zeros(steps, 2), differentiate=rule)
    assert calls == 1 + steps  # the search for closures, and forward
    out.params.sum().backward()
    # Forward has run all steps but the last for the schedule; on the way back every step runs once
    # with a graph.
    assert calls - 1 == (advances(steps, snapshots) + 1) + steps


@pytest.mark.usefixtures("float64")
def test_dropout_has_the_same_masks_when_steps_run_again() -> None:
    start = torch.ones(50, requires_grad=True)

    def gradient(memory: Any) -> Tensor:
        torch.manual_seed(3)

        def loss(params, batch):
            return F.dropout(params.square() * batch, 0.5).sum()

        out = mo.minimize(
            loss, SGD(0.1), start, torch.ones(9, 50), differentiate=mo.Backprop(memory=memory)
        )
        return torch.autograd.grad(out.params.sum(), start)[0]

    torch.testing.assert_close(gradient(mo.Revolve(2)), gradient("full"), rtol=1e-12, atol=0)


PROGRAM = """
import sys, torch, metaopt as mo
from optimizers import SGD
torch.set_num_threads(1)
steps = int(sys.argv[1])
def run(steps):
    start = torch.ones(250_000, requires_grad=True)
    rule = mo.Backprop(memory=mo.Revolve(8))
    out = mo.minimize(loss, SGD(0.01), start, None, steps=steps, differentiate=rule)
    out.params.sum().backward()
loss = lambda params, batch: params.sin().sum()
run(2)
before = peak()
run(steps)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """A state is 1 MB: 8 snapshots, as many again on the way back, and one step's graph."""
    grown = [printed(PROGRAM, steps) for steps in (20, 100)]
    assert grown[1] < 40_000  # KiB; measured 17,000, and "steps" needs 100,000
    assert grown[1] - grown[0] < 10_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mo.Revolve(0), "`snapshots` must be a positive integer, got 0"),
        (lambda: mo.Revolve(2.5), "`snapshots` must be a positive integer, got 2.5"),
        (lambda: mo.Revolve(3, store="tape"), "`store` must be .* got 'tape'"),
        (lambda: mo.Backprop(memory="revolve"), r"`memory` must be .* got 'revolve'"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

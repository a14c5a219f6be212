"""Inner loops over batches that come one by one until there are no more."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from binomial import advances
from peak_memory import printed
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import metaopt as mo
from metaopt.scan.revolve import Online, repeats, split
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")

MEMORIES = [
    "full",
    "steps",
    mo.Revolve(1),
    mo.Revolve(3),
    mo.Revolve(3, store="cpu"),
    mo.Revolve(100),
]
each_memory = pytest.mark.parametrize("memory", MEMORIES, ids=str)


def held(steps: int, snapshots: int) -> list[int]:
    """The states that are held when the loop ends after `steps` steps.

    The most of them at any time is checked.
    """
    online, times = Online(snapshots), list[int]()
    for t in range(1, steps):
        gone = online.add(t)
        if gone is not None:
            times.remove(gone)
        times.append(t)
        assert len(times) <= snapshots
    return times


def test_the_schedule_needs_no_more_than_it_says() -> None:
    """At most r T steps without a graph, forward included, whenever the stream ends.

    r is that of the offline optimum.
    """
    for snapshots in range(1, 12):
        for steps in range(2, 250):
            again, runs = 0, [0] * steps
            high, below = steps, [0, *held(steps, snapshots)]
            while below:
                low = below.pop()
                again += advances(high - low, snapshots - len(below)) if high - low > 1 else 0
                count(runs, low, high, snapshots - len(below))
                high = low
            assert sum(runs) == again
            # 1: the run that filled the schedule
            assert 1 + max(runs) <= max(repeats(steps, snapshots), 1)
            assert steps - 1 + again <= 1.35 * advances(steps, snapshots)


def count(runs: list[int], low: int, high: int, snapshots: int) -> None:
    """Add how often reversing the steps from `low` to `high` runs each of them without a graph."""
    if high - low > 1:
        middle = low + split(high - low, snapshots)
        for t in range(low, middle):
            runs[t] += 1
        count(runs, middle, high, snapshots - 1)
        count(runs, low, middle, snapshots)


def problem(steps: int) -> tuple[mo.Functional, Any, list[tuple[Tensor, Tensor]]]:
    """A regression whose batches have sizes of their own."""
    net = mo.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))

    def loss(params, batch, meta):
        return (net(params, batch[0]) - batch[1]).square().mean() + meta.exp() * sum(
            p.square().sum() for p in params.values()
        )

    sizes = [2 + t % 3 for t in range(steps)]
    return net, loss, [(torch.randn(n, 3, requires_grad=True), torch.randn(n, 2)) for n in sizes]


@each_memory
@pytest.mark.parametrize("rule", [mo.Backprop, mo.FirstOrder])
@pytest.mark.parametrize("steps", [1, 9])
def test_equals_steps_one_by_one(rule: Any, memory: Any, steps: int) -> None:
    """The witness makes `steps` calls of one step each, and lets autograd connect them."""
    net, loss, rows = problem(steps)
    meta, lr = torch.tensor(-3.0, requires_grad=True), nn.Parameter(torch.tensor(0.1))
    inputs = [*net.params.values(), meta, lr, *[x for x, _ in rows]]

    def streamed(meta: Tensor) -> Tensor:
        optimizer = Adam(lr, (0.8, 0.95), eps=1e-2)
        out = mo.minimize(
            loss, optimizer, net.params, iter(rows), meta=meta, differentiate=rule(memory=memory)
        )
        assert len(out.losses) == steps
        return out.losses.sum() + sum(p.sin().sum() for p in out.params.values())

    def one_by_one(meta: Tensor) -> Tensor:
        optimizer = Adam(lr, (0.8, 0.95), eps=1e-2)
        params, state, total = net.params, optimizer.init(net.params), torch.zeros(())
        for row in rows:
            out = mo.minimize(
                loss,
                optimizer,
                params,
                row,
                steps=1,
                meta=meta,
                opt_state=state,
                differentiate=rule(),
            )
            params, state, total = out.params, out.opt_state, total + out.losses[0]
        return total + sum(p.sin().sum() for p in params.values())

    def derivatives(value: Any) -> list[Tensor]:
        first = torch.autograd.grad(value(meta), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)]

    # The same sums in float64, some in another order.
    for ours, theirs in zip(derivatives(streamed), derivatives(one_by_one), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    points = torch.tensor([-3.0, -1.0])
    for transform, at in (
        (grad, points[0]),
        (lambda f: grad(grad(f)), points[0]),
        (lambda f: vmap(grad(f)), points),
    ):
        torch.testing.assert_close(
            transform(streamed)(at), transform(one_by_one)(at), rtol=1e-11, atol=1e-12
        )


@each_memory
def test_batches_computed_from_what_is_learned(memory: Any) -> None:
    """w_{t+1} = w_t - lr (w_t - s d_t).

    The generator itself is differentiated, by autograd and by `torch.func`.
    """
    data = torch.randn(7)

    def last(scale: Tensor) -> Tensor:
        batches = (scale * d for d in data)
        rule = mo.Backprop(memory=memory)
        return mo.minimize(
            lambda w, b: (w - b).square() / 2,
            SGD(0.1),
            torch.zeros(()),
            batches,
            differentiate=rule,
        ).params

    expected = sum(0.1 * 0.9 ** (6 - t) * data[t] for t in range(7))
    scale = torch.tensor(1.5, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(last(scale), scale)[0], expected, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(grad(last)(scale.detach()), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        vmap(grad(last))(torch.ones(2)), expected.expand(2), rtol=1e-12, atol=0
    )


@each_memory
def test_the_result_may_be_written_to(memory: Any) -> None:
    start = torch.ones(2, requires_grad=True)
    out = mo.minimize(
        lambda w, b: (w - b).square().sum(),
        SGD(0.1),
        start,
        iter(torch.zeros(3, 2)),
        differentiate=mo.Backprop(memory=memory),
    )
    found = torch.autograd.grad(out.params.add_(1).square().sum(), start)[0]
    torch.testing.assert_close(
        found, torch.full((2,), 2 * (0.8**3 + 1) * 0.8**3), rtol=1e-12, atol=0
    )


@each_memory
def test_only_a_late_batch_requires_grad(memory: Any) -> None:
    late = torch.tensor(2.0, requires_grad=True)
    batches = iter([torch.tensor(0.0), torch.tensor(1.0), late])
    rule = mo.Backprop(memory=memory)
    out = mo.minimize(
        lambda w, b: (w - b).square() / 2, SGD(0.1), torch.zeros(()), batches, differentiate=rule
    )
    torch.testing.assert_close(
        torch.autograd.grad(out.params, late)[0], torch.tensor(0.1), rtol=1e-12, atol=0
    )


@each_memory
def test_nobody_asks_for_a_batch_before_its_step(memory: Any) -> None:
    """The iterator may end because of what the loop has done so far.

    Here when the loss is small.
    """
    seen: list[float] = []

    def loss(w: Tensor, _: None) -> Tensor:
        seen.append(
            float(w.detach().abs().max())
            if not torch._C._functorch.is_functorch_wrapped_tensor(w)
            else float("nan")
        )
        return w.square().sum()

    def until_three() -> Iterator[None]:
        while len(seen) < 4:  # the search for closures sees the first batch too
            yield None

    start = torch.ones(2, requires_grad=True)
    out = mo.minimize(
        loss, SGD(0.1), start, until_three(), differentiate=mo.Backprop(memory=memory)
    )
    assert len(out.losses) == 3
    torch.testing.assert_close(
        torch.autograd.grad(out.params.sum(), start)[0],
        torch.full((2,), 0.8**3),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("memory", [mo.Revolve(1), mo.Revolve(3), mo.Revolve(50)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 45])
def test_runs_as_many_steps_as_the_schedule_says(memory: mo.Revolve, steps: int) -> None:
    calls = 0

    def loss(params, batch):
        nonlocal calls
        calls += 1
        return (params - batch).square().sum()

    start = torch.ones(2, requires_grad=True)
    rule = mo.Backprop(memory=memory)
    out = mo.minimize(
        loss, SGD(0.1), start, (torch.zeros(2) for _ in range(steps)), differentiate=rule
    )
    assert calls == 1 + steps
    out.params.sum().backward()
    assert calls - 1 - 2 * steps <= max(repeats(steps, memory.snapshots) - 1, 0) * steps


def test_dropout_has_the_same_masks_and_the_loader_draws_from_the_same_generator() -> None:
    """The order of a shuffling DataLoader and the masks come from one generator.

    Batches are kept, not drawn again.
    """
    start = torch.ones(5, requires_grad=True)
    data = TensorDataset(torch.randn(11, 5))

    def gradient(memory: Any) -> Tensor:
        torch.manual_seed(3)

        def loss(params, batch):
            return F.dropout(params.square() * batch[0], 0.5).sum()

        out = mo.minimize(
            loss,
            SGD(0.1),
            start,
            DataLoader(data, batch_size=2, shuffle=True),
            differentiate=mo.Backprop(memory=memory),
        )
        assert len(out.losses) == 6
        return torch.autograd.grad(out.params.sum(), start)[0]

    for memory in MEMORIES[1:]:
        torch.testing.assert_close(gradient(memory), gradient("full"), rtol=1e-12, atol=0)


@each_memory
@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_window(window: int, memory: Any) -> None:
    rows, start, lr = (
        torch.randn(7, 3),
        torch.randn(3, requires_grad=True),
        nn.Parameter(torch.tensor(0.05)),
    )

    def gradients(batches: Any) -> list[Tensor]:
        rule = mo.Backprop(memory=memory, window=window)
        out = mo.minimize(
            lambda w, b: ((w - b) ** 4).sum(),
            Adam(lr, eps=1e-2),
            start,
            batches,
            differentiate=rule,
        )
        return [
            out.losses,
            *torch.autograd.grad(out.params.sum(), [lr, start], materialize_grads=True),
        ]

    for ours, theirs in zip(gradients(iter(rows)), gradients(rows), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_without_gradients_no_batch_is_kept() -> None:
    alive: list[int] = []

    class Batch:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def batches() -> Iterator[Batch]:
        for _ in range(20):
            yield Batch()
            assert len(alive) <= 2  # the first one, and the present one

    with torch.no_grad():
        out = mo.minimize(
            lambda w, _: w.square(),
            SGD(0.1),
            torch.ones(()),
            batches(),
            differentiate=mo.Backprop("steps"),
        )
    assert len(out.losses) == 20


PROGRAM = """
import sys, torch, metaopt as mo
from optimizers import SGD
torch.set_num_threads(1)
steps = int(sys.argv[1])
def last(start, steps):
    batches = iter([None] * steps)
    rule = mo.Backprop(memory=mo.Revolve(8))
    loss = lambda w, _: w.sin().sum()
    return mo.minimize(loss, SGD(0.01), start, batches, differentiate=rule).params.sum()
torch.func.grad(last)(torch.ones(250_000), 2)
before = peak()
torch.func.grad(last)(torch.ones(250_000), steps)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """A state is 1 MB.

    8 of them, as many again on the way back, and one step's graph, also inside `torch.func.grad`.
    """
    grown = [printed(PROGRAM, steps) for steps in (20, 60)]
    assert grown[1] < 40_000  # KiB; "steps" needs 60,000
    assert grown[1] - grown[0] < 10_000


def reused() -> Iterator[Tensor]:
    buffer = torch.zeros(2)
    for t in range(3):
        yield buffer.fill_(t)


@pytest.mark.parametrize(
    ("batches", "steps", "message"),
    [
        (
            lambda: iter([]),
            None,
            "`batches` must hold at least one step, got an empty list_iterator",
        ),
        (
            lambda: iter([torch.zeros(2), (torch.zeros(2),)]),
            None,
            r"batches of one structure .* got .* at step 1 after",
        ),
        (
            lambda: iter([torch.zeros(2), torch.zeros(2, dtype=torch.int64)]),
            None,
            r"the same dtypes, got .*int64.* at step 1 after",
        ),
        (
            lambda: itertools.repeat(torch.zeros(2)),
            3,
            r"`steps` must be left out when `batches` is an iterator, got 3",
        ),
        (reused, None, r"must not change a batch after yielding it, got one of shape \(2,\)"),
        (lambda: "abc", None, "`steps` is missing"),
    ],
)
def test_bad_batches(batches: Any, steps: int | None, message: str) -> None:
    start = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        mo.minimize(
            lambda w, b: (w - b).square().sum(),
            SGD(0.1),
            start,
            batches(),
            steps=steps,
            differentiate=mo.Backprop("steps"),
        )


@pytest.mark.parametrize("hvp", ["reverse", "forward"])
def test_in_microbatches(hvp: Any) -> None:
    rows, start = torch.randn(5, 4, 3), torch.randn(3, requires_grad=True)

    def gradient(batches: Any, **options: Any) -> Tensor:
        rule = mo.Backprop(memory=mo.Revolve(2), **options)
        out = mo.minimize(
            lambda w, b: ((w - b) ** 4).mean(), SGD(0.1), start, batches, differentiate=rule
        )
        return torch.autograd.grad(out.params.sum(), start)[0]

    torch.testing.assert_close(
        gradient(iter(rows), microbatches=2, hvp=hvp), gradient(rows), rtol=1e-12, atol=1e-14
    )
    with pytest.raises(
        ValueError,
        match="`microbatches` must divide the number of examples of every batch, got 2 for 3",
    ):
        gradient(iter([rows[0], rows[1, :3]]), microbatches=2, hvp=hvp)


def test_implicitly_the_last_batch_counts() -> None:
    rows, meta = torch.randn(40, 3), torch.tensor(0.3, requires_grad=True)

    def gradient(batches: Any) -> Tensor:
        def loss(w: Tensor, b: Tensor, meta: Tensor) -> Tensor:
            return ((w - b * meta) ** 2).sum()

        out = mo.minimize(
            loss, SGD(0.1), torch.zeros(3), batches, meta=meta, differentiate=mo.Implicit()
        )
        return torch.autograd.grad(out.params.sum(), meta)[0]

    torch.testing.assert_close(gradient(iter(rows)), gradient(rows), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(iter(rows)), rows[-1].sum(), rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
# of torch's compiler
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@each_memory
def test_compiled(memory: Any) -> None:
    rows, start = torch.randn(4, 3), torch.randn(3, requires_grad=True)

    def gradient(batches: Any, compile: bool) -> Tensor:
        rule = mo.Backprop(memory=memory)
        out = mo.minimize(
            lambda w, b: ((w - b) ** 4).mean(),
            SGD(0.1),
            start,
            batches,
            differentiate=rule,
            compile=compile,
        )
        return torch.autograd.grad(out.params.sum(), start)[0]

    torch._dynamo.reset()
    torch.testing.assert_close(
        gradient(iter(rows), True), gradient(rows, False), rtol=1e-12, atol=1e-14
    )

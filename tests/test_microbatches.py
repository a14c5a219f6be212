"""Steps whose gradient is made, and pulled back, from parts of the batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak_memory import printed
from problems import (
    VARIANTS,
    as_parameters,
    assert_close,
    by_hand,
    leaf,
    outer,
    regression,
    start,
    two_derivatives,
)
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import metaopt as mo
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")

each_memory = pytest.mark.parametrize("memory", ["steps", mo.Revolve(2)], ids=str)


@each_memory
@pytest.mark.parametrize("same", [False, True], ids=["batches", "same batch"])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_both_derivatives_equal_those_of_the_whole_batch_by_hand(
    name: str, same: bool, memory: Any
) -> None:
    """With respect to parameters, meta, hyperparameters and every example.

    Five parts of one example each.
    """
    variant = next(variant for variant in VARIANTS if variant.name == name)
    params, (x, y), meta = leaf(start())
    batches, rows = (
        ((x[0], y[0]), [(x[0], y[0])] * 4) if same else ((x, y), list(zip(x, y, strict=True)))
    )
    h = as_parameters(variant.tensors())
    rule = mo.Backprop(memory, microbatches=5)
    steps = 4 if same else None
    out = mo.minimize(
        regression, variant.build(h), params, batches, steps=steps, meta=meta, differentiate=rule
    )
    zeros = {slot: {k: torch.zeros_like(p) for k, p in params.items()} for slot in variant.slots}
    expected = by_hand(regression, variant.formula, h, params, rows, meta, zeros)
    assert_close((out.params, out.losses), (expected[0], expected[2]), 1e-12)
    inputs = [*params.values(), x, y, meta, *h.values()]
    found = two_derivatives(outer(out.params, {}, out.losses), inputs)
    # sums in another order, four steps
    assert_close(found, two_derivatives(outer(expected[0], {}, expected[2]), inputs), 1e-10)


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "grad": lambda f: grad(f, (0, 1)),
    "jacrev": lambda f: jacrev(lambda m, x: f(m, x) * torch.arange(1.0, 3), (0, 1)),
    "vmap(grad)": lambda f: (
        lambda m, x: vmap(grad(f, (0, 1)))(m + torch.arange(3.0), torch.stack([x, x + 1, x.sin()]))
    ),
    "grad(vmap)": lambda f: grad(
        lambda m, x: vmap(f, (0, None))(m + torch.arange(3.0), x).sum(), (0, 1)
    ),
    "grad(grad)": lambda f: grad(
        lambda m, x: grad(f, 1)(m, x).square().sum() + grad(f)(m, x), (0, 1)
    ),
    "vmap(grad(grad))": lambda f: (
        lambda m, x: vmap(grad(grad(f)), (0, None))(m + torch.arange(3.0), x)
    ),
}


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_transforms(transform: str, window: int | None) -> None:
    (params, (x, y), meta), optimizer = start(), Adam(0.05, eps=1e-2)

    def derivative(rule: mo.Backprop) -> Any:
        def value(meta: Tensor, x: Tensor) -> Tensor:
            out = mo.minimize(regression, optimizer, params, (x, y), meta=meta, differentiate=rule)
            return outer(out.params, {}, out.losses)

        return TRANSFORMS[transform](value)(meta, x)

    expected = derivative(mo.Backprop(window=window))
    for memory in ("steps", mo.Revolve(1)):
        # sums in another order
        assert_close(
            derivative(mo.Backprop(memory, window=window, microbatches=5)), expected, 1e-11
        )


def test_random_numbers_and_batch_statistics_are_those_of_the_parts() -> None:
    """The witness is a loss that cuts its own batch, whose whole graph is kept.

    It draws in the same order.
    """
    model = nn.Sequential(
        nn.Linear(3, 8),
        nn.BatchNorm1d(8, track_running_stats=False),
        nn.Dropout(0.4),
        nn.Linear(8, 3),
    )
    net = mo.functional(model.double())
    x, labels = torch.randn(3, 6, 3), torch.randint(0, 3, (3, 6))
    meta = torch.randn(3, requires_grad=True)

    def loss(params: Any, batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
        return F.cross_entropy(net(params, batch[0] * meta), batch[1])

    def in_parts(params: Any, batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
        return (
            sum(loss(params, (batch[0][i : i + 2], batch[1][i : i + 2]), meta) for i in (0, 2, 4))
            / 3
        )

    def derivatives(loss: Any, rule: mo.Backprop) -> Any:
        torch.manual_seed(3)
        out = mo.minimize(loss, SGD(0.5), net.params, (x, labels), meta=meta, differentiate=rule)
        return two_derivatives(out.losses.square().sum(), [meta])

    assert_close(
        derivatives(loss, mo.Backprop("steps", microbatches=3)),
        derivatives(in_parts, mo.Backprop()),
        1e-12,
    )


def test_the_loss_sees_parts_only() -> None:
    seen: list[int] = []

    def loss(w: Tensor, x: Tensor, meta: Tensor) -> Tensor:
        seen.append(len(x))
        return ((x @ w - meta) ** 4).mean()

    meta = torch.tensor(0.3, requires_grad=True)
    rule = mo.Backprop("steps", microbatches=4)
    out = mo.minimize(
        loss, SGD(0.1), torch.randn(3), torch.randn(2, 12, 3), meta=meta, differentiate=rule
    )
    out.losses.sum().backward()
    whole, *parts = seen  # the search for closures, without a graph
    assert whole == 12
    assert set(parts) == {3}
    # on the way back once for the gradient and once to pull it back
    assert len(parts) == 2 * 4 + 2 * 2 * 4


def test_inside_the_step_of_another_loop() -> None:
    x = torch.randn(6, 3)

    def value(start: Tensor, lower: mo.Backprop, upper: mo.Backprop) -> Tensor:
        def upper_loss(penalty: Tensor, _: None) -> Tensor:
            def loss(w: Tensor, x: Tensor, penalty: Tensor) -> Tensor:
                return (x @ w - 1).square().mean() + penalty.exp() * (w**4).sum()

            out = mo.minimize(
                loss, SGD(0.1), torch.ones(3), x, steps=3, meta=penalty, differentiate=lower
            )
            return out.losses.sum() + out.params.square().sum()

        return mo.minimize(
            upper_loss, SGD(0.1), start, None, steps=2, differentiate=upper
        ).losses.sum()

    at, parts, whole = torch.tensor(-1.0), mo.Backprop("steps", microbatches=3), mo.Backprop()
    expected = grad(value)(at, whole, whole)
    for upper in (whole, mo.Backprop("steps")):
        assert_close(grad(value)(at, parts, upper), expected, 1e-12)


PROGRAM = """
import sys, torch, metaopt as mo
from optimizers import Adam
torch.set_num_threads(1)
from torch.nn import Linear, Tanh
model = torch.nn.Sequential(Linear(64, 128), Tanh(), Linear(128, 128), Tanh(), Linear(128, 1))
net = mo.functional(model)
meta = torch.tensor(-5.0, requires_grad=True)
rule = mo.Backprop("steps", microbatches=int(sys.argv[1]))
def run(n):
    batch = torch.randn(n, 64), torch.randn(n, 1)
    def loss(params, batch, meta):
        return (net(params, batch[0]) - batch[1]).square().mean() * meta.exp()
    out = mo.minimize(loss, Adam(0.01), net.params, batch, steps=3, meta=meta, differentiate=rule)
    return torch.autograd.grad(out.losses.sum(), meta)
run(8)
before = peak()
run(8192)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_part_bounds_the_memory() -> None:
    grown = {parts: printed(PROGRAM, parts) for parts in (1, 8)}
    assert grown[8] < grown[1] / 2, grown


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_bad_numbers_of_parts(bad: Any) -> None:
    with pytest.raises(ValueError, match="`microbatches` must be a positive integer, got"):
        mo.Backprop("steps", microbatches=bad)


def test_full_memory_has_no_parts() -> None:
    with pytest.raises(
        ValueError,
        match=r'`microbatches=2` needs memory="steps" or Revolve\(snapshots\), got memory="full"',
    ):
        mo.Backprop(microbatches=2)


def test_batches_that_cannot_be_cut() -> None:
    def loss(w: Tensor, batch: Any) -> Tensor:
        return w.square().sum()

    def run(batch: Any, steps: int | None = None, parts: int = 3) -> None:
        rule = mo.Backprop("steps", microbatches=parts)
        mo.minimize(loss, SGD(0.1), torch.ones(2), batch, steps=steps, differentiate=rule)

    with pytest.raises(
        ValueError, match=r"must divide the number of examples, got 3 for the 10 at \['x'\]"
    ):
        run({"x": torch.randn(10, 2)}, 4)
    with pytest.raises(
        ValueError, match=r"must divide the number of examples, got 3 for the 4 at \['y'\]"
    ):
        run({"x": torch.randn(5, 6), "y": torch.randn(5, 4)})
    with pytest.raises(
        ValueError,
        match=r"needs a batch whose every leaf has a leading axis of examples, which \['y'\] has "
        r"not",
    ):
        run({"x": torch.randn(5, 6), "y": torch.randn(5)})
    with pytest.raises(ValueError, match="which the tensor itself has not"):
        run(None, 4)
    run(torch.zeros(5, 3), parts=1)  # nothing to cut

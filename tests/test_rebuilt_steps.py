"""A step that is made again is the step that was taken.

Within one process, and when a killed program is started again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD, Adam, ClipNorm, Cosine, Grouped, Linear, Piecewise, Warmup

pytestmark = pytest.mark.usefixtures("float64")
REBUILDING = {
    "steps": mo.Backprop(memory="steps"),
    "revolve": mo.Backprop(memory=mo.Revolve(2)),
    "first-order": mo.FirstOrder(memory="steps"),
    "window": mo.Backprop(memory="steps", window=3),
    "microbatches": mo.Backprop(memory="steps", microbatches=2),
}


class Counting:
    """A loss that is another one at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, w: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return (w * x).square().mean() * (1 + 0.1 * self.calls)


def with_random(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).square().mean() * random.random()


def with_numpy(w: Tensor, x: Tensor) -> Tensor:
    return (w * x + float(np.random.standard_normal())).square().mean()  # noqa: NPY002


@pytest.mark.parametrize("rule", REBUILDING.values(), ids=REBUILDING)
@pytest.mark.parametrize(
    "make", [Counting, lambda: with_random, lambda: with_numpy], ids=["counter", "random", "numpy"]
)
def test_numbers_that_cannot_be_wound_back_are_found(rule: Any, make: Callable[[], Any]) -> None:
    """The rebuilt step drew others: a wrong gradient, silently."""
    w, lr = torch.ones(2, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    out = mo.minimize(make(), SGD(lr), w, torch.ones(4, 2, 2), differentiate=rule)
    message = (
        r"A step that is made again on the way back.*the loss of step \d was .* and is now .*"
        "Draw with torch"
    )
    with pytest.raises(ValueError, match=message):
        out.params.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_they_are_found_under_transforms(transform: str) -> None:
    loss = Counting()

    def value(w: Tensor) -> Tensor:
        rule = mo.Backprop(memory="steps")
        return mo.minimize(loss, SGD(0.1), w, torch.ones(4, 2), differentiate=rule).params.sum()

    slope = torch.func.grad(value)
    with pytest.raises(ValueError, match="A step that is made again"):
        slope(torch.ones(2)) if transform == "grad" else torch.func.vmap(slope)(torch.ones(3, 2))


def test_losses_that_are_not_finite_or_zero_are_no_difference() -> None:
    for target in (0.0, torch.inf):
        w = torch.zeros(2, requires_grad=True)
        with torch.enable_grad():
            out = torch.func.vmap(
                lambda t, w=w: (
                    mo.minimize(
                        lambda w, x: (w * x + t).square().sum(),
                        SGD(0.1),
                        w,
                        torch.ones(3, 2),
                        differentiate=mo.Backprop(memory="steps"),
                    ).params
                )
            )(torch.full((2,), target))
        out.sum().backward()
        assert w.grad is not None


def test_a_large_rate_of_dropout_is_the_same_step() -> None:
    """In float32, where sums in another order would be the only difference."""
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.8), nn.ReLU(), nn.Linear(64, 1))
    pure, grads = mo.functional(net), []
    for memory in ("full", "steps", mo.Revolve(2)):
        torch.manual_seed(0)
        x = torch.randn(6, 16, 8)
        out = mo.minimize(
            lambda p, x: (pure(p, x) - 1).square().mean(),
            Adam(0.01),
            pure.params,
            x,
            differentiate=mo.Backprop(memory=memory),
        )
        grads.append(torch.autograd.grad(out.losses.sum(), pure.params["0.weight"])[0])
    assert_close(grads[1], grads[0], 1e-5)
    assert_close(grads[2], grads[0], 1e-5)


class Killed(BaseException):
    """Ends a run as a signal would."""


def run(
    directory: Path,
    optimizer: Any,
    end_at: int,
    *,
    stop: Callable[[int], Any] = lambda call: None,
    power: float = 2.0,
) -> Tensor:
    """Return the gradient of a loop of ten steps on disk.

    The loss is called once a step, forward and backward.
    """
    w, calls = torch.tensor([1.0, 2.0], requires_grad=True), 0

    def loss(w: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == end_at:
            raise Killed
        return ((w - x).abs() + 0.1).pow(2.0 if calls < 5 else power).sum()

    rule = mo.Backprop(memory=mo.Revolve(3, store="disk", directory=directory))
    out = mo.minimize(loss, optimizer, w, torch.linspace(0, 1, 10)[:, None], differentiate=rule)
    (grad,) = torch.autograd.grad(out.params.square().sum(), w)
    return grad


OTHERS: dict[str, tuple[Any, Any]] = {
    "momentum": (SGD(0.1, momentum=0.9), SGD(0.1, momentum=0.5)),
    "dampening": (SGD(0.1, momentum=0.9, dampening=0.1), SGD(0.1, momentum=0.9, dampening=0.3)),
    "nesterov": (SGD(0.1, momentum=0.9), SGD(0.1, momentum=0.9, nesterov=True)),
    "beta": (Adam(0.1), Adam(0.1, betas=(0.9, 0.9))),
    "amsgrad": (Adam(0.1), Adam(0.1, amsgrad=True)),
    "length": (SGD(Cosine(0.1, steps=20)), SGD(Cosine(0.1, steps=30))),
    "end": (SGD(Linear(0.1, steps=20, final=0.0)), SGD(Linear(0.1, steps=20, final=0.05))),
    "boundary": (SGD(Piecewise((0.1, 0.01), (8,))), SGD(Piecewise((0.1, 0.01), (9,)))),
    "warm-up": (SGD(Warmup(0.1, steps=5, start=0.5)), SGD(Warmup(0.1, steps=9, start=0.5))),
    "clipping": (ClipNorm(1e6, SGD(0.1)), ClipNorm(1e5, SGD(0.1))),
    "groups": (Grouped({"*": SGD(0.1, momentum=0.9)}), Grouped({"*": SGD(0.1, momentum=0.1)})),
}


@pytest.mark.parametrize("end_at", [9, 15])  # on the way forward, and on the way back
@pytest.mark.parametrize("kind", OTHERS)
def test_a_loop_on_disk_is_not_resumed_with_other_settings(
    kind: str, end_at: int, tmp_path: Path
) -> None:
    """Numbers that act from the second step on were not in the loop's identity.

    A wrong gradient, silently.
    """
    before, after = OTHERS[kind]
    with pytest.raises(Killed):
        run(tmp_path, before, end_at)
    with pytest.raises(
        ValueError,
        match=r"Revolve: `directory` must be empty or hold the snapshots of this very loop, got "
        r".*settings",
    ):
        run(tmp_path, after, 10**6)
    (tmp_path / "whole").mkdir()
    expected = run(tmp_path / "whole", before, 10**6)
    (tmp_path / "whole").rmdir()
    assert torch.equal(run(tmp_path, before, 10**6), expected)


class Secret(mo.Optimizer):
    """Its constant is neither an argument of the constructor nor a tensor.

    It acts from the second step on.
    """

    momentum = 0.9

    def slots(self, params: Any) -> Any:
        return {"velocity": [torch.zeros_like(p) for p in params]}

    def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Tensor) -> Any:
        after = [self.momentum * v + g for v, g in zip(slots["velocity"], grads, strict=True)]
        return [-0.1 * v for v in after], {"velocity": after}


class Other(Secret):
    momentum = 0.8


Other.__name__ = Other.__qualname__ = "Secret"


@pytest.mark.parametrize("end_at", [10, 16])
def test_what_settings_do_not_show_is_seen_by_the_step_made_again(
    end_at: int, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Secret(), end_at)
    with pytest.raises(
        ValueError,
        match=r"step [1-9], made again, does not give what it gave. Is the loss or the optimizer "
        r"another",
    ):
        run(tmp_path, Other(), 10**6)
    run(tmp_path, Secret(), 10**6)
    assert list(tmp_path.iterdir()) == []


def test_observations_and_buffers_go_on_too(tmp_path: Path) -> None:
    """A killed loop with everything: buffers, aux and observations, bit for bit."""

    def go(directory: Path, end_at: int) -> list[Tensor]:
        w, calls = torch.tensor([1.0, 2.0], requires_grad=True), 0

        def loss(w: Tensor, x: Tensor, buffers: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == end_at:
                raise Killed
            return (
                (w - x - buffers).square().sum(),
                0.9 * buffers + 0.1 * w,
                {"w": w * x, "n": calls * 0},
            )

        out = mo.minimize(
            loss,
            Adam(0.1),
            w,
            torch.linspace(0, 1, 10)[:, None],
            buffers=torch.zeros(2),
            observe=lambda w, x, buffers: (w * buffers).sum(),
            differentiate=mo.Backprop(memory=mo.Revolve(3, store="disk", directory=directory)),
        )
        value = (
            out.observed.square().sum() + out.aux["w"].sum() + out.buffers.sum() + out.params.sum()
        )
        return [value.detach(), out.aux["n"], *torch.autograd.grad(value, w)]

    (tmp_path / "whole").mkdir()
    expected = go(tmp_path / "whole", 0)
    (tmp_path / "part").mkdir()
    for end_at in (7, 9, 13, 20):
        with pytest.raises(Killed):
            go(tmp_path / "part", end_at)
        found = go(tmp_path / "part", 0)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

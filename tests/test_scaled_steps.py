"""TrustRatio, AGC and Cautious: their papers' loops, and exact derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

import metaopt as mo
from optimizers import (
    AGC,
    SGD,
    Adam,
    AdamW,
    Cautious,
    DecoupledWeightDecay,
    Grouped,
    TrustRatio,
    WeightDecay,
)

pytestmark = pytest.mark.usefixtures("float64")
Params = dict[str, Tensor]
BETA1, BETA2, EPS = 0.9, 0.99, 1e-8


def start() -> Params:
    """Return parameters, of which one is 0 at first."""
    return {
        "filters": torch.randn(2, 3, 2, 2),
        "matrix": torch.randn(3, 4),
        "zeros": torch.zeros(3),
        "scalar": torch.randn(()),
    }


def curve(params: Params, shift: Tensor) -> Tensor:
    """A loss whose gradient is 0 in one filter all the time."""
    hidden = torch.tanh(params["matrix"].sum(-1) + params["zeros"] + shift)
    filters = params["filters"][0] * params["filters"][0].roll(1)
    return (hidden * params["scalar"]).square().sum() + (filters.sum() - shift).square()


def moved(step: Callable[[int, Params, Params], Params], first: Params, shifts: Tensor) -> Params:
    """Return the parameters after w = w + step(t, gradient, w) for each shift."""
    params = first
    for t, shift in enumerate(shifts, 1):
        updates = step(t, grad(curve)(params, shift), params)
        params = {name: w + updates[name] for name, w in params.items()}
    return params


class Moments:
    """Adam's m^ / (sqrt(v^) + eps), for each name."""

    def __init__(self) -> None:
        self.m: Any = {}
        self.v: Any = {}

    def direction(self, name: str, t: int, g: Tensor) -> Tensor:
        self.m[name] = BETA1 * self.m.get(name, 0) + (1 - BETA1) * g
        self.v[name] = BETA2 * self.v.get(name, 0) + (1 - BETA2) * g**2
        root = (self.v[name] / (1 - BETA2**t)).sqrt() + EPS
        return self.m[name] / (1 - BETA1**t) / root


def ratio(w: Tensor, u: Tensor) -> Tensor:
    return w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else torch.tensor(1.0)


def test_lamb_is_the_papers_loop() -> None:
    """Algorithm 2 of arXiv:1904.00962 with phi the identity; the ratio is 1 at a size of 0."""
    lr, decay, memory = 0.02, 0.1, Moments()

    def step(t: int, grads: Params, params: Params) -> Params:
        r = {n: memory.direction(n, t, g) + decay * params[n] for n, g in grads.items()}
        return {name: -lr * ratio(params[name], u) * u for name, u in r.items()}

    first, shifts = start(), torch.randn(50)
    lamb = TrustRatio(lr, AdamW(1.0, (BETA1, BETA2), eps=EPS, weight_decay=decay))
    found = mo.minimize(curve, lamb, first, shifts).params
    assert_close(found, moved(step, first, shifts), 1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lars_is_the_papers_loop(decay: float) -> None:
    """Algorithm 1 of arXiv:1708.03888; with decay the norm is that of the sum."""
    lr, eta, momentum, velocity = 0.5, 0.02, 0.9, {}  # type: ignore[var-annotated]

    def step(t: int, grads: Params, params: Params) -> Params:
        for name, g in grads.items():
            g = g + decay * params[name]
            own = lr * eta * ratio(params[name], g) * g
            velocity[name] = momentum * velocity.get(name, 0) + own
        return {name: -v for name, v in velocity.items()}

    first, shifts = start(), torch.randn(50)
    inner = TrustRatio(eta, SGD(lr, momentum), of="gradients")
    lars = WeightDecay(decay, inner) if decay else inner
    assert_close(mo.minimize(curve, lars, first, shifts).params, moved(step, first, shifts), 1e-12)


def test_adaptive_clipping_is_the_papers_formula() -> None:
    """Section 4 of arXiv:2102.06171, unit by unit in a loop; some are clipped and some are not."""
    clipping, eps, clipped = 0.3, 1e-2, set()

    def clip(g: Tensor, w: Tensor) -> Tensor:
        size = max(w.norm().item(), eps)
        clipped.add(bool(g.norm() > clipping * size))
        return g * (clipping * size / g.norm()) if g.norm() > clipping * size else g

    def step(t: int, grads: Params, params: Params) -> Params:
        return {
            name: -0.05
            * (
                torch.stack([clip(*pair) for pair in zip(g, params[name], strict=True)])
                if g.ndim > 1
                else clip(g, params[name])
            )
            for name, g in grads.items()
        }

    first, shifts = start(), torch.randn(50)
    found = mo.minimize(curve, AGC(clipping, SGD(0.05), eps=eps), first, shifts).params
    assert_close(found, moved(step, first, shifts), 1e-12)
    assert clipped == {True, False}


def test_the_cautious_adamw_is_the_papers_loop() -> None:
    """Algorithm 1 of arXiv:2411.16085, with decoupled decay that is not masked."""
    lr, decay, eps, memory, masked = 0.05, 0.1, 1e-3, Moments(), []

    def step(t: int, grads: Params, params: Params) -> Params:
        updates = {}
        for name, g in grads.items():
            u = memory.direction(name, t, g)
            mask = (u * g > 0).double()
            masked.append(1 - mask.mean().item())
            updates[name] = -lr * (u * mask / (mask.mean() + eps)) - lr * decay * params[name]
        return updates

    first, shifts = start(), torch.randn(50)
    inner = Cautious(Adam(lr, (BETA1, BETA2), eps=EPS), eps=eps)
    found = mo.minimize(curve, DecoupledWeightDecay(lr * decay, inner), first, shifts).params
    assert_close(found, moved(step, first, shifts), 1e-12)
    assert 0.2 < sum(masked) / len(masked) < 0.8


KINDS: dict[str, Callable[[Any], mo.Optimizer]] = {
    "updates": lambda h: TrustRatio(h, Adam(0.1, eps=0.1)),
    "gradients": lambda h: TrustRatio(h, SGD(0.1), of="gradients"),
    "agc": lambda h: AGC(h, SGD(0.1), eps=h),
    "cautious": lambda h: Cautious(SGD(h, 0.9), eps=h),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_update_is_differentiated_exactly(name: str) -> None:
    """In gradients, a small and a large one, parameters, memory and the number, twice."""
    params = [torch.randn(2, 2), torch.randn(2)]
    leaves = [*params, 0.01 * torch.randn(2, 2), 10 * torch.randn(2)]
    inputs = [leaf.requires_grad_() for leaf in (torch.tensor(0.7), torch.randn(2, 2), *leaves)]

    def update(h: Tensor, memory: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        a, b, ga, gb = leaves
        optimizer, params = KINDS[name](h), {"a": a, "b": b}
        state = optimizer.init(params)
        slots = {
            kind: {"a": memory.square() + 1 if kind == "square" else memory, "b": torch.ones(2)}
            for kind in state["slots"]
        }
        updates, _ = optimizer({"a": ga, "b": gb}, {**state, "slots": slots}, params)
        return tuple(updates.values())

    assert gradcheck(update, inputs)
    assert gradgradcheck(update, inputs)


@pytest.mark.parametrize("name", KINDS)
def test_derivatives_at_zero_are_finite(name: str) -> None:
    """At a zero gradient, and at a parameter of 0: the coefficient times the update's own."""

    def total(g: Tensor, w: Tensor, h: Tensor) -> Tensor:
        optimizer = KINDS[name](h)
        return optimizer(g, optimizer.init(w), w)[0].sum()

    zero, ones, h = torch.zeros(2, 2), torch.ones(2, 2), torch.tensor(0.7)
    for g, w in ((zero, ones), (ones, zero), (zero, zero)):
        first = grad(total, (0, 1, 2))(g, w, h)
        second = grad(lambda *x: sum(d.sum() for d in grad(total, (0, 1, 2))(*x)), (0, 1, 2))
        assert all(bool(d.isfinite().all()) for d in (*first, *second(g, w, h)))
    if name == "gradients":
        assert_close(grad(total)(zero, ones, h), torch.full((2, 2), -0.07), 1e-15)
    if name == "agc":
        assert_close(grad(total)(zero, ones, h), torch.full((2, 2), -0.1), 1e-15)


@pytest.mark.parametrize("name", KINDS)
def test_under_nested_vmap_and_without_some_gradients(name: str) -> None:
    params, grads = {"a": torch.randn(2, 3), "b": torch.randn(2)}, torch.randn(2, 3, 2, 3)
    optimizer = KINDS[name](0.7)
    state = optimizer.init(params, per_parameter=True)

    def update(g: Tensor) -> Tensor:
        updates, after = optimizer({"a": g, "b": None}, state, params)
        assert updates["b"] is None
        assert set(after) == set(state)
        return updates["a"]

    found = vmap(vmap(update))(grads)
    assert_close(found[1, 2], update(grads[1, 2]), 1e-14)
    alone = {"a": params["a"]}
    assert_close(
        update(grads[0, 0]), optimizer({"a": grads[0, 0]}, optimizer.init(alone), alone)[0]["a"], 0
    )


def test_in_half_precision_nothing_overflows() -> None:
    """The square of 500 in float16 is beyond 65504, and the product of 1e-4 twice is 0."""
    large = torch.full((100,), 500.0, dtype=torch.float16)
    optimizer: mo.Optimizer = TrustRatio(0.1, SGD(1.0))
    updates, _ = optimizer(large, optimizer.init(large), large)
    assert_close(updates.double(), torch.full((100,), -50.0), 1e-3)  # float16 has 11 bits
    optimizer = AGC(0.1, SGD(1.0))
    updates, _ = optimizer(large, optimizer.init(large), large)
    assert_close(updates.double(), torch.full((100,), -50.0), 1e-3)
    small = torch.full((4,), 1e-4, dtype=torch.float16)
    optimizer = Cautious(SGD(1.0))
    updates, _ = optimizer(small, optimizer.init(small), small)
    assert_close(updates.double(), torch.full((4,), -1e-4 / 1.001), 1e-7)


def test_a_whole_layer_may_be_left_out() -> None:
    first, shifts = start(), torch.randn(3)
    optimizer = Grouped({"scalar": SGD(0.1), "*": AGC(1e-6, SGD(0.1))})
    params = mo.minimize(curve, optimizer, first, shifts).params
    assert (params["scalar"] - first["scalar"]).abs() > 1e-3
    assert (params["matrix"] - first["matrix"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrustRatio(-1.0, SGD(0.1)), r"TrustRatio: `coefficient` must lie in \[0.0, inf\]"),
        (lambda: TrustRatio(1.0, SGD(0.1), of="all"), "`of` must be 'updates' or 'gradients', got"),  # type: ignore[arg-type]
        (lambda: AGC(0.0, SGD(0.1)), r"AGC: `clipping` must be positive, got 0.0. To freeze"),
        (lambda: AGC(0.1, SGD(0.1), eps=0.0), r"AGC: `eps` must be positive, got 0.0"),
        (lambda: Cautious(SGD(0.1), eps=0.0), r"Cautious: `eps` must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("optimizer", [AGC(0.1, SGD(0.1)), TrustRatio(0.1, SGD(0.1))])
def test_missing_params_are_named(optimizer: mo.Optimizer) -> None:
    w = torch.ones(2)
    with pytest.raises(ValueError, match=rf"`{type(optimizer).__name__}` needs `params` because"):
        optimizer(w, optimizer.init(w))

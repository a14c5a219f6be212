"""Losses in float16: their derivatives are scaled while they are computed, and right outside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_level_buffers import problem
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jvp, vmap

import metaopt as mo
from metaopt import tree
from metaopt.levels.loss_scale import enter_scaled, leave_scaled
from optimizers import SGD, Adam

S = 2.0**12
W = torch.linspace(-1, 1, 3, dtype=torch.float64).sin()


def plain(w: Tensor) -> Tensor:
    return (w.tanh().square().sum() + w.prod()) * w[0]


def scaled(w: Tensor) -> Tensor:
    return leave_scaled(plain(enter_scaled(w, S)), S)


Loss = Callable[[Tensor], Tensor]
WAYS: dict[str, Callable[[Loss], Loss]] = {
    "value": lambda loss: loss,
    "gradient": grad,
    "hessian": hessian,
    "reverse over reverse": lambda loss: grad(lambda w: (grad(loss)(w) * w.cos()).sum()),
    "three times": lambda loss: grad(
        lambda w: grad(lambda w: grad(loss)(w).square().sum())(w).square().sum()
    ),
    "forward": lambda loss: lambda w: jvp(loss, (w,), (w.cos(),))[1],
    "forward over reverse": lambda loss: lambda w: jvp(grad(loss), (w,), (w.cos(),))[1],
    "reverse over forward": lambda loss: grad(lambda w: jvp(loss, (w,), (w.cos(),))[1]),
    "forward twice": lambda loss: jacfwd(jacfwd(loss)),
    "a step": lambda loss: grad(lambda w: loss(w - 0.3 * grad(loss)(w))),
    "two losses": lambda loss: grad(lambda w: loss(w - loss(w.cos()) * grad(loss)(2 * w))),
    "batched": lambda loss: lambda w: vmap(grad(loss))(torch.stack([w, 2 * w])),
    "batched inside": lambda loss: grad(lambda w: vmap(loss)(torch.stack([w, 2 * w])).sum()),
}


@pytest.mark.parametrize("way", WAYS)
def test_derivatives_of_every_order_are_those_of_the_loss(way: str) -> None:
    """To the last bit but for the order of sums: powers of two round nothing."""
    torch.testing.assert_close(WAYS[way](scaled)(W), WAYS[way](plain)(W), rtol=1e-14, atol=1e-14)


def test_inside_they_are_scaled() -> None:
    """The cotangents of a first derivative, and those of a second one."""
    w = W.clone().requires_grad_()
    inside = enter_scaled(w, S)
    (first,) = torch.autograd.grad(leave_scaled(plain(inside), S), w, create_graph=True)
    seen: list[Tensor] = []
    inside.register_hook(seen.append)
    torch.autograd.grad(plain(inside), inside, retain_graph=True)
    (second,) = torch.autograd.grad((first * W.cos()).sum(), w)
    torch.testing.assert_close(second, hessian(plain)(W) @ W.cos())
    torch.testing.assert_close(seen[-1], S * second.detach())


# levels


def make_graph(rule: Any, given: dict[str, Any]) -> mo.LevelGraph:
    """Return a level that fits weighted rows, by elementwise operations, under their weights."""
    torch.manual_seed(2)
    x = torch.randn(4, 3)
    levels = {"low": nn.Linear(3, 1), "top": nn.Linear(1, 3, bias=False)}

    def errors(levels: Any, rows: Tensor) -> Tensor:
        weight, bias = levels.low.params["weight"], levels.low.params["bias"]
        return ((rows * weight).sum(-1) + bias - 0.5).tanh().square()

    def low(levels: Any, rows: Tensor) -> Tensor:
        pull = (levels.top.params["weight"].sigmoid() * levels.low.params["weight"].mT).square()
        return errors(levels, rows).mean() + pull.sum()

    def top(levels: Any, rows: Tensor) -> Tensor:
        return errors(levels, rows).mean()

    inner = mo.Level("low", levels["low"], low, SGD(0.1, momentum=0.9), [x, 2 * x], **given)
    outer = mo.Level("top", levels["top"], top, Adam(0.1), [x], **given)
    return mo.LevelGraph([mo.Edge(outer, inner, steps=2, differentiate=rule)])


RULES = [
    mo.Backprop(),
    mo.Backprop("steps"),
    mo.ForwardMode(),
    mo.T1T2(),
    mo.SAMA(),
    mo.FiniteDifference(),
    mo.Implicit(mo.ConjugateGradient(max_steps=3, damping=1.0)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_level_that_autocast_leaves_in_float32_has_the_same_bits(rule: Any) -> None:
    """No operation here is computed in float16: what is left of it is the scale."""
    both = [
        make_graph(rule, given) for given in ({"precision": torch.float16, "loss_scale": S}, {})
    ]
    for graph in both:
        graph.step()
    found, wanted = (graph.hypergradient("top")["weight"] for graph in both)
    assert torch.equal(found, wanted)
    for graph in both:
        graph.step()
    for one, other in zip(*(tree.leaves(graph.state_dict()) for graph in both), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("shape", [{}, {"accumulate": 2}, {"copies": 2}])
def test_buffers_that_have_derivatives_cross_too(shape: dict[str, Any]) -> None:
    """An average of weights, which both losses read; batched, and over several batches."""
    found, wanted = (problem("both", mo.Backprop(), **shape) for _ in range(2))
    for one in found.plan.levels.values():
        one.precision, one.loss_scale = torch.float16, S
    for graph in (found, wanted):
        graph.step()
    torch.testing.assert_close(
        found.hypergradient("up"), wanted.hypergradient("up"), rtol=1e-14, atol=0
    )


SMALL = 2.0**-22  # what a loss in float16 multiplies: cotangents are then below 6e-8 there


def make_half(rule: Any, **given: Any) -> mo.LevelGraph:
    """Return a level of two layers, whose loss is small and whose optimizer makes up for it."""
    torch.manual_seed(3)
    x, y = torch.randn(16, 5), torch.randn(16, 2)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    weights = nn.Linear(2, 1)

    def low(levels: Any, batch: Any) -> Tensor:
        x, y = batch
        errors = (levels.low(x).float() - y).square()
        return SMALL * (levels.top(errors.detach()).sigmoid().float() * errors).mean()

    def top(levels: Any, batch: Any) -> Tensor:
        x, y = batch
        return SMALL * (levels.low(x).float() - y).square().mean()

    inner = mo.Level("low", model, low, SGD(0.5 / SMALL, momentum=0.5), [(x, y)], **given)
    outer = mo.Level("top", weights, top, Adam(0.1, eps=1e-20), [(x, y.cos())], **given)
    return mo.LevelGraph([mo.Edge(outer, inner, steps=3, differentiate=rule)])


def hypergradient(rule: Any, **given: Any) -> Tensor:
    graph = make_half(rule, **given)
    graph.step()
    return tree.ravel(graph.hypergradient("top"))


@pytest.mark.parametrize("rule", [mo.Backprop(), mo.ForwardMode()])
def test_what_float16_would_lose_is_kept(rule: Any) -> None:
    """The first and the mixed second derivative; without a scale nothing of them is left."""
    wanted = hypergradient(rule)
    found = hypergradient(rule, precision=torch.float16)
    lost = hypergradient(rule, precision=torch.float16, loss_scale=1.0)
    # what is multiplied by 1024 has two digits, above the steps of 6e-8 that float16 makes
    assert (found - wanted).norm() < 4e-2 * wanted.norm()
    assert lost.norm() < 1e-2 * wanted.norm()
    large = hypergradient(rule, precision=torch.float16, loss_scale=2.0**14)
    assert (large - wanted).norm() < 4e-3 * wanted.norm()  # and then three


def test_a_resumed_level_has_the_same_bits() -> None:
    straight, first, second = (make_half(mo.Backprop(), precision=torch.float16) for _ in range(3))
    for _ in range(4):
        straight.step()
    for _ in range(2):
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.step()
    pairs = zip(
        tree.leaves(straight.state_dict()["levels"]),
        tree.leaves(second.state_dict()["levels"]),
        strict=True,
    )
    assert all(torch.equal(*pair) for pair in pairs)


def test_what_overflows_is_an_error() -> None:
    graph = make_half(mo.Backprop(), precision=torch.float16, loss_scale=2.0**40)
    remedy = "Or lower `loss_scale`, 1099511627776.0 of 'top', 1099511627776.0 of 'low': in float16"
    with pytest.raises(mo.NonFiniteError, match=rf"level 'low'.*\. {remedy}"):
        graph.step()

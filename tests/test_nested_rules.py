"""Every pair of rules nested, a loss that calls `minimize` inside `minimize`.

Exact, or a clear error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor
from torch.func import grad, vmap

import metaopt as mo
from optimizers import SGD

pytestmark = [
    pytest.mark.usefixtures("float64"),
]

PATH: dict[str, Any] = {
    "full": mo.Backprop(),
    "steps": mo.Backprop("steps"),
    "revolve": mo.Backprop(mo.Revolve(1)),
    "forward": mo.ForwardMode(),
}
POINT: dict[str, Any] = {
    "implicit": mo.Implicit(mo.ConjugateGradient(rtol=1e-14)),
    "T1T2": mo.T1T2(),
    "difference": mo.FiniteDifference(),
    "SAMA": mo.SAMA(),
    "penalty": mo.Penalty(10.0, 2, 1.0),
}
RULES = PATH | POINT
FORWARD_OVER = {*POINT, "forward"}  # have no forward derivative

# the middle level's own curvature; the response of the lower one adds what is missing to 1
KEPT = 0.3
ANGLE = torch.tensor(0.4, dtype=torch.float64)
TURN = (1 - KEPT) ** 0.5 * torch.stack(
    [torch.stack([ANGLE.cos(), -ANGLE.sin()]), torch.stack([ANGLE.sin(), ANGLE.cos()])]
)
TOP = torch.tensor([0.4, -0.7], dtype=torch.float64)


def lower_loss(w: Tensor, top: Tensor, middle: Tensor) -> Tensor:
    return (w - TURN @ middle - top.sin()).square().sum() / 2


def middle_loss(w: Tensor, middle: Tensor, top: Tensor) -> Tensor:
    """With w = TURN m + sin top its Hessian in m is the identity.

    One step of size 1 solves it, and all rules are exact.
    """
    return KEPT / 2 * (middle - top**2).square().sum() + (w - 1).square().sum() / 2


def top_loss(w: Tensor, middle: Tensor, top: Tensor) -> Tensor:
    return (middle.sin() * torch.tensor([1.0, 2.0])).sum() + (w**3).sum() + (top * middle).sum()


def nested(lower: Any, upper: Any, top: Tensor) -> Tensor:
    def solve(middle: Tensor, top: Tensor) -> Tensor:
        return mo.minimize(
            lower_loss, SGD(1.0), torch.zeros(2), top, steps=2, meta=middle, differentiate=lower
        ).params

    def loss(middle: Tensor, _: None, top: Tensor) -> Tensor:
        return middle_loss(solve(middle, top), middle, top)

    middle = mo.minimize(
        loss, SGD(1.0), torch.ones(2), None, steps=2, meta=top, differentiate=upper
    ).params
    return top_loss(solve(middle, top), middle, top)


def by_hand(top: Tensor, *, first_order: tuple[bool, bool] = (False, False)) -> Tensor:
    """The same two loops as `torch.autograd` sees them.

    The lower and the middle level's gradients may be constants.
    """

    def descend(loss: Callable[[Tensor], Tensor], start: Tensor, constant: bool) -> Tensor:
        w = start.requires_grad_()
        for _ in range(2):
            (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
            w = w - (g.detach() if constant else g)
        return w

    def solve(middle: Tensor) -> Tensor:
        return descend(lambda w: lower_loss(w, top, middle), torch.zeros(2), first_order[0])

    middle = descend(lambda m: middle_loss(solve(m), m, top), torch.ones(2), first_order[1])
    return top_loss(solve(middle), middle, top)


def gradient_by_hand(**options: Any) -> Tensor:
    top = TOP.clone().requires_grad_()
    (g,) = torch.autograd.grad(by_hand(top, **options), top)
    return g


def backward(function: Callable[[Tensor], Tensor]) -> Tensor:
    top = TOP.clone().requires_grad_()
    function(top).backward()
    assert top.grad is not None
    return top.grad


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "backward": backward,
    "grad": lambda function: grad(function)(TOP),
    "vmap(grad)": lambda function: vmap(grad(function))(torch.stack([TOP + 1, TOP]))[1],
}


def test_the_problem_tells_rules_apart() -> None:
    """Without the lower level's response, or without the middle one's, the gradient is another."""
    exact = gradient_by_hand()
    for lost in ((True, False), (False, True), (True, True)):
        assert (gradient_by_hand(first_order=lost) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("lower", "upper"), [*itertools.product(RULES, RULES)])
def test_every_pair(lower: str, upper: str, way: str) -> None:
    """All losses are quadratic in what is minimised, so differences are exact too.

    What is left is rounding, 1e-16 / radius^2.
    """

    def value(top: Tensor) -> Tensor:
        return nested(RULES[lower], RULES[upper], top)

    if upper == "forward" and lower in FORWARD_OVER:
        with pytest.raises(
            ValueError, match=r"knows its derivative in reverse mode alone .* use `Backprop\(\)`"
        ):
            WAYS[way](value)
        return
    assert_close(WAYS[way](value), gradient_by_hand(), 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", PATH)
def test_first_order_below_and_above_the_rules_of_the_steps_taken(other: str, way: str) -> None:
    """What it leaves out, it leaves out in any company."""
    below = WAYS[way](lambda top: nested(mo.FirstOrder(), RULES[other], top))
    assert_close(below, gradient_by_hand(first_order=(True, False)), 1e-10)
    above = WAYS[way](lambda top: nested(RULES[other], mo.FirstOrder(), top))
    assert_close(above, gradient_by_hand(first_order=(False, True)), 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_evolution_strategies_above_every_rule(rule: str) -> None:
    """They see values alone. The mean of 10 estimates within 4 of their standard errors."""
    upper = mo.EvolutionStrategy(1e-3, 60, seed=3)
    draws = torch.stack(
        [WAYS["grad"](lambda top: nested(RULES[rule], upper, top)) for _ in range(10)]
    )
    error = draws.std(0) / 10**0.5
    exact = gradient_by_hand()
    assert (error < 0.1 * exact.norm()).all()
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize(
    "rule", [name for name in RULES if name not in ("forward", "difference", "SAMA")]
)
def test_evolution_strategies_below_every_rule(rule: str) -> None:
    """A noisy response moves the middle level itself.

    Many pairs: the estimate's relative error is sqrt(3 / 20000) = 1 %.

    Differences divide that by their radius. A penalty multiplies it: its error is 5 to 20 %, and
    below 10 for this seed.
    """
    lower = mo.EvolutionStrategy(1e-3, 20000, seed=2)
    assert_close(
        WAYS["backward"](lambda top: nested(lower, RULES[rule], top)), gradient_by_hand(), 0.1
    )

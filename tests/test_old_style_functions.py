"""Losses with an `autograd.Function` of the old style, whose `forward` has a `ctx`.

No transform of `torch.func` takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from metaopt.differentiate import Rule
from optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")


class Cube(torch.autograd.Function):
    """x^3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


class Reversal(torch.autograd.Function):
    """The identity, with the derivative -1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


CG = mo.ConjugateGradient(max_steps=3)
RULES: dict[str, Rule] = {
    "plain": mo.Backprop(),
    "steps": mo.Backprop("steps"),
    "Revolve": mo.Backprop(memory=mo.Revolve(2)),
    "window": mo.Backprop(window=2),
    "microbatches": mo.Backprop("steps", microbatches=2),
    "first order": mo.FirstOrder(),
    "first order, steps": mo.FirstOrder("steps"),
    "T1T2": mo.T1T2(),
    "difference": mo.FiniteDifference(),
    "SAMA": mo.SAMA(),
    "penalty": mo.Penalty(1e4, 5, 0.05),
} | {
    f"implicit, {type(solver).__name__}": mo.Implicit(solver)
    for solver in (
        CG,
        mo.Direct(),
        mo.NormalCG(),
        mo.GMRES(),
        mo.BiCGStab(),
        mo.Neumann(0.1),
        mo.Nystrom(2),
        mo.NystromCG(rank=2),
    )
}
torch.manual_seed(0)
X, Y, START = torch.randn(6, 3).double(), torch.randn(6).double(), torch.randn(3).double() / 3


def two_derivatives(rule: Rule, cube: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the derivatives of an outer loss in `meta` and the rate, twice, that do not vanish."""
    meta, rate = torch.tensor([0.0, 1.0], requires_grad=True), nn.Parameter(torch.tensor(0.05))

    def loss(w: Tensor, batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
        x, y = batch
        return (cube(x @ w) - y).square().mean() * meta[0].exp() + meta[1].exp() * w.square().sum()

    out = mo.minimize(loss, SGD(rate), START, (X, Y), steps=4, meta=meta, differentiate=rule)
    value = (out.params - 1).square().sum() + out.losses.sum()
    first = torch.autograd.grad(value, [meta, rate], create_graph=True, materialize_grads=True)
    total = first[0].square().sum() + first[1].square()
    return [*first, *torch.autograd.grad(total, [meta, rate], materialize_grads=True)]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_differentiates_it_twice(name: str) -> None:
    """Only those that differentiate the steps could do so once.

    They have parameters that require grad.
    """
    found = two_derivatives(RULES[name], Cube.apply)
    assert found[0].abs().sum() + found[1].abs() > 0
    assert_close(found, two_derivatives(RULES[name], lambda x: x**3), 1e-10)


@pytest.mark.parametrize(
    "name", ["plain", "first order", "implicit, ConjugateGradient", "T1T2", "SAMA"]
)
@pytest.mark.parametrize("steps", [1, 3])
def test_levels(name: str, steps: int) -> None:
    def hypergradient(cube: Callable[[Tensor], Tensor]) -> Tensor:
        lower, upper = (
            nn.ParameterDict({"w": nn.Parameter(at.clone())})
            for at in (START, torch.tensor([0.1, -1.0]))
        )

        def loss(levels: Any, batch: Any) -> Tensor:
            w, meta = levels.lower.params["w"], levels.upper.params["w"]
            return (cube(X @ w) - Y).square().mean() * meta[0].exp() + meta[
                1
            ].exp() * w.square().sum()

        def outer(levels: Any, batch: Any) -> Tensor:
            return cube(levels.lower.params["w"] - 1).sum()

        edge = mo.Edge(
            mo.Level("upper", upper, outer, SGD(0.1), allow_unused=True),
            mo.Level("lower", lower, loss, SGD(0.05)),
            steps=steps,
            differentiate=RULES[name],
        )
        return mo.LevelGraph([edge]).hypergradient("upper")["w"]

    found = hypergradient(Cube.apply)
    assert_close(found, hypergradient(lambda x: x**3), 1e-12)
    assert (found != 0).any() or name == "first order"


def test_a_derivative_that_is_none_of_its_function_is_kept() -> None:
    """Gradient reversal, in an adversarial loss: w descends, the domain's weights v ascend."""
    w, v, meta = torch.tensor(0.7), torch.tensor(0.4), torch.tensor(0.5, requires_grad=True)

    def loss(params: dict[str, Tensor], _: Any, meta: Tensor) -> Tensor:
        return (params["w"] * meta).sin() + params["v"] * Reversal.apply(params["w"]) * meta

    for rule in (mo.Backprop(), mo.Backprop("steps")):
        out = mo.minimize(
            loss, SGD(0.1), {"w": w, "v": v}, None, steps=1, meta=meta, differentiate=rule
        )
        expected = w - 0.1 * (meta * (w * meta).cos() - v * meta)
        assert_close(out.params["w"], expected, 1e-14)
        (found,), (wanted,) = (
            torch.autograd.grad(end, meta) for end in (out.params["w"], expected)
        )
        assert_close(found, wanted, 1e-13)


@pytest.mark.parametrize(
    "rule", [mo.ForwardMode(), mo.Backprop("steps", hvp="forward")], ids=["ForwardMode", "forward"]
)
def test_what_needs_a_transform_says_so(rule: Rule) -> None:
    with pytest.raises(
        ValueError,
        match=r"runs the loss inside a transform of `torch.func`, which takes no "
        r"`autograd.Function`",
    ):
        two_derivatives(rule, Cube.apply)


def test_evolution_strategies_say_so_too() -> None:
    with pytest.raises(
        ValueError,
        match=r"`EvolutionStrategy` runs the loop for all pairs at once by `vmap`.*Use "
        r"`Backprop\(\)`",
    ):
        two_derivatives(mo.EvolutionStrategy(), Cube.apply)

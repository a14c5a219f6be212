"""Losses that contain second derivatives of a norm.

One more, and torch's own kernels are wrong by per cents.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad, hessian, jvp, vmap
from torch.overrides import _get_current_function_mode_stack

import metaopt as mo
from metaopt.differentiate import Rule
from metaopt.exact_ops import AnyOrder
from optimizers import SGD

pytestmark = [
    pytest.mark.usefixtures("float64"),
]
IMPLICIT = mo.Implicit(mo.Direct(damping=1.0))
RULES = [mo.Backprop(), mo.Backprop("steps"), mo.T1T2(), mo.FiniteDifference(), mo.SAMA(), IMPLICIT]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


class WrittenOut(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight
            + self.bias
        )


def network(norm: type) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 1))


def roughness(net: Any, x: Tensor) -> Tensor:
    """Return the mean square of the network's curvature in its inputs."""
    return vmap(hessian(lambda row: net(row).sum()))(x).square().sum((1, 2)).mean()


def points() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


@each_rule
def test_in_an_inner_loop(rule: Rule) -> None:
    """1e-8: the finite difference divides rounding by its radius.

    torch's kernels are off by 5e-3 and more.
    """

    def hypergradient(norm: type) -> Any:
        net, weight = mo.functional(network(norm)), torch.ones((), requires_grad=True)

        def loss(params: Any, x: Tensor, weight: Tensor) -> Tensor:
            return (weight * net(params, x).square()).mean() + roughness(
                lambda row: net(params, row), x
            )

        start = {name: param.detach() for name, param in net.params.items()}
        params = mo.minimize(
            loss, SGD(0.1), start, points(), steps=3, meta=weight, differentiate=rule
        ).params
        value = net(params, points() + 1).square().mean()
        return value.detach(), torch.autograd.grad(value, weight)[0]

    assert_close(hypergradient(nn.LayerNorm), hypergradient(WrittenOut), 1e-8)


def test_of_the_first_order() -> None:
    """What is learned is the rate: of the loss itself this rule takes no derivative."""

    def of_rate(norm: type) -> Any:
        net, rate = mo.functional(network(norm)), torch.tensor(0.1, requires_grad=True)
        start = {name: param.detach() for name, param in net.params.items()}

        def loss(params: Any, x: Tensor) -> Tensor:
            return roughness(lambda row: net(params, row), x)

        losses = mo.minimize(
            loss, SGD(rate), start, points(), steps=3, differentiate=mo.FirstOrder()
        ).losses
        return losses.detach(), torch.autograd.grad(losses.sum(), rate)[0]

    assert_close(of_rate(nn.LayerNorm), of_rate(WrittenOut), 1e-8)


@each_rule
def test_above_and_below_in_a_graph(rule: Rule) -> None:
    def after_two_steps(norm: type) -> Any:
        def low_loss(levels: Any, x: Tensor) -> Tensor:
            return roughness(levels.low, x) + (levels.top(x) - levels.low(x)).square().mean()

        def top_loss(levels: Any, x: Tensor) -> Tensor:
            return levels.low(x + 1).square().mean() + roughness(levels.top, x)

        low = mo.Level("low", network(norm), low_loss, SGD(0.1), data=[points()])
        top = mo.Level("top", network(norm), top_loss, SGD(0.1), data=[points()])
        graph = mo.LevelGraph([mo.Edge(top, low, steps=2, differentiate=rule)])
        for _ in range(2):
            graph.step()
        return graph.params("low"), graph.params("top")

    assert_close(after_two_steps(nn.LayerNorm), after_two_steps(WrittenOut), 1e-8)


@pytest.mark.parametrize("memory", ["steps", mo.Revolve(1)], ids=["steps", "revolve"])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d, lambda size: nn.InstanceNorm1d(size, track_running_stats=True)]
)
def test_running_statistics_below_a_rule_that_rebuilds_steps(norm: Any, memory: Any) -> None:
    def graph(memory: Any) -> mo.LevelGraph:
        torch.manual_seed(0)
        low_model, top_model = (
            nn.Sequential(nn.Conv1d(2, 4, 1), norm(4), nn.Conv1d(4, 2, 1)),
            nn.Conv1d(2, 2, 1),
        )
        data = [torch.randn(5, 2, 3) for _ in range(3)]
        low = mo.Level(
            "low",
            low_model,
            lambda s, x: (s.low(x) - s.top(x)).square().mean(),
            SGD(0.1),
            data=data,
        )
        top = mo.Level(
            "top", top_model, lambda s, x: (s.low(x) - x).square().mean(), SGD(0.1), data=data
        )
        return mo.LevelGraph([mo.Edge(top, low, steps=2, differentiate=mo.Backprop(memory))])

    assert_close(graph(memory).hypergradient("top"), graph("full").hypergradient("top"), 1e-12)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.Identity])
def test_a_level_whose_loss_calls_nothing_delicate_pays_nothing(norm: type) -> None:
    """`any_order` costs a microsecond for each call.

    A graph finds out when it is built who needs it.
    """
    entered: list[bool] = []

    def loss(levels: Any, x: Tensor) -> Tensor:
        entered.append(
            any(isinstance(mode, AnyOrder) for mode in _get_current_function_mode_stack())
        )
        return (levels.top.params["weight"] * levels.low(x).square()).mean()

    weight = nn.ParameterDict({"weight": nn.Parameter(torch.ones(()))})
    low = mo.Level("low", network(norm), loss, SGD(0.1), data=[points()])
    top = mo.Level("top", weight, lambda s, x: s.low(x).square().mean(), SGD(0.1), data=[points()])
    graph = mo.LevelGraph([mo.Edge(top, low, differentiate=mo.FiniteDifference())])
    assert all(entered)
    entered.clear()
    graph.step()
    assert len(entered) == 3
    assert set(entered) == {norm is nn.LayerNorm}


SQUARES = [F.mse_loss, F.huber_loss]  # torch has no forward derivative of their gradients
each_square = pytest.mark.parametrize(
    "criterion", SQUARES, ids=lambda criterion: criterion.__name__
)


@each_square
def test_squares_pay_nothing_but_where_derivatives_are_forward(criterion: Any) -> None:
    """A third of what iMAML took beyond PyTorch by hand was a mode.

    Only forward derivatives need it.
    """
    entered: list[bool] = []

    def hypergradient(rule: Rule) -> Any:
        torch.manual_seed(0)

        def loss(levels: Any, x: Tensor) -> Tensor:
            entered.append(
                any(isinstance(mode, AnyOrder) for mode in _get_current_function_mode_stack())
            )
            return criterion(levels.low(x), levels.top(x))

        low = mo.Level("low", nn.Linear(3, 2), loss, SGD(0.1), data=[points()])
        top = mo.Level(
            "top", nn.Linear(3, 2), lambda s, x: s.low(x).square().mean(), SGD(0.1), data=[points()]
        )
        graph = mo.LevelGraph([mo.Edge(top, low, steps=2, differentiate=rule)])
        entered.clear()
        return graph.hypergradient("top")

    expected = hypergradient(mo.Backprop())
    assert not any(entered)
    assert_close(hypergradient(mo.Backprop("steps", hvp="forward")), expected, 1e-12)
    assert any(entered)
    assert_close(hypergradient(mo.ForwardMode()), expected, 1e-12)


@each_square
def test_squares_whose_forward_derivative_is_part_of_the_loss(criterion: Any) -> None:
    """A product with a Hessian, forward over reverse.

    Here the loss itself asks for the derivative that torch lacks.
    """

    def after_a_step(of: Any) -> Any:
        def loss(levels: Any, x: Tensor) -> Tensor:
            def slope(x: Tensor) -> Tensor:
                return grad(lambda x: of(levels.low(x), points()[:, :1]))(x)

            return (
                jvp(slope, (x,), (x,))[1].square().sum()
                + (levels.top(x) - levels.low(x)).square().mean()
            )

        low = mo.Level("low", network(nn.Identity), loss, SGD(0.1), data=[points()])
        top = mo.Level(
            "top",
            network(nn.Identity),
            lambda s, x: s.low(x).square().mean(),
            SGD(0.1),
            data=[points()],
        )
        graph = mo.LevelGraph([mo.Edge(top, low, differentiate=mo.T1T2())])
        graph.step()
        return graph.params("low"), graph.params("top")

    def written_out(y: Tensor, at: Tensor) -> Tensor:
        distance = (y - at).abs()
        if criterion is F.huber_loss:
            return torch.where(distance < 1, 0.5 * distance.square(), distance - 0.5).mean()
        return distance.square().mean()

    assert_close(after_a_step(criterion), after_a_step(written_out), 1e-10)

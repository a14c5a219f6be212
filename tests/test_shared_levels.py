"""Levels that several others wait for, and that themselves wait for shared ones.

They are compared with nested gradients by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from level_problems import Value, batches, coupled
from problems import assert_close
from torch import Tensor
from torch.func import grad, jacrev

import metaopt as mo
from metaopt.differentiate import Rule
from optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")
LR, PAIR = 0.05, (0, 1)
EXACT = mo.Implicit(mo.Direct())
Pair = tuple[Tensor, Tensor]


def top_loss(j: int, t: Tensor, m: Pair) -> Tensor:
    return coupled(t, [], m, torch.full_like(t, 0.3 + j))


def middle_loss(j: int, m: Tensor, t: Pair, x: Pair) -> Tensor:
    return coupled(m, t, x, torch.full_like(m, 0.1 - j))


def low_loss(j: int, x: Tensor, m: Pair) -> Tensor:
    return coupled(x, m, [], torch.full_like(x, 0.5 * j))


def three_layers(steps: tuple[int, int], rule: Rule, *, tops: int = 2) -> mo.LevelGraph:
    """Return two levels under each of two under each of the tops.

    Losses read the layer above and the layer below.
    """
    start = batches(6, 7)

    def values(levels: Any, layer: str, count: int = 2) -> Any:
        return tuple(getattr(levels, f"{layer}{j}")() for j in range(count))

    def top(j: int) -> Callable[[Any, Any], Tensor]:
        return lambda s, _: top_loss(j, getattr(s, f"t{j}")(), values(s, "m"))

    def middle(j: int) -> Callable[[Any, Any], Tensor]:
        return lambda s, _: middle_loss(
            j, getattr(s, f"m{j}")(), values(s, "t", tops), values(s, "x")
        )

    def low(j: int) -> Callable[[Any, Any], Tensor]:
        return lambda s, _: low_loss(j, getattr(s, f"x{j}")(), values(s, "m"))

    layers = [
        [
            mo.Level(f"{name}{j}", Value(start[2 * i + j]), loss(j), SGD(LR))
            for j in range(tops if name == "t" else 2)
        ]
        for i, (name, loss) in enumerate([("t", top), ("m", middle), ("x", low)])
    ]
    return mo.LevelGraph(
        [
            mo.Edge(*pair, steps=count, differentiate=rule)
            for (upper, lower), count in zip(itertools.pairwise(layers), steps, strict=True)
            for pair in itertools.product(upper, lower)
        ]
    )


def replaced(pair: Pair, j: int, value: Tensor) -> Pair:
    return (value, pair[1]) if j == 0 else (pair[0], value)


def low_steps(x: Pair, m: Pair, count: int) -> Pair:
    """Return where the low levels are after their steps."""
    for _ in range(count):
        x = tuple(x[j] - LR * grad(lambda one, j=j: low_loss(j, one, m))(x[j]) for j in PAIR)
    return x


def middle_steps(t: Pair, m: Pair, x: Pair, steps: tuple[int, int]) -> tuple[Pair, Pair]:
    """Return where the middle and the low levels are after the steps of the middle ones.

    The middle ones see how the low ones followed. Both low levels move, then m1, then m0: the later
    one of two levels side by side moves first.
    """
    for _ in range(steps[0]):
        before, x_before = m, x
        x = low_steps(x_before, before, steps[1])
        for j in reversed(PAIR):

            def total(one: Tensor, j: int = j, m_then: Pair = before, x: Pair = x_before) -> Tensor:
                return middle_loss(j, one, t, low_steps(x, replaced(m_then, j, one), steps[1]))

            m = replaced(m, j, m[j] - LR * grad(total)(m[j]))
    return m, x


@pytest.mark.parametrize("steps", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("tops", [1, 2])
def test_three_layers_of_shared_levels_equal_nested_gradients(
    steps: tuple[int, int], tops: int
) -> None:
    """Two rounds, 1e-10: float64 rounding of some thousand operations."""
    graph = three_layers(steps, mo.Backprop(), tops=tops)
    values = batches(6, 7)
    t, m, x = tuple(values[:tops]), (values[2], values[3]), (values[4], values[5])
    for _ in range(2):
        hypergradients = []
        for j in range(tops):

            def total(one: Tensor, j: int = j, t: Any = t, m: Pair = m, x: Pair = x) -> Tensor:
                ahead = tuple(one if i == j else t[i] for i in range(tops))
                return top_loss(j, one, middle_steps(ahead, m, x, steps)[0])

            hypergradients.append(grad(total)(t[j]))
            if tops == 1:
                assert_close(
                    graph.hypergradient(f"t{j}", after_steps=True)["value"],
                    hypergradients[j],
                    1e-10,
                )
        m, x = middle_steps(t, m, x, steps)
        t = tuple(t[j] - LR * hypergradients[j] for j in range(tops))
        graph.step()
        found = {key: graph.params(key)["value"] for key in graph.plan.levels}
        expected = {
            f"{layer}{j}": one
            for layer, pair in zip("tmx", (t, m, x), strict=True)
            for j, one in enumerate(pair)
        }
        assert_close(found, expected, 1e-10)
        assert all(hypergradient.norm() > 1e-2 for hypergradient in hypergradients)


@pytest.mark.parametrize("tops", [1, 2])
def test_implicit_over_implicit_with_shared_levels(tops: int) -> None:
    """The derivative of x* is -H^-1 C wherever x stands.

    That of m* is the same of the total loss, in which x* moves with m.
    """
    graph = three_layers((1, 1), EXACT, tops=tops)
    values = batches(6, 7)
    t, m, x = tuple(values[:tops]), (values[2], values[3]), (values[4], values[5])

    def response(j: int, k: int, m: Pair) -> Tensor:
        """Return dx_k / dm_j."""
        slope = grad(lambda one, m: low_loss(k, one, m))
        hessian, mixed = jacrev(slope, 0)(x[k], m), jacrev(slope, 1)(x[k], m)[j]
        return -torch.linalg.solve(hessian, mixed)

    def slope(j: int, one: Tensor, t: Any, x: Pair) -> Tensor:
        """Return the gradient of the total loss of m_j: dL/dm + sum_k (dx_k/dm)' dL/dx_k."""
        direct, to_x = grad(lambda one, x: middle_loss(j, one, t, x), (0, 1))(one, x)
        return direct + sum(response_at(j, k, one, x).T @ to_x[k] for k in PAIR)

    def response_at(j: int, k: int, one: Tensor, at: Pair) -> Tensor:
        gradient = grad(lambda x, m: low_loss(k, x, replaced(m_now, j, m)))
        return -torch.linalg.solve(jacrev(gradient, 0)(at[k], one), jacrev(gradient, 1)(at[k], one))

    m_now = m
    for upper in range(tops):
        expected, to_m = grad(lambda one, m: top_loss(upper, one, m), (0, 1))(t[upper], m)  # noqa: B023
        for j in PAIR:
            own, of_t, of_x = jacrev(lambda one, t, x: slope(j, one, t, x), (0, 1, 2))(m[j], t, x)  # noqa: B023
            hessian = own + sum(of_x[k] @ response(j, k, m) for k in PAIR)  # x moves with m_j
            expected = expected - (torch.linalg.solve(hessian, of_t[upper])).T @ to_m[j]
        assert_close(graph.hypergradient(f"t{upper}")["value"], expected, 1e-9)


def test_a_loss_that_reads_past_a_shared_level_is_refused() -> None:
    def loss(own: str, *others: str) -> Callable[[Any, Any], Tensor]:
        return lambda s, _: sum(
            (getattr(s, own)() - getattr(s, other)()).square().sum() for other in others
        )

    reads = {"a": ("c", "d"), "b": ("c",), "c": ("a", "b", "d"), "e": ("d",), "d": ("c", "e")}
    levels = {
        name: mo.Level(name, Value(batches(1, 1)[0]), loss(name, *others), SGD(LR))
        for name, others in reads.items()
    }
    pairs = [("a", "c"), ("b", "c"), ("c", "d"), ("e", "d")]
    with pytest.raises(
        ValueError,
        match="level 'a': its loss reads 'd', which 'c' waits for and shares with others",
    ):
        mo.LevelGraph(
            [mo.Edge(levels[upper], levels[lower], differentiate=EXACT) for upper, lower in pairs]
        )

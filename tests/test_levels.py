"""Levels of any depth: closed forms, and autograd through everything written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from level_problems import CG, batches, coupled, level, tower, tower_losses
from problems import assert_close
from torch import Tensor

import metaopt as mo
from optimizers import SGD

LR = 0.05

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own: forward derivatives, the compiler
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]


# Paths, with closed forms


def chain(rule: Any) -> mo.LevelGraph:
    t = level("t", 0.7, lambda s, _: 0.5 * (s.m() - 3) ** 2)
    low = level("low", 0.5, lambda s, _: 0.5 * (s.low() - 5 * s.t()) ** 2)
    m = level("m", 0.2, lambda s, _: 0.5 * (s.m() - 2 * s.low()) ** 2)
    return mo.LevelGraph([mo.Edge(t, low, differentiate=rule), mo.Edge(low, m, differentiate=rule)])


def diamond(rule: Any) -> mo.LevelGraph:
    t = level("t", 0.7, lambda s, _: 0.5 * (s.m() - 3) ** 2)
    left = level("left", 0.5, lambda s, _: 0.5 * (s.left() - 5 * s.t()) ** 2)
    right = level("right", 0.5, lambda s, _: 0.5 * (s.right() - 11 * s.t()) ** 2)
    m = level("m", 0.2, lambda s, _: 0.5 * (s.m() - 2 * s.left() - 7 * s.right()) ** 2)
    return mo.LevelGraph(
        [
            mo.Edge(*ends, differentiate=rule)
            for ends in ((t, left), (t, right), (left, m), (right, m))
        ]
    )


def nested(rule: Any) -> mo.LevelGraph:
    t = level("t", 0.7, lambda s, _: 0.5 * (s.m() - 3) ** 2)
    m = level("m", 0.2, lambda s, _: 0.5 * (s.m() - s.t()) ** 2 + 0.5 * (s.low() - 1) ** 2)
    low = level("low", 0.5, lambda s, _: 0.5 * (s.low() - s.m()) ** 2)
    return mo.LevelGraph([mo.Edge(t, m, differentiate=rule), mo.Edge(m, low, differentiate=rule)])


@pytest.mark.parametrize(("graph", "expected"), [(chain, -28.0), (diamond, -243.6), (nested, -1.4)])
def test_every_path_counts(graph: Any, expected: float) -> None:
    """-2.8 x 2 x 5.

    -2.8 x (2 x 5 + 7 x 11);  -2.8 / 2, since the middle level's curvature includes the response
    below it.
    """
    assert_close(graph(CG).hypergradient("t")["value"], torch.tensor(expected), 1e-12)


def test_each_edge_into_a_shared_level_has_its_own_rule() -> None:
    """The diamond with H = 4 in its lowest level.

    T1T2 takes it for 1 on one side, -2.8 x (2 x 5 + 4 x 7 x 11).
    """
    t = level("t", 0.7, lambda s, _: 0.5 * (s.m() - 3) ** 2)
    left = level("left", 0.5, lambda s, _: 0.5 * (s.left() - 5 * s.t()) ** 2)
    right = level("right", 0.5, lambda s, _: 0.5 * (s.right() - 11 * s.t()) ** 2)
    m = level("m", 0.2, lambda s, _: 2 * (s.m() - 2 * s.left() - 7 * s.right()) ** 2)
    edges = [
        mo.Edge(t, left, differentiate=CG),
        mo.Edge(t, right, differentiate=CG),
        mo.Edge(left, m, differentiate=CG),
    ]
    graph = mo.LevelGraph([*edges, mo.Edge(right, m, differentiate=mo.T1T2())])
    assert_close(
        graph.hypergradient("t")["value"], torch.tensor(-2.8 * (2 * 5 + 4 * 7 * 11)), 1e-12
    )


# Towers of levels against autograd through everything


def brute_force(
    depth: int,
    steps: list[int],
    data: list[list[Tensor]],
    top_reads: list[int],
    solve: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return (the top level's hypergradient, the values after one turn below it).

    Everything is unrolled by hand. The level `solve` is not unrolled but differentiated where it
    ended, by a dense system with the Hessian of its total loss.
    """
    losses = tower_losses(depth, top_reads)

    def total(i: int, values: list[Tensor], feeds: list[Any]) -> tuple[Tensor, list[Tensor]]:
        x = next(feeds[i])
        if i + 1 < depth:
            values = (solved if i + 1 == solve else unrolled)(i + 1, values, feeds)
        return losses[i](values, x), values

    def step(i: int, values: list[Tensor], feeds: list[Any]) -> list[Tensor]:
        w = values[i].clone()  # a node of its own: the levels above depend on the old one
        w = w if w.requires_grad else w.requires_grad_()
        value, after = total(i, [*values[:i], w, *values[i + 1 :]], feeds)
        (g,) = torch.autograd.grad(value, w, create_graph=True)
        return [*after[:i], w - LR * g, *after[i + 1 :]]

    def unrolled(i: int, values: list[Tensor], feeds: list[Any]) -> list[Tensor]:
        for _ in range(steps[i - 1]):
            values = step(i, values, feeds)
        return values

    def solved(i: int, values: list[Tensor], feeds: list[Any]) -> list[Tensor]:
        ended, last = [value.detach() for value in values], feeds
        for _ in range(steps[i - 1]):
            seen: list[list[Tensor]] = [[] for _ in range(depth)]
            ended = [
                value.detach()
                for value in step(
                    i, ended, [noting(*pair) for pair in zip(feeds, seen, strict=True)]
                )
            ]
            last = seen

        def again(w: Tensor) -> tuple[Tensor, list[Tensor]]:
            return total(i, [*values[:i], w, *ended[i + 1 :]], [iter(rows) for rows in last])

        response, target = ended[i], None
        # two Newton steps that go nowhere have the solution's first and second derivative
        for _ in range(2):
            w = response.clone()
            w = w if w.requires_grad else w.requires_grad_()
            (g,) = torch.autograd.grad(again(w)[0], w, create_graph=True)
            hessian = torch.stack(
                [torch.autograd.grad(entry, w, create_graph=True)[0] for entry in g]
            )
            target = g.detach() if target is None else target
            response = w - torch.linalg.solve(hessian, g - target)
        if any(read > i for read in top_reads):  # what is below responds to the solution
            return [*values[:i], response, *again(response)[1][i + 1 :]]
        return [*values[:i], response, *ended[i + 1 :]]

    start = batches(depth, 99)
    top = start[0].clone().requires_grad_()
    value, after = total(0, [top, *start[1:]], [itertools.cycle(rows) for rows in data])
    return torch.autograd.grad(value, top)[0], [one.detach() for one in after]


def noting(feed: Any, rows: list[Tensor]) -> Any:
    for x in feed:
        rows.append(x)
        yield x


MEMORIES = [mo.Backprop(), mo.Backprop(memory="steps"), mo.Backprop(memory=mo.Revolve(snapshots=1))]


@pytest.mark.parametrize("rule", MEMORIES, ids=str)
@pytest.mark.parametrize(
    ("depth", "steps", "top_reads"),
    [(2, [4], [1]), (3, [3, 2], [1, 2]), (4, [2, 1, 3], [1, 3]), (3, [2, 2], [2])],
)
def test_levels_of_backprop_equal_autograd_through_everything(
    depth: int, steps: list[int], top_reads: list[int], rule: Any
) -> None:
    """1e-10: float64 rounding of some hundred operations."""
    data = [batches(3 + i, i) for i in range(depth)]
    graph = tower(depth, steps, [rule] * (depth - 1), data, top_reads)
    expected, after = brute_force(depth, steps, data, top_reads)
    assert_close(graph.hypergradient("v0")["value"], expected, 1e-10)
    graph.step()
    for i in range(1, depth):
        assert_close(graph.plan.levels[f"v{i}"].model.value.detach(), after[i], 1e-12)
    assert_close(
        graph.plan.levels["v0"].model.value.detach(),
        batches(depth, 99)[0] - LR * expected,
        1e-12,
    )


@pytest.mark.parametrize("memory", ["full", "steps"])
@pytest.mark.parametrize(
    ("depth", "steps", "top_reads", "solve"),
    [
        (2, [3], [1], 1),
        (3, [2, 3], [1], 2),
        (3, [3, 2], [1], 1),
        (3, [3, 2], [1, 2], 1),
        (4, [2, 2, 2], [1], 2),
    ],
)
def test_implicit_among_backprop_equals_its_brute_force(
    depth: int, steps: list[int], top_reads: list[int], solve: int, memory: Any
) -> None:
    """The last one: Backprop below Implicit below Backprop.

    1e-8: conjugate gradients on systems of condition about ten.
    """
    data = [batches(3 + i, i) for i in range(depth)]
    rules = [CG if i + 1 == solve else mo.Backprop(memory=memory) for i in range(depth - 1)]
    graph = tower(depth, steps, rules, data, top_reads)
    expected, _ = brute_force(depth, steps, data, top_reads, solve)
    before = graph.plan.levels["v0"].model.value.detach().clone()
    graph.step()
    assert_close((before - graph.plan.levels["v0"].model.value.detach()) / LR, expected, 1e-8)


@pytest.mark.parametrize(
    "rules", [(mo.ForwardMode(), mo.Backprop()), (mo.Backprop(), mo.ForwardMode())], ids=str
)
def test_forward_mode_on_an_edge_is_exact(rules: Any) -> None:
    data = [batches(3 + i, i) for i in range(3)]
    expected, _ = brute_force(3, [2, 2], data, [1, 2])
    assert_close(
        tower(3, [2, 2], rules, data, [1, 2]).hypergradient("v0")["value"], expected, 1e-10
    )


RULES = [
    mo.Backprop(window=2),
    mo.Backprop(memory="steps", hvp="forward"),
    mo.FirstOrder(),
    mo.T1T2(),
    mo.FiniteDifference(),
    mo.SAMA(),
    mo.Penalty(weight=1e4, steps=200),
    CG,
    mo.Implicit(mo.Nystrom(rank=2, damping=0.1)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_edge_is_an_inner_loop(rule: Any) -> None:
    """What a rule makes of `minimize` it makes of an edge.

    With momentum, after three steps of it, in the second round.
    """
    a, w = batches(2, 5)
    rows, outer_rows = batches(6, 2), batches(2, 1)
    upper = level(
        "upper", a, lambda s, x: coupled(s.upper(), [], [s.low()], x), LR, data=outer_rows
    )
    low = level(
        "low", w, lambda s, x: coupled(s.low(), [s.upper()], [], x), 0.05, data=rows, momentum=0.5
    )
    graph = mo.LevelGraph([mo.Edge(upper, low, steps=3, differentiate=rule)])
    params, state = {"value": w}, None
    for k in range(2):
        at = a.clone().requires_grad_()
        loop = mo.minimize(
            lambda params, x, meta: coupled(params["value"], [meta], [], x),
            SGD(0.05, momentum=0.5),
            params,
            torch.stack(rows[3 * k : 3 * k + 3]),
            meta=at,
            opt_state=state,
            differentiate=rule,
        )
        (g,) = torch.autograd.grad(coupled(at, [], [loop.params["value"]], outer_rows[k]), at)
        params, state = mo.tree.map(torch.Tensor.detach, (loop.params, loop.opt_state))
        graph.step()
        moved = (a - upper.model.value.detach()) / LR
        assert_close(moved, g, 1e-9)
        a = upper.model.value.detach().clone()


def test_an_evolution_strategy_on_an_edge() -> None:
    """Within four standard errors, |g| sqrt(2 / pairs) each, of the exact hypergradient.

    The smoothing is of order std^2.
    """
    data, pairs = [batches(3 + i, i) for i in range(2)], 2000
    exact = tower(2, [3], [mo.Backprop()], data, [1]).hypergradient("v0")["value"]
    found = tower(2, [3], [mo.EvolutionStrategy(std=1e-3, pairs=pairs)], data, [1]).hypergradient(
        "v0"
    )["value"]
    assert (found - exact).abs().max() < 4 * exact.norm() * (2 / pairs) ** 0.5
    assert (found - exact).abs().max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [mo.Backprop(), mo.Backprop(memory="steps")], ids=["full", "steps"]
)
def test_a_compiled_graph_steps_as_an_eager_one(rule: Any) -> None:
    """Of rules that go back along the path.

    `test_level_responses` has those that look at one point.
    """
    data = [batches(2, 1), batches(4, 2)]
    eager, fast = tower(2, [2], [rule], data, [1]), tower(2, [2], [rule], data, [1])
    fast = mo.LevelGraph(fast.plan.edges, compile=True)
    for _ in range(2):
        assert_close(fast.step(), eager.step(), 1e-10)

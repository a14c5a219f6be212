"""The gradient above point rules, put together from pullbacks.

Equal to autograd's way, and compiled as one function.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from level_problems import CG, batches, coupled, level, tower
from problems import assert_close
from torch import Tensor

import metaopt as mo
from metaopt.levels.plan import Plan
from optimizers import Adam

pytestmark = pytest.mark.usefixtures("float64")

RULES = [mo.FiniteDifference(), mo.T1T2(), CG, mo.SAMA(), mo.Penalty(weight=1e3, steps=5)]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def diamond(rule: Any, **options: Any) -> mo.LevelGraph:
    """Return a top level that reads its lowest one alone, by two ways, each level nonlinear.

    The ways differ in their rule.
    """
    start, x = batches(4, 5), [batches(3, seed) for seed in range(4)]
    top = level(
        "top",
        start[0],
        lambda s, x: coupled(s.top(), [], [s.low()], x),
        data=x[0],
        optimizer=Adam(0.05),
    )
    left = level(
        "left", start[1], lambda s, x: coupled(s.left(), [s.top()], [], x), 0.05, data=x[1]
    )
    right = level(
        "right",
        start[2],
        lambda s, x: coupled(s.right(), [s.top()], [], 2 * x),
        0.05,
        data=x[2],
        momentum=0.5,
    )
    low = level(
        "low",
        start[3],
        lambda s, x: coupled(s.low(), [s.left(), s.right(), s.top()], [], x),
        0.05,
        data=x[3],
    )
    others = [mo.Edge(upper, low, steps=2, differentiate=rule) for upper in (top, right)]
    edges = [
        mo.Edge(top, left, differentiate=rule),
        mo.Edge(top, right, differentiate=rule),
        *others,
    ]
    return mo.LevelGraph([*edges, mo.Edge(left, low, steps=2, differentiate=mo.T1T2())], **options)


def shared(rule: Any, steps: tuple[int, int] = (3, 2), **options: Any) -> mo.LevelGraph:
    """Return two top levels of different rates above one level.

    Each waits for several of its steps, in turns.
    """
    start = batches(3, 5)
    a = level(
        "a", start[0], lambda s, x: coupled(s.a(), [], [s.low()], x), 0.05, data=batches(2, 1)
    )
    b = level(
        "b", start[1], lambda s, x: coupled(s.b(), [], [s.low()], 2 * x), 0.05, data=batches(3, 2)
    )
    low = level(
        "low",
        start[2],
        lambda s, x: coupled(s.low(), [s.a(), s.b()], [], x),
        0.05,
        data=batches(5, 3),
        momentum=0.5,
    )
    edges = [
        mo.Edge(a, low, steps=steps[0], differentiate=rule),
        mo.Edge(b, low, steps=steps[1], differentiate=rule),
    ]
    return mo.LevelGraph(edges, **options)


def two_layers(rule: Any, **options: Any) -> mo.LevelGraph:
    """Return two top levels above two levels that read each other's uppers.

    They also read one another's follower.
    """
    start = batches(6, 7)

    def loss(i: int, j: int) -> Callable[[Any, Tensor], Tensor]:
        def of(levels: Any, x: Tensor) -> Tensor:
            above = [getattr(levels, f"v{i - 1}{k}")() for k in range(2)] if i else []
            below = [getattr(levels, f"v2{k}")() for k in range(2)] if not i else []
            return coupled(getattr(levels, f"v{i}{j}")(), above, below, (1 + j) * x)

        return of

    layers = [
        [
            level(f"v{i}{j}", start[2 * i + j], loss(i, j), 0.05, data=batches(3, 2 * i + j))
            for j in range(2)
        ]
        for i in range(3)
    ]
    pairs = [
        pair
        for upper, lower in itertools.pairwise(layers)
        for pair in itertools.product(upper, lower)
    ]
    return mo.LevelGraph([mo.Edge(*pair, differentiate=rule) for pair in pairs], **options)


def plain(rule: Any, **options: Any) -> mo.LevelGraph:
    graph = tower(2, [3], [rule], [batches(3, 0), batches(4, 1)], [1])
    return mo.LevelGraph(graph.plan.edges, **options)


GRAPHS = [plain, diamond, shared, two_layers]
each_graph = pytest.mark.parametrize("make", GRAPHS)


def tops(graph: mo.LevelGraph) -> list[str]:
    return [name for name in graph.plan.levels if graph.plan.is_top(name)]


def losses(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics without what solvers say, which is heard on a tape alone."""
    return {name: value for name, value in metrics.items() if "/solver " not in name}


@each_graph
@each_rule
def test_it_equals_autograd_through_attached_responses(
    make: Any, rule: Any, monkeypatch: Any
) -> None:
    """The other way, which also serves nested responses: each response is a Function.

    1e-10: the order of the sums.
    """
    graph, other = make(rule), make(rule)
    assert all(graph.plan.responds_at_points(name) for name in tops(graph))
    found = [
        graph.hypergradient(name, after_steps=after)
        for name in tops(graph)
        for after in (False, True)
    ]
    steps = [losses(graph.step()) for _ in range(3)]
    monkeypatch.setattr(Plan, "responds_at_points", lambda self, name: False)
    expected = [
        other.hypergradient(name, after_steps=after)
        for name in tops(other)
        for after in (False, True)
    ]
    assert_close(found, expected, 1e-10)
    assert_close(steps, [losses(other.step()) for _ in range(3)], 1e-10)
    assert_close(graph.state_dict()["levels"], other.state_dict()["levels"], 1e-10)
    assert all(grad["value"].abs().min() > 1e-6 for grad in found)


def test_what_is_put_together_and_what_is_not() -> None:
    """Steps that are differentiated, copies, and responses inside of responses need autograd."""
    assert diamond(CG).plan.responds_at_points("top")
    assert not plain(mo.Backprop()).plan.responds_at_points("v0")
    three = tower(3, [2, 2], [CG, CG], [batches(3, i) for i in range(3)], [1, 2])
    assert [three.plan.responds_at_points(name) for name in ("v0", "v1", "v2")] == [
        False,
        True,
        True,
    ]
    row = torch.stack(batches(3, 0))
    task = level(
        "task",
        batches(1, 0)[0],
        lambda s, x: coupled(s.task(), [s.meta()], [], x),
        data=[row],
        copies=3,
    )
    meta = level(
        "meta", batches(1, 1)[0], lambda s, x: coupled(s.meta(), [], [s.task()], x), data=[row]
    )
    assert not mo.LevelGraph([mo.Edge(meta, task, differentiate=CG)]).plan.responds_at_points(
        "meta"
    )


def noisy(rule: Any, **options: Any) -> mo.LevelGraph:
    drop = lambda s, x: coupled(F.dropout(s.low(), 0.4), [s.top()], [], x)
    low = level("low", torch.ones(3), drop, data=batches(2, 1))
    top = level(
        "top",
        torch.ones(3),
        lambda s, x: coupled(F.dropout(s.top(), 0.4), [], [s.low()], x),
        data=batches(2, 2),
    )
    return mo.LevelGraph([mo.Edge(top, low, steps=2, differentiate=rule)], **options)


@each_rule
def test_random_numbers_are_those_of_attached_responses(rule: Any, monkeypatch: Any) -> None:
    """A pullback sees the numbers that follow the steps, and leaves no trace.

    So the next step draws the same too.
    """

    def run() -> tuple[Any, Tensor]:
        torch.manual_seed(3)
        graph = noisy(rule)
        return [losses(graph.step()) for _ in range(3)], torch.get_rng_state()

    found, random = run()
    monkeypatch.setattr(Plan, "responds_at_points", lambda self, name: False)
    expected, after = run()
    assert_close(found, expected, 1e-10)
    assert torch.equal(random, after)


def test_a_parameter_that_matters_through_a_response_alone_is_not_missing() -> None:
    """And one that never does is named, where the loss reads it only sometimes."""
    reads = [True]
    low = level("low", 1.0, lambda s, _: (s.low() - s.top() * reads[0]) ** 2)
    top = level("top", 1.0, lambda s, _: (s.low() * reads[0]).sin() if reads[0] else torch.ones(()))
    graph = mo.LevelGraph([mo.Edge(top, low, differentiate=CG)])
    assert graph.hypergradient("top")["value"] != 0
    reads[0] = False
    with pytest.raises(
        ValueError, match=r"level 'top': no derivative arrives at its parameter 'value'"
    ):
        graph.hypergradient("top")
    graph.plan.levels["top"].allow_unused = True
    assert graph.hypergradient("top")["value"] == 0


# Compiled


@pytest.fixture
def counted() -> Iterator[Callable[[], int]]:
    """Call it for the number of graphs that were compiled since the beginning."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()


needs_compiler = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    # of the compiler
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
    ),
]
slow = pytest.mark.slow
COMPILED = [  # FiniteDifference is compiled in the diamond
    *[pytest.param(plain, rule, marks=[*needs_compiler, slow]) for rule in (mo.T1T2(), mo.SAMA())],
    pytest.param(
        plain, mo.Implicit(mo.ConjugateGradient(max_steps=3)), marks=[*needs_compiler, slow]
    ),
    *[
        pytest.param(make, mo.FiniteDifference(), marks=[*needs_compiler, slow])
        for make in (diamond, partial(shared, steps=(2, 1)))
    ],
]


@pytest.mark.parametrize(("make", "rule"), COMPILED)
def test_a_whole_step_is_one_compiled_function(
    make: Any, rule: Any, counted: Callable[[], int]
) -> None:
    """Compiled once, not again at later steps. 1e-10: the order of the sums."""
    eager, fast = make(rule), make(rule, compile=True)
    assert fast.plan.is_one_function
    for _ in range(3):
        assert_close(losses(fast.step()), losses(eager.step()), 1e-10)
        assert counted() == 1
    assert_close(fast.state_dict()["levels"], eager.state_dict()["levels"], 1e-10)


def test_what_is_compiled_as_one_function_and_what_is_not() -> None:
    """A compiler cannot wind random numbers back, which a pullback needs.

    Nor compile Penalty, or a response inside of one.
    """
    assert all(make(mo.FiniteDifference()).plan.is_one_function for make in GRAPHS)
    assert not noisy(mo.FiniteDifference()).plan.is_one_function
    assert noisy(mo.Backprop()).plan.is_one_function
    assert not plain(mo.Penalty()).plan.is_one_function
    data = [batches(3, i) for i in range(3)]
    assert not tower(3, [2, 2], [CG, CG], data, [1]).plan.is_one_function
    assert not tower(3, [2, 2], [mo.Backprop(), CG], data, [1]).plan.is_one_function


def solved_in_one_step(outer: Any, inner: Any, is_shared: bool) -> mo.LevelGraph:
    """Return three levels of numbers, the lower two of which one step solves.

    The lowest one is below the middle one, and below the top one too if it is shared.

    c*(m, u) = .7 m + u^2. The total loss above it, (m - sin u)^2 / 2 + c* u, has the curvature 1,
    and the minimum m*(u) = sin u - .7 u.
    """
    u = level("u", 0.5, lambda s, _: s.m() ** 2 + (0 * s.c() if is_shared else 0))
    m = level("m", 0.0, lambda s, _: (s.m() - s.u().sin()) ** 2 / 2 + s.c() * s.u(), 1.0)
    # a shared one is where its first step would lead
    c = level(
        "c",
        0.25 if is_shared else 0.0,
        lambda s, _: (s.c() - 0.7 * s.m() - s.u() ** 2) ** 2 / 2,
        1.0,
    )
    edges = [
        mo.Edge(u, m, steps=1 if is_shared else 2, differentiate=outer),
        mo.Edge(m, c, differentiate=inner),
    ]
    return mo.LevelGraph([*edges, mo.Edge(u, c, differentiate=inner)] if is_shared else edges)


@pytest.mark.parametrize("inner", [mo.Backprop(), *RULES], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("outer", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("is_shared", [False, True], ids=["inside", "shared"])
def test_a_rule_that_looks_around_sees_the_levels_below_move(
    outer: Any, inner: Any, is_shared: bool
) -> None:
    """All losses are quadratic in what is minimised, so that every rule is exact.

    A difference whose two sides saw the lowest level where it is would lose its response.
    """
    if isinstance(outer, mo.Penalty):
        outer = mo.Penalty(lr=1.0, steps=3)
    if isinstance(inner, mo.Penalty):
        inner = mo.Penalty(lr=1.0, steps=3)
    u = torch.tensor(0.5, requires_grad=True)
    (expected,) = torch.autograd.grad((u.sin() - 0.7 * u) ** 2, u)
    graph = solved_in_one_step(outer, inner, is_shared)
    assert_close(graph.hypergradient("u", after_steps=True)["value"], expected, 1e-8)
    graph.step()
    assert_close(graph.state_dict()["levels"]["u"]["params"]["value"], u - 0.1 * expected, 1e-8)

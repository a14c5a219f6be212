"""Large models: memory that is used again, updates and preconditioners in blocks.

Whatever is large here is small: the bounds are set so that all of it happens to few numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from test_flat import CASES
from torch import Tensor, nn

import metaopt as mo
from metaopt import spare, tree
from metaopt.optimizer import blocks
from metaopt.optimizer.precondition import precondition_by_vjp, precondition_in_blocks
from metaopt.optimizer.trial import try_step
from metaopt.transforms import find_overlapping
from optimizers import SGD, Adam, AdamW, ClipNorm, ClipValue, Cosine, NAdam

SHAPES = {"a": (3, 4), "b": (7,), "c": ()}


@pytest.fixture
def all_is_large(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "LEAST_TOGETHER", 0)
    monkeypatch.setattr(blocks, "MOST_TOGETHER", 5)
    monkeypatch.setattr(spare, "LEAST_BYTES", 0)
    monkeypatch.setattr("optimizers.adam.LEAST_FUSED", 0)


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradients(seed: int) -> dict[str, Tensor]:
    """Return gradients, of which some entries are zero."""
    grads = draw(seed)
    return {**grads, "b": grads["b"] * torch.tensor([0.0, 1, 1, 0, 1, 1, 1])}


# Memory


def test_memory_comes_back_when_its_last_tensor_dies() -> None:
    pool, like = spare.Spare(), torch.zeros(3, 5, dtype=torch.float64)
    first = pool.empty_like(like)
    assert (first.shape, first.dtype) == (like.shape, like.dtype)
    first.fill_(7)
    where, view = first.data_ptr(), first[1:].t()
    del first
    second = pool.empty_like(like)
    second.fill_(8)
    assert second.data_ptr() != where
    assert view.eq(7).all()
    del view
    assert pool.empty_like(like.view(15)).data_ptr() == where
    assert pool.empty_like(like.float()).data_ptr() not in (where, second.data_ptr())


def test_memory_is_used_again_only_where_that_is_asked_for() -> None:
    pool, large, small = spare.Spare(), torch.zeros(2**15), torch.zeros(2**10)
    with pool.used():
        kept = spare.empty_like(large)  # where derivatives may be recorded, it is the system's
        with torch.no_grad():
            spare.empty_like(small)
            where = spare.empty_like(large).data_ptr()
            assert spare.empty_like(large).data_ptr() == where != kept.data_ptr()
    with torch.no_grad():
        assert spare.empty_like(large).data_ptr() != where


# Updates


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_an_update_in_blocks_is_the_same(name: str, all_is_large, monkeypatch) -> None:
    kind, settings = CASES[name]
    found = []
    for least in (0, 2**40):
        monkeypatch.setattr(blocks, "LEAST_TOGETHER", least)
        monkeypatch.setattr("optimizers.adam.LEAST_FUSED", least)
        optimizer, params = kind(**settings), draw(0)
        state = optimizer.init(params)
        with torch.no_grad():
            for step in range(3):
                before = copy.deepcopy((params, state))
                after = optimizer.moved(gradients(step), state, params)
                assert_close((params, state), before, 0)  # nothing is changed in place
                params, state = after
                updates, _ = optimizer(gradients(step), state, params)
        found.append((params, state, updates))
    assert_close(found[0], found[1], 1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_a_tried_step_is_the_step(name: str, all_is_large) -> None:
    """Nothing moves before it is made, and then in its own memory."""
    kind, settings = CASES[name]
    optimizer, params = kind(**settings), draw(0)
    state = optimizer.init(params)
    with torch.no_grad():
        for step in range(3):
            before, grads = copy.deepcopy((params, state)), gradients(step)
            expected = optimizer.moved(grads, state, params)
            trial = try_step(optimizer, grads, state, params, None)
            assert trial is not None
            assert_close((params, state), before, 0)
            assert_close(trial.params, expected[0], 1e-14)
            tried = copy.deepcopy(trial.params)
            where = [leaf.data_ptr() for leaf in params.values()]
            state = trial.make()
            assert_close(params, tried, 0)  # the same bits
            assert_close(state, expected[1], 1e-14)
            assert [leaf.data_ptr() for leaf in params.values()] == where


def test_a_step_that_cannot_be_tried_is_made_at_once(all_is_large, monkeypatch) -> None:
    params, grads = draw(0), gradients(0)

    def attempt(optimizer: mo.Optimizer, **options: Any) -> Any:
        return try_step(optimizer, grads, optimizer.init(params, **options), params, None)

    with torch.no_grad():
        assert attempt(Adam()) is not None
        assert attempt(Adam({"b": 0.2, "*": 0.1})) is None
        assert attempt(Adam(), per_parameter=True) is None
        assert attempt(ClipNorm(1.0, Adam())) is None
        monkeypatch.setattr(blocks, "LEAST_TOGETHER", 2**20)
        assert attempt(Adam()) is None
    assert attempt(Adam()) is None  # derivatives are recorded


# The state of a graph


def two_levels(rule: mo.Rule, optimizer: mo.Optimizer) -> tuple[nn.Module, mo.LevelGraph]:
    """Return a model of weighed examples, and its graph; the third step's data has a nan."""
    torch.manual_seed(0)
    model, weights = nn.Linear(3, 1), nn.Linear(1, 1)
    x, y = torch.randn(5, 3), torch.randn(5, 1)

    def lower_loss(levels: Any, batch: Any) -> Tensor:
        each = (levels.model(x) - y).square()
        return (torch.sigmoid(levels.weights(each.detach())) * each).mean()

    def upper_loss(levels: Any, batch: Any) -> Tensor:
        return (levels.model(x) - batch).square().mean()

    lower = mo.Level("model", model, lower_loss, optimizer)
    clean = [y.flip(0), y, y * torch.nan]
    upper = mo.Level("weights", weights, upper_loss, Adam(0.1), data=clean)
    return model, mo.LevelGraph([mo.Edge(upper, lower, differentiate=rule)])


POINT_RULES = [
    mo.FiniteDifference(1e-4),
    mo.FiniteDifference(1e-4, scale="lr"),
    mo.SAMA(1e-4),
    mo.SAMA(1e-4, at="last"),
    mo.T1T2(),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", POINT_RULES, ids=str)
@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam])
def test_a_graph_that_tries_its_steps_makes_the_same(rule, kind, all_is_large, monkeypatch) -> None:
    found = []
    for least in (0, 2**40):
        monkeypatch.setattr(blocks, "LEAST_TOGETHER", least)
        monkeypatch.setattr("optimizers.adam.LEAST_FUSED", least)
        _, graph = two_levels(rule, kind(0.1))
        metrics = [graph.step() for _ in range(2)]
        found.append((metrics, graph.state_dict()))
    assert_close(found[0], found[1], 1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", POINT_RULES, ids=str)
def test_a_step_that_fails_changes_nothing_of_a_large_model(rule, all_is_large) -> None:
    model, graph = two_levels(rule, Adam(0.1))
    graph.step()
    graph.step()
    before, shown = graph.state_dict(), copy.deepcopy(model.state_dict())
    with pytest.raises(mo.NonFiniteError, match="level 'weights'"):
        graph.step()
    assert_close((graph.state_dict(), dict(model.state_dict())), (before, dict(shown)), 0)


@pytest.mark.usefixtures("float64")
def test_at_rest_there_is_only_the_next_step() -> None:
    """A hypergradient is that of where the levels stand; a step is that of the one just made."""
    next_, last = (two_levels(mo.SAMA(1e-4, at=at), Adam(0.1))[1] for at in ("next", "last"))
    for _ in range(2):
        assert_close(next_.hypergradient("weights"), last.hypergradient("weights"), 0)
        last.step()
        next_.load_state_dict(last.state_dict())
    there = last.hypergradient("weights", after_steps=True)["weight"]
    assert there != next_.hypergradient("weights", after_steps=True)["weight"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("is_large", [True, False])
def test_a_state_that_was_read_stays_as_it_is(is_large, all_is_large, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "LEAST_TOGETHER", 0 if is_large else 2**40)
    model, graph = two_levels(mo.FiniteDifference(1e-4), Adam(0.1))
    first, shown = graph.state_dict(), graph.params("model")
    kept = copy.deepcopy((first, shown))
    after = [graph.step()["weights/loss"] for _ in range(2)]
    assert_close((first, shown), kept, 0)
    graph.load_state_dict(first)
    assert_close(dict(model.named_parameters()), shown, 0)
    assert [graph.step()["weights/loss"] for _ in range(2)] == after
    assert_close((first, shown), kept, 0)  # nor does it change by being loaded


@pytest.mark.usefixtures("float64")
def test_what_is_written_into_a_model_is_what_the_next_step_starts_from() -> None:
    other, _ = two_levels(mo.FiniteDifference(1e-4), SGD(0.1))
    with torch.no_grad():
        other.weight += 1
    model, graph = two_levels(mo.FiniteDifference(1e-4), SGD(0.1))
    graph.step()
    graph.load_state_dict(graph.state_dict())
    before = graph.state_dict()
    model.load_state_dict(other.state_dict())
    assert_close(graph.params("model"), dict(other.named_parameters()), 0)
    before["levels"]["weights"]["below"]["model"]["params"] = graph.params("model")
    found = graph.step()
    graph.load_state_dict({**before})
    assert_close(graph.step(), found, 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("start", ["restart", "upper"])
@pytest.mark.parametrize("rule", [mo.FiniteDifference(1e-4), mo.SAMA(1e-4, at="last")], ids=str)
def test_a_level_that_begins_anew_moves_nobody_else(rule, start, all_is_large, monkeypatch) -> None:
    """Neither its first parameters, nor those of the level above that it begins at."""
    x, found = torch.randn(5, 3), []

    def lower_loss(levels: Any, batch: Any) -> Tensor:
        near = levels.model.params["weight"] - levels.above.params["weight"]
        return levels.model(x).square().mean() + near.square().sum()

    def upper_loss(levels: Any, batch: Any) -> Tensor:
        return (levels.model(x) - 1).square().mean()

    for least in (0, 2**40):
        monkeypatch.setattr(blocks, "LEAST_TOGETHER", least)
        torch.manual_seed(0)
        lower = mo.Level("model", nn.Linear(3, 1), lower_loss, Adam(0.1))
        upper = mo.Level("above", nn.Linear(3, 1), upper_loss, Adam(0.1), allow_unused=True)
        graph = mo.LevelGraph([mo.Edge(upper, lower, differentiate=rule, start=start)])
        found.append(([graph.step() for _ in range(3)], graph.state_dict()))
    assert_close(found[0], found[1], 1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("is_large", [True, False])
def test_what_was_told_stays_as_it_is(is_large, all_is_large, monkeypatch) -> None:
    """A parameter that is a metric is told as the loss saw it."""
    monkeypatch.setattr(blocks, "LEAST_TOGETHER", 0 if is_large else 2**40)
    model, above = nn.Linear(3, 1), nn.Linear(1, 1)
    x, told = torch.randn(5, 3), []

    def lower_loss(levels: Any, batch: Any) -> dict[str, Tensor]:
        loss = (levels.model(x) - levels.above(torch.ones(1))).square().mean()
        return {"loss": loss, "bias": levels.model.params["bias"][0]}

    def upper_loss(levels: Any, batch: Any) -> dict[str, Tensor]:
        loss = levels.model(x).square().mean()
        return {"loss": loss, "bias": levels.above.params["bias"][0]}

    lower = mo.Level("model", model, lower_loss, Adam(0.1))
    upper = mo.Level("above", above, upper_loss, Adam(0.1))
    graph = mo.LevelGraph([mo.Edge(upper, lower, differentiate=mo.FiniteDifference(1e-4))])
    before = {"model": model.bias.item(), "above": above.bias.item()}
    metrics = graph.step(lambda name, _, values: told.append((name, values["bias"])))
    assert before == {name: value.item() for name, value in told}
    assert before == {name: metrics[f"{name}/bias"].item() for name in before}


class Remembering(mo.Optimizer):
    """A heavy ball: what it remembers are the parameters before, or copies of them."""

    joinable = True

    def __init__(self, copies: bool):
        super().__init__()
        self.copies = copies

    def slots(self, params: Any) -> Any:
        return {"older": [*map(torch.clone, params)], "old": [*map(torch.clone, params)]}

    def update(self, grads: Any, params: Any, slots: Any, hyper: Any, step: Tensor) -> Any:
        pairs = zip(grads, slots["old"], slots["older"], strict=True)
        kept = {"older": slots["old"], "old": params}
        if self.copies:
            kept = {name: [*map(torch.clone, slot)] for name, slot in kept.items()}
        return [-0.1 * g + 0.5 * (old - older) for g, old, older in pairs], kept


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("is_large", [True, False])
def test_an_optimizer_may_remember_the_parameters(is_large, all_is_large, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "LEAST_TOGETHER", 0 if is_large else 2**40)
    graphs = [two_levels(mo.T1T2(), Remembering(copies))[1] for copies in (False, True)]
    metrics, expected = ([graph.step() for _ in range(2)] for graph in graphs)
    assert_close((metrics, graphs[0].state_dict()), (expected, graphs[1].state_dict()), 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("is_large", [True, False])
def test_a_graph_follows_its_models_into_other_memory(is_large, all_is_large, monkeypatch) -> None:
    """As that of a graph's copy, or after weights were assigned."""
    monkeypatch.setattr(blocks, "LEAST_TOGETHER", 0 if is_large else 2**40)
    model, graph = two_levels(mo.FiniteDifference(1e-4), Adam(0.1))
    graph.step()
    twin = copy.deepcopy(graph)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert_close(graph.step(), twin.step(), 0)
    assert_close(graph.state_dict(), twin.state_dict(), 0)
    for one in (graph, twin):
        shown = dict(one.plan.levels["model"].model.named_parameters())
        assert_close(shown, one.params("model"), 0)
    weight = torch.full((1, 3), 2.0)
    model.load_state_dict({**model.state_dict(), "weight": weight}, assign=True)
    assert_close(graph.params("model")["weight"], weight, 0)


@pytest.mark.parametrize("is_large", [True, False])
def test_a_graph_of_a_users_sees_that_a_model_has_moved(is_large, all_is_large) -> None:
    model, graph = two_levels(mo.FiniteDifference(1e-2), Adam(0.1) if is_large else SGD(0.1))
    before = model.weight.square().sum()
    graph.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


class Overlapping(nn.Module):
    """Two parameters with entries in common, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.arange(5.0)
        self.a, self.b = nn.Parameter(memory[:3]), nn.Parameter(memory[2:])
        self.c = nn.Parameter(torch.ones(2))


def test_parameters_in_the_same_memory_have_values_of_their_own() -> None:
    memory = torch.zeros(10)
    leaves = [memory[8:], memory[:4], memory[3:5], torch.zeros(3), memory[5:8], memory[:0]]
    assert find_overlapping(leaves) == {1, 2}
    assert find_overlapping([memory, memory[2:3], memory[4:5], memory[9:]]) == {0, 1, 2, 3}
    model, upper = Overlapping(), nn.Linear(1, 1)

    def loss(levels: Any, batch: Any) -> Tensor:
        rate = levels.upper(torch.ones(1)).sum()
        net = levels.model.params
        return ((net["a"].sum() - 1) ** 2 + (net["b"].sum() - 3) ** 2 + net["c"].sum() ** 2) * rate

    graph = mo.LevelGraph(
        [
            mo.Edge(
                mo.Level("upper", upper, loss, SGD(0.0)),
                mo.Level("model", model, loss, SGD(0.01)),
                differentiate=mo.FiniteDifference(),
            )
        ]
    )
    assert graph.plan.held_by_models == {"upper"}
    start = graph.params("model")
    graph.step()
    after = graph.params("model")
    assert after["a"][2] != after["b"][0]
    moved = after["a"] - start["a"]
    assert_close(moved, moved[0].expand(3), 1e-6)


# Preconditioners

MORE: dict[str, Callable[[], mo.Optimizer]] = {
    "sgd": lambda: SGD(0.1),
    "sgd-momentum": lambda: SGD(0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd-nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True),
    "schedule": lambda: AdamW(Cosine(0.1, 5), weight_decay={"b": 0.0, "*": 0.1}),
    "by-name": lambda: Adam({"b": 0.2, "*": 0.1}, weight_decay=0.1),
    "learned": lambda: Adam(nn.Parameter(torch.tensor(0.1))),
}
DIAGONAL: dict[str, Callable[[], mo.Optimizer]] = {
    **{name: lambda case=case: case[0](**case[1]) for name, case in CASES.items()},
    **MORE,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", DIAGONAL)
def test_a_preconditioner_in_blocks_is_the_derivative_of_the_update(
    name: str, all_is_large
) -> None:
    """From the first step, at which moments are zero."""
    optimizer, params = DIAGONAL[name](), draw(0)
    state, v = optimizer.init(params), draw(9)
    with torch.no_grad():
        for step in range(3):
            grads = gradients(step)
            given = (optimizer, v, grads, state, params, None)
            found = precondition_in_blocks(*given)
            assert found is not None
            assert_close(found, precondition_by_vjp(*given), 1e-10)
            params, state = optimizer.moved(grads, state, params)


class Peeking(mo.Schedule):
    """A rate that depends on the gradients."""

    def forward(self, state: Any, *, step: Tensor, loss: Any, grads: list[Tensor]) -> Any:
        return 0.1 / (1 + grads[0].square().sum()), state


class Doubled(Adam):
    """Adam with another update, which its closed form does not know."""

    def _adam(self, *arguments: Any) -> Any:
        scale, directions, after = super()._adam(*arguments)
        return 2 * scale, directions, after


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "build",
    [
        lambda: SGD(Peeking()),
        lambda: Adam(Peeking()),
        Doubled,
        lambda: ClipNorm(1.0, AdamW(0.1)),
        lambda: ClipValue(0.5, ClipNorm(1.0, NAdam(0.1))),
        lambda: ClipNorm(1.0, Adam(Peeking())),
    ],
)
def test_what_is_not_diagonal_has_its_derivative_too(build, all_is_large) -> None:
    optimizer, params = build(), draw(0)
    state, v = optimizer.init(params), draw(9)
    with torch.no_grad():
        for step in range(2):
            grads = gradients(step)
            found = optimizer.precondition(v, grads, state, params)
            assert_close(
                found, precondition_by_vjp(optimizer, v, grads, state, params, None), 1e-12
            )
            updates, after = optimizer(grads, state, params)
            moved, state = optimizer.moved(grads, state, params)
            assert_close((moved, state), (mo.apply_updates(params, updates), after), 1e-14)
            params = moved


def test_a_class_without_a_closed_form_says_so() -> None:
    with pytest.raises(TypeError, match="Optimizer must define `diagonal"):
        mo.Optimizer().diagonal([], None, {}, {}, torch.tensor(1))


# Graphs


def build(rule: mo.Rule, batches: list[Tensor]) -> mo.LevelGraph:
    torch.manual_seed(0)

    def inner(levels: Any, x: Tensor) -> Tensor:
        losses = levels.learner(x).square().mean(1)
        return (levels.weights(losses.detach()[:, None]).sigmoid().squeeze(-1) * losses).mean()

    def outer(levels: Any, x: Tensor) -> Tensor:
        return F.mse_loss(levels.learner(x), x)

    learner = mo.Level("learner", nn.Linear(3, 3), inner, AdamW(0.05), batches)
    weights = mo.Level("weights", nn.Linear(1, 1), outer, Adam(0.05), batches)
    return mo.LevelGraph([mo.Edge(weights, learner, differentiate=rule)])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", [mo.FiniteDifference(1e-4), mo.SAMA(1e-4)])
def test_memory_that_is_used_again_is_nobodys(rule: mo.Rule, all_is_large, monkeypatch) -> None:
    """What somebody holds stays; a step that fails changes nothing; the numbers are the same."""
    x = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(1))
    clean, spoiled = [*x], [*x[:2], x[2] * torch.nan, *x[2:]]
    graph = build(rule, spoiled)
    held: list[Any] = [graph.hypergradient("weights")]
    for _ in range(2):
        graph.step()
        held.append((graph.params("learner"), graph.state_dict()))
    copies = copy.deepcopy(held)
    with pytest.raises(mo.NonFiniteError):
        graph.step()
    assert_close(graph.state_dict()["levels"], held[-1][1]["levels"], 0)
    assert_close(dict(graph.plan.levels["learner"].model.named_parameters()), held[-1][0], 0)
    for one in graph._data.values():
        one.take(1)
    for _ in range(2):
        graph.step()
    assert_close(held, copies, 0)

    monkeypatch.setattr(spare, "LEAST_BYTES", 2**40)
    monkeypatch.setattr(blocks, "LEAST_TOGETHER", 2**40)
    other = build(rule, clean)
    for _ in range(4):
        other.step()
    assert_close(graph.state_dict()["levels"], other.state_dict()["levels"], 1e-9)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(mo.FiniteDifference(), [True, False, False]), (mo.SAMA(), [True, True, False, False])],
)
def test_displaced_losses_keep_no_graph_of_the_lower_model(
    rule: mo.Rule, expected: list[bool]
) -> None:
    recorded: list[bool] = []

    def inner(levels: Any, x: Tensor) -> Tensor:
        losses = levels.learner(x).square().mean(1)
        recorded.append(losses.requires_grad)
        return (levels.weights(losses.detach()[:, None]).squeeze(-1) * losses).mean()

    def outer(levels: Any, x: Tensor) -> Tensor:
        return levels.learner(x).square().mean()

    learner = mo.Level("learner", nn.Linear(3, 3), inner, AdamW(0.05), [torch.ones(2, 3)])
    weights = mo.Level("weights", nn.Linear(1, 1), outer, Adam(0.05), [torch.ones(2, 3)])
    graph = mo.LevelGraph([mo.Edge(weights, learner, differentiate=rule)])
    recorded.clear()
    graph.step()
    assert recorded == expected


def test_a_graph_keeps_the_beginning_of_levels_that_begin_anew_alone() -> None:
    def loss(levels: Any, _: Any) -> Tensor:
        return (levels.one.params["weight"] - levels.two.params["weight"]).square().sum()

    for start in ("continue", "restart"):
        one = mo.Level("one", nn.Linear(1, 1, bias=False), loss, SGD(0.1))
        two = mo.Level("two", nn.Linear(1, 1, bias=False), loss, SGD(0.1))
        graph = mo.LevelGraph([mo.Edge(two, one, start=start, differentiate=mo.T1T2())])
        assert [*graph.state_dict()["initial"]] == (["one"] if start == "restart" else [])
        graph.step()
        assert not tree.is_any_tracked(graph.state_dict()["levels"])

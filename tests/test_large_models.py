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

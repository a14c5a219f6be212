"""Rules of one's own, written from scratch, beside those of docs/pages/extend/rule.md.

The two classes are what a reader copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bilevel import dynamics, quadratic, stated
from level_problems import batches, coupled, level
from problems import assert_close
from torch import Tensor
from torch.func import grad, vmap

import metaopt as mo
from metaopt.autodiff.mixed import mixed_product
from metaopt.autodiff.pullback import choose, put, spread
from metaopt.autodiff.replay import drawn_again
from metaopt.differentiate import (
    End,
    Given,
    InnerLoop,
    PointRule,
    Pullback,
    Read,
    Result,
    Rule,
    at_end,
    run,
    weigh_result,
)
from optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class TruncatedNeumann(PointRule):
    """-[d grad_w L]' x at the end of the loop, with x = rate sum_{k < terms} (I - rate H)^k v.

    A rule that looks at one point defines `pull_back`: from the cotangent v of the last parameters
    to those of what the loss reads. It is a function of the tensors in its arguments, so that it
    can be differentiated again.
    """

    rate: float = 0.1
    terms: int = 10

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Any, wanted: Read
    ) -> tuple[Read, dict[str, Tensor]]:
        loss, read = at_end(loop, end)
        _, times_hessian = torch.func.vjp(lambda w: grad(loss)(w, read), end.params)
        rest = x = cotangent
        for _ in range(self.terms - 1):
            (curved,) = times_hessian(rest)
            rest = mo.tree.map(lambda r, c: r - self.rate * c, rest, curved)
            x = mo.tree.map(torch.add, x, rest)
        x = mo.tree.map(lambda leaf: -self.rate * leaf, x)
        return mixed_product(loss, end.params, read, x, wanted), {}


@dataclass(frozen=True)
class CentralDifferences(Rule):
    """The derivative of the loop in all that it was given, one number after the other.

    Any other rule defines `vjp`: it runs the loop, and returns the result with a function that
    pulls cotangents of the result back to what the loop was given.
    """

    step: float = 1e-5

    def vjp(self, loop: InnerLoop) -> tuple[Result, Pullback]:
        given = loop.given()  # reads batches that come one by one, so loops start from these

        def pullback(cotangents: Result, wanted: Given) -> Given:
            variables = choose(given, wanted)
            row = mo.tree.ravel(variables)

            def value(row: Tensor) -> Tensor:
                there = put(mo.tree.unravel(row, variables), given, wanted)
                with drawn_again(row):  # each run draws the same random numbers
                    return weigh_result(loop.starting_from(there), cotangents)

            slopes = [
                (value(row + side) - value(row - side)) / (2 * self.step)
                for side in self.step * torch.eye(len(row))
            ]
            return spread(mo.tree.unravel(torch.stack(slopes), variables), given, wanted)

        return run(loop.starting_from(given)), pullback


def backward(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    function(at).backward()
    assert at.grad is not None
    return at.grad


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "backward": backward,
    "grad": lambda function, at: grad(function)(at),
    "vmap(grad)": lambda function, at: vmap(grad(function))(torch.stack([at + 1, at]))[1],
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
def test_a_point_rule_in_minimize(way: str) -> None:
    """Its formula written out: the series as a dense matrix."""
    problem = quadratic()
    hessian = torch.func.hessian(lambda w: problem.loss(w, None, problem.meta))(problem.start)
    shrinks = torch.eye(5) - 0.1 * hessian
    series = 0.1 * sum(torch.linalg.matrix_power(shrinks, k) for k in range(8))
    rule = TruncatedNeumann(0.1, terms=8)
    found = WAYS[way](lambda meta: problem.value(rule, meta), problem.meta)
    assert_close(found, stated(problem, series), 1e-10)


def test_a_point_rule_is_differentiable_as_often_as_its_formula() -> None:
    """With enough terms it is implicit differentiation; what is left of the series is .9^300."""
    problem = quadratic()

    def second(rule: Rule) -> Tensor:
        along = torch.arange(5.0)
        slope = grad(lambda meta: problem.value(rule, meta).square())
        return grad(lambda meta: slope(meta) @ along)(problem.meta)

    assert_close(second(TruncatedNeumann(0.2, 400)), second(mo.Implicit(mo.Direct())), 1e-8)


@each_way
def test_a_rule_in_minimize(way: str) -> None:
    """Differences with a step of 1e-5 are off by 1e-10 and by rounding, 1e-16 / 1e-5."""
    problem = dynamics()
    found = WAYS[way](lambda meta: problem.value(CentralDifferences(), meta), problem.meta)
    assert_close(found, problem.exact, 1e-8)


def test_a_rule_reaches_all_that_a_loop_is_given() -> None:
    def outcome(rule: Rule, start: Tensor, lr: Tensor, x: Tensor) -> Tensor:
        loop = mo.minimize(
            lambda w, x: ((w - x) ** 4).sum(), SGD(lr, momentum=0.5), start, x, differentiate=rule
        )
        return loop.params.sum() + loop.losses @ torch.tensor([1.0, 2.0, 3.0])

    given = (torch.tensor([0.3, -0.4]), torch.tensor(0.02), torch.randn(3, 2) / 2)
    found, expected = (
        grad(lambda given, rule=rule: outcome(rule, *given))(given)
        for rule in (CentralDifferences(), mo.Backprop())
    )
    assert_close(found, expected, 1e-7)


def test_a_pullback_sees_the_random_numbers_of_the_loop() -> None:
    """With dropout in the loss: the masks of the steps taken, and none is drawn for others."""

    def outcome(rule: Rule, meta: Tensor) -> Tensor:
        torch.manual_seed(1)

        def loss(w: Tensor, _: None, meta: Tensor) -> Tensor:
            return (torch.nn.functional.dropout(w - meta, 0.4) ** 2).sum()

        start = torch.zeros(6)
        out = mo.minimize(loss, SGD(0.1), start, None, steps=3, meta=meta, differentiate=rule)
        assert torch.rand(()) < 1  # drawn meanwhile
        return (out.params * torch.arange(6.0)).sum()

    meta = torch.ones(6)
    for way in (backward, lambda function, at: grad(function)(at)):
        found, expected = (
            way(lambda meta, rule=rule: outcome(rule, meta), meta)
            for rule in (CentralDifferences(), mo.Backprop())
        )
        assert_close(found, expected, 1e-8)


def graph(rule: Rule) -> mo.LevelGraph:
    start = batches(2, 3)
    x, y = batches(2, 1), batches(3, 2)
    top = level("top", start[0], lambda s, x: coupled(s.top(), [], [s.low()], x), data=x)
    low = level("low", start[1], lambda s, y: coupled(s.low(), [s.top()], [], y), data=y)
    return mo.LevelGraph([mo.Edge(top, low, steps=3, differentiate=rule)])


@pytest.mark.parametrize(
    ("rule", "known", "tolerance"),
    [
        (TruncatedNeumann(0.05, 6), mo.Implicit(mo.Neumann(0.05, 6)), 1e-10),
        (CentralDifferences(), mo.Backprop(), 1e-7),
    ],
    ids=["TruncatedNeumann", "CentralDifferences"],
)
def test_both_on_an_edge(rule: Rule, known: Rule, tolerance: float) -> None:
    """As the rules of the library that give the same."""
    own, other = graph(rule), graph(known)
    for _ in range(3):
        assert_close(own.hypergradient("top"), other.hypergradient("top"), tolerance)
        # the library's solvers also say how they did
        expected = {key: value for key, value in other.step().items() if "/solver " not in key}
        found = own.step()
        assert_close({key: found[key] for key in expected}, expected, tolerance)


def test_a_rule_without_its_method_says_so() -> None:
    class Empty(Rule):
        pass

    with pytest.raises(TypeError, match=r"Empty must define `vjp\(loop\) -> \(result, pullback\)`"):
        dynamics().value(Empty(), torch.ones(3))


class Half(Rule):
    """The answer v to the first of three tensors, and None for all that has no derivative."""

    def __init__(self, answer: Callable[[Tensor, InnerLoop], Any]) -> None:
        self.answer = answer

    def vjp(self, loop: InnerLoop) -> tuple[Result, Pullback]:
        return run(loop), lambda cotangents, wanted: self.answer(cotangents.params, loop)


def ask_half(answer: Callable[[Tensor, InnerLoop], Any]) -> tuple[Tensor, list[Tensor]]:
    """Return the end of a loop with momentum, whose state precedes `meta`, and what it reads."""
    metas = [torch.tensor(float(i), requires_grad=True) for i in range(3)]

    def loss(w: Tensor, x: Tensor, meta: tuple[Tensor, ...]) -> Tensor:
        return (w - meta[0]) ** 2 * meta[1] + meta[2] * x

    start, x = torch.tensor(1.0), torch.ones(2)
    optimizer = SGD(torch.tensor(0.1, requires_grad=True), momentum=0.9)
    return mo.minimize(
        loss, optimizer, start, x, meta=tuple(metas), differentiate=Half(answer)
    ).params, metas


def to_first(v: Tensor) -> Any:
    return {"optimizer": None, "loss": None, "meta": (v, None, None), "batch": None}


@pytest.mark.parametrize(
    "state",
    [lambda loop: None, lambda loop: {**loop.state, "slots": None, "step": None}],
    ids=["whole", "its parts"],
)
def test_none_may_stand_for_a_whole_part(state: Callable[[InnerLoop], Any]) -> None:
    """It takes no place from the cotangents of the other parts."""
    end, metas = ask_half(lambda v, loop: Given(to_first(v), None, state(loop), None))
    found = torch.autograd.grad(3 * end, metas, allow_unused=True)
    assert found == (3.0, None, None)
    end, metas = ask_half(lambda v, loop: None)
    assert torch.autograd.grad(end, metas, allow_unused=True) == (None,) * 3


def test_cotangents_of_another_structure_are_refused() -> None:
    end, metas = ask_half(lambda v, _: Given({"meta": (v, None, None)}, None, None, None))
    with pytest.raises(ValueError, match=r"`pullback\(cotangents, wanted\)` does not have"):
        torch.autograd.grad(end, metas)


@pytest.mark.parametrize("kind", ["nothing", "no part", "no inputs", "empty", "no meta", "a part"])
def test_none_in_what_a_point_rule_pulls_back(kind: str) -> None:
    """In `minimize` and in a graph, for all, for the inputs, or for one of them."""

    class Answers(PointRule):
        def pull_back(self, loop: InnerLoop, end: End, cotangent: Any, wanted: Read) -> Any:
            exact, statistics = mo.T1T2().pull_back(loop, end, cotangent, wanted)
            given: dict[str, Any] = {
                "nothing": None,
                "no part": (None, None),
                "no inputs": (None, exact[1]),
                "empty": ({}, None),
                "no meta": ({**exact[0], "meta": None}, exact[1]),
                "a part": ({"meta": exact[0]["meta"]}, None),
            }
            return given[kind], statistics

    meta = torch.tensor(2.0, requires_grad=True)
    end = mo.minimize(
        lambda w, _, meta: (w - meta) ** 2,
        SGD(0.1),
        torch.tensor(0.0),
        None,
        steps=2,
        meta=meta,
        differentiate=Answers(),
    ).params
    (found,) = torch.autograd.grad(end, meta, allow_unused=True)
    assert found == (2.0 if kind == "a part" else None)  # [d_meta grad_w L]' v, the sign turned
    if kind == "a part":
        expected = graph(mo.T1T2()).hypergradient("top")
        assert_close(graph(Answers()).hypergradient("top"), expected, 1e-12)
    else:  # what is left is the direct derivative
        own, alone = graph(Answers()), graph(mo.T1T2())
        values = {key: value.clone().requires_grad_() for key, value in alone.params("top").items()}
        low = alone.params("low")["value"]
        loss = coupled(values["value"], [], [low], batches(2, 1)[0])
        (direct,) = torch.autograd.grad(loss, [*values.values()])
        assert_close(own.hypergradient("top")["value"], direct, 1e-12)


def test_a_rule_may_hand_on_the_vjp_of_another() -> None:
    """Of a point rule too, which answers None for the optimizer, the parameters and the state."""

    class Same(Rule):
        def vjp(self, loop: InnerLoop) -> tuple[Result, Pullback]:
            return mo.T1T2().vjp(loop)

    def slopes(rule: Rule) -> tuple[Tensor, ...]:
        meta, x = torch.ones(3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
        end = mo.minimize(
            lambda w, x, meta: ((w - meta) ** 4 * x).sum(),
            SGD(0.01, momentum=0.9),
            torch.zeros(3),
            x,
            meta=meta,
            differentiate=rule,
        ).params
        return torch.autograd.grad(end.sum(), (meta, x))

    torch.manual_seed(0)
    found = slopes(Same())
    torch.manual_seed(0)
    assert_close(found, slopes(mo.T1T2()), 1e-12)


# The protocol itself


RULES = {
    "full": mo.Backprop(),
    "steps": mo.Backprop("steps"),
    "forward": mo.ForwardMode(),
    "implicit": mo.Implicit(mo.ConjugateGradient(rtol=1e-14)),
    "T1T2": mo.T1T2(),
    "difference": mo.FiniteDifference(),
    "own": CentralDifferences(),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("streams", [False, True])
def test_the_vjp_of_every_rule_is_what_it_attaches(rule: str, streams: bool) -> None:
    """For the cotangents of an outer loss, in all that the loop was given."""
    start, meta, x = torch.randn(2), torch.randn(2), torch.randn(3, 2)
    loops: list[InnerLoop] = []

    class Record(Rule):
        def attach(self, loop: InnerLoop) -> Result:
            given = loop.given()
            loops.append(loop.starting_from(given))
            return RULES[rule].attach(loop.starting_from(given))

    def loss(w: Tensor, x: Any, meta: Tensor) -> Tensor:
        return ((w - (x[0] if streams else x)) ** 4).sum() + (w * meta).sin().sum()

    leaves = [one.clone().requires_grad_() for one in (start, meta, x)]
    end = mo.minimize(
        loss,
        SGD(0.05),
        leaves[0],
        [(row,) for row in leaves[2]] if streams else leaves[2],
        meta=leaves[1],
        differentiate=Record(),
    ).params
    weights = torch.tensor([1.0, 2.0])
    expected = torch.autograd.grad(end @ weights, leaves, allow_unused=True)
    with torch.no_grad():
        result, pullback = RULES[rule].vjp(loops[0])
        inputs: Any = {"optimizer": False, "loss": False, "meta": True, "batch": False}
        bars = pullback(Result(weights, None, None), Given(inputs, True, False, True))
    assert_close(result.params, end.detach(), 1e-12)
    batches_bar = bars.batches
    if streams:
        rows = [None if row is None else row[0] for row in batches_bar]
        batches_bar = torch.stack([torch.zeros(2) if row is None else row for row in rows])
    found = [bars.params, bars.inputs["meta"], batches_bar]
    for one, other in zip(found, expected, strict=True):
        zero = torch.zeros(())
        assert_close(zero if one is None else one, zero if other is None else other, 1e-7)

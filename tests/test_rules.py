"""Every rule on every problem.

Exact ones to 1e-8, biased ones against their stated bias, random ones within 4 standard errors.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bilevel import PROBLEMS, Bilevel, flat, logistic, quadratic, stated
from problems import assert_close, leaf
from torch import Tensor
from torch.func import grad, vmap

import metaopt as mo
from optimizers import SGD, Adam

pytestmark = [
    pytest.mark.usefixtures("float64"),
]

IMPLICIT = mo.Implicit(mo.ConjugateGradient(rtol=1e-14))
PATH = {"backprop": mo.Backprop(), "forward": mo.ForwardMode()}
POINT = {
    "implicit": IMPLICIT,
    "T1T2": mo.T1T2(),
    "finite difference": mo.FiniteDifference(1e-4),
    "SAMA": mo.SAMA(1e-4),
    "penalty": mo.Penalty(1e6, 100, 0.25),
}


def backward(function: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
    def derivative(at: Any) -> Any:
        at = leaf(at)
        function(at).backward()
        return mo.tree.map(lambda tensor: tensor.grad, at)

    return derivative


def second_row(function: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
    def derivative(at: Any) -> Any:
        rows = mo.tree.map(lambda tensor: torch.stack([tensor + 0.1, tensor]), at)
        return mo.tree.index(vmap(grad(function))(rows), 1)

    return derivative


WAYS: dict[str, Callable[..., Any]] = {"backward": backward, "grad": grad, "vmap(grad)": second_row}
each_way = pytest.mark.parametrize("way", WAYS)
each_problem = pytest.mark.parametrize("problem", PROBLEMS)


def found(problem: Bilevel, rule: Any, way: str = "backward") -> Any:
    return WAYS[way](lambda meta: problem.value(rule, meta))(problem.meta)


def of_solution(rule: str) -> bool:
    return rule in ("implicit", "penalty")


# --- exact rules


@each_way
@each_problem
@pytest.mark.parametrize("rule", PATH)
def test_path_rules_are_exact(rule: str, problem: str, way: str) -> None:
    bilevel = PROBLEMS[problem]()
    assert_close(found(bilevel, PATH[rule], way), bilevel.exact, 1e-8)


@each_way
@each_problem
@pytest.mark.parametrize("rule", POINT)
def test_point_rules_give_what_they_state(rule: str, problem: str, way: str) -> None:
    """Differences: radius 1e-4 leaves 1e-8 of bias and 1e-12 of rounding.

    Penalty: weight 1e6 leaves 1e-6 and 1e-10.
    """
    bilevel = PROBLEMS[problem]()
    x = "inverse" if of_solution(rule) else "identity"
    expected = stated(bilevel, x)
    if rule == "SAMA":  # D of SGD
        expected = mo.tree.map(lambda bar: bilevel.lr * bar, expected)
    tolerance = {"implicit": 1e-8, "T1T2": 1e-12, "penalty": 2e-6}.get(rule, 1e-7)
    assert_close(found(bilevel, POINT[rule], way), expected, tolerance)
    if bilevel.converges and of_solution(rule):
        assert_close(expected, bilevel.exact, 1e-8)


def test_the_pinned_figures() -> None:
    exact = torch.tensor([-11.528753, 10.934745, -1.423259, -24.644045, -3.153058])
    identity = torch.tensor([-5.881346, 6.578753, -0.461856, -17.62542, 0.585752])
    for rule in (mo.ForwardMode(), IMPLICIT, mo.Penalty(1e3, 100, 0.4)):
        assert_close(found(quadratic(), rule), exact, 1e-6)
    for rule in (mo.T1T2(), mo.FiniteDifference()):
        assert_close(found(quadratic(), rule), identity, 1e-6)
    assert_close(found(quadratic(), mo.SAMA()), 0.4 * identity, 1e-6)


# --- stated bias


@pytest.mark.parametrize("kind", [mo.FiniteDifference, mo.SAMA])
def test_half_the_radius_leaves_a_quarter_of_the_error(kind: type) -> None:
    bilevel = logistic()
    expected = stated(bilevel, "identity") * (bilevel.lr if kind is mo.SAMA else 1)
    errors = [(found(bilevel, kind(radius)) - expected).norm() for radius in (0.2, 0.1, 0.05)]
    assert errors[0] > 1e-5  # the next term of the series is of the order of radius^4
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.005)


def test_twice_the_weight_leaves_half_the_error() -> None:
    bilevel = logistic()
    errors = [
        (found(bilevel, mo.Penalty(weight, 500, 0.2)) - bilevel.exact).norm()
        for weight in (100.0, 200.0, 400.0)
    ]
    assert errors[0] > 1e-4  # the next term of the series is of the order of 1 / weight^2
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.03)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.015)


def test_a_short_descent_leaves_what_it_states() -> None:
    """On the quadratic Penalty is -[d grad_w L]' (I - (I - lr H)^k) H^-1 v."""
    bilevel = quadratic()
    w = bilevel.end()
    H = torch.autograd.functional.hessian(lambda w: bilevel.loss(w, None, bilevel.meta), w)
    reached = torch.eye(5) - torch.linalg.matrix_power(torch.eye(5) - 0.3 * H, 7)
    assert_close(
        found(bilevel, mo.Penalty(50.0, 7, 0.3)),
        stated(bilevel, reached @ torch.linalg.inv(H)),
        1e-9,
    )


# --- evolution strategies


def sample(bilevel: Bilevel, rule: mo.EvolutionStrategy, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of `count` estimates and its standard error."""
    draws = torch.stack([flat(mo.tree.leaves(found(bilevel, rule))) for _ in range(count)])
    return draws.mean(0), draws.std(0) / count**0.5


@each_way
def test_evolution_strategies_are_unbiased_where_the_loop_is_linear(way: str) -> None:
    """In l the dynamics are linear: no bias at any std, and the variance that is stated.

    A factor of std would show.
    """
    bilevel = PROBLEMS["dynamics"]()
    pairs = 4000
    rule = mo.EvolutionStrategy(0.3, pairs, seed=1)
    g = bilevel.exact
    error = ((g.square().sum() + g.square()) / pairs).sqrt()
    assert error.max() < 0.1 * g.norm()
    assert ((found(bilevel, rule, way) - g).abs() < 4 * error).all()


def test_the_bias_of_evolution_strategies_is_that_of_smoothing() -> None:
    """r = l^2 after one step from 0 on w^2/2 - w l^3 / 3 ...

    : d/dl E (l + std e)^3 = 3 l^2 + 3 std^2.
    """

    def cubic(w: Tensor, _: None, l: Tensor) -> Tensor:
        return w.square() / 2 - w * l**3

    l, std = torch.tensor(0.5), 0.4
    bilevel = Bilevel(cubic, torch.zeros(()), None, l, lambda w: w, 1.0, 1, None, True)
    rule = mo.EvolutionStrategy(std, 200, seed=2)
    mean, error = sample(bilevel, rule, 50)
    smoothed = 3 * l**2 + 3 * std**2
    assert (mean - smoothed).abs() < 4 * error
    assert 3 * std**2 > 8 * error  # the derivative without smoothing is told apart


def test_each_backward_pass_draws_anew_and_a_seed_repeats() -> None:
    bilevel = PROBLEMS["dynamics"]()
    first = mo.EvolutionStrategy(0.1, 3)
    one, two = found(bilevel, first), found(bilevel, first)
    assert (one != two).all()
    assert_close(found(bilevel, mo.EvolutionStrategy(0.1, 3)), one, 0.0)


def test_pairs_that_are_not_finite_are_left_out() -> None:
    """sqrt(l) is nan on one side of every pair whose e is large."""

    def root(w: Tensor, _: None, l: Tensor) -> Tensor:
        return (w - l.sqrt()).square() / 2

    def slope(std: float) -> Tensor:
        l = torch.tensor(1.0, requires_grad=True)
        rule = mo.EvolutionStrategy(std, 400)
        mo.minimize(
            root, SGD(1.0), torch.zeros(()), None, steps=1, meta=l, differentiate=rule
        ).params.backward()
        return l.grad

    assert slope(0.6).isfinite()  # 1 in 10 is left out
    # 1/2 in the limit; the standard error is 0.035
    assert slope(0.1) == pytest.approx(0.5, abs=0.1)


# --- what else there is to differentiate


def test_path_rules_reach_everything_that_backprop_reaches() -> None:
    """Initial parameters, optimizer state, hyperparameters, a batch per step.

    And what the loop returns besides parameters.
    """
    x = torch.randn(4, 5, 3)

    def outcome(rule: Any, start: Tensor, lr: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        optimizer = Adam(lr, eps_root=1e-3)
        state = optimizer.init(start)
        state["slots"]["mean"] = scale * start

        def loss(w: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(x @ w).square().mean() + (w**2).sum()

        out = mo.minimize(loss, optimizer, start, x, opt_state=state, differentiate=rule)
        return (
            out.params.sin().sum()
            + out.losses.square().sum()
            + out.opt_state["slots"]["square"].sum()
        )

    inputs = [torch.randn(3), torch.tensor(0.1), x, torch.tensor(0.2)]
    expected = grad(lambda given: outcome(mo.Backprop(), *given))(inputs)
    assert all((bar != 0).any() for bar in expected)
    assert_close(grad(lambda given: outcome(mo.ForwardMode(), *given))(inputs), expected, 1e-10)
    some = grad(lambda lr: outcome(mo.ForwardMode(), inputs[0], lr, *inputs[2:]))(inputs[1])
    assert_close(some, expected[1], 1e-10)


def test_the_first_forward_derivative_warns_of_nothing() -> None:
    """In a new process, and inside a compiler.

    Torch warns of its own `torch.jit.script` when it loads its formulas.
    """
    program = """
import sys, torch
from metaopt.autodiff.forward import slope_along
cubes = lambda y: (y ** 3).sum()
slope = lambda x: slope_along(cubes, x, torch.ones(2), asked="a test", instead="nothing")[1]
if sys.argv[1] == "compiled":
    slope = torch.compile(slope, fullgraph=True, backend="eager")
assert slope(torch.ones(2)) == 6
"""
    for way in ("eager", "compiled"):
        subprocess.run([sys.executable, "-W", "error", "-c", program, way], check=True)


def test_forward_mode_makes_one_tangent_a_number() -> None:
    """m is that of what is differentiated, under `vmap(grad)` too."""
    seen = []
    jvp = torch.func.jvp

    def counted(function: Any, primals: Any, tangents: Any) -> Any:
        seen.append(sum(tensor.numel() for tensor in primals[0]))
        return jvp(function, primals, tangents)

    bilevel = PROBLEMS["dynamics"]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.func, "jvp", counted)
        for way in WAYS:
            found(bilevel, mo.ForwardMode(), way)
    assert seen == [3, 3, 3]


# of torch's own compiler
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("make", [mo.ForwardMode, lambda: mo.EvolutionStrategy(0.1, 5)])
def test_a_compiled_run_is_differentiated_as_it_is(make: Callable[[], Any]) -> None:
    bilevel = PROBLEMS["dynamics"]()

    def slope(compile: bool) -> Tensor:
        meta = bilevel.meta.clone().requires_grad_()
        out = mo.minimize(
            bilevel.loss,
            SGD(0.1),
            bilevel.start,
            None,
            steps=4,
            meta=meta,
            differentiate=make(),
            compile=compile,
        )
        return torch.autograd.grad(bilevel.outer(out.params), meta)[0]

    torch._dynamo.reset()
    assert_close(slope(True), slope(False), 1e-10)


@pytest.mark.parametrize("rule", [*POINT, "forward", "evolution"])
def test_batches_from_an_iterator(rule: str) -> None:
    """The same as batches in a row; and a batch that is differentiated."""
    rules = POINT | {"forward": mo.ForwardMode(), "evolution": mo.EvolutionStrategy(0.1, 5)}
    x, meta = torch.randn(4, 6, 3), torch.tensor(0.3)

    def loss(w: Tensor, x: Tensor, meta: Tensor) -> Tensor:
        return (torch.tanh(x @ w) - meta).square().mean() + (w - 1).square().sum() / 2

    def slope(batches: Callable[[Tensor], Any]) -> list[Tensor]:
        rule_again = mo.EvolutionStrategy(0.1, 5) if rule == "evolution" else rules[rule]

        def value(given: list[Tensor]) -> Tensor:
            x, meta = given
            out = mo.minimize(
                loss, SGD(0.1), torch.zeros(3), batches(x), meta=meta, differentiate=rule_again
            )
            return out.params.sin().sum()

        return grad(value)([x, meta])

    in_a_row, streamed = slope(lambda x: x), slope(lambda x: iter(list(x)))
    assert_close(streamed, in_a_row, 1e-12)
    assert all((bar != 0).any() for bar in in_a_row)


@pytest.mark.parametrize(
    "rule", ["T1T2", "difference", "SAMA", "implicit", "penalty", "forward", "evolution"]
)
def test_complex_parameters_are_pairs_of_real_ones(rule: str) -> None:
    rules = {
        "T1T2": mo.T1T2(),
        "difference": mo.FiniteDifference(),
        "SAMA": mo.SAMA(),
        "implicit": mo.Implicit(mo.Direct()),
        "penalty": mo.Penalty(100.0, 30, 0.3),
        "forward": mo.ForwardMode(),
        "evolution": None,
    }
    start, meta = torch.randn(3, dtype=torch.complex128), torch.randn(3, dtype=torch.complex128)

    def pairs(w: Tensor, _: None, meta: Tensor) -> Tensor:
        """Of real [3, 2]: |w - m^2|^2 / 2 + |w|^4 / 4."""
        a, b = meta.unbind(-1)
        square = torch.stack([a * a - b * b, 2 * a * b], -1)
        return (w - square).square().sum() / 2 + w.square().sum(-1).square().sum() / 4

    def loss(w: Tensor, _: None, meta: Tensor) -> Tensor:
        return (w - meta * meta).abs().square().sum() / 2 + (
            w.real**2 + w.imag**2
        ).square().sum() / 4

    def slope(loss: Any, start: Tensor, meta: Tensor) -> Tensor:
        meta = meta.clone().requires_grad_()
        own = rules[rule] or mo.EvolutionStrategy(0.1, 5)
        out = mo.minimize(loss, SGD(0.05), start, None, steps=3, meta=meta, differentiate=own)
        torch.view_as_real(
            out.params
        ).sin().sum().backward() if out.params.is_complex() else out.params.sin().sum().backward()
        assert meta.grad is not None
        return meta.grad

    expected = slope(pairs, torch.view_as_real(start), torch.view_as_real(meta))
    assert_close(torch.view_as_real(slope(loss, start, meta)), expected, 1e-9)


@pytest.mark.parametrize("rule", POINT)
def test_the_derivative_of_a_pullback_at_a_zero_cotangent(rule: str) -> None:
    """Where the outer gradient vanishes, and where zeros are made up to take a derivative forward.

    The last parameters are meta x, exactly: their loss is quadratic, and one step solves it.
    """
    x, at = torch.tensor([1.0, 2.0]), torch.tensor(0.5)
    rules = {**POINT, "implicit": mo.Implicit(mo.Direct()), "penalty": mo.Penalty(1e3, 2, 1.0)}

    def end(meta: Tensor) -> Tensor:
        return mo.minimize(
            lambda w, _, meta: (w - meta * x).square().sum() / 2,
            SGD(1.0),
            torch.zeros(2),
            None,
            steps=1,
            meta=meta,
            differentiate=rules[rule],
        ).params

    def distance(meta: Tensor) -> Tensor:
        return (end(meta) - 0.5 * x).square().sum()

    one = torch.ones(())
    assert_close(torch.autograd.functional.jvp(end, at, one)[1], x, 1e-8)
    for place in (at, at + 0.2):
        assert_close(
            torch.autograd.functional.hvp(distance, place, one)[1], torch.tensor(10.0), 1e-8
        )
        assert_close(grad(grad(distance))(place), torch.tensor(10.0), 1e-8)

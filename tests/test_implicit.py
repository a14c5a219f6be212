"""The implicit function theorem, and the rule that attaches it to an inner loop."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_close, two_derivatives
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import metaopt as mo
from metaopt import tree
from metaopt.autodiff.implicit import implicit, pull_back_implicit
from metaopt.linear_solve import LinearSolver
from optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")

CG = mo.ConjugateGradient(rtol=1e-14)
SOLVERS: list[LinearSolver] = [
    CG,
    mo.NormalCG(rtol=1e-14),
    mo.GMRES(rtol=1e-14),
    mo.BiCGStab(rtol=1e-14),
    mo.NystromCG(rtol=1e-14, rank=2),
    mo.Direct(),
    mo.Neumann(0.4, terms=120),
]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


def backward(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def derivative(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(at), at)
        return found

    return derivative


def twice_backward(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def derivative(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(at), at, create_graph=True)
        return torch.autograd.grad(first.square().sum(), at)[0]

    return derivative


def grad_of_grad(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return grad(lambda at: grad(function)(at).square().sum())


def over_rows(transform: Callable[..., Any]) -> Callable[..., Any]:
    """Return the transform under `vmap`, for one row."""
    return lambda function: lambda at: vmap(transform(function))(torch.stack([0.5 * at, at]))[1]


WAYS: dict[str, Callable[..., Any]] = {
    "backward": backward,
    "grad": grad,
    "vmap(grad)": over_rows(grad),
    "backward twice": twice_backward,
    "grad(grad)": grad_of_grad,
    "vmap(grad(grad))": over_rows(grad_of_grad),
    "jacrev(jacrev)": lambda function: jacrev(jacrev(function)),
    "third": lambda function: grad(lambda at: grad_of_grad(function)(at).square().sum()),
    "backward of vmap": lambda function: (
        lambda at: backward(lambda rows: vmap(function)(rows).sum())(torch.stack([at, -at]))[0]
    ),
}
each_way = pytest.mark.parametrize("way", WAYS)


# --- closed forms


@each_solver
def test_the_seeded_quadratic(solver: LinearSolver) -> None:
    """Inner 1/2 w'Hw - w'B lam, outer 1/2 |w - c|^2.

    Hypergradient B'H^-1 (w* - c), whose derivative is B'H^-1 H^-1 B.
    """
    A, B, c, lam = torch.randn(5, 5), torch.randn(5, 5), torch.randn(5), torch.randn(5)
    H = A @ A.T / 5 + torch.eye(5) / 2
    HB = torch.linalg.solve(H, B)

    def loss(w: Tensor, _: None, lam: Tensor) -> Tensor:
        return w @ H @ w / 2 - w @ B @ lam

    # largest eigenvalue 4: the smallest is 1/2: steps of 0.4 leave 0.8^120 = 2e-12 of the start
    def outer(lam: Tensor) -> Tensor:
        rule = mo.Implicit(solver)
        out = mo.minimize(
            loss, SGD(0.4), torch.zeros(5), None, steps=120, meta=lam, differentiate=rule
        )
        return (out.params - c).square().sum() / 2

    exact = HB.T @ (HB @ lam - c)
    assert_close(
        exact, torch.tensor([-11.528753, 10.934745, -1.423259, -24.644045, -3.153058]), 1e-6
    )
    assert_close(backward(outer)(lam), exact, 1e-9)
    assert_close(vmap(grad(outer))(torch.stack([lam, lam])), torch.stack([exact, exact]), 1e-9)
    assert_close(jacrev(grad(outer))(lam), HB.T @ HB, 1e-9)


def ridge(
    params: dict[str, Tensor], batch: tuple[Tensor, Tensor], meta: dict[str, Tensor]
) -> Tensor:
    x, y = batch
    error = x @ params["w"] + params["b"] - y
    return error.square().mean() + sum(
        (meta[name].exp() * p**2).sum() for name, p in params.items()
    )


def ridge_solution(batch: tuple[Tensor, Tensor], meta: dict[str, Tensor]) -> dict[str, Tensor]:
    """The minimiser of `ridge` by the normal equations, for autograd to differentiate."""
    x, y = batch
    X = torch.cat([x, torch.ones(len(x), 1)], 1)
    penalties = torch.cat([meta["w"][:, 0], meta["b"]]).exp()
    w = torch.linalg.solve(
        X.T @ X / x.shape[0] + y.shape[1] * penalties.diag(), X.T @ y / x.shape[0]
    )
    return {"w": w[:-1], "b": w[-1]}


def test_ridge_regression_in_several_leaves() -> None:
    """First and second derivatives in every penalty and every number of the data."""
    batch = torch.randn(12, 3, requires_grad=True), torch.randn(12, 2, requires_grad=True)
    meta = {"w": torch.randn(3, 1, requires_grad=True), "b": torch.randn(1, requires_grad=True)}
    start = {"w": torch.zeros(3, 2), "b": torch.zeros(2)}
    inputs = [*batch, *meta.values()]

    def value(w: dict[str, Tensor]) -> Tensor:
        return (w["w"] ** 3).sum() + (w["b"].sin() * torch.tensor([1.0, 2.0])).sum()

    out = mo.minimize(
        ridge, SGD(0.2), start, batch, steps=400, meta=meta, differentiate=mo.Implicit(CG)
    )
    exact = ridge_solution(batch, meta)
    assert_close(out.params, exact, 1e-12)
    assert_close(
        two_derivatives(value(out.params), inputs), two_derivatives(value(exact), inputs), 1e-8
    )
    assert not out.losses.requires_grad
    assert not out.opt_state["step"].requires_grad


# --- any order, any nesting


def cubic(w: Tensor, inputs: dict[str, Any]) -> Tensor:
    """F(w) with a Jacobian that is not symmetric, and inputs without a derivative."""
    skew = torch.tensor([[0.0, 0.3, 0], [-0.3, 0, 0.2], [0, -0.2, 0]])
    return (
        w
        + 0.1 * w**3
        + 0.05 * w.sum()
        + skew @ w
        - torch.tanh(inputs["matrix"] @ inputs["at"]) * inputs["scale"]
    )


def cubic_problem() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return (point -> number) through the theorem, and through a fixed-point iteration.

    The iteration has enough steps to converge.
    """
    matrix = torch.randint(-2, 3, (3, 2))

    def iterated(at: Tensor, steps: int) -> Tensor:
        w = torch.zeros(3) + 0 * at.sum()
        for _ in range(steps):
            w = w - 0.5 * cubic(w, {"matrix": matrix.double(), "at": at, "scale": 2})
        return (w.sin() * torch.tensor([1.0, 2, 3])).sum() if steps > 150 else w

    def solved(at: Tensor) -> Tensor:
        inputs = {"matrix": matrix, "at": at, "scale": 2}

        def residual(w: list[Tensor], inputs: dict[str, Any]) -> list[Tensor]:
            return [cubic(w[0], {**inputs, "matrix": inputs["matrix"].double()})]

        (w,) = implicit(residual, mo.GMRES(rtol=1e-14), [iterated(at.detach(), 150)], inputs)
        return (w.sin() * torch.tensor([1.0, 2, 3])).sum()

    return solved, lambda at: iterated(at, 160)


@each_way
def test_every_order_equals_that_of_a_converged_iteration(way: str) -> None:
    solved, iterated = cubic_problem()
    at = torch.tensor([0.3, -0.5])
    expected = WAYS[way](iterated)(at)
    assert expected.abs().max() > 0.1
    assert_close(WAYS[way](solved)(at), expected, 1e-11)


RULES: dict[str, Any] = {
    "full": mo.Backprop(),
    "steps": mo.Backprop("steps"),
    "revolve": mo.Backprop(mo.Revolve(2)),
    "implicit": mo.Implicit(CG),
}


def bowl(w: Tensor, top: Tensor, middle: Tensor) -> Tensor:
    return (w - torch.sin(middle) - top).square().sum() / 2 + 0.1 * (w**4).sum()


def stack(rules: tuple[Any, Any], steps: tuple[int, int], top: Tensor) -> Tensor:
    """Fit w to the middle level, the middle level to w*, and look at both.

    `top` is read everywhere.
    """

    def lower(middle: Tensor, top: Tensor) -> Tensor:
        return mo.minimize(
            bowl, SGD(0.8), torch.zeros(2), top, steps=steps[0], meta=middle, differentiate=rules[0]
        ).params

    def middle_loss(middle: Tensor, _: None, top: Tensor) -> Tensor:
        return (lower(middle, top) - 1).square().sum() + (middle - top).square().sum()

    middle = mo.minimize(
        middle_loss,
        SGD(0.3),
        torch.zeros(2),
        None,
        steps=steps[1],
        meta=top,
        differentiate=rules[1],
    ).params
    return (middle * torch.tensor([1.0, 2.0])).sum() + lower(middle, top).square().sum()


def stack_by_hand(steps: tuple[int, int], top: Tensor) -> Tensor:
    """The same two loops as `torch.autograd` sees them."""

    def descend(loss: Callable[[Tensor], Tensor], rate: float, steps: int) -> Tensor:
        w = torch.zeros(2, requires_grad=True)
        for _ in range(steps):
            w = w - rate * torch.autograd.grad(loss(w), w, create_graph=True)[0]
        return w

    def lower(middle: Tensor) -> Tensor:
        return descend(lambda w: bowl(w, top, middle), 0.8, steps[0])

    middle = descend(
        lambda m: (lower(m) - 1).square().sum() + (m - top).square().sum(), 0.3, steps[1]
    )
    return (middle * torch.tensor([1.0, 2.0])).sum() + lower(middle).square().sum()


@pytest.mark.parametrize(
    "names",
    [pair for pair in itertools.product(RULES, RULES) if "implicit" in pair],
    ids="-below-".join,
)
def test_every_pair_of_rules_nested(names: tuple[str, str]) -> None:
    """The implicit levels run to convergence, the others make two steps."""
    rules = (RULES[names[0]], RULES[names[1]])
    steps = (20 if names[0] == "implicit" else 2, 36 if names[1] == "implicit" else 2)
    top = torch.tensor([0.4, -0.3])
    leaf = top.clone().requires_grad_()
    (expected,) = torch.autograd.grad(stack_by_hand(steps, leaf), leaf)  # type: ignore[arg-type]
    for way in ("backward", "grad", "vmap(grad)"):
        found = WAYS[way](lambda at: stack(rules, steps, at))(top)  # type: ignore[arg-type]
        # the levels contract by 0.2 and 0.6 a step: 1e-9 of the start is left
        assert_close(found, expected, 1e-8)


# --- the rule


def test_with_a_batch_per_step_the_last_one_counts() -> None:
    """And with a loss that is a module, with labels, and with another optimizer."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.tensor([0.5, 0.8, 1.0]))

        def forward(self, params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, label = batch
            return (
                nn.functional.cross_entropy(x @ params, label)
                + (self.decay * params.square().sum(1)).sum()
            )

    x, labels = (
        torch.randn(1, 8, 3).expand(400, 8, 3).clone().requires_grad_(),
        torch.randint(0, 4, (8,)).expand(400, 8),
    )
    loss = Loss()
    start, rate = torch.zeros(3, 4, requires_grad=True), nn.Parameter(torch.tensor(0.2))
    out = mo.minimize(
        loss, SGD(rate, momentum=0.3), start, (x, labels), differentiate=mo.Implicit(CG)
    )
    weights = torch.linspace(-1, 2, 12).reshape(3, 4)
    bar_x, bar_decay, *nothing = torch.autograd.grad(
        (out.params * weights).sum(), [x, loss.decay, start, rate], allow_unused=True
    )
    assert nothing == [None, None]
    assert (bar_x[:-1] == 0).all()

    w = out.params.detach().requires_grad_()
    last, decay = x[-1].detach().requires_grad_(), loss.decay.detach().requires_grad_()
    value = nn.functional.cross_entropy(last @ w, labels[-1]) + (decay * w.square().sum(1)).sum()
    (g,) = torch.autograd.grad(value, w, create_graph=True)
    assert g.abs().max() < 1e-12
    H = torch.stack(
        [torch.autograd.grad(entry, w, retain_graph=True)[0].flatten() for entry in g.flatten()]
    )
    u = torch.linalg.solve(H, weights.flatten()).reshape(3, 4)
    expected = torch.autograd.grad(-(g * u).sum(), [last, decay])
    assert_close([bar_x[-1], bar_decay], list(expected), 1e-10)


def test_implicit_maml() -> None:
    """Inner 1/2 |a (w - t)|^2 + lam / 2 |w - start|^2 under `meta_grad`.

    Dw* / dstart = lam / (a^2 + lam).
    """
    lam = 0.7

    def loss(w: Tensor, task: dict[str, Tensor], start: Tensor) -> Tensor:
        return (task["a"] * (w - task["t"])).square().sum() / 2 + lam / 2 * (
            w - start
        ).square().sum()

    def task_loss(start: Tensor, task: dict[str, Tensor]) -> Tensor:
        w = mo.minimize(
            loss, SGD(0.5), start, task, steps=60, meta=start, differentiate=mo.Implicit(CG)
        ).params
        return (w - task["goal"]).square().sum() / 2

    start, tasks = (
        torch.randn(4),
        {"a": torch.rand(3, 4) + 0.5, "t": torch.randn(3, 4), "goal": torch.randn(3, 4)},
    )
    found, _ = mo.meta_grad(task_loss)(start, tasks)
    square = tasks["a"] ** 2
    w = (square * tasks["t"] + lam * start) / (square + lam)
    assert_close(found, (lam / (square + lam) * (w - tasks["goal"])).mean(0), 1e-8)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# of the compiler
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_the_search_may_be_compiled() -> None:
    """`minimize(compile=True)` compiles a step; the theorem needs none of it."""
    torch._dynamo.reset()
    lam = torch.tensor([0.5, -1.0], requires_grad=True)

    def loss(w: Tensor, _: None, lam: Tensor) -> Tensor:
        return (w - lam.sin()).square().sum()

    rule = mo.Implicit(CG)
    w = mo.minimize(
        loss, SGD(0.25), torch.zeros(2), None, steps=60, meta=lam, differentiate=rule, compile=True
    ).params
    assert_close(w, lam.sin(), 1e-12)
    assert_close(torch.autograd.grad(w.sum(), lam)[0], lam.cos(), 1e-12)


def test_damping_is_part_of_the_derivative_at_every_order() -> None:
    """On L = a (w - m)^2 / 2 with damping d: dw/dm = a / (a + d), and as a function of a too."""
    rule = mo.Implicit(mo.ConjugateGradient(damping=0.5))

    def slope(a: Tensor) -> Tensor:
        def w(m: Tensor) -> Tensor:
            def loss(w: Tensor, _: None, meta: tuple[Tensor, Tensor]) -> Tensor:
                return meta[0] * (w - meta[1]).square() / 2

            return mo.minimize(
                loss, SGD(0.5), torch.zeros(()), None, steps=80, meta=(a, m), differentiate=rule
            ).params

        return grad(w)(torch.tensor(0.3))

    a = torch.tensor(1.5)
    assert_close(slope(a), torch.tensor(0.75), 1e-12)
    assert_close(grad(slope)(a), torch.tensor(0.5 / 4), 1e-12)


# --- statistics


def test_what_the_solver_says() -> None:
    H, v, B = torch.diag(torch.tensor([1.0, 2, 3, 4])), torch.ones(4), torch.randn(4, 2)

    def residual(w: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return H @ w - B @ inputs["lam"]

    lam, wanted = {"lam": torch.randn(2), "count": torch.tensor(3)}, {"lam": True, "count": False}
    w = torch.linalg.solve(H, B @ lam["lam"])
    for steps, left in ((1, True), (4, False)):
        bars, solution = pull_back_implicit(
            residual, mo.ConjugateGradient(steps, rtol=1e-12), w, lam, v, wanted
        )
        assert solution.steps == steps
        assert_close(solution.residual, (v - H @ solution.value).norm() / 2, 1e-12)
        assert (solution.residual > 0.1) == left
        assert bars["count"] is None
        assert_close(bars["lam"], B.T @ solution.value, 1e-12)  # F has -B lam
    warm = pull_back_implicit(residual, CG, w, lam, v, wanted, start=solution.value)[1]
    assert warm.steps < 4

    def compiled(v: Tensor) -> Tensor:
        with torch.no_grad():
            return pull_back_implicit(residual, mo.GMRES(4), w, lam, v, wanted)[0]["lam"]

    torch._dynamo.reset()
    assert_close(
        torch.compile(compiled, fullgraph=True, backend="aot_eager")(v),
        B.T @ (v / H.diagonal()),
        1e-12,
    )


# --- errors


def loss_of(w: Tensor, _: None, meta: Tensor) -> Tensor:
    return (w - meta).square().sum()


DEFAULT = mo.Implicit()


def last(start: Tensor, meta: Tensor, rate: Any = 0.1) -> Tensor:
    return mo.minimize(
        loss_of, SGD(rate), start, None, steps=2, meta=meta, differentiate=DEFAULT
    ).params.sum()


def test_what_a_solution_does_not_depend_on_is_never_zero_in_silence() -> None:
    start, meta, rate = torch.zeros(2), torch.ones(2), torch.tensor(0.1)
    with pytest.raises(
        ValueError,
        match=r"Implicit: the initial parameters must not be differentiated, but the tensor itself",
    ):
        grad(last)(start, meta)
    with pytest.raises(
        ValueError,
        match=r"Implicit: the optimizer's tensors must not be differentiated, but .*'lr'",
    ):
        grad(last, argnums=2)(start, meta, rate)
    assert_close(grad(lambda start: last(start, start))(start), torch.ones(2), 1e-12)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(
            last(leaf := start.clone().requires_grad_(), meta.requires_grad_()), leaf
        )
    with torch.no_grad():
        assert not last(start.requires_grad_(), meta).requires_grad


def test_a_hypergradient_evaluates_the_loss_once_at_the_end() -> None:
    """It was twice: for the solver's products, and for the mixed one."""
    calls, meta = [], torch.ones(2, requires_grad=True)

    def counted(w: Tensor, _: Any, meta: Tensor) -> Tensor:
        calls.append(w)
        return (w - meta.sin()).square().sum() + (w**4).sum()

    for solver in (mo.ConjugateGradient(), mo.Direct(), mo.NormalCG(), mo.Nystrom(2)):
        rule = mo.Implicit(solver)
        out = mo.minimize(
            counted, SGD(0.1), torch.zeros(2), None, steps=40, meta=meta, differentiate=rule
        ).params
        before = len(calls)
        (found,) = torch.autograd.grad(out.sum(), meta, retain_graph=True)
        assert len(calls) == before + 1
        expected = 2 * meta.cos() / (2 + 12 * out**2)
        assert_close(found, expected.detach(), 1e-2 if isinstance(solver, mo.Nystrom) else 1e-12)
        # which needs two, to go on from both
        (again,) = torch.autograd.grad(out.sum(), meta, create_graph=True)
        assert_close(again.detach(), found, 1e-12)


def test_a_compiler_would_answer_zero() -> None:
    torch._dynamo.reset()
    with pytest.raises(
        Exception, match=r"cannot be part of a `torch.func.grad` inside `torch.compile`"
    ):
        torch.compile(
            grad(lambda meta: last(torch.zeros(2), meta)), fullgraph=True, backend="aot_eager"
        )(torch.ones(2))


def test_a_solver_is_a_solver() -> None:
    with pytest.raises(TypeError, match="Implicit: `solver` must be a linear solver, got 'cg'"):
        mo.Implicit("cg")  # type: ignore[arg-type]


def test_structure_of_the_root_is_kept() -> None:
    w = {"a": torch.zeros(2), "b": (torch.zeros(()),)}
    found = implicit(
        lambda w, inputs: tree.map(lambda leaf: leaf - inputs, w),
        mo.Direct(),
        w,
        torch.zeros((), requires_grad=True),
    )
    assert tree.flatten(found)[1] == tree.flatten(w)[1]
    assert all(leaf.requires_grad for leaf in tree.leaves(found))

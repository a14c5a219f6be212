"""`implicit`: the derivative of solutions that other solvers found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from problems import assert_close, leaf
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.func import grad, vmap

import metaopt as mo
from optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")
torch.manual_seed(0)
X, Y = torch.randn(12, 3).double(), torch.randn(12).double()
DIRECT = mo.Direct()


def ridge(params: dict[str, Tensor], batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
    """1/2 |X w - y|^2 + 1/2 e^meta |w|^2."""
    x, y = batch
    return ((x @ params["w"] - y).square().sum() + meta.exp() * params["w"].square().sum()) / 2


def closed(meta: Tensor, y: Tensor = Y) -> Tensor:
    return torch.linalg.solve(X.T @ X + meta.exp() * torch.eye(3), X.T @ y)


def outer(w: Tensor) -> Tensor:
    return (w**3).sum() + w.sin().sum()


def by_lbfgs(meta: Tensor) -> dict[str, Tensor]:
    w = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.LBFGS(
        [w], tolerance_grad=1e-13, tolerance_change=0, max_iter=100, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ridge({"w": w}, (X, Y), meta)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {"w": w}


def by_scipy(meta: Tensor) -> dict[str, Tensor]:
    def value_and_slope(at: Any) -> Any:
        w = torch.tensor(at, requires_grad=True)
        value = ridge({"w": w}, (X, Y), meta)
        return value.detach().numpy(), torch.autograd.grad(value, w)[0].numpy()

    found = scipy.optimize.minimize(value_and_slope, np.zeros(3), jac=True, tol=1e-13)
    return {"w": torch.as_tensor(found.x)}


def by_sklearn(meta: Tensor) -> dict[str, Tensor]:
    return {
        "w": torch.as_tensor(
            Ridge(alpha=meta.exp().numpy(), fit_intercept=False).fit(X.numpy(), Y.numpy()).coef_
        )
    }


@pytest.mark.parametrize("solve", [by_lbfgs, by_scipy, by_sklearn])
@pytest.mark.parametrize(
    "solver",
    [DIRECT, mo.ConjugateGradient(), mo.Penalty(1e3, 200, 0.05)],
    ids=lambda s: type(s).__name__,
)
def test_two_derivatives_are_those_of_the_closed_form(solve: Any, solver: Any) -> None:
    meta, y = torch.tensor(0.3, requires_grad=True), Y.clone().requires_grad_()
    solution = solve(meta.detach())
    w = mo.implicit(ridge, solution, (X, y), meta=meta, solver=solver)["w"]
    assert_close(w, closed(meta, y), 1e-6)
    found, expected = (
        torch.autograd.grad(outer(at), [meta, y], create_graph=True) for at in (w, closed(meta, y))
    )
    assert_close([*found], [*expected], 1e-3 if isinstance(solver, mo.Penalty) else 1e-6)
    if not isinstance(solver, mo.Penalty):
        again, wanted = (
            torch.autograd.grad(g[0] + g[1].sin().sum(), [meta, y]) for g in (found, expected)
        )
        assert_close([*again], [*wanted], 1e-5)


def test_under_transforms_as_minimize() -> None:
    metas = torch.tensor([0.0, 0.5, -1.0])

    def value(meta: Tensor, w: Tensor) -> Tensor:
        return outer(mo.implicit(ridge, {"w": w}, (X, Y), meta=meta, solver=DIRECT)["w"])

    def exact(meta: Tensor) -> Tensor:
        return outer(closed(meta))

    ends = vmap(closed)(metas)
    assert_close(grad(value)(metas[0], ends[0]), grad(exact)(metas[0]), 1e-10)
    assert_close(vmap(grad(value))(metas, ends), vmap(grad(exact))(metas), 1e-10)
    assert_close(vmap(grad(grad(value)))(metas, ends), vmap(grad(grad(exact)))(metas), 1e-9)
    (backward,) = torch.autograd.grad(
        vmap(value)(at := metas.clone().requires_grad_(), ends).sum(), at
    )
    assert_close(backward, vmap(grad(exact))(metas), 1e-10)


@pytest.mark.parametrize(
    "rule", [mo.Implicit(), mo.T1T2(scale=0.1), mo.FiniteDifference(), mo.Penalty()], ids=repr
)
def test_it_is_what_minimize_attaches_where_its_loop_ends(rule: Any) -> None:
    meta = torch.tensor(0.3, requires_grad=True)
    out = mo.minimize(
        ridge, SGD(0.01), {"w": torch.zeros(3)}, (X, Y), steps=5, meta=meta, differentiate=rule
    ).params
    (expected,) = torch.autograd.grad(outer(out["w"]), meta)
    solver = rule.solver if isinstance(rule, mo.Implicit) else rule
    w = mo.implicit(ridge, mo.tree.map(Tensor.detach, out), (X, Y), meta=meta, solver=solver)["w"]
    assert_close(torch.autograd.grad(outer(w), meta)[0], expected, 1e-13)


class Model(nn.Module):
    """A loss with a parameter of its own: |w - s|^2 (3 + c), of which w* = s whatever c is."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("c", torch.tensor(1.0))

    def forward(self, w: Tensor, batch: None) -> Tensor:
        return (w - self.s).square().sum() * (3 + self.c)


def test_a_module_for_a_loss_and_nothing_differentiated() -> None:
    model = Model()
    mo.implicit(model, model.s.detach(), solver=DIRECT).square().sum().backward()
    assert_close(model.s.grad, 2 * model.s.detach(), 1e-12)
    with torch.no_grad():
        assert not mo.implicit(model, model.s.detach()).requires_grad
    assert not mo.implicit(lambda w, _: (w**2).sum(), torch.zeros(2)).requires_grad


def test_a_random_loss_is_seen_with_one_mask_and_no_trace_is_left() -> None:
    meta, w = torch.ones(50, requires_grad=True), torch.full((50,), 2.0)

    def loss(w: Tensor, _: None, meta: Tensor) -> Tensor:
        return (F.dropout(w - 2 * meta, 0.5) ** 2 + (w - 2 * meta) ** 2).sum()

    before = torch.get_rng_state()
    out = mo.implicit(loss, w, meta=meta)
    assert torch.equal(before, torch.get_rng_state())
    assert_close(torch.autograd.grad(out.sum(), meta)[0], torch.full((50,), 2.0), 1e-10)


def test_what_is_wrong_is_said() -> None:
    meta, w = torch.tensor(0.3, requires_grad=True), {"w": torch.zeros(3)}
    with pytest.raises(
        TypeError, match=r"implicit: `solver` must be a linear solver, or a rule .*, got Backprop\("
    ):
        mo.implicit(ridge, w, (X, Y), meta=meta, solver=mo.Backprop())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"`solution` must be floating-point or complex tensors, got ndarray at \['w'\]. "
        r".*as_tensor",
    ):
        mo.implicit(ridge, {"w": np.zeros(3)}, (X, Y), meta=meta)
    with pytest.raises(
        ValueError, match=r"`solution` must be floating-point or complex tensors, got torch\.int64"
    ):
        mo.implicit(ridge, {"w": torch.zeros(3, dtype=torch.int64)}, (X, Y), meta=meta)
    with pytest.raises(ValueError, match=r"`loss_fn` reaches `meta`.* through its closure"):
        mo.implicit(lambda w, batch: ridge(w, batch, meta), w, (X, Y))
    with pytest.raises(ValueError, match="`loss_fn` must return a floating-point scalar"):
        mo.implicit(lambda w, _: w["w"], w)
    with pytest.raises(
        ValueError, match=r"Implicit: the solution must not be differentiated, but .*'w'"
    ):
        grad(lambda w: mo.implicit(ridge, {"w": w}, (X, Y), meta=meta)["w"].sum())(w["w"])
    with pytest.raises(
        ValueError, match=r"Implicit: the solution must not be differentiated, but .*'w'"
    ):
        mo.implicit(ridge, leaf(w), (X, Y), meta=meta.detach())["w"].sum().backward()
    for rule, message in (
        (mo.SAMA(), r"`solver` must do without an optimizer, got SAMA\("),
        (
            mo.T1T2(scale="lr"),
            'T1T2: `scale="lr"` must find one step size in the optimizer, got no optimizer',
        ),
    ):
        out = mo.implicit(ridge, w, (X, Y), meta=meta, solver=rule)["w"]
        with pytest.raises(ValueError, match=message):
            out.sum().backward()

"""Bilevel problems with known hypergradients.

What each rule says it gives is computed by dense linear algebra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from problems import leaf
from torch import Tensor

import metaopt as mo
from metaopt.differentiate import End, InnerLoop, Rule
from optimizers import SGD


@dataclass(frozen=True)
class Bilevel:
    """Inner loss(w, batch, meta), descended from `start`; outer loss of the last parameters.

    Attributes:
        exact: hypergradient by a closed form; of the steps taken, or where those converge, of the
            solution.
        converges: whether the steps reach the solution.
    """

    loss: Callable[[Any, Any, Any], Tensor]
    start: Any
    batch: Any
    meta: Any
    outer: Callable[[Any], Tensor]
    lr: float
    steps: int
    exact: Any
    converges: bool

    def value(self, rule: Any, meta: Any) -> Tensor:
        """Return the outer loss after `minimize`."""
        out = mo.minimize(
            self.loss,
            SGD(self.lr),
            self.start,
            self.batch,
            steps=self.steps,
            meta=meta,
            differentiate=rule,
        )
        return self.outer(out.params)

    def end(self) -> Any:
        """Return the last parameters, by steps written out."""
        w = leaf(self.start)
        for _ in range(self.steps):
            grads = torch.autograd.grad(self.loss(w, self.batch, self.meta), mo.tree.leaves(w))
            moved = [w - self.lr * g for w, g in zip(mo.tree.leaves(w), grads, strict=True)]
            w = leaf(mo.tree.unflatten(mo.tree.flatten(w)[1], moved))
        return w


def quadratic() -> Bilevel:
    """1/2 w'Hw - w'B l and 1/2 |w - c|^2: hypergradient B'H^-1 (w* - c).

    0.8^110 = 2e-11 is left.
    """
    torch.manual_seed(0)
    A, B, c, l = torch.randn(5, 5), torch.randn(5, 5), torch.randn(5), torch.randn(5)
    H = A @ A.T / 5 + torch.eye(5) / 2
    exact = B.T @ torch.linalg.solve(H, torch.linalg.solve(H, B @ l) - c)

    def loss(w: Tensor, _: Any, l: Tensor) -> Tensor:
        return w @ H @ w / 2 - w @ B @ l

    return Bilevel(
        loss, torch.zeros(5), None, l, lambda w: (w - c).square().sum() / 2, 0.4, 110, exact, True
    )


def ridge() -> Bilevel:
    """Least squares in two leaves, a penalty on each.

    w* = (X'X/n + k P)^-1 X'Y/n, normal equations; 0.7^80 = 4e-13 is left.
    """
    torch.manual_seed(1)
    x, y = torch.randn(12, 3), torch.randn(12, 2)
    meta = {"w": torch.rand(3, 1), "b": torch.rand(1)}

    def loss(w: dict[str, Tensor], batch: tuple[Tensor, Tensor], meta: dict[str, Tensor]) -> Tensor:
        x, y = batch
        return (x @ w["w"] + w["b"] - y).square().mean() + sum(
            (meta[k].exp() * p**2).sum() for k, p in w.items()
        )

    def outer(w: dict[str, Tensor]) -> Tensor:
        return (w["w"] ** 3).sum() + (w["b"].sin() * torch.tensor([1.0, 2.0])).sum()

    def solution(meta: dict[str, Tensor]) -> dict[str, Tensor]:
        X = torch.cat([x, torch.ones(12, 1)], 1)
        w = torch.linalg.solve(
            X.T @ X / 12 + 2 * torch.cat([meta["w"][:, 0], meta["b"]]).exp().diag(), X.T @ y / 12
        )
        return {"w": w[:-1], "b": w[-1]}

    at = leaf(meta)
    grads = torch.autograd.grad(outer(solution(at)), list(at.values()))
    exact = dict(zip(at, grads, strict=True))
    return Bilevel(
        loss,
        {"w": torch.zeros(3, 2), "b": torch.zeros(2)},
        (x, y),
        meta,
        outer,
        0.15,
        80,
        exact,
        True,
    )


def dynamics() -> Bilevel:
    """w_{t+1} = A w_t + lr B l with A = I - lr H, four steps: dw_T/dl = lr (I + A + A^2 + A^3) B.

    Far from converged.
    """
    torch.manual_seed(2)
    root, B, c, l, start = (
        torch.randn(4, 4),
        torch.randn(4, 3),
        torch.randn(4),
        torch.randn(3),
        torch.randn(4),
    )
    H, lr = root @ root.T / 4 + torch.eye(4), 0.1
    A = torch.eye(4) - lr * H
    powers = sum(torch.linalg.matrix_power(A, t) for t in range(4))
    w = torch.linalg.matrix_power(A, 4) @ start + lr * powers @ B @ l
    exact = lr * B.T @ powers.T @ (w - c)

    def loss(w: Tensor, _: Any, l: Tensor) -> Tensor:
        return w @ H @ w / 2 - w @ B @ l

    return Bilevel(loss, start, None, l, lambda w: (w - c).square().sum() / 2, lr, 4, exact, False)


def logistic() -> Bilevel:
    """Weighted logistic regression, whose third derivatives give differences and tilts a bias.

    Exact: of the solution.
    """
    torch.manual_seed(3)
    x, y, meta = torch.randn(10, 3), (torch.rand(10) < 0.5).double(), torch.randn(10)

    def loss(w: Tensor, batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
        x, y = batch
        logits = x @ w
        return (
            (torch.nn.functional.softplus(logits) - y * logits) * meta.sigmoid()
        ).sum() + w.square().sum() / 2

    problem = Bilevel(
        loss, torch.zeros(3), (x, y), meta, lambda w: (w - 1).square().sum(), 0.3, 70, None, True
    )
    return Bilevel(**{**vars(problem), "exact": stated(problem, "inverse")})


def stated(problem: Bilevel, x: str | Tensor) -> Any:
    """Return -[d grad_w L]' X v at the end of the loop, dense.

    X is "inverse" of H, "identity", or a given matrix.
    """
    w, meta = problem.end(), leaf(problem.meta)
    leaves = mo.tree.leaves(w)
    v = flat(torch.autograd.grad(problem.outer(w), leaves))
    slope = flat(
        torch.autograd.grad(problem.loss(w, problem.batch, meta), leaves, create_graph=True)
    )
    if x == "inverse":
        H = torch.stack(
            [flat(torch.autograd.grad(entry, leaves, retain_graph=True)) for entry in slope]
        )
        v = torch.linalg.solve(H, v)
    elif isinstance(x, Tensor):
        v = x @ v
    bars = torch.autograd.grad(-(slope @ v), mo.tree.leaves(meta))
    return mo.tree.unflatten(mo.tree.flatten(meta)[1], list(bars))


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


PROBLEMS = {"quadratic": quadratic, "ridge": ridge, "dynamics": dynamics, "logistic": logistic}


@dataclass(frozen=True)
class Record(Rule):
    """A rule that keeps the loop it is given."""

    loops: list[InnerLoop] = field(default_factory=list)

    def attach(self, loop: InnerLoop) -> Any:
        self.loops.append(loop)
        return mo.Backprop().attach(loop)


def recorded(*args: Any, **kwargs: Any) -> tuple[InnerLoop, End]:
    """Return the loop that `minimize` builds, and where it ends."""
    record = Record()
    with torch.no_grad():
        out = mo.minimize(*args, **kwargs, differentiate=record)
    (loop,) = record.loops
    return loop, End(out.params, out.opt_state, mo.tree.index(loop.batches, -1))

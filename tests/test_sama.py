"""SAMA's preconditioner, the derivative of the optimizer's own update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bilevel import logistic, recorded
from problems import Formula, adam, adamw, assert_close, leaf, rmsprop
from torch import Tensor
from torch.func import grad

import metaopt as mo
from metaopt.differentiate import End
from metaopt.differentiate.steps import run_noting_last
from optimizers import SGD, Adam, AdamW, ClipNorm, LSTMOptimizer, MLPOptimizer, RMSprop

float64 = pytest.mark.usefixtures("float64")


def loss_of_two(w: dict[str, Tensor], _: Any, meta: Tensor) -> Tensor:
    return (
        (w["a"] ** 4).sum() / 4
        + torch.sin(w["b"] * meta).sum()
        + (w["a"].sum() * w["b"]).square().sum()
    )


def two_leaves() -> dict[str, Tensor]:
    return {"a": torch.tensor([0.9, -0.4, 0.3]), "b": torch.tensor([[0.5, -1.1]])}


HAND: dict[str, tuple[Callable[[], mo.Optimizer], Formula, dict[str, float]]] = {
    "Adam": (
        lambda: Adam(0.003),
        adam,
        {"lr": 0.003, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "eps_root": 0.0},
    ),
    "AdamW": (
        lambda: AdamW(0.003, weight_decay=0.1),
        adamw,
        {
            "lr": 0.003,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "eps_root": 0.0,
            "weight_decay": 0.1,
        },
    ),
    "RMSprop": (lambda: RMSprop(0.003), rmsprop, {"lr": 0.003, "alpha": 0.99, "eps": 1e-8}),
}
LEARNED: dict[str, Callable[[], mo.Optimizer]] = {
    "LSTM": lambda: LSTMOptimizer(4, scale=0.003).double(),
    "MLP": lambda: MLPOptimizer(4, step_size=0.003).double(),
    "clipped": lambda: ClipNorm(0.1, SGD(0.003, momentum=0.9)),
}


@float64
@pytest.mark.parametrize("name", [*HAND, *LEARNED])
def test_the_preconditioner_is_the_derivative_of_the_update(name: str) -> None:
    """At steps 1, ..., 1000.

    Against autograd of the formula by hand or, for what has none, central differences of the
    update.

    Differences of a displacement of 1e-6 leave 1e-12 of bias and 1e-10 of rounding, relative to
    updates over 1e-3.
    """
    optimizer = (HAND[name][0] if name in HAND else LEARNED[name])()
    meta, v = (
        torch.tensor(0.7),
        {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor([[0.3, 0.7]])},
    )
    loop, _ = recorded(loss_of_two, optimizer, two_leaves(), None, steps=1, meta=meta)
    params, state = two_leaves(), optimizer.requires_grad_(False).init(two_leaves())
    for step in range(1, 1001):
        grads = grad(loss_of_two)(params, None, meta)
        with torch.no_grad():
            updates, after = optimizer(grads, state, params)
        if step in (1, 2, 5, 20, 100, 1000):
            x = mo.SAMA().precondition(loop, End(params, state, None), v)
            if name in HAND:
                _, formula, h = HAND[name]
                for k in params:
                    g, slots = leaf(grads[k]), {s: slot[k] for s, slot in state["slots"].items()}
                    (expected,) = torch.autograd.grad(
                        (formula(step, params[k], g, h, slots)[0] * v[k]).sum(), g
                    )
                    assert_close(x[k], expected, 1e-9)
            else:
                at, small = mo.tree.ravel(grads), 1e-6 * grads["a"].abs().max()
                sides = [
                    [
                        optimizer(mo.tree.unravel(at + sign * small * e, grads), state, params)[0]
                        for e in torch.eye(5)
                    ]
                    for sign in (1, -1)
                ]
                rows = [
                    (mo.tree.ravel(u) - mo.tree.ravel(d)) / (2 * small)
                    for u, d in zip(*sides, strict=True)
                ]
                expected = torch.stack(rows) @ mo.tree.ravel(v)
                torch.testing.assert_close(
                    mo.tree.ravel(x), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max())
                )
        params, state = mo.apply_updates(params, updates), after


@float64
def test_sama_at_the_last_step_is_its_formula() -> None:
    """[d grad_w L(w_7)]' D' v, with D of the step from w_6 to w_7."""
    bilevel, rule = logistic(), mo.SAMA(1e-4, at="last")
    meta = leaf(bilevel.meta)

    def train(steps: int, rule: mo.Rule) -> Any:
        optimizer = Adam(0.1, eps=1e-2)
        return mo.minimize(
            bilevel.loss,
            optimizer,
            bilevel.start,
            bilevel.batch,
            steps=steps,
            meta=meta,
            differentiate=rule,
        )

    out = train(7, rule)
    (bar,) = torch.autograd.grad(bilevel.outer(out.params), meta)

    with torch.no_grad():
        before = train(6, rule)
    w = leaf(out.params)
    (v,) = torch.autograd.grad(bilevel.outer(w), w)
    g = leaf(grad(bilevel.loss)(before.params, bilevel.batch, bilevel.meta))
    h = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-2, "eps_root": 0.0}
    after, _ = adam(7, before.params, g, h, before.opt_state["slots"])
    (x,) = torch.autograd.grad((after * v).sum(), g)
    at = leaf(bilevel.meta)
    (slope,) = torch.autograd.grad(bilevel.loss(w, bilevel.batch, at), w, create_graph=True)
    (expected,) = torch.autograd.grad((slope * x).sum(), at)
    assert_close(bar, expected, 1e-7)  # radius 1e-4


@float64
def test_sama_at_the_last_step_can_be_differentiated_again() -> None:
    """In what the loss reads, of which D is a function too."""
    bilevel, rule = logistic(), mo.SAMA(1e-4, at="last")
    args = (bilevel.loss, Adam(0.1, eps=1e-2), bilevel.start, bilevel.batch)
    loop, end = recorded(*args, steps=7, meta=bilevel.meta)
    with torch.no_grad():
        _, last = run_noting_last(loop, notes=True)
    end = end._replace(last=last)
    v = torch.linspace(-1, 1, bilevel.start.numel()).view_as(bilevel.start)

    def pull(meta: Tensor) -> Tensor:
        here = replace(loop, inputs={**loop.inputs, "meta": meta})
        in_read = {name: name == "meta" for name in ("meta", "loss", "batch")}
        return rule.pull_back(here, end, v, (in_read, False))[0][0]["meta"].square().sum()

    meta = leaf(bilevel.meta)
    (slope,) = torch.autograd.grad(pull(meta), meta)
    with torch.enable_grad():  # as where it is recorded: the gradient moves with the weights
        e = 1e-5 * torch.randn(meta.shape, generator=torch.Generator().manual_seed(0))
        ahead, behind = pull(leaf(bilevel.meta + e)), pull(leaf(bilevel.meta - e))
    assert_close((slope * e).sum(), (ahead - behind).detach() / 2, 1e-4)


@float64
def test_sama_at_the_next_step_leaves_the_last_to_a_rule_beside_it() -> None:
    """As where the edges into one level have rules of their own."""
    bilevel = logistic()
    loop, end = recorded(
        bilevel.loss, Adam(0.1), bilevel.start, bilevel.batch, steps=3, meta=bilevel.meta
    )
    with torch.no_grad():
        _, last = run_noting_last(loop, notes=True)
        v = torch.ones_like(bilevel.start)
        found = mo.SAMA().precondition(loop, end._replace(last=last), v)
        assert_close(found, mo.SAMA().precondition(loop, end, v), 0)


def test_sama_refuses_other_steps() -> None:
    with pytest.raises(ValueError, match='SAMA: `at` must be "next" or "last", got \'first\''):
        mo.SAMA(at="first")
    assert mo.SAMA() == mo.SAMA(at="next") != mo.SAMA(at="last")


@float64
def test_sama_with_adam_is_its_formula() -> None:
    """At the state after the last step.

    [d grad_w L]' D' v with D of the step that would come next.
    """
    bilevel = logistic()
    meta = leaf(bilevel.meta)
    out = mo.minimize(
        bilevel.loss,
        Adam(0.1, eps=1e-2),
        bilevel.start,
        bilevel.batch,
        steps=7,
        meta=meta,
        differentiate=mo.SAMA(1e-4),
    )
    (bar,) = torch.autograd.grad(bilevel.outer(out.params), meta)

    w, slots = (
        leaf(out.params),
        {name: slot.detach() for name, slot in out.opt_state["slots"].items()},
    )
    (v,) = torch.autograd.grad(bilevel.outer(w), w)
    at = bilevel.meta.clone().requires_grad_()
    (g,) = torch.autograd.grad(bilevel.loss(w, bilevel.batch, at), w, create_graph=True)
    h = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-2, "eps_root": 0.0}
    after, _ = adam(8, w.detach(), g, h, slots)
    (expected,) = torch.autograd.grad((after * v).sum(), at)
    assert_close(bar, expected, 1e-7)  # radius 1e-4

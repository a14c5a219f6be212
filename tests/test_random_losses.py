"""Random losses under rules that evaluate them more than once: one dropout mask, and no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bilevel import recorded
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad

import metaopt as mo
from metaopt.differentiate import End, InnerLoop, PointRule
from metaopt.exact_ops.dropout import dropout
from metaopt.tasks.digits import digits
from optimizers import SGD

float64 = pytest.mark.usefixtures("float64")


def kind(rule: Any) -> str:
    return type(rule).__name__


class Net(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(64, 64),
            nn.BatchNorm1d(64),
            nn.Dropout(dropout),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu()))


def digits_problem(dropout: float) -> tuple[Net, InnerLoop, End, Callable[[Any], Tensor], Tensor]:
    """Return a network trained for a while, weights of its examples as meta, and a loss.

    The loss is that of other digits.
    """
    torch.manual_seed(0)
    model = Net(dropout)
    net = mo.functional(model)
    images, labels = digits()
    meta = torch.zeros(128)

    def loss(params: Any, batch: Any, meta: Tensor) -> Tensor:
        x, y = batch
        return (torch.sigmoid(meta) * F.cross_entropy(net(params, x), y, reduction="none")).mean()

    still = mo.functional(Net(0.0))

    def outer(params: Any) -> Tensor:
        return F.cross_entropy(still(params, images[128:640]), labels[128:640])

    torch.manual_seed(1)
    clean = mo.functional(Net(0.0))
    start = {k: p.detach().clone() for k, p in clean.params.items()}
    batch = (images[:128], labels[:128])
    loop, _ = recorded(loss, SGD(0.1), start, batch, steps=1, meta=meta)
    trained = mo.minimize(
        lambda w, b: F.cross_entropy(clean(w, b[0]), b[1]), SGD(0.1), start, batch, steps=10
    )
    return (
        model,
        loop,
        End(mo.tree.map(Tensor.detach, trained.params), trained.opt_state, ()),
        outer,
        meta,
    )


def hypergradient(
    rule: PointRule, loop: InnerLoop, end: End, outer: Callable[[Any], Tensor], meta: Tensor
) -> Tensor:
    meta = meta.clone().requires_grad_()
    params = rule.attach_at(replace(loop, inputs={**loop.inputs, "meta": meta}), end)
    outer(params).backward()
    assert meta.grad is not None
    return meta.grad


@pytest.mark.parametrize(
    "rule",
    [mo.FiniteDifference(), mo.SAMA(), mo.Penalty(100.0, 10, 0.3)],
    ids=lambda rule: type(rule).__name__,
)
def test_both_sides_see_one_dropout_mask(rule: PointRule) -> None:
    """Cosine to the same rule without dropout above .95, nothing left behind.

    Two masks would give noise.
    """
    _, *clean, meta = digits_problem(0.0)
    expected = hypergradient(rule, *clean, meta)
    model, loop, end, outer, meta = digits_problem(0.1)
    weights, buffers = (
        [t.clone() for t in tensors()] for tensors in (model.parameters, model.buffers)
    )
    values = [p.clone() for p in end.params.values()]
    random = torch.get_rng_state()
    found = hypergradient(rule, loop, end, outer, meta)
    assert torch.equal(random, torch.get_rng_state())
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(map(torch.equal, buffers, model.buffers()))
    assert all(map(torch.equal, values, end.params.values()))
    assert F.cosine_similarity(found, expected, dim=0) >= 0.95

    if isinstance(rule, mo.FiniteDifference):  # the same with a mask for each side
        v = grad(outer)(end.params)
        length = mo.tree.norm(v)
        sides = [
            mo.tree.map(lambda w, v, s=s: w + s * 0.01 / length * v, end.params, v) for s in (1, -1)
        ]
        batch = loop.inputs["batch"]
        one, two = (
            grad(lambda m, w=w: loop.loss({**loop.inputs, "meta": m}, w, (), batch)[0])(meta)
            for w in sides
        )
        assert F.cosine_similarity(two - one, expected, dim=0) < 0.5


@float64
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("rule", "exact"),
    [(mo.FiniteDifference(1e-4), mo.T1T2()), (mo.Penalty(1e6, 200, 0.3), mo.Implicit(mo.Direct()))],
    ids=kind,
)
def test_with_dropout_the_difference_is_the_exact_product(
    rule: PointRule, exact: PointRule, batched: bool
) -> None:
    """Of the very same mask, one per row of a `vmap`; and a second backward pass sees it again.

    Radius and weight leave 1e-6.
    """

    def value(meta: Tensor, rule: PointRule) -> Tensor:
        def loss(w: Tensor, x: Tensor, meta: Tensor) -> Tensor:
            return (
                F.dropout(torch.tanh(x * w * meta), 0.4).square().mean()
                + (w - meta).square().sum() / 2
            )

        x = torch.linspace(-2, 2, 60).reshape(20, 3)
        out = mo.minimize(loss, SGD(0.1), torch.zeros(3), x, steps=3, meta=meta, differentiate=rule)
        return out.params.sin().sum()

    def slopes(rule: PointRule) -> Tensor:
        torch.manual_seed(5)
        meta = torch.tensor([[0.7, -0.5, 1.2], [0.7, -0.5, 1.2]])
        if batched:
            return torch.func.vmap(grad(value), (0, None), randomness="different")(meta, rule)
        meta.requires_grad_()
        total = value(meta[0], rule)
        random = torch.get_rng_state()
        once, twice = (torch.autograd.grad(total, meta, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)
        assert torch.equal(random, torch.get_rng_state())
        return once

    found, expected = slopes(rule), slopes(exact)
    assert_close(found, expected, 1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # another mask, another derivative


def test_in_float32_the_difference_is_near_the_exact_product() -> None:
    """With DARTS' radius: truncation and rounding together are 1 % at most."""
    _, *problem, meta = digits_problem(0.0)
    exact, found = (
        hypergradient(rule, *problem, meta) for rule in (mo.T1T2(), mo.FiniteDifference())
    )
    assert (found - exact).norm() < 0.01 * exact.norm()


def drops(w: Tensor) -> Tensor:
    return F.dropout(w, 0.5)


def drops_in_place(w: Tensor) -> Tensor:
    return F.dropout(w * 1, 0.5, inplace=True)


def attends(w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(w, w, w, dropout_p=0.5)


@float64
@pytest.mark.parametrize(
    ("compute", "randomness"),
    [
        (drops, "same"),
        (drops, "different"),
        (drops_in_place, "same"),
        (attends, "same"),
        (attends, "different"),
    ],
)
def test_dropout_below_two_levels_of_vmap(
    compute: Callable[[Tensor], Tensor], randomness: str
) -> None:
    """The second is that of forward mode: the masks are those that the first one drew.

    Torch's own dropout ends the process there, or says that it cannot.
    """

    def slope(rule: Any) -> Tensor:
        torch.manual_seed(0)
        meta = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)

        def end(meta: Tensor) -> Tensor:
            def loss(w: Tensor, _: None, meta: Tensor) -> Tensor:
                return (compute(w) ** 2).sum() * meta

            start = torch.arange(1.0, 9.0).reshape(2, 4) / 4
            out = mo.minimize(loss, SGD(0.1), start, None, steps=3, meta=meta, differentiate=rule)
            return out.params.sum()

        (found,) = torch.autograd.grad(torch.vmap(end, randomness=randomness)(meta).sum(), meta)
        return found

    expected = slope(mo.Backprop("steps"))
    assert expected.count_nonzero() == 3
    assert_close(slope(mo.ForwardMode()), expected, 1e-12)
    slope(mo.EvolutionStrategy(pairs=2))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_mask_of_dropout_is_torchs(p: float) -> None:
    """In float32, on the CPU; of a transposed tensor it is that of its indices."""
    x = torch.rand(5, 7) + 1
    for input in (x, x.T):
        for inplace in (False, True):
            torch.manual_seed(0)
            expected, after = F.dropout(input.contiguous(), p), torch.rand(())
            torch.manual_seed(0)
            given = input.clone()
            found = dropout(given, p, inplace=inplace)
            assert torch.equal(found, expected)
            assert torch.equal(given, expected if inplace else input)
            assert torch.equal(torch.rand(()), after)

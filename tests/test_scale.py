"""The step size xi of DARTS' equation 8.

It is in the rules that put a multiple of the identity for the inverse Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from problems import assert_close, leaf
from torch import Tensor, nn

import metaopt as mo
from metaopt import tree
from metaopt.differentiate import PointRule
from optimizers import (
    SGD,
    Adam,
    ClipNorm,
    Cosine,
    Grouped,
    LSTMSchedule,
    Masked,
    Warmup,
    WeightDecay,
)

pytestmark = pytest.mark.usefixtures("float64")
Kind = Callable[..., PointRule]
each_kind = pytest.mark.parametrize("kind", [mo.T1T2, mo.FiniteDifference])


def inner(w: Tensor, _: Any, a: Tensor) -> Tensor:
    return (w - a).square().sum()


def hypergradient(rule: Any, optimizer: mo.Optimizer, *, steps: int = 1) -> Tensor:
    """Return d/da of a w - 2 a + 1 after steps on (w - a)^2 from w = -2, a = 2.

    The toy problem of DARTS.
    """
    a = torch.tensor([2.0], requires_grad=True)
    w = mo.minimize(
        inner, optimizer, torch.tensor([-2.0]), None, steps=steps, meta=a, differentiate=rule
    ).params
    return torch.autograd.grad((a * w - 2 * a + 1).sum(), a)[0]


@each_kind
@pytest.mark.parametrize("scale", [0.5, "lr"])
def test_the_toy_problem_of_darts(kind: Kind, scale: Any) -> None:
    """One SGD step of .5 has the derivative 2, as unrolled; without a step size it was 4."""
    assert_close(hypergradient(mo.Backprop(), SGD(0.5)), torch.tensor([2.0]), 1e-12)
    assert_close(hypergradient(kind(scale=scale), SGD(0.5)), torch.tensor([2.0]), 1e-9)
    assert_close(hypergradient(kind(), SGD(0.5)), torch.tensor([4.0]), 1e-9)


class Number(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


@each_kind
@pytest.mark.parametrize("look_ahead", [False, True])
def test_the_toy_problem_in_a_level_graph(kind: Kind, look_ahead: bool) -> None:
    def upper_loss(levels: Any, _: Any) -> Tensor:
        a, w = (level.params["value"] for level in (levels.a, levels.w))
        return a * w - 2 * a + 1

    def lower_loss(levels: Any, _: Any) -> Tensor:
        return (levels.w.params["value"] - levels.a.params["value"]).square()

    for scale, expected in (("lr", 2.0), (0.25, 1.0), (1.0, 4.0)):
        a, w = (
            mo.Level("a", Number(2.0), upper_loss, SGD(0.1)),
            mo.Level("w", Number(-2.0), lower_loss, SGD(0.5)),
        )
        graph = mo.LevelGraph(
            [mo.Edge(a, w, look_ahead=look_ahead, differentiate=kind(scale=scale))]
        )
        assert_close(
            graph.hypergradient("a", after_steps=True)["value"], torch.tensor(expected), 1e-9
        )


OPTIMIZERS: dict[str, tuple[Callable[[], mo.Optimizer], Callable[[int], float]]] = {
    "Adam": (lambda: Adam(0.3), lambda _: 0.3),
    "a parameter": (lambda: SGD(nn.Parameter(torch.tensor(0.2))), lambda _: 0.2),
    "float32": (lambda: SGD(torch.tensor(0.25, dtype=torch.float32)), lambda _: 0.25),
    "a schedule": (
        lambda: SGD(Warmup(Cosine(0.4, 10), 4)),
        lambda t: 0.2 * (1 + math.cos(math.pi * t / 10)) * t / 4,
    ),
    "clipped": (
        lambda: ClipNorm(1.0, WeightDecay(0.1, SGD(Cosine(0.4, 2)))),
        lambda t: [0.4, 0.2][t],
    ),
    "masked": (lambda: Masked(SGD(Cosine(0.4, 2)), "*"), lambda t: [0.4, 0.2][t]),
}


@each_kind
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_rate_of_the_next_step(kind: Kind, name: str) -> None:
    """dL/da = w - 2 + scale 2 a, at the w that one step leaves."""
    make, rate = OPTIMIZERS[name]
    a = torch.tensor([2.0], requires_grad=True)
    out = mo.minimize(
        inner, make(), torch.tensor([-2.0]), None, steps=1, meta=a, differentiate=kind(scale="lr")
    )
    (found,) = torch.autograd.grad((a * out.params).sum(), a)
    assert found.dtype == torch.float64
    assert_close(found, (out.params + rate(1) * 2 * a).detach(), 1e-7)


class OfTheLoss(mo.Schedule):
    """A rate that is the loss, times the first gradient, over 1000."""

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Tensor, Any]:
        assert loss is not None
        return loss * grads[0].sum().abs() / 1000, state


@each_kind
def test_a_schedule_that_looks_at_gradients_sees_those_of_the_end(kind: Kind) -> None:
    a = torch.tensor([2.0], requires_grad=True)
    for optimizer, share in ((SGD(OfTheLoss()), 1.0), (ClipNorm(0.5, SGD(OfTheLoss())), None)):
        out = mo.minimize(
            inner,
            optimizer,
            torch.tensor([-2.0]),
            None,
            steps=1,
            meta=a,
            differentiate=kind(scale="lr"),
        )
        (found,) = torch.autograd.grad((a * out.params).sum(), a)
        gap = (out.params - a).abs()
        rate = gap**2 * (2 * gap if share else 0.5) / 1000
        assert_close(found, (out.params + rate * 2 * a).detach(), 1e-7)


@each_kind
def test_the_learned_schedule_and_second_derivatives(kind: Kind) -> None:
    """The rule is a formula, and that is differentiated again.

    d/da (a w + ...) with dw/da = 2 lr, and once more with lr.
    """
    assert hypergradient(kind(scale="lr"), SGD(LSTMSchedule(initial=0.1))).isfinite()
    lr, a = nn.Parameter(torch.tensor(0.2)), leaf(torch.tensor([2.0]))
    w = mo.minimize(
        inner, SGD(lr), torch.tensor([-2.0]), None, steps=1, meta=a, differentiate=kind(scale="lr")
    ).params
    (first,) = torch.autograd.grad((a * w).sum(), a, create_graph=True)
    assert_close(first, w + 0.4 * a, 1e-8)
    in_a, in_lr = torch.autograd.grad(first.sum(), [a, lr])
    assert_close(in_a, torch.tensor([0.4 + 0.4]), 1e-7)
    assert_close(in_lr, torch.tensor(2 * 2.0), 1e-7)


@each_kind
def test_only_the_response_is_scaled_whatever_the_structure(kind: Kind) -> None:
    """With v a tree: c - (scale / 1) [d_a grad_w L]' v, each leaf."""
    start, m = (
        {"w": torch.randn(3), "b": torch.randn(())},
        leaf({"w": torch.randn(3), "b": torch.randn(())}),
    )

    def loss(w: Any, _: Any, m: Any) -> Tensor:
        return sum((w[k] ** 2 * m[k]).sum() for k in w)

    def run(rule: Any) -> Any:
        out = mo.minimize(loss, SGD(0.1), start, None, steps=2, meta=m, differentiate=rule).params
        value = sum(leaf.sin().sum() for leaf in tree.leaves(out)) + sum(
            leaf.cos().sum() for leaf in tree.leaves(m)
        )
        return out, torch.autograd.grad(value, tree.leaves(m))

    out, found = run(kind(scale=0.3))
    expected = [
        -at.sin() - 0.3 * 2 * w * w.cos()
        for w, at in zip(tree.leaves(out), tree.leaves(m), strict=True)
    ]
    assert_close([*found], [one.detach() for one in expected], 1e-4)


@each_kind
@pytest.mark.parametrize(
    "scale", [0, -1.0, float("inf"), float("nan"), True, None, "rate", torch.tensor(1.0)]
)
def test_a_scale_is_a_positive_number_or_lr(kind: Kind, scale: Any) -> None:
    with pytest.raises(
        ValueError, match=f'{kind.__name__}: `scale` must be a positive number or "lr", got'
    ):  # type: ignore[attr-defined]
        kind(scale=scale)


@each_kind
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: mo.from_torchopt(torchopt.sgd(0.1)), "FromTorchOpt with none"),
        (lambda: SGD(torch.tensor([0.1])), r"SGD with {'lr': 'a tensor of shape \(1,\)'}"),
    ],
)
def test_an_optimizer_without_one_step_size(
    kind: Kind, optimizer: Callable[[], mo.Optimizer], message: str
) -> None:
    with pytest.raises(
        ValueError, match=f'`scale="lr"` must find one step size in the optimizer, got {message}'
    ):
        hypergradient(kind(scale="lr"), optimizer())


def test_two_step_sizes_are_too_many_and_one_in_a_group_is_one() -> None:
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    two = SGD({"a": 0.1, "*": 0.2})
    with pytest.raises(
        ValueError, match=r"got SGD with {'a/lr': 0.1, '\*/lr': 0.2}. Give a number: `scale=0.1`"
    ):
        two.rate(two.init(params), params, lambda: (params, None))
    one = Grouped({"*": SGD(Cosine(0.1, 4))})
    state = one(params, one.init(params), params)[1]
    assert one.rate(state, params, lambda: (params, None)) == pytest.approx(
        0.05 * (1 + math.cos(math.pi / 4))
    )

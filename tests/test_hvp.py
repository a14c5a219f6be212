"""Forward-over-reverse products in the pullback of a step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import (
    VARIANTS,
    as_parameters,
    assert_close,
    by_hand,
    leaf,
    outer,
    regression,
    start,
    two_derivatives,
)
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import metaopt as mo
from metaopt.exact_ops import any_order
from optimizers import SGD, Adam

pytestmark = [
    pytest.mark.usefixtures("float64"),
]

each_split = pytest.mark.parametrize("parts", [1, 5])


@each_split
@pytest.mark.parametrize("memory", ["steps", mo.Revolve(2)], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_both_derivatives_by_hand(name: str, memory: Any, parts: int) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    params, (x, y), meta = leaf(start())
    h = as_parameters(variant.tensors())
    rule = mo.Backprop(memory, hvp="forward", microbatches=parts)
    out = mo.minimize(regression, variant.build(h), params, (x, y), meta=meta, differentiate=rule)
    zeros = {slot: {k: torch.zeros_like(p) for k, p in params.items()} for slot in variant.slots}
    expected = by_hand(
        regression, variant.formula, h, params, list(zip(x, y, strict=True)), meta, zeros
    )
    inputs = [*params.values(), x, y, meta, *h.values()]
    found = two_derivatives(outer(out.params, {}, out.losses), inputs)
    # sums in another order, four steps
    assert_close(found, two_derivatives(outer(expected[0], {}, expected[2]), inputs), 1e-10)


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "grad": lambda f: grad(f, (0, 1)),
    "jacrev": lambda f: jacrev(lambda m, x: f(m, x) * torch.arange(1.0, 3), (0, 1)),
    "vmap(grad)": lambda f: (
        lambda m, x: vmap(grad(f, (0, 1)))(m + torch.arange(3.0), torch.stack([x, x + 1, x.sin()]))
    ),
    "grad(vmap)": lambda f: grad(
        lambda m, x: vmap(f, (0, None))(m + torch.arange(3.0), x).sum(), (0, 1)
    ),
    "grad(grad)": lambda f: grad(
        lambda m, x: grad(f, 1)(m, x).square().sum() + grad(f)(m, x), (0, 1)
    ),
    "vmap(grad(grad))": lambda f: (
        lambda m, x: vmap(grad(grad(f)), (0, None))(m + torch.arange(3.0), x)
    ),
}


@each_split
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_transforms_and_a_window(transform: str, parts: int) -> None:
    (params, (x, y), meta), optimizer = start(), Adam(0.05, eps=1e-2)

    def derivative(rule: mo.Backprop) -> Any:
        def value(meta: Tensor, x: Tensor) -> Tensor:
            out = mo.minimize(regression, optimizer, params, (x, y), meta=meta, differentiate=rule)
            return outer(out.params, {}, out.losses)

        return TRANSFORMS[transform](value)(meta, x)

    for window in (None, 2):
        rule = mo.Backprop("steps", window=window, hvp="forward", microbatches=parts)
        # sums in another order
        assert_close(derivative(rule), derivative(mo.Backprop(window=window)), 1e-11)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "huber": lambda out, y: F.huber_loss(out, y, delta=0.5),
    "smooth l1": F.smooth_l1_loss,
    "cross entropy": lambda out, y: F.cross_entropy(
        out.flatten(0, 1), (y > 0).long()[..., 0].flatten()
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_transformer_with_dropout_and_an_unused_parameter(name: str) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True, activation="gelu")
    layer.unused = nn.Parameter(torch.ones(2))
    net = mo.functional(layer.double())
    x, y = torch.randn(2, 4, 3, 4), torch.randn(2, 4, 3, 4)
    scale = torch.tensor(0.8, requires_grad=True)

    def loss(params: Any, batch: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
        return LOSSES[name](net(params, scale * batch[0]), batch[1])

    def derivatives(rule: mo.Backprop) -> Any:
        torch.manual_seed(2)
        out = mo.minimize(
            loss, SGD(0.5, momentum=0.5), net.params, (x, y), meta=scale, differentiate=rule
        )
        return two_derivatives(
            out.losses.square().sum() + out.params["linear1.weight"].sum(), [scale]
        )

    # other order of sums
    assert_close(
        derivatives(mo.Backprop("steps", hvp="forward")), derivatives(mo.Backprop()), 1e-11
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "loss", [F.mse_loss, lambda *a, **k: F.huber_loss(*a, delta=0.3, **k)], ids=["mse", "huber"]
)
def test_the_replaced_losses_are_torchs(
    loss: Callable[..., Tensor], weighted: bool, reduction: str
) -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    options = {"reduction": reduction} | ({"weight": torch.rand(4, 3)} if weighted else {})
    with any_order():
        ours = loss(x, y, **options)
    theirs = loss(x, y, **options)
    assert_close(ours, theirs, 1e-14)
    assert_close(
        two_derivatives(ours.square().sum(), [x]),
        two_derivatives(theirs.square().sum(), [x]),
        1e-13,
    )


def test_an_operator_without_a_forward_derivative_is_named() -> None:
    def loss(w: Tensor, batch: Tensor, meta: Tensor) -> Tensor:
        return F.soft_margin_loss(w * meta, batch)

    meta = torch.tensor(0.5, requires_grad=True)

    def gradient(rule: mo.Backprop) -> Tensor:
        out = mo.minimize(
            loss,
            SGD(0.1),
            torch.ones(3),
            torch.tensor([1.0, -1, 1]),
            steps=2,
            meta=meta,
            differentiate=rule,
        )
        return torch.autograd.grad(out.losses.sum(), meta)[0]

    with pytest.raises(
        ValueError,
        match=r'got `soft_margin_loss_backward`, which has none in torch. Use `hvp="reverse"`',
    ):
        gradient(mo.Backprop("steps", hvp="forward"))
    assert_close(gradient(mo.Backprop("steps", hvp="reverse")), gradient(mo.Backprop()), 1e-13)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match='`hvp` must be "reverse" or "forward", got \'mixed\''):
        mo.Backprop("steps", hvp="mixed")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"`hvp='forward'` needs memory=\"steps\" or Revolve\(snapshots\), got "
        r"memory=\"full\"",
    ):
        mo.Backprop(hvp="forward")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("options", [{"microbatches": 2}, {"hvp": "forward"}], ids=str)
def test_compiled_pieces_equal_the_eager_ones(options: dict[str, Any]) -> None:
    """With dropout.

    The gradient is evaluated twice on the way back, and must draw the same numbers both times.
    """
    net = mo.functional(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)).double()
    )
    x, y = torch.randn(3, 4, 3, requires_grad=True), torch.randn(3, 4, 1)

    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(net(params, batch[0]), batch[1])

    def gradient(compile: bool) -> Tensor:
        torch.manual_seed(1)
        rule = mo.Backprop("steps", **options)
        out = mo.minimize(
            loss, Adam(0.1, eps=1e-2), net.params, (x, y), differentiate=rule, compile=compile
        )
        return torch.autograd.grad(out.losses.square().sum(), x)[0]

    assert_close(gradient(True), gradient(False), 1e-12)

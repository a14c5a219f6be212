"""`fused_norms`: torch's kernels with derivatives of every order, against the norm written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor
from torch.autograd import forward_ad

from metaopt.exact_ops import any_order

Given = tuple[Tensor, Tensor | None, Tensor | None]
SHAPES = {"batch": (6, 4), "batch-2d": (3, 4, 2, 2), "layer": (3, 4), "layer-two-axes": (3, 2, 4)}
EPS = {"batch": 0.1, "batch-2d": 1e-5, "layer": 0.1, "layer-two-axes": 1e-5}
each_kind = pytest.mark.parametrize("kind", SHAPES)


def fused(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    with any_order():
        if kind.startswith("batch"):
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS[kind])
        return F.layer_norm(x, x.shape[1:], weight, bias, EPS[kind])


def written_out(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    batch = kind.startswith("batch")
    over, shape = (
        ((0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2)))
        if batch
        else (tuple(range(1, x.ndim)), x.shape[1:])
    )
    h = (x - x.mean(over, keepdim=True)) / (
        x.var(over, unbiased=False, keepdim=True) + EPS[kind]
    ).sqrt()
    h = h if weight is None else h * weight.reshape(shape)
    return h if bias is None else h + bias.reshape(shape)


def given(kind: str, *, affine: bool = True, seed: int = 0) -> Given:
    generator = torch.Generator().manual_seed(seed)
    shape = (4,) if kind.startswith("batch") else SHAPES[kind][1:]
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in (SHAPES[kind], shape, shape)
    )
    return (x, weight, bias) if affine else (x, None, None)


def towers(norm: object, kind: str, at: Given, wanted: list[Tensor], order: int) -> list[Tensor]:
    """Return the gradients of a scalar of the norm, of a scalar of these gradients, and so on."""
    x, weight, bias = at
    value, found = norm(kind, x.sin(), weight, bias), []  # type: ignore[operator]
    for n in range(order):
        scalar = torch.zeros(())
        for leaf in found[-len(wanted) :] if found else [value]:
            slopes = torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
            scalar = scalar + ((leaf + n) * slopes).sin().sum()
        found += torch.autograd.grad(
            scalar, wanted, create_graph=n + 1 < order, materialize_grads=True
        )
    return found


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("affine", [True, False])
@each_kind
def test_mixed_derivatives_of_every_order_are_those_of_the_norm_written_out(
    kind: str, affine: bool, order: int
) -> None:
    """In input, weight and bias at once.

    The last order is by the kernels, those before by elementary operations.
    """
    at = given(kind, affine=affine)
    wanted = [leaf for leaf in at if leaf is not None]
    for one, other in zip(
        towers(fused, kind, at, wanted, order),
        towers(written_out, kind, at, wanted, order),
        strict=True,
    ):
        assert_close(one, other, 1e-10)  # rounding, times derivatives that grow to 1e3


@each_kind
def test_numerical_derivatives(kind: str) -> None:
    at = given(kind)
    assert torch.autograd.gradcheck(lambda *leaves: fused(kind, *leaves), at)
    assert torch.autograd.gradgradcheck(lambda *leaves: fused(kind, *leaves), at)


@pytest.mark.parametrize(
    "learned",
    [(True, False, False), (False, True, False), (False, False, True), (False, True, True)],
)
@each_kind
def test_what_is_not_learned_receives_nothing_and_changes_nothing(
    kind: str, learned: tuple[bool, ...]
) -> None:
    at = tuple(
        leaf.detach().requires_grad_(is_learned)
        for leaf, is_learned in zip(given(kind), learned, strict=True)
    )
    wanted = [leaf for leaf, is_learned in zip(at, learned, strict=True) if is_learned]
    for one, other in zip(
        towers(fused, kind, at, wanted, 3), towers(written_out, kind, at, wanted, 3), strict=True
    ):
        assert_close(one, other, 1e-10)


@pytest.mark.parametrize("without", [1, 2])
@each_kind
def test_a_weight_without_a_bias_and_a_bias_without_a_weight(kind: str, without: int) -> None:
    at = tuple(None if place == without else leaf for place, leaf in enumerate(given(kind)))
    wanted = [leaf for leaf in at if leaf is not None]
    for one, other in zip(
        towers(fused, kind, at, wanted, 3), towers(written_out, kind, at, wanted, 3), strict=True
    ):
        assert_close(one, other, 1e-10)


@each_kind
def test_cotangents_in_a_batch(kind: str) -> None:
    """The backward pass then runs under `vmap`, of what was computed outside."""
    x, weight, bias = at = given(kind)
    rows = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    y = fused(kind, *at)
    (at_once,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    assert_close(
        at_once,
        torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in rows]),
        1e-13,
    )
    (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (hessian,) = torch.autograd.grad(first, x, rows, is_grads_batched=True)
    expected = torch.func.hessian(lambda x: written_out(kind, x, weight, bias).sin().sum())(
        x.detach()
    )
    assert_close(hessian.view_as(expected), expected, 1e-10)


@each_kind
def test_a_transform_that_begins_after_the_forward_pass(kind: str) -> None:
    at = given(kind)
    y, c = fused(kind, *at), torch.randn(SHAPES[kind], dtype=torch.float64)

    def of_backward(c: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.autograd.grad(y, at, c, create_graph=True))  # type: ignore[return-value]

    expected = c.clone().requires_grad_()
    found = torch.func.grad(of_backward)(c)
    y = written_out(kind, *at)
    assert_close(found, torch.autograd.grad(of_backward(expected), expected)[0], 1e-12)


@each_kind
def test_forward_mode_by_hand(kind: str) -> None:
    """`torch.func.jvp` is a transform; dual numbers made by hand are not."""
    x, weight, bias = (leaf.detach() for leaf in given(kind))
    _, expected = torch.func.jvp(lambda x: written_out(kind, x, weight, bias), (x,), (x.cos(),))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(
            fused(kind, forward_ad.make_dual(x, x.cos()), weight, bias)
        ).tangent
    assert_close(found, expected, 1e-12)


@each_kind
def test_the_kernels_are_used_where_they_can_be(kind: str) -> None:
    x, weight, bias = at = given(kind)
    assert fused(kind, *at).grad_fn.name() == "_NormBackward"
    empty = x[:0] if kind.startswith("layer") else None
    others = [
        (x.half(), weight.half(), bias.half()),
        *([(empty, weight, bias)] if empty is not None else []),
    ]
    assert all(fused(kind, *other).grad_fn.name() != "_NormBackward" for other in others)


@pytest.mark.parametrize("kind", ["batch", "batch-2d"])
def test_parameters_of_a_wrong_size_are_an_error(kind: str) -> None:
    """The kernel would read behind their end."""
    x, weight, bias = given(kind)
    with pytest.raises(RuntimeError, match="shape"):
        fused(kind, x, weight[:3], bias)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_second_derivatives_in_float32_and_either_layout(layout: torch.memory_format) -> None:
    """The two functions differ in rounding.

    That is 1e-7, times the 1 / std = 3 of a layer's input, cubed, and sums over 400 numbers.
    """
    x, weight, bias = torch.randn(4, 8, 10, 10) / 3, torch.randn(8), torch.randn(8)

    def product(norm: object, dtype: torch.dtype) -> Tensor:
        at = x.to(dtype=dtype, memory_format=layout).requires_grad_()
        value = norm("batch-2d", at, weight.to(dtype), bias.to(dtype)).sin().square().sum()  # type: ignore[operator]
        (first,) = torch.autograd.grad(value, at, create_graph=True)
        return torch.autograd.grad(
            (first * torch.linspace(-1, 1, x.numel(), dtype=dtype).view(x.shape)).sum(), at
        )[0]

    found, expected = product(fused, torch.float32), product(written_out, torch.float64)
    assert found.is_contiguous(memory_format=layout)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_an_inplace_activation_after_the_norm() -> None:
    x, weight, bias = given("batch-2d")
    grads = [
        torch.autograd.grad(
            F.relu(norm("batch-2d", x, weight, bias), inplace=True).square().sum(), (x, weight)
        )
        for norm in (fused, written_out)
    ]
    assert_close(*grads, 1e-12)

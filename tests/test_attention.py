"""Attention in the inner loss: equal to torch's in all its forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt import tree
from metaopt.exact_ops import any_order, attention

MASK = torch.tensor(
    [[True, False, True, False], [False, False, False, False], [True, True, True, True]]
)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "mask": {"attn_mask": MASK},  # the second query may attend to nothing
    "bias": {"attn_mask": torch.where(MASK, 0.5, -torch.inf)},
    "dropout": {"dropout_p": 0.4},
    "grouped": {"enable_gqa": True},
}


def tensors(form: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads = 2 if form == "grouped" else 4
    return (
        torch.randn(2, 4, 3, 6, dtype=dtype),
        torch.randn(2, heads, 4, 6, dtype=dtype),
        torch.randn(2, heads, 4, 5, dtype=dtype),
    )


def options(form: str, dtype: torch.dtype) -> dict[str, Any]:
    return {key: value.to(dtype) if form == "bias" else value for key, value in FORMS[form].items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_values_are_torchs(form: str, dtype: torch.dtype) -> None:
    arguments, given = tensors(form, dtype), options(form, dtype)
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*arguments, **given)
    torch.manual_seed(1)
    with any_order():
        found = F.scaled_dot_product_attention(*arguments, **given)
    assert found.dtype == expected.dtype
    assert_close(found, expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", FORMS)
def test_two_derivatives_are_those_of_torchs_plain_kernel(form: str) -> None:
    given = options(form, torch.float64)

    def derivatives() -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in tensors(form, torch.float64)]
        value = F.scaled_dot_product_attention(*leaves, **given).sin().sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)]

    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives()
    with any_order():
        found = derivatives()
    assert all(x.isfinite().all() for x in found)
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["", "causal", "padding", "both"])
@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention(training: bool, masked: str, need_weights: bool) -> None:
    """In evaluation mode too, where torch has a fused path of its own."""
    layer = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True, dtype=torch.float64).train(
        training
    )
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    given: dict[str, Any] = {"need_weights": need_weights}
    if masked in ("causal", "both"):
        given |= {"attn_mask": causal, "is_causal": masked == "causal"}
    if masked in ("padding", "both"):
        given |= {"key_padding_mask": torch.tensor([[False, False, True], [False, True, True]])}
    torch.manual_seed(1)
    expected = layer(x, x, x, **given)
    torch.manual_seed(1)
    with any_order():
        found = layer(x, x, x, **given)
    assert_close(found[0], expected[0], 1e-13)
    assert (found[1] is None) == (expected[1] is None)


def test_causal_with_a_mask_is_torchs_error() -> None:
    x = torch.ones(1, 2, 2)
    with (
        any_order(),
        pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal"),
    ):
        F.scaled_dot_product_attention(x, x, x, torch.ones(2, 2), is_causal=True)


def test_a_compiler_sees_through_it() -> None:
    """This backend needs no C++ compiler."""
    layer, x = (
        nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64),
        torch.randn(2, 3, 4, dtype=torch.float64),
    )

    def gradient(x: Tensor) -> Tensor:
        with any_order():
            return grad(lambda x: layer(x, x, x, need_weights=False)[0].sin().sum())(x)

    assert_close(torch.compile(gradient, fullgraph=True, backend="eager")(x), gradient(x), 1e-13)


# In parts: long sequences, whose scores are never there as a whole


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries at a time, of three."""
    monkeypatch.setattr(attention, "LONG", 1)
    monkeypatch.setattr(attention, "ROWS", 2)


PARTS = [form for form in FORMS if form != "dropout"]


def derivatives_of_three_orders(form: str, moving: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    torch.manual_seed(0)
    given, found = options(form, torch.float64), []
    leaves = list(tensors(form, torch.float64))
    variables = [leaves[i].requires_grad_() for i in moving]
    if form == "bias":
        variables.append(given["attn_mask"].requires_grad_())
    value = F.scaled_dot_product_attention(*leaves, **given).sin().sum()
    for order in range(3):
        slopes = torch.autograd.grad(value, variables, create_graph=order < 2)
        found += slopes
        value = sum((s.nan_to_num() + 0.3).square().sum() for s in slopes)
    return found


@pytest.mark.parametrize("moving", [(0, 1, 2), (1,)], ids=["all", "keys"])
@pytest.mark.parametrize("form", PARTS)
def test_three_derivatives_in_parts(
    form: str, moving: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    with any_order():
        expected = derivatives_of_three_orders(form, moving)
        request.getfixturevalue("in_parts")
        found = derivatives_of_three_orders(form, moving)
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("form", PARTS)
def test_transforms_in_parts(form: str, request: Any) -> None:
    """Of reverse over reverse, forward over reverse and forward over forward, in a batch."""
    query, *others = tensors(form, torch.float64)
    given = options(form, torch.float64)

    def value(query: Tensor) -> Tensor:
        with any_order():
            return F.scaled_dot_product_attention(query, *others, **given).sin().sum()

    def derivatives() -> list[Tensor]:
        point = query[:, :1] if form != "grouped" else query
        batch = torch.stack([point, 2 * point])
        return [
            vmap(grad(lambda x: grad(value)(x).square().sum()))(batch),
            hessian(value)(point),
            jacfwd(jacfwd(value))(point),
        ]

    expected = derivatives()
    request.getfixturevalue("in_parts")
    assert_close(derivatives(), expected, 1e-12)


@pytest.mark.usefixtures("in_parts")
def test_dual_numbers_take_the_whole() -> None:
    """`torch.func.jvp`, by which parts have tangents, does not nest in them."""
    query, key, value = tensors("plain", torch.float64)

    def attend(query: Tensor) -> Tensor:
        with any_order():
            return F.scaled_dot_product_attention(query, key, value)

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(attend(forward_ad.make_dual(query, query))).tangent
    assert_close(found, jvp(attend, (query,), (query,))[1], 1e-14)


def test_more_queries_than_keys_in_parts(request: Any) -> None:
    query, key = torch.randn(2, 5, 4), torch.randn(2, 3, 4)

    def attend() -> Tensor:
        with any_order():
            return F.scaled_dot_product_attention(query, key, key, is_causal=True)

    expected = attend()
    request.getfixturevalue("in_parts")
    assert_close(attend(), expected, 1e-6)


def test_a_backward_pass_computes_in_the_autocast_of_the_forward_pass(request: Any) -> None:
    """It runs outside of it; the recomputed part would be another function's."""

    def slopes() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in tensors("plain", torch.float32)]
        with any_order(), torch.autocast("cpu", torch.bfloat16):
            value = F.scaled_dot_product_attention(*leaves).float().sin().sum()
        return torch.autograd.grad(value, leaves[:1])  # sums of the others are rounded otherwise

    expected = slopes()
    request.getfixturevalue("in_parts")
    assert_close([*slopes()], [*expected], 1e-6)


def test_scores_of_a_long_sequence_are_never_whole() -> None:
    """No tensor of a double backward pass is as large as they are."""

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree.leaves(result):
                if isinstance(leaf, Tensor):
                    self.entries = max(self.entries, leaf.numel())
            return result

    leaves = [torch.randn(1, 1024, 2, requires_grad=True) for _ in range(3)]
    with any_order(), Largest() as largest:
        value = F.scaled_dot_product_attention(*leaves).sin().sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)
    assert largest.entries == 128 * 1024

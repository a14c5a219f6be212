"""`any_order`: norm layers and attention, equal to torch's and differentiable at every order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch_versions import is_mended

import metaopt as mo
from metaopt.exact_ops import any_order
from optimizers import SGD

WEIGHT, BIAS = torch.linspace(0.5, 1.5, 4).double(), torch.linspace(-1, 1, 4).double()

LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "layer": (lambda x: F.layer_norm(x, (4,), WEIGHT, BIAS), (3, 4)),
    "layer-two-axes": (lambda x: F.layer_norm(x, (2, 4), eps=0.1), (3, 2, 4)),
    "layer-weight-only": (lambda x: F.layer_norm(x, [4], weight=WEIGHT), (3, 4)),
    "batch": (lambda x: F.batch_norm(x, None, None, WEIGHT, BIAS, training=True), (5, 4)),
    "batch-2d": (
        lambda x: F.batch_norm(x, None, None, WEIGHT, training=True, eps=0.1),
        (2, 4, 2, 2),
    ),
    "batch-eval": (lambda x: F.batch_norm(x, BIAS, WEIGHT, WEIGHT, BIAS), (5, 4)),
    "instance": (lambda x: F.instance_norm(x, weight=WEIGHT, bias=BIAS), (2, 4, 3)),
    "instance-eval": (lambda x: F.instance_norm(x, BIAS, WEIGHT, use_input_stats=False), (2, 4, 3)),
    "group": (lambda x: F.group_norm(x, 2, WEIGHT, BIAS), (3, 4)),
    "torch.layer": (lambda x: torch.layer_norm(x, [4], WEIGHT, BIAS), (3, 4)),
    "torch.batch-by-name": (
        lambda x: torch.batch_norm(
            input=x,
            weight=WEIGHT,
            bias=BIAS,
            running_mean=None,
            running_var=None,
            training=True,
            momentum=0.1,
            eps=1e-5,
            cudnn_enabled=False,
        ),
        (5, 4),
    ),
    "torch.batch": (
        lambda x: torch.batch_norm(x, WEIGHT, BIAS, None, None, True, 0.1, 1e-5, False),
        (5, 4),
    ),
    "torch.instance": (
        lambda x: torch.instance_norm(x, WEIGHT, BIAS, None, None, True, 0.1, 1e-5, False),
        (2, 4, 3),
    ),
    "weight": (lambda x: torch._weight_norm(x, 1.5 + x[:, :1].sin(), 0), (3, 4)),
    "weight-last": (lambda x: torch._weight_norm(x, 1.5 + x[:1].sin(), 1), (3, 4)),
    "weight-whole": (lambda x: torch._weight_norm(x, x[0, 0].exp(), -1), (3, 4)),
    "rms": (lambda x: F.rms_norm(x, (4,), WEIGHT), (3, 4)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, 2 * x, x.sin()), (1, 3, 4)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
FUSED = ["layer", "layer-two-axes", "layer-weight-only", "batch", "batch-2d", "instance"]


def directional(name: str, order: int, inside: bool = True) -> tuple[Tensor, Tensor]:
    """Return a derivative along a line, by autograd and by a central difference.

    The difference is of derivatives of the order below.
    """
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x, v, w = torch.randn(3, *shape, dtype=torch.float64)

    def derivative(t: Tensor, order: int) -> Tensor:
        t = t.detach().requires_grad_()
        # a curve, so that affine layers have every derivative
        value = (layer(x + torch.sin(t) * v) * w).sum()
        for _ in range(order):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        return value.detach()

    def both() -> tuple[Tensor, Tensor]:
        h, zero = 1e-5, torch.zeros((), dtype=torch.float64)
        return derivative(zero, order), (
            derivative(zero + h, order - 1) - derivative(zero - h, order - 1)
        ) / (2 * h)

    if not inside:
        return both()
    with any_order():
        return both()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@each_layer
def test_derivatives_of_every_order(name: str, order: int) -> None:
    exact, difference = directional(name, order)
    # the difference errs by h^2 = 1e-10 times two orders more, some 1e3
    assert_close(exact, difference, 1e-6)


@pytest.mark.parametrize("name", FUSED)
def test_the_third_derivative_of_fused_norms_is_still_wrong_in_torch(name: str) -> None:
    """The cause of trap 1 and the reason for `any_order`.

    If this fails, torch has mended it: simplify `metaopt/exact_ops`.
    """
    assert_close(*directional(name, 2, inside=False), 1e-6)
    if not name.startswith("layer") and is_mended(
        "the third derivative of batch and instance norm is wrong"
    ):
        with pytest.raises(
            RuntimeError, match=r"batch_norm does not support 3rd\+ order derivatives"
        ):
            directional(name, 3, inside=False)
        return
    wrong, difference = directional(name, 3, inside=False)
    assert (wrong - difference).abs() > 1e-3 * (1 + difference.abs())


def test_the_second_derivative_of_weight_norm_is_still_wrong_in_torch() -> None:
    """If this fails, torch has mended it: take `_weight_norm` out of `metaopt/exact_ops`."""
    assert_close(*directional("weight", 1, inside=False), 1e-6)
    wrong, difference = directional("weight", 2, inside=False)
    assert (wrong - difference).abs() > 1e-3 * (1 + difference.abs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@each_layer
def test_values_and_dtypes_are_torchs(name: str, dtype: torch.dtype) -> None:
    layer, shape = LAYERS[name]
    if name == "attention" or dtype == torch.float64:
        x = torch.randn(shape, dtype=torch.float64)
    else:
        x = torch.randn(shape).to(dtype)
        weight, bias = WEIGHT.to(dtype), BIAS.to(dtype)
        layer = {
            "layer": lambda x: F.layer_norm(x, (4,), weight, bias),
            "batch": lambda x: F.batch_norm(x, None, None, weight, bias, training=True),
            "instance": lambda x: F.instance_norm(x, weight=weight, bias=bias),
        }.get(name, lambda x: F.layer_norm(x, x.shape[1:]))
    expected = layer(x)
    with any_order():
        found = layer(x)
    assert found.dtype == expected.dtype
    assert_close(found, expected, 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, momentum=None),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ],
    ids=repr,
)
def test_running_statistics_are_updated_as_by_torch(layer: nn.Module) -> None:
    layer.double()
    x, twin = (
        torch.randn(5, 4, 3, dtype=torch.float64),
        type(layer)(4, momentum=layer.momentum, track_running_stats=True).double(),
    )
    for _ in range(2):
        expected = twin(x)
        with any_order():
            assert_close(layer(x), expected, 1e-14)
    assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()), 1e-14)


def test_a_single_value_per_channel_is_torchs_error() -> None:
    with any_order():
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm1d(2)(torch.ones(1, 2))
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            nn.InstanceNorm1d(2)(torch.ones(3, 2, 1))


def test_entering_it_again_adds_nothing_except_where_torch_has_left_it() -> None:
    """Torch takes a mode off its stack for the time of a backward pass.

    A step that runs again there needs it again.
    """
    depths: list[int] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            depths.append(len(_get_current_function_mode_stack()))
            with any_order():
                depths.append(len(_get_current_function_mode_stack()))
            return grad

    with any_order():
        with any_order():
            assert len(_get_current_function_mode_stack()) == 1
        assert len(_get_current_function_mode_stack()) == 1
        Probe.apply(torch.ones((), requires_grad=True)).backward()
    assert depths == [0, 1]
    assert not _get_current_function_mode_stack()


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout in place": lambda x: F.dropout(
        x.transpose(0, 1).clone().transpose(0, 1), 0.4, inplace=True
    ),
    "torch.dropout": lambda x: torch.dropout(x, 0.4, True),
    "dropout1d": lambda x: F.dropout1d(x, 0.4),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.4, True),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.4, True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel softmax": lambda x: F.gumbel_softmax(x, dim=-1),
    "noise": lambda x: x + torch.randn_like(x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
}


@pytest.mark.parametrize("name", RANDOM)
def test_plain_autograd_and_torch_func_draw_the_same_numbers(name: str) -> None:
    """A step may run first in one and then in the other.

    torch's own dropout then draws other masks for what is transposed.
    """
    x = torch.randn(4, 3, 5).transpose(0, 1)

    def value(x: Tensor) -> Tensor:
        with any_order():
            torch.manual_seed(0)
            return RANDOM[name](x).square().sum()

    w = x.detach().requires_grad_()
    (plain,) = torch.autograd.grad(value(w), w)
    assert_close(torch.func.grad(value)(x), plain, 1e-12)
    assert (plain != 0).any()


@pytest.mark.parametrize("form", ["method", "attribute"])
def test_a_hook_that_marks_activations_does_no_harm_inside_a_transform(form: str) -> None:
    """Hugging Face leaves one after `gradient_checkpointing_enable(); ..._disable()`.

    Under `vmap` it was torch's error.
    """

    def mark(module: nn.Module, _: Any, output: Tensor) -> None:
        if form == "method":
            output.requires_grad_(True)
        elif output.is_leaf:
            output.requires_grad = True

    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 1))
    net = mo.functional(model)
    tasks = torch.tensor([[0, 1, 2], [2, 2, 4]])

    def task_loss(params: Any, tokens: Tensor) -> Tensor:
        def loss(params: Any, tokens: Tensor) -> Tensor:
            return net(params, tokens).square().mean()

        return loss(mo.minimize(loss, SGD(0.1), params, tokens, steps=2).params, tokens)

    expected = mo.meta_grad(task_loss, chunk_size=2)(net.params, tasks)[0]
    model[0].register_forward_hook(mark)
    found = mo.meta_grad(task_loss, chunk_size=2)(net.params, tasks)[0]
    assert_close(found, expected, 1e-14)
    assert all(grad.abs().sum() > 0 for grad in found.values())


def test_marking_is_torchs_where_torch_allows_it() -> None:
    with any_order():
        x = torch.ones(2)
        assert x.requires_grad_() is x
        assert x.requires_grad
        assert not x.requires_grad_(False).requires_grad
        with pytest.raises(RuntimeError, match="only Tensors of floating point"):
            torch.ones(2, dtype=torch.int64).requires_grad_()
        assert (torch.func.grad(lambda x: (x.requires_grad_() ** 2).sum())(x) == 2).all()

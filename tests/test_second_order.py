"""`check_second_order`: what it lets pass, and what it names."""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_versions import is_mended

import metaopt as mo


class Apply(nn.Module):
    """A function of the activations, as a submodule."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class First(nn.Module):
    """The first of a recurrent layer's results."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def network(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Sequential(Apply(function), nn.Linear(4, 2))
    )


class Once(torch.autograd.Function):
    """x^3, with a derivative that is a constant for the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


FINE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (5, 3)),
    "relu": (lambda: nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 2)), (5, 3)),
    "relu-at-its-kink": (
        lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)),
        (0, 3),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 2),
        ),
        (4, 2, 6, 6),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)),
        (5, 3),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
    "transformer-eval": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        (2, 3, 4),
    ),
    "lstm": (lambda: First(nn.LSTM(3, 4, num_layers=2)), (5, 2, 3)),
    "weight-norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (5, 3)),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_right_passes_and_nothing_is_changed(name: str) -> None:
    build, shape = FINE[name]
    model, x = build(), torch.randn(shape) if shape[0] else torch.zeros(5, 3)
    before = {key: (value.clone(), value.dtype) for key, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    mo.check_second_order(model, x)
    with torch.no_grad():
        mo.check_second_order(model, x)
    after = model.state_dict()
    assert all(
        torch.equal(after[key], value) and after[key].dtype == dtype
        for key, (value, dtype) in before.items()
    )
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def bag(x: Tensor) -> Tensor:
    return F.embedding_bag(torch.arange(len(x)), x.tanh(), torch.arange(len(x)))


ONCE: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.nn.functional.embedding_bag": bag,
    "torch.functional.cdist": lambda x: torch.cdist(x, 2 * x[:4] + 1),
    "torch.nn.functional.pdist": lambda x: F.pdist(x)[:4].expand(5, 4),
    "torch.nn.functional.multi_margin_loss": lambda x: (
        x * F.multi_margin_loss(x, torch.zeros(5, dtype=torch.int64))
    ),
    "torch.nn.functional.ctc_loss": lambda x: (
        x * F.ctc_loss(x[:, None].log_softmax(-1), torch.ones(1, 2, dtype=torch.int64), (5,), (2,))
    ),
}


MENDED = {name for name in ("cdist", "pdist") if is_mended(f"{name} has no second derivative")}


@pytest.mark.parametrize("name", ONCE)
def test_it_names_operator_and_submodule(name: str) -> None:
    if name.split(".")[-1] in MENDED:
        mo.check_second_order(network(ONCE[name]), torch.randn(5, 3))
        return
    with pytest.raises(
        ValueError, match=rf"twice: `{re.escape(name)}` in submodule '2\.0': .*not implemented"
    ) as caught:
        mo.check_second_order(network(ONCE[name]), torch.randn(5, 3))
    assert str(caught.value).count("submodule") == 1  # nothing else is blamed


def test_each_of_several_is_named() -> None:
    model = nn.Sequential(network(bag), Apply(ONCE["torch.nn.functional.multi_margin_loss"]))
    with pytest.raises(
        ValueError, match=r"bag` in submodule '0\.2\.0'.*multi_margin_loss` in submodule '1'"
    ):
        mo.check_second_order(model, torch.randn(5, 3))


def test_a_wrong_second_derivative_is_found() -> None:
    """Torch's own weight norm, which `any_order` replaces under its usual name.

    Reached here by another.
    """

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.g = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.rand(3, 1) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ops.aten._weight_norm_interface(self.v, self.g, 0)[0].tanh().T

    with pytest.raises(
        ValueError,
        match=r"_weight_norm_interface.*: its second derivative is off by .* of its size",
    ):
        mo.check_second_order(nn.Sequential(Weight()), torch.randn(5, 4))


@pytest.mark.parametrize(
    "function", [Once.apply, lambda x: x * x.detach()], ids=["once-differentiable", "detach"]
)
def test_a_second_derivative_that_is_silently_missing_is_found(
    function: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(ValueError, match=r"the loss: .*an autograd\.Function or a `detach`"):
        mo.check_second_order(network(function), torch.randn(5, 3))


def test_constants_inside_the_forward_count_as_missing() -> None:
    """Spectral norm takes its singular vectors for constants.

    The second derivative lacks their part.
    """
    with pytest.raises(ValueError, match=r"the loss: .*an autograd\.Function or a `detach`"):
        mo.check_second_order(
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), torch.randn(5, 3)
        )


def test_a_root_at_zero() -> None:
    with pytest.raises(
        ValueError,
        match=r"`torch\.Tensor\.sqrt` in submodule '2\.0': its second derivative is not finite",
    ):
        mo.check_second_order(network(lambda x: (x - x).sqrt()), torch.randn(5, 3))


def test_a_loss_of_ones_own_and_several_arguments() -> None:
    model, x, y = nn.Bilinear(3, 3, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    mo.check_second_order(model, (x, x))
    mo.check_second_order(
        model, (x, y), lambda model, batch: F.cross_entropy(model(batch[0], batch[0]), batch[1])
    )
    with pytest.raises(ValueError, match="multi_margin_loss"):
        mo.check_second_order(
            model,
            (x, y),
            lambda model, batch: F.multi_margin_loss(model(batch[0], batch[0]), batch[1]),
        )


class ByName(nn.Module):
    """As Hugging Face's models are called, and as their outputs are."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.net = nn.Embedding(5, 3), network(function)

    def forward(self, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(self.embed(input_ids) * mask[:, None])}


@pytest.mark.parametrize(
    "kind",
    [dict, UserDict, lambda batch: list(batch.values()), lambda batch: tuple(batch.values())],
)
def test_a_batch_may_be_arguments_by_name_or_a_list(
    kind: Callable[[dict[str, Tensor]], Any],
) -> None:
    """A dict was an AttributeError; a tokenizer gives a `UserDict`, a `DataLoader` a list."""
    batch = kind({"input_ids": torch.tensor([0, 2, 2]), "mask": torch.ones(3)})
    mo.check_second_order(ByName(torch.tanh), batch)
    with pytest.raises(ValueError, match=r"multi_margin_loss` in submodule 'net\.2\.0'"):
        mo.check_second_order(
            ByName(lambda x: x + F.multi_margin_loss(x, torch.tensor([0, 1, 2]))), batch
        )


def test_a_model_must_return_a_number_that_can_be_differentiated() -> None:
    with pytest.raises(
        ValueError,
        match=r"must return a floating-point tensor, or a tree of some, got Tensor. Give `loss_fn",
    ):
        mo.check_second_order(
            network(lambda x: x.tanh()).append(Apply(lambda x: x.argmax())), torch.randn(5, 3)
        )


def test_a_model_must_have_something_to_learn_and_its_own_errors_come_through() -> None:
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        mo.check_second_order(nn.Tanh(), torch.ones(2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mo.check_second_order(nn.Linear(3, 2), torch.ones(5, 4))

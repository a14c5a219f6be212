"""Recurrent layers in the inner loss.

Equal to torch's, differentiable at every order, and batched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import metaopt as mo
from metaopt import tree
from metaopt.exact_ops import any_order
from optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm-all": lambda: nn.LSTM(
        3, 4, num_layers=2, bidirectional=True, batch_first=True, proj_size=2
    ),
    "lstm-projected-unbiased": lambda: nn.LSTM(3, 4, bias=False, proj_size=2),
    "gru": lambda: nn.GRU(3, 4),
    "gru-all": lambda: nn.GRU(3, 4, num_layers=3, bidirectional=True, batch_first=True, bias=False),
    "rnn": lambda: nn.RNN(3, 4, num_layers=2),
    "rnn-relu": lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTMCell(3, 4),
    "lstm-unbiased": lambda: nn.LSTMCell(3, 4, bias=False),
    "gru": lambda: nn.GRUCell(3, 4),
    "rnn": lambda: nn.RNNCell(3, 4),
    "rnn-relu": lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def initial(layer: Any, batch: int) -> Any:
    """Return initial states that are not zero."""
    runs = layer.num_layers * (1 + layer.bidirectional)
    hidden = torch.randn(runs, batch, layer.proj_size or layer.hidden_size)
    return (
        (hidden, torch.randn(runs, batch, layer.hidden_size))
        if isinstance(layer, nn.LSTM)
        else hidden
    )


def total(tensors: Any) -> Tensor:
    """Return a number in which every entry has a weight and curvature of its own."""
    leaves = [
        leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in tree.leaves(tensors)
    ]
    return sum(
        ((leaf + leaf**2) * torch.linspace(0.5, 1.5, leaf.numel()).reshape(leaf.shape)).sum()
        for leaf in leaves
    )


def inputs(layer: Any, kind: str) -> tuple[Any, Any]:
    """Return (what the layer is called with, initial states)."""
    if kind == "packed":
        sequences = [torch.randn(length, 3) for length in (2, 5, 3, 5)]
        return pack_sequence(sequences, enforce_sorted=False), initial(layer, 4)
    if kind == "unbatched":
        return torch.randn(5, 3), None
    return torch.randn(5, 2, 3), initial(layer, 5 if layer.batch_first else 2)


@pytest.mark.parametrize("kind", ["batch", "packed", "unbatched"])
@each_layer
def test_values_and_two_derivatives_are_torchs(name: str, kind: str) -> None:
    """On CPU, in float64, torch's own kernels are made of differentiable pieces.

    A witness for the first two derivatives.
    """
    layer = LAYERS[name]()
    x, states = inputs(layer, kind)
    params = list(layer.parameters())

    def derivatives() -> tuple[Any, ...]:
        out = layer(x, states)
        value = total(out)
        first = torch.autograd.grad(value, params, create_graph=True)
        second = torch.autograd.grad(total(first), params)
        return out, first, second

    expected = derivatives()
    with any_order():
        found = derivatives()
    for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        # some 1e3 additions of rounding 1e-16, times 1e2
        assert_close(getattr(a, "data", a), getattr(b, "data", b), 1e-11)


def lstm_by_hand(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """One LSTM layer of 4 units with gates written out one by one; x is [time, batch, 3]."""
    h = c = torch.zeros(x.shape[1], 4)
    outputs = []
    for row in x:
        gates = (
            row @ p["weight_ih_l0"].T + p["bias_ih_l0"] + h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
        )
        i, f, g, o = (gates[:, 4 * k : 4 * k + 4] for k in range(4))
        c = 1 / (1 + torch.exp(-f)) * c + 1 / (1 + torch.exp(-i)) * torch.tanh(g)
        h = 1 / (1 + torch.exp(-o)) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs)


def gru_by_hand(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h, outputs = torch.zeros(x.shape[1], 4), []
    for row in x:
        a, b = (
            row @ p["weight_ih_l0"].T + p["bias_ih_l0"],
            h @ p["weight_hh_l0"].T + p["bias_hh_l0"],
        )
        r, z = 1 / (1 + torch.exp(-(a + b)[:, :4])), 1 / (1 + torch.exp(-(a + b)[:, 4:8]))
        h = (1 - z) * torch.tanh(a[:, 8:] + r * b[:, 8:]) + z * h
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize(("name", "by_hand"), [("lstm", lstm_by_hand), ("gru", gru_by_hand)])
def test_three_derivatives_are_those_of_the_equations(
    name: str, by_hand: Callable[..., Tensor]
) -> None:
    layer, x = LAYERS[name](), torch.randn(3, 2, 3)
    params = {key: p.detach() for key, p in layer.named_parameters()}
    direction = {key: torch.randn_like(p) for key, p in params.items()}

    def third(output: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor]:
        def along(t: Tensor) -> Tensor:
            return total(output({key: p + t * direction[key] for key, p in params.items()}))

        found, derivative = [], along
        for _ in range(3):
            derivative = grad(derivative)
            found.append(derivative(torch.zeros(())))
        return found

    with any_order():
        found = third(lambda p: functional_call(layer, p, (x,))[0])
    assert_close(found, third(lambda p: by_hand(p, x)), 1e-10)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    cell, x = CELLS[name](), torch.randn(2, 3)
    hidden = torch.randn(2, 2, 4)
    states = (hidden[0], hidden[1]) if isinstance(cell, nn.LSTMCell) else hidden[0]
    expected = cell(x, states)
    with any_order():
        assert_close(cell(x, states), expected, 1e-14)
        assert_close(cell(x[0], tree.index(states, 0)), tree.index(expected, 0), 1e-14)


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_draws_torchs_masks(build: type[nn.RNNBase]) -> None:
    layer, x = build(3, 4, num_layers=3, dropout=0.5), torch.randn(5, 2, 3)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    with any_order():
        assert_close(layer(x), expected, 1e-13)
    layer.eval()
    expected = layer(x)
    with any_order():
        assert_close(layer(x), expected, 1e-13)


class Tagger(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(2, 3), layer, nn.LazyLinear(1)
        self(torch.randn(5, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x))[0])


@pytest.mark.parametrize(
    "rule",
    [mo.Backprop(), mo.Backprop("steps"), mo.FirstOrder()],
    ids=["full", "steps", "first-order"],
)
@each_layer
def test_meta_gradients_under_vmap_equal_a_hand_written_loop(name: str, rule: Any) -> None:
    model = Tagger(LAYERS[name]())
    net = mo.functional(model)
    tasks = torch.randn(3, 2, 5, 2, 2)  # tasks, support and query, time, batch, features

    def loss_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (net(p, x) - x.sum(-1, keepdim=True)).square().mean()

    def task_loss(p: dict[str, Tensor], task: Tensor) -> Tensor:
        return loss_fn(
            mo.minimize(loss_fn, SGD(lr=0.3), p, task[0], steps=2, differentiate=rule).params,
            task[1],
        )

    grads, losses = mo.meta_grad(task_loss)(net.params, tasks)

    twin = copy.deepcopy(model)
    params = dict(twin.named_parameters())
    expected_losses = []
    for task in tasks:
        at = params
        for _ in range(2):
            inner = (
                (functional_call(twin, at, (task[0],)) - task[0].sum(-1, keepdim=True))
                .square()
                .mean()
            )
            steps = torch.autograd.grad(inner, list(at.values()), create_graph=True)
            first_order = isinstance(rule, mo.FirstOrder)
            at = {
                k: w - 0.3 * (g.detach() if first_order else g)
                for (k, w), g in zip(at.items(), steps, strict=True)
            }
        expected_losses.append(
            (functional_call(twin, at, (task[1],)) - task[1].sum(-1, keepdim=True)).square().mean()
        )
    expected = torch.autograd.grad(torch.stack(expected_losses).mean(), list(params.values()))
    assert_close(losses, torch.stack(expected_losses).detach(), 1e-12)
    assert_close(list(grads.values()), list(expected), 1e-12)


@each_layer
def test_vmap_over_models(name: str) -> None:
    """Every element of the batch has its own weights and its own sequence."""
    layer = LAYERS[name]()
    params = {key: torch.randn(3, *p.shape) for key, p in layer.named_parameters()}
    xs = torch.randn(3, 5, 2, 3)

    def gradient(p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        with any_order():
            return grad(lambda p: total(functional_call(layer, p, (x,))))(p)

    batched = vmap(gradient)(params, xs)
    for i in range(3):
        assert_close(tree.index(batched, i), gradient(tree.index(params, i), xs[i]), 1e-11)

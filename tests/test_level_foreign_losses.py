"""Losses of levels with what torch.func refuses.

An old-style autograd.Function, a hook that lets activations require grad.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from level_problems import CG
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD

RULES = [
    mo.Backprop(),
    mo.Backprop(memory="steps"),
    mo.Backprop(memory=mo.Revolve(1)),
    mo.Backprop(window=1),
    mo.FirstOrder(),
    mo.FiniteDifference(1e-4),
    mo.SAMA(1e-4),
    mo.T1T2(),
    CG,
    mo.Penalty(),
]


class Reversal(torch.autograd.Function):
    """The identity, whose derivative is -1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def hypergradient(rule: Any, *, hooked: bool = False, reverse: Any = None) -> Tensor:
    """Return that of a level which reweights the features of one below, after one step."""
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 3).double().requires_grad_(False)
    if hooked:
        embedding.register_forward_hook(lambda *args: args[-1].requires_grad_(True))
    model = nn.Sequential(embedding, nn.Linear(3, 2).double())
    words = torch.tensor([0, 1, 4, 2])

    def of_low(levels: Any, _: None) -> Tensor:
        features = levels.low(words)
        weights = levels.up(features if reverse is None else reverse(features))
        return (weights * features.sum(1, keepdim=True)).square().mean() + features.square().mean()

    low = mo.Level("low", model, of_low, SGD(0.1, momentum=0.5))
    up = mo.Level(
        "up",
        nn.Linear(2, 1).double(),
        lambda s, _: (s.low(words) - 1).square().mean(),
        SGD(0.1),
        allow_unused=True,
    )
    graph = mo.LevelGraph([mo.Edge(up, low, steps=2, differentiate=rule)])
    graph.step()
    return graph.hypergradient("up", after_steps=True)["weight"]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_old_style_function_under_every_rule_that_needs_only_gradients(rule: Any) -> None:
    found = hypergradient(rule, reverse=Reversal.apply)
    torch.testing.assert_close(
        found, hypergradient(rule, reverse=lambda x: 2 * x.detach() - x), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_hook_that_lets_activations_require_grad(rule: Any) -> None:
    """Hugging Face models have one after checkpointing was switched on and off.

    The calls are `gradient_checkpointing_enable(); gradient_checkpointing_disable()`.
    """
    torch.testing.assert_close(
        hypergradient(rule, hooked=True), hypergradient(rule), rtol=1e-9, atol=1e-10
    )


def test_a_tensor_of_the_closure_is_found_behind_such_a_hook() -> None:
    hidden = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        ValueError,
        match="level 'low': its loss reaches `hidden` \\(shape \\(2,\\)\\) through its closure",
    ):
        hypergradient(mo.Backprop(), hooked=True, reverse=lambda x: x * hidden)

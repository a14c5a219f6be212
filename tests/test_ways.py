"""Every rule under every way to differentiate.

Plain backward, `torch.func.grad`, `vmap` of it give one answer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad, vmap

import metaopt as mo
from metaopt.differentiate import PointRule, Rule
from optimizers import SGD

pytestmark = pytest.mark.usefixtures("float64")
RULES: dict[str, Rule] = {
    "plain": mo.Backprop(),
    "steps": mo.Backprop("steps"),
    "Revolve": mo.Backprop(memory=mo.Revolve(2)),
    "window": mo.Backprop(window=2),
    "first order": mo.FirstOrder(),
    "implicit": mo.Implicit(mo.ConjugateGradient(10, damping=1.0)),
    "T1T2": mo.T1T2(scale="lr"),
    "difference": mo.FiniteDifference(1e-4, scale=0.3),
    "SAMA": mo.SAMA(1e-4),
    "penalty": mo.Penalty(100, 20, 0.05),
    "forward mode": mo.ForwardMode(),
}


class Model(nn.Module):
    """With buffers that its forward reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("shift", torch.tensor([0.3, -0.2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).tanh() + self.shift


# torch's own forward mode uses it
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("name", RULES)
def test_the_three_ways_agree(name: str) -> None:
    """In weights of examples, a number, and the batch, beside integers in `meta` and in the batch.

    Buffers are read.
    """
    torch.manual_seed(0)
    rule, net = RULES[name], mo.functional(Model())
    start = {key: p.detach() for key, p in net.params.items()}
    x, y, order = torch.randn(8, 3), torch.randint(2, (8,)), torch.arange(8).flip(0)

    def loss(params: Any, batch: Any, meta: Any) -> Tensor:
        x, y, order = batch
        losses = (
            F.cross_entropy(net(params, x), y, reduction="none") * meta["weights"].sigmoid()[order]
        )
        return (
            losses.mean()
            + meta["decay"].exp() * sum(p.square().sum() for p in params.values()) / meta["count"]
        )

    def value(weights: Tensor, decay: Tensor, x: Tensor) -> Tensor:
        meta = {"weights": weights, "decay": decay, "count": torch.tensor(3)}
        out = mo.minimize(
            loss, SGD(0.1), start, (x, y, order), steps=4, meta=meta, differentiate=rule
        )
        return F.cross_entropy(net(out.params, x.flip(0)), y) + (
            0 if isinstance(rule, PointRule) else out.losses.sum()
        )

    at = (torch.randn(8), torch.tensor(-3.0), x)
    expected = grad(value, (0, 1, 2))(*at)
    assert all(g.abs().sum() > 0 for g in expected)
    leaves = [t.clone().requires_grad_() for t in at]
    assert_close([*torch.autograd.grad(value(*leaves), leaves)], [*expected], 1e-11)
    rows = vmap(grad(value, (0, 1, 2)))(*(torch.stack([t, t]) for t in at))
    assert_close([row[1] for row in rows], [*expected], 1e-11)

"""The published program of meta-weight-net, ported as an example.

It is compared with the same written in plain torch.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.func import functional_call

pytestmark = pytest.mark.usefixtures("float64")


def load() -> Any:
    path = Path(__file__).parents[1] / "examples" / "virtual_step.py"
    spec = importlib.util.spec_from_file_location("ported_virtual_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Published:
    """The iteration of the published program.

    A virtual step of plain SGD, the weight net's Adam, the real SGD.
    """

    def __init__(self, classifier: nn.Module, weight_net: nn.Module, lr: float):
        self.classifier, self.weight_net, self.lr = classifier, weight_net, lr
        self.inner = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        self.outer = torch.optim.Adam(weight_net.parameters(), 1e-2, weight_decay=1e-4)

    def step(self, batch: Any, clean: Any) -> None:
        (x, y), params = batch, dict(self.classifier.named_parameters())

        def weighted(params: Any) -> Tensor:
            losses = F.cross_entropy(
                functional_call(self.classifier, params, (x,)), y, reduction="none"
            )
            return (self.weight_net(losses.detach()[:, None])[:, 0] * losses).sum() / len(losses)

        grads = torch.autograd.grad(weighted(params), list(params.values()), create_graph=True)
        virtual = {
            name: p - self.lr * g for (name, p), g in zip(params.items(), grads, strict=True)
        }
        self.outer.zero_grad()
        F.cross_entropy(functional_call(self.classifier, virtual, (clean[0],)), clean[1]).backward()
        self.outer.step()
        self.inner.zero_grad()
        weighted(params).backward()
        self.inner.step()


def test_it_is_the_published_iteration() -> None:
    """The virtual step has neither the momentum nor the weight decay of the real one."""
    program = load()
    classifier = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    weight_net = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())
    start = copy.deepcopy(weight_net)
    published = Published(copy.deepcopy(classifier), copy.deepcopy(weight_net), program.LR)
    ours = program.Learner(classifier, weight_net)
    for _ in range(6):
        batch, clean = ((torch.randn(10, 6), torch.randint(3, (10,))) for _ in range(2))
        ours.step(batch, clean)
        published.step(batch, clean)
        for own, other in ((classifier, published.classifier), (weight_net, published.weight_net)):
            for one, expected in zip(own.parameters(), other.parameters(), strict=True):
                assert_close(one, expected, 1e-12)
    assert all(
        (a - b).abs().max() > 1e-4
        for a, b in zip(start.parameters(), weight_net.parameters(), strict=True)
    )

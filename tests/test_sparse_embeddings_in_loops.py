"""Embeddings that ask for sparse gradients, in loops, meta-gradients and levels.

As those with dense ones.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")

RULES = {
    "full": mo.Backprop(),
    "steps": mo.Backprop(memory="steps"),
    "revolve": mo.Backprop(memory=mo.Revolve(2)),
    "first": mo.FirstOrder(),
}


class Tables(nn.Module):
    """An embedding, called as a module and as functions, by place and by name."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.table, self.head, self.sparse = (
            nn.Embedding(7, 3, sparse=sparse),
            nn.Linear(9, 2),
            sparse,
        )

    def forward(self, x: Tensor) -> Tensor:
        again = F.embedding(x[:, 0], self.table.weight, sparse=self.sparse)
        lower = torch.embedding(self.table.weight, x[:, 1], -1, False, self.sparse)
        return self.head(torch.cat([self.table(x).mean(1), again, lower], -1).tanh())


def pair() -> tuple[nn.Module, nn.Module]:
    dense, sparse = Tables(False), Tables(True)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def batch_of(*shape: int) -> Any:
    return torch.randint(7, (*shape, 5, 4)), torch.randint(2, (*shape, 5))


def loss_of(net: mo.Functional) -> Any:
    return lambda params, batch: F.cross_entropy(net(params, batch[0]), batch[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "optimizer",
    [SGD(0.1), SGD(0.1, momentum=0.9, weight_decay=0.01), Adam(0.1)],
    ids=["sgd", "momentum", "adam"],
)
def test_a_loop_is_that_with_dense_gradients(optimizer: Any, rule: str) -> None:
    """torch has no reshape, no addcmul and no second derivative for them.

    Each ended in its own text.
    """
    batch, query, ends = batch_of(), batch_of(), []
    for model in pair():
        net = mo.functional(model)
        loss = loss_of(net)
        out = mo.minimize(loss, optimizer, net.params, batch, steps=3, differentiate=RULES[rule])
        ends.append(torch.autograd.grad(loss(out.params, query), list(net.params.values())))
    for dense, sparse in zip(*ends, strict=True):
        assert sparse.layout == torch.strided
        assert dense.abs().max() > 1e-3
        assert_close(sparse, dense, 1e-12)


def test_a_bag_too_as_far_as_torch_differentiates_it() -> None:
    """Of bags there is no second derivative."""
    batch, query, ends = batch_of(), batch_of(), []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = mo.functional(
            nn.Sequential(nn.EmbeddingBag(7, 3, mode="sum", sparse=sparse), nn.Linear(3, 2))
        )
        loss = loss_of(net)
        out = mo.minimize(
            loss, Adam(0.1), net.params, batch, steps=3, differentiate=mo.FirstOrder()
        )
        ends.append(torch.autograd.grad(loss(out.params, query), list(net.params.values())))
    for dense, sparse in zip(*ends, strict=True):
        assert dense.abs().max() > 1e-3
        assert_close(sparse, dense, 1e-12)
    with pytest.raises(
        ValueError,
        match=r"embedding_bag.*the derivative for '_embedding_bag_backward' is not implemented",
    ):
        mo.check_second_order(net.model, batch[0])


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}], ids=["", "one by one"])
def test_a_meta_gradient_is_that_with_dense_gradients(options: Any) -> None:
    tasks, ends = (batch_of(3), batch_of(3)), []
    for model in pair():
        net = mo.functional(model)
        loss = loss_of(net)

        def task_loss(params: Any, task: Any, loss: Any = loss) -> Tensor:
            return loss(mo.minimize(loss, SGD(0.1), params, task[0], steps=2).params, task[1])

        ends.append(mo.meta_grad(task_loss, **options)(net.params, tasks)[0])
    for name, dense in ends[0].items():
        assert_close(ends[1][name], dense, 1e-12)


@pytest.mark.parametrize(
    "rule", [mo.Backprop(), mo.T1T2(), mo.SAMA(), mo.Implicit(mo.ConjugateGradient())], ids=repr
)
def test_a_level_is_that_with_dense_gradients(rule: Any) -> None:
    batch, query, ends = batch_of(), batch_of(), []
    weights = nn.Linear(1, 1)
    for model in pair():

        def lower_loss(levels: Any, batch: Any) -> Tensor:
            losses = F.cross_entropy(levels.model(batch[0]), batch[1], reduction="none")
            return (levels.weights(losses.detach()[:, None])[:, 0].sigmoid() * losses).mean()

        def upper_loss(levels: Any, batch: Any) -> Tensor:
            return F.cross_entropy(levels.model(batch[0]), batch[1])

        lower = mo.Level("model", model, lower_loss, SGD(0.1), data=[batch])
        upper = mo.Level("weights", copy.deepcopy(weights), upper_loss, Adam(0.1), data=[query])
        graph = mo.LevelGraph([mo.Edge(upper, lower, differentiate=rule)])
        ends.append(graph.hypergradient("weights"))
    for name, dense in ends[0].items():
        assert dense.abs().max() > 1e-7
        assert_close(ends[1][name], dense, 1e-11)


def test_it_can_be_differentiated_twice() -> None:
    """The check itself crashed on the gradient's layout."""
    mo.check_second_order(Tables(True), torch.randint(7, (5, 4)))

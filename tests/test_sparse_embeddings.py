"""Embeddings whose gradient torch would make sparse.

In inner loops, tasks and levels it is dense.
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
from metaopt.differentiate import Rule
from metaopt.exact_ops import Watching, any_order
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")
TOKENS = torch.tensor([0, 2, 2, 4])


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(5, 3, padding_idx=4, sparse=sparse), nn.Linear(3, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens).tanh()).square().mean()


RULES: dict[str, Rule] = {
    "plain": mo.Backprop(),
    "steps": mo.Backprop("steps"),
    "first order": mo.FirstOrder(),
    "forward products": mo.Backprop("steps", hvp="forward"),
}


@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9), Adam(0.1)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("name", RULES)
def test_an_inner_loop_is_that_of_dense_gradients(name: str, optimizer: mo.Optimizer) -> None:
    """Torch's sparse ones have no view, no `addcmul`, and no batching rule."""

    def derivatives(*, sparse: bool) -> list[Tensor]:
        model = Words(sparse=sparse)
        net = mo.functional(model)
        out = mo.minimize(net, optimizer, net.params, TOKENS, steps=3, differentiate=RULES[name])
        net(out.params, TOKENS).backward()
        return [p.grad for p in model.parameters()]  # type: ignore[misc]

    found = derivatives(sparse=True)
    assert all(grad.layout is torch.strided for grad in found)
    assert_close(found, derivatives(sparse=False), 1e-14)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_tasks(chunk_size: int) -> None:
    def meta_gradient(*, sparse: bool) -> Any:
        net = mo.functional(Words(sparse=sparse))

        def task_loss(params: Any, tokens: Tensor) -> Tensor:
            return net(mo.minimize(net, Adam(0.1), params, tokens, steps=2).params, tokens)

        return mo.meta_grad(task_loss, chunk_size=chunk_size)(
            net.params, torch.tensor([[0, 1], [2, 2], [3, 4]])
        )[0]

    found = meta_gradient(sparse=True)
    assert found["embed.weight"].abs().sum() > 0
    assert_close(found, meta_gradient(sparse=False), 1e-14)


@pytest.mark.parametrize(
    "rule", [mo.Backprop(), mo.Implicit(), mo.SAMA()], ids=lambda rule: type(rule).__name__
)
def test_levels(rule: Rule) -> None:
    def hypergradient(*, sparse: bool) -> Any:
        upper, lower = Words(sparse=sparse), Words(sparse=sparse)

        def loss(levels: Any, _: Any) -> Tensor:
            pairs = zip(levels.lower.params.values(), levels.upper.params.values(), strict=True)
            return levels.lower(TOKENS) + sum((one - other).square().sum() for one, other in pairs)

        top = mo.Level("upper", upper, lambda levels, _: levels.lower(TOKENS), SGD(0.1))
        edge = mo.Edge(top, mo.Level("lower", lower, loss, SGD(0.1)), steps=2, differentiate=rule)
        return mo.LevelGraph([edge]).hypergradient("upper")

    assert_close(hypergradient(sparse=True), hypergradient(sparse=False), 1e-10)


def test_the_second_order_is_checked() -> None:
    model = Words(sparse=True)
    before = copy.deepcopy(model.state_dict())
    # without the padding, whose derivative torch leaves out
    mo.check_second_order(model, TOKENS[:3])
    assert_close(dict(model.state_dict()), dict(before), 0.0)
    assert model.embed.sparse


@pytest.mark.parametrize("form", ["embedding", "by name", "torch", "bag"])
def test_every_function_that_has_the_option(form: str) -> None:
    weight = torch.randn(5, 3, requires_grad=True)

    def value(sparse: bool) -> Tensor:
        match form:
            case "embedding":
                return F.embedding(TOKENS, weight, None, None, 2.0, False, sparse)
            case "by name":
                return F.embedding(TOKENS, weight, sparse=sparse)
            case "torch":
                return torch.embedding(weight, TOKENS, -1, False, sparse)
        return F.embedding_bag(TOKENS, weight, torch.tensor([0, 2]), mode="sum", sparse=sparse)

    with any_order():
        (found,) = torch.autograd.grad(value(True).sin().sum(), weight)
    assert found.layout is torch.strided
    assert_close(found, torch.autograd.grad(value(False).sin().sum(), weight)[0], 0.0)
    for sparse in (False, True):
        with Watching() as mode:
            value(sparse)
        assert mode.found == sparse, "a dense one needs no care"


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_rewrites_its_weight_is_refused(kind: Any) -> None:
    """Under `functional` it would write into the tensors that it is lent.

    These may be live parameters.
    """
    with pytest.raises(
        ValueError,
        match="got an embedding with `max_norm`, which rewrites its weight in every call",
    ):
        mo.functional(kind(5, 3, max_norm=1.0))

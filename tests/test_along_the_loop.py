"""What `minimize` tells of the steps.

Auxiliary outputs, buffers and observations, under every memory, against a loop by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from metaopt import tree
from metaopt.exact_ops import any_order
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 4
RULES: dict[str, Callable[[Path], Any]] = {
    "full": lambda _: mo.Backprop(),
    "steps": lambda _: mo.Backprop(memory="steps"),
    "revolve": lambda _: mo.Backprop(memory=mo.Revolve(2)),
    "cpu": lambda _: mo.Backprop(memory=mo.Revolve(2, store="cpu")),
    "disk": lambda path: mo.Backprop(memory=mo.Revolve(2, store="disk", directory=path)),
    "window": lambda _: mo.Backprop(window=2),
    "window-steps": lambda _: mo.Backprop(window=2, memory="steps"),
    "first-order": lambda _: mo.FirstOrder(),
    "first-order-steps": lambda _: mo.FirstOrder(memory="steps"),
    "first-order-revolve": lambda _: mo.FirstOrder(memory=mo.Revolve(2)),
}
SECOND = [name for name in RULES if name != "disk"]


class Averaging(nn.Module):
    """y = tanh(W x) + average, where the buffer average <- .7 average + .3 mean(W) in each call.

    A buffer with a derivative.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.7 * self.average + 0.3 * self.weight.mean()
        self.calls = self.calls + 1
        return self.norm(torch.tanh(x @ self.weight.T)) + self.average


def problem() -> tuple[Any, Any, Any, dict[str, Tensor]]:
    net = mo.functional(Averaging())
    batches = torch.randn(STEPS, 5, 2), torch.randn(STEPS, 5, 3)
    query = torch.randn(6, 2), torch.randn(6, 3)
    meta = {
        "gain": torch.tensor(1.3, requires_grad=True),
        "lr": torch.tensor(0.2, requires_grad=True),
    }
    return net, batches, query, meta


def loss_with(net: Any) -> Callable[..., Any]:
    def loss_fn(params: Any, batch: Any, meta: Any, buffers: Any) -> Any:
        x, y = batch
        output, buffers = net.with_buffers(params, buffers, meta["gain"] * x)
        wrong = (output - y).square()
        return (
            wrong.mean(),
            buffers,
            {"largest": wrong.max(), "count": torch.tensor(len(x)), "output": output},
        )

    return loss_fn


def observer(net: Any, query: Any) -> Callable[..., Tensor]:
    def observe(params: Any, batch: Any, meta: Any, buffers: Any) -> dict[str, Tensor]:
        output, _ = net.with_buffers(params, buffers, query[0])
        return {"loss": F.mse_loss(output, query[1]), "bias": output.mean(0) + meta["gain"]}

    return observe


def by_hand(net: Any, batches: Any, query: Any, meta: Any, params: Any, rule: str) -> Any:
    """The same in a plain loop.

    Steps before a window are constants, and so are gradients of first order.
    """
    loss_fn, observe, buffers = loss_with(net), observer(net, query), net.buffers
    velocity, losses, aux, observed = None, [], [], []
    for t in range(STEPS):
        batch, early = (batches[0][t], batches[1][t]), rule.startswith("window") and t < STEPS - 2
        with any_order():
            loss, after, more = loss_fn(params, batch, meta, buffers=buffers)
            wanted = [p if p.requires_grad else p.requires_grad_() for p in params.values()]
            grads = dict(
                zip(params, torch.autograd.grad(loss, wanted, create_graph=True), strict=True)
            )
            if rule.startswith("first-order"):
                grads = {name: g.detach() for name, g in grads.items()}
            velocity = (
                grads
                if velocity is None
                else {name: 0.9 * velocity[name] + g for name, g in grads.items()}
            )
            params = {name: p - meta["lr"] * velocity[name] for name, p in params.items()}
            told = observe(params, batch, meta, buffers=after)
        if early:
            loss, after, more, velocity, params, told = tree.map(
                torch.Tensor.detach, (loss, after, more, velocity, params, told)
            )
            params = {name: p.requires_grad_() for name, p in params.items()}
        buffers = after
        losses.append(loss)
        aux.append(more)
        observed.append(told)
    stacked = {name: torch.stack([torch.as_tensor(more[name]) for more in aux]) for name in aux[0]}
    return params, buffers, torch.stack(losses), stacked, tree.stack(observed)


def outer(losses: Tensor, aux: Any, observed: Any, params: Any, buffers: Any) -> Tensor:
    """A loss over everything that the loop tells."""
    weights = torch.linspace(0.5, 2.0, STEPS)
    along = (weights * observed["loss"]).sum() + (
        weights[:, None] * observed["bias"]
    ).square().sum()
    told = (
        (weights * aux["largest"]).sum() + aux["output"].square().mean() + (weights * losses).sum()
    )
    return along + told + params["weight"].sum() + 3 * buffers["average"]


def minimized(
    net: Any, batches: Any, query: Any, meta: Any, params: Any, rule: Any
) -> mo.Minimized:
    return mo.minimize(
        loss_with(net),
        SGD(lr=meta["lr"], momentum=0.9),
        params,
        batches,
        meta={"gain": meta["gain"]},
        buffers=net.buffers,
        observe=observer(net, query),
        differentiate=rule,
    )


@pytest.mark.parametrize("name", RULES)
def test_values_and_derivatives_are_those_of_a_loop_by_hand(name: str, tmp_path: Path) -> None:
    net, batches, query, meta = problem()
    params, buffers, losses, aux, observed = by_hand(net, batches, query, meta, net.params, name)
    out = minimized(net, batches, query, meta, net.params, RULES[name](tmp_path))
    assert_close(out.losses, losses, 1e-12)
    assert_close(tree.ravel(out.observed), tree.ravel(observed), 1e-12)
    assert_close(out.aux["largest"], aux["largest"], 1e-12)
    assert_close(out.aux["output"], aux["output"], 1e-12)
    assert out.aux["count"].tolist() == [5] * STEPS
    assert_close(out.buffers["average"], buffers["average"], 1e-12)
    assert_close(out.buffers["norm.running_mean"], buffers["norm.running_mean"], 1e-12)
    assert out.buffers["calls"] == STEPS
    leaves = [*net.params.values(), *meta.values()]
    expected = torch.autograd.grad(
        outer(losses, aux, observed, params, buffers), leaves, allow_unused=True
    )
    found = torch.autograd.grad(
        outer(out.losses, out.aux, out.observed, out.params, out.buffers), leaves, allow_unused=True
    )
    for one, other, leaf in zip(found, expected, leaves, strict=True):
        one, other = (torch.zeros_like(leaf) if g is None else g for g in (one, other))
        assert_close(one, other, 1e-12)
    assert any(g is not None and g.abs().max() > 1e-3 for g in found)


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_too(name: str, tmp_path: Path) -> None:
    net, batches, query, meta = problem()
    leaves = [*net.params.values(), *meta.values()]
    ends = []
    for told in (
        by_hand(net, batches, query, meta, net.params, name),
        minimized(net, batches, query, meta, net.params, RULES[name](tmp_path)),
    ):
        params, buffers, losses, aux, observed = (
            (told.params, told.buffers, told.losses, told.aux, told.observed)
            if isinstance(told, mo.Minimized)
            else told
        )
        value = outer(losses, aux, observed, params, buffers)
        first = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        along = sum((g * torch.linspace(1, 2, g.numel()).view_as(g)).sum() for g in first)
        ends.append(torch.autograd.grad(along, leaves, materialize_grads=True))
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, 1e-9)


@pytest.mark.parametrize(
    "memory", ["full", "steps", mo.Revolve(2)], ids=["full", "steps", "revolve"]
)
def test_under_vmap_of_grad_each_task_has_its_own_buffers(memory: Any) -> None:
    net, _batches, query, meta = problem()
    tasks = torch.randn(3, STEPS, 5, 2), torch.randn(3, STEPS, 5, 3)
    start = {name: p.detach() for name, p in net.params.items()}
    constant = {name: p.detach() for name, p in meta.items()}

    def task_loss(params: Any, task: Any) -> Any:
        out = minimized(net, task, query, constant, params, mo.Backprop(memory=memory))
        return outer(out.losses, out.aux, out.observed, out.params, out.buffers), out.buffers[
            "norm.running_mean"
        ]

    grads, losses, means = mo.meta_grad(task_loss, has_aux=True)(start, tasks)
    one_by_one = mo.meta_grad(task_loss, has_aux=True, chunk_size=1)(start, tasks)
    assert_close(losses, one_by_one[1], 1e-12)
    assert_close(means, one_by_one[2], 1e-12)
    assert means.shape == (3, 3)
    for name, grad in grads.items():
        assert_close(grad, one_by_one[0][name], 1e-11)


def test_rules_that_look_at_the_end_return_constants() -> None:
    net, batches, query, meta = problem()
    out = minimized(
        net, batches, query, meta, {n: p.detach() for n, p in net.params.items()}, mo.T1T2()
    )
    assert out.params["weight"].requires_grad
    assert not any(
        leaf.requires_grad for leaf in tree.leaves((out.losses, out.aux, out.buffers, out.observed))
    )


@pytest.mark.parametrize(
    "rule",
    [mo.ForwardMode(), mo.EvolutionStrategy(std=1e-4, pairs=2000)],
    ids=["forward", "evolution"],
)
def test_rules_that_run_again_differentiate_observations(rule: Any) -> None:
    """d/dlr of w_1^2 + 2 w_2^2 for w_{t+1} = w_t - lr 2 w_t: w_t = (1 - 2 lr)^t."""
    lr = torch.tensor(0.1, requires_grad=True)
    out = mo.minimize(
        lambda w, _: w.square(),
        SGD(lr),
        torch.tensor(1.0),
        None,
        steps=2,
        observe=lambda w, _: w.square(),
        differentiate=rule,
    )
    (found,) = torch.autograd.grad(out.observed @ torch.tensor([1.0, 2.0]), lr)
    r = 0.8
    expected = 2 * r * -2 + 2 * 4 * r**3 * -2
    assert found.item() == pytest.approx(
        expected, rel=1e-8 if isinstance(rule, mo.ForwardMode) else 0.15
    )


def test_compiled_steps_tell_the_same() -> None:
    net, batches, _query, meta = problem()
    constant = {name: p.detach() for name, p in meta.items()}

    def loss_fn(params: Any, batch: Any, buffers: Any) -> Any:
        x, y = batch
        output = torch.tanh(x @ params["weight"].T) + buffers["average"]
        return (
            (output - y).square().mean(),
            {"average": 0.7 * buffers["average"] + 0.3 * params["weight"].mean()},
            output,
        )

    ends = []
    for compile in (False, True):
        weight = net.params["weight"].detach().clone().requires_grad_()
        out = mo.minimize(
            loss_fn,
            SGD(constant["lr"]),
            {"weight": weight},
            batches,
            buffers={"average": torch.zeros(())},
            observe=lambda params, batch, buffers: (
                params["weight"].square().sum() + buffers["average"]
            ),
            differentiate=mo.Backprop(memory="steps"),
            compile=compile,
        )
        value = out.observed.sum() + out.aux.square().sum() + out.buffers["average"]
        ends.append((value, *torch.autograd.grad(value, weight)))
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, 1e-12)


def test_a_loss_that_returns_aux_alone() -> None:
    out = mo.minimize(
        lambda w, x: ((w * x).square().sum(), {"x": x}), SGD(0.1), torch.ones(2), torch.arange(3.0)
    )
    assert out.aux["x"].tolist() == [0.0, 1.0, 2.0]
    assert out.buffers == ()
    assert out.observed == ()


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (
            lambda w, _, buffers: w.sum(),
            {"buffers": {}},
            ValueError,
            r"must return \(loss, buffers\) or \(loss, buffers, aux\)",
        ),
        (
            lambda w, _, buffers: (w.sum(), {"b": torch.ones(1)}),
            {"buffers": {"a": torch.ones(1)}},
            ValueError,
            r"buffers, as `loss_fn` returns them.*missing \[\"\['a'\]\"\]",
        ),
        (
            lambda w, _, buffers: (w.sum(), buffers + w.sum()),
            {"buffers": torch.tensor(0)},
            ValueError,
            r"must return buffers of the dtype and shape that they had, got torch.float64 tensor.* "
            r"after torch.int64 tensor",
        ),
        (
            lambda w, _, buffers: (w.sum(), 3),
            {"buffers": torch.tensor(0)},
            ValueError,
            r"must return buffers of the dtype and shape that they had, got int",
        ),
        (
            lambda w, _, buffers: (w.sum(), buffers.add_(1)),
            {"buffers": torch.zeros(())},
            ValueError,
            r"`buffers` must not be changed in place",
        ),
        (
            lambda w, _: w.sum(),
            {"unused": "skip", "compile": True},
            ValueError,
            r'unused="skip" cannot be had with `compile=True`',
        ),
        (
            lambda w, _: (w.sum(), "text"),
            {},
            TypeError,
            r"What `loss_fn` returns must be a tree of tensors, got a str",
        ),
        (
            lambda w, _: w.sum(),
            {"observe": lambda w, _: "text"},
            TypeError,
            r"What `observe` returns must be a tree of tensors",
        ),
        (
            lambda w, _: w.sum(),
            {"unused": "drop"},
            ValueError,
            r'`unused` must be "zero" or "skip", got \'drop\'',
        ),
    ],
)
def test_wrong_answers_are_named(
    loss: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mo.minimize(loss, SGD(0.1), torch.ones(2), None, steps=2, **options)


def test_an_observer_reaches_nothing_on_the_side() -> None:
    """A derivative through its closure would be dropped where steps are rebuilt."""
    gain = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"reaches `gain` \(shape \(\)\) through its closure"):
        mo.minimize(
            lambda w, _: w.sum(),
            SGD(0.1),
            torch.ones(2),
            None,
            steps=2,
            observe=lambda w, _: gain * w.sum(),
        )


def test_aux_cannot_be_averaged_over_microbatches() -> None:
    rule = mo.Backprop(memory="steps", microbatches=2)
    with pytest.raises(ValueError, match="also returns buffers or aux"):
        mo.minimize(
            lambda w, x: ((w * x).square().mean(), x),
            Adam(0.1),
            torch.ones(()),
            torch.ones(4),
            steps=1,
            differentiate=rule,
        )


def test_observations_in_microbatches() -> None:
    """The observer sees the whole batch."""
    ends = []
    w, x = torch.tensor([1.0, 2.0], requires_grad=True), torch.randn(4, 2).requires_grad_()
    for rule in (
        mo.Backprop(memory="steps"),
        mo.Backprop(memory="steps", microbatches=2, hvp="forward"),
    ):
        out = mo.minimize(
            lambda w, x: (x @ w).tanh().square().mean(),
            Adam(0.1),
            w,
            x,
            steps=3,
            observe=lambda w, x: (x.exp() @ w).mean(),
            differentiate=rule,
        )
        ends.append(
            torch.autograd.grad(out.observed @ torch.arange(1.0, 4.0) + out.losses.sum(), (w, x))
        )
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, 1e-12)

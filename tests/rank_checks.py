"""What `test_distributed` runs in two processes: each check compares with one process alone.

python tests/rank_checks.py FOLDER writes {name of a check: the error, or ""} into a file of the
rank; each process is told by its environment who it is, as by torchrun.
"""

from __future__ import annotations

import contextvars
import json
import os
import pickle
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.func import grad, hessian, jvp, vmap
from waves import Waves, make_training

import metaopt as mo
from metaopt import tree
from metaopt.autodiff.gradient import gradient
from metaopt.distributed import (
    Ranks,
    copy_beside_backward,
    copy_to_ranks,
    gather_rows,
    mean_over_ranks,
    overlap,
    sum_over_ranks,
    work_alone,
)
from metaopt.distributed.shards import read_shards, write_shards
from metaopt.torch_internals import load_compiler
from metaopt.transforms import gather_whole, is_sharded, take_local
from optimizers import SGD, Adam, PolicySchedule

CHECKS: dict[str, Callable[[Ranks], None]] = {}
LAST = "how the job ended"
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3).sin()


def check(fn: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
    CHECKS[fn.__name__] = fn
    return fn


def assert_equal(found: Any, wanted: Any, atol: float = 1e-14) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def refused(pattern: str) -> Any:
    return pytest.raises(ValueError, match=pattern)


# A loss of three parameters, shared and whole.


def whole_loss(w: Tensor) -> Tensor:
    return torch.tanh(X @ w).square().sum() / len(X)


def shared_loss(ranks: Ranks, w: Tensor) -> Tensor:
    part = torch.tanh(ranks.own(X) @ copy_to_ranks(w, ranks)).square().sum() / len(X)
    return sum_over_ranks(part, ranks)


def descend(loss: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    for _ in range(2):
        w = w - 0.5 * grad(loss)(w)
    return loss(w)


@check
def sums_have_the_closed_form(ranks: Ranks) -> None:
    """y = sum_r (r + 1) x: forward, reverse and forward-mode derivative, by hand."""
    x, factor, total = seeded(4), ranks.rank + 1.0, 3.0
    assert_equal(sum_over_ranks(factor * x, ranks), total * x)
    assert_equal(mean_over_ranks({"a": factor * x}, ranks), {"a": total / 2 * x})

    def value(x: Tensor) -> Tensor:
        return sum_over_ranks((factor * copy_to_ranks(x, ranks) ** 3).sum(), ranks)

    assert_equal(grad(value)(x), total * 3 * x**2)
    assert_equal(hessian(value)(x), torch.diag(total * 6 * x))
    assert_equal(jvp(value, (x,), (torch.ones_like(x),))[1], total * 3 * (x**2).sum())
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert_equal(second, total * 6 * x)


@check
def all_values_varying_are_torchs_all_reduce(ranks: Ranks) -> None:
    """With a loss of its own on each rank the cotangents add up, as in torch's own."""
    x, factor = seeded(4), ranks.rank + 1.0

    def own_loss(x: Tensor) -> Tensor:
        return (factor * copy_to_ranks(sum_over_ranks(x, ranks), ranks) ** 2).sum()

    assert_equal(grad(own_loss)(x), (1.0 + 2.0) * 2 * (2 * x))


@check
def nested_derivatives_are_those_of_one_process(ranks: Ranks) -> None:
    w, mine = seeded(3), partial(shared_loss, ranks)
    ways: list[Callable[[Any], Callable[[Tensor], Tensor]]] = [
        lambda loss: loss,
        grad,
        hessian,
        lambda loss: grad(partial(descend, loss)),
        lambda loss: grad(lambda w: grad(partial(descend, loss))(w).square().sum()),
        lambda loss: lambda w: jvp(partial(descend, loss), (w,), (w.cos(),))[1],
        lambda loss: grad(lambda w: jvp(partial(descend, loss), (w,), (w.cos(),))[1]),
        lambda loss: lambda w: vmap(grad(partial(descend, loss)))(torch.stack([w, 2 * w])),
        lambda loss: lambda w: vmap(grad(loss), 1, 1)(torch.stack([w, 2 * w], 1)),
        lambda loss: grad(lambda w: vmap(loss)(torch.stack([w, 2 * w])).square().sum()),
    ]
    for way in ways:
        assert_equal(way(mine)(w), way(whole_loss)(w))


@check
def trees_are_one_message_for_each_dtype(ranks: Ranks) -> None:
    given = {
        "a": torch.ones(2, 3).mT,
        "b": [torch.tensor(2.0), torch.tensor([1, 2])],
        "c": seeded(2),
        "z": torch.tensor([1j]),
    }
    found = sum_over_ranks(given, ranks)
    assert_equal(found, tree.map(lambda leaf: 2 * leaf, given))
    assert found["a"].is_contiguous()
    assert_equal(
        ranks.own(torch.arange(5)), torch.arange(5)[:2] if ranks.rank == 0 else torch.arange(2, 5)
    )


@check
def a_compiled_graph_has_the_same_derivatives(ranks: Ranks) -> None:
    w, mine = seeded(3), partial(shared_loss, ranks)
    outer = grad(lambda w: grad(partial(descend, mine))(w).square().sum())
    wanted = grad(lambda w: grad(partial(descend, whole_loss))(w).square().sum())(w)
    load_compiler()
    assert_equal(torch.compile(outer, fullgraph=True, backend="aot_eager")(w), wanted)


@check
def constants_are_not_sent(ranks: Ranks) -> None:
    w = torch.ones(3)
    assert copy_to_ranks({"w": w}, ranks)["w"] is w


@check
def a_task_of_ones_own_is_not_shared(ranks: Ranks) -> None:
    for fn in (sum_over_ranks, copy_to_ranks):
        with work_alone(), refused("works on alone"):
            fn(torch.ones(2), ranks)


# Sums beside the backward pass.


class Passed(torch.autograd.Function):
    """The identity; the backward pass writes into a log that it has come here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[Any]) -> Tensor:
        ctx.log = log
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:
        ctx.log.append("pass")
        return bar, None


def logged_gradient(
    ranks: Ranks, params: dict[str, Tensor], *, log: list[Any], others: bool = False
) -> Any:
    """Return the gradient of a loss that uses "a", then "b", and on rank 0 "c".

    The log gets the sizes of messages, and "pass" where the backward pass is between "b" and "a".
    """
    send = torch.distributed.all_reduce

    def note(message: Tensor, **given: Any) -> Any:
        log.append(message.numel())
        return send(message, **given)

    def loss(w: dict[str, Tensor]) -> tuple[Tensor, Any]:
        seen = copy_beside_backward(w)
        assert seen is not None
        hidden = Passed.apply(torch.tanh(ranks.own(X) @ seen["a"]), log)
        part = (hidden @ seen["b"]).square().sum()
        if ranks.rank == 0 and "c" in w:
            part = part + seen["c"].square().sum()
        if others:
            part = part + copy_to_ranks(w["b"].sin(), ranks).sum() / ranks.size
        return sum_over_ranks(part, ranks) + w["b"].square().sum(), ()

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.distributed, "all_reduce", note)
        found, *_ = gradient(loss, params)
    assert log[0] == 1  # the loss
    del log[0]
    return found


@check
def gradients_are_sent_beside_the_backward_pass(ranks: Ranks) -> None:
    a, b = seeded(3, 2), seeded(2)
    c = torch.ones(5, dtype=torch.float32)

    def whole(w: dict[str, Tensor]) -> Tensor:
        return (torch.tanh(X @ w["a"]) @ w["b"]).square().sum() + w["b"].square().sum()

    wanted = grad(whole)({"a": a, "b": b})
    log: list[Any] = []
    assert_equal(logged_gradient(ranks, {"a": a, "b": b}, log=log), wanted)
    assert log == ["pass", 8 + 2]  # what is small is one message, with who has what
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "FIRST_BUCKET", 1)
        patch.setattr(overlap, "BUCKET", 1)
        log = []
        assert_equal(logged_gradient(ranks, {"a": a, "b": b}, log=log), wanted)
        assert log == [3, "pass", 7]
        log = []  # in the order of the parameters, not of time
        assert_equal(logged_gradient(ranks, {"b": b, "a": a}, log=log), wanted)
        assert log == ["pass", 7, 3]
        log = []  # what one rank does not use is late there, and the others wait for it
        found = logged_gradient(ranks, {"a": a, "b": b, "c": c}, log=log)
        assert_equal(found, wanted | {"c": 2 * c})
        assert log == ([6, 3, "pass", 7] if ranks.rank == 0 else ["pass", 6, 3, 7])
        log = []  # and beside other messages, whose order depends on the graph, all are late
        found = logged_gradient(ranks, {"a": a, "b": b}, log=log, others=True)
        assert_equal(found, wanted | {"b": wanted["b"] + b.cos()})
        assert sorted(log[:2], key=str) == [2, "pass"]
        assert log[2:] == [3, 7]
        many = run(weight_net(mo.SAMA(), Adam(lr=0.05)))
    assert_equal(many, run(weight_net(mo.SAMA(), Adam(lr=0.05))), 0.0)


@check
def a_gradient_that_no_rank_has_is_missing(ranks: Ranks) -> None:
    """Not zero; but what one rank has, be it zero, all have."""
    a, kinds = seeded(3), (torch.float64, torch.bfloat16, torch.complex128)
    params = {f"{i}": a.to(kind) for i, kind in enumerate(kinds)}

    def find(users: dict[str, tuple[int, ...]]) -> dict[str, Tensor | None]:
        def loss(w: dict[str, Tensor]) -> tuple[Tensor, Any]:
            seen = copy_beside_backward(w)
            assert seen is not None
            used = [seen[name] for name, some in users.items() if ranks.rank in some]
            part = sum((x.abs().square().sum().double() for x in used), torch.tensor(1.0).double())
            return sum_over_ranks(part, ranks), ()

        with torch.no_grad():
            found, *_ = gradient(loss, params, allow_unused=True)
        assert isinstance(found, dict)
        return found

    for users in (
        {},
        {"0": (0, 1), "1": (0,)},
        {"2": (1,), "1": (1,)},  # to rank 0 its part is a constant
    ):
        wanted = {name: len(users.get(name, ())) * 2 * x for name, x in params.items()}
        for name, found in find(users).items():
            if name in users:
                assert_equal(found, wanted[name])
            else:
                assert found is None, (users, name, found)
    params["0"] = torch.zeros_like(a)
    assert_equal(find({"0": (0,)})["0"], params["0"], 0)


@check
def a_derivative_that_stops_arriving_is_missed(ranks: Ranks) -> None:
    """At the second step, as by one process."""
    torch.manual_seed(5)
    uses_low = [True]

    def errors(levels: Any, x: Tensor) -> Tensor:
        found: Tensor = (levels.low(x) - x * levels.top.params["weight"].exp()).square().mean()
        return found

    def top_loss(levels: Any, x: Tensor) -> Tensor:
        found: Tensor = levels.top.params["bias"].square().sum()
        return found + errors(levels, x) if uses_low[0] else found

    low = mo.Level("low", nn.Linear(3, 3).double(), errors, SGD(lr=0.1), [X])
    top = mo.Level("top", nn.Linear(1, 1).double(), top_loss, SGD(lr=0.1), [X])
    graph = mo.LevelGraph([mo.Edge(top, low, differentiate=mo.FiniteDifference())])
    graph.step()
    uses_low[0] = False
    with refused("no derivative arrives at its parameter 'weight'"):
        graph.step()


def fail_in_a_backward_pass(ranks: Ranks) -> None:
    """Raise on rank 1 when the first of two messages is on its way."""

    class Failing(Passed):
        @staticmethod
        def backward(ctx: Any, bar: Tensor) -> Any:
            raise KeyError("of rank 1")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "FIRST_BUCKET", 1)
        if ranks.rank == 1:
            patch.setattr(sys.modules[__name__], "Passed", Failing)
        logged_gradient(ranks, {"a": seeded(3, 2), "b": seeded(2)}, log=[])


# Tasks and pairs.


@check
def maml_is_that_of_one_process(ranks: Ranks) -> None:
    """With a rate that is learned too, aux, tasks in a list, and derivatives of the gradient."""
    rate = SGD(lr=nn.Parameter(torch.tensor(0.3, dtype=torch.float64)))
    tasks = (seeded(5, 4, 3), seeded(5, 4))

    def loss(w: dict[str, Tensor], task: tuple[Tensor, Tensor]) -> Tensor:
        x, y = task
        return (torch.tanh(x @ w["w"]) - y).square().mean()

    def task_loss(w: dict[str, Tensor], task: tuple[Tensor, Tensor]) -> Any:
        out = mo.minimize(loss, rate, w, task, steps=3)
        return loss(out.params, task), {"first": out.losses[0], "good": out.losses[0] < 1}

    w = {"w": seeded(3)}
    for given in (tasks, [tree.index(tasks, i) for i in range(5)]):
        assert_shared(
            lambda given=given: mo.meta_grad(task_loss, learn=rate, has_aux=True)(w, given)
        )

    def slope(w: Tensor) -> Tensor:
        grads, losses = mo.meta_grad(lambda *a: task_loss(*a)[0])({"w": w}, tasks)
        return grads["w"].square().sum() + losses.sum()

    assert_shared(lambda: grad(slope)(w["w"]))


def assert_shared(fn: Callable[[], Any], atol: float = 1e-13) -> None:
    """Assert that all ranks together come to what each comes to alone."""
    with work_alone():
        alone = fn()
    assert_equal(fn(), alone, atol)


def train(estimator: Any, steps: int = 4, **given: Any) -> tuple[Any, Any]:
    """Return (the parameters that are learned, the metrics of each step)."""
    lr = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
    momentum = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    optimizer = SGD(lr=lr, momentum=momentum)
    tasks: Any = Waves()
    training = mo.MetaTraining(
        optimizer, tasks, estimator=estimator, outer=Adam(lr=1e-2), horizon=7, **given
    )
    metrics = [training.step() for _ in range(steps)]
    return dict(optimizer.state_dict()), metrics


@check
def meta_training_is_that_of_one_process(ranks: Ranks) -> None:
    """Tasks are left out and clipped alike, whichever rank has them; 5 tasks and 2 ranks."""
    estimators = [
        mo.FullUnroll(5),
        mo.TruncatedBackprop(3, 5, differentiate=mo.Backprop()),
        mo.TruncatedES(0.01, 5, window=3),
        mo.PES(0.01, 5, window=3, objective=mo.ValidationLoss()),
        mo.PES(0.01, 5, window=3, chunk_size=2, stagger=False),
        mo.NRES(0.01, 5, window=3),
        mo.Groups(mo.PES(0.01, 2, window=3), 3, at_a_time=2),
        mo.Groups(mo.FullUnroll(3), 2),
    ]
    for estimator in estimators:
        assert_shared(lambda estimator=estimator: train(estimator, clip=0.1), 1e-12)
    assert sum(float(one["tasks left out"]) for one in train(estimators[0])[1]) > 0


@check
def inner_problems_are_those_of_as_many_ranks(ranks: Ranks) -> None:
    def make(estimator: Any) -> mo.MetaTraining:
        tasks: Any = Waves()
        return mo.MetaTraining(
            SGD(nn.Parameter(torch.tensor(0.1))),
            tasks,
            estimator=estimator,
            outer=Adam(0.1),
            horizon=6,
        )

    for estimator, keeps in (
        (mo.PES(0.01, 4, window=3), True),
        (mo.Groups(mo.PES(0.01, 2, window=3), 2), True),
        (mo.Groups(mo.FullUnroll(2), 2), False),
    ):
        training = make(estimator)
        training.step()
        state = training.state_dict()
        make(estimator).load_state_dict(state)
        with work_alone():
            alone = make(estimator)
            if keeps:
                with refused("inner problems of one of 2 ranks, and there are 1: go on with 2"):
                    alone.load_state_dict(state)
            else:
                alone.load_state_dict(state)


@check
def pairs_give_the_same_bits(ranks: Ranks) -> None:
    """Only losses are exchanged, the noise is made again: the order of all sums is the same."""
    assert_shared(lambda: train(mo.PES(0.01, 4, window=3)), 0.0)


@check
def policies_are_trained_as_by_one_process(ranks: Ranks) -> None:
    def learn() -> Any:
        policy = PolicySchedule(0.05, steps=7).double()
        tasks: Any = Waves()
        training = mo.MetaTraining(
            SGD(lr=policy), tasks, estimator=mo.Reinforce(4, 3), outer=Adam(1e-2), horizon=7
        )
        metrics = [training.step() for _ in range(2)]
        return dict(policy.state_dict()), metrics

    assert_shared(learn, 1e-12)


# Levels.


def weight_net(
    rule: Any, inner: Any, dtype: torch.dtype = torch.float64, prepare: Any = None, **given: Any
) -> mo.LevelGraph:
    """Return a meta-weight-net of a small classifier; a batch has 7 examples, an odd number."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
    batches = [(torch.randn(7, 3).to(dtype), torch.randint(2, (7,))) for _ in range(3)]

    if prepare:
        prepare(model)

    def learner_loss(levels: Any, batch: Any) -> Any:
        x, y = batch
        losses = F.cross_entropy(levels.learner(x), y, reduction="none")
        weights = levels.weights(losses.detach()[:, None]).squeeze(-1)
        loss = (weights * losses).mean()
        return {"loss": loss, "weight": weights.mean()}

    def meta_loss(levels: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(levels.learner(x), y)

    learner = mo.Level("learner", model, learner_loss, inner, batches, **given)
    weights = mo.Level("weights", net, meta_loss, Adam(lr=1e-2), batches[::-1])
    return mo.LevelGraph([mo.Edge(weights, learner, steps=3, differentiate=rule)])


def run(graph: mo.LevelGraph, steps: int = 2) -> Any:
    metrics = [graph.step() for _ in range(steps)]
    return metrics, {name: graph.params(name) for name in graph.plan.levels}


@check
def a_meta_weight_net_is_that_of_one_process(ranks: Ranks) -> None:
    rules = [
        mo.Backprop(),
        mo.Backprop("steps"),
        mo.T1T2(),
        mo.SAMA(),
        mo.FiniteDifference(),
        mo.Implicit(mo.ConjugateGradient(max_steps=3, damping=1.0)),
        mo.ForwardMode(),
    ]
    inner = [SGD(lr=0.1, momentum=0.9), Adam(lr=0.05)]
    for rule in rules:
        for one in inner if isinstance(rule, mo.Backprop) else inner[:1]:
            assert_shared(lambda rule=rule, one=one: run(weight_net(rule, one)), 1e-12)
    for one in inner:
        assert_shared(lambda one=one: run(weight_net(mo.Backprop(), one, torch.float32)), 1e-6)
    assert_shared(lambda: run(weight_net(mo.Backprop(), inner[0], accumulate=2)), 1e-12)


def three_levels(rules: Any) -> mo.LevelGraph:
    """Return min over a of a loss of b, which responds to a, and c, which responds to both."""
    torch.manual_seed(6)
    dtype = torch.float64
    models = [nn.Linear(3, 1, bias=False).to(dtype) for _ in range(3)]
    data = [(torch.randn(6, 3, dtype=dtype), torch.randn(6, 1, dtype=dtype)) for _ in range(2)]

    def low(levels: Any, batch: Any) -> Tensor:
        x, y = batch
        return (levels.c(x).tanh() + levels.b(x) * levels.a(x) - y).square().mean()

    def middle(levels: Any, batch: Any) -> Tensor:
        x, y = batch
        return (levels.c(x) * levels.b(x) + levels.a(x) - y).square().mean()

    def top(levels: Any, batch: Any) -> Tensor:
        x, y = batch
        return (levels.c(x) + levels.b(x).sin() - y).square().mean() + levels.a.params[
            "weight"
        ].sum() ** 2

    a = mo.Level("a", models[0], top, Adam(lr=0.1), data)
    b = mo.Level("b", models[1], middle, SGD(lr=0.1, momentum=0.9), data)
    c = mo.Level("c", models[2], low, Adam(lr=0.1), data)
    edges = [
        mo.Edge(a, b, steps=2, differentiate=rules[0]),
        mo.Edge(b, c, steps=2, differentiate=rules[1]),
    ]
    return mo.LevelGraph([*edges, mo.Edge(a, c, steps=4, differentiate=rules[1])])


@check
def three_levels_are_those_of_one_process(ranks: Ranks) -> None:
    solver = mo.Implicit(mo.ConjugateGradient(max_steps=3, damping=1.0))
    for rules in [
        (mo.Backprop(), mo.Backprop()),
        (mo.SAMA(), mo.FiniteDifference()),
        (solver, mo.Backprop()),
    ]:
        assert_shared(lambda rules=rules: run(three_levels(rules)), 1e-12)


@check
def buffers_are_means_over_the_ranks(ranks: Ranks) -> None:
    """Each rank has batch statistics of its own, as with `DistributedDataParallel`."""

    def norm_graph(parts: int) -> Any:
        torch.manual_seed(7)
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
        scale = nn.Linear(1, 1, bias=False).double()
        x = torch.randn(8, 3, dtype=torch.float64)

        def loss(levels: Any, batch: Tensor) -> Tensor:
            rows = batch.chunk(parts)
            losses = [
                (levels.learner(row) - levels.scale(row[:, :1])).square().mean() for row in rows
            ]
            return torch.stack(losses).mean()

        learner = mo.Level("learner", model, loss, SGD(lr=0.1), [x])
        top = mo.Level("scale", scale, lambda levels, batch: loss(levels, batch), SGD(lr=0.1), [x])
        graph = mo.LevelGraph([mo.Edge(top, learner)])
        graph.step()
        return graph.params("scale"), graph.params("learner"), graph._state("learner")["buffers"]

    params, learned, buffers = norm_graph(1)
    with work_alone():
        wanted = norm_graph(2)
    assert_equal((params, learned), wanted[:2], 1e-13)
    with work_alone():
        whole = norm_graph(1)[2]
    assert_equal(buffers["0.num_batches_tracked"], whole["0.num_batches_tracked"])
    # the mean of the halves' means is the mean of the whole
    assert_equal(buffers["0.running_mean"], whole["0.running_mean"], 1e-13)


@check
def what_ranks_have_apart_is_refused(ranks: Ranks) -> None:
    def of_rank(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(ranks.rank))

    def loss(w: Tensor, task: Tensor) -> Tensor:
        return (w * task).square().sum()

    with refused("meta_grad: all ranks must have the same params"):
        mo.meta_grad(loss)(of_rank(2), torch.ones(4, 2))
    with refused("all ranks must have the same tasks, got others on .1. than on rank 0"):
        mo.meta_grad(loss)(torch.ones(2), of_rank(4, 2))
    with refused("all ranks must have the same tasks"):
        mo.meta_grad(loss)(torch.ones(2), torch.ones(4 + ranks.rank, 2))
    with refused("1 tasks cannot be shared by 2 ranks: 1 would have none. .* --nproc-per-node 1"):
        mo.meta_grad(loss)(torch.ones(2), torch.ones(1, 2))
    with refused("MetaTraining: all ranks must have the same seed"):
        train(mo.ES(0.1, 4), 1, seed=ranks.rank)
    with refused("1 pairs cannot be shared by 2 ranks"):
        train(mo.ES(0.1, 1), 1)

    def graph(model: nn.Module, batch: Any, data: bool = True, noise: bool = False) -> None:
        def low(levels: Any, batch: Any) -> Tensor:
            value = (levels.low(torch.ones(2)) - levels.high(torch.ones(2))).square().mean()
            return value * torch.rand(()) if noise else value

        lower = mo.Level("low", model, low, SGD(0.1), batch if data else None)
        torch.manual_seed(0)
        upper = mo.Level("high", nn.Linear(2, 1), low, SGD(0.1), [torch.ones(4)])
        mo.LevelGraph([mo.Edge(upper, lower)]).step()

    torch.manual_seed(ranks.rank)
    apart = nn.Linear(2, 1)
    torch.manual_seed(0)
    alike = nn.Linear(2, 1)
    with refused("LevelGraph: all ranks must have the same parameters of the level 'low'"):
        graph(apart, [torch.ones(4)])
    with refused("all ranks must have the same data in the level 'low'.*DistributedSampler"):
        graph(alike, [of_rank(4)])
    with refused("1 examples in a batch of the level 'low' cannot be shared"):
        graph(alike, [torch.ones(1)])
    with refused("leading axis, got the shapes"):
        graph(alike, [(torch.ones(4), torch.ones(2))])
    with refused("draws random numbers and has no data that ranks could share"):
        graph(alike, None, data=False, noise=True)
    shared = weight_net(mo.SAMA(), SGD(0.1))
    with work_alone(), refused("works on alone"):
        shared.step()


@check
def messages_are_those_of_the_formulas(ranks: Ranks) -> None:
    """What docs/pages/guides/many-processes.md predicts from."""
    for name, *found in import_module("scaling").count_messages():
        assert found[:2] == found[2:], name


# Parameters that are spread over the ranks.


def weighted_problem() -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    """Return (loss, outer loss, parameters, meta), of weighted examples."""
    x, y = seeded(6, 3), seeded(6, 1)
    params = {"a": seeded(8, 3), "b": seeded(1, 8)}

    def errors(w: Any, batch: Any) -> Tensor:
        x, y = batch
        return (torch.tanh(x @ w["a"].T) @ w["b"].T - y).square()

    def loss(w: Any, batch: Any, meta: Tensor) -> Tensor:
        return (torch.sigmoid(meta) * errors(w, batch)).mean() + 0.1 * w["a"].square().sum()

    return loss, lambda w, batch: errors(w, batch).mean(), params, (x, y, seeded(6, 1))


@check
def sharded_parameters_have_all_derivatives(ranks: Ranks) -> None:
    """Of `DTensor`s; also of the parameters at which the loop begins, and a second derivative."""
    loss, outer, params, (x, y, meta) = weighted_problem()
    mesh = init_device_mesh("cpu", (ranks.size,))

    def spread(leaf: Tensor, place: Any) -> Any:
        return distribute_tensor(leaf, mesh, [place])

    def hypergradient(rule: Any, inner: Any, w: Any, batch: Any, meta: Any) -> Any:
        is_exact = isinstance(rule, mo.Backprop)
        w = tree.map(lambda leaf: leaf.detach().requires_grad_(is_exact), w)
        leaves = [meta.requires_grad_(), *(w.values() if is_exact else ())]
        out = mo.minimize(loss, inner, w, batch, steps=3, meta=meta, differentiate=rule)
        first = torch.autograd.grad(outer(out.params, batch), leaves, create_graph=is_exact)
        if not is_exact:
            return first
        total = torch.stack([one.square().sum() for one in first]).sum()
        return first, torch.autograd.grad(total, leaves)

    w = {"a": spread(params["a"], Shard(0)), "b": spread(params["b"], Shard(1))}
    assert sum(leaf.to_local().numel() for leaf in w.values()) == 16  # of 32
    spread_batch = (spread(x, Replicate()), spread(y, Replicate()))
    for rule in (
        mo.Backprop(),
        mo.Backprop("steps"),
        mo.Implicit(mo.ConjugateGradient(max_steps=3, damping=1.0)),
        mo.SAMA(),
    ):
        for inner in (SGD(lr=0.1, momentum=0.9), Adam(lr=0.05)):
            wanted = hypergradient(rule, inner, params, (x, y), meta)
            found = hypergradient(rule, inner, w, spread_batch, spread(meta, Replicate()))
            assert_equal(tree.map(lambda leaf: leaf.full_tensor(), found), wanted, 1e-12)


def shard(model: nn.Sequential) -> None:
    for part in (model[0], model[2], model):
        fully_shard(part)


class Two(nn.Linear):
    """Returns two tensors."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@check
def fully_sharded_modules_have_the_first_order_rules(ranks: Ranks) -> None:
    def run_and_differentiate(rule: Any, inner: Any, prepare: Any) -> Any:
        graph = weight_net(rule, inner, prepare=prepare)
        metrics = run(graph)[0]
        return metrics, graph.hypergradient("weights"), graph.params("learner")

    for rule in (mo.SAMA(), mo.FiniteDifference(), mo.Penalty()):
        inner = Adam(lr=0.05) if isinstance(rule, mo.SAMA) else SGD(lr=0.1, momentum=0.9)
        *found, params = run_and_differentiate(rule, inner, shard)
        *wanted, whole = run_and_differentiate(rule, inner, None)
        assert_equal(found, wanted, 1e-12)
        assert_equal({name: one.full_tensor() for name, one in params.items()}, whole, 1e-12)
        entries = sum(one.to_local().numel() for one in params.values())
        assert entries <= sum(one.numel() for one in whole.values()) // 2 + 1
    with refused("fully sharded and has first derivatives only, got differentiate=Backprop"):
        weight_net(mo.Backprop(), inner, prepare=shard)

    model = fully_shard(nn.Linear(3, 1).double())
    net, x = mo.functional(model), seeded(4, 3)
    before = model.weight.to_local().clone()
    with refused("cannot be called inside a transform"):
        grad(lambda x: net(net.params, x).sum())(x)
    first = torch.autograd.grad(
        net(net.params, x).square().sum(), [*net.params.values()], create_graph=True
    )
    plain = (2 * (x @ model.weight.full_tensor().T + model.bias.full_tensor()) * x).sum(0)
    assert_equal(first[0].full_tensor(), ranks.size * plain[None])  # each rank's x counts
    with refused("has first derivatives only: what its hooks"):
        first[0].full_tensor().sum().backward()
    two = mo.functional(fully_shard(Two(3, 1).double()))
    with refused("must return one tensor, got tuple"):
        two(two.params, x)
    assert_equal(model.weight.to_local(), before)
    assert model.weight.grad is None


# Checkpoints of what is spread.


def own_folder(name: str) -> Path:
    """Return a folder that all ranks have in common."""
    return Path(sys.argv[1]) / name


def distribute(model: nn.Module, mesh: Any) -> None:
    """Make parameters `DTensor`s: of 4 and of 2 rows, which are shared, and a bias that is not."""
    for name, parameter in [*model.named_parameters()]:
        place = Replicate() if name.endswith("bias") else Shard(0)
        spread = distribute_tensor(parameter.detach(), mesh, [place])
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(spread))


def spread_net(rule: Any, inner: Any, mesh: Any) -> mo.LevelGraph:
    """Return a level of `DTensor`s under one of ordinary tensors."""
    torch.manual_seed(5)
    model, scale = nn.Linear(3, 4).double(), nn.Linear(1, 1, bias=False).double()
    distribute(model, mesh)
    batches = [(seeded(6, 3) + k, seeded(6, 4)) for k in range(3)]

    def errors(levels: Any, batch: Any) -> Tensor:
        x, y = batch
        out = levels.learner(distribute_tensor(x, mesh, [Replicate()])).full_tensor()
        return (out - y).square().mean()

    def loss(levels: Any, batch: Any) -> Tensor:
        return errors(levels, batch) * levels.scale.params["weight"].sum().sigmoid()

    learner = mo.Level("learner", model, loss, inner, batches)
    top = mo.Level("scale", scale, errors, Adam(lr=0.1), batches)
    return mo.LevelGraph([mo.Edge(top, learner, steps=2, differentiate=rule)])


def read_bits(state: Any) -> Any:
    return tree.map(lambda leaf: take_local(leaf) if isinstance(leaf, Tensor) else leaf, state)


@check
def sharded_states_go_on_bit_for_bit(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    ways = {
        "momentum": lambda: weight_net(mo.SAMA(), SGD(lr=0.1, momentum=0.9), prepare=shard),
        "adam": lambda: weight_net(mo.SAMA(), Adam(lr=0.05), prepare=shard),
        "dtensor": lambda: spread_net(mo.Backprop(), Adam(lr=0.05), mesh),
    }
    for name, make in ways.items():
        folder = own_folder(f"sharded-{name}")
        losses = iter([3.0, 2.0, 1.0, 4.0, 1.0, 4.0, 4.0, 4.0])  # step 2 is the best

        def run(steps: int, validated: Any, make: Any = make, **given: Any) -> mo.LevelGraph:
            graph = make()
            mo.Trainer(
                graph,
                max_steps=steps,
                validate=lambda: next(validated),
                validate_every=1,
                progress=False,
                **given,
            ).fit()
            return graph

        straight = run(4, iter([5.0, 4.0, 3.0, 2.0, 1.0])).state_dict()
        saved = {"checkpoint": folder, "checkpoint_every": 1}
        best = run(2, losses, **saved).state_dict()
        graph = run(4, losses, resume=True, **saved)
        assert_equal(read_bits(graph.state_dict()), read_bits(best), 0)
        found = mo.Checkpoints(folder).load({"training": make().state_dict()})
        assert found is not None
        assert found.step == 4
        assert_equal(read_bits(found.state["training"]), read_bits(straight), 0)
        folders = sorted(path.name[:13] for path in folder.glob("*.shards"))
        assert folders == [f"step-{step:08}" for step in (2, 3, 4)], folders
        # each number that is spread is in one file, and one time
        (last,) = folder.glob("step-00000004-*.shards")
        spread = [leaf for leaf in tree.leaves(straight) if is_sharded(leaf)]
        files = [load_file(path) for path in last.iterdir()]
        written = [sum(leaf.numel() for leaf in file.values()) for file in files]
        assert sum(written) == sum(leaf.numel() for leaf in spread)
        assert len(written) == ranks.size
        assert max(written) < 0.7 * sum(written), written


@check
def what_is_spread_is_read_whole_or_in_other_parts(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    rows = seeded(3, 5)  # of which one rank has two
    spread = distribute_tensor(rows, mesh, [Shard(0)])
    half = distribute_tensor(rows.bfloat16(), mesh, [Shard(1)])
    ones = distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)])
    state = {
        "rows": [spread, {"again": spread}],
        "half": half,
        "sum": ones.sum(),  # each rank has its part of it
        "plain": rows,
    }
    assert state["sum"].placements[0].is_partial()
    folder = own_folder("spread")
    mo.Checkpoints(folder).save(3, state)
    plain = {**state, "rows": [rows, {"again": rows}], "half": rows.bfloat16()}
    plain["sum"] = torch.tensor(0.0)
    other = distribute_tensor(rows, mesh, [Shard(1)])
    for like in (state, plain, {**state, "rows": [other, {"again": other}], "plain": other}):
        found = mo.Checkpoints(folder).load(like)
        assert found is not None
        one, again = found.state["rows"][0], found.state["rows"][1]["again"]
        assert one is again
        assert is_sharded(one) == (like is not plain)
        whole = tree.map(gather_whole, found.state)
        assert_equal(whole["rows"][0], rows, 0)
        assert_equal([whole["half"], whole["plain"]], [rows.bfloat16(), rows], 0)
        assert whole["sum"] == 4
    assert found.state["rows"][0].placements == (Shard(0),)  # as it was: so the bits are the same
    for like, message in (
        (None, r"a torch.float64 of shape \[3, 5\], spread over ranks, and .* it has none\."),
        ({**state, "rows": [spread[:2]]}, r"it has a torch.float64 of shape \[2, 5\]"),
        ({**state, "rows": [spread.float()]}, r"it has a torch.float32 of shape \[3, 5\]"),
    ):
        with pytest.raises(mo.CheckpointError, match=message):
            mo.Checkpoints(folder).load(like)
    assert mo.Checkpoints(folder).steps() == [3]  # none was put aside for that
    with pytest.raises(TypeError, match=r"spread over the ranks, that safetensors cannot store"):
        mo.Checkpoints(folder).save(
            4, [distribute_tensor(torch.ones(2).to(torch.complex128), mesh, [Shard(0)])]
        )
    with work_alone():
        alone = mo.Checkpoints(own_folder(f"alone{ranks.rank}"))
        with refused("spread over 2 ranks cannot be saved by 1"):
            alone.save(1, state)


@check
def lost_and_damaged_shards_are_gone_behind_by_all_ranks(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    w = distribute_tensor(seeded(4, 2), mesh, [Shard(0)])

    def save(name: str) -> mo.Checkpoints:
        checkpoints = mo.Checkpoints(own_folder(name))
        for step in (1, 2):
            checkpoints.save(step, {"w": w * step})
        return checkpoints

    def damage(kind: str, root: Path) -> None:
        (folder,) = root.glob("step-00000002-*.shards")
        second = sorted(folder.iterdir())[1]
        content = second.read_bytes()
        if kind == "flipped":
            second.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        elif kind == "pickle":
            second.write_bytes(pickle.dumps(Path("x")))
        elif kind == "lost":
            second.unlink()
        elif kind == "more":
            save_file({"x": torch.ones(2)}, folder / "x.safetensors")
        else:
            folder.rename(root / "unfinished.shards")  # killed before it had its name

    for kind in ("flipped", "pickle", "lost", "more", "unfinished"):
        checkpoints = save(f"damaged-{kind}")
        if ranks.rank == 0:
            damage(kind, own_folder(f"damaged-{kind}"))
        gather_rows(torch.ones(1), ranks.size, ranks)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = checkpoints.load({"w": w})
        assert found is not None
        assert found.step == 1
        assert_equal(gather_whole(found.state["w"]), gather_whole(w), 0)
        told = gather_rows(torch.tensor([len(heard)]), ranks.size, ranks)
        assert told.any()
        for one in heard:
            assert "must be as it was written: " in str(one.message) or kind == "pickle", one
        checkpoints.save(2, {"w": w})  # again, with other numbers
        checkpoints.save(2, {"w": w})  # and the same
        found = checkpoints.load({"w": w})
        assert found is not None
        assert_equal(gather_whole(found.state["w"]), gather_whole(w), 0)
    # files that fit each other, but not the training
    with refused("must be a directory that all ranks see: one of them does not find what another"):
        mo.Checkpoints(own_folder(f"apart{ranks.rank}")).save(1, {"w": w})
    root = own_folder("damaged-lost")
    files = write_shards(root, 7, {"0": w}, ranks)
    gather_rows(torch.ones(1), ranks.size, ranks)  # the folder has its name
    with pytest.raises(ValueError, match=r"must have the tensors that belong to it, got .*Missing"):
        read_shards(root, 7, files, {"1": w}, ranks, "")


@check
def a_rank_with_a_full_disk_ends_the_save_on_all(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    w = distribute_tensor(torch.zeros(999, 2), mesh, [Shard(0)])
    checkpoints = mo.Checkpoints(own_folder("full"), keep=1)
    checkpoints.save(1, {"w": w})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
        with pytest.raises(OSError, match="rank 1 could not write its part of the tensors"):
            checkpoints.save(2, {"w": w})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    found = checkpoints.load({"w": w})
    assert found is not None
    assert found.step == 1
    checkpoints.save(2, {"w": w})
    checkpoints.save(3, {"w": w})
    assert checkpoints.steps() == [2, 3]  # others may not have the last one yet


@check
def a_best_state_that_one_rank_has_lost_is_lost_to_all(ranks: Ranks) -> None:
    checkpoints = mo.Checkpoints(own_folder("best"))
    checkpoints.save(1, {"w": 1})
    checkpoints.save(2, {"w": 2}, best_step=1)
    found = checkpoints.load()
    assert found is not None
    assert found.best == {"w": 1}
    if ranks.rank == 1:
        checkpoints.path(1).write_bytes(b"")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = checkpoints.load()
    assert found is not None
    assert (found.step, found.best, len(heard)) == (2, None, ranks.rank)


@check
def more_ranks_than_wrote_are_refused(ranks: Ranks) -> None:
    folder = own_folder("one-rank")
    if ranks.rank == 0:
        with work_alone():
            mo.Checkpoints(folder).save(1, {"w": 1})
    gather_rows(torch.ones(1), ranks.size, ranks)
    with pytest.raises(mo.CheckpointError, match="written by 1 ranks, and there are 2: some would"):
        mo.Checkpoints(folder).load()


@check
def what_ends_a_training_on_one_rank_ends_it_on_all(ranks: Ranks) -> None:
    def stop(trainer: mo.Trainer, metrics: Any) -> None:
        if ranks.rank == 1 and trainer.step == 2:
            trainer.stop()

    trainer = mo.Trainer(make_training(Waves()), max_steps=5, callbacks=[stop], progress=False)
    trainer.fit()
    assert (trainer.step, trainer.stopped_by) == (2, "stop")

    # in the body of a loop, when the other is on its way to the next step
    trainer = mo.Trainer(make_training(Waves()), max_steps=5, progress=False)
    for _ in trainer:
        stop(trainer, {})
    assert (trainer.step, trainer.stopped_by) == (3, "stop")

    def interrupt(trainer: mo.Trainer, metrics: Any) -> None:
        if ranks.rank == 0 and trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = mo.Trainer(make_training(Waves()), max_steps=5, callbacks=[interrupt], progress=False)
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 5"):
        trainer.fit()


@check
def ranks_draw_their_own_noise_and_keep_the_order_of_data(ranks: Ranks) -> None:
    drawn = []

    def noisy(levels: Any, batch: Any) -> Tensor:
        drawn.append(torch.rand(2))
        if len(drawn) % 2 == ranks.rank:  # at times more than the other rank
            torch.rand(3)
        return (levels.low(batch) * drawn[-1].sum() - levels.high(batch)).square().mean()

    def plain(levels: Any, batch: Any) -> Tensor:
        return (levels.low(batch) - 1).square().mean()

    torch.manual_seed(5)
    x = torch.randn(12, 3)
    loader = torch.utils.data.DataLoader(x, batch_size=6, shuffle=True)
    low = mo.Level("low", nn.Linear(3, 1), noisy, SGD(0.1), data=loader)
    high = mo.Level("high", nn.Linear(3, 1), plain, SGD(0.1), data=[x])
    graph = mo.LevelGraph([mo.Edge(high, low)])
    for _ in range(5):
        graph.step()
    both = gather_rows(torch.stack([torch.rand(2), drawn[-1]])[None], ranks.size, ranks)
    assert torch.equal(both[0, 0], both[1, 0])
    assert not torch.equal(both[0, 1], both[1, 1])


@check
def ranks_that_nobody_joined_are_noticed(ranks: Ranks) -> None:
    meta_gradient = mo.meta_grad(lambda w, task: (w * task).square().sum())
    w, tasks = torch.ones(2), torch.ones(4, 2)
    with pytest.warns(RuntimeWarning, match="runs with 2 ranks, but what is computed here is not"):
        contextvars.Context().run(meta_gradient, w, tasks)


@check
def wrapped_modules_are_refused(ranks: Ranks) -> None:
    with pytest.raises(TypeError, match=r"those of one process\. Pass `model\.module`"):
        mo.functional(nn.parallel.DistributedDataParallel(nn.Linear(2, 1)))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    try:
        with mo.join_ranks(timeout=60) as ranks:
            for name, fn in CHECKS.items():
                if len(sys.argv) > 2 and name not in sys.argv[2:]:
                    continue
                try:
                    fn(ranks)
                    found[name] = ""
                except Exception:
                    found[name] = traceback.format_exc()
            fail_in_a_backward_pass(ranks)  # the last: it ends all
    except (KeyError, RuntimeError) as error:
        found[LAST] = f"{type(error).__name__}: {error}"
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

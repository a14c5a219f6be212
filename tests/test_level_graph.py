"""What a level graph does besides nesting.

Real models, optimizers as levels, shared levels, copies, starts, statistics.
"""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from level_problems import CG, Value, batches, coupled, level
from peak_memory import printed
from problems import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import metaopt as mo
from optimizers import SGD, Adam, ClipNorm, Cosine

pytestmark = pytest.mark.usefixtures("float64")


def value(graph: mo.LevelGraph, name: str) -> Tensor:
    return graph.plan.levels[name].model.value.detach().clone()


def leaf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


# Meta-weight-net


def learner_loss(levels: Any, batch: Any) -> Tensor:
    x, y = batch
    losses = F.cross_entropy(levels.learner(x), y, reduction="none")
    return (levels.weights(losses.detach()[:, None]).squeeze(-1) * losses).mean()


def meta_loss(levels: Any, batch: Any) -> dict[str, Tensor]:
    x, y = batch
    logits = levels.learner(x)
    return {
        "loss": F.cross_entropy(logits, y),
        "accuracy": (logits.argmax(-1) == y).double().mean(),
    }


def examples(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 4, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(count)
    ]


def meta_weight_net(**options: Any) -> mo.LevelGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    weight_net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    learner = mo.Level(
        "learner", model, learner_loss, SGD(lr=0.3, momentum=0.9), data=examples(5, 1)
    )
    weights = mo.Level("weights", weight_net, meta_loss, Adam(lr=0.05), data=examples(4, 2))
    return mo.LevelGraph([mo.Edge(upper=weights, lower=learner, **options)])


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_weight_net_equals_a_loop_by_hand(steps: int, look_ahead: bool) -> None:
    """Three rounds with torch.optim's formulas.

    1e-10: float64 rounding of some thousand operations.
    """
    graph = meta_weight_net(steps=steps, look_ahead=look_ahead)
    model, weight_net = (graph.plan.levels[name].model for name in ("learner", "weights"))
    params, theta = leaf(dict(model.named_parameters())), leaf(dict(weight_net.named_parameters()))
    velocity = [None] * len(params)
    adam = torch.optim.Adam(theta.values(), lr=0.05)
    train, clean = itertools.cycle(examples(5, 1)), itertools.cycle(examples(4, 2))

    def learn(params: Any, velocity: Any, theta: Any, rows: Any) -> Any:
        for x, y in rows:
            losses = F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")
            w = functional_call(weight_net, theta, (losses.detach()[:, None],))[:, 0]
            grads = torch.autograd.grad(
                (w * losses).mean(), list(params.values()), create_graph=True
            )
            velocity = [
                g if v is None else 0.9 * v + g for v, g in zip(velocity, grads, strict=True)
            ]
            params = {
                name: p - 0.3 * v for (name, p), v in zip(params.items(), velocity, strict=True)
            }
        return params, velocity

    for _ in range(3):
        rows, (x, y) = list(itertools.islice(train, steps)), next(clean)
        after, memory = learn(params, velocity, theta, rows)
        loss = F.cross_entropy(functional_call(model, after, (x,)), y)
        grads = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
        assert_close(graph.hypergradient("weights"), grads, 1e-10)
        assert grads["0.weight"].abs().max() > 1e-6
        for name, tensor in theta.items():
            tensor.grad = grads[name]
        adam.step()
        if look_ahead:
            after, memory = learn(params, velocity, theta, rows)
        params, velocity = leaf(after), [v.detach() for v in memory]
        metrics = graph.step()
        assert_close(metrics["weights/loss"], loss.detach(), 1e-10)
        assert set(metrics) == {
            "learner/loss",
            "weights/loss",
            "weights/accuracy",
            "weights/gradient norm",
        }
        assert_close(dict(model.named_parameters()), params, 1e-10)
        assert_close(dict(weight_net.named_parameters()), theta, 1e-10)


def test_the_virtual_step_of_the_official_meta_weight_net() -> None:
    """It is one of plain SGD on a copy of the learner.

    The real step is by SGD with momentum and weight decay.

    As in the authors' program: virtual step, meta-step of the weight net by Adam, real step with
    the new weights.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    weight_net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    params, theta = leaf(dict(model.named_parameters())), leaf(dict(weight_net.named_parameters()))
    real = SGD(lr=0.3, momentum=0.9, weight_decay=5e-4)
    learner = mo.Level("learner", model, learner_loss, real, data=examples(5, 1))
    weights = mo.Level("weights", weight_net, meta_loss, Adam(lr=0.05), data=examples(4, 2))
    graph = mo.LevelGraph([mo.Edge(weights, learner, look_ahead=SGD(0.2))])
    sgd = torch.optim.SGD(params.values(), lr=0.3, momentum=0.9, weight_decay=5e-4)
    adam = torch.optim.Adam(theta.values(), lr=0.05)

    def loss_of(params: Any, x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")
        return (
            functional_call(weight_net, theta, (losses.detach()[:, None],))[:, 0] * losses
        ).mean()

    for (x, y), (clean, target) in zip(examples(5, 1), examples(4, 2), strict=False):
        grads = torch.autograd.grad(loss_of(params, x, y), list(params.values()), create_graph=True)
        virtual = {name: p - 0.2 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        adam.zero_grad()
        loss = F.cross_entropy(functional_call(model, virtual, (clean,)), target)
        loss.backward(inputs=list(theta.values()))
        at = {name: p.detach().clone() for name, p in theta.items()}
        assert_close(
            graph.hypergradient("weights"), {name: p.grad for name, p in theta.items()}, 1e-12
        )
        assert_close(graph.objective("weights", at), loss.detach(), 1e-12)
        adam.step()
        sgd.zero_grad()
        loss_of(params, x, y).backward(inputs=list(params.values()))
        sgd.step()
        assert_close(graph.step()["weights/loss"], loss.detach(), 1e-12)
        assert_close(dict(model.named_parameters()), params, 1e-12)
        assert_close(dict(weight_net.named_parameters()), theta, 1e-12)
    assert "look_ahead with SGD(lr=0.2" in str(graph)


def test_a_level_learns_the_rate_of_the_virtual_step() -> None:
    """T(a) = (w - a w)^2 / 2 from w = 2: dT/da = -w^2 (1 - a).

    The real step is the lower level's own, by half.
    """
    virtual = SGD(nn.Parameter(torch.tensor(0.1)))
    rate = mo.Level("rate", virtual, lambda s, _: s.low().square() / 2, SGD(0.01))
    low = level("low", torch.tensor(2.0), lambda s, _: s.low().square() / 2, 0.5)
    graph = mo.LevelGraph([mo.Edge(rate, low, look_ahead=virtual)])
    assert_close(graph.hypergradient("rate")["lr"], torch.tensor(-3.6), 1e-14)
    graph.step()
    assert_close(value(graph, "low"), torch.tensor(1.0), 1e-14)
    assert_close(graph.params("rate")["lr"], torch.tensor(0.136), 1e-14)


# An optimizer as a level


def test_the_learning_rate_of_the_learning_rate() -> None:
    """Three composed unrolls: "outer" is the optimizer of "rate", and "rate" that of "learner"."""
    lr = SGD(nn.Parameter(torch.tensor(0.3)))
    outer_lr = SGD(nn.Parameter(torch.tensor(0.05)))
    data = [batches(3, seed) for seed in range(3)]

    def task(levels: Any, x: Tensor) -> Tensor:
        return coupled(levels.learner(), [], [], x)

    learner = mo.Level("learner", Value(batches(1, 9)[0]), task, lr, data=data[0])
    rate = mo.Level("rate", lr, task, outer_lr, data=data[1])
    outer = mo.Level("outer", outer_lr, task, SGD(0.01), data=data[2])
    graph = mo.LevelGraph([mo.Edge(outer, rate, steps=2), mo.Edge(rate, learner, steps=3)])

    eta = torch.tensor(0.05, requires_grad=True)
    alpha, w = torch.tensor(0.3), batches(1, 9)[0]
    inner = itertools.cycle(data[0])
    for k in range(2):
        alpha = (alpha if alpha.requires_grad else alpha.requires_grad_()).clone()
        for _ in range(3):
            v = w.detach().requires_grad_() if k == 0 and not w.requires_grad else w.clone()
            (g,) = torch.autograd.grad(coupled(v, [], [], next(inner)), v, create_graph=True)
            w = v - alpha * g
        (g,) = torch.autograd.grad(coupled(w, [], [], data[1][k]), alpha, create_graph=True)
        alpha = alpha - eta * g
    (expected,) = torch.autograd.grad(coupled(w, [], [], data[2][0]), eta)
    assert_close(graph.hypergradient("outer"), {"lr": expected}, 1e-10)
    assert expected.abs() > 1e-3
    graph.step()
    assert_close(lr.lr.detach(), alpha.detach(), 1e-12)
    assert_close(outer_lr.lr.detach(), 0.05 - 0.01 * expected, 1e-12)
    assert_close(learner.model.value.detach(), w.detach(), 1e-12)


# Levels with several uppers


def shared(steps: tuple[int, int], rules: tuple[Any, Any]) -> mo.LevelGraph:
    start = batches(3, 5)
    a = level(
        "a", start[0], lambda s, x: coupled(s.a(), [], [s.low()], x), 0.05, data=batches(2, 1)
    )
    b = level(
        "b", start[1], lambda s, x: coupled(s.b(), [], [s.low()], 2 * x), 0.05, data=batches(3, 2)
    )
    low = level(
        "low",
        start[2],
        lambda s, x: coupled(s.low(), [s.a(), s.b()], [], x),
        0.05,
        data=batches(5, 3),
        momentum=0.5,
    )
    ends = zip((a, b), steps, rules, strict=True)
    return mo.LevelGraph(
        [mo.Edge(upper, low, steps=count, differentiate=rule) for upper, count, rule in ends]
    )


def three_steps_ahead() -> Tensor:
    """Return the first hypergradient of "a" in `shared((3, 2), ...)`.

    The other upper level is as it stands.
    """
    a, b, w = batches(3, 5)
    at, v = a.clone().requires_grad_(), torch.zeros(3)
    for x in batches(5, 3)[:3]:
        w = w.clone() if w.requires_grad else w.clone().requires_grad_()
        v = 0.5 * v + torch.autograd.grad(coupled(w, [at, b], [], x), w, create_graph=True)[0]
        w = w - 0.05 * v
    return torch.autograd.grad(coupled(at, [], [w], batches(2, 1)[0]), at)[0]


def test_two_uppers_of_one_level_see_the_steps_since_their_own_last_one() -> None:
    """The level "a" moves every 3 steps of the lower level, "b" every 2.

    In six of these, "a" moves twice and "b" three times.
    """
    graph = shared((3, 2), (mo.Backprop(), mo.FirstOrder()))
    start, rows = (
        batches(3, 5),
        [itertools.cycle(batches(n, n - 1 if n < 5 else 3)) for n in (2, 3, 5)],
    )
    a, b, low = start
    history, velocity = [], torch.zeros(3)

    def replay(since: int, a_now: Any, b_now: Any, first_order: bool) -> Tensor:
        w, v = history[since][0], history[since][1]
        for _, _, a_then, b_then, x in history[since:]:
            w = w.clone() if w.requires_grad else w.clone().requires_grad_()
            (g,) = torch.autograd.grad(
                coupled(
                    w,
                    [a_then if a_now is None else a_now, b_then if b_now is None else b_now],
                    [],
                    x,
                ),
                w,
                create_graph=True,
            )
            v = 0.5 * v + (g.detach() if first_order else g)
            w = w - 0.05 * v
        return w

    windows = {"a": 0, "b": 0}
    for t in range(1, 7):
        x = next(rows[2])
        w = low.clone().requires_grad_()
        (g,) = torch.autograd.grad(coupled(w, [a, b], [], x), w)
        history.append((low, velocity, a, b, x))
        velocity = 0.5 * velocity + g
        low = low - 0.05 * velocity
        new_a, new_b = a, b
        if t % 3 == 0:
            at = a.clone().requires_grad_()
            response = replay(windows["a"], at, None, False)
            (g,) = torch.autograd.grad(coupled(at, [], [response], next(rows[0])), at)
            new_a, windows["a"] = a - 0.05 * g, t
        if t % 2 == 0:
            at = b.clone().requires_grad_()
            response = replay(windows["b"], None, at, True)
            (g,) = torch.autograd.grad(coupled(at, [], [response], 2 * next(rows[1])), at)
            new_b, windows["b"] = b - 0.05 * g, t
        a, b = new_a, new_b
    assert_close(graph.hypergradient("a")["value"], three_steps_ahead(), 1e-10)
    graph.step()
    assert_close([value(graph, name) for name in ("low", "a", "b")], [low, a, b], 1e-10)


def test_shared_levels_are_attached_once_and_each_upper_gets_its_own_part() -> None:
    """At a point both uppers see the same Hessian: da = -H^-1 C_a, solved densely here."""
    graph = shared((1, 1), (CG, CG))
    a, b, low = batches(3, 5)
    x = batches(5, 3)[0]
    for name, own, scale, row in (("a", a, 1, batches(2, 1)[0]), ("b", b, 2, batches(3, 2)[0])):

        def gradient(w: Tensor, at: Tensor, name: str = name) -> Tensor:
            return torch.func.grad(
                lambda w: coupled(w, [at, b] if name == "a" else [a, at], [], x)
            )(w)

        hessian, mixed = torch.func.jacrev(gradient, (0, 1))(low, own)
        response = -torch.linalg.solve(hessian, mixed)
        direct, through = torch.func.grad(lambda at, w, x: coupled(at, [], [w], x), (0, 1))(
            own, low, scale * row
        )
        assert_close(graph.hypergradient(name)["value"], direct + response.T @ through, 1e-9)


def test_a_layered_graph_costs_as_much_as_it_has_edges_not_paths(monkeypatch: Any) -> None:
    """16 levels wide and 4 deep: 528 edges below each top level, 4096 paths.

    What is counted is pullbacks: one a level below.
    """
    calls = []
    original = mo.Implicit.pull_back
    monkeypatch.setattr(
        mo.Implicit, "pull_back", lambda self, *args: calls.append(1) or original(self, *args)
    )

    def graph(wide: int, deep: int) -> mo.LevelGraph:
        layers = [
            [
                level(f"v{i}_{j}", 0.1 * (i + j), layer_loss(i, j, wide, deep), optimizer=SGD(0.01))
                for j in range(wide)
            ]
            for i in range(deep)
        ]
        pairs = [
            pair
            for upper, lower in itertools.pairwise(layers)
            for pair in itertools.product(upper, lower)
        ]
        return mo.LevelGraph([mo.Edge(*pair, differentiate=CG) for pair in pairs])

    def layer_loss(i: int, j: int, wide: int, deep: int) -> Any:
        def loss(levels: Any, _: Any) -> Tensor:
            own = getattr(levels, f"v{i}_{j}")()
            if i == 0:
                return sum((getattr(levels, f"v{deep - 1}_{k}")() - 1) ** 2 for k in range(wide))
            above = sum(weight(i, j, k) * getattr(levels, f"v{i - 1}_{k}")() for k in range(wide))
            return 0.5 * (own - above) ** 2

        return loss

    def weight(i: int, j: int, k: int) -> float:
        return ((3 * i + 5 * j + 7 * k) % 11 - 5) / 10

    for wide, deep in ((2, 3), (16, 4)):
        built = graph(wide, deep)
        calls.clear()
        found = built.hypergradient("v0_1")["value"]
        assert len(calls) == wide * (deep - 1)
        row = torch.eye(wide)[1]  # the paths are products of matrices
        for i in range(1, deep):
            row = torch.tensor([[weight(i, j, k) for k in range(wide)] for j in range(wide)]) @ row
        last = torch.tensor([0.1 * (deep - 1 + j) for j in range(wide)])
        assert_close(found, (2 * (last - 1) * row).sum(), 1e-10)


# Where a lower level starts


@pytest.mark.parametrize("start", ["restart", "upper", "continue"])
def test_where_the_lower_level_starts(start: Any) -> None:
    """Two rounds of three steps with momentum; a fresh start forgets the momentum too."""
    a, w0 = batches(2, 5)
    upper = level(
        "upper", a, lambda s, x: coupled(s.upper(), [], [s.low()], x), 0.05, data=batches(2, 1)
    )
    low = level(
        "low",
        w0,
        lambda s, x: coupled(s.low(), [s.upper()], [], x),
        0.05,
        data=batches(4, 2),
        momentum=0.5,
    )
    graph = mo.LevelGraph([mo.Edge(upper, low, steps=3, start=start)])
    rows, w, v = itertools.cycle(batches(4, 2)), w0, torch.zeros(3)
    for k in range(2):
        at = a.clone().requires_grad_()
        if start != "continue":
            w, v = (w0 if start == "restart" else at), torch.zeros(3)
        for _ in range(3):
            w = w.clone() if w.requires_grad else w.clone().requires_grad_()
            (g,) = torch.autograd.grad(coupled(w, [at], [], next(rows)), w, create_graph=True)
            v = 0.5 * v + g
            w = w - 0.05 * v
        (g,) = torch.autograd.grad(coupled(at, [], [w], batches(2, 1)[k]), at)
        assert_close(graph.hypergradient("upper")["value"], g, 1e-10)
        graph.step()
        a, w, v = a - 0.05 * g, w.detach(), v.detach()
        assert_close([value(graph, "upper"), value(graph, "low")], [a, w], 1e-12)


# Copies


def copies(
    count: int, *, loop: bool = False, norm: bool = False
) -> tuple[mo.LevelGraph, list[Any], list[Any]]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), *([nn.LayerNorm(5)] * norm), nn.Tanh(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers)
    rows = [[examples(count, 10 * seed + s) for s in range(3)] for seed in range(2)]
    stacked = [[mo.tree.stack(row) for row in part] for part in rows]
    options = {"start": "upper", "steps": 2}
    task = mo.Level(
        "task",
        copy.deepcopy(model),
        lambda s, b: F.cross_entropy(s.task(b[0]), b[1]),
        SGD(0.4),
        stacked[0],
        copies=count,
    )
    meta = mo.Level(
        "meta", model, lambda s, b: F.cross_entropy(s.task(b[0]), b[1]), SGD(0.1), stacked[1]
    )
    return mo.LevelGraph([mo.Edge(meta, task, **options)]), *rows


@pytest.mark.parametrize("norm", [False, True])
def test_copies_are_maml(norm: bool) -> None:
    """The mean over tasks of the gradient of each.

    With a norm layer, where torch's derivative of a vmapped mean is wrong.
    """
    graph, support, query = copies(4, norm=norm)
    net = mo.functional(graph.plan.levels["meta"].model)

    def task_loss(params: Any, task: Any) -> Tensor:
        for x, y in task[0]:
            grads = torch.func.grad(lambda p, x=x, y=y: F.cross_entropy(net(p, x), y))(params)
            params = {name: p - 0.4 * grads[name] for name, p in params.items()}
        return F.cross_entropy(net(params, task[1][0]), task[1][1])

    tasks = [([support[0][i], support[1][i]], query[0][i]) for i in range(4)]
    each = [torch.func.grad(task_loss)(net.params, task) for task in tasks]
    expected = mo.tree.map(lambda *g: torch.stack(g).mean(0), *each)
    assert_close(graph.hypergradient("meta"), expected, 1e-10)
    metrics = graph.step()
    assert_close(
        metrics["meta/loss"],
        torch.stack([task_loss(net_params(graph, expected), task) for task in tasks])
        .mean()
        .detach(),
        1e-10,
    )


def net_params(graph: mo.LevelGraph, grads: Any) -> Any:
    """Return the meta level's parameters before the step that was just made."""
    return {
        name: p.detach() + 0.1 * grads[name]
        for name, p in graph.plan.levels["meta"].model.named_parameters()
    }


def test_copies_have_running_statistics_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    rows = [examples(3, seed) for seed in range(2)]
    data = [mo.tree.stack(row) for row in rows]
    task = mo.Level(
        "task",
        copy.deepcopy(model),
        lambda s, b: F.cross_entropy(s.task(b[0]), b[1]),
        SGD(0.1),
        data,
        copies=3,
    )
    query = lambda s, b: F.cross_entropy(s.task(b[0]), b[1])
    graph = mo.LevelGraph(
        [
            mo.Edge(
                mo.Level("meta", copy.deepcopy(model), query, SGD(0.1), data),
                task,
                steps=2,
                start="upper",
            )
        ]
    )
    graph.step()
    found = graph.state_dict()["levels"]["meta"]["below"]["task"]["buffers"]
    for i in range(3):
        one = copy.deepcopy(model)
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        for row in rows:
            optimizer.zero_grad()
            F.cross_entropy(one(row[i][0]), row[i][1]).backward()
            optimizer.step()
        assert_close(mo.tree.index(found, i), dict(one.named_buffers()), 1e-10)


def test_copies_with_convolutions_run_one_after_the_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2))
    data = [(torch.randn(3, 5, 1, 4), torch.randint(2, (3, 5)))]

    def loss(levels: Any, batch: Any) -> Tensor:
        return F.cross_entropy(levels.task(batch[0]), batch[1]) + 0.1 * sum(
            (p - q).square().sum()
            for p, q in zip(levels.task.params.values(), levels.meta.params.values(), strict=True)
        )

    def build() -> mo.LevelGraph:
        task = mo.Level("task", copy.deepcopy(model), loss, SGD(0.1), data, copies=3)
        meta = mo.Level(
            "meta",
            copy.deepcopy(model),
            lambda s, b: F.cross_entropy(s.task(b[0]), b[1]),
            SGD(0.1),
            data,
        )
        return mo.LevelGraph([mo.Edge(meta, task, steps=2, differentiate=CG)])

    graph = build()
    assert graph.plan.sequential_copies == {"meta"}
    batched = build()
    object.__setattr__(batched.plan, "sequential_copies", frozenset())
    for _ in range(2):
        assert_close(graph.step(), batched.step(), 1e-8)


# Options of a level


def test_accumulation_is_the_mean_over_batches() -> None:
    """On both levels: the lower one sees 2 batches a step, the upper one 3."""
    a, w = batches(2, 5)
    upper = level(
        "upper",
        a,
        lambda s, x: coupled(s.upper(), [], [s.low()], x),
        0.05,
        data=batches(6, 1),
        accumulate=3,
    )
    low = level(
        "low",
        w,
        lambda s, x: {"loss": coupled(s.low(), [s.upper()], [], x), "x": x.sum()},
        0.05,
        data=batches(4, 2),
        accumulate=2,
    )
    graph = mo.LevelGraph([mo.Edge(upper, low, steps=2)])
    at, rows = a.clone().requires_grad_(), batches(4, 2)
    for k in range(2):
        w = w.clone().requires_grad_() if k == 0 else w.clone()
        loss = (coupled(w, [at], [], rows[2 * k]) + coupled(w, [at], [], rows[2 * k + 1])) / 2
        w = w - 0.05 * torch.autograd.grad(loss, w, create_graph=True)[0]
    total = sum(coupled(at, [], [w], x) for x in batches(6, 1)[:3]) / 3
    assert_close(graph.hypergradient("upper")["value"], torch.autograd.grad(total, at)[0], 1e-10)
    metrics = graph.step()
    assert_close(
        [metrics["upper/loss"], metrics["low/x"]],
        [total.detach(), (rows[2].sum() + rows[3].sum()) / 2],
        1e-12,
    )


@pytest.mark.parametrize(
    "rule",
    [
        mo.Backprop(),
        mo.Backprop(memory="steps"),
        mo.T1T2(),
        mo.FiniteDifference(1e-5),
        mo.Implicit(mo.Direct()),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_accumulation_carries_statistics_and_differentiates_as_one_loss(rule: Any) -> None:
    """Running statistics pass from batch to batch.

    The mean over two batches has the derivatives of one loss that does so.
    """
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 3), torch.randn(2, 6, 1)

    def build(whole: bool) -> mo.LevelGraph:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        scale = nn.ParameterDict({"scale": nn.Parameter(torch.ones(()))})

        def loss(levels: Any, batch: Any) -> Any:
            pairs = zip(*batch, strict=True) if whole else [batch]
            losses = torch.stack(
                [(levels.top.params["scale"] * levels.low(x) - y).square().mean() for x, y in pairs]
            )
            return {
                "loss": losses.mean()
                + 0.01 * sum(p.square().sum() for p in levels.low.params.values()),
                "half": losses.mean() / 2,
            }

        def outer(levels: Any, batch: Any) -> Tensor:
            return (levels.low(batch[0]) - batch[1]).abs().mean() + levels.top.params[
                "scale"
            ].square()

        options = (
            {"data": [(x, y)]} if whole else {"data": list(zip(x, y, strict=True)), "accumulate": 2}
        )
        low = mo.Level("low", model, loss, SGD(0.1, momentum=0.5), **options)
        top = mo.Level("top", scale, outer, SGD(0.1), data=[(x[0], y[0])])
        return mo.LevelGraph([mo.Edge(top, low, steps=2, differentiate=rule)])

    one, other = build(whole=True), build(whole=False)
    for _ in range(2):
        assert_close(one.step(), other.step(), 1e-9)
    assert_close(one.state_dict()["levels"], other.state_dict()["levels"], 1e-9)


ACCUMULATING = """
import sys
import torch
import torch._dynamo  # 40 MB, which the first `autograd.Function` loads
from torch import nn
import metaopt as mo
from optimizers import SGD

torch.set_num_threads(1)
count = int(sys.argv[1])
wide = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(50, 50), nn.Tanh())])
rate = nn.ParameterDict({"weight": nn.Parameter(torch.ones(()))})
data = [torch.randn(5_000, 50) for _ in range(count)]
options = {"optimizer": SGD(0.1), "data": data, "accumulate": count}
def low_loss(s, x):
    return s.top.params["weight"] * s.low(x).square().mean()
def top_loss(s, x):
    return s.low(x).square().mean() + s.top.params["weight"] ** 2
low = mo.Level("low", wide, low_loss, **options)
top = mo.Level("top", rate, top_loss, **options)
graph = mo.LevelGraph([mo.Edge(top, low, differentiate=mo.FiniteDifference())])
before = peak()
graph.step()
print(peak() - before - 2 * count * 5_000 * 50 * 4 // 1024)  # the stacked batches
"""


@pytest.mark.slow
def test_accumulation_takes_the_memory_of_one_batch() -> None:
    """In KiB.

    The graph of one, 20 layers of 1 MB, was there when the graph of levels was built; with all
    of four it is 30 MB more.
    """
    assert printed(ACCUMULATING, 4) - printed(ACCUMULATING, 1) < 10_000


def test_a_level_warms_up() -> None:
    """The top level stays for two of its steps, the middle one for three of its.

    Its state of momentum too.
    """
    start = batches(3, 5)
    top = level(
        "top",
        start[0],
        lambda s, x: coupled(s.top(), [], [s.mid()], x),
        0.05,
        data=batches(3, 1),
        warmup=2,
    )
    mid = level(
        "mid",
        start[1],
        lambda s, x: coupled(s.mid(), [s.top()], [s.low()], x),
        0.05,
        data=batches(3, 2),
        momentum=0.9,
        warmup=3,
    )
    low = level(
        "low", start[2], lambda s, x: coupled(s.low(), [s.mid()], [], x), 0.05, data=batches(3, 3)
    )
    graph = mo.LevelGraph([mo.Edge(top, mid, steps=2), mo.Edge(mid, low)])
    moved = []
    for _ in range(3):
        before = {name: value(graph, name) for name in ("top", "mid", "low")}
        graph.step()
        moved.append([name for name in before if not torch.equal(before[name], value(graph, name))])
    assert moved == [["low"], ["mid", "low"], ["top", "mid", "low"]]


def test_running_statistics_are_carried_and_no_other_level_touches_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    twin = copy.deepcopy(model)
    data = examples(4, 3)

    def loss(levels: Any, batch: Any) -> Tensor:
        return F.cross_entropy(levels.learner(batch[0]) * levels.scale(), batch[1])

    def outer(levels: Any, batch: Any) -> Tensor:
        return F.cross_entropy(levels.learner(10 + batch[0]), batch[1])

    learner = mo.Level("learner", model, loss, SGD(0.1), data)
    graph = mo.LevelGraph([mo.Edge(level("scale", 1.0, outer, data=data), learner, steps=2)])
    assert model[1].num_batches_tracked == 0
    graph.hypergradient("scale")
    assert model[1].num_batches_tracked == 0
    graph.step()
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for x, y in data[:2]:
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), 1e-12)
    assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), 1e-12)


def test_frozen_and_tied_parameters_clipping_and_schedules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    twin, data = copy.deepcopy(model), examples(4, 3)
    loss = lambda s, b: F.cross_entropy(s.learner(b[0]) * s.scale(), b[1])
    learner = mo.Level("learner", model, loss, ClipNorm(0.1, SGD(lr=Cosine(0.5, steps=4))), data)
    graph = mo.LevelGraph(
        [
            mo.Edge(
                level(
                    "scale",
                    1.0,
                    lambda s, b: F.cross_entropy(s.learner(b[0]), b[1]),
                    0.0,
                    data=data,
                ),
                learner,
                steps=3,
            )
        ]
    )
    graph.step()
    params = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, 0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for x, y in data[:3]:
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        norm = torch.cat([p.grad.flatten() for p in params]).norm()
        for p in params:
            p.grad *= 0.1 / norm.clamp(min=0.1)
        optimizer.step()
        schedule.step()
    assert model[2].weight is model[0].weight
    assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), 1e-10)


def test_precision_is_an_autocast_of_the_loss() -> None:
    seen = []
    x = torch.randn(5, 4, dtype=torch.float32)

    def loss(levels: Any, _: Any) -> Tensor:
        seen.append(levels.learner(x).dtype)
        return levels.learner(x).float().square().mean() * levels.scale()

    model = nn.Linear(4, 2, dtype=torch.float32)
    learner = mo.Level("learner", model, loss, SGD(0.1), precision=torch.bfloat16)
    scale = level(
        "scale", torch.tensor(1.0, dtype=torch.float32), lambda s, _: s.learner(x).square().mean()
    )
    graph = mo.LevelGraph([mo.Edge(scale, learner, steps=2)])
    graph.step()
    assert set(seen) == {torch.bfloat16}
    assert model.weight.dtype == torch.float32


# Running


class Notes:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, metrics: Any) -> None:
        self.rows.append({"step": step, **metrics})

    def close(self) -> None:
        self.rows.append({})


def test_a_trainer_runs_a_graph_and_the_models_hold_the_best_values() -> None:
    graph, notes = meta_weight_net(), Notes()
    model = graph.plan.levels["learner"].model
    values, seen = iter([3.0, 1.0, 2.0]), []

    def validate() -> float:
        seen.append(model[0].weight.detach().clone())
        return next(values)

    mo.Trainer(graph, max_steps=4, logger=notes, validate=validate, validate_every=2).fit()
    steps = [row for row in notes.rows if "weights/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(model[0].weight, seen[1])


def test_a_state_is_all_that_the_next_steps_depend_on() -> None:
    one, other = meta_weight_net(steps=2), meta_weight_net(steps=2)
    for _ in range(3):
        one.step()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):  # over the end of the data
        first, second = one.step(), other.step()
        assert mo.tree.map(float, first) == mo.tree.map(float, second)
    for name in ("learner", "weights"):
        torch.testing.assert_close(
            dict(one.plan.levels[name].model.named_parameters()),
            dict(other.plan.levels[name].model.named_parameters()),
            rtol=0,
            atol=0,
        )


def test_a_step_that_fails_changes_nothing() -> None:
    data = [torch.ones(3), torch.full((3,), torch.nan)]
    top = level(
        "top", torch.ones(3), lambda s, x: coupled(s.top(), [], [s.mid()], x), data=batches(2, 1)
    )
    mid = level(
        "mid", torch.ones(3), lambda s, x: coupled(s.mid(), [s.top()], [s.low()], x), data=data
    )
    low = level(
        "low", torch.ones(3), lambda s, x: coupled(s.low(), [s.mid()], [], x), data=batches(2, 2)
    )
    graph = mo.LevelGraph([mo.Edge(top, mid), mo.Edge(mid, low)])
    graph.step()
    before = {name: value(graph, name) for name in ("top", "mid", "low")}
    for _ in range(2):
        with pytest.raises(mo.NonFiniteError, match=r"level 'mid', step 1: the loss is nan"):
            graph.step()
    assert_close({name: value(graph, name) for name in before}, before, 0.0)


def test_a_step_leaves_no_circles() -> None:
    """Tensors in a circle live until the collector comes, and memory is used again the later."""
    for rule in (mo.FiniteDifference(), mo.Implicit(), mo.Backprop(), mo.Backprop(memory="steps")):
        graph = meta_weight_net(differentiate=rule)
        graph.step()
        gc.collect()
        gc.disable()
        try:
            graph.step()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            # not those of the compiler, which leaves some of its own at any time
            kinds = (Tensor, nn.Parameter)
            assert not [thing for thing in gc.garbage if type(thing) in kinds], rule
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


def test_a_step_and_a_hypergradient_leave_the_random_state_where_a_loop_would() -> None:
    """Dropout draws what it should.

    These are the same numbers under "full" and "steps" memory, and other ones in the next step.
    """

    def run(memory: Any) -> list[Tensor]:
        torch.manual_seed(3)
        drop = lambda s, x: coupled(F.dropout(s.low(), 0.5), [s.top()], [], x)
        low = level("low", torch.ones(3), drop, data=batches(2, 1))
        top = level(
            "top",
            torch.ones(3),
            lambda s, x: coupled(s.top(), [], [s.low()], x),
            data=batches(2, 2),
        )
        graph = mo.LevelGraph(
            [mo.Edge(top, low, steps=2, differentiate=mo.Backprop(memory=memory))]
        )
        return [graph.step()["low/loss"] for _ in range(3)] + [value(graph, "top")]

    assert_close(run("full"), run("steps"), 1e-12)


def test_a_graph_as_text() -> None:
    graph = shared((3, 2), (mo.Backprop(), mo.FirstOrder()))
    lines = str(graph).splitlines()
    assert lines[0] == "LevelGraph with 3 levels and 2 edges"
    assert "  b -> low: 2 steps, start=continue, FirstOrder(memory='full')" in lines
    order = lines[lines.index("one step") + 1 :]
    assert order == [
        "  low makes 2 steps",
        "  b makes 1 step",
        "  low makes 1 step",
        "  a makes 1 step",
        "  low makes 1 step",
        "  b makes 1 step",
        "  low makes 2 steps",
        "  b makes 1 step",
        "  a makes 1 step",
    ]


def test_the_present_values_of_schedules_and_learned_rates_can_be_read() -> None:
    """A cosine over 4 steps from 0.4, which learns the rate of the third.

    There are two steps of the lower level for one of the upper.
    """
    rate = SGD(nn.Parameter(torch.tensor(0.1)))
    top = mo.Level("top", rate, lambda s, _: s.low().square().sum(), SGD(0.5))
    low = level("low", torch.ones(2), lambda s, _: s.low().square().sum(), optimizer=rate)
    other = level(
        "other",
        torch.ones(2),
        lambda s, _: (s.other() - s.top.params["lr"]).square().sum(),
        optimizer=SGD(Cosine(0.4, steps=4)),
    )
    graph = mo.LevelGraph([mo.Edge(top, low), mo.Edge(top, other, steps=2)])
    assert "lr is now 0.1" in str(graph)
    graph.step()
    values = graph.values()
    # half-way
    torch.testing.assert_close(values["other/lr"], torch.tensor(0.2), rtol=1e-12, atol=0)
    torch.testing.assert_close(values["low/lr"], graph.params("top")["lr"], rtol=0, atol=0)
    assert values["top/lr"] == 0.5
    assert values["low/lr"] != 0.1
    lines = str(graph).splitlines()
    assert next(line for line in lines if line.startswith("  other ")).endswith("lr is now 0.2")
    assert "is now" not in next(line for line in lines if line.startswith("  top "))


def test_a_trainer_logs_them() -> None:
    logged: dict[int, dict[str, float]] = {}

    class Memory:
        def log(self, step: int, metrics: dict[str, float]) -> None:
            logged.setdefault(step, {}).update(metrics)

        def close(self) -> None:
            return None

    low = level(
        "low",
        torch.ones(2),
        lambda s, _: (s.low() - s.top()).square().sum(),
        optimizer=SGD(Cosine(0.4, steps=2)),
    )
    top = level("top", torch.ones(2), lambda s, _: s.low().square().sum(), 0.1)
    mo.Trainer(
        mo.LevelGraph([mo.Edge(top, low)]), max_steps=2, logger=Memory(), progress=False
    ).fit()
    assert logged[1]["low/lr"] == pytest.approx(0.4)
    assert logged[2]["low/lr"] == pytest.approx(0.2)
    assert logged[2]["top/lr"] == 0.1


def test_values_of_copies_are_their_mean() -> None:
    low = level(
        "low",
        torch.ones(2),
        lambda s, x: (s.low() - s.top() * x).square().sum(),
        optimizer=SGD(Cosine(0.4, steps=2)),
        copies=3,
    )
    top = level("top", torch.ones(2), lambda s, _: s.low().square().sum(), 0.1)
    low.batches = [torch.ones(3, 2)]
    graph = mo.LevelGraph([mo.Edge(top, low)])
    graph.step()
    assert float(graph.values()["low/lr"]) == pytest.approx(0.2)


def test_a_graph_as_a_picture(tmp_path: Any) -> None:
    graph = shared((3, 2), (mo.Backprop(), CG))
    graph.draw(tmp_path / "graph.png")
    graph.draw(tmp_path / "graph.svg")
    assert (tmp_path / "graph.png").stat().st_size > 5000
    text = (tmp_path / "graph.svg").read_text()
    assert all(word in text for word in ("low", "Implicit, 2 steps", "Backprop, 3 steps"))


def test_going_back_winds_the_data_to_where_it_was() -> None:
    """After the data has begun again; a generator goes on."""
    graph = meta_weight_net(steps=2)
    losses = [float(graph.step()["learner/loss"]) for _ in range(4)]
    state = copy.deepcopy(graph.state_dict())
    after = [float(graph.step()["learner/loss"]) for _ in range(3)]
    graph.load_state_dict(state)
    assert [float(graph.step()["learner/loss"]) for _ in range(3)] == after
    assert len({*losses, *after}) == 7
    endless = ((torch.ones(()) * k) for k in itertools.count())
    low = level(
        "low", 1.0, lambda s, x: {"loss": (s.low() - s.top() * x) ** 2, "x": x.sum()}, data=endless
    )
    graph = mo.LevelGraph([mo.Edge(level("top", 1.0, lambda s, _: s.low() ** 2, 0.0), low)])
    state = graph.state_dict()
    assert [float(graph.step()["low/x"]) for _ in range(2)] == [0, 1]
    graph.load_state_dict(state)
    assert float(graph.step()["low/x"]) == 2


def test_a_data_loader_feeds_a_level() -> None:
    """Its batches are lists, and the last one would be smaller."""
    x = torch.randn(10, 3)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x), batch_size=4, drop_last=True
    )
    low = level(
        "low",
        torch.ones(3),
        lambda s, b: coupled(s.low(), [s.top()], [], b[0].mean(0)),
        data=loader,
    )
    top = level("top", torch.ones(3), lambda s, _: coupled(s.top(), [], [s.low()], torch.ones(3)))
    graph = mo.LevelGraph([mo.Edge(top, low, steps=3)])
    other_low = level("low", torch.ones(3), low.loss, data=[[x[:4]], [x[4:8]]])
    other = mo.LevelGraph([mo.Edge(level("top", torch.ones(3), top.loss), other_low, steps=3)])
    for _ in range(2):
        assert_close(graph.step(), other.step(), 0.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_derivative_that_does_not_arrive_is_missed_also_when_batches_accumulate(
    accumulate: int,
) -> None:
    """The optimizer's observations are constants.

    So nothing of the lower level's steps depends on the upper one.
    """
    low = mo.Level(
        "low",
        nn.Linear(2, 1),
        lambda s, x: ((s.low(x) - s.up(x)) ** 2).mean(),
        SGD(0.1),
        data=[torch.ones(3, 2)],
    )
    up = mo.Level(
        "up",
        nn.Linear(2, 1),
        lambda s, x: (s.low(x) ** 2).mean(),
        SGD(0.1),
        data=[torch.ones(3, 2)],
        accumulate=accumulate,
    )
    with pytest.raises(
        ValueError, match="level 'up': no derivative arrives at its parameter 'weight'"
    ):
        mo.LevelGraph([mo.Edge(up, low, differentiate=mo.FirstOrder())]).step()


@pytest.mark.parametrize(
    ("mode", "rule"),
    [
        ("eval", mo.Backprop()),
        ("eval", mo.FiniteDifference()),
        ("derivative", mo.Backprop()),
        ("derivative", mo.FiniteDifference()),
        ("numpy", mo.FiniteDifference()),
    ],
    ids=str,
)
def test_buffers_stay_constant_where_batches_accumulate(mode: str, rule: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.train(mode != "eval")
    data = [torch.randn(3, 2) for _ in range(4)]

    def loss(levels: Any, x: Tensor) -> Tensor:
        value = ((levels.low(x) - levels.up(x)) ** 2).mean()
        if mode == "derivative":
            value = value + (torch.func.grad(lambda x: (levels.low(x) ** 3).sum())(x) ** 2).mean()
        if mode == "numpy":
            value = value * float(levels.low.buffers["1.running_var"].numpy().min() > -1)
        return value

    low = mo.Level("low", model, loss, SGD(0.1), data=data, accumulate=2)
    up = mo.Level("up", nn.Linear(2, 2), lambda s, x: (s.low(x) ** 2).mean(), SGD(0.1), data=data)
    graph = mo.LevelGraph([mo.Edge(up, low, differentiate=rule)])
    assert all(value.isfinite() for value in graph.step().values())


# What a loss did on its first batch, when the graph was built, need not be what it does later.


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "rule",
    [mo.T1T2(), mo.SAMA(), mo.Implicit(mo.Direct()), mo.Backprop()],
    ids=lambda rule: type(rule).__name__,
)
def test_a_loss_may_depend_on_more_on_a_later_batch(rule: Any, accumulate: int) -> None:
    """On a level's parameters that it called, but did not use, on the first one."""

    def loss(levels: Any, is_all: Tensor) -> Tensor:
        distance = (levels.low() - 1).square().sum()
        return levels.up().square().sum() + (distance if is_all else 0)

    def slope(first: bool) -> Any:
        low = level("low", torch.tensor([0.1]), lambda s, _: (s.low() - s.up()).square().sum() / 2)
        data = [torch.tensor(first)] * accumulate + [torch.tensor(True)] * accumulate
        up = level("up", torch.tensor([0.5]), loss, 0.0, data=data, accumulate=accumulate)
        graph = mo.LevelGraph([mo.Edge(up, low, steps=3, start="restart", differentiate=rule)])
        graph.step()
        return graph.hypergradient("up", after_steps=True)

    assert_close(slope(False), slope(True), 1e-12)


@pytest.mark.parametrize("kind", ["weight norm", "attention"])
def test_a_loss_may_call_its_model_on_later_batches_alone(kind: str) -> None:
    """Torch's derivative of weight norm's is off by 6e-4 here; attention's kernel has none."""

    def slope(first: bool) -> Any:
        torch.manual_seed(0)
        if kind == "attention":
            model: nn.Module = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0)
        else:
            model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        x = torch.randn(6, 4)

        def loss(levels: Any, is_all: Tensor) -> Tensor:
            size = sum(p.square().sum() for p in levels.low.params.values()) / 10
            if is_all:
                return size + ((levels.up(levels.low(x)).sin() - 1) ** 2).mean()
            return size + 0 * sum(p.sum() for p in levels.up.params.values())

        data = [torch.tensor(first), *[torch.tensor(True)] * 3]
        low = mo.Level("low", model, loss, SGD(0.3), data=data)
        up = mo.Level(
            "up",
            nn.Linear(4, 4),
            lambda s, _: (
                s.up(torch.ones(4)).square().sum()
                + sum((p**3).sum() for p in s.low.params.values())
            ),
            SGD(0.0),
        )
        graph = mo.LevelGraph([mo.Edge(up, low, steps=2, start="restart")])
        graph.step()
        return graph.hypergradient("up", after_steps=True)

    assert_close(slope(False), slope(True), 1e-12)

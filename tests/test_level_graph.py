"""What a level graph does besides nesting: real models, optimizers as levels, shared levels, copies, starts, statistics."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from level_problems import CG, Value, batches, coupled, level
from problems import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import metaopt as mo
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")


def value(graph: mo.LevelGraph, name: str) -> Tensor:
    return graph.program.levels[name].model.value.detach().clone()


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
    return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(-1) == y).double().mean()}


def examples(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 4, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(count)]


def meta_weight_net(**options: Any) -> mo.LevelGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    weight_net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    learner = mo.Level("learner", model, learner_loss, SGD(lr=0.3, momentum=0.9), data=examples(5, 1))
    weights = mo.Level("weights", weight_net, meta_loss, Adam(lr=0.05), data=examples(4, 2))
    return mo.LevelGraph([mo.Edge(upper=weights, lower=learner, **options)])


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_weight_net_equals_a_loop_by_hand(steps: int, look_ahead: bool) -> None:
    """Three rounds with torch.optim's formulas; 1e-10: float64 rounding of some thousand operations."""
    graph = meta_weight_net(steps=steps, look_ahead=look_ahead)
    model, weight_net = (graph.program.levels[name].model for name in ("learner", "weights"))
    params, theta = leaf(dict(model.named_parameters())), leaf(dict(weight_net.named_parameters()))
    velocity = [None] * len(params)
    adam = torch.optim.Adam(theta.values(), lr=0.05)
    train, clean = itertools.cycle(examples(5, 1)), itertools.cycle(examples(4, 2))

    def learn(params: Any, velocity: Any, theta: Any, rows: Any) -> Any:
        for x, y in rows:
            losses = F.cross_entropy(functional_call(model, params, (x,)), y, reduction="none")
            w = functional_call(weight_net, theta, (losses.detach()[:, None],))[:, 0]
            grads = torch.autograd.grad((w * losses).mean(), list(params.values()), create_graph=True)
            velocity = [g if v is None else 0.9 * v + g for v, g in zip(velocity, grads, strict=True)]
            params = {name: p - 0.3 * v for (name, p), v in zip(params.items(), velocity, strict=True)}
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
        assert set(metrics) == {"learner/loss", "weights/loss", "weights/accuracy", "weights/gradient norm"}
        assert_close(dict(model.named_parameters()), params, 1e-10)
        assert_close(dict(weight_net.named_parameters()), theta, 1e-10)


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
    a = level("a", start[0], lambda s, x: coupled(s.a(), [], [s.low()], x), 0.05, data=batches(2, 1))
    b = level("b", start[1], lambda s, x: coupled(s.b(), [], [s.low()], 2 * x), 0.05, data=batches(3, 2))
    low = level("low", start[2], lambda s, x: coupled(s.low(), [s.a(), s.b()], [], x), 0.05, data=batches(5, 3), momentum=0.5)
    ends = zip((a, b), steps, rules, strict=True)
    return mo.LevelGraph([mo.Edge(upper, low, steps=count, differentiate=rule) for upper, count, rule in ends])


def test_two_uppers_of_one_level_see_the_steps_since_their_own_last_one() -> None:
    """ "a" every 3 steps of the lower level, "b" every 2: in six of these, "a" moves twice and "b" three times."""
    graph = shared((3, 2), (mo.Backprop(), mo.FirstOrder()))
    start, rows = batches(3, 5), [itertools.cycle(batches(n, n - 1 if n < 5 else 3)) for n in (2, 3, 5)]
    a, b, low = start
    history, velocity = [], torch.zeros(3)

    def replay(since: int, a_now: Any, b_now: Any, first_order: bool) -> Tensor:
        w, v = history[since][0], history[since][1]
        for _, _, a_then, b_then, x in history[since:]:
            w = w.clone() if w.requires_grad else w.clone().requires_grad_()
            (g,) = torch.autograd.grad(
                coupled(w, [a_then if a_now is None else a_now, b_then if b_now is None else b_now], [], x), w, create_graph=True
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
    graph.step()
    assert_close([value(graph, name) for name in ("low", "a", "b")], [low, a, b], 1e-10)


def test_shared_levels_are_attached_once_and_each_upper_gets_its_own_part() -> None:
    """At a point both uppers see the same Hessian: da = -H^-1 C_a, solved densely here."""
    graph = shared((1, 1), (CG, CG))
    a, b, low = batches(3, 5)
    x = batches(5, 3)[0]
    for name, own, scale, row in (("a", a, 1, batches(2, 1)[0]), ("b", b, 2, batches(3, 2)[0])):

        def gradient(w: Tensor, at: Tensor, name: str = name) -> Tensor:
            return torch.func.grad(lambda w: coupled(w, [at, b] if name == "a" else [a, at], [], x))(w)

        hessian, mixed = torch.func.jacrev(gradient, (0, 1))(low, own)
        response = -torch.linalg.solve(hessian, mixed)
        direct, through = torch.func.grad(lambda w, at: coupled(at, [], [w], scale * row), (1, 0))(low, own)
        assert_close(graph.hypergradient(name)["value"], direct + response.T @ through, 1e-9)


def test_a_layered_graph_costs_as_much_as_it_has_edges_not_paths(monkeypatch: Any) -> None:
    """16 levels wide and 4 deep: 528 edges below each top level, 4096 paths. What is counted is pullbacks: one a level below."""
    calls = []
    original = mo.Implicit.pull_back
    monkeypatch.setattr(mo.Implicit, "pull_back", lambda self, *args: calls.append(1) or original(self, *args))

    def graph(wide: int, deep: int) -> mo.LevelGraph:
        layers = [
            [
                level(f"v{i}_{j}", 0.1 * (i + j), layer_loss(i, j, wide, deep), optimizer=SGD(0.01))
                for j in range(wide)
            ]
            for i in range(deep)
        ]
        pairs = [pair for upper, lower in itertools.pairwise(layers) for pair in itertools.product(upper, lower)]
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
    upper = level("upper", a, lambda s, x: coupled(s.upper(), [], [s.low()], x), 0.05, data=batches(2, 1))
    low = level("low", w0, lambda s, x: coupled(s.low(), [s.upper()], [], x), 0.05, data=batches(4, 2), momentum=0.5)
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


def copies(count: int, *, loop: bool = False, norm: bool = False) -> tuple[mo.LevelGraph, list[Any], list[Any]]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), *([nn.LayerNorm(5)] * norm), nn.Tanh(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers)
    rows = [[examples(count, 10 * seed + s) for s in range(3)] for seed in range(2)]
    stacked = [[mo.tree.stack(row) for row in part] for part in rows]
    options = {"start": "upper", "steps": 2}
    task = mo.Level("task", copy.deepcopy(model), lambda s, b: F.cross_entropy(s.task(b[0]), b[1]), SGD(0.4), stacked[0], copies=count)
    meta = mo.Level("meta", model, lambda s, b: F.cross_entropy(s.task(b[0]), b[1]), SGD(0.1), stacked[1])
    return mo.LevelGraph([mo.Edge(meta, task, **options)]), *rows


@pytest.mark.parametrize("norm", [False, True])
def test_copies_are_maml(norm: bool) -> None:
    """The mean over tasks of the gradient of each; with a norm layer, where torch's derivative of a vmapped mean is wrong."""
    graph, support, query = copies(4, norm=norm)
    net = mo.functional(graph.program.levels["meta"].model)

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
    assert_close(metrics["meta/loss"], torch.stack([task_loss(net_params(graph, expected), task) for task in tasks]).mean().detach(), 1e-10)


def net_params(graph: mo.LevelGraph, grads: Any) -> Any:
    """Return the meta level's parameters before the step that was just made."""
    return {name: p.detach() + 0.1 * grads[name] for name, p in graph.program.levels["meta"].model.named_parameters()}


def test_copies_with_convolutions_run_one_after_the_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2))
    data = [(torch.randn(3, 5, 1, 4), torch.randint(2, (3, 5)))]

    def loss(levels: Any, batch: Any) -> Tensor:
        return F.cross_entropy(levels.task(batch[0]), batch[1]) + 0.1 * sum(
            (p - q).square().sum() for p, q in zip(levels.task.params.values(), levels.meta.params.values(), strict=True)
        )

    def build() -> mo.LevelGraph:
        task = mo.Level("task", copy.deepcopy(model), loss, SGD(0.1), data, copies=3)
        meta = mo.Level("meta", copy.deepcopy(model), lambda s, b: F.cross_entropy(s.task(b[0]), b[1]), SGD(0.1), data)
        return mo.LevelGraph([mo.Edge(meta, task, steps=2, differentiate=CG)])

    graph = build()
    assert graph.program.loops == {"meta"}
    batched = build()
    object.__setattr__(batched.program, "loops", frozenset())
    for _ in range(2):
        assert_close(graph.step(), batched.step(), 1e-8)

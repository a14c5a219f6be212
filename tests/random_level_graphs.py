"""Random graphs of levels against a simulation.

Hand-written loops, plain autograd, and each rule's formula written out.

Of the library only the order of execution is taken (`graph.plan.timetable`). More graphs than the
suite runs:

    python tests/random_level_graphs.py 0 300
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metaopt as mo
from optimizers import SGD, Adam, RMSprop

POINT = (mo.Implicit, mo.T1T2, mo.FiniteDifference, mo.SAMA)
Scene = dict[str, Tensor]  # "name" -> parameters, "name.ema" -> their average


# What a level is


class Vector(nn.Module):
    """Parameters in two tensors, and an average of them that every call moves on."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.a, self.b = nn.Parameter(start[:-1].clone()), nn.Parameter(start[-1].clone())
        self.register_buffer("ema", torch.zeros_like(start))

    def forward(self) -> Tensor:
        w = torch.cat([self.a, self.b[None]])
        self.ema = (self.ema + w) / 2
        return w


@dataclass
class Spec:
    """A level as numbers: its loss, optimizer, data and what it reads.

    Of the levels in `averages` their averages.
    """

    name: str
    start: Tensor
    reads: list[str]
    averages: set[str]
    optimizer: tuple[str, float]
    data: list[Tensor]
    accumulate: int
    warmup: int
    matrices: dict[str, tuple[Tensor, str]] = field(default_factory=dict)

    def loss(self, w: Tensor, others: dict[str, Tensor], x: Tensor) -> Tensor:
        total = (
            0.6 * (w - torch.tanh(x.sum() * self.start)).square().sum()
            + 0.1 * (w * x.sum().cos()).sin().sum()
        )
        for name, value in others.items():
            matrix, kind = self.matrices[name]
            z = matrix @ value
            if kind == "tanh":
                total = total + 0.7 * (torch.tanh(z) * w).sum()
            elif kind == "sin":
                total = total + 0.5 * torch.sin(z + w).sum()
            elif kind == "square":
                total = total + 0.2 * (w - z).square().sum()
            else:
                total = total + 0.3 * (w.tanh() * torch.exp(0.2 * torch.tanh(z))).sum()
        return total

    def move(self, grad: Tensor, memory: Any, w: Tensor) -> tuple[Tensor, Any]:
        """Return (parameters, memory) after one application of the optimizer."""
        (kind, lr), t = self.optimizer, memory["t"] + 1
        m, v = memory["m"], memory["v"]
        if kind == "momentum":
            m = 0.8 * m + grad
            step = m
        elif kind == "adam":
            m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad * grad
            step = (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)
        elif kind == "rmsprop":
            v = 0.9 * v + 0.1 * grad * grad
            step = grad / (v.sqrt() + 1e-3)
        else:
            step = grad
        return w - lr * step, {"t": t, "m": m, "v": v}

    def fresh(self) -> Any:
        zeros = torch.zeros_like(self.start)
        return {"t": 0, "m": zeros, "v": zeros}


@dataclass
class Link:
    """An edge as numbers."""

    upper: str
    lower: str
    steps: int
    rule: Any
    start: str
    look_ahead: bool


def draw_rule(rng: random.Random) -> Any:
    rules = [
        mo.Backprop(),
        mo.Backprop(memory="steps"),
        mo.Backprop(memory=mo.Revolve(rng.choice([1, 2, 3]))),
        mo.Backprop(window=rng.choice([1, 2])),
        mo.FirstOrder(),
        mo.ForwardMode(),
        mo.Implicit(mo.Direct()),
        mo.Implicit(mo.ConjugateGradient(max_steps=60, rtol=1e-14)),
        mo.T1T2(),
        mo.FiniteDifference(1e-4),
        mo.SAMA(1e-4),
    ]
    return rng.choices(rules, [18, 8, 10, 8, 6, 6, 12, 10, 10, 8, 6])[0]


def generate(seed: int) -> tuple[dict[str, Spec], list[Link]]:
    rng = random.Random(seed)
    n = rng.choice([2, 2, 3, 3, 3, 4, 4])
    names = [f"l{i}" for i in range(n)]
    edges = {(rng.randrange(i) if rng.random() < 0.4 else i - 1, i) for i in range(1, n)}
    if rng.random() < 0.5:
        for _ in range(rng.choice([1, 2])):
            i = rng.randrange(n - 1)
            edges.add((i, rng.randrange(i + 1, n)))
    below: dict[int, set[int]] = {i: set() for i in range(n)}
    for i in reversed(range(n)):
        for lower in {b for a, b in edges if a == i}:
            below[i] |= {lower} | below[lower]
    rates = [1] * n
    for i in range(1, n):
        common = math.lcm(*[rates[a] for a, b in edges if b == i])
        rates[i] = common * rng.choice([1, 1, 2, 3]) if common <= 4 else common
    size = rng.choice([2, 3])
    sizes = [size] * n if rng.random() < 0.3 else [rng.choice([2, 3, 4]) for _ in names]
    rules = {i: draw_rule(rng) for i in range(n)}
    # Averages of levels whose rule looks at a point are refused; a few such graphs are enough.
    averaged = {
        i for i in range(n) if rng.random() < (0.03 if i and isinstance(rules[i], POINT) else 0.4)
    }
    specs = {}
    for i, name in enumerate(names):
        g = torch.Generator().manual_seed(rng.randrange(1 << 30))
        reads = {a for a, b in edges if b == i} | {
            j for j in range(n) if i in below[j] and rng.random() < 0.3
        }
        reads |= {j for j in below[i] if rng.random() < (0.85 if (i, j) in edges else 0.25)}
        seen = [names[j] for j in sorted(reads)]
        kind = rng.choice(["sgd", "momentum", "adam", "rmsprop"])
        spec = Spec(
            name,
            torch.randn(sizes[i], generator=g) * 0.7,
            seen,
            {
                names[j]
                for j in (reads | {i}) & averaged
                if (j, i) not in edges and rng.random() < 0.5
            },
            (kind, rng.choice([0.05, 0.1, 0.2] if kind in ("sgd", "momentum") else [0.02, 0.05])),
            [torch.randn(3, generator=g) for _ in range(rng.choice([1, 2, 3, 5]))],
            2 if rng.random() < 0.12 else 1,
            int(rng.random() < 0.1),
        )
        for j in reads | {i}:
            matrix = torch.randn(sizes[i], sizes[j], generator=g) * 0.6
            spec.matrices[names[j]] = matrix, rng.choice(["tanh", "sin", "square", "product"])
        specs[name] = spec
    links, look_ahead = [], rng.random() < 0.1
    for a, b in sorted(edges):
        start = "continue"
        if sum(lower == b for _, lower in edges) == 1 and rng.random() < 0.35:
            start = rng.choice(["restart", "upper"]) if sizes[a] == sizes[b] else "restart"
        links.append(
            Link(names[a], names[b], rates[b] // rates[a], rules[b], start, look_ahead and a == 0)
        )
    return specs, links


def build(specs: dict[str, Spec], links: list[Link]) -> mo.LevelGraph:
    levels = {}
    for name, spec in specs.items():

        def loss(levels: Any, x: Tensor, spec: Spec = spec) -> Tensor:
            w = getattr(levels, spec.name)()
            others = {
                other: getattr(levels, other).buffers["ema"]
                if other in spec.averages
                else getattr(levels, other)()
                for other in [*spec.reads, *spec.averages & {spec.name}]
            }
            return spec.loss(w, others, x)

        kind, lr = spec.optimizer
        optimizer = {
            "sgd": SGD(lr),
            "momentum": SGD(lr, momentum=0.8),
            "adam": Adam(lr, (0.8, 0.95), eps=1e-3),
            "rmsprop": RMSprop(lr, 0.9, eps=1e-3),
        }[kind]
        options = {"accumulate": spec.accumulate, "warmup": spec.warmup, "allow_unused": True}
        levels[name] = mo.Level(name, Vector(spec.start), loss, optimizer, spec.data, **options)
    return mo.LevelGraph(
        [
            mo.Edge(
                levels[link.upper],
                levels[link.lower],
                steps=link.steps,
                start=link.start,
                differentiate=link.rule,
                look_ahead=link.look_ahead,
            )
            for link in links
        ]
    )


# The simulation


def constant(values: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, values)


class AtPoint(torch.autograd.Function):
    """The end of some steps, with the derivative that a rule gives it.

    Of T(w, leaves) at w = end.
    """

    @staticmethod
    def forward(ctx: Any, end: Tensor, rule: Any, total: Any, move: Any, *leaves: Tensor) -> Tensor:
        ctx.rule, ctx.total, ctx.move = rule, total, move
        out = end.clone()
        ctx.save_for_backward(out, *leaves)
        return out

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        out, *given = ctx.saved_tensors
        rule, nothing = ctx.rule, (None,) * (3 + len(given))
        with torch.enable_grad():
            w = out.clone() if out.requires_grad else out.detach().requires_grad_()
            leaves = [leaf.clone() if leaf.requires_grad else leaf for leaf in given]
            needed = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
            if not needed:
                return None, *nothing

            def slopes(at: Tensor, variables: list[Tensor]) -> Any:
                return torch.autograd.grad(
                    ctx.total(at, leaves), variables, create_graph=True, allow_unused=True
                )

            if isinstance(rule, mo.FiniteDifference | mo.SAMA):
                x = v
                if isinstance(rule, mo.SAMA):
                    # Apart from the leaves below: a slope in these is at a displacement that does
                    # not depend on them.
                    apart, here = (
                        [leaf.clone() if leaf.requires_grad else leaf for leaf in given],
                        w.clone(),
                    )
                    (grad,) = torch.autograd.grad(ctx.total(here, apart), here, create_graph=True)
                    grad = grad.clone() if grad.requires_grad else grad.detach().requires_grad_()
                    (x,) = torch.autograd.grad(
                        ctx.move(grad, here), grad, v, create_graph=True, allow_unused=True
                    )
                if x is None or x.norm() == 0:
                    return None, *nothing
                e, sign = rule.radius / x.norm(), 1 if isinstance(rule, mo.SAMA) else -1
                sides = [slopes(w + s * e * x, [leaves[i] for i in needed]) for s in (1, -1)]
                bars = [
                    None if a is None else sign * (a - b) / (2 * e)
                    for a, b in zip(*sides, strict=True)
                ]
            else:
                (grad,) = slopes(w, [w])
                x = v
                if isinstance(rule, mo.Implicit):
                    rows = [torch.autograd.grad(part, w, create_graph=True)[0] for part in grad]
                    x = torch.linalg.solve(torch.stack(rows), v)
                chosen = [leaves[i] for i in needed]
                bars = torch.autograd.grad(grad, chosen, -x, create_graph=True, allow_unused=True)
        found: list[Any] = [None] * len(given)
        for i, bar in zip(needed, bars, strict=True):
            found[i] = bar
        return (None, None, None, None, *found)


@dataclass
class Event:
    """Some steps of a level: what was there before, and its state afterwards."""

    level: str
    steps: int
    scene: Scene
    states: Any
    position: dict[str, int]
    after: Any
    begins: bool


class Simulation:
    """The graph's steps and hypergradients by hand."""

    def __init__(self, specs: dict[str, Spec], links: list[Link], order: Any):
        self.specs, self.links, self.order = specs, links, order
        # for its rule, and its start if it is the only one
        self.above = {link.lower: link for link in links}
        self.states = {name: self.fresh(name) for name in order.members[None]}
        self.position = dict.fromkeys(specs, 0)

    def fresh(self, name: str) -> Any:
        start = self.specs[name].start
        below = {lower: self.fresh(lower) for lower in self.order.members.get(name, ())}
        zeros = torch.zeros_like(start)
        return {
            "w": start.clone(),
            "ema": zeros,
            "memory": self.specs[name].fresh(),
            "n": 0,
            "below": below,
        }

    def shown(self, states: Any, deep: bool = True) -> Scene:
        scene: Scene = {}
        for name, state in states.items():
            scene |= {name: state["w"], f"{name}.ema": state["ema"]} | (
                self.shown(state["below"]) if deep else {}
            )
        return scene

    def moved(self, position: dict[str, int], name: str, steps: int) -> dict[str, int]:
        """Return where all data stands after steps of a level."""
        used = {
            other: self.order.total[other] // self.order.total[name] * self.specs[other].accumulate
            for other in self.order.inside[name] | {name}
        }
        return {other: at + steps * used.get(other, 0) for other, at in position.items()}

    def own(self, name: str, scene: Scene, position: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Return (the level's loss, its average afterwards)."""
        spec, scene, losses = self.specs[name], dict(scene), []
        for i in range(spec.accumulate):
            scene[f"{name}.ema"] = (scene[f"{name}.ema"] + scene[name]) / 2
            names = [*spec.reads, *spec.averages & {name}]
            others = {
                other: scene[f"{other}.ema" if other in spec.averages else other] for other in names
            }
            losses.append(
                spec.loss(scene[name], others, spec.data[(position[name] + i) % len(spec.data)])
            )
        return sum(losses) / spec.accumulate, scene[f"{name}.ema"]

    def turn(
        self, owner: Any, scene: Scene, states: Any, position: Any, at_point: bool = False
    ) -> tuple[Scene, Any, Any, list]:
        """Let the levels inside one step of `owner` move."""
        states, scene = dict(states), {**scene, **self.shown(states, deep=owner is None)}
        history: list[Event] = []
        taken = dict.fromkeys(states, 0)
        for name, steps in self.order.events[owner]:
            begins = taken[name] % self.above[name].steps == 0 if name in self.above else True
            taken[name] += steps
            before, stood, at = dict(scene), dict(states), dict(position)
            states[name] = self.advance(
                owner, name, steps, scene, states, at, begins, at_point, history
            )
            position = self.moved(at, name, steps)
            scene = {
                **scene,
                **self.exposed(owner, name, scene, states[name], self.moved(at, name, steps - 1)),
            }
            history.append(Event(name, steps, before, stood, at, states[name], begins))
        return scene, states, position, history

    def exposed(self, viewpoint: Any, name: str, scene: Scene, state: Any, position: Any) -> Scene:
        inside = self.order.inside[name]
        outside = [
            self.specs[other] for other in self.specs if other not in inside and other != name
        ]
        if not any(inside & set(spec.reads) for spec in outside):
            return self.shown({name: state}, deep=False)
        if viewpoint is not None and isinstance(self.above[name].rule, POINT):
            scene = self.turn(
                name,
                {**scene, **self.shown({name: state}, deep=False)},
                state["below"],
                position,
                True,
            )[0]
            return {key: scene[key] for other in inside | {name} for key in (other, f"{other}.ema")}
        return self.shown({name: state})

    def begun(self, name: str, scene: Scene, state: Any) -> Any:
        link = self.above.get(name)
        if link is None or link.start == "continue":
            return state
        first = self.fresh(name)
        w = first["w"] if link.start == "restart" else scene[link.upper]
        return {**state, "w": w, "memory": first["memory"], "ema": first["ema"]}

    def total(
        self,
        name: str,
        w: Tensor,
        scene: Scene,
        state: Any,
        position: Any,
        history: Any,
        place: str,
    ) -> Any:
        """Return (T(w), states below, average) after the levels below have moved.

        At the "end" of steps, those whose rule looks at a point stay. "around" it, where
        differences are taken, they step, and those that are shared step again.
        """
        scene, below = {**scene, name: w, f"{name}.ema": state["ema"]}, state["below"]
        if self.order.shared[name]:
            scene = self.replayed(name, w, scene, history, place)
        if below:
            scene, below, *_ = self.turn(name, scene, below, position, place == "end")
        loss, ema = self.own(name, scene, position)
        return loss, below, ema

    def replayed(
        self, name: str, w: Tensor, scene: Scene, history: list[Event], place: str
    ) -> Scene:
        """Let what the level shares move again as it did since its last step, as functions of w."""
        shared = self.order.shared[name]
        last = max((i for i, event in enumerate(history) if event.level == name), default=-1)
        again, states, scene = list(history[: last + 1]), None, dict(scene)
        for event in history[last + 1 :]:
            if event.level not in shared:
                again.append(event)
                continue
            states = states or {other: event.states[other] for other in shared}
            here = {**event.states, **states}
            seen = {
                **event.scene,
                **self.shown({other: here[other] for other in shared}, deep=False),
                name: w,
            }
            is_point = isinstance(self.above[event.level].rule, POINT) and place != "around"
            stand = {**here, event.level: event.after} if is_point else here
            state = self.advance(
                name,
                event.level,
                event.steps,
                seen,
                stand,
                event.position,
                event.begins,
                is_point,
                again,
            )
            states[event.level] = state
            scene |= self.exposed(
                name,
                event.level,
                seen,
                state,
                self.moved(event.position, event.level, event.steps - 1),
            )
            again.append(
                Event(event.level, event.steps, seen, here, event.position, state, event.begins)
            )
        return scene

    def advance(
        self,
        viewpoint: Any,
        name: str,
        steps: int,
        scene: Scene,
        states: Any,
        position: Any,
        begins: bool,
        at_point: bool,
        history: Any,
    ) -> Any:
        """Return the state of a level after its steps, as `viewpoint` differentiates it."""
        state, history = states[name], list(history)
        rule = None if viewpoint is None else self.above[name].rule
        is_point = isinstance(rule, POINT)
        if begins and not (at_point and is_point):
            state = self.begun(name, scene, state)
        fixed = constant((scene, history))
        constants = 0
        if rule is None or is_point:
            constants = steps
        elif isinstance(rule, mo.Backprop) and rule.window is not None:
            constants = max(steps - rule.window, 0)
        for i in range(0 if at_point and is_point else steps):
            at = self.moved(position, name, i)
            if i < constants:
                state = constant(self.one(name, fixed[0], constant(state), at, fixed[1], rule))
            else:
                state = self.one(name, scene, state, at, history, rule)
        if is_point:
            last = self.moved(position, name, steps - 1)
            return {
                **constant(state),
                "w": self.attached(name, rule, scene, constant(state), last, history),
            }
        return state

    def one(
        self, name: str, scene: Scene, state: Any, position: Any, history: Any, rule: Any
    ) -> Any:
        """Return the state after one step."""
        spec, w = self.specs[name], state["w"]
        with torch.enable_grad():
            w = w if w.requires_grad else w.clone().requires_grad_()
            at = w.clone()  # so that the gradient is the derivative in this place alone
            loss, below, ema = self.total(name, at, scene, state, position, history, "steps")
            (grad,) = torch.autograd.grad(loss, at, create_graph=True, allow_unused=True)
            grad = torch.zeros_like(at) if grad is None else grad
            new, memory = spec.move(
                grad.detach() if isinstance(rule, mo.FirstOrder) else grad, state["memory"], w
            )
            # the average is one of `at`, whose graph goes on to w
            if state["n"] < spec.warmup:
                new, memory = w, state["memory"]
        return {"w": new, "ema": ema, "memory": memory, "n": state["n"] + 1, "below": below}

    def attached(
        self, name: str, rule: Any, scene: Scene, end: Any, position: Any, history: Any
    ) -> Tensor:
        leaves, structure = pytree.tree_flatten(
            ({key: leaf for key, leaf in scene.items() if key != name}, history)
        )
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        place = "around" if isinstance(rule, mo.FiniteDifference | mo.SAMA) else "end"

        def total(w: Tensor, tensors: list[Tensor]) -> Tensor:
            filled = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            seen, events = pytree.tree_unflatten(filled, structure)
            return self.total(name, w, seen, end, position, events, place)[0]

        def move(grad: Tensor, w: Tensor) -> Tensor:
            return (
                w
                if end["n"] < self.specs[name].warmup
                else self.specs[name].move(grad, end["memory"], w)[0]
            )

        return AtPoint.apply(end["w"], rule, total, move, *[leaves[i] for i in places])

    # What is compared

    def step(self) -> None:
        looks = {link.upper for link in self.links if link.look_ahead}
        tops = {name for name in self.specs if name not in self.above}
        scene, states, position = self.shown(self.states), dict(self.states), dict(self.position)
        history: list[Event] = []
        taken = dict.fromkeys(states, 0)
        for name, steps in self.order.events[None]:
            begins = taken[name] % self.above[name].steps == 0 if name in self.above else True
            taken[name] += steps
            before, stood, at = dict(scene), dict(states), dict(position)
            state = self.begun(name, scene, states[name]) if begins else states[name]
            for i in range(steps):
                here = self.moved(at, name, i)
                new = constant(self.one(name, scene, state, here, history, None))
                if name in looks & tops:
                    seen = {**scene, name: new["w"]}
                    new["below"] = constant(self.turn(name, seen, state["below"], here)[1])
                state = new
            states[name], position = state, self.moved(at, name, steps)
            scene = {**scene, **self.shown({name: state})}
            history.append(Event(name, steps, before, stood, at, state, begins))
        self.states, self.position = states, position

    def hypergradient(self, name: str, after_steps: bool) -> Tensor:
        """Return that of a level that shares none."""
        state = self.state(name, self.states)
        w = state["w"].clone().requires_grad_()
        place = "steps" if after_steps else "end"
        loss, *_ = self.total(
            name, w, self.shown(self.states), state, dict(self.position), [], place
        )
        (grad,) = torch.autograd.grad(loss, w, allow_unused=True)
        return torch.zeros_like(w) if grad is None else grad

    def state(self, name: str, states: Any) -> Any:
        if name in states:
            return states[name]
        return next(
            (
                found
                for state in states.values()
                if (found := self.state(name, state["below"])) is not None
            ),
            None,
        )


pytree.register_pytree_node(
    Event,
    lambda event: (
        [event.scene, event.states, event.after],
        (event.level, event.steps, event.position, event.begins),
    ),
    lambda parts, fixed: Event(
        fixed[0], fixed[1], parts[0], parts[1], fixed[2], parts[2], fixed[3]
    ),
)


def note_loss(told: list[Any], level: str, count: int, metrics: dict[str, Tensor]) -> None:
    told.append((level, count, metrics["loss"]))


def compare(seed: int, steps: int = 3) -> str:
    """Return "same" or why the graph is refused.

    Raises AssertionError if a number differs from the simulation's.
    """
    specs, links = generate(seed)
    try:
        graph = build(specs, links)
        graph.hypergradient("l0")
    except ValueError as error:
        return str(error)
    simulation = Simulation(specs, links, graph.plan.timetable)
    # A difference with radius 1e-4 makes 1e-12 of a rounding error of 1e-16, and one of another
    # difference 1e-8 of that.
    differences = sum(isinstance(link.rule, mo.FiniteDifference | mo.SAMA) for link in links)
    tolerance = (1e-7, 1e-5, 1e-3)[min(differences, 2)]

    def check(found: Any, expected: Tensor, what: str) -> None:
        row = torch.cat([found["a"], found["b"][None]])
        error = ((row - expected).abs().max() / (1e-3 + expected.abs().max())).item()
        assert error < tolerance, (
            f"seed {seed}, {what}: {row.tolist()}, expected {expected.tolist()}"
        )

    for step in range(steps):
        for name in specs:
            if not graph.plan.timetable.shared[name]:
                for after in (False, True):
                    expected = simulation.hypergradient(name, after)
                    found = graph.hypergradient(name, after_steps=after)
                    check(
                        found,
                        expected,
                        f"hypergradient of {name} after {step} steps, after_steps={after}",
                    )
        told: list[tuple[str, int, float]] = []
        metrics = graph.step(partial(note_loss, told))
        simulation.step()
        for name, total in graph.plan.timetable.total.items():
            its = [(count, loss) for level, count, loss in told if level == name]
            first = step * total + 1
            assert [count for count, _ in its] == [*range(first, first + total)]
            assert its[-1][1] == metrics[f"{name}/loss"], f"seed {seed}, told of {name}"
        for name in specs:
            check(
                graph.params(name),
                simulation.state(name, simulation.states)["w"],
                f"{name} after step {step}",
            )
    return "same"


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found: Counter[str] = Counter()
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            found[re.sub(r"l\d", "l", compare(number))[:90]] += 1
        except Exception as error:
            found[type(error).__name__] += 1
            print(number, type(error).__name__, str(error)[:400], flush=True)
    for text, count in found.most_common():
        print(count, text)

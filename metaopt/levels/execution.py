"""Running a graph: every function here is a pure function of tensors.

The total loss of a level, T(w) = L(w, levels above, responses of the levels below to w), is what
its optimizer minimises and what the rules differentiate. A response is an inner loop on the total
loss of the lower level: so levels nest.

State of a level: {"params", "optimizer", "buffers", "metrics", "progress", "below": {level that it
owns: state}}. Rows: {level: batches} for a level and what runs inside its steps, with the axes
`Program.leading_axes` in front. Scene: {level: {"params", "buffers"}}, what losses read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params
from metaopt.autodiff.gradient import gradient
from metaopt.differentiate import End, InnerLoop, PointRule
from metaopt.differentiate.base import run
from metaopt.levels.order import Event, Owner
from metaopt.levels.program import Program, Rules, all_shown, rest, shown
from metaopt.levels.response import Respond, Response, attached, noted, through
from metaopt.levels.update import begun, optimizer_tensors, rate, update
from metaopt.levels.view import Evaluation, evaluate, kept
from metaopt.levels.window import NO_WINDOW, Happened, Window, advanced, opened
from metaopt.optimizer import Optimizer
from metaopt.scan import scan
from metaopt.transforms import values_are_readable
from metaopt.tree import Tree


@dataclass(frozen=True)
class Execution:
    """The program, as functions of (scene, state, rows).

    Attributes:
        program: what runs.
        respond: what becomes of a level whose rule looks at one point, when it has made its steps.
    """

    program: Program
    respond: Respond = attached

    # One turn: what happens between two steps of an owner

    def turn(
        self, owner: Owner, scene: Tree, states: Tree, rows: Tree, *, at_point: bool = False
    ) -> tuple[Tree, Tree]:
        """Let the levels that `owner` owns make their steps, and return (scene, states),
        differentiable as the edges say.

        Args:
            owner: a level, or None for the graph: then nothing is differentiated from outside, and
                top levels step.
            scene: what the levels read that are not among these.
            states: of the owner's levels.
            rows: batches of all that runs.
            at_point: levels whose rule looks at one point only stay where they are.
        """
        program, order = self.program, self.program.order
        scene, states = dict(scene), dict(states)
        scene |= (
            all_shown(states)
            if owner is None
            else {name: shown(state) for name, state in states.items()}
        )
        windows = opened([name for name in order.levels if name in states], order.shared, states)
        for move in program.moves.get(owner, ()):
            name = move.event.level
            part = {other: rows[other] for other in move.rows}
            if move.part is not None:
                part = tree.index(part, move.part)
            before = scene
            window = windows.get(name, NO_WINDOW)
            states[name] = self.advance(
                move.event, move.rules, scene, states[name], part, window, move.begins, at_point
            )
            scene = scene | self._exposed(name, move.rules, scene, states[name], part)
            if windows:
                windows = advanced(
                    Happened(move.event, before, part, states[name], move.begins),
                    windows,
                    order.shared,
                    states,
                )
        return scene, states

    def advance(
        self,
        event: Event,
        rules: Rules,
        scene: Tree,
        state: Tree,
        rows: Tree,
        window: Window,
        begins: bool,
        at_point: bool,
    ) -> Tree:
        """Return the state of a level after its steps, its parameters differentiable as
        `Program.rules` says.
        """
        name, is_point = event.level, _is_point(rules)
        if begins and not (at_point and is_point):
            state = begun(self.program, name, scene, state)
        if not rules and self.program.is_top(name):
            for i in range(event.steps):
                state = self.step(name, scene, state, self._row(name, rows, i), window)
            return state
        loop = self.problem(name, event.steps, scene, state, rows, window)
        if not rules:
            params, after, _ = run(loop)
        elif is_point:
            params, after = (loop.params, loop.state) if at_point else run(loop)[:2]
            if self.program.order.members.get(name):
                loop = replace(loop, loss=partial(self._loss, name, window, True))
            params = self.respond(
                name, rules, loop, End(params, after, self._row(name, loop.batches, -1))
            )
        else:
            params, after, _ = rules[0][0](loop)
        return {"params": params, **after}

    def problem(
        self, name: str, steps: int, scene: Tree, state: Tree, rows: Tree, window: Window
    ) -> InnerLoop:
        """Return the steps of a level as an inner loop, whose `meta` is all that they read."""
        inputs = {
            "optimizer": optimizer_tensors(self.program, name, scene),
            "loss": {},
            "meta": (
                {other: scene[other] for other in self.program.reads_outside[name]},
                window.tensors,
            ),
            "batch": rows if self.program.order.steps[name] == 1 else None,
        }
        loss, step = (
            partial(self._loss, name, window, False),
            partial(update, self.program.levels[name]),
        )
        compiles = self.program.compiles(name) and values_are_readable()
        batches = () if self.program.order.steps[name] == 1 else rows
        its_rate = partial(rate, self.program.levels[name])
        return InnerLoop(
            loss, step, inputs, state["params"], rest(state), batches, steps, compiles, its_rate
        )

    def _loss(
        self,
        name: str,
        window: Window,
        at_point: bool,
        inputs: Tree,
        params: Params,
        others: Tree,
        rows: Tree,
    ) -> tuple[Tensor, Tree]:
        scene, tensors = inputs["meta"]
        rows = inputs["batch"] if self.program.order.steps[name] == 1 else rows
        return self.total(
            name, params, scene, others, rows, window.with_tensors(tensors), at_point=at_point
        )

    # The total loss

    def total(
        self,
        name: str,
        params: Params,
        scene: Tree,
        others: Tree,
        rows: Tree,
        window: Window,
        *,
        at_point: bool,
    ) -> tuple[Tensor, Tree]:
        """Return (T(w), {"buffers", "metrics", "below"} after the levels below have moved)."""
        scene = {**scene, name: {"params": params, "buffers": others["buffers"]}}
        if window.happened:
            scene = self._replayed(name, scene, window)
        copies = self.program.copies_below[name]
        if copies is None:
            return self._one(name, at_point, scene, others["below"], rows)
        one = partial(self._one, name, at_point)
        in_dims = {other: len(self.program.leading_axes(other, name)) for other in rows}
        if name in self.program.loops:
            results = [
                one(
                    scene,
                    tree.index(others["below"], i),
                    {key: _select(row, in_dims[key], i) for key, row in rows.items()},
                )
                for i in range(copies)
            ]
            loss, after = tree.stack(results)
        else:
            loss, after = torch.func.vmap(one, in_dims=(None, 0, in_dims), randomness="different")(
                scene, others["below"], rows
            )
        metrics = tree.map(lambda metric: metric.mean(), after["metrics"])
        return loss.mean(), {
            "buffers": others["buffers"],
            "metrics": metrics,
            "below": after["below"],
        }

    def _one(
        self, name: str, at_point: bool, scene: Tree, below: Tree, rows: Tree
    ) -> tuple[Tensor, Tree]:
        """Return the total loss where there are no copies below, or of one of them."""
        if below:
            scene, below = self.turn(name, scene, below, rows, at_point=at_point)
        return self._own(name, scene, below, rows)

    def _own(self, name: str, scene: Tree, below: Tree, rows: Tree) -> tuple[Tensor, Tree]:
        """Return the level's own loss in this scene, and what `total` does."""
        count, reading = self.program.levels[name].accumulate, self.program.readings[name]
        scene = {other: scene[other] for other in self.program.reads[name]}
        if count == 1:
            loss, metrics, buffers = self._evaluated(name, scene, rows.get(name))
            return loss, {"buffers": buffers, "metrics": metrics, "below": below}

        kinds: list[torch.dtype] = []
        # a Function answers zero, not None, where there is no dependence
        for other, seen in scene.items():
            params = {
                key: leaf if (other, key) in reading.params else leaf.detach()
                for key, leaf in seen["params"].items()
            }
            buffers = {
                key: leaf if (other, key) in reading.buffers else leaf.detach()
                for key, leaf in seen["buffers"].items()
            }
            scene[other] = {
                "params": params,
                "buffers": buffers if other != name else seen["buffers"],
            }

        def step(scene: Tree, buffers: Params, batch: Tree) -> tuple[Params, Tensor]:
            now = {**scene, name: {**scene[name], "buffers": buffers}}
            loss, metrics, buffers = self._evaluated(name, now, batch if name in rows else None)
            values = [loss, *metrics.values()]
            kinds[:] = [value.dtype for value in values]
            wide = reduce(torch.promote_types, kinds)
            return buffers, torch.stack([value.to(wide) for value in values])

        # "steps": the graph of one batch at a time
        buffers, values = scan(
            step, scene, scene[name]["buffers"], rows.get(name, ()), count, "steps"
        )
        loss, *others = [mean.to(kind) for mean, kind in zip(values.mean(0), kinds, strict=True)]
        buffers = kept(buffers, name, self.program.carried)
        return loss, {
            "buffers": buffers,
            "metrics": dict(zip(reading.metrics, others, strict=True)),
            "below": below,
        }

    def _evaluated(self, name: str, scene: Tree, batch: Tree) -> Evaluation:
        """Return what the level's loss says of one batch."""
        keeps, exact = (
            self.program.copies_below[name] is None,
            self.program.readings[name].is_delicate,
        )
        program = self.program
        return evaluate(
            program.levels[name],
            program.nets,
            scene,
            batch,
            keeps_statistics=keeps,
            exact=exact,
            carried=program.carried,
        )

    def _replayed(self, name: str, scene: Tree, window: Window) -> Tree:
        """Return the scene with the responses of the levels that `name` shares with others, as
        functions of its parameters.
        """
        states, windows = dict(window.start), window.inner
        # what has been exposed: also of levels inside these, which the scenes of old know as
        # constants
        moved: Tree = {}
        for happened in window.happened:
            event, lower, rows = happened.event, happened.event.level, happened.rows
            stand = {other: shown(state) for other, state in states.items()}
            seen = {**happened.scene, **stand, **moved, name: scene[name]}
            rules, its_window = self.program.rules(name, lower), windows.get(lower, NO_WINDOW)
            is_point = _is_point(rules)
            state = happened.after if is_point else states[lower]
            states[lower] = self.advance(
                event, rules, seen, state, rows, its_window, happened.begins, is_point
            )
            moved = moved | self._exposed(lower, rules, seen, states[lower], rows)
            again = happened._replace(scene=seen, after=states[lower])
            windows = advanced(again, windows, self.program.order.shared, states)
        return {**scene, **moved}

    def _exposed(self, name: str, rules: Rules, scene: Tree, state: Tree, rows: Tree) -> Tree:
        """Return what others now read of a level, and of those inside its steps if they do."""
        if name not in self.program.read_from_outside:
            return {name: shown(state)}
        scene = {**scene, name: shown(state)}
        # they respond to its parameters, whose derivative is not that of the steps
        if _is_point(rules):
            scene, _ = self.turn(
                name, scene, state["below"], self._row(name, rows, -1), at_point=True
            )
            return {
                other: scene[other] for other in sorted(self.program.order.inside[name] | {name})
            }
        return all_shown({name: state})

    def _row(self, name: str, rows: Tree, i: int) -> Tree:
        """Return the batches of one of the level's steps."""
        return rows if self.program.order.steps[name] == 1 else tree.index(rows, i)

    # Steps, which nobody differentiates: with gradients off

    def step(self, name: str, scene: Tree, state: Tree, rows: Tree, window: Window) -> Tree:
        """Return the state of a top level after one step, and of all that runs inside it."""
        level, others = self.program.levels[name], rest(state)
        virtual, there = self.looking_ahead(name, state)
        if (
            level.warmup
            and not torch.compiler.is_compiling()
            and int(state["progress"]["steps"]) < level.warmup
        ):
            loss, aux = virtual.total(
                name, state["params"], scene, rest(there), rows, window, at_point=False
            )
            grads = tree.map(torch.zeros_like, state["params"])
        else:
            grads, loss, aux = virtual.gradient(name, scene, there, rows, window)
        aux["metrics"] = {**aux["metrics"], "gradient norm": tree.norm(grads)}
        inputs = {"optimizer": optimizer_tensors(self.program, name, scene)}
        params, after = update(level, inputs, grads, others, state["params"], loss, aux)
        if any(edge.look_ahead for edge in self.program.lowers(name)):
            moved = {**scene, name: {"params": params, "buffers": others["buffers"]}}
            _, after["below"] = self.turn(name, moved, others["below"], rows)
        return {"params": params, **after}

    def looking_ahead(self, name: str, state: Tree) -> tuple[Execution, Tree]:
        """Return what takes the hypergradient of a top level, and the state that it does so from.

        They are others where an edge has an optimizer for virtual steps: that begins afresh, from
        where the lower level stands.
        """
        ahead = self.program.ahead
        if ahead is None:
            return self, state
        below = dict(state["below"])
        for edge in self.program.lowers(name):
            if isinstance(edge.look_ahead, Optimizer):
                lower = below[edge.lower.name]
                below[edge.lower.name] = {
                    **lower,
                    "optimizer": edge.look_ahead.init(lower["params"]),
                }
        return replace(self, program=ahead), {**state, "below": below}

    def gradient(
        self,
        name: str,
        scene: Tree,
        state: Tree,
        rows: Tree,
        window: Window,
        *,
        at_point: bool = False,
    ) -> tuple[Params, Tensor, Tree]:
        """Return (dT/dw, T, what `total` says), all constant.

        Where rules look at points alone, no derivative passes through the steps: it is put together
        from that of the level's own loss and from what the rules pull back.
        """
        responses: list[Response] = []
        variables, below = {name: state["params"]}, None
        if self.program.responds_at_points(name):
            noting = Execution(self.program, partial(noted, responses, self.program.random))
            there = {**scene, name: shown(state)}
            if window.happened:
                there = noting._replayed(name, there, window)
            there, below = noting.turn(name, there, state["below"], rows, at_point=at_point)
            read = {level for level, _ in self.program.readings[name].params}
            variables |= {one.level: one.end.params for one in responses if one.level in read}

            def value(variables: dict[str, Params]) -> tuple[Tensor, Tree]:
                moved = {
                    level: {**there[level], "params": params} for level, params in variables.items()
                }
                return self._own(name, {**there, **moved}, {}, rows)
        else:

            def value(variables: dict[str, Params]) -> tuple[Tensor, Tree]:
                return self.total(
                    name, variables[name], scene, rest(state), rows, window, at_point=at_point
                )

        # A compiler does not see what a value depends on: there a derivative that does not arrive
        # is zero, and not missed.
        slopes, loss, aux = gradient(
            value, variables, allow_unused=not torch.compiler.is_compiling()
        )
        aux = aux if below is None else {**aux, "below": below}
        grads = through(responses, slopes, name)
        responses.clear()  # a circle: each holds the execution that holds this list
        found: Params = {}
        for key, grad in grads.items():
            if grad is None and not self.program.levels[name].allow_unused:
                raise _missing(name, key)
            found[key] = torch.zeros_like(state["params"][key]) if grad is None else grad
        return found, loss, aux


def _is_point(rules: Rules) -> bool:
    return bool(rules) and isinstance(rules[0][0], PointRule)


def _missing(level: str, param: str) -> ValueError:
    return ValueError(
        f"level {level!r}: no derivative arrives at its parameter {param!r}: neither its loss nor "
        f"a response below depends on it. "
        "If that is meant, pass `allow_unused=True`."
    )


def _select(leaves: Tree, axis: int, i: int) -> Tree:
    return tree.map(lambda leaf: leaf.select(axis, i), leaves)

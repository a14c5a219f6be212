"""Rules that look at the point where a loop ended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.derivative import with_derivative
from metaopt.autodiff.modes import Modes, noting_modes
from metaopt.autodiff.pullback import or_zeros
from metaopt.autodiff.replay import Ambient, drawn_again
from metaopt.compiled import compile_whole
from metaopt.differentiate.arguments import Scale
from metaopt.differentiate.protocol import Given, InnerLoop, Inputs, Pullback, Result, Rule
from metaopt.differentiate.statistics import say
from metaopt.differentiate.steps import LastStep, run_noting_last
from metaopt.scan.stream import Stream, last_row
from metaopt.transforms import has_tangent
from metaopt.tree import Tree

Read = tuple[Any, Tree]  # inputs without the optimizer, batch: what a loss reads


class End(NamedTuple):
    """Where a loop ended.

    Attributes:
        params: the last parameters.
        state: the last state.
        batch: the batch of the last step.
        last: the last step, for a rule that looks back; None if there was none.
    """

    params: Tree
    state: Any
    batch: Tree
    last: LastStep | None = None


class PointRule(Rule):
    """A rule that looks only at where the loop ended, not at the steps that led there.

    What the end depends on is then what the loss there reads: `inputs` without the optimizer, and
    the batch of the last step. The initial parameters and state, and the optimizer's tensors,
    receive nothing: to ask only for derivatives in these is an error. The returned state, the
    losses and what else the loop emits are constants.

    Attributes:
        looks_around: whether it evaluates the loss at other parameters too, as differences do. In a
            graph, levels below then make their steps for each evaluation; else they stay where they
            are, and their derivatives say how they would move.
        looks_back: whether it looks at the last step, `End.last`, too.
    """

    looks_around = False
    looks_back = False

    @property
    def needs_memory(self) -> bool:
        """Whether `pull_back` looks at the optimizer's state at the end."""
        return True

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Read
    ) -> tuple[Read, dict[str, Tensor]]:
        """Return the cotangents of what the loss reads, and statistics.

        A function of the tensors in its arguments, built from torch's own operations: it can be
        differentiated and compiled.

        Args:
            loop: its `inputs` are differentiated; its initial parameters, state and batches are not
                looked at.
            end: where it ended.
            cotangent: v, a tree like `end.params`.
            wanted: (tree of bools like `loop.inputs` without "optimizer", tree of bools like
                `end.batch`); a bool may stand for a whole part.

        Returns:
            A tree like (`loop.inputs` without "optimizer", `end.batch`) with cotangents, None for
            what is not wanted; and name -> statistic.
        """
        raise TypeError(
            f"{type(self).__name__} must define `pull_back(loop, end, cotangent, wanted)`."
        )

    def vjp(self, loop: InnerLoop) -> tuple[Result, Pullback]:
        """Run without a graph; the pullback is `pull_back` where the loop ended."""
        is_stream = isinstance(loop.batches, Stream)
        given = loop.given() if is_stream else None
        loop = loop.starting_from(given) if given is not None else loop
        before = _random_state(loop)
        result, last = run_noting_last(loop, self.looks_back)
        loop = _after_run(loop, before)
        end = End(result.params, result.state, last_row(loop.batches), last)
        winds_back = loop.is_random and not torch.compiler.is_compiling()
        ambient = Ambient.now(tree.leaves((loop.inputs, *end))) if winds_back else None

        def pullback(cotangents: Result, wanted: Given) -> Given:
            v = tree.map(or_zeros, cotangents.params, end.params)
            in_batches = wanted.batches
            last = in_batches[-1] if isinstance(in_batches, list) and is_stream else in_batches
            in_read = (read_by_loss(wanted.inputs), last)
            with nullcontext() if ambient is None else ambient.restored():
                to_read, to_batch = _pull_back(self, loop, end, v, in_read)
            to_inputs: Any = {name: to_read.get(name) for name in loop.inputs}
            if given is not None:
                to_batches = [*[None for _ in given.batches[:-1]], to_batch]
            else:
                to_batches = tree.map(_as_last_row, to_batch, loop.batches)
            return Given(to_inputs, None, None, to_batches)

        return result, pullback

    def attach(self, loop: InnerLoop) -> Result:
        """Run without a graph; `pull_back` is the derivative of the last parameters."""
        with noting_modes() as modes:
            before = _random_state(loop)
            result, last = run_noting_last(loop, self.looks_back)
            loop = _after_run(loop, before)
        end = End(result.params, result.state, last_row(loop.batches), last)
        return result._replace(params=self.attach_at(loop, end, modes))

    def attach_at(self, loop: InnerLoop, end: End, modes: Modes | None = None) -> Tree:
        """Return the last parameters with the derivative that the rule gives them.

        Nothing is computed before it is asked for; models are then in these modes.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            read = (read_by_loss(loop.inputs), end.batch)
            if not (tree.is_any_tracked(read) or any(map(has_tangent, tree.leaves(read)))):
                return tree.map(torch.Tensor.detach, end.params)

        def pull_back(
            params: Tree,
            given: tuple[Inputs, Any, Tree, Any],
            cotangent: Tree,
            wanted: tuple[Inputs, Any, Tree, Any],
        ) -> Tree:
            (inputs, *fixed, batch), (in_inputs, *in_fixed, in_batch) = given, wanted
            in_read = (read_by_loss(in_inputs), in_batch)
            if not any(tree.leaves(in_read)):
                return tree.nones(wanted)
            here = replace(loop, inputs=inputs)
            there = End(params, fixed[0], batch, fixed[1])
            bars, to_batch = _pull_back(self, here, there, cotangent, in_read)
            to_inputs = {
                name: bars[name] if name in bars else tree.nones(part)
                for name, part in in_inputs.items()
            }
            return to_inputs, *tree.nones(in_fixed), to_batch

        given = (loop.inputs, end.state, end.last, end.batch)
        return with_derivative(pull_back, end.params, given, modes=modes)

    def ignored(self, loop: InnerLoop) -> dict[str, Tree]:
        """Return all that the loss does not read."""
        return {
            "initial parameters": loop.params,
            "optimizer's tensors": loop.inputs["optimizer"],
            "initial state": loop.state,
        }


def _random_state(loop: InnerLoop) -> Ambient | None:
    """Return the random state, if it matters whether the loop draws from it; else None.

    So it does before a compiler, which cannot wind random numbers back.
    """
    if not (loop.compile and loop.is_random) or loop.steps == 0 or torch.compiler.is_compiling():
        return None
    leaves = tree.leaves((loop.inputs, loop.params))
    return Ambient.of_generators({leaf.device for leaf in leaves if isinstance(leaf, Tensor)})


def _after_run(loop: InnerLoop, before: Ambient | None) -> InnerLoop:
    """Return the loop, of which it is known now whether it draws random numbers."""
    if before is None:
        return loop
    after = _random_state(loop)
    return replace(loop, is_random=after is None or not before.draws_as(after))


def _pull_back(rule: PointRule, loop: InnerLoop, end: End, cotangent: Tree, wanted: Read) -> Read:
    """Return what `rule.pull_back` does, compiled if the loop is, unless it is differentiated."""
    loss = loop.loss_around if rule.looks_around else loop.loss_at_end
    if loss is not None:
        loop = replace(loop, loss=loss)
    if not loop.compile or torch.is_grad_enabled():
        bars, statistics = rule.pull_back(loop, end, cotangent, wanted)
    else:

        def pull_back(inputs: Inputs, end: End, cotangent: Tree) -> tuple[Read, dict[str, Tensor]]:
            return rule.pull_back(replace(loop, inputs=inputs), end, cotangent, wanted)

        bars, statistics = compile_whole(pull_back)(loop.inputs, end, cotangent)
    say(statistics)
    return fill_none(bars, wanted)  # type: ignore[no-any-return]


def fill_none(bars: Tree, wanted: Tree) -> Tree:
    """Return the cotangents with None in each part of what is wanted for which None stands."""
    if isinstance(wanted, dict):
        each = {} if bars is None else bars
        return {key: fill_none(each.get(key), part) for key, part in wanted.items()}
    if isinstance(wanted, tuple):
        each = [None] * len(wanted) if bars is None else bars
        parts = [fill_none(bar, part) for bar, part in zip(each, wanted, strict=True)]
        make: Any = getattr(type(wanted), "_make", tuple)  # of a named tuple
        return make(parts)
    return bars


def at_end(loop: InnerLoop, end: End) -> tuple[Callable[[Tree, Read], Tensor], Read]:
    """Return the loss at the end as a function (params, what it reads) -> L, and what it reads."""

    def loss(params: Tree, read: Read) -> Tensor:
        inputs, batch = read
        return loop.loss(add_optimizer(inputs, loop.inputs), params, end.state, batch)[0]

    return loss, (read_by_loss(loop.inputs), end.batch)


def read_by_loss(inputs: Inputs) -> dict[str, Tree]:
    """Return the inputs without the optimizer's tensors."""
    return {name: part for name, part in inputs.items() if name != "optimizer"}


def add_optimizer(read: dict[str, Tree], inputs: Inputs) -> Inputs:
    """Return what the loss reads with the optimizer's tensors among `inputs`."""
    return {**inputs, **read}  # type: ignore[typeddict-item]


def scale_cotangent(rule: Rule, scale: Scale, loop: InnerLoop, end: End, cotangent: Tree) -> Tree:
    """Return scale v, where "lr" is the step size that the optimizer would use next."""
    if scale == "lr":
        if loop.rate is None:
            raise ValueError(
                f'{type(rule).__name__}: `scale="lr"` must find one step size in the optimizer, '
                f"got no optimizer. Give a number: `scale=0.1`."
            )

        def observe() -> tuple[Tree, Tensor]:
            grads, loss, _ = loop.gradient(loop.inputs, end.params, end.state, end.batch)
            return grads, loss

        with drawn_again(end):
            rate = loop.rate(loop.inputs, end.state, end.params, observe)
        return tree.map(lambda v: rate * v, cotangent)
    return cotangent if scale == 1 else tree.map(lambda v: scale * v, cotangent)


def _as_last_row(bar: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return the cotangent of all rows, of which only the last has one."""
    return None if bar is None else torch.cat([torch.zeros_like(rows[:-1]), bar[None]])

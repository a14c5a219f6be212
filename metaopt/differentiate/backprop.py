"""Backpropagation through the inner loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.clamped import clamp_cotangents
from metaopt.autodiff.mean_gradient import Hvp, MeanGradient
from metaopt.autodiff.pullback import plus, pull_back
from metaopt.autodiff.replay import Ambient
from metaopt.checks import check_count, check_positive
from metaopt.compiled import compile_whole
from metaopt.differentiate.protocol import InnerLoop, Inputs, Result, Update
from metaopt.differentiate.steps import StepsRule, unroll
from metaopt.exact_ops import any_order
from metaopt.scan import Memory, check_memory
from metaopt.scan.stream import Stream, first_row
from metaopt.transforms import is_differentiable
from metaopt.tree import Tree


@dataclass(frozen=True)
class Backprop(StepsRule):
    """Exact adjoint of the steps taken, with second derivatives of the loss.

    For w_{t+1} = w_t + u(grad L(w_t), s_t, w_t): the derivative of everything the loop returns with
    respect to the initial parameters and optimizer state, the optimizer's parameters and tensors,
    `meta`, and floating-point batches.

    Args:
        memory: "full" keeps the graph of every step: fastest for a handful of steps, and an outer
            compile sees through it. "steps" keeps the parameters and the optimizer state of each
            step and rebuilds one step at a time on the way back. `Revolve(snapshots)` keeps few of
            these states and recomputes the others with the fewest possible steps.
        window: number of steps, the last ones, to differentiate through; by default all. The steps
            before are constants: nothing reaches their losses, nor the initial parameters and
            state, and to ask `minimize` for those alone is an error. The error decays like (1 - lr
            mu)^window where the loss has curvature mu or more.
        clip: on the way back, clamp every entry of the cotangent of the parameters after a step to
            [-clip, clip], all steps. A product of many Hessians explodes where the optimizer
            overshoots; this bounds it, step by step, and so one wild part of the parameters does
            not decide the derivative. Biased where it acts; the unit is that of the outer loss per
            unit of a parameter.
        microbatches: the number of equal parts into which each step's batch is cut, for batches too
            large for one graph. Their gradients are averaged, forward and on the way back. The loss
            must then be a mean over the leading axis of every leaf of the batch; what it computes
            across examples, such as batch statistics, is that of one part.
        hvp: how the gradient in a step is differentiated: "reverse" over reverse, or "forward" over
            reverse, one derivative of (dL/dw, dL/d inputs, dL/d batch) along the cotangent of the
            gradient. Both are exact.

    Microbatches and forward products take effect where a step is rebuilt: with "steps" or
    `Revolve`, and neither inside the step of another such loop nor inside a function that is
    compiled as a whole. There the result is the same, and the memory that of "full". `minimize(...,
    compile=True)` compiles the pieces.

    Raises:
        ValueError: an unknown memory or hvp; a window, clip or microbatches that are not positive;
            microbatches or "forward" with "full" memory, or a batch that cannot be cut. On the way
            back: an operator without a forward derivative, for "forward".

    Cost:
        2 to 4 gradients a step in time, one more for "steps", and one more again where gradient and
        update are pulled back
        apart: with microbatches or "forward". Memory: "full" T graphs, "steps" T states and one
            graph, of one micro-batch.
        Measured eagerly on a CPU, four steps of Adam, growth of the process: MLP 64-256-256-1 with
        4096 examples 61 MiB, 26 with 8 microbatches in 1.6 times the time; transformer of two
        layers, width 128, 16 sequences of 64: 126 and 75 MiB in 3.5 times the time. "forward" needs
        more memory eagerly, 95 and 181 MiB, in 1.3 and 2 times the time.

    Reference:
        Maclaurin, Duvenaud, Adams 2015, arXiv:1502.03492; Franceschi et al. 2017, arXiv:1703.01785,
        section 3.1;
        window: Shaban, Cheng, Hatch, Boots 2019, arXiv:1810.10667, proposition 3.1; clip: of
            recurrent networks, Graves 2013, arXiv:1308.0850, section 4; microbatches:
            Engstrom et al. 2025,
        arXiv:2503.13751; forward: Kemaev et al. 2025, arXiv:2505.00793.
    """

    memory: Memory = "full"
    window: int | None = field(default=None, kw_only=True)
    clip: float | None = field(default=None, kw_only=True)
    microbatches: int = field(default=1, kw_only=True)
    hvp: Hvp = field(default="reverse", kw_only=True)

    def __post_init__(self) -> None:
        check_memory(self.memory)
        if self.window is not None:
            check_count(self, "window", self.window, or_none=True)
        if self.clip is not None:
            check_positive(self, "clip", self.clip)
        check_count(self, "microbatches", self.microbatches)
        if self.hvp not in ("reverse", "forward"):
            raise ValueError(f'Backprop: `hvp` must be "reverse" or "forward", got {self.hvp!r}.')
        if self.memory == "full" and self._splits_steps:
            given = (
                f"microbatches={self.microbatches}"
                if self.microbatches > 1
                else f"hvp={self.hvp!r}"
            )
            raise ValueError(
                f'Backprop: `{given}` needs memory="steps" or Revolve(snapshots), got '
                f'memory="full". It acts where a step is rebuilt on the way back. Write '
                f'Backprop(memory="steps", {given}).'
            )

    @property
    def _splits_steps(self) -> bool:
        return self.microbatches > 1 or self.hvp == "forward"

    def ignored(self, loop: InnerLoop) -> dict[str, Tree]:
        """Return where the loop starts, if the window is known to leave out the first step."""
        if self.window is None or loop.steps is None or loop.steps <= self.window:
            return {}
        return {"initial parameters": loop.params, "initial state": loop.state}

    def attach(self, loop: InnerLoop) -> Result:
        """Return the result of the steps, with their graph."""
        loop = replace(loop, update=_exact(loop.update))
        if self.clip is not None:
            loop = replace(loop, update=_clipped(loop.update, self.clip))
        unroll_steps = self._unroll_parts(loop) if self._splits_steps else unroll
        if self.window is None:
            return unroll_steps(loop, self.memory)
        early, late = _cut(loop, self.window)
        if early is None:
            return unroll_steps(late, self.memory)
        with torch.no_grad():
            before = unroll_steps(early, "full")
        params, state, emitted = tree.map(torch.Tensor.detach, before)
        late = replace(late, params=params, state=state)
        after = unroll_steps(late, self.memory)
        joined = tree.map(lambda early, late: torch.cat([early, late]), emitted, after.emitted)
        return after._replace(emitted=joined)

    def _unroll_parts(self, loop: InnerLoop) -> Callable[[InnerLoop, Memory], Result]:
        """Return what runs a loop whose steps are pulled back part by part."""
        if loop.skips:
            raise ValueError(
                f'Backprop: unused="skip" cannot be had with microbatches={self.microbatches} and '
                f"hvp={self.hvp!r}, which pull back the gradient of every parameter. Leave one of "
                "them out."
            )
        examples = _find_examples(loop, self.microbatches)
        gradient = MeanGradient(loop.loss, examples, self.microbatches, self.hvp)

        def update(
            inputs: Inputs,
            grads: Tree,
            state: Any,
            params: Tree,
            loss: Tensor,
            aux: Tree,
            batch: Tree,
        ) -> Tree:
            after = loop.update(inputs, grads, state, params, loss, aux)
            return after, loop.emit(inputs, after, batch, loss, aux)

        of_update = functools.partial(pull_back, update)
        pullback = functools.partial(
            _pull_back_step,
            replace(gradient, compile=loop.compile),
            compile_whole(of_update) if loop.compile else of_update,
        )
        return functools.partial(unroll, take_mean_gradient=gradient, pullback=pullback)


def _pull_back_step(
    gradient: MeanGradient,
    pull_back_update: Callable[..., Tree],
    inputs: Inputs,
    carry: tuple[Tree, Any],
    batch: Tree,
    cotangents: tuple[Tree, Tree],
    wanted: Tree,
) -> tuple[tuple[Tree, Tree, Tree], Tree]:
    """Pull back the update, then the gradient: theirs are the only graphs, one after the other."""
    params, state = carry
    in_inputs, (in_params, in_state), in_batch = wanted
    ambient = Ambient.now(tree.leaves((inputs, carry, batch)))
    grads, loss, aux = gradient(inputs, params, state, batch)

    to_inputs, to_grads, to_state, to_params, to_loss, to_aux, to_batch = pull_back_update(
        (inputs, grads, state, params, loss, aux, batch),
        cotangents,
        (in_inputs, True, in_state, in_params, True, tree.map(is_differentiable, aux), in_batch),
    )
    with ambient.restored():  # the gradient sees the random numbers that it saw above
        bars = gradient.pull_back(
            (inputs, params, state, batch),
            (to_grads, to_loss, to_aux),
            (in_inputs, in_params, in_state, in_batch),
        )
    sums = tree.map(plus, (to_inputs, to_params, to_state, to_batch), bars)
    return (sums[0], (sums[1], sums[2]), sums[3]), loss


def _cut(loop: InnerLoop, window: int) -> tuple[InnerLoop | None, InnerLoop]:
    """Return the loop's (steps before the last `window`, if any; last `window` steps)."""
    if isinstance(loop.batches, Stream):
        rows = list(loop.batches.watch())
        first, last = (Stream(part) if part else None for part in (rows[:-window], rows[-window:]))
        return replace(loop, batches=first) if first else None, replace(loop, batches=last)
    steps = loop.steps or 0
    constant = max(steps - window, 0)
    early, late = (
        tree.index(loop.batches, part) for part in (slice(constant), slice(constant, None))
    )
    return replace(loop, batches=early, steps=constant) if constant else None, replace(
        loop, batches=late, steps=steps - constant
    )


def _exact(update: Update) -> Update:
    """Let the derivatives of norms and recurrent layers in a learned optimizer be exact too."""

    def call(*args: Any) -> Any:
        with any_order():
            return update(*args)

    return call


def _clipped(update: Update, limit: float) -> Update:
    """Clamp what reaches the parameters that an update returns on the way back."""

    def call(*args: Any) -> Any:
        params, state = update(*args)
        return clamp_cotangents(params, limit), state

    return call


def _find_examples(loop: InnerLoop, microbatches: int) -> Tree:
    """Return which leaves of (inputs, params, state, batch) hold examples.

    Raises:
        ValueError: these cannot be cut into equal parts.
    """
    nowhere = tree.map(lambda _: False, (loop.inputs, loop.params, loop.state))
    in_inputs, in_params, in_state = nowhere
    batch = first_row(loop.batches)
    in_batch = tree.map(lambda _: True, batch)
    if not tree.leaves(batch):
        batch = loop.inputs["batch"]
        in_inputs = {**in_inputs, "batch": tree.map(lambda _: True, batch)}
    for path, length in tree.leading_axes(batch).items():
        if microbatches > 1 and length < 0:
            raise ValueError(
                f"`microbatches={microbatches}` needs a batch whose every leaf has a leading axis "
                f"of examples, which {path} has not. Pass everything that is not an example as "
                "`meta`, or leave `microbatches` out."
            )
        if length % microbatches:
            raise ValueError(
                f"`microbatches` must divide the number of examples, got {microbatches} for the "
                f"{length} at {path}. Choose a divisor, or another batch size."
            )
    return in_inputs, in_params, in_state, in_batch

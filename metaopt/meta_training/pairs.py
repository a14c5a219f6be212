"""Pairs of perturbed optimizers under way, and what the differences of their losses estimate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vmap

from metaopt import tree
from metaopt._functional import Params, lend
from metaopt.meta_training.noise import Noise
from metaopt.meta_training.objective import Window, run_evaluated
from metaopt.meta_training.task import TaskFamily, sample_tasks
from metaopt.optimizer import Optimizer
from metaopt.tree import Tree

if TYPE_CHECKING:
    from metaopt.meta_training.evolution import EvolutionEstimator

ENTRIES = 2**18  # of noise that is held at a time, where it is summed up


@dataclass(frozen=True)
class Differences:
    """An estimate g_i = slope_i multiplier_i, with slope_i = (L_i(+) - L_i(-)) / (2 std^2).

    The multipliers are sums of noise; they are made again when they are needed, some pairs at a
    time.

    Attributes:
        losses: the mean training loss of each pair, [pairs]; of a relative objective, its value.
        slopes: [pairs].
        norms: |g_i|, [pairs].
        state: the estimator's next state.
        multipliers: the noise, and which of it each pair has seen.
    """

    losses: Tensor
    slopes: Tensor
    norms: Tensor
    state: Any
    multipliers: Multipliers

    def weighted_sum(self, weights: Tensor) -> Params:
        """Return sum_i weights_i slope_i multiplier_i."""
        factors = torch.where(weights != 0, weights * self.slopes, 0)
        sums: Params = {
            name: torch.zeros_like(leaf) for name, leaf in self.multipliers.noise.like.items()
        }
        for pairs, rows in self.multipliers.by_chunk():
            for name, row in rows.items():
                sums[name] += torch.einsum("i,i...->...", factors[pairs].to(row.dtype), row)
        return sums


@dataclass(frozen=True)
class Multipliers:
    """What the differences are multiplied by: sum_{t = first_i}^{last_i} epsilon_i(t).

    Attributes:
        noise: epsilon.
        first: the first step whose noise counts, of each pair, [pairs].
        last: the last one.
        chunk: number of pairs whose noise is held at a time.
    """

    noise: Noise
    first: Tensor
    last: Tensor
    chunk: int

    def by_chunk(self) -> Iterator[tuple[Tensor, Params]]:
        """Yield (indices of some pairs, their multipliers), which are made again each time."""
        for pairs in torch.arange(len(self.first)).split(self.chunk):
            yield pairs, self._all if len(pairs) == len(self.first) else self.of(pairs)

    @cached_property
    def _all(self) -> Params:
        return self.of(torch.arange(len(self.first)))

    def of(self, pairs: Tensor) -> Params:
        """Return the multipliers of some pairs: leaves [len(pairs), ...]."""
        like = self.noise.like
        total = {name: leaf.new_zeros(len(pairs), *leaf.shape) for name, leaf in like.items()}
        counts = self.last[pairs] - self.first[pairs] + 1
        rows = torch.arange(len(pairs)).repeat_interleave(counts)  # of each term, its pair's
        steps = self.last[pairs][rows] + torch.arange(1, len(rows) + 1) - counts.cumsum(0)[rows]
        at_once = max(1, ENTRIES // sum(leaf.numel() for leaf in like.values()))
        for some, step in zip(rows.split(at_once), steps.split(at_once), strict=True):
            terms = self.noise(step, pairs[some])
            for name, one in total.items():
                one.index_add_(0, some.to(one.device), terms[name])
        return total


@dataclass(frozen=True)
class Crowd:
    """All pairs of an estimator under way.

    Its state is a dict: "seed" of the noise; "count", the number of the next estimate; for each
    pair "step", that of its episode, and "start", the estimate with which that began, [pairs];
    "carry", (parameters, state of the optimizer, first loss) of both halves, leaves
    [pairs, 2, ...]; "batches", a list of the pairs' own, leaves [horizon, ...]; and "held_out",
    leaves [pairs, ...].
    """

    estimator: EvolutionEstimator
    optimizer: Optimizer
    theta: Params
    family: TaskFamily
    horizon: int
    generator: torch.Generator

    def begin(self) -> dict[str, Any]:
        """Return the state before the first estimate, where theta has taken the pairs."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        carry, batches, held_out = self._draw(self.estimator.pairs)
        places = self.estimator.places(self.horizon)
        numbers = torch.arange(len(places))
        for before, place in itertools.pairwise(places.unique().tolist()):
            pairs = numbers[places >= place]
            first = torch.full_like(pairs, before)
            rows = _rows(batches, pairs, first, place - before)
            carry = _put(carry, pairs, self._run_theta(_take(carry, pairs), rows, first))
        start = torch.zeros_like(places)
        return {
            "seed": seed,
            "count": 0,
            "step": places,
            "start": start,
            "carry": carry,
            "batches": batches,
            "held_out": held_out,
        }

    def estimate(self, state: dict[str, Any]) -> Differences:
        """Run each pair over its next window."""
        estimator, step, count = self.estimator, state["step"], state["count"]
        noise = Noise(state["seed"], estimator.std, self.theta, estimator.rank)
        in_force, first, last = estimator.seen(state["start"], count)
        multipliers = Multipliers(noise, first, last, estimator.chunk_size or len(step))
        slopes = torch.empty(len(step), dtype=torch.float64)
        losses = torch.empty(len(step), dtype=next(iter(self.theta.values())).dtype)
        carry = state["carry"]
        lengths = (self.horizon - step).clamp(max=estimator.window_of(self.horizon))
        for pairs in _alike(lengths, multipliers.chunk):
            rows = _rows(state["batches"], pairs, step[pairs], int(lengths[pairs[0]]))
            before = _take(carry, pairs)
            last_rows = _rows(state["batches"], pairs, torch.full_like(pairs, self.horizon - 1), 1)
            judged = tree.map(lambda leaf: leaf[:, 0], last_rows), _take(state["held_out"], pairs)
            after, values, means = self._run_halves(
                noise(in_force[pairs], pairs), before, rows, step[pairs], judged
            )
            if not estimator.halves_go_on:
                after = self._run_theta(before, rows, step[pairs])
            carry = _put(carry, pairs, after)
            slopes[pairs] = (values[:, 0] - values[:, 1]).to(slopes) / (2 * estimator.std**2)
            losses[pairs] = means.mean(1).to(losses)
        norms = torch.cat([_norms(rows).to(slopes) for _, rows in multipliers.by_chunk()])
        # without numbers, an episode is over too
        is_over = (step + lengths >= self.horizon) | ~(slopes.isfinite() & losses.isfinite())
        state = {**state, "count": count + 1, "step": step + lengths, "carry": carry}
        state = self._begin_again(state, is_over)
        return Differences(losses, slopes, norms * slopes.abs(), state, multipliers)

    def _begin_again(self, state: dict[str, Any], is_over: Tensor) -> dict[str, Any]:
        """Draw new tasks for the pairs whose episode is over."""
        pairs = is_over.nonzero()[:, 0]
        if len(pairs):
            carry, batches, held_out = self._draw(len(pairs))
            state = {
                **state,
                "step": state["step"].masked_fill(is_over, 0),
                "start": state["start"].masked_fill(is_over, state["count"]),
                "carry": _put(state["carry"], pairs, carry),
                "batches": _replaced(state["batches"], pairs, batches),
                "held_out": _put(state["held_out"], pairs, held_out),
            }
        return state

    def _draw(self, count: int) -> tuple[Tree, list[Tree], Tree]:
        """Return (carry, batches of each, held-out batches) of new tasks."""
        task = sample_tasks(self.family, self.generator, count, self.horizon)
        first = torch.full((count,), torch.nan, device=tree.leaves(task.params)[0].device)
        carry = (task.params, vmap(self.optimizer.init)(task.params), first)
        # each by itself: to put new ones among the others must not copy all of them
        own = [tree.map(torch.clone, tree.index(task.batches, i)) for i in range(count)]
        return tree.map(_twice, carry), own, task.held_out

    def _run_halves(
        self, epsilon: Params, carry: Tree, rows: Tree, start: Tensor, judged: Tree
    ) -> tuple[Tree, Tensor, Tensor]:
        """Return (carry afterwards, J, mean loss), all [pairs, 2, ...], for theta +- epsilon."""

        def pair(epsilon: Params, carry: Tree, rows: Tree, start: Tensor, judged: Tree) -> Tree:
            both = {
                name: torch.stack([at + epsilon[name], at - epsilon[name]])
                for name, at in self.theta.items()
            }
            half = partial(self._run, rows=rows, start=start, judged=judged)
            return vmap(half, randomness="same")(both, carry)

        given = (epsilon, carry, rows, start.to(tree.leaves(carry)[0].device), judged)
        return vmap(pair, randomness="different")(*given)  # type: ignore[no-any-return]

    def _run_theta(self, carry: Tree, rows: Tree, start: Tensor) -> Tree:
        """Return the carry of pairs, both of whose halves go where theta leads the first."""

        def one(carry: Tree, rows: Tree, start: Tensor) -> Tree:
            return self._run(self.theta, carry, rows, start, None)[0]

        firsts = tree.map(lambda leaf: leaf[:, 0], carry)
        start = start.to(firsts[2].device)
        return tree.map(_twice, vmap(one, randomness="different")(firsts, rows, start))

    def _run(
        self, theta: Params, carry: Tree, rows: Tree, start: Tensor, judged: Tree
    ) -> tuple[Tree, Tensor, Tensor]:
        """Return (carry afterwards, the window's part of J, mean loss) of one half.

        J is the mean over windows of such parts.
        """
        params, state, first = carry
        loss, objective = self.family.loss, self.estimator.objective
        out, before, last = lend(
            self.optimizer, theta, run_evaluated, loss, self.optimizer, params, rows, state
        )
        first = torch.where(start == 0, out.losses[0].to(first), first)
        after = (out.params, out.opt_state, first)
        if judged is None:
            return after, first, first
        window = Window(out.losses, first, start, self.horizon, before, last, *judged)
        value = self.estimator.windows(self.horizon) * objective.part(window, loss)
        return after, value, value if objective.is_bounded else out.losses.mean()


def _alike(lengths: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yield pairs whose windows have the same length, as many as run at a time."""
    for length in lengths.unique():
        yield from (lengths == length).nonzero()[:, 0].split(chunk)


def _rows(batches: list[Tree], pairs: Tensor, first: Tensor, count: int) -> Tree:
    """Return the batches of `count` steps of some pairs, each from its own first one."""
    spans = zip(pairs.tolist(), first.tolist(), strict=True)
    return tree.stack(
        [
            tree.map(lambda leaf, start=start: leaf[start : start + count], batches[pair])
            for pair, start in spans
        ]
    )


def _replaced(batches: list[Tree], pairs: Tensor, new: list[Tree]) -> list[Tree]:
    """Return the batches with those of some pairs replaced."""
    found = list(batches)
    for pair, own in zip(pairs.tolist(), new, strict=True):
        found[pair] = own
    return found


def _take(values: Tree, pairs: Tensor) -> Tree:
    return tree.map(lambda leaf: leaf[pairs.to(leaf.device)], values)


def _put(values: Tree, pairs: Tensor, part: Tree) -> Tree:
    return tree.map(
        lambda leaf, rows: leaf.index_copy(0, pairs.to(leaf.device), rows), values, part
    )


def _twice(leaf: Tensor) -> Tensor:
    """Return what both halves of each pair have."""
    return torch.stack([leaf, leaf], 1)


def _norms(rows: Params) -> Tensor:
    squares = [row.double().reshape(len(row), -1).square().sum(1) for row in rows.values()]
    return torch.stack(squares).sum(0).sqrt()

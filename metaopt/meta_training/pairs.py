"""Pairs of perturbed optimizers under way, and what the differences of their losses estimate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vmap

from metaopt import tree
from metaopt._functional import Params, lend
from metaopt._minimize import minimize
from metaopt.compiled import compile_whole
from metaopt.distributed import Ranks, gather_rows, work_alone
from metaopt.meta_training.noise import Noise
from metaopt.meta_training.objective import Window
from metaopt.meta_training.task import Task, TaskFamily, sample_tasks
from metaopt.optimizer import Optimizer, begin
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
    leaves [pairs, ...]. Of the last three a rank has those of its own pairs: these it runs, and
    tells the others their slopes and losses.
    """

    estimator: EvolutionEstimator
    optimizer: Optimizer
    theta: Params
    family: TaskFamily
    horizon: int
    generator: torch.Generator
    ranks: Ranks

    def begin(self) -> dict[str, Any]:
        """Return the state before the first estimate, where theta has taken the pairs."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        places = self.estimator.places(self.horizon)
        carry, batches, held_out = self._draw(torch.arange(len(places)))
        own = self.ranks.own(places)
        for before, place in itertools.pairwise(places.unique().tolist()):
            pairs = (own >= place).nonzero()[:, 0]
            if not len(pairs):
                continue
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
        lengths = (self.horizon - step).clamp(max=estimator.window_of(self.horizon))
        own = self._own_pairs
        told = torch.empty(len(own), 2, dtype=torch.float64)  # slope and loss of each
        carry = state["carry"]
        for pairs in _alike(lengths[own], multipliers.chunk):
            number, start = own[pairs], step[own[pairs]]
            rows = _rows(state["batches"], pairs, start, int(lengths[number[0]]))
            before = _take(carry, pairs)
            last_rows = _rows(state["batches"], pairs, torch.full_like(pairs, self.horizon - 1), 1)
            judged = tree.map(lambda leaf: leaf[:, 0], last_rows), _take(state["held_out"], pairs)
            epsilon = noise(in_force[number], number)
            after, values, means = self._run_halves(epsilon, before, rows, start, judged)
            if not estimator.halves_go_on:
                after = self._run_theta(before, rows, start)
            carry = _put(carry, pairs, after)
            told[pairs, 0] = (values[:, 0] - values[:, 1]).to(told) / (2 * estimator.std**2)
            told[pairs, 1] = means.mean(1).to(told)
        slopes, losses = gather_rows(told, len(step), self.ranks).unbind(1)
        losses = losses.to(next(iter(self.theta.values())).dtype)
        norms = torch.cat([_norms(rows).to(slopes) for _, rows in multipliers.by_chunk()])
        # without numbers, an episode is over too
        is_over = (step + lengths >= self.horizon) | ~(slopes.isfinite() & losses.isfinite())
        state = {**state, "count": count + 1, "step": step + lengths, "carry": carry}
        state = self._begin_again(state, is_over)
        return Differences(losses, slopes, norms * slopes.abs(), state, multipliers)

    def _begin_again(self, state: dict[str, Any], is_over: Tensor) -> dict[str, Any]:
        """Draw new tasks for the pairs whose episode is over."""
        over = is_over.nonzero()[:, 0]
        if not len(over):
            return state
        state = {
            **state,
            "step": state["step"].masked_fill(is_over, 0),
            "start": state["start"].masked_fill(is_over, state["count"]),
        }
        pairs = is_over[self._own_pairs].nonzero()[:, 0]
        carry, batches, held_out = self._draw(over)
        if not len(pairs):
            return state
        return {
            **state,
            "carry": _put(state["carry"], pairs, carry),
            "batches": _replaced(state["batches"], pairs, batches),
            "held_out": _put(state["held_out"], pairs, held_out),
        }

    @property
    def _own_pairs(self) -> Tensor:
        """The pairs that this rank runs."""
        found: Tensor = self.ranks.own(torch.arange(self.estimator.pairs))
        return found

    def _draw(self, pairs: Tensor) -> tuple[Tree, list[Tree], Tree]:
        """Return (carry, batches of each, held-out batches) of new tasks for some pairs.

        All ranks draw the tasks of all pairs, so that their generators stay alike, and keep those
        of their own. A rank without any gets the first, which nobody looks at.
        """
        task = sample_tasks(self.family, self.generator, len(pairs), self.horizon)
        own = self._own_pairs
        kept = ((pairs >= own[0]) & (pairs <= own[-1])).nonzero()[:, 0]
        if len(kept) < len(pairs):
            kept = kept if len(kept) else torch.zeros(1, dtype=torch.int64)
            task = Task(*_take(tuple(task), kept))
        first = torch.full((len(kept),), torch.nan, device=tree.leaves(task.params)[0].device)
        carry = (task.params, vmap(self.optimizer.init)(task.params), first)
        # each by itself: to put new ones among the others must not copy all of them
        batches = [tree.map(torch.clone, tree.index(task.batches, i)) for i in range(len(kept))]
        return tree.map(_twice, carry), batches, task.held_out

    @work_alone()
    def _run_halves(
        self, epsilon: Params, carry: Tree, rows: Tree, start: Tensor, judged: Tree
    ) -> tuple[Tree, Tensor, Tensor]:
        """Return (carry afterwards, J, mean loss), all [pairs, 2, ...], for theta +- epsilon."""
        theta = {
            name: torch.stack([at + epsilon[name], at - epsilon[name]], 1)
            for name, at in self.theta.items()
        }
        if (start == 0).any():
            begun = _over_halves(self._start)((theta, carry[0]), ())
            carry = _begun(start, begun, carry)
        after, losses = self._advance(self._step_halves, theta, carry, rows, start)
        start = start.to(losses.device)
        values = _over_halves(self._judge)((theta, carry, after, losses), (start, judged))
        means = values if self.estimator.objective.is_bounded else losses.mean(-1)
        return after, values, means

    @work_alone()
    def _run_theta(self, carry: Tree, rows: Tree, start: Tensor) -> Tree:
        """Return the carry of pairs, both of whose halves go where theta leads the first."""
        firsts = tree.map(lambda leaf: leaf[:, 0], carry)
        if (start == 0).any():
            begun = vmap(lambda params: self._start((self.theta, params), ()))(firsts[0])
            firsts = _begun(start, begun, firsts)
        after, _ = self._advance(self._step_theta, self.theta, firsts, rows, start)
        return tree.map(_twice, after)

    def _advance(
        self, step: Callable[..., Tree], theta: Params, carry: Tree, rows: Tree, start: Tensor
    ) -> tuple[Tree, Tensor]:
        """Return (carry after the steps whose batches these are, losses [pairs, (2,) n])."""
        params, state, first = carry
        parts = [rows]
        if self.estimator.compile:
            step = compile_whole(step)
            # one by one, each laid out as the others: all are one compiled step
            parts = [_row(rows, t) for t in range(tree.leaves(rows)[0].shape[1])]
        found = []
        for part in parts:
            params, state, losses = step(theta, params, state, part)
            found.append(losses)
        all_losses = torch.cat(found, -1)
        first = _at_start(start, all_losses[..., 0].to(first), first)
        return (params, state, first), all_losses

    def _step_halves(self, theta: Params, params: Tree, state: Any, rows: Tree) -> Tree:
        """Return (params, state, losses), all [pairs, 2, ...], of both halves of pairs."""
        after = _over_halves(self._step)((theta, params, state), rows)
        return tree.map(Tensor.contiguous, after)  # for compiled steps: as what they are given

    def _step_theta(self, theta: Params, params: Tree, state: Any, rows: Tree) -> Tree:
        """Return (params, state, losses), all [pairs, ...], where theta is one for all."""

        def one(params: Tree, state: Any, rows: Tree) -> Tree:
            return self._step((theta, params, state), rows)

        after = vmap(one, randomness="different")(params, state, rows)
        return tree.map(Tensor.contiguous, after)

    def _start(self, own: Tree, _: Tree) -> tuple[Tree, Any]:
        """Return (params, state) where an episode begins, which may be learned."""
        theta, params = own
        found: tuple[Tree, Any] = lend(self.optimizer, theta, begin, self.optimizer, params)
        return found

    def _step(self, own: Tree, rows: Tree) -> tuple[Tree, Any, Tensor]:
        """Return (params, state, losses) of one inner problem after as many steps as rows."""
        theta, params, state = own
        loss, optimizer = self.family.loss, self.optimizer
        out = lend(optimizer, theta, minimize, loss, optimizer, params, rows, opt_state=state)
        return out.params, out.opt_state, out.losses

    def _judge(self, own: Tree, shared: Tree) -> Tensor:
        """Return a window's part of J, which is the mean over windows of such parts."""
        theta, before, (params, state, first), losses = own
        start, judged = shared
        objective, loss = self.estimator.objective, self.family.loss

        def evaluated(params: Tree, state: Any) -> Tree:
            return lend(self.optimizer, theta, self.optimizer.evaluated, state, params)

        ends = evaluated(before[0], before[1]), evaluated(params, state)
        window = Window(losses, first, start, self.horizon, *ends, *judged)
        return self.estimator.windows(self.horizon) * objective.part(window, loss)


def _over_halves(fn: Callable[[Tree, Tree], Tree]) -> Callable[[Tree, Tree], Tree]:
    """Map over pairs, and over the two halves, which draw the same random numbers.

    Args:
        fn: (what each half has, what both share) -> a tree.
    """

    def pair(own: Tree, shared: Tree) -> Tree:
        return vmap(lambda own: fn(own, shared), randomness="same")(own)

    return vmap(pair, randomness="different")


def _begun(start: Tensor, begun: tuple[Tree, Any], carry: Tree) -> Tree:
    """Return the carry with (params, state) of the pairs that are at the start of an episode."""
    now = tree.map(lambda new, old: _at_start(start, new, old), begun, carry[:2])
    return (*now, carry[2])


def _at_start(start: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the new values of the pairs whose steps are 0, and the old ones of the others."""
    return torch.where((start == 0).to(old.device).view(-1, *[1] * (old.ndim - 1)), new, old)


def _row(rows: Tree, t: int) -> Tree:
    """Return the batch of one step, leaves [pairs, 1, ...]."""
    return tree.map(lambda leaf: leaf[:, t : t + 1].contiguous(), rows)


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

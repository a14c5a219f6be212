"""What each rule gives and costs on one problem."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params
from metaopt.autodiff.replay import drawn_again
from metaopt.checks import check_count
from metaopt.diagnostics.memory import peak_memory
from metaopt.differentiate import Backprop, Rule
from metaopt.levels import LevelGraph
from metaopt.levels.twin import with_rules
from metaopt.table import write_table

BACKPROP = Backprop()


@dataclass(frozen=True)
class MeasuredRule:
    """A rule's hypergradient beside the exact one, g.

    Attributes:
        rule: the rule.
        hypergradient: x, by parameter name.
        cosine: <x, g> / |x| |g|; nan if either is zero.
        norm_ratio: |x| / |g|.
        relative_error: |x - g| / |g|.
        seconds: median time of the hypergradient, the lower levels' steps included.
        memory: bytes that computing it needs at most, beyond the graph's state and data.
    """

    rule: Rule
    hypergradient: Params
    cosine: float
    norm_ratio: float
    relative_error: float
    seconds: float
    memory: int


@dataclass(frozen=True)
class RuleComparison:
    """Rules on one level's hypergradient; the exact one stands first."""

    level: str
    rules: tuple[MeasuredRule, ...]

    def table(self) -> str:
        """Return a row per rule."""
        headers = ["rule", "cosine", "norm ratio", "relative error", "time in ms", "memory in MiB"]
        rows: list[list[str | float]] = [
            [
                str(one.rule),
                one.cosine,
                one.norm_ratio,
                one.relative_error,
                1e3 * one.seconds,
                one.memory / 2**20,
            ]
            for one in self.rules
        ]
        return write_table(headers, rows, ["", ".4f", ".4g", ".2e", ".3g", ".3g"])


def compare_rules(
    graph: LevelGraph,
    rules: Sequence[Rule],
    level: str,
    *,
    exact: Rule = BACKPROP,
    repeats: int = 5,
) -> RuleComparison:
    """Compute a level's present hypergradient by each rule, and by the exact one.

    Each rule in turn is that of every edge below the level: what is exact is so through everything.
    The hypergradient is the one that the level's next step would use, on the batches that it would
    use: the levels below make their steps, then rules that look at one point do so there (at levels
    that others share: where these stand now). All rules see the same random numbers. The graph, its
    data and the generators stay as they are.

    Args:
        graph: in any state; rules differ most early, when the lower levels are far from converged.
        rules: to be compared.
        level: whose hypergradient; one with levels below it.
        exact: what the others are compared with. `Backprop` is exact for the steps taken, an
            implicit rule for a level that has converged.
        repeats: timings of each rule, after one run that is not counted and another in which memory
            is measured.

    Raises:
        ValueError: there are no rules or no repeats, nothing is below the level, or a rule does not
            suit an edge.

    Cost:
        2 + `repeats` hypergradients a rule.
    """
    if not rules:
        raise ValueError(
            "compare_rules: `rules` must hold at least one rule, got none. For example "
            "`[mo.T1T2(), mo.SAMA()]`."
        )
    check_count("compare_rules", "repeats", repeats)
    if level in graph.plan.levels and not graph.plan.lowers[level]:
        raise ValueError(
            f"compare_rules: `level` must have levels below it, got {level!r}, whose gradient no "
            f"rule takes part in."
        )
    measured = [_measure(graph, rule, level, repeats) for rule in (exact, *rules)]
    reference = measured[0][0]
    return RuleComparison(
        level,
        tuple(
            _beside(reference, rule, *one)
            for rule, one in zip((exact, *rules), measured, strict=True)
        ),
    )


def _measure(graph: LevelGraph, rule: Rule, level: str, repeats: int) -> tuple[Params, float, int]:
    """Return the hypergradient, the median time and the memory of one rule."""
    timetable = graph.plan.timetable
    uppers = {level} | timetable.below.get(level, frozenset())
    twin = with_rules(graph, lambda edge: rule if edge.upper.name in uppers else edge.differentiate)

    def compute() -> Params:
        with drawn_again(graph.state_dict()["levels"]):
            return twin.hypergradient(level, after_steps=True)

    found, seconds = compute(), []
    device = next(iter(found.values())).device
    for _ in range(repeats):
        _wait_for(device)
        start = time.perf_counter()
        compute()
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    return found, statistics.median(seconds), peak_memory(compute, device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _beside(
    reference: Params, rule: Rule, found: Params, seconds: float, memory: int
) -> MeasuredRule:
    """Return how a hypergradient compares with the reference."""
    g, x = tree.ravel(reference).double(), tree.ravel(found).double()
    size = g.norm()
    return MeasuredRule(
        rule,
        found,
        _number((x @ g) / (x.norm() * size)),
        _number(x.norm() / size),
        _number((x - g).norm() / size),
        seconds,
        memory,
    )


def _number(value: Tensor) -> float:
    return cast(float, value.tolist())

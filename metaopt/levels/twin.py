"""A graph beside another, in the same state, with something exchanged: to look at, not to step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import functional
from metaopt.differentiate import Rule
from metaopt.levels.check_plan import check_plan
from metaopt.levels.data import LevelData
from metaopt.levels.edge import Edge
from metaopt.levels.graph import LevelGraph
from metaopt.levels.level import Level
from metaopt.levels.plan import Plan
from metaopt.tree import Tree


def with_rules(graph: LevelGraph, rule: Callable[[Edge], Rule]) -> LevelGraph:
    """Return the graph with `rule(edge)` for the rule of each edge; it reads the same data.

    Raises:
        ValueError: the rules contradict each other, or do not suit an edge.
    """
    edges = tuple(replace(edge, differentiate=rule(edge)) for edge in graph.plan.edges)
    plan = replace(graph.plan, edges=edges)
    check_plan(plan)
    return _make_twin(graph, plan)


def in_float64(graph: LevelGraph) -> LevelGraph:
    """Return the graph with all tensors and models in float64, uncompiled, without autocast."""
    levels = {name: _level_in_float64(level) for name, level in graph.plan.levels.items()}
    initial = _in_float64(graph.plan.initial)
    plan = replace(graph.plan, levels=levels, initial=initial, compile=False)
    twin = _make_twin(graph, plan)
    twin._states = _in_float64(graph._states)
    twin._data = {name: _DataInFloat64(data) for name, data in graph._data.items()}
    return twin


def _make_twin(graph: LevelGraph, plan: Plan) -> LevelGraph:
    twin = copy.copy(graph)
    twin.plan = plan
    return twin


def _level_in_float64(level: Level) -> Level:
    twin = copy.copy(level)
    twin.net, twin.precision = functional(copy.deepcopy(level.model).double()), None
    return twin


class _DataInFloat64(LevelData):
    def __init__(self, data: LevelData):
        super().__init__(data.level, None, data.device)
        self._original = data

    def peek(self, count: int) -> list[Tree]:
        known: dict[int, Tree] = {}  # a batch that comes again stays the same object
        return [
            known.setdefault(id(batch), _in_float64(batch)) for batch in self._original.peek(count)
        ]


def _in_float64(values: Tree) -> Tree:
    return tree.map(_leaf_in_float64, values)


def _leaf_in_float64(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return leaf.to(torch.complex128 if leaf.is_complex() else torch.float64)

"""The models hold the parameters: a level's state has them in the memory of its model.

A second copy beside the model would be one of a large model too many; and what a user writes into
the model between two steps, as loading weights does, is what the next step starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from metaopt import tree
from metaopt.levels.plan import Plan
from metaopt.levels.state import State, States
from metaopt.torch_internals import foreach_copy_
from metaopt.transforms import find_memories, part_from, spread_like, take_local


def part_from_models(plan: Plan, states: States) -> States:
    """Return the states with copies of what lies in the memory of the models.

    An optimizer may remember the parameters that it was given, and a metric be one of them: what is
    written into the models must not change these.
    """
    held = [leaf for name in plan.held_by_models for leaf in plan.nets[name].params.values()]
    return tree.map(partial(part_from, find_memories(held)), states)  # type: ignore[no-any-return]


def write_into_models(plan: Plan, states: States, before: States) -> None:
    """Write the values of parameters and buffers into the models, but not those of copies.

    Args:
        plan: of the graph.
        states: with the values.
        before: the states with what lies in the models already.
    """
    there = dict(_walk(before))
    models: list[Tensor] = []
    values: list[Tensor] = []
    for name, state in _walk(states):
        net = plan.nets[name]
        if plan.levels[name].copies:  # one module cannot hold them all
            continue
        held = name in plan.held_by_models and name in there
        lying = there[name]["params"] if held else {}
        for own, now in (
            (net.params, state["params"]),
            (net.buffers if state["buffers"] else {}, state["buffers"]),
        ):
            for key, leaf in own.items():
                if now[key] is not lying.get(key):
                    # what an optimizer returns may be spread in another way
                    models.append(take_local(leaf))
                    values.append(take_local(spread_like(now[key], leaf)))
    with torch.no_grad():
        foreach_copy_(models, values)


def share_with_models(plan: Plan, states: States) -> States:
    """Return the states with the parameters that lie in the models, whose values they have."""
    shared: States = {}
    for name, state in states.items():
        params = state["params"]
        if name in plan.held_by_models:
            params = {key: param.detach() for key, param in plan.nets[name].params.items()}
        below = share_with_models(plan, state["below"])
        shared[name] = {**state, "params": params, "below": below}
    return shared


def _walk(states: States) -> Sequence[tuple[str, State]]:
    pairs: list[tuple[str, State]] = []
    for name, state in states.items():
        pairs += [(name, state), *_walk(state["below"])]
    return pairs

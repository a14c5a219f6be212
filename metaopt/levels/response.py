"""How levels respond whose rules look at one point, and the way back through a chain of such
responses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params
from metaopt.autodiff.pullback import plus
from metaopt.autodiff.replay import Ambient
from metaopt.differentiate import End, InnerLoop, PointRule, attach, pulled_back
from metaopt.levels.program import Rules, detached

# (level, its rules, the steps it made, where they ended) -> the last parameters, with or without a
# derivative
Respond = Callable[[str, Rules, InnerLoop, End], Params]


def attached(level: str, rules: Rules, loop: InnerLoop, end: End) -> Params:
    """Return the last parameters with the derivative of each rule in the levels it is for, and of
    the first in all others.
    """
    scene, tensors = loop.inputs["meta"]
    end = end._replace(state=detached(end.state))

    def part(rule: Any, names: Iterable[str]) -> Params:
        seen = {name: shown if name in names else detached(shown) for name, shown in scene.items()}
        return attach(rule, replace(loop, inputs={**loop.inputs, "meta": (seen, tensors)}), end)

    (first, names), *more = _parts(rules, scene)
    params = part(first, names)
    for rule, uppers in more:  # zeros with a derivative
        params = tree.map(
            lambda total, one: total + (one - one.detach()), params, part(rule, uppers)
        )
    return params


Slope = dict[str, Tensor | None]


class Response(NamedTuple):
    """Where a level's steps ended, and what running its rules there takes."""

    level: str
    rules: Rules
    loop: InnerLoop
    end: End
    ambient: Ambient | None  # whose random numbers the rules see


def noted(
    responses: list[Response],
    random: Collection[str],
    level: str,
    rules: Rules,
    loop: InnerLoop,
    end: End,
) -> Params:
    """Return the last parameters as constants, and add the response to the list; the levels named
    in `random` draw numbers.
    """
    winds_back = level in random and not torch.compiler.is_compiling()
    ambient = Ambient.now(tree.leaves((loop.inputs, *end))) if winds_back else None
    responses.append(Response(level, rules, loop, end, ambient))
    return end.params  # type: ignore[no-any-return]


def through(responses: Sequence[Response], slopes: Mapping[str, Slope], root: str) -> Slope:
    """Return the total derivative in the parameters of `root`: the direct one, and what every
    response pulls back to it.

    Args:
        responses: in the order of time. Each reads `root`, and of the other levels what the last
            response before it left.
        slopes: level -> derivative in the parameters that its last response left, and of `root` in
            its own; None is zero.
        root: the level above all of them.

    Cost:
        One pullback of every response that matters, however many paths lead to it.
    """
    total, moving = dict(slopes), {root} | {response.level for response in responses}
    for response in reversed(responses):
        slope = total.pop(response.level, {})
        if all(part is None for part in slope.values()):
            continue
        v = {
            key: torch.zeros_like(response.end.params[key]) if part is None else part
            for key, part in slope.items()
        }
        for rule, names in _parts(response.rules, response.loop.inputs["meta"][0]):
            assert isinstance(rule, PointRule)
            for level, bars in _pulled(rule, names & moving, response, v).items():
                before = total.get(level, {})
                total[level] = {key: plus(bar, before.get(key)) for key, bar in bars.items()}
    return total[root]


def _pulled(
    rule: PointRule, levels: frozenset[str], response: Response, v: Params
) -> dict[str, Slope]:
    """Return level -> cotangent of its parameters."""
    if not levels:
        return {}
    _, _, loop, end, ambient = response
    scene, _ = loop.inputs["meta"]
    in_scene = {name: {"params": name in levels, "buffers": False} for name in scene}
    wanted = {"loss": False, "meta": (in_scene, False), "batch": False}
    with nullcontext() if ambient is None else ambient.restored():
        bars, _ = pulled_back(rule, loop, end, v, (wanted, False))
    return {name: bars["meta"][0][name]["params"] for name in levels}


def _parts(rules: Rules, levels: Iterable[str]) -> Rules:
    """Return the rules with the levels that each is for, the first with all that no other one
    names.
    """
    (first, _), *more = rules
    elsewhere = frozenset().union(*(uppers for _, uppers in more))
    return [(first, frozenset(levels) - elsewhere), *more]

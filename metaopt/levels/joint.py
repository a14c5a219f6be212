"""One rule out of several: edges into one level, each with its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaopt.autodiff.replay import drawn_again
from metaopt.differentiate import End, InnerLoop, PointRule
from metaopt.differentiate.point import Read, fill_none
from metaopt.tree import Tree


@dataclass(frozen=True)
class JointRule(PointRule):
    """Pull back to each level above by the rule of its edge, and to all else by the first.

    Attributes:
        parts: (rule, names of the upper levels that it is for).
    """

    parts: tuple[tuple[PointRule, frozenset[str]], ...]

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return any(rule.looks_back for rule, _ in self.parts)

    def __str__(self) -> str:
        return str(self.parts[0][0])

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Read
    ) -> tuple[Read, dict[str, Tensor]]:
        """Return the cotangents of what the loss reads, from one pullback a rule."""
        in_inputs, in_batch = wanted
        in_scene, in_window = in_inputs["meta"]
        others = frozenset().union(*(uppers for _, uppers in self.parts[1:]))
        to_scene: dict[str, Any] = dict.fromkeys(in_scene)
        first: Any = None
        for rule, uppers in self.parts:
            is_first = rule is self.parts[0][0]
            mine = {
                name: part if (name not in others if is_first else name in uppers) else False
                for name, part in in_scene.items()
            }
            # what lies outside of the scene, such as the window, is the first rule's
            inputs = {"loss": False, "batch": False, "meta": (mine, False)}
            if is_first:
                inputs = {**in_inputs, "meta": (mine, in_window)}
            read = (inputs, in_batch if is_first else False)
            with drawn_again(loop.inputs, end):  # a random loss is one loss, whichever the rule
                bars, to_batch = fill_none(rule.pull_back(loop, end, cotangent, read)[0], read)
            first = (bars, to_batch) if is_first else first
            to_scene |= {
                name: bar for name, bar in bars["meta"][0].items() if mine[name] is not False
            }
        to_inputs, to_batch = first
        to_window = to_inputs["meta"][1]
        return ({**to_inputs, "meta": (to_scene, to_window)}, to_batch), {}

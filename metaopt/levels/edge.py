"""One edge: which level is below which, and how its response is differentiated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from metaopt.checks import check_count
from metaopt.differentiate import Backprop, Rule
from metaopt.levels.level import Level
from metaopt.optimizer import Optimizer

Start = Literal["continue", "restart", "upper"]


@dataclass(frozen=True, eq=False)
class Edge:
    """The lower level responds to the upper one: it makes `steps` steps for one of the upper.

    Args:
        upper: the level whose parameters the lower one reads, in its loss or through its optimizer.
        lower: the level that responds.
        steps: steps of the lower level for one of the upper level.
        start: "continue" goes on from where the lower level stood, "restart" begins at its initial
            parameters with a fresh optimizer state, "upper" so at the upper level's present
            parameters (MAML), which then have the same names and shapes.
        differentiate: how the derivative of the response is taken. Rules that differentiate the
            steps (`Backprop`, ...) see those since the upper level's last step; rules that look at
            where the steps ended (`Implicit`, ...) do so there.
        look_ahead: make the lower level's steps for the hypergradient only, and, when the upper
            level has moved, once more with its new parameters, on the same batches (the virtual
            step of meta-weight-net and DARTS). Given an optimizer, the steps for the hypergradient
            are its own, from a fresh state: the virtual step of meta-weight-net is one of plain
            SGD, also where the lower level has another optimizer.

    Raises:
        TypeError: an end is no `Level`, `differentiate` no rule, or `look_ahead` neither a bool nor
            an optimizer.
        ValueError: `steps` is not positive, or `start` unknown.
    """

    upper: Level
    lower: Level
    steps: int = field(default=1, kw_only=True)
    start: Start = field(default="continue", kw_only=True)
    differentiate: Rule = field(default=Backprop(), kw_only=True)
    look_ahead: bool | Optimizer = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for what, level in (("upper", self.upper), ("lower", self.lower)):
            if not isinstance(level, Level):
                raise TypeError(
                    f"Edge: `{what}` must be a Level, got {level!r}. An edge has a level at both "
                    f"ends."
                )
        check_count(str(self), "steps", self.steps)
        if self.start not in get_args(Start):
            raise ValueError(
                f'{self}: `start` must be "continue", "restart" or "upper", got {self.start!r}.'
            )
        if not isinstance(self.differentiate, Rule):
            raise TypeError(
                f"{self}: `differentiate` must be a rule, got {self.differentiate!r}. For example "
                f"`mo.Backprop()`."
            )
        if not isinstance(self.look_ahead, bool | Optimizer):
            raise TypeError(
                f"{self}: `look_ahead` must be True, False, or the metaopt Optimizer of the "
                f"virtual steps, got {self.look_ahead!r}."
                " For example `look_ahead=SGD(0.1)`."
            )

    def __str__(self) -> str:
        return f"Edge {self.upper.name} -> {self.lower.name}"

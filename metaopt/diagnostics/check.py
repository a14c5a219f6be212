"""A hypergradient beside finite differences of what it is the derivative of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from metaopt import tree
from metaopt.autodiff.replay import drawn_again
from metaopt.checks import check_count, check_positive
from metaopt.differentiate import Backprop
from metaopt.levels import LevelGraph
from metaopt.levels.twin import in_float64, with_rules
from metaopt.table import write_table

STEP = 1e-5  # error of a central difference: step^2 by curvature, 1e-16 / step by rounding


@dataclass(frozen=True)
class HypergradientCheck:
    """Slopes of a level's T(w) along directions of length 1.

    Attributes:
        slopes: <dT/dw, direction>, as the graph's rules say.
        differences: (T(w + h direction) - T(w - h direction)) / 2h.
    """

    slopes: tuple[float, ...]
    differences: tuple[float, ...]

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """Return |slope - difference| / max(|slope|, |difference|) for each; 0 where both are 0."""
        pairs = zip(self.slopes, self.differences, strict=True)
        return tuple(abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0 for a, b in pairs)

    def table(self) -> str:
        """Return a row per direction."""
        rows = [*zip(self.slopes, self.differences, self.relative_errors, strict=True)]
        return write_table(
            ["slope by the rules", "finite difference", "relative error"],
            rows,
            [".6g", ".6g", ".1e"],
        )


def hypergradient_check(
    graph: LevelGraph,
    level: str,
    *,
    directions: int = 4,
    seed: int = 0,
    step: float = STEP,
    tolerance: float | None = 1e-5,
) -> HypergradientCheck:
    """Compare a level's hypergradient with central differences of its T(w) along directions.

    T(w) is the level's loss after the steps that the levels below make until its next step, on the
    next batches. The whole graph is copied in float64, models too; rules, which the differences do
    not use, are those of its edges. Both see the same random numbers. The graph, its data and the
    generators stay as they are.

    A rule with a bias fails by it, an implicit rule by how far the lower level is from converged:
    to pass, let the edges make many steps. For a hypergradient that fails although its rule is
    exact, see that the loss is smooth, that it is a function of what the levels and the batch give
    it (what it holds back with `detach` has no derivative, but changes T), and that the step is
    small enough.

    Args:
        graph: in any state. A loss that closes over float32 tensors may not work in float64; pass
            them as data.
        level: whose hypergradient.
        directions: number of them, uniform on the sphere.
        seed: that they are drawn with.
        step: h, the length of the displacement of all parameters together.
        tolerance: largest relative error along any direction; None raises nothing.

    Raises:
        ValueError: a number is out of range, or an error is above the tolerance, or not a number.

    Cost:
        One hypergradient, and 2 T a direction.
    """
    check_count("hypergradient_check", "directions", directions)
    check_positive("hypergradient_check", "step", step)
    twin = in_float64(graph)
    by_steps = with_rules(twin, lambda _: Backprop())
    with drawn_again(graph.state_dict()["levels"]):
        hypergradient = twin.hypergradient(level, after_steps=True)
    generator = torch.Generator().manual_seed(seed)
    params = twin.params(level)

    def objective(vector: torch.Tensor) -> torch.Tensor:
        with drawn_again(params):
            return by_steps.objective(level, tree.unravel(vector, params))

    center, gradient = tree.ravel(params), tree.ravel(hypergradient)
    slopes, differences = [], []
    for _ in range(directions):
        direction = torch.randn(len(center), generator=generator, dtype=torch.float64).to(
            center.device
        )
        direction = direction / direction.norm()
        slopes.append(cast(float, (gradient @ direction).tolist()))
        ahead, behind = objective(center + step * direction), objective(center - step * direction)
        differences.append(cast(float, ((ahead - behind) / (2 * step)).tolist()))
    check = HypergradientCheck(tuple(slopes), tuple(differences))
    if tolerance is not None and not all(error <= tolerance for error in check.relative_errors):
        rules = ", ".join(sorted({str(edge.differentiate) for edge in graph.plan.edges}))
        raise ValueError(
            f"hypergradient_check: level {level!r} must agree with finite differences to "
            f"{tolerance:g}, got\n{check.table()}\nThe rules are {rules}. A rule with a bias "
            f"differs by it, an implicit rule while the lower level has not converged; pass "
            "`tolerance=None` to look at the numbers. With an exact rule: is the loss smooth, and "
            "detaches nothing?"
        )
    return check

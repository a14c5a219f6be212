"""A learned schedule that is a curve over time: the posterior mean of a Gaussian process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metaopt.checks import check_count, check_number, check_positive
from metaopt.optimizer import Schedule, Value

from ...scalars import scalar_dtype
from ..cosine import Cosine
from ..warmup import Warmup
from .changes import bounded
from .learned import LearnedSchedule

JITTER = 1e-8  # of the diagonal of K(Z, Z)


class GPSchedule(LearnedSchedule):
    """change_t = max_change bounded(m(t) / max_change), m(t) = k(x_t, Z) (K(Z, Z) + jitter)^-1 u.

    m is the posterior mean of a Gaussian process with the kernel k(x, x') = exp(-(x - x')^2 /
    (2 length_scale^2)), given the values u at the places Z: it is linear in u, by a matrix that is
    computed once. The places are evenly spread over x = sqrt(t / steps), from 0 to 1, so that the
    first steps, where a warm-up is, have more of them. u is learned and starts at 0: untrained, it
    is the schedule that it starts from. It depends on time alone.

    Args:
        initial: the peak of a warm-up over the first twentieth of the steps with cosine decay; or
            a schedule to start from.
        steps: T; beyond, the change stays as it is.
        points: number of places.
        length_scale: of the kernel, on the axis x.
        max_change: bound on the change: of the value's logarithm; or of the value itself, as a
            fraction of the start.
        change: "multiplicative" or "additive", see `LearnedSchedule`.

    Raises:
        ValueError: an argument that is not positive, or another word.

    Cost:
        `points` multiplications a step, in float64; the matrix has steps + 1 rows.

    Reference:
        Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, equation 2.25.
    """

    def __init__(
        self,
        initial: float | Schedule = 0.1,
        steps: int = 100,
        *,
        points: int = 8,
        length_scale: float = 0.2,
        max_change: float = 3.0,
        change: str = "multiplicative",
    ):
        super().__init__(initial, steps, max_change, change)
        self.points = check_count(self, "points", points)
        self.length_scale = check_positive(
            self, "length_scale", check_number(self, "length_scale", length_scale)
        )
        self.values = nn.Parameter(torch.zeros(points))
        self._wave = Warmup(Cosine(1.0, self.steps), max(1, self.steps // 20), start=0.1)
        # No buffer: `module.to(dtype)` would round it, and K is badly conditioned.
        self._matrix = posterior_matrix(self.steps, self.points, self.length_scale)

    @property
    def hand_made(self) -> Schedule:
        """The schedule that it starts from."""
        return self.initial if isinstance(self.initial, Schedule) else self._wave

    def init(self, like: Tensor) -> dict[str, Any]:
        return self._init_start(like)

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        start, own = self._start(state, step=step, loss=loss, grads=grads)
        return self._value(start, self._change(step, grads[0])), own

    def value_at(self, state: Any, *, step: Tensor, like: Tensor, **seen: Any) -> Value:
        start = self._start_at(state, step=step, like=like, **seen)
        return self._value(start, self._change(step, like))

    def _change(self, step: Tensor, like: Tensor) -> Tensor:
        at = step.clamp(max=self.steps).reshape(1)
        # indexing by a tensor would read its value
        row = self._matrix.to(step.device).index_select(0, at)[0]
        mean = row @ self.values.double()
        change = self.max_change * bounded(mean / self.max_change)
        return change.to(scalar_dtype(like))


def posterior_matrix(steps: int, points: int, length_scale: float) -> Tensor:
    """Return K(X, Z) K(Z, Z)^-1 for X = all of 0, 1, ..., steps: [steps + 1, points], float64."""
    with torch.device("cpu"):  # also where a module is built without memory
        times = (torch.arange(steps + 1, dtype=torch.float64) / steps).sqrt()
        places = torch.linspace(0, 1, points, dtype=torch.float64)
        eye = torch.eye(points, dtype=torch.float64)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-(a[:, None] - b).square() / (2 * length_scale**2)).exp()

    lower = torch.linalg.cholesky(kernel(places, places) + JITTER * eye)
    return torch.cholesky_solve(kernel(places, times), lower).mT

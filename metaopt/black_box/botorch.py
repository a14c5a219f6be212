"""Bayesian optimisation in its plainest form, on BoTorch's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from metaopt.black_box.backend import Backend
from metaopt.black_box.isolation import derive_seed, isolate
from metaopt.black_box.sampling import Sobol
from metaopt.black_box.space import CENTRE, Choice, Float, Space, Values
from metaopt.black_box.trial import Trial, fill_losses
from metaopt.checks import check_count

WORST = 20.0  # units above the median at which a loss ends
CANDIDATES = 512  # points of the space that are scored before some are improved
IMPROVED = 4  # of them, whose real numbers are then moved uphill
FEWEST = 2  # losses that make a model
KEPT = 0.5  # chance that a candidate near the best trial has a coordinate from it


@dataclass(frozen=True)
class BoTorch(Backend):
    """A Gaussian process of the loss, and the point with the largest expected improvement on it.

    The first points are a Sobol sequence. Then, with f the Gaussian process (Matern 5/2 kernel, a
    length for each axis, fitted with a prior whose lengths grow with the number of axes) and y the
    least loss so far:

        next point = argmax_x log E[max(y - f(x), 0)]

    The process is of compressed losses, since those of trainings that nearly blew up would leave no
    difference between the others. With m the median:

        t = (loss - m) / (m - y), and f is of t below 0, of log(1 + t) above

    A choice of n options has n axes, one for each, on which it is 0 or 1; other parameters have one
    axis, on which their range (or its logarithm) is [0, 1]. A parameter that is not active stands
    at its centre. The maximum is found among points of the space itself: 512 points of a Sobol
    sequence, of which every other one takes about half of its coordinates from the best trial. The
    best four are moved along the axes of real numbers by L-BFGS, their integers and choices held.
    Trials that still run count through the process's own samples of their losses. Failed trials,
    see `fill_losses`.

    Args:
        seed: of everything random.
        initial: number of first points.

    Raises:
        ValueError: `initial` or `seed` is out of range.
        ModuleNotFoundError: on the first suggestion, if the extra `blackbox` is not installed.

    Cost:
        Of a suggestion after n trials, O(n^3) with n in the hundreds at most: about a second.

    Reference:
        Jones, Schonlau, Welch 1998, Efficient global optimization of expensive black-box functions,
        J. Global Optimization 13. Ament et al. 2023, arXiv:2310.20708 (the logarithm). Balandat et
        al. 2020, arXiv:1910.06403 (BoTorch). Hvarfner et al. 2024, arXiv:2402.02229 (the prior).
    """

    seed: int = 0
    initial: int = 5

    def __post_init__(self) -> None:
        check_count(self, "seed", self.seed, least=0)
        check_count(self, "initial", self.initial)

    def suggest(self, space: Space, trials: Sequence[Trial]) -> Values:
        known = fill_losses(trials)
        if len(trials) < self.initial or len(known) < FEWEST:
            return Sobol(self.seed).suggest(space, trials)
        with isolate("`BoTorch`", "botorch.models", derive_seed(self.seed, len(trials))):
            improvement = _make_improvement(space, known, _find_running(space, trials))
            seed = derive_seed(self.seed, len(trials))
            best, _ = min(known, key=lambda pair: pair[1])
            return _maximize(improvement, space, _draw_candidates(space, best.values, seed))

    def find_importance(self, space: Space, trials: Sequence[Trial]) -> dict[str, float]:
        """Return the share of each parameter in the sum of the inverse lengths of the kernel."""
        known = fill_losses(trials)
        if len(known) < self.initial:
            return {}
        with isolate("`BoTorch`", "botorch.models", derive_seed(self.seed, 0)):
            kernel = _fit(space, known).covar_module
        lengths = kernel.lengthscale.detach().flatten()
        inverse = iter((1 / lengths).tolist())
        total = {
            name: sum(next(inverse) for _ in range(_count_axes(parameter)))
            for name, parameter in space.items()
        }
        return {name: value / sum(total.values()) for name, value in total.items()}


def _fit(space: Space, known: Sequence[tuple[Trial, float]]) -> Any:
    """Return the Gaussian process of minus the compressed loss."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
    from gpytorch.mlls import ExactMarginalLogLikelihood

    points = torch.stack([embed(space, trial.values) for trial, _ in known])
    kernel = get_covar_module_with_dim_scaled_prior(points.shape[1], use_rbf_kernel=False)
    # BoTorch maximises; it standardises by itself
    model = SingleTaskGP(points, -_compress(known)[:, None], covar_module=kernel)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def _compress(known: Sequence[tuple[Trial, float]]) -> Tensor:
    """Return the losses in units of median minus least, logarithmic above the median.

    They end at 20 units above it: how badly a training blew up says nothing about the good ones.
    """
    losses = torch.tensor([loss for _, loss in known], dtype=torch.float64)
    middle, least, largest = losses.median(), losses.min(), losses.max()
    unit = middle - least if middle > least else largest - least
    scaled = (losses - middle) / (unit if unit > 0 else 1.0)  # all may be equal
    return torch.where(scaled > 0, scaled.clamp(0, WORST).log1p(), scaled)


def _make_improvement(
    space: Space, known: Sequence[tuple[Trial, float]], running: Tensor | None
) -> Any:
    """Return x -> log expected improvement."""
    model = _fit(space, known)
    from botorch.acquisition.analytic import LogExpectedImprovement
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement

    if running is None:
        return LogExpectedImprovement(model, best_f=-_compress(known).min())
    points = torch.stack([embed(space, trial.values) for trial, _ in known])
    return qLogNoisyExpectedImprovement(model, points, X_pending=running)


def _draw_candidates(space: Space, best: Values, seed: int) -> list[Values]:
    """Return points all over the space, every other one with coordinates of the best trial."""
    units = SobolEngine(len(space), scramble=True, seed=seed).draw(CANDIDATES, dtype=torch.float64)
    place = [space[name].to_unit(best[name]) if name in best else CENTRE for name in space]
    chances = torch.rand(units.shape, generator=torch.Generator().manual_seed(seed))
    is_near = torch.arange(CANDIDATES)[:, None] % 2 == 1
    units = torch.where(is_near & (chances < KEPT), units.new_tensor(place), units)
    return [space.place(dict(zip(space, unit, strict=True))) for unit in units.tolist()]


def _maximize(improvement: Any, space: Space, candidates: Sequence[Values]) -> Values:
    """Return the values at the best point found."""
    from botorch.optim.optimize import optimize_acqf

    points = torch.stack([embed(space, values) for values in candidates])
    with torch.no_grad():
        scores = improvement(points[:, None])
    best: list[tuple[float, Values]] = []
    for index in scores.topk(IMPROVED).indices.tolist():
        values, point, score = candidates[index], points[index], float(scores[index])
        held = {axis: float(point[axis]) for axis in _find_held_axes(space, values)}
        if len(held) < len(point):
            found: Any = optimize_acqf(
                improvement,
                bounds=torch.tensor([[0.0], [1.0]], dtype=point.dtype).expand(2, len(point)),
                q=1,
                num_restarts=1,
                batch_initial_conditions=point[None, None],
                fixed_features=held,
            )
            point, score = found[0][0], float(found[1])
        best.append((score, _move(space, values, point)))
    return max(best, key=lambda pair: pair[0])[1]


def embed(space: Space, values: Values) -> Tensor:
    """Return a point of the space as a point of the unit cube, [axes], float64."""
    axes: list[float] = []
    for name, parameter in space.items():
        if isinstance(parameter, Choice):
            axes += [
                float(name in values and option == values[name]) for option in parameter.options
            ]
        else:
            axes.append(parameter.to_unit(values[name]) if name in values else CENTRE)
    return torch.tensor(axes, dtype=torch.float64)


def _move(space: Space, values: Values, point: Tensor) -> Values:
    """Return the values with the real numbers of a point."""
    place = iter(point.tolist())
    moved = dict(values)
    for name, parameter in space.items():
        axes = [next(place) for _ in range(_count_axes(parameter))]
        if isinstance(parameter, Float) and name in values:
            moved[name] = parameter.from_unit(axes[0])
    return moved


def _find_held_axes(space: Space, values: Values) -> list[int]:
    """Return the axes of all but active real numbers."""
    held: list[int] = []
    axis = 0
    for name, parameter in space.items():
        count = _count_axes(parameter)
        if not isinstance(parameter, Float) or name not in values:
            held += range(axis, axis + count)
        axis += count
    return held


def _count_axes(parameter: object) -> int:
    return len(parameter.options) if isinstance(parameter, Choice) else 1


def _find_running(space: Space, trials: Sequence[Trial]) -> Tensor | None:
    running = [embed(space, trial.values) for trial in trials if not trial.has_ended]
    return torch.stack(running) if running else None

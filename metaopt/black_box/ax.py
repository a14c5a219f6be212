"""Ax behind our protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metaopt.black_box.backend import Backend
from metaopt.black_box.isolation import derive_seed, isolate
from metaopt.black_box.space import Choice, Float, Parameter, Space, Value, Values
from metaopt.black_box.trial import Trial, fill_losses
from metaopt.checks import check_count

LOSS = "loss"
FEWEST = 2  # losses that make a model
MOST_LISTED = 10_000  # integers that Ax may list one by one; of more it sees real numbers
OPTION = "_OH_PARAM_"  # between a category and the number of its option, in what Ax returns


@dataclass(frozen=True)
class Ax(Backend):
    """Bayesian optimisation by Ax, through its `Client`.

    The first points are a Sobol sequence, the others come from Ax's default model. A client is made
    for each suggestion and told all trials, so that nothing but these decides: Ax's own snapshots
    drop the seed. Only losses that are finite reach it (it accepts nan, and then finds no best
    trial); failed trials, see `fill_losses`. Choices are categories. Ax sees a space without
    conditions: a parameter that is not active stands at its centre.

    Args:
        seed: of everything random.
        initial: number of first points.
        constraints: linear inequalities between numbers, in Ax's own form: `("x1 + x2 <= 3.5",)`.
        configure: called with the `ax.api.client.Client` when it knows the space, the objective and
            its default strategies, and none of the trials: the place to set an own generation
            strategy (`client.set_generation_strategy(...)`), own early stopping
            (`client.set_early_stopping_strategy(...)`) or to reach the experiment. It is called for
            each suggestion. With it, all points come from the client's own strategy.

    Raises:
        ValueError: `initial` or `seed` is out of range.
        ModuleNotFoundError: on the first suggestion, if the extra `blackbox` is not installed.

    Cost:
        To import Ax takes 3 seconds. A suggestion of the model takes about a second where all
        parameters are real, and several with choices.

    Reference:
        Olson et al. 2025, Ax: a platform for adaptive experimentation, AutoML 2025.
    """

    seed: int = 0
    initial: int = 5
    constraints: tuple[str, ...] = ()
    configure: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        check_count(self, "seed", self.seed, least=0)
        check_count(self, "initial", self.initial)
        if isinstance(self.constraints, str):
            raise TypeError(
                f"Ax: `constraints` must be a tuple of texts, got {self.constraints!r}. Write "
                f"({self.constraints!r},)."
            )

    def suggest(self, space: Space, trials: Sequence[Trial]) -> Values:
        number = len(trials)
        points = math.prod(map(_count_points, space.values()))
        if number >= points:  # Ax suggests none twice
            return dict(trials[number % int(points)].values)
        with isolate("`Ax`", "ax.api.client", derive_seed(self.seed, number)):
            is_first = number < self.initial or len(fill_losses(trials)) < FEWEST
            if is_first and self.configure is None:
                client = self._make_client(space, derive_seed(self.seed, 0), first=True)
                # the sequence from its beginning, as no client is kept
                suggested = list(client.get_next_trials(number + 1).values())[number]
            else:
                client = self._make_client(space, derive_seed(self.seed, number), first=False)
                _attach(client, space, trials)
                (suggested,) = client.get_next_trials(1).values()
        return space.keep_active(_from_ax(space, suggested))

    def should_stop(self, space: Space, trials: Sequence[Trial], trial: Trial) -> bool:
        """Return what the client's strategy says: by default, worse than half of the others.

        Ax wants reports of five other trials, and ten of this one.
        """
        with isolate("`Ax`", "ax.api.client", derive_seed(self.seed, trial.number)):
            client = self._make_client(space, derive_seed(self.seed, 0), first=False)
            places = _attach(client, space, trials)
            return bool(client.should_stop_trial_early(places[trial.number]))

    def find_importance(self, space: Space, trials: Sequence[Trial]) -> dict[str, float]:
        """Return Ax's total Sobol indices of the model's mean, as shares; it takes seconds."""
        if len(fill_losses(trials)) < self.initial:
            return {}
        with isolate("`Ax`", "ax.api.client", derive_seed(self.seed, 0)):
            from ax.analysis.plotly.sensitivity import SensitivityAnalysisPlot

            client = self._make_client(space, derive_seed(self.seed, 0), first=False)
            _attach(client, space, trials)
            client.get_next_trials(1)  # fits the model
            analysis = SensitivityAnalysisPlot(order="total", top_k=None)
            (card,) = client.compute_analyses([analysis], display=False)
        total = dict.fromkeys(space, 0.0)
        for label, index in zip(card.df["parameter_name"], card.df["sensitivity"], strict=True):
            # Of more than two options each has an index. An index is a mean over samples, and may
            # come out a little below 0.
            name = label if label in total else label.rsplit(OPTION, 1)[0]
            total[name] += max(float(index), 0.0)
        whole = sum(total.values())
        # nan where all losses are equal
        return {name: index / whole for name, index in total.items() if index} if whole > 0 else {}

    def _make_client(self, space: Space, seed: int, *, first: bool) -> Any:
        from ax.api.client import Client

        client = Client(random_seed=seed)
        client.configure_experiment(
            parameters=[_to_ax_parameter(name, parameter) for name, parameter in space.items()],
            parameter_constraints=list(self.constraints),
        )
        client.configure_optimization(objective=f"-{LOSS}")
        client.configure_generation_strategy(
            method="random_search" if first else "fast",
            initialization_budget=0,
            initialization_random_seed=seed,
            initialize_with_center=False,
        )
        if self.configure is not None:
            self.configure(client)
        return client


def _attach(client: Any, space: Space, trials: Sequence[Trial]) -> dict[int, int]:
    """Tell a client the trials, and return our numbers -> its own."""
    losses = {trial.number: loss for trial, loss in fill_losses(trials)}
    places = {}
    for trial in trials:
        if trial.has_ended and trial.number not in losses:  # all have failed until now
            continue
        place = places[trial.number] = client.attach_trial(_to_ax(space, trial.values))
        for step, loss in trial.reports.items():
            client.attach_data(place, {LOSS: loss}, progression=step)
        if trial.status == "stopped early" and trial.reports:
            client.mark_trial_early_stopped(place)
        elif trial.has_ended:
            last = max(trial.reports, default=None)
            client.complete_trial(place, {LOSS: losses[trial.number]}, progression=last)
    return places


def _count_points(parameter: Parameter) -> float:
    """Return how many values a parameter has."""
    if isinstance(parameter, Choice):
        return len(parameter.options)
    return math.inf if isinstance(parameter, Float) else parameter.high - parameter.low + 1


def _to_ax_parameter(name: str, parameter: Any) -> Any:
    from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig

    if isinstance(parameter, Choice):
        labels = [_label(option) for option in parameter.options]
        return ChoiceParameterConfig(name, labels, parameter_type="str", is_ordered=False)
    return RangeParameterConfig(
        name,
        (parameter.low, parameter.high),
        parameter_type="float" if _count_points(parameter) > MOST_LISTED else "int",
        scaling="log" if parameter.log else "linear",
    )


def _to_ax(space: Space, values: Values) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, value in space.fill(values).items():
        parameter = space[name]
        if isinstance(parameter, Choice):
            told[name] = _label(value)
        else:
            told[name] = float(value) if _count_points(parameter) > MOST_LISTED else value
    return told


def _from_ax(space: Space, suggested: dict[str, Any]) -> Values:
    values: Values = {}
    for name, parameter in space.items():
        if isinstance(parameter, Choice):
            labels = {_label(option): option for option in parameter.options}
            values[name] = labels[suggested[name]]
        else:
            # a bound that went through a logarithm may come back a little outside
            value = min(max(suggested[name], parameter.low), parameter.high)
            values[name] = float(value) if isinstance(parameter, Float) else round(value)
    return values


def _label(option: Value) -> str:
    return repr(option)  # a category: True, 1 and "1" stay apart

"""Optuna behind our protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metaopt.black_box.backend import Backend
from metaopt.black_box.isolation import derive_seed, isolate
from metaopt.black_box.space import Choice, Int, Parameter, Space, Values
from metaopt.black_box.trial import Trial, fill_losses
from metaopt.checks import check_count


@dataclass(frozen=True)
class Optuna(Backend):
    """A sampler of Optuna, by default the tree-structured Parzen estimator.

    A study in memory is made for each suggestion and told all trials. Conditions are Optuna's own:
    a parameter that is not active is not sampled. Failed trials, see `fill_losses`.

    Args:
        seed: of everything random.
        sampler: makes the sampler, given `seed=`: a class such as `optuna.samplers.GPSampler`, or
            `functools.partial(optuna.samplers.TPESampler, multivariate=True)`. None: `TPESampler`,
            whose first ten points are random. It is made for each suggestion: one that keeps a
            state of its own (CMA-ES) begins again each time.
        pruner: says which trials to stop early, given their reports. None: `MedianPruner()`.

    Raises:
        ValueError: `seed` is out of range.
        TypeError: `sampler` cannot be called.
        ModuleNotFoundError: on the first suggestion, if the extra `blackbox` is not installed.

    Cost:
        A few milliseconds for a suggestion.

    Reference:
        Bergstra et al. 2011, Algorithms for hyper-parameter optimization, NeurIPS (TPE). Akiba et
        al. 2019, arXiv:1907.10902 (Optuna). Watanabe et al. 2023, arXiv:2304.10255 (importance).
    """

    seed: int = 0
    sampler: Callable[..., Any] | None = None
    pruner: Any = None

    def __post_init__(self) -> None:
        check_count(self, "seed", self.seed, least=0)
        if self.sampler is not None and not callable(self.sampler):
            raise TypeError(
                "Optuna: `sampler` must be a function that makes the sampler from a seed, got "
                f"{type(self.sampler).__name__}. Write sampler=optuna.samplers.GPSampler."
            )

    def suggest(self, space: Space, trials: Sequence[Trial]) -> Values:
        seed = derive_seed(self.seed, len(trials))
        with isolate("`Optuna`", "optuna", seed):
            study = self._make_study(space, trials, seed)
            trial = study.ask()
            values: Values = {}
            for name, parameter in space.items():
                if space.is_active(name, values):
                    values[name] = _sample(trial, name, parameter)
        return values

    def should_stop(self, space: Space, trials: Sequence[Trial], trial: Trial) -> bool:
        """Return what the pruner says."""
        with isolate("`Optuna`", "optuna", derive_seed(self.seed, trial.number)):
            study = self._make_study(space, trials, self.seed)
            (frozen,) = [one for one in study.trials if one.user_attrs["number"] == trial.number]
            return bool(study.pruner.prune(study, frozen))

    def find_importance(self, space: Space, trials: Sequence[Trial]) -> dict[str, float]:
        """Return what Optuna's default evaluator finds, PED-ANOVA."""
        if len([trial for trial in trials if trial.status == "done"]) < 2:
            return {}
        with isolate("`Optuna`", "optuna", self.seed):
            study = self._make_study(space, trials, self.seed)
            import optuna

            return dict(optuna.importance.get_param_importances(study))

    def _make_study(self, space: Space, trials: Sequence[Trial], seed: int) -> Any:
        import optuna

        storage = optuna.storages.InMemoryStorage()
        sampler = (self.sampler or optuna.samplers.TPESampler)(seed=seed)
        study = optuna.create_study(storage=storage, sampler=sampler, pruner=self.pruner)
        losses = {trial.number: loss for trial, loss in fill_losses(trials)}
        for trial in trials:
            if trial.has_ended and trial.number not in losses:  # all have failed until now
                continue
            study.add_trial(to_optuna_trial(space, trial, losses.get(trial.number)))
        return study


def to_optuna_trial(space: Space, trial: Trial, loss: float | None) -> Any:
    """Return a trial as Optuna writes it down, with a loss that may be that of a failed one."""
    from optuna.trial import TrialState, create_trial

    states = {"running": TrialState.RUNNING, "stopped early": TrialState.PRUNED}
    return create_trial(
        state=states.get(trial.status, TrialState.COMPLETE),
        value=loss,
        params=trial.values,
        distributions={name: to_distribution(space[name]) for name in trial.values},
        intermediate_values=dict(trial.reports),
        user_attrs={"number": trial.number},
    )


def to_distribution(parameter: Parameter) -> Any:
    """Return the parameter as Optuna has it."""
    from optuna import distributions

    if isinstance(parameter, Choice):
        return distributions.CategoricalDistribution(parameter.options)
    if isinstance(parameter, Int):
        return distributions.IntDistribution(parameter.low, parameter.high, log=parameter.log)
    return distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _sample(trial: Any, name: str, parameter: Parameter) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.options)
    if isinstance(parameter, Int):
        return trial.suggest_int(name, parameter.low, parameter.high, log=parameter.log)
    return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)

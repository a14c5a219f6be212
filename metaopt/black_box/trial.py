"""What is known of one evaluation of the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from metaopt.black_box.space import Values

LARGEST = 1e100  # of the losses that a model sees
Status = Literal["running", "done", "failed", "non-finite", "stopped early"]


@dataclass(frozen=True)
class Trial:
    """One evaluation of the objective.

    Args:
        number: its place among the trials, from 0.
        values: parameter -> value, of the active parameters.
        status: "running"; "done"; "failed", the objective raised; "non-finite", the loss is
            infinite or not a number; "stopped early", after a report.
        loss: what is minimised; None while running, failed or not finite.
        metrics: what else the objective returned.
        reports: step -> loss on the way.
        error: what went wrong.
        seconds: how long it took, wall time.
        attempt: 1, and one more for each process that died while it ran this.
    """

    number: int
    values: Values
    status: Status = "running"
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    reports: Mapping[int, float] = field(default_factory=dict)
    error: str | None = None
    seconds: float | None = None
    attempt: int = 1

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be known of it."""
        return self.status != "running"


def find_best(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the least loss among those that are done; of equals the first."""
    done = [trial for trial in trials if trial.status == "done"]
    return min(done, key=_get_loss, default=None)


def fill_losses(trials: Sequence[Trial]) -> list[tuple[Trial, float]]:
    """Return the trials that have ended, with the losses that a model of the objective sees.

    One that failed or is not finite counts as the worst loss of the others: so a model learns to
    keep away from there, and is not driven by a number that was made up. While all have failed
    nothing is known, and there are none. Losses beyond +-1e100 count as that: squares stay finite.
    """
    known = [trial.loss for trial in trials if trial.has_ended and trial.loss is not None]
    if not known:
        return []
    worst = max(known)
    return [
        (trial, min(max(worst if trial.loss is None else trial.loss, -LARGEST), LARGEST))
        for trial in trials
        if trial.has_ended
    ]


def _get_loss(trial: Trial) -> float:
    assert trial.loss is not None
    return trial.loss

"""Who suggests the values of the next trial."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from metaopt.black_box.space import Space, Values
from metaopt.black_box.trial import Trial


class Backend(abc.ABC):
    """Suggests values.

    A backend keeps nothing: a suggestion is a function of the space, of the trials so far and of
    the backend's own seed. So whoever knows the trials can go on, after a crash or on another
    machine.
    """

    @abc.abstractmethod
    def suggest(self, space: Space, trials: Sequence[Trial]) -> Values:
        """Return the values of trial `len(trials)`, given all before it.

        Args:
            space: where to look.
            trials: all before it, those that still run included.
        """

    def should_stop(self, space: Space, trials: Sequence[Trial], trial: Trial) -> bool:
        """Return True if a running trial's reports say that it will not be good; here never."""
        return False

    def find_importance(self, space: Space, trials: Sequence[Trial]) -> dict[str, float]:
        """Return how much each parameter matters, shares that add up to 1; here nothing is known.

        A backend with a model says; it needs a few trials that are done.
        """
        return {}

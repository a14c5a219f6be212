"""Ready task families on data that needs no download."""

from metaopt.tasks.digits import DigitsMLP
from metaopt.tasks.episode import Episode
from metaopt.tasks.quadratics import Quadratics

__all__ = ["DigitsMLP", "Episode", "Quadratics"]

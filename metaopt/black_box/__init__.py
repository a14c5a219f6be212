"""Levels without gradients: search over numbers and choices."""

from metaopt.black_box.ax import Ax
from metaopt.black_box.backend import Backend
from metaopt.black_box.botorch import BoTorch
from metaopt.black_box.journal import Journal, JsonLines
from metaopt.black_box.optuna import Optuna
from metaopt.black_box.sampling import RandomSearch, Sobol
from metaopt.black_box.search import BlackBox
from metaopt.black_box.shared import OptunaJournal
from metaopt.black_box.space import Choice, Float, Int
from metaopt.black_box.trial import Trial

__all__ = [
    "Ax",
    "Backend",
    "BlackBox",
    "BoTorch",
    "Choice",
    "Float",
    "Int",
    "Journal",
    "JsonLines",
    "Optuna",
    "OptunaJournal",
    "RandomSearch",
    "Sobol",
    "Trial",
]

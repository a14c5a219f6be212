"""Schedules: hyperparameters that change over time, hand-designed and learned."""

from .constant import Constant
from .cosine import Cosine
from .exponential import Exponential
from .joined import Joined
from .linear import Linear
from .lstm import LSTMSchedule
from .one_cycle import OneCycle
from .piecewise import Piecewise
from .polynomial import Polynomial
from .warmup import Warmup

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "Joined",
    "LSTMSchedule",
    "Linear",
    "OneCycle",
    "Piecewise",
    "Polynomial",
    "Warmup",
]

"""Schedules: hyperparameters that change over time, hand-designed and learned."""

from optimizers.schedules.constant import Constant
from optimizers.schedules.cosine import Cosine
from optimizers.schedules.exponential import Exponential
from optimizers.schedules.joined import Joined
from optimizers.schedules.linear import Linear
from optimizers.schedules.lstm import LSTMSchedule
from optimizers.schedules.one_cycle import OneCycle
from optimizers.schedules.piecewise import Piecewise
from optimizers.schedules.polynomial import Polynomial
from optimizers.schedules.warmup import Warmup

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

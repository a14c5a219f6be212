"""Schedules: hyperparameters that change over time, hand-designed and learned."""

from optimizers.schedules.constant import Constant
from optimizers.schedules.cosine import Cosine
from optimizers.schedules.exponential import Exponential
from optimizers.schedules.inverse_sqrt import InverseSqrt
from optimizers.schedules.joined import Joined
from optimizers.schedules.linear import Linear
from optimizers.schedules.lstm import LSTMSchedule
from optimizers.schedules.one_cycle import OneCycle
from optimizers.schedules.per_step import PerStep
from optimizers.schedules.piecewise import Piecewise
from optimizers.schedules.plateau import Plateau
from optimizers.schedules.polynomial import Polynomial
from optimizers.schedules.staircase import Staircase
from optimizers.schedules.warm_restarts import WarmRestarts
from optimizers.schedules.warmup import Warmup
from optimizers.schedules.warmup_stable_decay import WarmupStableDecay

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "InverseSqrt",
    "Joined",
    "LSTMSchedule",
    "Linear",
    "OneCycle",
    "PerStep",
    "Piecewise",
    "Plateau",
    "Polynomial",
    "Staircase",
    "WarmRestarts",
    "Warmup",
    "WarmupStableDecay",
]

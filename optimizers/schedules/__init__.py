"""Schedules: hyperparameters that change over time, hand-designed and learned."""

from .constant import Constant
from .cosine import Cosine
from .exponential import Exponential
from .inverse_sqrt import InverseSqrt
from .joined import Joined
from .learned import (
    AttentionSchedule,
    GPSchedule,
    LSTMSchedule,
    MLPSchedule,
    PolicySchedule,
)
from .linear import Linear
from .one_cycle import OneCycle
from .per_step import PerStep
from .piecewise import Piecewise
from .plateau import Plateau
from .polynomial import Polynomial
from .positive import Positive
from .staircase import Staircase
from .warm_restarts import WarmRestarts
from .warmup import Warmup
from .warmup_stable_decay import WarmupStableDecay
from .within import Within

__all__ = [
    "AttentionSchedule",
    "Constant",
    "Cosine",
    "Exponential",
    "GPSchedule",
    "InverseSqrt",
    "Joined",
    "LSTMSchedule",
    "Linear",
    "MLPSchedule",
    "OneCycle",
    "PerStep",
    "Piecewise",
    "Plateau",
    "PolicySchedule",
    "Polynomial",
    "Positive",
    "Staircase",
    "WarmRestarts",
    "Warmup",
    "WarmupStableDecay",
    "Within",
]

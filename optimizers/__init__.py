"""Optimizers and schedules for `metaopt`: hand-designed and learned ones are the same type."""

from optimizers.adadelta import Adadelta
from optimizers.adagrad import Adagrad
from optimizers.adam import Adam, AdamW
from optimizers.adamax import Adamax
from optimizers.asgd import ASGD
from optimizers.learned import LSTMOptimizer, MLPOptimizer
from optimizers.lion import Lion
from optimizers.muon import Muon
from optimizers.nadam import NAdam
from optimizers.per_parameter import PerParameter
from optimizers.radam import RAdam
from optimizers.rmsprop import RMSprop
from optimizers.rprop import Rprop
from optimizers.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Joined,
    Linear,
    LSTMSchedule,
    OneCycle,
    PerStep,
    Piecewise,
    Plateau,
    Polynomial,
    Staircase,
    WarmRestarts,
    Warmup,
    WarmupStableDecay,
)
from optimizers.sgd import SGD
from optimizers.transforms import ClipNorm, ClipValue, DecoupledWeightDecay, Grouped, Masked, Transform, WeightDecay

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ClipNorm",
    "ClipValue",
    "Constant",
    "Cosine",
    "DecoupledWeightDecay",
    "Exponential",
    "Grouped",
    "InverseSqrt",
    "Joined",
    "LSTMOptimizer",
    "LSTMSchedule",
    "Linear",
    "Lion",
    "MLPOptimizer",
    "Masked",
    "Muon",
    "NAdam",
    "OneCycle",
    "PerParameter",
    "PerStep",
    "Piecewise",
    "Plateau",
    "Polynomial",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Staircase",
    "Transform",
    "WarmRestarts",
    "Warmup",
    "WarmupStableDecay",
    "WeightDecay",
]

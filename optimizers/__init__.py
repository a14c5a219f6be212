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
from optimizers.radam import RAdam
from optimizers.rmsprop import RMSprop
from optimizers.rprop import Rprop
from optimizers.schedules import (
    Constant,
    Cosine,
    Exponential,
    Joined,
    Linear,
    LSTMSchedule,
    OneCycle,
    Piecewise,
    Polynomial,
    Warmup,
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
    "Piecewise",
    "Polynomial",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Transform",
    "Warmup",
    "WeightDecay",
]

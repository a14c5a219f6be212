"""Optimizers and schedules for `metaopt`: hand-designed and learned ones are the same type."""

if __name__ == "optimizers":  # the modules are those of `metaopt.optimizers`, which says why
    import sys

    import metaopt.optimizers

    sys.modules["optimizers"] = metaopt.optimizers
    for name, module in list(sys.modules.items()):
        if name.startswith("metaopt.optimizers."):
            sys.modules[name.removeprefix("metaopt.")] = module

from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .asgd import ASGD
from .equals import register_equals
from .learned import RNNMLP, AdafactorMLP, ControlledMLP, LSTMOptimizer, MLPOptimizer, NNAdam
from .lion import Lion
from .muon import Muon
from .nadam import NAdam
from .per_entry import PerParameter
from .per_tensor import PerTensor
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .schedules import (
    AttentionSchedule,
    Constant,
    Cosine,
    Exponential,
    GPSchedule,
    InverseSqrt,
    Joined,
    Linear,
    LSTMSchedule,
    MLPSchedule,
    OneCycle,
    PerStep,
    Piecewise,
    Plateau,
    PolicySchedule,
    Polynomial,
    Positive,
    Staircase,
    WarmRestarts,
    Warmup,
    WarmupStableDecay,
    Within,
)
from .sgd import SGD
from .trained import load_trained, read_card, trained_names
from .transforms import (
    AGC,
    EMA,
    Accumulate,
    Cautious,
    ClipNorm,
    ClipValue,
    DecoupledWeightDecay,
    Grouped,
    LearnedStart,
    Lookahead,
    Masked,
    MetaCurvature,
    ScheduleFree,
    Transform,
    TrustRatio,
    WeightDecay,
)

register_equals()

__all__ = [
    "AGC",
    "ASGD",
    "EMA",
    "RNNMLP",
    "SGD",
    "Accumulate",
    "Adadelta",
    "Adafactor",
    "AdafactorMLP",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "AttentionSchedule",
    "Cautious",
    "ClipNorm",
    "ClipValue",
    "Constant",
    "ControlledMLP",
    "Cosine",
    "DecoupledWeightDecay",
    "Exponential",
    "GPSchedule",
    "Grouped",
    "InverseSqrt",
    "Joined",
    "LSTMOptimizer",
    "LSTMSchedule",
    "LearnedStart",
    "Linear",
    "Lion",
    "Lookahead",
    "MLPOptimizer",
    "MLPSchedule",
    "Masked",
    "MetaCurvature",
    "Muon",
    "NAdam",
    "NNAdam",
    "OneCycle",
    "PerParameter",
    "PerStep",
    "PerTensor",
    "Piecewise",
    "Plateau",
    "PolicySchedule",
    "Polynomial",
    "Positive",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFree",
    "Staircase",
    "Transform",
    "TrustRatio",
    "WarmRestarts",
    "Warmup",
    "WarmupStableDecay",
    "WeightDecay",
    "Within",
    "load_trained",
    "read_card",
    "trained_names",
]

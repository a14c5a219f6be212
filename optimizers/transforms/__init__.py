"""Gradient transforms: optimizers that stand in front of another."""

from .accumulate import Accumulate
from .agc import AGC
from .cautious import Cautious
from .clip import ClipNorm, ClipValue
from .ema import EMA
from .grouped import Grouped
from .learned_start import LearnedStart
from .lookahead import Lookahead
from .masked import Masked
from .meta_curvature import MetaCurvature
from .schedule_free import ScheduleFree
from .transform import Transform
from .trust_ratio import TrustRatio
from .weight_decay import DecoupledWeightDecay, WeightDecay

__all__ = [
    "AGC",
    "EMA",
    "Accumulate",
    "Cautious",
    "ClipNorm",
    "ClipValue",
    "DecoupledWeightDecay",
    "Grouped",
    "LearnedStart",
    "Lookahead",
    "Masked",
    "MetaCurvature",
    "ScheduleFree",
    "Transform",
    "TrustRatio",
    "WeightDecay",
]

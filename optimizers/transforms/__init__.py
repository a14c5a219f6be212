"""Gradient transforms: optimizers that stand in front of another."""

from .clip import ClipNorm, ClipValue
from .grouped import Grouped
from .masked import Masked
from .transform import Transform
from .weight_decay import DecoupledWeightDecay, WeightDecay

__all__ = [
    "ClipNorm",
    "ClipValue",
    "DecoupledWeightDecay",
    "Grouped",
    "Masked",
    "Transform",
    "WeightDecay",
]

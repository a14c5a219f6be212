"""Gradient transforms: optimizers that stand in front of another."""

from optimizers.transforms.clip import ClipNorm, ClipValue
from optimizers.transforms.grouped import Grouped
from optimizers.transforms.masked import Masked
from optimizers.transforms.transform import Transform
from optimizers.transforms.weight_decay import DecoupledWeightDecay, WeightDecay

__all__ = ["ClipNorm", "ClipValue", "DecoupledWeightDecay", "Grouped", "Masked", "Transform", "WeightDecay"]

"""Learned optimizers: networks, shared over all coordinates, whose output is the update."""

from .controlled_mlp import ControlledMLP
from .lstm import LSTMOptimizer
from .mlp import MLPOptimizer

__all__ = ["ControlledMLP", "LSTMOptimizer", "MLPOptimizer"]

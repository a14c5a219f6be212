"""Learned optimizers: networks, shared over all coordinates, whose output is the update."""

from .lstm import LSTMOptimizer
from .mlp import MLPOptimizer

__all__ = ["LSTMOptimizer", "MLPOptimizer"]

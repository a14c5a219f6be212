"""Learned optimizers: networks, shared over all coordinates, whose output is the update."""

from optimizers.learned.lstm import LSTMOptimizer
from optimizers.learned.mlp import MLPOptimizer

__all__ = ["LSTMOptimizer", "MLPOptimizer"]

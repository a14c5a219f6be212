"""Learned optimizers: networks, shared over all coordinates, whose output is the update."""

from .adafactor_mlp import AdafactorMLP
from .controlled_mlp import ControlledMLP
from .lstm import LSTMOptimizer
from .mlp import MLPOptimizer
from .nn_adam import NNAdam
from .rnn_mlp import RNNMLP

__all__ = [
    "RNNMLP",
    "AdafactorMLP",
    "ControlledMLP",
    "LSTMOptimizer",
    "MLPOptimizer",
    "NNAdam",
]

"""Optimizers and schedules for `metaopt`: hand-designed and learned ones are the same type."""

from optimizers.adam import Adam, AdamW
from optimizers.learned import LSTMOptimizer, MLPOptimizer
from optimizers.rmsprop import RMSprop
from optimizers.schedules import Constant, Cosine, LSTMSchedule
from optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Constant", "Cosine", "LSTMOptimizer", "LSTMSchedule", "MLPOptimizer", "RMSprop"]

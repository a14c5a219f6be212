"""Optimizers and schedules for `metaopt`: hand-designed and learned ones are the same type."""

from optimizers.adam import Adam, AdamW
from optimizers.rmsprop import RMSprop
from optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]

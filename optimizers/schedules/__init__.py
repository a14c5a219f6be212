"""Schedules: hyperparameters that change over time, hand-designed and learned."""

from optimizers.schedules.constant import Constant
from optimizers.schedules.cosine import Cosine
from optimizers.schedules.lstm import LSTMSchedule

__all__ = ["Constant", "Cosine", "LSTMSchedule"]

"""Schedules that are learned: each is one network, or curve, behind the same observations."""

from .attention import AttentionSchedule
from .gaussian_process import GPSchedule
from .lstm import LSTMSchedule
from .mlp import MLPSchedule
from .policy import PolicySchedule

__all__ = ["AttentionSchedule", "GPSchedule", "LSTMSchedule", "MLPSchedule", "PolicySchedule"]

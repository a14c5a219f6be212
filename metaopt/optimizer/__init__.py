"""What an optimizer is: its state, hyperparameters, schedules, and a `torch.optim` face.

What one needs to write an optimizer or a schedule is imported from here.
"""

from __future__ import annotations

from metaopt.optimizer.apply import apply_update, apply_updates, require_params
from metaopt.optimizer.beginning import begin
from metaopt.optimizer.by_name import Value
from metaopt.optimizer.counterparts import register_equal
from metaopt.optimizer.horizon import require_steps, with_steps
from metaopt.optimizer.hyperparameter import (
    Hyperparameter,
    is_zero,
    is_zero_anywhere,
    set_hyperparameter,
    set_value,
)
from metaopt.optimizer.optimizer import Optimizer
from metaopt.optimizer.schedule import Schedule
from metaopt.optimizer.state import Hyper, Leaves, Slots, State
from metaopt.optimizer.values import Observe

__all__ = [
    "Hyper",
    "Hyperparameter",
    "Leaves",
    "Observe",
    "Optimizer",
    "Schedule",
    "Slots",
    "State",
    "Value",
    "apply_update",
    "apply_updates",
    "begin",
    "is_zero",
    "is_zero_anywhere",
    "register_equal",
    "require_params",
    "require_steps",
    "set_hyperparameter",
    "set_value",
    "with_steps",
]

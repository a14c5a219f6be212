"""What an optimizer is: its state, hyperparameters, schedules, and how it serves `torch.optim`'s
users.
"""

from __future__ import annotations

from metaopt.optimizer.apply import apply_update, apply_updates
from metaopt.optimizer.equals import register_equal
from metaopt.optimizer.optimizer import Hyper, Leaves, Observe, Optimizer, Slots, State

__all__ = [
    "Hyper",
    "Leaves",
    "Observe",
    "Optimizer",
    "Slots",
    "State",
    "apply_update",
    "apply_updates",
    "register_equal",
]

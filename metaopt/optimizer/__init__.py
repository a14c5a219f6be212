"""What an optimizer is: its state, hyperparameters, schedules, and how it serves `torch.optim`'s users."""

from __future__ import annotations

from metaopt.optimizer.optimizer import Hyper, Leaves, Observe, Optimizer, Slots, State, apply_update, apply_updates

__all__ = ["Hyper", "Leaves", "Observe", "Optimizer", "Slots", "State", "apply_update", "apply_updates"]

"""Where an episode begins."""

from __future__ import annotations

from metaopt.optimizer.optimizer import Optimizer
from metaopt.optimizer.state import State
from metaopt.tree import Tree


def begin(optimizer: Optimizer, params: Tree) -> tuple[Tree, State]:
    """Return (the initial parameters, the optimizer's state) for a task with these parameters.

    Whatever in the optimizer has learned initial parameters says so, wherever it stands in it.
    """
    for part in optimizer.modules():
        if isinstance(part, Optimizer):
            params = part.initial(params)
    return params, optimizer.init(params)

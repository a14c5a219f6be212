"""An estimate whose tasks are shared over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from metaopt._functional import Params
from metaopt.distributed import Ranks, gather_rows, sum_over_ranks
from metaopt.meta_training.estimate import Estimate


@dataclass(frozen=True)
class Shared:
    """The estimates of all ranks as one: every rank sees the losses and norms of all tasks.

    So what is decided by them, which tasks are left out and which are clipped, is the same
    everywhere. The state is this rank's.

    Attributes:
        own: the estimate of this rank's tasks.
        count: number of tasks of all ranks.
        ranks: which share them.

    Cost:
        Two numbers for each task, and one message of the optimizer's parameters.
    """

    own: Estimate
    count: int
    ranks: Ranks

    @property
    def losses(self) -> Tensor:
        """Those of all tasks, [count]."""
        return self._gathered[0]

    @property
    def norms(self) -> Tensor:
        """Those of all tasks, [count]."""
        return self._gathered[1]

    @property
    def state(self) -> Any:
        """The next state of this rank's tasks."""
        return self.own.state

    def weighted_sum(self, weights: Tensor) -> Params:
        """Return the weighted sum over the tasks of all ranks."""
        part = self.own.weighted_sum(weights[self.ranks.part(self.count)])
        found: Params = sum_over_ranks(part, self.ranks)
        return found

    @cached_property
    def _gathered(self) -> tuple[Tensor, Tensor]:
        own = (self.own.losses, self.own.norms)
        found: tuple[Tensor, Tensor] = gather_rows(own, self.count, self.ranks)
        return found

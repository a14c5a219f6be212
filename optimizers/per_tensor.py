"""A hyperparameter for each parameter, or for each parameter and step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaopt.checks import check_count, check_number
from metaopt.tree import Tree

from .for_params import ForParams, named_params
from .scalars import scalar_dtype
from .schedules.per_step import PerStep


class PerTensor(ForParams):
    """A number for each tensor and step: `SGD(lr=PerTensor(net.params, 0.1, steps=5))`.

    These are the rates of MAML++. It holds one `nn.Parameter` for each parameter: a `PerStep` of
    `steps` numbers, or without `steps` one number. All are learned, saved and loaded.

    Args:
        params: the tree of parameters that will be updated, for names, precision and devices.
        value: of all numbers at the start.
        steps: how many steps have numbers of their own; those after them have the last one.

    Raises:
        ValueError: there are no parameters, `steps` is not a positive integer, or (in `init`)
            others are updated.
        TypeError: `value` is not a number, or a leaf is not a floating-point or complex tensor.

    Cost:
        A number for each parameter and step. The update is made for each parameter by itself.

    Reference:
        Antoniou, Edwards, Storkey, ICLR 2019, arXiv:1810.09502, section 4, "learning per-layer
        per-step learning rates".
    """

    def __init__(self, params: Tree, value: float, *, steps: int | None = None):
        value, named = check_number(self, "value", value), named_params("PerTensor", params)
        if steps is not None:
            check_count(self, "steps", steps, or_none=True)
        size = () if steps is None else (steps,)
        numbers = {
            name: nn.Parameter(
                torch.full(size, value, dtype=scalar_dtype(leaf), device=leaf.device)
            )
            for name, leaf in named.items()
        }
        kinds = numbers if steps is None else {n: PerStep(row) for n, row in numbers.items()}
        super().__init__(kinds)
        self.value, self.steps = value, steps

    @property
    def params(self) -> dict[str, Tensor]:
        """Name of a parameter -> its number, or its numbers, one for each step."""
        values = self.values.items()
        return {name: one.values if isinstance(one, PerStep) else one for name, one in values}

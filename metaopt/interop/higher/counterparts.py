"""The optimizers of `torch.optim` as differentiable ones.

Ours make the updates, and the memory keeps torch's names.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaopt import tree
from metaopt.interop.higher.differentiable import DifferentiableOptimizer, Grads
from metaopt.interop.higher.tensors import flatten
from metaopt.interop.torch import built, counts, kinds
from metaopt.optimizer import Leaves, Optimizer, apply_update

Group = dict[str, Any]
Memory = dict[str, Any]


class Counterpart(DifferentiableOptimizer):
    """A differentiable optimizer that moves the parameters as our equal of torch's does."""

    torch_type: ClassVar[type[torch.optim.Optimizer]]
    counted: ClassVar[bool] = True  # whether torch counts the steps of each parameter

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # by group: options, ours, whether they can change
        self._made: dict[int, tuple[dict[str, Any], Optimizer, bool]] = {}

    def _update(self, grouped_grads: list[Grads]) -> None:
        for group, grads, memory in zip(self.param_groups, grouped_grads, self.state, strict=True):
            # ours keep one count for all parameters
            alike: defaultdict[tuple[float, ...], list[int]] = defaultdict(list)
            for i, grad in enumerate(grads):
                if grad is not None:
                    alike[counts(memory[i])].append(i)
            for (steps, *_), chosen in alike.items():
                self._move(group, {i: grads[i] for i in chosen}, memory, int(steps))

    def _move(
        self, group: Group, grads: dict[int, Any], memory: dict[int, Memory], steps: int
    ) -> None:
        """Move the parameters that have `grads` and have made this number of steps."""
        names, optimizer = kinds()[self.torch_type][1], self._optimizer(group)
        params = [tree.as_real(group["params"][i]) for i in grads]
        own = [memory[i] for i in grads]
        slots = {
            ours: self._recall(own, names[ours], group, fresh, steps)
            for ours, fresh in optimizer.slots(params).items()
        }
        hyper = {name: getattr(optimizer, name) for name in optimizer.hyperparameters}
        step = torch.tensor(steps + 1, device=params[0].device)
        signed = [tree.as_real(-grad if group.get("maximize") else grad) for grad in grads.values()]
        updates, slots = optimizer.update(signed, params, slots, hyper, step)
        for position, (i, param) in enumerate(zip(grads, params, strict=True)):
            back = tree.as_complex if group["params"][i].is_complex() else _same
            group["params"][i] = back(apply_update(param, updates[position]))
            memory[i] = {
                names[ours]: slot
                if isinstance(slot, Tensor)
                else back(slot[position].to(param.dtype))
                for ours, slot in slots.items()
            }
            if self.counted:
                memory[i]["step"] = steps + 1

    def _optimizer(self, group: Group) -> Optimizer:
        """Return our optimizer with the group's options.

        It is the one of the last step, while they are the same numbers.
        """
        options = {name: value for name, value in group.items() if name != "params"}
        known, optimizer, fixed = self._made.get(id(group), ({}, None, False))
        if (
            optimizer is None
            or not fixed
            or len(known) != len(options)
            or any(known.get(n) is not options[n] for n in options)
        ):
            optimizer = self._build(options)
            fixed = not any(isinstance(value, list) for value in options.values()) and not any(
                isinstance(leaf, Tensor) for leaf in flatten(options)
            )
            self._made[id(group)] = options, optimizer, fixed
        return optimizer

    def _build(self, options: dict[str, Any]) -> Optimizer:
        return built(kinds()[self.torch_type][0], options)

    def _recall(
        self, memory: list[Memory], name: str, group: Group, fresh: Leaves | Tensor, steps: int
    ) -> Leaves | Tensor:
        """Return what is remembered under torch's name, else `fresh`."""
        if isinstance(fresh, Tensor):  # one for all parameters
            known: Tensor = memory[0].get(name, fresh)
            return known
        return [tree.as_real(own.get(name, zero)) for own, zero in zip(memory, fresh, strict=True)]


class DifferentiableSGD(Counterpart):
    """The differentiable counterpart of `torch.optim.SGD`."""

    torch_type = torch.optim.SGD
    counted = False

    def _build(self, options: dict[str, Any]) -> Optimizer:
        optimizer = super()._build({**options, "nesterov": False})
        # Set afterwards, for a dampening of 0 that is learned to be let in.
        changeable: Any = optimizer
        changeable.nesterov = bool(options["nesterov"])
        return optimizer


class DifferentiableAdam(Counterpart):
    """The differentiable counterpart of `torch.optim.Adam`."""

    torch_type = torch.optim.Adam


class DifferentiableAdamW(Counterpart):
    """The differentiable counterpart of `torch.optim.AdamW`."""

    torch_type = torch.optim.AdamW


class DifferentiableAdamax(Counterpart):
    """The differentiable counterpart of `torch.optim.Adamax`."""

    torch_type = torch.optim.Adamax


class DifferentiableNAdam(Counterpart):
    """The differentiable counterpart of `torch.optim.NAdam`."""

    torch_type = torch.optim.NAdam


class DifferentiableRAdam(Counterpart):
    """The differentiable counterpart of `torch.optim.RAdam`."""

    torch_type = torch.optim.RAdam


class DifferentiableAdagrad(Counterpart):
    """The differentiable counterpart of `torch.optim.Adagrad`."""

    torch_type = torch.optim.Adagrad

    def _recall(
        self, memory: list[Memory], name: str, group: Group, fresh: Leaves | Tensor, steps: int
    ) -> Leaves | Tensor:
        if steps:
            return super()._recall(memory, name, group, fresh, steps)
        # which may be an override, to be learned
        return [zero + group["initial_accumulator_value"] for zero in fresh]


class DifferentiableAdadelta(Counterpart):
    """The differentiable counterpart of `torch.optim.Adadelta`."""

    torch_type = torch.optim.Adadelta


class DifferentiableRMSprop(Counterpart):
    """The differentiable counterpart of `torch.optim.RMSprop`."""

    torch_type = torch.optim.RMSprop


class DifferentiableASGD(Counterpart):
    """The differentiable counterpart of `torch.optim.ASGD`, whose `mu` follows from the step."""

    torch_type = torch.optim.ASGD


class DifferentiableRprop(Counterpart):
    """The differentiable counterpart of `torch.optim.Rprop`."""

    torch_type = torch.optim.Rprop


COUNTERPARTS: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    counterpart.torch_type: counterpart
    for counterpart in (
        DifferentiableSGD,
        DifferentiableAdam,
        DifferentiableAdamW,
        DifferentiableAdamax,
        DifferentiableNAdam,
        DifferentiableRAdam,
        DifferentiableAdagrad,
        DifferentiableAdadelta,
        DifferentiableRMSprop,
        DifferentiableASGD,
        DifferentiableRprop,
    )
}


def _same(tensor: Tensor) -> Tensor:
    return tensor

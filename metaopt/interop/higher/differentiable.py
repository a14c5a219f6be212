"""Optimizers whose steps stay in the graph, made from live ones of torch."""

from __future__ import annotations

import abc
import copy
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from metaopt.interop.higher.patch import PatchedModule
from metaopt.interop.higher.tensors import copied, map_leaves

Override = dict[str, list[Any]]
Grads = list[Tensor | None]
GradCallback = Callable[[list[Any]], Iterable[Any]]


class DifferentiableOptimizer(abc.ABC):
    """The differentiable counterpart of a live `torch.optim` optimizer.

    It goes on from where that one stands. For an optimizer of your own, define `_update` in a
    subclass and make it known with `register_optim`.

    `param_groups` are those of the live optimizer at that time, with the fast weights of the last
    step as "params"; what is written there counts from the next step on. A scheduler that changes
    the live one later is warned of. `state[group][i]` is the memory for the group's i-th parameter,
    under torch's names.

    Args:
        other: the live optimizer; it is only read.
        reference_params: the original module's `parameters()`, whose order that of the fast weights
            is.
        fmodel: takes the new parameters of each step; without, `step` needs `params`.
        device: for the memory; by default where the live one's is.
        override: option -> one value for all groups, or one for each, in a list; tensors may
            require grad.
        grad_callback: maps the gradients, in the order of `reference_params` (None where there is
            none), to those to use.
        track_higher_grads: False: no graph is kept from one step to the next.

    Raises:
        ValueError: the live optimizer has a parameter that is not among `reference_params`, or an
            override does not fit.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: PatchedModule | None = None,
        device: torch.device | str | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
    ):
        index = {id(param): position for position, param in enumerate(reference_params)}
        self.param_groups: list[dict[str, Any]] = []
        self.state: list[defaultdict[int, dict[str, Any]]] = []
        self._group_to_param_list: list[list[int]] = []
        for group in other.param_groups:
            for param in group["params"]:
                if id(param) not in index:
                    raise ValueError(
                        "`reference_params` must hold every parameter of the optimizer, but one "
                        f"of shape {tuple(param.shape)} is missing. Pass `model.parameters()` of "
                        "the model that the optimizer was made for."
                    )
            options = {name: copied(value) for name, value in group.items() if name != "params"}
            self.param_groups.append({**options, "params": [None] * len(group["params"])})
            known = [
                (i, other.state[param])
                for i, param in enumerate(group["params"])
                if param in other.state
            ]
            self.state.append(defaultdict(dict, {i: copied(memory, device) for i, memory in known}))
            self._group_to_param_list.append([index[id(param)] for param in group["params"]])
        self._live = weakref.ref(other)
        self._rates: list[float | None] | None = _read_rates(other)
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._apply_override(override)

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
    ) -> list[Tensor]:
        """Make one step: w <- w + u(dloss / dw), and return all parameters after it.

        A parameter that is frozen, or that the loss does not depend on, stays as it is, and so does
        its memory.

        Args:
            loss: a scalar, computed from the fast weights.
            params: the fast weights it was computed from; by default the latest of `fmodel`.
            override: as in the constructor, from this step on.
            grad_callback: as in the constructor, for this step.

        Raises:
            ValueError: there are no `params`, an override does not fit, or the loss depends on none
                of the parameters.
        """
        self._apply_override(override)
        self._warn_of_a_scheduler()
        if params is None and self._fmodel is not None:
            params = self._fmodel.fast_params
        if params is None:
            raise ValueError(
                "`params` is needed: this optimizer has no patched model with parameters. Pass "
                "`step(loss, params=...)`."
            )
        before = list(params)
        grads = self._grads(loss, before, grad_callback or self._grad_callback)
        for group, indices in zip(self.param_groups, self._group_to_param_list, strict=True):
            group["params"] = [before[index] for index in indices]
        with torch.set_grad_enabled(self._track_higher_grads):
            self._update(
                [[grads[index] for index in indices] for indices in self._group_to_param_list]
            )
        after = list(before)
        for group, indices in zip(self.param_groups, self._group_to_param_list, strict=True):
            for index, param in zip(indices, group["params"], strict=True):
                cut = (
                    param.detach().requires_grad_(before[index].requires_grad)
                    if not self._track_higher_grads
                    else param
                )
                after[index] = cut
        if self._fmodel is not None:
            self._fmodel.update_params(after)
        return after

    @abc.abstractmethod
    def _update(self, grouped_grads: list[Grads]) -> None:
        """Put the new parameters of each group, given its gradients, into `param_groups`.

        The list `param_groups[i]["params"]` is replaced, not changed.
        """

    def _grads(self, loss: Tensor, params: list[Tensor], callback: GradCallback | None) -> Grads:
        """Return the gradient for each parameter; None if it is frozen or unused."""
        trainable = [index for index, param in enumerate(params) if param.requires_grad]
        grads: Grads = [None] * len(params)
        if trainable and loss.requires_grad:
            targets = [params[index] for index in trainable]
            found = torch.autograd.grad(
                loss, targets, create_graph=self._track_higher_grads, allow_unused=True
            )
            for index, grad in zip(trainable, found, strict=True):
                grads[index] = grad
        if all(grad is None for grad in grads):
            raise ValueError(
                "`loss` must depend on a trainable fast weight, but depends on none, so the step "
                "would do nothing. Compute it with the patched model, `fmodel(x)`, at its latest "
                "parameters, or from the `params` given to `step`."
            )
        if callback is None:
            return grads
        grads = list(callback(grads))
        if len(grads) != len(params):
            raise ValueError(
                f"`grad_callback` must return {len(params)} gradients, one for each that it is "
                f"given, got {len(grads)}."
            )
        return grads

    def _warn_of_a_scheduler(self) -> None:
        """Warn once if the live optimizer's rate changed, and this one goes on with what it was."""
        live = self._live()
        if live is None or self._rates is None:
            return
        for group, before, now in zip(
            self.param_groups, self._rates, _read_rates(live), strict=False
        ):
            if before != now and group.get("lr") == before:
                self._rates = None
                warnings.warn(
                    f"The learning rate of the live optimizer changed from {before} to {now} since "
                    f"this differentiable optimizer was made. It goes on with {before}: as in "
                    "higher, options are read once. For a schedule inside the loop give each step "
                    f"its rate, `diffopt.step(loss, override={{'lr': [{now}]}})`.",
                    UserWarning,
                    stacklevel=3,
                )
                return

    def _apply_override(self, override: Override | None) -> None:
        for name, values in (override or {}).items():
            for group, value in zip(
                self.param_groups, one_each(name, values, len(self.param_groups)), strict=True
            ):
                group[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return an optimizer that goes on from here.

        The two share the graph so far, and nothing that changes.
        """
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(vars(self))
        twin.param_groups = [map_leaves(lambda leaf: leaf, group) for group in self.param_groups]
        twin.state = [
            defaultdict(dict, map_leaves(lambda leaf: leaf, dict(memory))) for memory in self.state
        ]
        twin._fmodel = copy.deepcopy(self._fmodel, memo)
        return twin


def _read_rates(optimizer: torch.optim.Optimizer) -> list[float | None]:
    """Return the learning rate of each group, None where that is not a number."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return [rate if isinstance(rate, int | float) else None for rate in rates]


def one_each(name: str, values: Sequence[Any], groups: int) -> Sequence[Any]:
    """Return the values of an override, one for each group.

    Raises:
        ValueError: there are neither one nor one for each group.
    """
    if not isinstance(values, list | tuple) or len(values) not in (1, groups):
        raise ValueError(
            f"The override of {name!r} must be a list with one value, or with one for each of the "
            f"{groups} groups, got {values!r}."
        )
    return values if len(values) == groups else [*values] * groups

"""A pure optimizer deployed as a `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer.group import TUPLES, Group, by_items, with_items
from metaopt.optimizer.missing import share_equal
from metaopt.optimizer.state import with_inner
from metaopt.optimizer.swapped import swapped

if TYPE_CHECKING:
    from metaopt.optimizer import Optimizer


# What schedulers of torch write into a group, and read there when they resume.
_OF_SCHEDULERS = {"initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr"}


class Deployed(torch.optim.Optimizer):
    """A frozen copy of an `Optimizer` that steps a model's parameters in place.

    `Optimizer.as_torch` makes it. Every scalar hyperparameter of the optimizer is a key of each
    parameter group, so groups may differ and `torch.optim.lr_scheduler` works; a pair has torch's
    name too, such as `betas` for `beta1` and `beta2`. Where the optimizer has no scalar `lr`
    (learned ones, and those whose `lr` is a schedule), the group's `lr` is 1.0 and multiplies the
    updates.

    A parameter whose `.grad` is None is not moved, its memory stays and its step is not counted, as
    in torch. Schedules inside the optimizer count the steps in which a parameter of the group has a
    gradient.

    A sparse gradient is made dense first, so it acts as the same numbers in a dense one: as in
    torch's SGD and Adagrad, but unlike `torch.optim.SparseAdam`, which leaves the moments of the
    other rows as they are.
    """

    _is_evaluated = False
    state: dict[Any, Any]  # type: ignore[assignment]  # "group 0" -> its memory; torch's own have a parameter as key

    def __init__(self, params: Iterable[Any], optimizer: Optimizer):
        # deepcopy refuses computed tensors
        constants = {id(buffer): buffer.detach().clone() for buffer in optimizer.buffers()}
        self._optimizer = copy.deepcopy(optimizer, constants).requires_grad_(False)
        numbers = {name: getattr(self._optimizer, name) for name in optimizer.hyperparameters}
        # A tensor with several rates stays as it is: schedulers of torch know scalars only.
        self._numeric = {name: float(value) for name, value in numbers.items() if _is_scalar(value)}
        for name in self._numeric:  # a buffer or a parameter takes no number
            delattr(self._optimizer, name)
        super().__init__(params, Group({"lr": 1.0} | self._numeric))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the optimizer's numeric hyperparameters and `lr` as options.

        What schedulers of torch keep in a group, such as `initial_lr`, may be given too.

        Raises:
            ValueError: an option that the optimizer does not have, or one that is given twice.
        """
        unknown = (
            param_group.keys() - {"params", "param_names"} - self.defaults.keys() - _OF_SCHEDULERS
        )
        if unknown:
            raise ValueError(
                f"{type(self._optimizer).__name__} has no option {sorted(unknown)} for a parameter "
                f"group; it has {sorted(self.defaults)}."
            )
        super().add_param_group(with_items(param_group))
        # torch has filled in the default `betas` beside a given `beta1`
        self.param_groups[-1] = by_items(self.param_groups[-1])

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Let the parameters be those to evaluate at, within a `with` block.

        See `Optimizer.evaluated`. After the block they are what they were, and in it there is no
        step.

        Raises:
            RuntimeError: it is called within such a block.
        """
        self._refuse_if_evaluated("enter another block")
        places = []
        with torch.no_grad():
            for key, group in zip(self._keys(), self.param_groups, strict=True):
                if key in self.state:  # else there was no step
                    params = _name(group)
                    at = self._with_options(group).evaluated(self.state[key], params)
                    places += [(params[name], leaf) for name, leaf in at.items()]
        self._is_evaluated = True
        try:
            with swapped(places):
                yield
        finally:
            self._is_evaluated = False

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Make one update.

        Args:
            closure: recomputes the loss and its gradients and returns the loss.
            loss: the loss of the gradients that are there, in place of a closure. One of the two is
                needed where the optimizer, or a schedule of its own, looks at the loss.

        Returns:
            What the closure returned, else the loss.

        Raises:
            ValueError: both are given; or none, and the loss is needed.
        """
        if closure is not None and loss is not None:
            raise ValueError("`step` takes a closure or the loss, got both. Leave one out.")
        self._refuse_if_evaluated("make a step")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        observed = torch.as_tensor(loss).detach() if loss is not None else None
        for key, group in zip(self._keys(), self.param_groups, strict=True):
            if any(param.grad is not None for param in group["params"]):
                self._step_group(key, group, observed)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Tensors move to the devices and dtypes of the parameters, which are known by their places,
        as in torch, whatever names they were saved under.

        Raises:
            ValueError: the groups or the optimizer's memory do not fit these parameters; nothing is
                changed then.
        """
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=False)
        memories = {}
        for key, (group, saved) in zip(self._keys(), pairs, strict=False):
            self._check_options(key, saved)
            if key in state_dict["state"]:
                memories[key] = self._fit_memory(key, group, saved, state_dict["state"][key])
        names = [group.get("param_names") for group in self.param_groups]
        super().load_state_dict(state_dict)
        self.param_groups = [by_items(group) for group in self.param_groups]
        # parameters go by their places, and keep their names
        for group, own in zip(self.param_groups, names, strict=True):
            group.pop("param_names", None)
            group |= {} if own is None else {"param_names": own}
        self.state.update(memories)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copying and pickling keep."""
        return super().__getstate__() | {"_optimizer": self._optimizer, "_numeric": self._numeric}

    def _refuse_if_evaluated(self, what: str) -> None:
        """Raise RuntimeError if the parameters are those to evaluate at, for the time being."""
        if self._is_evaluated:
            raise RuntimeError(
                f"Cannot {what} within `with optimizer.evaluated():`, where the parameters are not "
                "those that are updated. Leave the block first."
            )

    def _keys(self) -> list[str]:
        return [f"group {index}" for index in range(len(self.param_groups))]

    def _check_options(self, key: str, saved: dict[str, Any]) -> None:
        """Raise ValueError if a saved group lacks options of this optimizer."""
        missing = self.defaults.keys() - saved.keys() - TUPLES.keys()
        if missing:
            raise ValueError(
                f"`state_dict` was saved from another optimizer: {key} lacks {sorted(missing)}, "
                f"which {type(self._optimizer).__name__} has."
            )

    def _fit_memory(
        self, key: str, group: dict[str, Any], saved: dict[str, Any], memory: tree.Tree
    ) -> tree.Tree:
        """Return the saved memory of a group, like that of its parameters.

        Raises:
            ValueError: it does not fit these parameters.
        """
        params = _name(group)
        optimizer = self._with_options(saved)
        own = optimizer.init(params)
        if "steps" in memory:
            own = optimizer.separate(own, params)
        saved_names = saved.get("param_names") or map(str, range(len(params)))
        memory = _rename(memory, dict(zip(saved_names, params, strict=False)))
        what = f"state_dict['state'][{key!r}]"
        expected, found = tree.leaves(own), tree.leaves_like(own, memory, what)
        for one, other in zip(expected, found, strict=True):
            if one.shape != other.shape:
                raise ValueError(
                    f"`state_dict` was saved for another model: the memory of {key} has a tensor "
                    f"of shape {tuple(other.shape)}, expected {tuple(one.shape)}."
                )
        moved = [other.to(one) for one, other in zip(expected, found, strict=True)]
        return share_equal(tree.with_leaves(own, moved))

    def _step_group(self, key: str, group: dict[str, Any], loss: Tensor | None) -> None:
        params, optimizer = _name(group), self._with_options(group)
        grads = {name: _as_dense(param.grad) for name, param in params.items()}
        before = self.state[key] if key in self.state else optimizer.init(params)
        if "steps" not in before and any(grad is None for grad in grads.values()):
            before = optimizer.separate(before, params)
        updates, self.state[key] = optimizer(grads, before, params, loss=loss)
        scale = 1.0 if "lr" in self._numeric else group["lr"]
        if scale != 1.0:
            self._require_scalable(scale)
        for name, update in updates.items():
            if update is not None:
                params[name].add_(update.to(params[name].dtype), alpha=scale)

    def _require_scalable(self, scale: Any) -> None:
        """Raise ValueError if the memory would not follow updates that are scaled from outside."""
        for part in self._optimizer.modules():
            if getattr(part, "follows_params", False):
                kind = type(part).__name__
                raise ValueError(
                    f"The updates of {kind} cannot be scaled, got lr={scale} in a parameter group: "
                    "it remembers where its own updates bring the parameters. Give the optimizer "
                    f"inside a schedule: {kind}(SGD(lr=Cosine(0.1, 100)))."
                )

    def _with_options(self, group: dict[str, Any]) -> Optimizer:
        """Return the optimizer with the hyperparameters of a group."""
        for name in self._numeric:
            self._optimizer.__dict__[name] = group[name]
        return self._optimizer


def _name(group: dict[str, Any]) -> dict[str, Tensor]:
    """Return the parameters of a group by the names they were given with, else by their places."""
    params = group["params"]
    return dict(zip(group.get("param_names") or map(str, range(len(params))), params, strict=True))


def _rename(memory: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return a saved memory with other names for the parameters, in their order."""

    def rename(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if node and node.keys() <= names.keys():
            return {own: node[saved] for saved, own in names.items() if saved in node}
        return {key: rename(part) for key, part in node.items()}

    renamed = {**with_inner(memory, lambda inner: _rename(inner, names))}
    if "steps" in memory:
        renamed["steps"] = rename(memory["steps"])
    for kind in memory.keys() & {"slots", "shared"}:
        renamed[kind] = {name: rename(slot) for name, slot in memory[kind].items()}
    return renamed


def _as_dense(grad: Tensor | None) -> Tensor | None:
    return grad if grad is None or grad.layout is torch.strided else grad.to_dense()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.ndim == 0)

"""Optimizers: modules whose forward is the update, pure and out of place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module

from metaopt import tree
from metaopt.optimizer.deployed import Deployed
from metaopt.optimizer.flat import join, part, prefers_joined
from metaopt.optimizer.hyperparameter import Value
from metaopt.optimizer.module import Configurable
from metaopt.optimizer.schedule import Schedule
from metaopt.tree import Tree

State = dict[str, Any]
Leaves = list[Tensor]  # one tensor per parameter
Slots = dict[str, Any]  # name -> Leaves, or one Tensor over all parameters
Hyper = dict[str, Value]
Observe = Callable[[], tuple[Tree, Tensor | None]]  # -> (gradients, loss) at the present parameters
# (grads, params, slots, hyper, step) -> (one tensor per parameter, next slots)
StepOn = Callable[[Leaves, Leaves | None, Slots, Hyper, Tensor], tuple[Leaves, Slots]]


_GLOBAL_HOOKS = (module._global_forward_hooks, module._global_forward_pre_hooks)


class Optimizer(Configurable):
    """The update rule (g_t, s_t, w_t) -> (u_t, s_{t+1}), with w_{t+1} = w_t + u_t.

    A subclass names its `hyperparameters`, sets each with `set_hyperparameter`, and defines `slots` and `update`, or `direction`,
    which work on lists with one tensor per parameter. The base class takes care of trees, the step count and schedules, and shows
    a complex parameter as a real one with a last axis of 2, as `torch.optim` does; its memory has that shape.
    Hand-designed and learned optimizers are the same type; every `nn.Parameter` inside can be meta-learned.

    `joinable` says of the class's own `update` or `direction` that it treats every entry alike, whatever tensor it is in, and takes
    about ten operations: then it is called with all tensors joined to one where that is faster; see `metaopt.optimizer.flat`. (Of
    SGD and ASGD the plain forms take few operations, and were up to 1.4 times slower.)

    The state is a dict: "step" (int64 scalar), "slots" (memory per parameter, in the parameters' own structure), "shared"
    (memory over all parameters) and "schedules".
    """

    hyperparameters: tuple[str, ...] = ()
    joinable = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls.joinable = bool(vars(cls).get("joinable", False))  # not inherited: a subclass may override what `update` calls

    def slots(self, params: Leaves) -> Slots:
        """Return the memory before the first step: name -> one tensor per parameter, or one tensor for all of them."""
        return {}

    def update(self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor) -> tuple[Leaves, Slots]:
        """Return (updates, next slots). `step` counts from 1; `hyper` holds the hyperparameters' values at this step."""
        scale, directions, slots = self.direction(grads, params, slots, hyper, step)
        return [scale * d for d in directions], slots

    def direction(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Value, Leaves, Slots]:
        """Return (scale, d, next slots) of updates u = scale d, so that w + u need not make u first."""
        raise TypeError(f"{type(self).__name__} must define `update(grads, params, slots, hyper, step)`, or `direction`.")

    def init(self, params: Tree) -> State:
        """Return the state before the first step, on the parameters' device and in their dtypes.

        Raises:
            ValueError: there are no parameters, or one is neither a floating-point nor a complex tensor.
        """
        for name, leaf in tree.named_leaves(params):
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(
                    f"`params` must be floating-point or complex tensors, got {kind} at {name}. Leave it out, or convert it."
                )
        leaves, structure = tree.flatten(tree.map(lambda leaf: tree.as_real(leaf.detach()), params))
        if not leaves:
            raise ValueError("`params` must hold at least one tensor, got an empty tree. Is every parameter frozen?")
        slots = self.slots(leaves)
        return {
            "step": torch.zeros((), dtype=torch.int64, device=leaves[0].device),
            "slots": {name: tree.unflatten(structure, slot) for name, slot in slots.items() if isinstance(slot, list)},
            "shared": {name: slot for name, slot in slots.items() if isinstance(slot, Tensor)},
            "schedules": {name: schedule.init(leaves[0]) for name, schedule in self._schedules()},
        }

    def forward(self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None) -> tuple[Tree, State]:
        """Return (updates, next state); nothing is changed in place.

        Args:
            grads: gradients, in the structure of the parameters.
            state: from `init` or the step before.
            params: the parameters at which the gradients were taken; needed by weight decay and most learned optimizers.
            loss: the loss there, a scalar; needed by schedules that observe it.

        Raises:
            ValueError: `params` is missing though needed, a structure does not match, or the state is another optimizer's.
        """
        return self._on_leaves(self.update, grads, state, params, loss)

    def moved(self, grads: Tree, state: State, params: Tree, *, loss: Tensor | None = None) -> tuple[Tree, State]:
        """Return (w + u, next state): `apply_updates` after `forward`, in one pass where the optimizer can.

        Args:
            grads: as for `forward`, and so are the others, of which it needs `params`.
            state: from `init` or the step before.
            params: w.
            loss: the loss there.

        Raises:
            ValueError: as `forward`, and if an update has another shape than its parameter.
        """
        if self._is_plain:
            return self._on_leaves(self._move, grads, state, params, loss)
        updates, state = self(grads, state, params, loss=loss)
        return apply_updates(params, updates), state

    def rate(self, state: State, params: Tree, observe: Observe) -> Value:
        """Return the step size `lr` of the update that would be made next, a number or a scalar tensor.

        Args:
            state: from `init` or the step before.
            params: the present parameters.
            observe: gives the gradients and the loss there; called only if `lr` is a schedule, which may look at them.

        Raises:
            ValueError: there is no hyperparameter `lr`, or it is no scalar.
        """
        if "lr" not in self.hyperparameters:
            raise ValueError(
                f'`scale="lr"` must find one step size in the optimizer, got {type(self).__name__}, which has no hyperparameter '
                "`lr`. Give a number: `scale=0.1`."
            )
        value: Any = getattr(self, "lr")  # noqa: B009, a module's attributes are tensors or modules to a type checker
        if isinstance(value, Schedule):
            grads, loss = observe()
            gradients = [tree.as_real(gradient) for gradient in tree.leaves(grads)]
            value, _ = value(state["schedules"]["lr"], step=state["step"], loss=loss, grads=gradients)
        if isinstance(value, Tensor) and value.ndim:
            raise ValueError(
                f'`scale="lr"` must find one step size in the optimizer, got {type(self).__name__} with `lr` of shape '
                f"{tuple(value.shape)}. Give a number: `scale=0.1`."
            )
        return value  # type: ignore[no-any-return]

    def as_torch(self, params: Iterable[Any]) -> Deployed:
        """Return a `torch.optim.Optimizer` that makes this optimizer's updates; see `Deployed`."""
        return Deployed(params, self)

    @property
    def _is_plain(self) -> bool:
        """Whether calling it is to do what `direction` says, and nothing else that somebody may want to happen."""
        kind, own = type(self), self.__dict__
        is_ours = kind.__call__ is Optimizer.__call__ and kind.forward is Optimizer.forward and kind.update is Optimizer.update
        is_ours = is_ours and "forward" not in own and "update" not in own
        return is_ours and not (self._forward_hooks or self._forward_pre_hooks or _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1])

    def _on_leaves(
        self, step_on: StepOn, grads: Tree, state: State, params: Tree | None, loss: Tensor | None
    ) -> tuple[Tree, State]:
        """Return what `step_on` makes of the leaves, as a tree like the gradients, and the next state."""
        gradients = tree.leaves(grads)
        weights = None if params is None else tree.leaves_like(grads, params, "params")
        with torch._C.DisableTorchFunction():  # under a mode every look at a dtype is a call of its own
            is_complex = [*map(Tensor.is_complex, gradients)]
        if any(is_complex):
            gradients = [tree.as_real(gradient) for gradient in gradients]
            weights = None if weights is None else [tree.as_real(weight) for weight in weights]
        memory: Slots = {name: tree.leaves_like(grads, slot, f"state['slots'][{name!r}]") for name, slot in state["slots"].items()}
        memory |= state["shared"]
        step = state["step"] + 1
        try:
            hyper, schedules = self._hyper_at(state, gradients, loss)
            results, after = self._joined(step_on, gradients, weights, memory, hyper, step)
        except KeyError:
            self._check_state(state, gradients)
            raise
        if after.keys() != memory.keys():
            self._check_state(state, gradients)
            raise ValueError(f"{type(self).__name__}: `update` must return the slots {sorted(memory)}, got {sorted(after)}.")
        if len(results) != len(gradients):
            raise ValueError(
                f"{type(self).__name__}: `update` must return one tensor per parameter, {len(gradients)}, got {len(results)}."
            )
        if any(is_complex):
            pairs = zip(results, is_complex, strict=True)
            results = [tree.as_complex(result) if is_one else result for result, is_one in pairs]
        with torch._C.DisableTorchFunction():
            after = {name: self._same_kind(name, after[name], old) for name, old in memory.items()}
        shared = {name: after.pop(name) for name in state["shared"]}
        return tree.with_leaves(grads, results), {
            "step": step,
            "slots": {name: tree.with_leaves(grads, slot) for name, slot in after.items()},
            "shared": shared,
            "schedules": schedules,
        }

    def _move(self, grads: Leaves, params: Leaves | None, memory: Slots, hyper: Hyper, step: Tensor) -> tuple[Leaves, Slots]:
        """Return (w + scale d, next slots)."""
        weights = self._require_params(params, "it moves them")
        scale, directions, after = self.direction(grads, weights, memory, hyper, step)
        with torch._C.DisableTorchFunction():
            moves = zip(weights, tree.scaled_sums(weights, scale, directions), strict=True)
            return [new if new.shape == w.shape and new.dtype == w.dtype else fitted(w, new) for w, new in moves], after

    def _joined(
        self, step_on: StepOn, grads: Leaves, params: Leaves | None, memory: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        """Return what `step_on` does, on joined tensors where that is the same and faster."""
        if not self.joinable or not self._joins(grads, params, memory, hyper):
            return step_on(grads, params, memory, hyper, step)
        with torch._C.DisableTorchFunction():
            joined = {name: join(slot) if isinstance(slot, list) else slot for name, slot in memory.items()}
            lists = join(grads), None if params is None else join(params)
        results, after = step_on(*lists, joined, hyper, step)
        with torch._C.DisableTorchFunction():
            return part(results, grads), {
                name: part(slot, grads) if isinstance(slot, list) else slot for name, slot in after.items()
            }

    def _joins(self, grads: Leaves, params: Leaves | None, memory: Slots, hyper: Hyper) -> bool:
        with torch._C.DisableTorchFunction():
            slots = [slot for slot in memory.values() if isinstance(slot, list)]
            if not prefers_joined([grads, *([] if params is None else [params]), *slots]):
                return False
            is_own = "update" in self.__dict__ or "direction" in self.__dict__
            return not is_own and not any(isinstance(value, Tensor) and value.ndim for value in hyper.values())

    def _hyper_at(self, state: State, grads: Leaves, loss: Tensor | None) -> tuple[Hyper, dict[str, Any]]:
        """Return the hyperparameters' values at this step, and the next states of the schedules among them."""
        hyper: Hyper = {name: getattr(self, name) for name in self.hyperparameters}
        schedules = {}
        for name, value in hyper.items():
            if isinstance(value, Schedule):
                hyper[name], schedules[name] = value(state["schedules"][name], step=state["step"], loss=loss, grads=grads)
        return hyper, schedules

    def _schedules(self) -> list[tuple[str, Schedule]]:
        return [(name, value) for name in self.hyperparameters if isinstance(value := getattr(self, name), Schedule)]

    def _check_state(self, state: State, grads: Leaves) -> None:
        """Raise ValueError if the state's memory or its schedules have other names than those of this optimizer."""
        of_schedules = dict(self._schedules()).keys()
        for what, names, own in (
            ("memory", state["slots"].keys() | state["shared"].keys(), self.slots(grads).keys()),
            ("schedules", state["schedules"].keys(), of_schedules),
        ):
            if names != own:
                raise ValueError(
                    f"`state` must be that of this {type(self).__name__}, with the {what} {sorted(own)}, got {sorted(names)}. Pass "
                    "what its own `init`, or the step before, returned."
                )

    def _same_kind(self, name: str, new: Any, old: Any) -> Any:
        """Return the memory in its old dtype: a 0-dim hyperparameter of a wider dtype would widen that of a 0-dim parameter."""
        if isinstance(old, list):
            pairs = zip(new, old, strict=True)
            return [n if n.shape == o.shape and n.dtype == o.dtype else self._same_kind(name, n, o) for n, o in pairs]
        if new.shape != old.shape:
            raise ValueError(
                f"{type(self).__name__}: the memory {name!r} of shape {tuple(old.shape)} became {tuple(new.shape)}. The state is "
                "that of other parameters, or a hyperparameter has a shape that does not broadcast to them."
            )
        return new if new.dtype == old.dtype else new.to(old.dtype)

    def _require_params(self, params: Leaves | None, reason: str) -> Leaves:
        if params is None:
            raise ValueError(f"`{type(self).__name__}` needs `params` because {reason}. Call `optimizer(grads, state, params)`.")
        return params


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Return w + u leaf by leaf, in the dtype of w.

    Raises:
        ValueError: an update has another shape than its parameter.
    """
    with torch._C.DisableTorchFunction():  # under a mode every look at a shape is a call of its own
        return tree.map(apply_update, params, updates)


def apply_update(param: Tensor, update: Tensor) -> Tensor:
    """Return w + u for one tensor; see `apply_updates`."""
    return fitted(param, param + update if param.shape == update.shape else update)


def fitted(param: Tensor, after: Tensor) -> Tensor:
    """Return what a parameter became, in its dtype.

    Raises:
        ValueError: it has another shape.
    """
    if param.shape != after.shape:
        raise ValueError(
            f"An update must have the shape of its parameter, {tuple(param.shape)}, got {tuple(after.shape)}. A tensor "
            "hyperparameter must be a scalar or broadcast to every parameter; for different parameters use `Grouped`."
        )
    return after if after.dtype == param.dtype else after.to(param.dtype)

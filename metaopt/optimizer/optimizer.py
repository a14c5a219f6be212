"""Optimizers: modules whose forward is the update, pure and out of place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_differentiable
from metaopt.optimizer.apply import apply_updates, check_gradients, fitted
from metaopt.optimizer.by_name import ByName, Spread
from metaopt.optimizer.cells import Cell, check_shapes, in_cells, slot_name, slots_in_cells
from metaopt.optimizer.deployed import Deployed
from metaopt.optimizer.flat import join, part, prefers_joined
from metaopt.optimizer.hyperparameter import Value
from metaopt.optimizer.module import Configurable
from metaopt.optimizer.names import paths
from metaopt.optimizer.per_parameter import require_gradients, separate_state, step_apart
from metaopt.optimizer.rate import find_rate
from metaopt.optimizer.schedule import Schedule, advance, read
from metaopt.torch_internals import has_forward_hooks
from metaopt.tree import Tree

State = dict[str, Any]
Leaves = list[Tensor]  # one tensor per parameter
Slots = dict[str, Any]  # name -> Leaves, or one Tensor over all parameters
Hyper = dict[str, Any]  # name -> Value; for `update`, that of all its parameters
Observe = Callable[[], tuple[Tree, Tensor | None]]  # -> (gradients, loss) at the present parameters
# (grads, params, slots, hyper, step) -> (one tensor per parameter, next slots)
StepOn = Callable[[Leaves, Leaves | None, Slots, Hyper, Tensor], tuple[Leaves, Slots]]


STATE_KEYS = frozenset(("step", "slots", "shared", "schedules"))


class Optimizer(Configurable):
    """The update rule (g_t, s_t, w_t) -> (u_t, s_{t+1}), with w_{t+1} = w_t + u_t.

    A subclass names its `hyperparameters`, sets each with `set_hyperparameter`, and defines `slots`
    and `update`, or `direction`, which work on lists with one tensor per parameter. The base class
    takes care of trees, the step count and schedules, and shows a complex parameter as a real one
    with a last axis of 2, as `torch.optim` does; its memory has that shape. Hand-designed and
    learned optimizers are the same type; every `nn.Parameter` inside can be meta-learned.

    A hyperparameter is a number, a tensor, a parameter, a `Schedule`, or a dict from patterns of
    names to these; then `update` is called once for all parameters that share their
    hyperparameters, as in `Grouped`, and sees single values in `hyper`. A tensor is a scalar, or
    has the shape of every parameter that it meets (Meta-SGD; `optimizers.PerParameter` for several
    parameters).

    `joinable` says of the class's own `update` or `direction` that it treats every entry alike,
    whatever tensor it is in, and takes about ten operations: then it is called with all tensors
    joined to one where that is faster; see `metaopt.optimizer.flat`. (Of SGD and ASGD the plain
    forms take few operations, and were up to 1.4 times slower.)

    The state is a dict: "step" (int64 scalar), "slots" (memory per parameter, in the parameters'
    own structure), "shared" (memory over all parameters) and "schedules". With `init(params,
    per_parameter=True)` there is also "steps", a count for each parameter, and a gradient may be
    None: then its parameter, memory and count stay as they are, as in `torch.optim`. `update` is
    called for some of the parameters at a time then; one that couples them, other than by "shared"
    memory, should say so by raising in `separate`.
    """

    hyperparameters: tuple[str, ...] = ()
    joinable = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        # not inherited: a subclass may override what `update` calls
        cls.joinable = bool(vars(cls).get("joinable", False))

    def slots(self, params: Leaves) -> Slots:
        """Return the memory before the first step: name -> one tensor per parameter, or one tensor
        for all of them.
        """
        return {}

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        """Return (updates, next slots).

        `step` counts from 1; `hyper` holds the hyperparameters' values at this step.
        """
        scale, directions, slots = self.direction(grads, params, slots, hyper, step)
        return [scale * d for d in directions], slots

    def direction(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Value, Leaves, Slots]:
        """Return (scale, d, next slots) of updates u = scale d, so that w + u need not make u
        first.
        """
        raise TypeError(
            f"{type(self).__name__} must define `update(grads, params, slots, hyper, step)`, or "
            f"`direction`."
        )

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step, on the parameters' device and in their dtypes.

        Args:
            params: the parameters, a tree.
            per_parameter: count the steps of each parameter, so that gradients may be None: these
                parameters are not moved.

        Raises:
            ValueError: there are no parameters, or one is neither a floating-point nor a complex
                tensor; or as `separate`.
        """
        check_differentiable(None, "params", tree.named_leaves(params))
        leaves, structure = tree.flatten(tree.map(lambda leaf: tree.as_real(leaf.detach()), params))
        if not leaves:
            raise ValueError(
                "`params` must hold at least one tensor, got an empty tree. Is every parameter "
                "frozen?"
            )
        slots = slots_in_cells(self.slots, leaves, self._fit_hyperparameters(params, leaves))
        state: State = {
            "step": torch.zeros((), dtype=torch.int64, device=leaves[0].device),
            "slots": {
                name: tree.unflatten(structure, slot)
                for name, slot in slots.items()
                if isinstance(slot, list)
            },
            "shared": {name: slot for name, slot in slots.items() if isinstance(slot, Tensor)},
            "schedules": {name: schedule.init(leaves[0]) for name, schedule in self._schedules()},
        }
        return self.separate(state, params) if per_parameter else state

    def separate(self, state: State, params: Tree) -> State:
        """Return a state that goes on from `state` and counts the steps of each parameter.

        Raises:
            ValueError: the optimizer has memory over all parameters that cannot be divided among
                them, or a `forward` of its own, which may not know what to do without a gradient.
        """
        if type(self).forward is not Optimizer.forward:
            raise ValueError(
                f"{type(self).__name__} defines `forward` itself, so a parameter without a "
                f"gradient cannot be "
                "left out for it. Give every parameter a gradient (zeros) and leave frozen ones "
                "out. If its `forward` passes None on, say so by defining `separate(state, "
                "params)` too."
            )
        return separate_state(self, state, params)

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state); nothing is changed in place.

        Args:
            grads: gradients, in the structure of the parameters; None (so is the update) if steps
                are counted per parameter.
            state: from `init` or the step before.
            params: the parameters at which the gradients were taken; needed by weight decay and
                most learned optimizers.
            loss: the loss there, a scalar; needed by schedules that observe it.

        Raises:
            ValueError: `params` is missing though needed, a structure does not match, a gradient is
                None without a step count for each parameter, or the state is another optimizer's.
        """
        return self._on_leaves(self.update, grads, state, params, loss)

    def moved(
        self, grads: Tree, state: State, params: Tree, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (w + u, next state): `apply_updates` after `forward`, in one pass where the
        optimizer can.

        Args:
            grads: as for `forward`, and so are the others, of which it needs `params`.
            state: from `init` or the step before.
            params: w.
            loss: the loss there.

        Raises:
            ValueError: as `forward`, and if an update has another shape than its parameter.
        """
        if self._is_plain:
            after, state = self._on_leaves(self._move, grads, state, params, loss)
            return (tree.map(_or_kept, params, after) if "steps" in state else after), state
        updates, state = self(grads, state, params, loss=loss)
        return apply_updates(params, updates), state

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> the value of every hyperparameter that the next step from `state` uses;
        nothing is changed.

        The values are differentiable. Inside other optimizers the names are led, by "optimizer."
        behind a transform and by the pattern and "/" in a group. A schedule that observes the loss
        or the gradients answers without them with its last value.

        Args:
            state: from `init` or a step.
            loss: as for `forward`.
            grads: as for `forward`. Without them, schedules compute in the precision of the memory,
                else in torch's default.
            params: as for `forward`; needed where a transform makes of them what a schedule
                observes.

        Raises:
            ValueError: the state is another optimizer's, or a schedule of your own has no value
                without the loss.
        """
        self._check_state_keys(state)
        self._check_schedule_names(state)
        every = [None if leaf is None else tree.as_real(leaf) for leaf in tree.leaves(grads)]
        leaves = None if grads is None else [leaf for leaf in every if leaf is not None]
        like = torch.full(
            (), math.nan, dtype=_precision(state, leaves), device=state["step"].device
        )
        found: dict[str, Value] = {}
        for name in self.hyperparameters:
            value = getattr(self, name)
            if isinstance(value, Schedule):
                before = state["schedules"][name]
                found[name] = read(
                    value, before, step=state["step"], loss=loss, grads=leaves, like=like
                )
            elif isinstance(value, ByName):
                named = None if grads is None else _named(grads, every)
                each = value.values_at(
                    self,
                    name,
                    state["schedules"][name],
                    step=state["step"],
                    loss=loss,
                    named=named,
                    like=like,
                )
                found |= {f"{pattern}/{name}": one for pattern, one in each.items()}
            else:
                found[name] = value
        return found

    def rate(self, state: State, params: Tree, observe: Observe) -> Value:
        """Return the step size `lr` of the update that would be made next, a number or a scalar
        tensor.

        Args:
            state: from `init` or the step before.
            params: the present parameters.
            observe: gives the gradients and the loss there; called only if there is a schedule,
                which may look at them.

        Raises:
            ValueError: there is not just one hyperparameter `lr`, or it is no scalar.
        """
        return find_rate(self, state, params, observe)

    def as_torch(self, params: Iterable[Any]) -> Deployed:
        """Return a `torch.optim.Optimizer` that makes this optimizer's updates; see `Deployed`."""
        return Deployed(params, self)

    @property
    def _is_plain(self) -> bool:
        """Whether calling it is to do what `direction` says, and nothing else that somebody may
        want to happen.
        """
        kind, own = type(self), self.__dict__
        is_ours = (
            kind.__call__ is Optimizer.__call__
            and kind.forward is Optimizer.forward
            and kind.update is Optimizer.update
        )
        is_ours = is_ours and "forward" not in own and "update" not in own
        return is_ours and not has_forward_hooks(self)

    def _on_leaves(
        self,
        step_on: StepOn,
        grads: Tree,
        state: State,
        params: Tree | None,
        loss: Tensor | None,
        hyper: Hyper | None = None,
    ) -> tuple[Tree, State]:
        """Return what `step_on` makes of the leaves, as a tree like the gradients, and the next
        state.

        With `hyper` these are the hyperparameters' values, and schedules stay where they are.
        """
        self._check_state_keys(state)
        if "steps" in state:
            return step_apart(self, step_on, grads, state, params, loss)
        gradients = tree.leaves(grads)
        weights = None if params is None else tree.leaves_like(grads, params, "params")
        # under a mode every look at a dtype is a call of its own
        with torch.DisableTorchFunction():
            try:
                is_complex = [*map(Tensor.is_complex, gradients)]
            except TypeError:
                require_gradients(grads)
                raise
        if any(is_complex):
            gradients = [tree.as_real(gradient) for gradient in gradients]
            weights = None if weights is None else [tree.as_real(weight) for weight in weights]
        if weights is not None:
            check_gradients(gradients, weights, grads)
        memory: Slots = {
            name: tree.leaves_like(grads, slot, f"state['slots'][{name!r}]")
            for name, slot in state["slots"].items()
        }
        memory |= state["shared"]
        step = state["step"] + 1
        try:
            hyper, schedules = (
                self._hyper_at(state, gradients, loss, grads) if hyper is None else (hyper, {})
            )
            results, after = self._joined(step_on, gradients, weights, memory, hyper, step)
        except (KeyError, RuntimeError):
            self._check_state(state, gradients)
            raise
        if after.keys() != memory.keys():
            self._check_state(state, gradients)
        self._check_update(results, after, memory, len(gradients))
        if any(is_complex):
            pairs = zip(results, is_complex, strict=True)
            results = [tree.as_complex(result) if is_one else result for result, is_one in pairs]
        with torch.DisableTorchFunction():
            after = {name: self._same_kind(name, after[name], old) for name, old in memory.items()}
        shared = {name: after.pop(name) for name in state["shared"]}
        return tree.with_leaves(grads, results), {
            "step": step,
            "slots": {name: tree.with_leaves(grads, slot) for name, slot in after.items()},
            "shared": shared,
            "schedules": schedules,
        }

    def _check_update(self, results: Leaves, after: Slots, before: Slots, count: int) -> None:
        """Raise ValueError if `update` returned other memory than it was given, or not one tensor
        per parameter.
        """
        if after.keys() != before.keys():
            raise ValueError(
                f"{type(self).__name__}: `update` must return the slots {sorted(before)}, got "
                f"{sorted(after)}."
            )
        if len(results) != count:
            raise ValueError(
                f"{type(self).__name__}: `update` must return one tensor per parameter, {count}, "
                f"got {len(results)}."
            )

    def _move(
        self, grads: Leaves, params: Leaves | None, memory: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        """Return (w + scale d, next slots)."""
        weights = self._require_params(params, "it moves them")
        scale, directions, after = self.direction(grads, weights, memory, hyper, step)
        with torch.DisableTorchFunction():
            moves = zip(weights, tree.scaled_sums(weights, scale, directions), strict=True)
            return [
                new if new.shape == w.shape and new.dtype == w.dtype else fitted(w, new)
                for w, new in moves
            ], after

    def _joined(
        self,
        step_on: StepOn,
        grads: Leaves,
        params: Leaves | None,
        memory: Slots,
        hyper: Hyper,
        step: Tensor,
    ) -> tuple[Leaves, Slots]:
        """Return what `step_on` does, on joined tensors where that is the same and faster.

        It is called once for all parameters that share their hyperparameters.
        """
        if (cells := in_cells(hyper)) is not None:
            return self._step_in_cells(step_on, grads, params, memory, cells, step)
        if not self.joinable or not self._joins(grads, params, memory, hyper):
            return step_on(grads, params, memory, hyper, step)
        with torch.DisableTorchFunction():
            joined = {
                name: join(slot) if isinstance(slot, list) else slot
                for name, slot in memory.items()
            }
            lists = join(grads), None if params is None else join(params)
        results, after = step_on(*lists, joined, hyper, step)
        with torch.DisableTorchFunction():
            return part(results, grads), {
                name: part(slot, grads) if isinstance(slot, list) else slot
                for name, slot in after.items()
            }

    def _step_in_cells(
        self,
        step_on: StepOn,
        grads: Leaves,
        params: Leaves | None,
        memory: Slots,
        cells: list[Cell],
        step: Tensor,
    ) -> tuple[Leaves, Slots]:
        results: Leaves = [*grads]
        for cell in cells:
            own = cell.take_memory(memory)
            moved, new = self._joined(
                step_on, cell.take(grads), params and cell.take(params), own, cell.hyper, step
            )
            self._check_update(moved, new, own, len(moved))
            results, memory = cell.put(results, moved), cell.put_memory(memory, new)
        return results, memory

    def _joins(self, grads: Leaves, params: Leaves | None, memory: Slots, hyper: Hyper) -> bool:
        with torch.DisableTorchFunction():
            slots = [slot for slot in memory.values() if isinstance(slot, list)]
            if not prefers_joined([grads, *([] if params is None else [params]), *slots]):
                return False
            is_own = "update" in self.__dict__ or "direction" in self.__dict__
            return not is_own and not any(
                isinstance(value, Tensor) and value.ndim for value in hyper.values()
            )

    def _hyper_at(
        self,
        state: State,
        grads: Sequence[Tensor | None],
        loss: Tensor | None,
        gradients: Tree = None,
    ) -> tuple[Hyper, dict[str, Any]]:
        """Return the hyperparameters' values at this step, and the next states of the schedules
        among them.

        Args:
            state: that of the optimizer.
            grads: the gradients, one tensor per parameter, or None.
            loss: as for `forward`.
            gradients: the tree of these, for their names; a list of them by default.
        """
        hyper: Hyper = {name: getattr(self, name) for name in self.hyperparameters}
        schedules, has_axes = {}, False
        for name, value in hyper.items():
            if type(value) is float:
                continue
            if isinstance(value, Schedule | ByName) and name not in state["schedules"]:
                self._check_schedule_names(state)
            if isinstance(value, Schedule):
                before = state["schedules"][name]
                seen = [grad for grad in grads if grad is not None]
                value, schedules[name] = advance(
                    value, before, step=state["step"], loss=loss, grads=seen
                )
            elif isinstance(value, ByName):
                named = _named(grads if gradients is None else gradients, grads)
                value, schedules[name] = value.advance(
                    self, name, state["schedules"][name], named=named, step=state["step"], loss=loss
                )
            hyper[name] = value
            has_axes = (
                has_axes or type(value) is Spread or (isinstance(value, Tensor) and value.ndim > 0)
            )
        if has_axes:
            check_shapes(self, hyper, grads)
        if state["schedules"].keys() != schedules.keys():
            self._check_schedule_names(state)
        return hyper, schedules

    def _schedules(self) -> list[tuple[str, Schedule | ByName]]:
        values = ((name, getattr(self, name)) for name in self.hyperparameters)
        return [(name, value) for name, value in values if isinstance(value, Schedule | ByName)]

    def _fit_hyperparameters(self, params: Tree, leaves: Leaves) -> Hyper:
        """Return the hyperparameters, schedules as they are.

        Raises:
            ValueError: the shape of one, or its patterns, do not fit the parameters.
        """
        hyper: Hyper = {}
        for name in self.hyperparameters:
            value = getattr(self, name)
            hyper[name] = (
                value.spread(self, name, [*paths(params)]) if isinstance(value, ByName) else value
            )
        check_shapes(self, hyper, leaves)
        return hyper

    def _check_schedule_names(self, state: State) -> None:
        """Raise ValueError if the state has schedules of other hyperparameters."""
        self._check_names("schedules", state["schedules"].keys(), dict(self._schedules()).keys())

    def _check_names(self, what: str, names: Any, own: Any) -> None:
        if names != own:
            raise ValueError(
                f"`state` must be that of this {type(self).__name__}, with the {what} "
                f"{sorted(own)}, got {sorted(names)}. Pass "
                "what its own `init`, or the step before, returned."
            )

    def _check_state_keys(self, state: Any) -> None:
        """Raise ValueError if it is no state at all."""
        if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"`state` must be a dict with {sorted(STATE_KEYS)}, got {found}. Pass what `init` "
                f"of this {type(self).__name__}, or the step before, returned."
            )

    def _check_state(self, state: State, grads: Leaves) -> None:
        """Raise ValueError if the state's memory or its schedules have other names, or shapes, than
        those of this optimizer.
        """
        memory, own = state["slots"] | state["shared"], self.slots(grads)
        if any(isinstance(value, ByName) for _, value in self._schedules()):
            own = {slot_name(name, slot): slot for name, slot in own.items()}
        self._check_names("memory", memory.keys(), own.keys())
        self._check_schedule_names(state)
        for name, slot in own.items():
            for expected, found in zip(tree.leaves(slot), tree.leaves(memory[name]), strict=False):
                if expected.shape != found.shape:
                    raise ValueError(
                        f"`state` must be that of this {type(self).__name__} for these parameters, "
                        f"with the memory {name!r} of shape {tuple(expected.shape)}, got "
                        f"{tuple(found.shape)}. Pass what its own `init`, or the step before, "
                        "returned."
                    )

    def _same_kind(self, name: str, new: Any, old: Any) -> Any:
        """Return the memory in its old dtype: a 0-dim hyperparameter of a wider dtype would widen
        that of a 0-dim parameter.
        """
        if isinstance(old, list):
            pairs = zip(new, old, strict=True)
            return [
                n if n.shape == o.shape and n.dtype == o.dtype else self._same_kind(name, n, o)
                for n, o in pairs
            ]
        if new.shape != old.shape:
            raise ValueError(
                f"{type(self).__name__}: the memory {name!r} of shape {tuple(old.shape)} became "
                f"{tuple(new.shape)}. The state is "
                "that of other parameters, or a hyperparameter is a tensor where the memory is one "
                "number."
            )
        return new if new.dtype == old.dtype else new.to(old.dtype)

    def _require_params(self, params: Leaves | None, reason: str) -> Leaves:
        if params is None:
            raise ValueError(
                f"`{type(self).__name__}` needs `params` because {reason}. Call `optimizer(grads, "
                f"state, params)`."
            )
        return params


def _named(given: Tree, leaves: Sequence[Tensor | None]) -> dict[str, Any]:
    """Return name -> leaf."""
    return dict(zip(paths(given), leaves, strict=True))


def _precision(state: State, grads: Leaves | None) -> torch.dtype:
    """Return the dtype of the gradients, else of the memory, else torch's default."""
    known = tree.leaves((state["slots"], state["shared"])) if grads is None else grads
    floating = (
        leaf.dtype for leaf in known if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    return next(floating, torch.get_default_dtype())


def _or_kept(param: Tensor, after: Tensor | None) -> Tensor:
    return param if after is None else after

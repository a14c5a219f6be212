"""Optimizers: modules whose forward is the update, pure and out of place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from metaopt import tree
from metaopt.optimizer.apply import apply_update, apply_updates, move, require_params
from metaopt.optimizer.by_name import Value
from metaopt.optimizer.deployed import Deployed
from metaopt.optimizer.missing import separate_state
from metaopt.optimizer.module import Configurable
from metaopt.optimizer.precondition import precondition_by_vjp, precondition_in_blocks
from metaopt.optimizer.state import Hyper, Leaves, Slots, State, find_lists
from metaopt.optimizer.step import start, step_leaves
from metaopt.optimizer.values import Observe, find_rate, read_values
from metaopt.torch_internals import foreach_copy_, has_forward_hooks
from metaopt.transforms import find_memories, part_from
from metaopt.tree import Tree


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
    parameters). Many small tensors are joined to one where the class says `joinable = True`; see
    `metaopt.optimizer.flat`.

    The state is a dict: "step" (int64 scalar), "slots" (memory per parameter, in the parameters'
    own structure), "shared" (memory over all parameters) and "schedules"; also "optimizer", the
    state of another one, where that is kept whole. With `init(params,
    per_parameter=True)` there is also "steps", a count for each parameter, and a gradient may be
    None: then its parameter, memory and count stay as they are, as in `torch.optim`. `update` is
    called for some of the parameters at a time then; one that couples them, other than by "shared"
    memory, should say so by raising in `separate`.
    """

    hyperparameters: tuple[str, ...] = ()
    # True if the memory follows the parameters as the updates move them, so that nobody else may
    # scale the updates
    follows_params = False

    def slots(self, params: Leaves) -> Slots:
        """Return the memory before the first step, by name.

        Each is a list with one tensor per parameter, or one tensor for all of them.
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
        """Return (scale, d, next slots) of updates u = scale d.

        Then w + u need not make u first.
        """
        raise TypeError(
            f"{type(self).__name__} must define `update(grads, params, slots, hyper, step)`, or "
            "`direction`."
        )

    def move(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        """Return (w + u, next slots); with a `direction`, without making u first.

        A class may do it in fewer passes where nothing is recorded. The arguments are those of
        `update`, and `params` are needed.
        """
        weights = require_params(self, params, "it moves them")
        if type(self).update is Optimizer.update and "update" not in vars(self):
            scale, directions, after = self.direction(grads, weights, slots, hyper, step)
            return move(weights, scale, directions), after
        updates, after = self.update(grads, weights, slots, hyper, step)
        pairs = zip(weights, updates, strict=True)
        return [apply_update(w, u) for w, u in pairs], after

    def move_in_place(
        self, grads: Leaves, params: Leaves, slots: Slots, hyper: Hyper, step: Tensor
    ) -> Slots:
        """Make the step of `move` in the memory of the parameters and slots; return the slots.

        Only where nothing is recorded and nobody else looks at them.
        """
        moved, after = self.move(grads, params, slots, hyper, step)
        memory = find_lists(slots)
        own = [*params, *(leaf for slot in memory.values() for leaf in slot)]
        values = [*moved, *(leaf for name in memory for leaf in after[name])]
        # what is remembered may be the parameters, or what another memory was
        there = find_memories(own)
        foreach_copy_(own, [part_from(there, value) for value in values])
        return after | memory

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
        state = start(self, params)
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
                "gradient cannot be left out for it. Give every parameter a gradient (zeros) and "
                "leave frozen ones out. If its `forward` passes None on, say so by defining "
                "`separate(state, params)` too."
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
        return step_leaves(self, self.update, grads, state, params, loss)

    def moved(
        self, grads: Tree, state: State, params: Tree, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (w + u, next state), in one pass where the optimizer can.

        It is `apply_updates` after `forward`.

        Args:
            grads: as for `forward`, and so are the others, of which it needs `params`.
            state: from `init` or the step before.
            params: w.
            loss: the loss there.

        Raises:
            ValueError: as `forward`, and if an update has another shape than its parameter.
        """
        if is_plain(self):
            after, state = step_leaves(self, self.move, grads, state, params, loss)
            return (tree.map(_or_kept, params, after) if "steps" in state else after), state
        updates, state = self(grads, state, params, loss=loss)
        return apply_updates(params, updates), state

    def diagonal(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> Sequence[Value]:
        """Return du/dg for each parameter, entry by entry, or a number for all entries.

        A class whose `update` is elementwise may define it in closed form, as the derivative that
        autograd would find; its subclasses, which may have another update, do not inherit it.
        The arguments are those of `update`.
        """
        raise TypeError(
            f"{type(self).__name__} must define `diagonal(grads, params, slots, hyper, step)` to "
            "have its derivative in closed form."
        )

    def precondition(
        self, v: Tree, grads: Tree, state: State, params: Tree, *, loss: Tensor | None = None
    ) -> Tree:
        """Return D' v with D = du/dg, the derivative of the next update in the gradient.

        Args:
            v: a tree like the gradients.
            grads: as for `forward`, and so are the others, of which it needs `params`.
            state: from `init` or the step before.
            params: the parameters at which the gradients were taken.
            loss: the loss there.

        Raises:
            ValueError: as `forward`.

        Cost:
            Where the update is elementwise and this is not differentiated, one pass over the
            parameters, by `diagonal` if there is one. Elsewhere the graph of the update.
        """
        found = None
        if is_plain(self):
            found = precondition_in_blocks(self, v, grads, state, params, loss)
        return precondition_by_vjp(self, v, grads, state, params, loss) if found is None else found

    def initial(self, params: Tree) -> Tree:
        """Return the parameters to start at: the given ones, unless they are learned.

        `LearnedStart` has others. `MetaTraining` and `evaluate` start there.

        Args:
            params: where a task says that they start.

        Raises:
            ValueError: these are parameters of another network.
        """
        return params

    def evaluated(self, state: State, params: Tree) -> Tree:
        """Return the parameters to evaluate at: the given ones, unless the optimizer keeps others.

        `EMA`, `Lookahead` and `ScheduleFree` do. Differentiable in the parameters, the state and
        what the optimizer learns. Of several behind each other the outermost decides.

        Args:
            state: from `init` or a step, such as `out.opt_state` of `minimize`.
            params: the parameters that belong to it, such as `out.params`.

        Raises:
            ValueError: the state is another optimizer's.
        """
        return params

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> the value of every hyperparameter that the next step from `state` uses.

        The values are differentiable, and nothing is changed. Inside other optimizers the names are
        led, by "optimizer." behind a transform and by the pattern and "/" in a group. A schedule
        that observes the loss or the gradients answers without them with its last value.

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
        return read_values(self, state, loss, grads)

    def rate(self, state: State, params: Tree, observe: Observe) -> Value:
        """Return the step size `lr` of the update that would be made next.

        It is a number or a scalar tensor.

        Args:
            state: from `init` or the step before.
            params: the present parameters.
            observe: gives the gradients and the loss there; called only if there is a schedule,
                which may look at them.

        Raises:
            ValueError: there is not just one hyperparameter `lr`, or it is not a scalar.
        """
        return find_rate(self, state, params, observe)

    def as_torch(self, params: Iterable[Any]) -> Deployed:
        """Return a `torch.optim.Optimizer` that makes this optimizer's updates; see `Deployed`."""
        return Deployed(params, self)


def is_plain(optimizer: Optimizer) -> bool:
    """Return True if a call does what `update` says, and nothing else that is to happen."""
    kind = type(optimizer)
    return (
        kind.__call__ is Optimizer.__call__
        and kind.forward is Optimizer.forward
        and "forward" not in vars(optimizer)
        and not has_forward_hooks(optimizer)
    )


def _or_kept(param: Tensor, after: Tensor | None) -> Tensor:
    return param if after is None else after

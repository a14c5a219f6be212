"""A live `torch.optim` optimizer as one of ours."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from metaopt import tree
from metaopt.interop.scheduler import continue_scheduler
from metaopt.optimizer import Leaves, Optimizer, State
from metaopt.optimizer.by_name import Value
from metaopt.optimizer.counterparts import Counterpart, counterparts
from metaopt.optimizer.state import require_state
from metaopt.transforms import is_tracked
from metaopt.tree import Structure, Tree


def from_torch(
    optimizer: torch.optim.Optimizer,
    params: Tree | None = None,
    *,
    scheduler: LRScheduler | None = None,
) -> FromTorch:
    """Return a pure, differentiable `Optimizer` that goes on from where a `torch.optim` one stands.

    Hyperparameters, groups and `maximize` are read now, and so is the memory: `init` returns a copy
    of it in place of zeros. Without `scheduler` the rate stays what it is now; hooks are not
    carried over. Nothing in `optimizer` is changed.

    A tensor given to `optimizer` as its lr, or as another hyperparameter, remains a tensor; one
    that requires grad is learned. What is a number becomes a parameter by `pure.optimizers[0].lr =
    nn.Parameter(...)`, with one optimizer for each group. A schedule put there goes on from the
    live step count; torch's SGD and Muon keep none, and theirs is at most 1.

    Args:
        optimizer: a `torch.optim` SGD, Adam, AdamW, Adamax, RAdam, NAdam, Adagrad, Adadelta,
            Adafactor, RMSprop, ASGD, Rprop or Muon.
        params: the live parameters as the tree that will be updated, `functional(model).params`;
            needed where there are several groups. By default the leaves of that tree are those of
            the one group that require grad, in their order.
        scheduler: torch's scheduler of the learning rate, if it is to go on, one step of it after
            each of the optimizer's: a StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR,
            PolynomialLR or CosineAnnealingLR. Its numbers can be learned: `pure.optimizers[0].lr`
            is the schedule.

    Warns:
        UserWarning: the optimizer has a scheduler, which is not given.

    Raises:
        TypeError: another class.
        ValueError: every parameter is frozen, there are several groups and no `params`, or `params`
            holds anything but the optimizer's parameters; `scheduler` is another optimizer's, of
            another kind, or not all that sets the rate; in `init`, the tensors are not those of the
            optimizer, by number, shape or order.
    """
    known = kinds()
    if type(optimizer) not in known:
        raise TypeError(
            f"`optimizer` must be one of torch.optim's {sorted(kind.__name__ for kind in known)}, "
            f"got {type(optimizer).__module__}.{type(optimizer).__name__}. Others, and subclasses, "
            "have no known equal here: write it as an `Optimizer`, and say so by "
            "`metaopt.optimizer.register_equal`. To differentiate a solution that it found, run "
            "it by itself and pass the result to `mo.implicit(loss_fn, params, batch, meta=meta)`."
        )
    _check_scheduler(optimizer, scheduler)
    kind, names = known[type(optimizer)]
    states = {id(weight): state for weight, state in optimizer.state.items()}
    weights = _weights(optimizer, params)
    if not weights:
        raise ValueError(
            "`optimizer` must have a parameter that requires grad, got none. Is every parameter "
            "frozen?"
        )
    group_of = {
        id(weight): index
        for index, group in enumerate(optimizer.param_groups)
        for weight in group["params"]
    }
    members: dict[tuple[float, ...], list[int]] = {}
    for place, weight in enumerate(weights):
        members.setdefault((group_of[id(weight)], *counts(states.get(id(weight), {}))), []).append(
            place
        )
    optimizers, parts = [], []
    for (index, *_), places in members.items():
        group = optimizer.param_groups[int(index)]
        steps = int(counts(states.get(id(weights[places[0]]), {}))[0])
        optimizers.append(built(kind, group))
        if scheduler is not None:
            optimizers[-1].lr = continue_scheduler(scheduler, int(index), steps)
        own = [states.get(id(weights[place]), {}) for place in places]
        memory = {
            name: [_remembered(state.get(theirs)) for state in own]
            for name, theirs in names.items()
            if any(isinstance(state.get(theirs), Tensor) for state in own)
        }
        parts.append(Part(tuple(places), group.get("maximize", False), steps, memory))
    return FromTorch(
        optimizers, parts, weights, None if params is None else tree.flatten(params)[1]
    )


class Part(NamedTuple):
    """Parameters of one group that have made the same number of steps.

    Args:
        places: their indices among all.
        maximize: whether their gradients are climbed.
        step: the number of steps.
        memory: name of a slot -> one tensor per parameter; None for one that has no such memory.
    """

    places: tuple[int, ...]
    maximize: bool
    step: int
    memory: dict[str, list[Any]]


class FromTorch(Optimizer):
    """What `from_torch` returns. The states of the parts are `state["shared"]["parts"]`.

    Args:
        optimizers: one for each part.
        parts: which parameters each updates, and where they stand.
        weights: the live parameters.
        structure: the tree they stand in, if it is known.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        parts: Sequence[Part],
        weights: Leaves,
        structure: Structure | None,
    ):
        super().__init__()
        self.optimizers = nn.ModuleList(optimizers)
        self.parts = tuple(parts)
        self.structure = structure
        self._shapes = [tuple(weight.shape) for weight in weights]
        self._weights = [weakref.ref(weight) for weight in weights]

    def extra_repr(self) -> str:
        """Return nothing: the optimizers say it all."""
        return ""

    def config(self) -> dict[str, Any]:
        """Refuse to be saved.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "What `from_torch` returns cannot be saved: it is tied to a live optimizer. Save that "
            "one's `state_dict()`, or one of `metaopt.optimizers` for its hyperparameters alone."
        )

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state of the torch optimizer, on the devices and in the dtypes of `params`."""
        state = super().init(params)
        leaves = self._leaves(params, "params")
        if not torch.compiler.is_compiling():  # a compiler does not see which tensor is which
            self._check_order(params)
        parts = [
            _resumed(optimizer, part, [leaves[place] for place in part.places])
            for optimizer, part in self._pairs()
        ]
        step = torch.full_like(state["step"], max(part.step for part in self.parts))
        state = {**state, "step": step, "shared": {"parts": parts}}
        return self.separate(state, params) if per_parameter else state

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        leaves = self._leaves(params, "params")
        parts = [
            optimizer.separate(before, [leaves[place] for place in part.places])
            for (optimizer, part), before in zip(
                self._pairs(), state["shared"]["parts"], strict=True
            )
        ]
        return _with_counts({**state, "shared": {"parts": parts}, "steps": []})

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        self._check_parts(state)
        gradients, structure = self._leaves(grads, "grads"), tree.flatten(grads)[1]
        weights = None if params is None else tree.flatten_like(structure, params, "params")
        updates, states = list(gradients), []
        for (optimizer, part), before in zip(self._pairs(), state["shared"]["parts"], strict=True):
            uphill = [gradients[place] for place in part.places]
            own = None if weights is None else [weights[place] for place in part.places]
            downhill = [None if g is None else -g for g in uphill] if part.maximize else uphill
            moved, next_state = optimizer(downhill, before, own, loss=loss)
            states.append(next_state)
            for place, update in zip(part.places, moved, strict=True):
                updates[place] = update
        after = {**state, "step": state["step"] + 1, "shared": {"parts": states}}
        return tree.unflatten(structure, updates), _with_counts(after)

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> value, as `Optimizer.values` does.

        The names are led by "optimizers.0." and so on.
        """
        self._check_parts(state)
        own = [
            None if given is None else self._leaves(given, what)
            for given, what in ((grads, "grads"), (params, "params"))
        ]
        found: dict[str, Value] = {}
        for index, ((optimizer, part), before) in enumerate(
            zip(self._pairs(), state["shared"]["parts"], strict=True)
        ):
            g, w = (
                None if leaves is None else [leaves[place] for place in part.places]
                for leaves in own
            )
            if g is not None and part.maximize:
                g = [None if leaf is None else -leaf for leaf in g]
            values = optimizer.values(before, loss=loss, grads=g, params=w)
            found |= {f"optimizers.{index}.{name}": value for name, value in values.items()}
        return found

    def _check_parts(self, state: Any) -> None:
        """Raise ValueError if the state is another optimizer's."""
        require_state(self, state)
        found = len(state["shared"].get("parts", []))
        if found != len(self.parts):
            raise ValueError(
                f"`state` must be that of this FromTorch, with {len(self.parts)} parts, got "
                f"{found}. Pass what its own `init`, or the step before, returned."
            )

    def _pairs(self) -> list[tuple[Optimizer, Part]]:
        return list(zip(cast(Sequence[Optimizer], self.optimizers), self.parts, strict=True))

    def _check_order(self, params: Tree) -> None:
        """Raise if the parameters are the live ones in another order.

        Equal shapes would not tell.
        """
        place_of = {
            id(live): place
            for place, weight in enumerate(self._weights)
            if (live := weight()) is not None
        }
        for place, (path, leaf) in enumerate(tree.named_leaves(params)):
            if place_of.get(id(leaf), place) != place:
                raise ValueError(
                    "`params` must hold the parameters of the torch optimizer in its order, got "
                    f"another one at {path}. Call from_torch(optimizer, "
                    "params=functional(model).params)."
                )

    def _leaves(self, given: Tree, what: str) -> Leaves:
        """Return the leaves, which must be those of the torch optimizer.

        That is checked as far as it can be seen.
        """
        leaves = (
            tree.leaves(given)
            if self.structure is None
            else tree.flatten_like(self.structure, given, what)
        )
        found = [None if leaf is None else tuple(leaf.shape) for leaf in leaves]
        if len(found) != len(self._shapes) or any(
            f not in (None, s) for f, s in zip(found, self._shapes, strict=True)
        ):
            raise ValueError(
                f"`{what}` must hold the trainable parameters of the torch optimizer in its order, "
                f"shapes {self._shapes}, got {found}. If some are left out or stand in another "
                "order, call from_torch(optimizer, params=functional(model).params)."
            )
        return leaves


def _remembered(memory: Any) -> Tensor | None:
    return memory.detach().clone() if isinstance(memory, Tensor) else None


def _with_counts(state: State) -> State:
    """Return the state with the counts of its parts, if it has counts."""
    return (
        {**state, "steps": [part["steps"] for part in state["shared"]["parts"]]}
        if "steps" in state
        else state
    )


def _resumed(optimizer: Optimizer, part: Part, like: Leaves) -> State:
    """Return the state of a part, with the memory that is known in place of zeros."""
    state = optimizer.init(like)
    memory = {
        name: [
            fresh if old is None else tree.as_real(old.to(leaf.device, leaf.dtype))
            for old, fresh, leaf in zip(part.memory[name], state["slots"][name], like, strict=True)
        ]
        for name in state["slots"].keys() & part.memory.keys()
    }
    shared = {
        name: part.memory[name][0].to(state["shared"][name])
        for name in state["shared"].keys() & part.memory.keys()
    }
    return {
        **state,
        "step": torch.full_like(state["step"], part.step),
        "slots": state["slots"] | memory,
        "shared": state["shared"] | shared,
    }


def kinds() -> Mapping[type[torch.optim.Optimizer], Counterpart]:
    """Return class of torch -> our equal."""
    import metaopt.optimizers  # noqa: F401  # registers ours, the first time

    return counterparts()


def _check_scheduler(optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None) -> None:
    """Warn if a scheduler is left out, and raise ValueError if it is another optimizer's."""
    if scheduler is not None and getattr(scheduler, "optimizer", None) is not optimizer:
        raise ValueError(
            f"`scheduler` must be a scheduler of `optimizer`, got {type(scheduler).__name__} of "
            "another one. Pass the one that was made with it: `StepLR(optimizer, 10)`."
        )
    scheduled = [group["lr"] for group in optimizer.param_groups if "initial_lr" in group]
    if scheduler is None and scheduled:
        warnings.warn(
            "`optimizer` has a scheduler of torch, which is not carried over: the rate stays "
            f"{scheduled[0]}, what it is now. Pass it, `from_torch(optimizer, "
            "scheduler=scheduler)`, or give a schedule of ours, `pure.optimizers[0].lr = "
            "Cosine(0.1, steps=100)`.",
            UserWarning,
            stacklevel=3,
        )


def _weights(optimizer: torch.optim.Optimizer, params: Tree | None) -> Leaves:
    """Return the live parameters in the order of the tree that will be updated."""
    every = [weight for group in optimizer.param_groups for weight in group["params"]]
    if params is None:
        if len(optimizer.param_groups) > 1:
            raise ValueError(
                "`params` is needed where there are several groups, got "
                f"{len(optimizer.param_groups)} groups. They do not say which parameter has which "
                "name. Call from_torch(optimizer, params=functional(model).params)."
            )
        return [weight for weight in every if weight.requires_grad]
    known = {id(weight) for weight in every}
    for path, leaf in tree.named_leaves(params):
        if id(leaf) not in known:
            raise ValueError(
                "`params` must hold live parameters of the optimizer, got another tensor at "
                f"{path}. Give functional(model).params as it is, with no copies, and leave out "
                "what the optimizer does not update."
            )
    return tree.leaves(params)


def counts(state: dict[str, Any]) -> tuple[float, ...]:
    """Return the step count of a parameter, and a mark for each other number of its state.

    The mark is the value; of a tensor that is differentiated its id, since equal values may have
    different histories.

    SGD and Muon do not count: there it is 1 if there is memory, which is all that matters.
    """
    count = state.get("step", any(isinstance(value, Tensor) for value in state.values()))
    others = [state.get(name, 0) for name in ("mu_product", "eta")]
    return float(count), *(
        id(other) if isinstance(other, Tensor) and is_tracked(other) else float(other)
        for other in others
    )


def built(kind: type[Optimizer], group: dict[str, Any]) -> Optimizer:
    """Return our optimizer with the options of a group, whose names are the same."""
    adam, adamw = kinds()[torch.optim.Adam].kind, kinds()[torch.optim.AdamW].kind
    if kind in (adam, adamw):
        kind = adamw if group.get("decoupled_weight_decay", kind is adamw) else adam
    # that of Adagrad is in its memory already
    names = inspect.signature(kind).parameters.keys() - {"initial_accumulator_value"}
    return kind(**{name: _own(group[name]) for name in names if group.get(name) is not None})


def _own(value: Any) -> Any:
    """Copy what a scheduler of torch may change in place."""
    if isinstance(value, tuple | list):
        return tuple(_own(item) for item in value)
    return value.clone() if isinstance(value, Tensor) and not is_tracked(value) else value

"""TorchOpt's gradient transformations as optimizers."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaopt import tree
from metaopt.closure import find_reachable
from metaopt.optimizer import Hyper, Optimizer, State
from metaopt.optimizer.hyperparameter import set_hyperparameter
from metaopt.optimizer.missing import require_gradients
from metaopt.optimizer.schedule import Schedule
from metaopt.optimizer.state import require_state
from metaopt.optimizer.values import advance_schedules
from metaopt.transforms import is_tracked, is_unrecorded, values_are_readable
from metaopt.tree import Tree

if TYPE_CHECKING:
    from torchopt.base import GradientTransformation


def from_torchopt(
    transform: GradientTransformation | Callable[..., GradientTransformation], **arguments: Any
) -> FromTorchOpt:
    """Return a TorchOpt transformation as an `Optimizer`.

    It is pure, under `vmap` too, and differentiable. `from_torchopt(torchopt.adam(1e-3))`, or, to
    learn or schedule hyperparameters, the function and its arguments: `from_torchopt(torchopt.adam,
    lr=nn.Parameter(torch.tensor(1e-3)), betas=(0.9, 0.99))`.

    The arithmetic is TorchOpt's, and so are its limits; those in `metaopt.optimizers` have none of
    these:

    - The derivatives of `use_accelerated_op=True` are wrong, about twice the true ones, and not a
      number where a gradient has been zero from the start. (Those of the plain operators are finite
      there: the root of 0 is given the derivative 0.)
    - Every parameter needs a gradient: TorchOpt's momentum forgets what it had of one without.
    - `clip_grad_norm` takes the norm for a constant, and does not work under `vmap`.
    - Adam's bias correction is computed in float32 unless the default dtype is float64.
    - `torch.compile` does not see through it.
    - Betas, weight decay and dampening must be numbers: it is an error to give them as parameters.

    Args:
        transform: what a TorchOpt function such as `torchopt.adam(1e-3)` or `torchopt.chain(...)`
            returns; with arguments, the function, or one of your own that returns a transformation.
        arguments: by name. Floats, tensors, parameters and schedules are hyperparameters of the
            optimizer; anything else (a pair of betas, a flag, a schedule of TorchOpt) is handed on
            as it is.

    Raises:
        TypeError: `transform` is not a gradient transformation, or, with arguments, not a function.
        ValueError: a tensor that requires grad is hidden in the transformation or in an argument:
            give it by name.
    """
    from torchopt.base import GradientTransformation

    if arguments and (isinstance(transform, GradientTransformation) or not callable(transform)):
        raise TypeError(
            "With arguments, `transform` must be the function that makes a transformation, got "
            f"{type(transform).__name__}. Write from_torchopt(torchopt.adam, lr=...)."
        )
    if not arguments and not isinstance(transform, GradientTransformation):
        raise TypeError(
            "`transform` must be a TorchOpt gradient transformation, got "
            f"{type(transform).__name__}. Call the function: from_torchopt(torchopt.adam(1e-3))."
        )
    return FromTorchOpt(transform, arguments)


class FromTorchOpt(Optimizer):
    """A TorchOpt transformation; made by `from_torchopt`.

    Its own state is `state["shared"]["transform"]`.

    Args:
        transform: the transformation, or the function that makes it.
        arguments: those of the function.
    """

    def __init__(self, transform: Any, arguments: Mapping[str, Any]):
        super().__init__()
        learnable = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, float | Tensor | Schedule)
        }
        self.transform = transform
        self.arguments = {k: v for k, v in arguments.items() if k not in learnable}
        hidden = [
            name for name, tensor in find_reachable(transform, "transform") if is_tracked(tensor)
        ]
        hidden += [
            name
            for key, value in self.arguments.items()
            for name, tensor in find_reachable(value, key)
            if is_tracked(tensor)
        ]
        if hidden:
            raise ValueError(
                f"`from_torchopt` finds tensors that require grad in {', '.join(sorted(hidden))}. "
                "They would get no gradient. Give each by a name of its own: "
                "from_torchopt(torchopt.adam, lr=...)."
            )
        self.hyperparameters = tuple(learnable)
        for name, value in learnable.items():
            set_hyperparameter(self, name, value, low=-torch.inf)  # TorchOpt checks its own

    def extra_repr(self) -> str:
        """Return the function's name, and its arguments but for tensors and modules."""
        numbers = {
            name: value
            for name in self.hyperparameters
            if isinstance(value := getattr(self, name), float)
        }
        shown = [getattr(self.transform, "__name__", type(self.transform).__name__)]
        return ", ".join(
            shown + [f"{name}={value!r}" for name, value in (self.arguments | numbers).items()]
        )

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        state = super().init(params, per_parameter=per_parameter)
        leaves = tree.leaves(params)
        # Schedules may observe what there is not yet; a TorchOpt state starts from zeros or from
        # constants.
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        hyper, _ = advance_schedules(self, state, zeros, leaves[0].new_zeros(()), params)
        with _explained():
            memory = self._made(hyper).init(tree.map(torch.Tensor.detach, params))
        memory = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, memory)
        return {**state, "shared": {"transform": _counted(memory, leaves[0].device)}}

    def separate(self, state: State, params: Tree) -> State:
        """Refuse to count the steps of each parameter.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "`from_torchopt`: every parameter needs a gradient, got None, or a state with a step "
            "count for each. TorchOpt's momentum forgets what it had of a parameter without one. "
            "Give zeros, leave frozen parameters out, or use the optimizer of that name in "
            "`optimizers`."
        )

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        require_state(self, state)
        require_gradients(grads)
        hyper, schedules = advance_schedules(self, state, tree.leaves(grads), loss, grads)
        if "transform" not in state["shared"]:
            raise ValueError(
                "`state` must be that of this FromTorchOpt, got memory named "
                f"{sorted(state['slots'] | state['shared'])}. Pass what its own `init`, or the "
                "step before, returned."
            )
        memory = state["shared"]["transform"]
        if not values_are_readable():
            memory = _batched(memory, (grads, params, hyper))
        with _explained(), nullcontext() if is_unrecorded() else _SmoothRoots():
            transform, memory = self._made(hyper), _uncounted(memory)
            flags = list(_first_calls(transform))

            def run(first: bool) -> tuple[Tree, Tree]:
                for flag in flags:
                    flag.cell.cell_contents = first
                return transform.update(grads, memory, params=params, inplace=False)

            updates, after = run(first=False)
            if any(flag.matters for flag in flags):
                start = state["step"] == 0
                updates, after = tree.map(
                    lambda one, other: (
                        torch.where(start, one, other) if isinstance(one, Tensor) else one
                    ),
                    run(first=True),
                    (updates, after),
                )
        shared = {"transform": _counted(after, state["step"].device)}
        return updates, {
            **state,
            "step": state["step"] + 1,
            "shared": shared,
            "schedules": schedules,
        }

    def _made(self, hyper: Hyper) -> GradientTransformation:
        """Return the transformation with these hyperparameters."""
        for name in ("momentum", "weight_decay"):
            if isinstance(value := hyper.get(name), Tensor) and value == 0:
                raise ValueError(
                    f"`{name}` must not be 0 where it is a tensor, got {value}. TorchOpt leaves it "
                    "out then, and it would get no gradient. Start from a positive value, or use "
                    "the optimizer of that name in `metaopt.optimizers`."
                )
        made: GradientTransformation = self.transform
        if self.arguments or hyper:
            made = self.transform(**self.arguments, **hyper)
        return made


class _Count(NamedTuple):
    """A Python integer in a TorchOpt state, as a tensor: what goes from step to step is tensors."""

    value: Tensor


def _counted(memory: Tree, device: torch.device) -> Tree:
    return tree.map(
        lambda leaf: _Count(torch.tensor(leaf, device=device)) if type(leaf) is int else leaf,
        memory,
    )


def _uncounted(memory: Tree) -> Tree:
    """Invert `_counted`; reads the values."""
    return tree.map(
        lambda leaf: int(leaf.value) if isinstance(leaf, _Count) else leaf,
        memory,
        is_leaf=lambda node: isinstance(node, _Count),
    )


def _batched(memory: Tree, like: Tree) -> Tree:
    """Give the memory every batch axis of `vmap` that is in `like`.

    TorchOpt adds gradients to it in place.
    """
    zero = tree.sum_leaves(
        lambda leaf: leaf.new_zeros(()),
        [leaf for leaf in tree.leaves(like) if isinstance(leaf, Tensor)],
    )

    def widen(leaf: Any) -> Any:
        return (
            leaf + zero.to(leaf.dtype)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
        )

    return tree.map(widen, memory)


class _SmoothRoots(TorchFunctionMode):
    """While entered, the root of 0 has the derivative 0.

    In torch it is infinite, and times the derivative 0 of a square not a number. Values stay the
    same. What remains of Adam's derivative where v = 0 is the exact 1 / eps at the first step.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.sqrt, Tensor.sqrt) and not kwargs:
            return tree.safe_sqrt(*args)
        if func is Tensor.sqrt_:
            return args[0].copy_(tree.safe_sqrt(args[0].clone()))
        return func(*args, **(kwargs or {}))


class _FirstCall(NamedTuple):
    """The hidden flag of `torchopt.transform.trace`.

    At its first call it forgets its memory and does not dampen. The flag belongs to the
    transformation, not to the state: rebuilt at every step it would never have any memory, and used
    for a second run it would dampen the first gradient. We set it by the step count of the state.
    It `matters` where there is dampening; without, a memory of zeros does the same.
    """

    cell: types.CellType
    matters: bool


def _first_calls(value: Any, seen: set[int] | None = None) -> Iterator[_FirstCall]:
    """Yield the flags in a transformation."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    inside: Iterable[Any] = value if isinstance(value, tuple | list) else ()
    if isinstance(value, types.FunctionType):
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        inside = [cell.cell_contents for cell in cells.values() if cell != types.CellType()]
        if value.__module__ == "torchopt.transform.trace" and "first_call" in cells:
            dampening = cells["dampening"].cell_contents
            yield _FirstCall(
                cells["first_call"], matters=isinstance(dampening, Tensor) or dampening != 0
            )
    for item in inside:
        yield from _first_calls(item, seen)


@contextmanager
def _explained() -> Iterator[None]:
    """Say in our words why TorchOpt cannot do what was asked."""
    try:
        yield
    except RuntimeError as error:
        if "setup_context" in str(error) or "register a hook" in str(error):
            raise ValueError(
                "`from_torchopt`: TorchOpt's accelerated operators and its hooks work in plain "
                "autograd only, with every step's graph kept: not under `torch.func` transforms, "
                "nor with "
                'memory="steps". Leave out '
                "use_accelerated_op or register_hook."
            ) from error
        if not str(error).startswith("vmap:"):
            raise
        raise ValueError(
            "`from_torchopt`: the transformation reads the value of a tensor that differs over a "
            "`vmap`, which cannot be done. In place of clip_grad_norm use `ClipNorm(max_norm, "
            "from_torchopt(...))`; for an lr with a batch, give TorchOpt a function: "
            "from_torchopt(lambda lr: torchopt.sgd(lambda count: lr), lr=lr)."
        ) from error
    except TypeError as error:
        if "must be Number" not in str(error):
            raise
        raise TypeError(
            "`from_torchopt`: TorchOpt needs a number where a tensor that requires grad was given "
            f"({error}). Of its hyperparameters lr, eps, eps_root and momentum (without nesterov) "
            "can be learned. Those in `metaopt.optimizers` can all be."
        ) from error

"""A module whose parameters are values that can be replaced, and which remembers them all.

This is what higher calls patching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaopt.exact_ops import any_order
from metaopt.interop.higher.tensors import get_func_params
from metaopt.interop.higher.twin import Place, Twins, subclass
from metaopt.torch_internals import buffers_of, has_forward_hooks, parameters_of


class FastWeights:
    """The parameters of a patched module over time, and the places where the latest stand.

    The tensors themselves are never changed. `history` is empty until the first parameters are
    given; without `track` it holds the latest only, so that their graph can go.
    """

    def __init__(self, places: list[list[Place]], buffers: list[Place]):
        self.history: list[list[Tensor]] = []
        self.track = True
        self.places = places
        self.buffers = buffers
        self.plain = False  # whether the kernels are known to have every derivative

    def push(self, params: Iterable[Tensor]) -> None:
        """Make these the latest parameters."""
        params = list(params)
        if len(params) != len(self.places):
            raise ValueError(
                f"`params` must hold the {len(self.places)} parameters of the patched module, in "
                f"the order of its `parameters()`, got {len(params)}."
            )
        for param in params:
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"`params` must be tensors, got {type(param).__name__}. Give what "
                    "`diffopt.step` returned."
                )
        self.history = [*(self.history if self.track else []), params]
        self.place(params)

    def place(self, params: Iterable[Any]) -> None:
        """Put these where the modules look for their parameters."""
        for value, places in zip(params, self.places, strict=True):
            for members, key in places:
                members[key] = value

    def exchange(self, old: Tensor, new: Tensor) -> None:
        """Make the latest parameters again the latest, with `new` in place of `old`."""
        self.push([new if param is old else param for param in self.history[-1]])

    def convert_buffers(self, fn: Callable[[Tensor], Tensor]) -> list[Any]:
        """Put `fn` of each buffer in its places, and return what stood in each of them."""
        before = [
            members.get(key) if isinstance(members, dict) else members[key]
            for members, key in self.buffers
        ]
        after = {id(buffer): fn(buffer) for buffer in before if isinstance(buffer, Tensor)}
        self.place_buffers([after.get(id(buffer), buffer) for buffer in before])
        return before

    def place_buffers(self, buffers: list[Any]) -> None:
        """Put these in the places of buffers."""
        for (members, key), buffer in zip(self.buffers, buffers, strict=True):
            if isinstance(buffer, Tensor):
                members[key] = buffer


class Patched(nn.Module):
    """A module below a patched one: setting one of its parameters sets a fast weight."""

    _fast: FastWeights

    def __setattr__(self, name: str, value: Any) -> None:
        old = parameters_of(self).get(name)
        if old is None:
            super().__setattr__(name, value)
        elif isinstance(value, Tensor):
            self._fast.exchange(old, value)
        else:
            raise TypeError(
                f"`{name}` of a patched module must be a tensor, got {type(value).__name__}."
            )


class PatchedModule(Patched):
    """A patched module.

    It computes with its latest fast weights, or with the `params` that a call gives it.
    """

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """Return what the module's own forward does with the fast weights.

        Buffers that it changes are kept for the next call; those of the original stay as they are.
        If it raises, the fast weights and the buffers are those before the call.

        Args:
            *args: as for the original module.
            params: new fast weights, one tensor for each of `parameters()`; they stay after the
                call.
            **kwargs: as for the original module.
        """
        history, buffers = self._fast.history, self._fast.convert_buffers(torch.clone)
        try:
            if params is not None:
                self._fast.push(params)
            self._require_params()
            with any_order() if self._fast.track and not self._fast.plain else nullcontext():
                return super().forward(*args, **kwargs)
        except BaseException:
            self._fast.history = history
            self._fast.place(history[-1] if history else [None] * len(self._fast.places))
            self._fast.place_buffers(buffers)
            raise

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[nn.Parameter]:
        """Yield the fast weights, in the order of the original's `parameters()`.

        Args:
            recurse: whether to go below this module itself.
            time: 0 for the first, t for those after t updates, -1 or None for the latest. An update
                is a step of the differentiable optimizer, a call with `params`, or setting them by
                hand.

        Raises:
            ValueError: there were no such parameters, or they were not kept.
        """
        self._require_params()
        time = -1 if time is None else time
        if not self._fast.track and time not in (-1, 0):
            raise ValueError(
                f"`time` must be 0 or -1, got {time}. Only the latest parameters are kept with "
                "track_higher_grads=False."
            )
        if not -len(self._fast.history) <= time < len(self._fast.history):
            raise ValueError(
                f"`time` must be at most {len(self._fast.history) - 1}, the number of updates so "
                f"far, got {time}."
            )
        chosen = self._fast.history[time]
        if not recurse:
            own = [
                any(members is parameters_of(self) for members, _ in places)
                for places in self._fast.places
            ]
            chosen = [param for param, mine in zip(chosen, own, strict=True) if mine]
        return iter(chosen)  # type: ignore[arg-type]  # plain tensors take the place of parameters

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest parameters; None before the first."""
        return self._fast.history[-1] if self._fast.history else None

    @fast_params.setter
    def fast_params(self, params: Iterable[Tensor]) -> None:
        self._fast.push(params)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The first parameters, those at time 0."""
        if not self._fast.track:
            raise RuntimeError("The initial parameters are not kept with track_higher_grads=False.")
        return list(self.parameters(time=0))

    @property
    def track_higher_grads(self) -> bool:
        """Whether all parameters so far are kept, with their graph."""
        return self._fast.track

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"`track_higher_grads` must be a bool, got {type(value).__name__}.")
        self._fast.track = value
        if not value:
            self._fast.history = self._fast.history[-1:]

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Make these the latest parameters."""
        self._fast.push(params)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` of the fast weights that have one: the leaves of the graph."""
        for param in self.parameters():
            if param.is_leaf and param.grad is not None:
                param.grad = None if set_to_none else torch.zeros_like(param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert the fast weights and the buffers, as `to` and `double` do, differentiably."""
        self._fast.push([fn(param) for param in self.parameters()])
        self._fast.convert_buffers(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a second patched module that goes on from here.

        The two share the graph so far, and nothing that changes.
        """
        # distinct, which the fast weights need not be
        marks = [nn.Parameter(torch.empty(0)) for _ in self._fast.places]
        self._fast.place(marks)
        try:
            twins = Twins(self, marks, type)
        finally:
            self._fast.place(self._fast.history[-1] if self._fast.history else [None] * len(marks))
        fast = _adopt(twins)
        fast.history, fast.track = list(self._fast.history), self._fast.track
        if fast.history:
            fast.place(fast.history[-1])
        copied: Self = twins.root
        memo[id(self)] = copied
        return copied

    def _require_params(self) -> None:
        if not self._fast.history:
            raise ValueError(
                "The patched module has no parameters yet. Call it with `params=`, or make it with "
                "`monkeypatch`."
            )


def make_functional(
    module: nn.Module,
    encapsulator: Callable[[PatchedModule, nn.Module], None] | None = None,
    device: Any = None,
) -> PatchedModule:
    """Return a patched module that has no parameters yet.

    A call gives it some, or `encapsulator(fmodel, module)` does.

    Args:
        module: any module; it is not changed.
        encapsulator: called at the end.
        device: for the copies of the buffers.

    Raises:
        ValueError: the module is patched already, or cannot be (see `Twins`).
    """
    if any(isinstance(part, Patched) for part in module.modules()):
        raise ValueError(
            "`module` is a patched module already. To branch off from it, copy it with "
            "`copy.deepcopy`."
        )
    twins = Twins(
        module,
        list(module.parameters()),
        lambda m: subclass(PatchedModule if m is module else Patched, type(m)),
        device,
    )
    _adopt(twins)
    fmodel: PatchedModule = twins.root
    if encapsulator is not None:
        encapsulator(fmodel, module)
    return fmodel


def monkeypatch(
    module: nn.Module,
    device: Any = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> PatchedModule:
    """Return a patched module that starts from the module's parameters.

    Args:
        module: any module; it is not changed, neither now nor when the patched one is used.
        device: for the fast weights and the buffers; by default that of the module.
        copy_initial_weights: True: start from copies, so derivatives reach
            `fmodel.parameters(time=0)` and no further. False: derivatives reach the module's own
            parameters.
        track_higher_grads: False: keep only the latest fast weights, for use at test time.

    Raises:
        ValueError: the module is patched already, or cannot be (see `Twins`).
    """
    fmodel = make_functional(module, device=device)
    if copy_initial_weights:
        fmodel.update_params(get_func_params(module, device))
    else:
        fmodel.update_params([param.clone().to(device) for param in module.parameters()])
    fmodel.track_higher_grads = track_higher_grads
    return fmodel


def buffer_sync(module: nn.Module, fmodule: Patched, device: Any = None) -> None:
    """Give a patched module copies of the buffers that a module has now.

    Args:
        module: the one that was patched, or one of the same architecture.
        fmodule: its patched module, or a part of that.
        device: for the copies; by default that of the module.

    Raises:
        ValueError: `fmodule` lacks a submodule that `module` has.
    """
    twins = dict(nn.Module.named_modules(fmodule, remove_duplicate=False))
    for name, part in module.named_modules(remove_duplicate=False):
        if name not in twins:
            raise ValueError(
                f"`fmodule` must have the submodules of `module`, got none at {name!r}. Patch this "
                "module: `monkeypatch(module)`."
            )
        for key, buffer in buffers_of(part).items():
            buffers_of(twins[name])[key] = (
                None if buffer is None else buffer.detach().to(device, copy=True)
            )


def _adopt(twins: Twins) -> FastWeights:
    """Give the twins fast weights in common."""
    fast = FastWeights(twins.places, twins.buffers)
    modules = list(nn.Module.modules(twins.root))
    for module in modules:
        vars(module)["_fast"] = fast
    # `any_order` would cost a small model 8 % of its time
    fast.plain = all(map(_is_plain, modules))
    return fast


def _is_plain(module: nn.Module) -> bool:
    """Return True for a module of torch that calls no kernel which `any_order` replaces.

    Others may call anything.
    """
    return (
        type(module).__module__ in _PLAIN
        and not isinstance(module, nn.MultiheadAttention)
        and not has_forward_hooks(module)  # weight norm is one
    )


_PLAIN = {
    f"torch.nn.modules.{name}"
    for name in ("activation", "container", "conv", "dropout", "flatten", "linear", "pooling")
}

# The names that programs take from `higher.patch` although they begin with an underscore.
_MonkeyPatchBase = Patched
_EncapsulatorType = Callable[[PatchedModule, nn.Module], None] | None
_BufferType = dict[str, Tensor | None]

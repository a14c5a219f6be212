"""An `nn.Module` as a pure function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaopt.autodiff.modes import note_modes
from metaopt.distributed import call_fully_sharded, is_fully_sharded
from metaopt.exact_ops import any_order
from metaopt.torch_internals import (
    NormWithStatistics,
    allow_hooks,
    foreach_copy_,
    has_buffers,
    has_no_hooks,
    holders_of,
    refuse_hooks,
)
from metaopt.transforms import is_tracked

Params = dict[str, Tensor]


class _Place(NamedTuple):
    """Where a parameter or buffer stands.

    Attributes:
        path: the names of the modules that lead to it.
        key: its own name in the last of them.
    """

    path: tuple[str, ...]
    key: str


def functional(model: nn.Module) -> Functional:
    """Return `model` as a pure function: `net(params, x)` computes f(x; params), changing nothing.

    Args:
        model: any module. It is read, never written: buffers that its forward updates in place are
            updated on copies.

    A module on which `fully_shard` was called has first derivatives only. `DTensor`s in an
    ordinary module have all.

    Returns:
        A `Functional`. Its `params` are the model's own trainable parameters, one entry per
        distinct tensor, so that `loss.backward()` fills the model's `.grad` and an outer
        `torch.optim` optimizer is seen at once. Parameters with `requires_grad=False` are
        constants; what is frozen is read here, once. Gradients of an embedding with `sparse=True`
        are dense.

    A module that calls `torch.utils.checkpoint` itself, or sets other hooks on saved tensors, is
    refused when it does so: what is computed again on the way back would be computed with the
    module's own parameters, as silently happens under `functional_call` of torch. (The reentrant
    variant cannot be seen, and gives no gradient: parameters must be inputs of what it runs.) Nor
    may two threads call one net at the same time: the module is lent the tensors.
    """
    return Functional(model)


def aliases(module: nn.Module) -> dict[str, list[str]]:
    """Return, for each distinct parameter and buffer, its first name -> all its names.

    Its names as a parameter come first. A parameter that is a buffer too, of whichever module, goes
    by the name that `named_parameters` gives it. Unlike in
    `named_parameters(remove_duplicate=False)`, a module that stands in several places counts once:
    given two names of one attribute, it would be lent to twice, and the wrong tensor would be put
    back.
    """
    names: dict[Tensor, list[str]] = {}
    for members in (nn.Module.named_parameters, nn.Module.named_buffers):
        for path, layer in module.named_modules():
            for name, tensor in members(layer, path, recurse=False, remove_duplicate=False):
                names.setdefault(tensor, []).append(name)
    return {same[0]: same for same in names.values()}


def lend(
    module: nn.Module, tensors: Params, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Return `function(*args, **kwargs)` while the module has other tensors in place of its own.

    Args:
        module: what is lent to.
        tensors: first name -> tensor.
        function: what runs meanwhile.
        *args: its arguments.
        **kwargs: its arguments by name.
    """
    all_names = aliases(module)
    everywhere = {alias: tensors[name] for name in tensors for alias in all_names.get(name, ())}
    return _lend(module, _locate(everywhere), everywhere, function, args, kwargs)


class Functional:
    """A module seen as a function; made by `functional`."""

    def __init__(self, model: nn.Module):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` must be an nn.Module, got {type(model).__name__}. Pass the module, not "
                "its output."
            )
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise TypeError(
                f"`model` must be the module that {type(model).__name__} was made of, got that "
                "itself: it sends gradients in `backward()` only, so other derivatives would "
                "silently be those of one process. Pass `model.module`, and enter `join_ranks()`."
            )
        self.model = model
        self._is_sharded = is_fully_sharded(model)
        self._trainable = _locate(
            name for name, parameter in model.named_parameters() if is_tracked(parameter)
        )
        self._run = self._run_in_any_order if _has_sparse_gradients(model) else model
        shared = {first: same for first, same in aliases(model).items() if len(same) > 1}
        # any of the names -> all
        self._shared = {name: same for same in shared.values() for name in same}
        self._not_buffers = {
            name for first, same in shared.items() if first in self._trainable for name in same
        }
        self._norms = [
            (f"{name}." if name else "", layer)
            for name, layer in model.named_modules()
            if isinstance(layer, NormWithStatistics)
        ]

    @property
    def params(self) -> Params:
        """The trainable parameters, live: name of the first use -> tensor; tied ones stand once.

        While others are lent, those.
        """
        holders = holders_of(self.model, self._trainable.values())
        found = {}
        for (name, (_, key)), members in zip(self._trainable.items(), holders, strict=True):
            if key not in members:
                raise _gone(name)
            found[name] = members[key]
        return found

    @property
    def buffers(self) -> Params:
        """The buffers, live: name -> tensor.

        A trainable parameter that a module holds as a buffer is not among them.
        """
        if not has_buffers(self.model):  # asked at every call
            return {}
        named = self.model.named_buffers()
        return {name: buffer for name, buffer in named if name not in self._not_buffers}

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Return f(args; params).

        Buffers keep their values. A norm layer in training mode uses the statistics of its batch
        and does not touch its running ones, so this works under `vmap`; to carry them, call
        `with_buffers`.

        Raises:
            ValueError: `params` has other names or shapes than the model.
        """
        return self.frozen(params, self.buffers, *args, **kwargs)

    def frozen(self, params: Params, buffers: Params, *args: Any, **kwargs: Any) -> Any:
        """Return f(args; params, buffers), where the buffers keep their values, as in `__call__`.

        Raises:
            ValueError: `params` has other names or shapes than the model.
        """
        if not buffers:
            return self._call(params, {}, args, kwargs)
        given: dict[str, Tensor | None] = {name: buffer.clone() for name, buffer in buffers.items()}
        for prefix, layer in self._norms:
            if layer.training and layer.track_running_stats:
                given |= {prefix + key: None for key, _ in layer.named_buffers(recurse=False)}
        return self._call(params, given, args, kwargs)

    def with_buffers(
        self, params: Params, buffers: Params, *args: Any, **kwargs: Any
    ) -> tuple[Any, Params]:
        """Return (f(args; params, buffers), the buffers after the call), changing no buffer.

        Under `vmap` give batched buffers (`tree.map(lambda b: b.expand(n, *b.shape),
        net.buffers)`): every element of the batch has its own statistics.

        Raises:
            ValueError: `params` or `buffers` have other names or shapes than the model.
        """
        self._check("buffers", buffers, self.buffers)
        after: dict[str, Tensor | None] = {name: buffer.clone() for name, buffer in buffers.items()}
        output = self._call(params, after, args, kwargs)
        return output, {name: tensor for name, tensor in after.items() if tensor is not None}

    def load(self, params: Params) -> None:
        """Copy the values of `params` into the model, in place.

        Raises:
            ValueError: `params` has other names or shapes than the model.
        """
        own = self.params
        self._check("params", params, own)
        with torch.no_grad():
            foreach_copy_(list(own.values()), [params[name] for name in own])

    def _call(
        self,
        params: Params,
        buffers: dict[str, Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the model with these tensors; `buffers` then holds what the forward left in them."""
        if params.keys() != self._trainable.keys():
            self._check("params", params, self.params)
        if self._is_sharded:
            return call_fully_sharded(self.model, params, args, kwargs)
        if not torch.compiler.is_compiling():
            note_modes(self.model)
        given: Mapping[str, Any] = params
        places = self._trainable
        if buffers or self._shared:
            given = {**params, **buffers}
            for name in self._shared.keys() & given.keys():
                given |= dict.fromkeys(self._shared[name], given[name])
            places = _locate(given)
        return _lend(self.model, places, given, self._run, args, kwargs, exact=params, left=buffers)

    def _run_in_any_order(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model so that gradients are dense.

        A sparse one could not be passed on to a loop that led to `params`.
        """
        with any_order():
            return self.model(*args, **kwargs)

    def _check(self, what: str, given: Params, own: Params) -> None:
        if given.keys() != own.keys():
            missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
            raise ValueError(
                f"`{what}` must have the names of the model's {what}; missing {sorted(missing)}, "
                f"unknown {sorted(unknown)}. Start from `net.{what}`."
            )
        # Under a mode every look at a shape is a call of its own.
        with torch.DisableTorchFunction():
            for name, tensor in own.items():
                if given[name].shape != tensor.shape:
                    raise _misshapen(what, name, given[name], tensor)


def _has_sparse_gradients(model: nn.Module) -> bool:
    """Return True if the gradient of an embedding in the model would be sparse.

    Raises:
        ValueError: an embedding rewrites its weight.
    """
    kinds = nn.Embedding | nn.EmbeddingBag
    embeddings = [layer for layer in model.modules() if isinstance(layer, kinds)]
    if any(layer.max_norm is not None for layer in embeddings):
        raise ValueError(
            "`model` must leave its parameters alone, got an embedding with `max_norm`, which "
            "rewrites its weight in every call. Leave `max_norm` out; to bound the weight, "
            "clip it in a loss or after each step."
        )
    return any(layer.sparse for layer in embeddings)


def _misshapen(what: str, name: str, given: Tensor, own: Tensor) -> ValueError:
    return ValueError(
        f"`{what}[{name!r}]` must have shape {tuple(own.shape)}, got {tuple(given.shape)}. "
        "For a batch of models, map over it with `torch.func.vmap`."
    )


def _lend(
    module: nn.Module,
    places: Mapping[str, _Place],
    tensors: Mapping[str, Any],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    exact: Container[str] = (),
    left: dict[str, Any] | None = None,
) -> Any:
    """Return `function(*args, **kwargs)` while the module has these tensors in these places.

    As `torch.func.functional_call`, which takes 17 us more for four tensors: it looks at structures
    first.

    Args:
        module: what is lent to.
        places: name -> where it is.
        tensors: name -> the tensor to put there.
        function: what runs meanwhile.
        args: its arguments.
        kwargs: its arguments by name.
        exact: names whose tensors must have the shape of the module's own.
        left: gets what the function left in the places of the names in it.
    """
    lend: list[tuple[str, dict[str, Any], str, Any]] = []
    # Hooks are refused unless they are set, or refused, already. `torch.func` refuses them itself,
    # and a compiler sees through.
    refuses = not torch.compiler.is_compiling() and has_no_hooks()
    try:
        # Under a mode every look at a shape is a call of its own.
        with torch.DisableTorchFunction():
            holders = holders_of(module, places.values())
            for (name, (_, key)), members in zip(places.items(), holders, strict=True):
                if key not in members:
                    raise _gone(name)
                own, tensor = members[key], tensors[name]
                if name in exact and tensor.shape != own.shape:
                    raise _misshapen("params", name, tensor, own)
                lend.append((name, members, key, own))
                members[key] = tensor
        if refuses:
            refuse_hooks(_RECOMPUTED)
        return function(*args, **kwargs)
    finally:
        if refuses:
            allow_hooks()
        for name, members, key, own in lend:
            if left and name in left:
                left[name] = members[key]
            members[key] = own


_RECOMPUTED = (
    "A module that is called with other parameters than its own must not call "
    "torch.utils.checkpoint, nor set other hooks on saved tensors: what is computed again on the "
    "way back would be computed with its own parameters. Take the checkpoint out of its "
    "forward, of transformers' models by `gradient_checkpointing_disable()`; for long loops there "
    'are Backprop(memory="steps") and Revolve(snapshots).'
)


def _locate(names: Iterable[str]) -> dict[str, _Place]:
    """Return name -> where a parameter or buffer of this name stands."""
    return {name: _Place(tuple(path), key) for name in names for *path, key in [name.split(".")]}


def _gone(name: str) -> ValueError:
    return ValueError(
        f"The model has no tensor {name!r} any more, which it had when `functional` saw it. "
        "Call `functional` again."
    )

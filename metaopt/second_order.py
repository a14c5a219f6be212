"""Finding what cannot be differentiated twice in a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from metaopt import tree
from metaopt._functional import functional
from metaopt.exact_ops import any_order

# of the derivatives' size: central differences in float64 come within 1e-7, wrong formulas are off
# by 1e-3
_TOLERANCE = 1e-4
_Problem = tuple[str, str, str]  # (operator, path of the submodule, what is wrong)


def check_second_order(
    model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
) -> None:
    """Raise if the second derivative of L(w) along a random line does not exist, or is not d/dt of
    grad L(w + t v).

    Inner loops with `Backprop` need it. The check runs as they do (norms, attention and recurrent
    layers are computed by `any_order`), on a copy of the model in float64: the model itself, its
    buffers and the random state stay as they are. Where the whole fails, every call of a torch
    function is examined by itself. Piecewise linear functions are no problem: their second
    derivative is rightly zero.

    Args:
        model: any module, in training or in evaluation mode.
        batch: what the model is called with: a tuple or a list stands for several arguments, a dict
            (or any mapping, a tokenizer's output for example) for arguments by name.
        loss_fn: `loss_fn(model, batch)` returns a scalar, with the batch as it was given; by
            default the mean square of all that the model returns.

    Raises:
        ValueError: an operator cannot be differentiated twice, or its second derivative is wrong.
            The message names each, the submodule that calls it, and what to do.

    Cost:
        Some ten gradients and a copy of the model; more if something is wrong.
    """
    exact = copy.deepcopy(model).double()
    net = functional(_Loss(exact, loss_fn or _mean_square))
    if not net.params:
        raise ValueError("`model` must have a trainable parameter, got none. Is everything frozen?")
    # torch takes other mappings for a leaf
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    batch = tree.map(lambda leaf: leaf.detach().double() if _is_float(leaf) else leaf, batch)
    names, params = list(net.params), [p.detach() for p in net.params.values()]

    def loss(weights: Sequence[Tensor]) -> Tensor:
        value: Tensor = net(dict(zip(names, weights, strict=True)), batch)
        return value

    with torch.enable_grad(), any_order():
        wrong = _compare(loss, params)
        if wrong is None:
            return
        with _paths(exact) as path, _Examination(path) as examination, _random_state_kept(params):
            loss([p.requires_grad_() for p in params])
    found = dict.fromkeys(examination.problems) or {("the loss", "", wrong): None}
    raise ValueError(
        "The model cannot be differentiated twice: "
        + "; ".join(
            f"{operator}{f' in submodule {where!r}' if where else ''}: {why}"
            for operator, where, why in found
        )
        + ". Write it with elementary operations or a twice differentiable autograd.Function, or use `FirstOrder()`."
        + (
            ""
            if examination.problems
            else " Every torch function by itself is fine: look for an autograd.Function or a `detach`."
        )
    )


class _Loss(nn.Module):
    """A model and its loss as one module, for `functional`."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def _mean_square(model: nn.Module, batch: Any) -> Tensor:
    match batch:
        case Mapping():
            output = model(**batch)
        case tuple() | list():
            output = model(*batch)
        case _:
            output = model(batch)
    outputs = [leaf for leaf in tree.leaves(output) if _is_float(leaf)]
    if not outputs:
        raise ValueError(
            f"`model` must return a floating-point tensor, or a tree of some, got "
            f"{type(output).__name__}. Give `loss_fn(model, "
            "batch)`, which returns a scalar."
        )
    return torch.stack([leaf.square().mean() for leaf in outputs]).sum()


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _random_state_kept(leaves: Sequence[Any]) -> AbstractContextManager[None]:
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
    return torch.random.fork_rng(devices)


def _compare(fn: Callable[[Sequence[Tensor]], Tensor], point: Sequence[Tensor]) -> str | None:
    """Say what is wrong with the second derivative of a scalar `fn`, or None.

    A difference that steps over a kink says nothing: smaller steps are tried, and another point, in
    case this one lies on it.
    """
    generator = torch.Generator().manual_seed(0)

    def noise() -> list[Tensor]:
        return [
            torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in point
        ]

    def gradient(at: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with _random_state_kept(at):  # the same dropout every time
            return torch.autograd.grad(fn(at), at, materialize_grads=True)

    smallest = torch.tensor(torch.inf, dtype=torch.float64)
    direction = noise()
    for jitter in (0.0, 1e-3):
        here = [
            (x + jitter * e).detach().requires_grad_() for x, e in zip(point, noise(), strict=True)
        ]
        with _random_state_kept(here):
            value = fn(here)
        try:
            first = torch.autograd.grad(value, here, create_graph=True, materialize_grads=True)
            along = torch.stack(
                [(g * v).sum() for g, v in zip(first, direction, strict=True)]
            ).sum()
            linear = not along.requires_grad
            second = (
                [torch.zeros_like(x) for x in here]
                if linear
                else torch.autograd.grad(along, here, materialize_grads=True)
            )
        except (RuntimeError, NotImplementedError) as error:
            return str(error).splitlines()[0].rstrip(".")
        if not jitter and not all(x.isfinite().all() for x in second):
            return "its second derivative is not finite (a root or a norm at zero?)"
        for h in (1e-5, 1e-6, 1e-7, 1e-8):
            ends = [
                [
                    (x + s * h * v).detach().requires_grad_()
                    for x, v in zip(here, direction, strict=True)
                ]
                for s in (1, -1)
            ]
            after, before = (gradient(at) for at in ends)
            slopes = [(a - b) / (2 * h) for a, b in zip(after, before, strict=True)]
            gap = tree.norm(tree.map(torch.sub, list(second), slopes))
            size = (
                tree.norm(slopes) + tree.norm(list(second)) + tree.norm([g.detach() for g in first])
            )
            smallest = torch.fmin(smallest, gap / size.clamp_min(1e-12))
            if not smallest > _TOLERANCE:
                return None
    return f"its second derivative is off by {smallest.tolist():.0e} of its size from a finite difference of the first"


@contextmanager
def _paths(model: nn.Module) -> Iterator[list[str]]:
    """Yield the paths of the submodules being called at the moment, the innermost one last."""
    path: list[str] = []
    handles = []

    def leave(*_: Any) -> None:
        path.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield path
    finally:
        for handle in handles:
            handle.remove()


class _Examination(TorchFunctionMode):
    """Compares, for each torch function that is called, its second derivative with finite
    differences.
    """

    def __init__(self, path: list[str]):
        super().__init__()
        self.path = path
        self.problems: list[_Problem] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        leaves, structure = tree.flatten((args, kwargs or {}))
        # it may work in place
        before = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        places = [
            i
            for i, leaf in enumerate(leaves)
            if torch.is_grad_enabled() and _is_float(leaf) and leaf.requires_grad
        ]
        with _random_state_kept(leaves):
            wrong = self._examine(func, structure, before, places)
        if wrong is not None:
            name = resolve_name(func) or getattr(func, "__qualname__", repr(func))
            self.problems.append((f"`{name}`", self.path[-1] if self.path else "", wrong))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _examine(
        func: Callable[..., Any], structure: tree.Structure, leaves: list[Any], places: list[int]
    ) -> str | None:
        def value(at: Sequence[Tensor]) -> Tensor:
            given = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for place, tensor in zip(places, at, strict=True):
                given[place] = tensor.clone()
            args, kwargs = tree.unflatten(structure, given)
            results = [
                leaf
                for leaf in tree.leaves(func(*args, **kwargs))
                if _is_float(leaf) and leaf.requires_grad
            ]
            finite = [torch.where(leaf.isfinite(), leaf, 0) for leaf in results]
            nothing = torch.where(at[0].isfinite(), at[0], 0).sum() * 0
            return sum(((leaf + 0.5 * leaf.square()).sum() for leaf in finite), nothing)

        return _compare(value, [leaves[place] for place in places]) if places else None

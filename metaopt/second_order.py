"""Finding what cannot be differentiated twice in a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from metaopt import tree
from metaopt._functional import functional
from metaopt.autodiff.replay import drawn_again
from metaopt.exact_ops import any_order

# Of the derivatives' size: central differences in float64 come within 1e-7, wrong formulas are off
# by 1e-3.
_TOLERANCE = 1e-4


class _Problem(NamedTuple):
    """What cannot be differentiated twice."""

    operator: str
    submodule: str  # its path
    why: str

    def __str__(self) -> str:
        where = f" in submodule {self.submodule!r}" if self.submodule else ""
        return f"{self.operator}{where}: {self.why}"


def check_second_order(
    model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
) -> None:
    """Raise unless the second derivative of L(w) exists and is right, along a random line.

    It is compared with differences of grad L(w + t v) in t. Inner loops with `Backprop` need it.
    The check runs as they do (norms, attention and recurrent layers are computed by `any_order`),
    on a copy of the model in float64: the model itself, its buffers and the random state stay as
    they are. Where the whole fails, every call of a torch function is examined by itself. Piecewise
    linear functions are no problem: their second derivative is rightly zero.

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
        with _follow_calls(exact) as path, _Examination(path) as examination, drawn_again(params):
            loss([p.requires_grad_() for p in params])
    hint = ""
    if not examination.problems:
        examination.problems.append(_Problem("the loss", "", wrong))
        hint = (
            " Every torch function by itself is fine: look for an autograd.Function or a `detach`."
        )
    found = "; ".join(dict.fromkeys(map(str, examination.problems)))
    raise ValueError(
        f"The model cannot be differentiated twice: {found}. Write it with elementary operations "
        f"or a twice differentiable autograd.Function, or use `FirstOrder()`.{hint}"
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
            "`model` must return a floating-point tensor, or a tree of some, got "
            f"{type(output).__name__}. Give `loss_fn(model, batch)`, which returns a scalar."
        )
    return torch.stack([leaf.square().mean() for leaf in outputs]).sum()


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _compare(fn: Callable[[Sequence[Tensor]], Tensor], point: Sequence[Tensor]) -> str | None:
    """Return what is wrong with the second derivative of a scalar `fn`, or None.

    A difference that steps over a kink says nothing: smaller steps are tried, and another point, in
    case this one lies on it.
    """
    generator = torch.Generator().manual_seed(0)

    def noise() -> list[Tensor]:
        drawn = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in point]
        return [e.to(x.device) for e, x in zip(drawn, point, strict=True)]

    def gradient(at: list[Tensor]) -> list[Tensor]:
        with drawn_again(at):  # the same dropout every time
            return list(torch.autograd.grad(fn(at), at, materialize_grads=True))

    smallest = torch.tensor(torch.inf, dtype=torch.float64)
    direction = noise()
    for jitter in (0.0, 1e-3):
        here = _move(point, jitter, noise())
        try:
            first, second = _differentiate(fn, here, direction)
        except (RuntimeError, NotImplementedError) as error:
            return str(error).splitlines()[0].rstrip(".")
        if not jitter and not all(x.isfinite().all() for x in second):
            return "its second derivative is not finite (a root or a norm at zero?)"
        for h in (1e-5, 1e-6, 1e-7, 1e-8):
            after, before = (gradient(_move(here, s * h, direction)) for s in (1, -1))
            slopes = [(a - b) / (2 * h) for a, b in zip(after, before, strict=True)]
            gap = tree.norm(tree.map(torch.sub, second, slopes))
            size = tree.norm(slopes) + tree.norm(second) + tree.norm(first)
            smallest = torch.fmin(smallest, gap / size.clamp_min(1e-12))
            if not smallest > _TOLERANCE:
                return None
    return (
        f"its second derivative is off by {smallest.tolist():.0e} of its size from a finite "
        "difference of the first"
    )


def _move(point: Sequence[Tensor], step: float, direction: list[Tensor]) -> list[Tensor]:
    """Return variables at x + step v."""
    moved = tree.scaled_sums([x.detach() for x in point], step, direction)
    return [x.requires_grad_() for x in moved]


def _differentiate(
    fn: Callable[[Sequence[Tensor]], Tensor], here: list[Tensor], direction: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return (gradient, second derivative along the direction)."""
    with drawn_again(here):
        value = fn(here)
    first = torch.autograd.grad(value, here, create_graph=True, materialize_grads=True)
    along = sum(((g * v).sum() for g, v in zip(first, direction, strict=True)), torch.zeros(()))
    detached = [g.detach() for g in first]
    if not along.requires_grad:
        return detached, [torch.zeros_like(x) for x in here]
    return detached, list(torch.autograd.grad(along, here, materialize_grads=True))


@contextmanager
def _follow_calls(model: nn.Module) -> Iterator[list[str]]:
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
    """Compares the second derivative of each torch function that is called with differences."""

    def __init__(self, path: list[str]):
        super().__init__()
        self.path = path
        self.problems: list[_Problem] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            with drawn_again((args, kwargs)):
                wrong = _examine(func, args, kwargs)
            if wrong is not None:
                name = resolve_name(func) or getattr(func, "__qualname__", repr(func))
                where = self.path[-1] if self.path else ""
                self.problems.append(_Problem(f"`{name}`", where, wrong))
        return func(*args, **kwargs)


def _examine(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> str | None:
    """Return what is wrong with the second derivative of one call, or None."""
    leaves, structure = tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if _is_float(leaf) and leaf.requires_grad]
    if not places:
        return None

    def value(at: Sequence[Tensor]) -> Tensor:
        # Copies, since the function may work in place.
        given = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for place, tensor in zip(places, at, strict=True):
            given[place] = tensor.clone()
        args, kwargs = tree.unflatten(structure, given)
        results = tree.leaves(func(*args, **kwargs))
        results = [leaf for leaf in results if _is_float(leaf) and leaf.requires_grad]
        finite = [torch.where(leaf.isfinite(), leaf, 0) for leaf in results]
        nothing = torch.where(at[0].isfinite(), at[0], 0).sum() * 0
        return sum(((leaf + 0.5 * leaf.square()).sum() for leaf in finite), nothing)

    return _compare(value, [leaves[place].detach().clone() for place in places])

"""An inner problem and the update rules written out by hand.

The witness that `minimize` and the optimizers must agree with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD, Adam, AdamW, RMSprop

Hyper = dict[str, Any]
Slots = dict[str, Tensor]
# (t from 1, parameter, gradient, hyperparameters, memory) -> (next parameter, next memory)
Formula = Callable[[int, Tensor, Tensor, Hyper, Slots], tuple[Tensor, Slots]]


def sgd(t: int, w: Tensor, g: Tensor, h: Hyper, m: Slots) -> tuple[Tensor, Slots]:
    g = g + h.get("weight_decay", 0.0) * w
    if "momentum" not in h:
        return w - h["lr"] * g, {}
    b = g if t == 1 else h["momentum"] * m["velocity"] + (1 - h.get("dampening", 0.0)) * g
    return w - h["lr"] * b, {"velocity": b}


def nesterov(t: int, w: Tensor, g: Tensor, h: Hyper, m: Slots) -> tuple[Tensor, Slots]:
    g = g + h.get("weight_decay", 0.0) * w
    b = g if t == 1 else h["momentum"] * m["velocity"] + g
    return w - h["lr"] * (g + h["momentum"] * b), {"velocity": b}


def adam(t: int, w: Tensor, g: Tensor, h: Hyper, m: Slots) -> tuple[Tensor, Slots]:
    g = g + h.get("weight_decay", 0.0) * w
    mean = h["beta1"] * m["mean"] + (1 - h["beta1"]) * g
    square = h["beta2"] * m["square"] + (1 - h["beta2"]) * g**2
    denominator = (square / (1 - h["beta2"] ** t) + h["eps_root"]) ** 0.5 + h["eps"]
    return w - h["lr"] * (mean / (1 - h["beta1"] ** t)) / denominator, {
        "mean": mean,
        "square": square,
    }


def adamw(t: int, w: Tensor, g: Tensor, h: Hyper, m: Slots) -> tuple[Tensor, Slots]:
    after, m = adam(t, w, g, {**h, "weight_decay": 0.0}, m)
    return after - h["lr"] * h["weight_decay"] * w, m


def rmsprop(t: int, w: Tensor, g: Tensor, h: Hyper, m: Slots) -> tuple[Tensor, Slots]:
    g = g + h.get("weight_decay", 0.0) * w
    after = {"square": h["alpha"] * m["square"] + (1 - h["alpha"]) * g**2}
    variance = after["square"]
    if "mean" in m:
        after["mean"] = h["alpha"] * m["mean"] + (1 - h["alpha"]) * g
        variance = variance - after["mean"] ** 2
    direction = g / (variance**0.5 + h["eps"])
    if "momentum" in h:
        direction = after["velocity"] = h["momentum"] * m["velocity"] + direction
    return w - h["lr"] * direction, after


@dataclass(frozen=True)
class Variant:
    """An optimizer of ours, its formula by hand, and hyperparameters to differentiate at."""

    name: str
    kind: type[mo.Optimizer]
    formula: Formula
    values: dict[str, float]
    slots: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, h: Hyper) -> mo.Optimizer:
        """Return our optimizer with these hyperparameters: numbers, tensors or parameters."""
        rest = {name: value for name, value in h.items() if name not in ("beta1", "beta2")}
        betas = {"betas": (h["beta1"], h["beta2"])} if "beta1" in h else {}
        return self.kind(**rest, **betas, **self.options)

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self.values.items()}


# eps and eps_root are large enough for their own derivatives to be well conditioned.
_ADAM = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "eps_root": 1e-3}
_RMS = {"lr": 0.02, "alpha": 0.9, "eps": 1e-2}
VARIANTS = [
    Variant("sgd", SGD, sgd, {"lr": 0.1}),
    Variant("sgd-decay", SGD, sgd, {"lr": 0.1, "weight_decay": 0.05}),
    Variant("sgd-momentum", SGD, sgd, {"lr": 0.1, "momentum": 0.8}, ("velocity",)),
    Variant(
        "sgd-dampening",
        SGD,
        sgd,
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
        ("velocity",),
    ),
    Variant(
        "sgd-nesterov",
        SGD,
        nesterov,
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05},
        ("velocity",),
        {"nesterov": True},
    ),
    Variant("adam", Adam, adam, _ADAM, ("mean", "square")),
    Variant("adam-decay", Adam, adam, _ADAM | {"weight_decay": 0.05}, ("mean", "square")),
    Variant("adamw", AdamW, adamw, _ADAM | {"weight_decay": 0.05}, ("mean", "square")),
    Variant("rmsprop", RMSprop, rmsprop, _RMS, ("square",)),
    Variant(
        "rmsprop-centered",
        RMSprop,
        rmsprop,
        _RMS | {"weight_decay": 0.05},
        ("square", "mean"),
        {"centered": True},
    ),
    Variant("rmsprop-momentum", RMSprop, rmsprop, _RMS | {"momentum": 0.7}, ("square", "velocity")),
    Variant(
        "rmsprop-all",
        RMSprop,
        rmsprop,
        _RMS | {"momentum": 0.7, "weight_decay": 0.05},
        ("square", "mean", "velocity"),
        {"centered": True},
    ),
]


def regression(params: dict[str, Tensor], batch: tuple[Tensor, Tensor], meta: Tensor) -> Tensor:
    """Squared error of a small nonlinear model with a learned penalty.

    Every input matters, at second order too.
    """
    x, y = batch
    prediction = torch.tanh(x @ params["w"] + params["b"]).sum(-1) * params["scale"]
    return ((prediction - y) ** 2).mean() + meta.exp() * sum((p**2).sum() for p in params.values())


def start() -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Return (initial parameters with a matrix, a vector and a scalar; 4 batches of 5; meta)."""
    params = {"w": torch.randn(3, 2), "b": torch.randn(2), "scale": torch.tensor(0.7)}
    return params, (torch.randn(4, 5, 3), torch.randn(4, 5)), torch.tensor(-2.0)


def memory(params: dict[str, Tensor], slots: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return an optimizer's memory in the middle of a run: squares well above the squared means."""
    return {
        name: {
            k: torch.rand_like(p) + 1 if name == "square" else 0.1 * torch.randn_like(p)
            for k, p in params.items()
        }
        for name in slots
    }


def by_hand(
    loss: Callable[..., Tensor],
    formula: Formula,
    h: Hyper,
    params: dict[str, Tensor],
    batches: Sequence[Any],
    meta: Any,
    slots: dict[str, dict[str, Tensor]],
    *,
    done: int = 0,
    first_order: bool = False,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], Tensor]:
    """Return (parameters, memory, losses [T]) of the loop written out.

    `torch.autograd` can differentiate them.
    """
    losses = []
    for t, batch in enumerate(batches, start=done + 1):
        losses.append(loss(params, batch, meta))
        grads = dict(
            zip(
                params,
                torch.autograd.grad(losses[-1], list(params.values()), create_graph=True),
                strict=True,
            )
        )
        moved = {
            k: formula(
                t,
                w,
                grads[k].detach() if first_order else grads[k],
                h,
                {s: slots[s][k] for s in slots},
            )
            for k, w in params.items()
        }
        params = {k: w for k, (w, _) in moved.items()}
        names = next(iter(moved.values()))[1]
        slots = {s: {k: m[s] for k, (_, m) in moved.items()} for s in names}
    return params, slots, torch.stack(losses)


def outer(params: Any, slots: Any, losses: Tensor) -> Tensor:
    """Return a scalar in which every result of a loop has a weight and curvature of its own."""
    leaves = [*mo.tree.leaves(params), *mo.tree.leaves(slots), losses]
    return sum(
        (
            (i + 1)
            * (leaf + 0.3 * leaf**2)
            * torch.linspace(0.5, 1.5, leaf.numel()).reshape(leaf.shape)
        ).sum()
        for i, leaf in enumerate(leaves)
    )


def two_derivatives(value: Tensor, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return (the gradient g, the gradient of <g, v> with fixed weights v)."""
    first = torch.autograd.grad(value, inputs, create_graph=True)
    mixed = sum((g * torch.linspace(-1, 1.3, g.numel()).reshape(g.shape)).sum() for g in first)
    return list(first), list(torch.autograd.grad(mixed, inputs))


def leaf(value: Any) -> Any:
    """Return the tree with fresh tensors that require grad."""
    return mo.tree.map(
        lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()), value
    )


def as_parameters(tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Compare trees entry by entry: |a - e| <= tolerance (1 + |e|)."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

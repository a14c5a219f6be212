"""Parameters that the loss of a step does not depend on.

Zeros, or as in `torch.optim` left alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn

import metaopt as mo
from optimizers import (
    SGD,
    Adam,
    AdamW,
    ClipNorm,
    Grouped,
    LSTMOptimizer,
    Masked,
    NAdam,
    RMSprop,
    Rprop,
)

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 6
USED = (True, False, True, True, False, True)  # whether a step uses the layer `b`
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "momentum": (
        lambda: SGD(0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    ),
    "dampening": (
        lambda: SGD(0.1, momentum=0.9, dampening=0.2),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.2),
    ),
    "adam": (
        lambda: Adam(0.05, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    ),
    "adamw": (
        lambda: AdamW(0.05, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True),
    ),
    "nadam": (lambda: NAdam(0.05), lambda p: torch.optim.NAdam(p, 0.05)),
    "rmsprop": (
        lambda: RMSprop(0.01, momentum=0.9, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    ),
    "rprop": (lambda: Rprop(0.01), lambda p: torch.optim.Rprop(p, 0.01)),
    "groups": (
        lambda: Grouped({"b": SGD(0.1, momentum=0.9), "*": Adam(0.05)}),
        lambda p: _Two(torch.optim.Adam(p[:1], 0.05), torch.optim.SGD(p[1:], 0.1, momentum=0.9)),
    ),
    "by name": (
        lambda: SGD({"b": 0.1, "*": 0.05}, momentum=0.9),
        lambda p: torch.optim.SGD(
            [{"params": p[:1], "lr": 0.05}, {"params": p[1:], "lr": 0.1}], momentum=0.9
        ),
    ),
}


class _Two:
    def __init__(self, *each: Any):
        self.each = each

    def step(self) -> None:
        for one in self.each:
            one.step()


def start() -> dict[str, Tensor]:
    return {"a": torch.randn(3).requires_grad_(), "b": torch.randn(2).requires_grad_()}


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(STEPS, 3), torch.randn(STEPS, 2)


def batches(x: tuple[Tensor, Tensor]) -> list[Any]:
    """A list, since which layer a step uses is known to Python.

    So it is in a network that leaves layers out.
    """
    return [((x[0][t], x[1][t]), USED[t]) for t in range(STEPS)]


def loss(params: Any, batch: Any) -> Tensor:
    (x, y), uses_b = batch
    value = (params["a"] @ x - 1).square()
    return value + (params["b"] @ y - 1).square() if uses_b else value


RULES: list[Any] = [
    mo.Backprop(),
    mo.Backprop(memory="steps"),
    mo.FirstOrder(),
    mo.FirstOrder(memory="steps"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_parameter_stays_as_in_torch(name: str, rule: Any) -> None:
    """It had a zero gradient, so that weight decay and momentum moved it.

    The step counted for it.
    """
    ours, theirs = OPTIMIZERS[name]
    torch.manual_seed(1)
    params, x = start(), rows()
    out = mo.minimize(loss, ours(), params, batches(x), differentiate=rule, unused="skip")
    live = {key: p.detach().clone().requires_grad_() for key, p in params.items()}
    optimizer = theirs([*live.values()])
    for batch in batches(x):
        for p in live.values():
            p.grad = None
        loss(live, batch).backward()
        optimizer.step()
    for key in params:
        assert_close(out.params[key], live[key], 1e-12)
    zeros = mo.minimize(loss, ours(), params, batches(x), differentiate=rule)
    if name not in ("rprop",):
        assert (zeros.params["b"] - out.params["b"]).abs().max() > 1e-6
    out.params["b"].sum().backward()
    assert params["b"].grad.abs().max() > 0


@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_its_derivatives_are_those_of_a_loop_by_hand(rule: Any) -> None:
    """Adam, each parameter with its own count; gradients in the start, the rate and the batches."""
    torch.manual_seed(1)
    params, x = start(), tuple(part.requires_grad_() for part in rows())
    lr = torch.tensor(0.05, requires_grad=True)
    out = mo.minimize(loss, Adam(lr), params, batches(x), differentiate=rule, unused="skip")
    leaves = [*params.values(), lr, *x]
    found = torch.autograd.grad(out.params["b"].square().sum() + out.params["a"].sum(), leaves)

    now, means, squares, counts = (
        dict(params),
        dict.fromkeys(params, 0.0),
        dict.fromkeys(params, 0.0),
        dict.fromkeys(params, 0),
    )
    for batch in batches(x):
        used = ["a", "b"] if batch[1] else ["a"]
        grads = torch.autograd.grad(loss(now, batch), [now[k] for k in used], create_graph=True)
        after = dict(now)
        for key, g in zip(used, grads, strict=True):
            counts[key] += 1
            means[key] = 0.9 * means[key] + 0.1 * g
            squares[key] = 0.999 * squares[key] + 0.001 * g * g
            mean, square = (
                means[key] / (1 - 0.9 ** counts[key]),
                squares[key] / (1 - 0.999 ** counts[key]),
            )
            after[key] = now[key] - lr * mean / (square.sqrt() + 1e-8)
        now = after
    expected = torch.autograd.grad(now["b"].square().sum() + now["a"].sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-10)


def test_under_transforms_and_nested() -> None:
    """Inside `torch.func` a gradient is never None.

    What a loss depends on is read off its graph there.
    """
    torch.manual_seed(1)
    params, x = {key: p.detach() for key, p in start().items()}, rows()

    def value(params: Any, shift: Tensor) -> Tensor:
        shifted = x[0] + shift, x[1]
        return (
            mo.minimize(loss, Adam(0.05), params, batches(shifted), unused="skip")
            .params["b"]
            .square()
            .sum()
        )

    slope = torch.func.grad(value)
    each = torch.func.vmap(slope, in_dims=(None, 0))(params, torch.tensor([0.0, 0.5]))
    for i, shift in enumerate((0.0, 0.5)):
        live = {key: p.clone().requires_grad_() for key, p in params.items()}
        expected = torch.autograd.grad(
            value(live, torch.tensor(shift)), [*live.values()], materialize_grads=True
        )
        for key, own in zip(params, expected, strict=True):
            assert_close(each[key][i], own, 1e-12)


def test_transforms_see_the_gradients_that_there_are() -> None:
    """The norm to be clipped is that of these, as torch's `clip_grad_norm_`."""
    torch.manual_seed(1)
    params, x = start(), rows()
    out = mo.minimize(
        loss, ClipNorm(0.5, SGD(0.1, momentum=0.9)), params, batches(x), unused="skip"
    )
    live = {key: p.detach().clone().requires_grad_() for key, p in params.items()}
    optimizer = torch.optim.SGD([*live.values()], 0.1, momentum=0.9)
    for batch in batches(x):
        optimizer.zero_grad()
        loss(live, batch).backward()
        norm = torch.stack([p.grad.norm() for p in live.values() if p.grad is not None]).norm()
        for p in live.values():
            if p.grad is not None:
                p.grad *= 0.5 / norm.clamp(min=0.5)
        optimizer.step()
    for key in params:
        assert_close(out.params[key], live[key], 1e-12)


@pytest.mark.parametrize(
    "make",
    [lambda: LSTMOptimizer(4).double(), lambda: Masked(SGD(0.1, momentum=0.9), "b")],
    ids=["lstm", "masked"],
)
def test_a_parameter_that_is_never_used_never_moves(make: Any) -> None:
    params = start()
    out = mo.minimize(
        lambda p, _: p["a"].square().sum(), make(), params, None, steps=3, unused="skip"
    )
    assert torch.equal(out.params["b"], params["b"])
    again = mo.minimize(
        lambda p, _: p["a"].square().sum(),
        make(),
        out.params,
        None,
        steps=1,
        opt_state=out.opt_state,
        unused="skip",
    )
    assert torch.equal(again.params["b"], params["b"])


def test_what_cannot_skip_says_so() -> None:
    params = start()
    with pytest.raises(ValueError, match=r'unused="skip" cannot be had with microbatches=2'):
        mo.minimize(
            lambda p, _: p["a"].sum(),
            SGD(0.1),
            params,
            torch.ones(3, 2),
            differentiate=mo.Backprop(memory="steps", microbatches=2),
            unused="skip",
        )


def test_a_state_that_counts_for_all_goes_on_for_each() -> None:
    params = start()
    first = mo.minimize(
        lambda p, _: p["a"].square().sum() + p["b"].square().sum(), Adam(0.1), params, None, steps=2
    )
    then = mo.minimize(
        lambda p, _: p["a"].square().sum(),
        Adam(0.1),
        first.params,
        None,
        steps=1,
        opt_state=first.opt_state,
        unused="skip",
    )
    whole = mo.minimize(
        lambda p, _: p["a"].square().sum(), Adam(0.1), {"a": params["a"]}, None, steps=3
    )
    assert_close(then.params["a"], whole.params["a"], 1e-14)
    assert torch.equal(then.params["b"], first.params["b"])


def test_a_frozen_layer_of_a_model() -> None:
    """A branch that a model never takes.

    With zeros AdamW decays its weights, with "skip" they stay.
    """

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taken, self.other = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.taken(x)

    net, x = mo.functional(Branches()), torch.randn(5, 2)
    for unused, moves in (("zero", True), ("skip", False)):
        out = mo.minimize(
            lambda p, x: net(p, x).square().mean(),
            AdamW(0.1, weight_decay=0.1),
            net.params,
            x,
            steps=3,
            unused=unused,
        )
        assert torch.equal(out.params["other.weight"], net.params["other.weight"]) is not moves

"""Backpropagation that is truncated to the last steps of a loop, or bounded from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import metaopt as mo
from metaopt.torch_internals import load_compiler
from optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("float64")


def loss(params: Tensor, batch: Tensor, meta: Tensor) -> Tensor:
    return ((params - batch) ** 4).sum() / 4 + meta * (params**2).sum()


@pytest.mark.parametrize("memory", ["full", "steps", mo.Revolve(2)], ids=str)
@pytest.mark.parametrize("window", [1, 3, 6, 7, 100])
def test_equals_a_loop_that_detaches(window: int, memory: Any) -> None:
    batches, start = torch.randn(7, 3), torch.randn(3, requires_grad=True)
    meta, lr = torch.tensor(0.3, requires_grad=True), nn.Parameter(torch.tensor(0.05))
    optimizer = Adam(lr, eps=1e-2)
    rule = mo.Backprop(memory=memory, window=window)
    out = mo.minimize(loss, optimizer, start, batches, meta=meta, differentiate=rule)

    params, state, losses = start, optimizer.init(start), []
    for t in range(7):
        if t == 7 - window > 0:
            params, state = mo.tree.map(torch.Tensor.detach, (params, state))
            losses = [value.detach() for value in losses]
        at = params if params.requires_grad else params.detach().requires_grad_()
        value = loss(at, batches[t], meta)
        (g,) = torch.autograd.grad(value, at, create_graph=True)
        updates, state = optimizer(g, state, at, loss=value)
        params, losses = at + updates, [*losses, value]

    inputs = [meta, lr, start] if window >= 7 else [meta, lr]
    for ours, theirs in ((out.params.sum(), params.sum()), (out.losses.sum(), sum(losses))):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        for one, other in zip(
            *(
                torch.autograd.grad(v, inputs, retain_graph=True, materialize_grads=True)
                for v in (ours, theirs)
            ),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    if window < 7:
        assert torch.autograd.grad(out.params.sum(), start, allow_unused=True) == (None,)


def test_under_transforms_and_with_the_bias_that_it_states() -> None:
    """With SGD the window k leaves out (1 - lr)^k of the derivative 1 - (1 - lr)^T.

    The loss is L = (w - meta)^2 / 2.
    """

    def last(meta: Tensor, window: int | None) -> Tensor:
        def parabola(params: Tensor, _: None, meta: Tensor) -> Tensor:
            return (params - meta).square() / 2

        rule = mo.Backprop(window=window)
        return mo.minimize(
            parabola, SGD(0.1), torch.zeros(()), None, steps=50, meta=meta, differentiate=rule
        ).params

    at = torch.tensor(2.0)
    for window in (1, 5, 20):
        expected = torch.tensor(1 - 0.9**window)
        torch.testing.assert_close(grad(last)(at, window), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            vmap(grad(lambda m, k=window: last(m, k)))(at.expand(3)),
            expected.expand(3),
            rtol=1e-12,
            atol=0,
        )
    torch.testing.assert_close(grad(last)(at, None), torch.tensor(1 - 0.9**50), rtol=1e-12, atol=0)


@pytest.mark.parametrize("window", [0, -3, 2.0, True])
def test_bad_windows(window: Any) -> None:
    with pytest.raises(ValueError, match="`window` must be a positive integer or None, got"):
        mo.Backprop(window=window)


@pytest.mark.parametrize("memory", ["full", "steps", mo.Revolve(2)], ids=str)
@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clip_bounds_what_reaches_the_step_before(clip: float, memory: Any) -> None:
    """The loss is sum w^4 / 4, so with SGD w' = w - lr w^3, and the cotangents are done by hand."""
    lr, start = 0.1, torch.tensor([0.4, -1.2, 2.1, 3.0], requires_grad=True)
    rule = mo.Backprop(memory=memory, clip=clip)

    def total(at: Tensor) -> Tensor:
        fourth = mo.minimize(
            lambda w, _: (w**4).sum() / 4, SGD(lr), at, None, steps=4, differentiate=rule
        )
        return fourth.losses.sum()

    at, visited = start.detach(), []
    for _ in range(4):
        visited.append(at)
        at = at - lr * at**3
    expected = torch.zeros(4)
    for at in reversed(visited):
        expected = expected.clamp(-clip, clip) * (1 - 3 * lr * at**2) + at**3
    (found,) = torch.autograd.grad(total(start), start)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    if memory == "full":
        both = torch.stack([start.detach(), -start.detach()])
        found = vmap(grad(total))(both)
        torch.testing.assert_close(found, torch.stack([expected, -expected]), rtol=1e-12, atol=0)


def test_clip_bounds_real_and_imaginary_parts() -> None:
    start = torch.tensor([0.3 - 2.0j, 4.0 + 0.1j], requires_grad=True)
    rule = mo.Backprop(clip=0.5)
    out = mo.minimize(
        lambda w, _: w.abs().square().sum(), SGD(0.0), start, None, steps=1, differentiate=rule
    )
    (found,) = torch.autograd.grad(
        (out.params * torch.tensor([3.0 + 0.2j, -0.1 - 9.0j])).real.sum(), start
    )
    torch.testing.assert_close(found, torch.tensor([0.5 - 0.2j, -0.1 + 0.5j]))


def test_clip_in_forward_mode_is_refused() -> None:
    def last(w: Tensor) -> Tensor:
        rule = mo.Backprop(clip=0.5)
        loss = lambda w, _: w.square().sum()
        return mo.minimize(loss, SGD(0.1), w, None, steps=2, differentiate=rule).params

    with pytest.raises(ValueError, match=r"Backprop\(clip=0.5\) bounds the cotangents"):
        torch.func.jvp(last, (torch.ones(2),), (torch.ones(2),))


def test_clip_in_a_compiled_batch() -> None:
    """Traced without a C++ compiler."""
    load_compiler()

    def end(w: Tensor, task: Tensor) -> Tensor:
        rule = mo.Backprop(clip=0.1)
        loss = lambda w, _: (w - task).square().sum()
        return mo.minimize(loss, SGD(0.7), w, None, steps=2, differentiate=rule).params.sum() * 3

    w, tasks = torch.tensor([0.1, -0.2]), torch.randn(3, 2)
    batched = torch.func.vmap(torch.func.grad(end), in_dims=(None, 0))
    found = torch.compile(batched, fullgraph=True, backend="eager")(w, tasks)
    torch.testing.assert_close(found, batched(w, tasks))


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf"), True])
def test_bad_clips(clip: Any) -> None:
    with pytest.raises(ValueError, match="Backprop: `clip` must be a positive number, got"):
        mo.Backprop(clip=clip)

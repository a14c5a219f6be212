"""Learned schedules: against the same written out, and the exact gradient through `minimize`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import metaopt as mo
from optimizers import (
    SGD,
    Adam,
    AttentionSchedule,
    Cosine,
    GPSchedule,
    LSTMSchedule,
    MLPSchedule,
    PolicySchedule,
    Warmup,
)
from optimizers.schedules.learned.changes import bounded, positive
from optimizers.schedules.learned.gaussian_process import posterior_matrix

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 6
KINDS: dict[str, Callable[..., mo.Schedule]] = {
    "lstm": lambda *a, **k: LSTMSchedule(*a, hidden_size=3, **k),
    "mlp": lambda *a, **k: MLPSchedule(*a, hidden_size=3, **k),
    "gp": lambda *a, **k: GPSchedule(*a, points=4, length_scale=0.3, **k),
    "attention": lambda *a, **k: AttentionSchedule(*a, window=3, hidden_size=4, **k),
    "policy": lambda *a, **k: PolicySchedule(*a, hidden_size=3, **k),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def busy(schedule: mo.Schedule, seed: int = 0) -> Any:
    """Return it with weights that are not zero: an untrained one would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    return schedule


def problem() -> tuple[Callable[[Tensor, Any], Tensor], Tensor, Any]:
    """Return (loss, parameters, batches): a regression by tanh of a linear map."""
    x, y = torch.randn(STEPS, 5, 3), torch.randn(STEPS, 5)
    return lambda w, b: (torch.tanh(b[0] @ w) - b[1]).square().mean(), torch.randn(3), (x, y)


def by_hand(
    loss_fn: Any, w: Tensor, batches: Any, schedule: mo.Schedule, *, detached: bool = False
) -> Tensor:
    """Return the loss after gradient descent by a plain loop of autograd.

    `detached` is the widespread recipe, in which the schedule is called under `no_grad`.
    """
    state = schedule.init(w)
    for t in range(STEPS):
        batch = mo.tree.index(batches, t)
        loss = loss_fn(w, batch)
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        with torch.set_grad_enabled(not detached):
            rate, state = schedule(state, step=torch.tensor(t), loss=loss, grads=[gradient])
        w = w - rate * gradient
    return loss_fn(w, mo.tree.index(batches, 0))


@each_kind
@pytest.mark.parametrize("change", ["multiplicative", "additive"])
def test_the_gradient_in_minimize_is_exact_and_the_usual_recipe_has_none(
    kind: str, change: str
) -> None:
    loss_fn, w, batches = problem()
    schedule = busy(KINDS[kind](0.3, STEPS, change=change))
    names, values = zip(
        *[(n, p) for n, p in schedule.named_parameters() if p.requires_grad], strict=True
    )
    assert values

    def run(*tensors: Tensor) -> Tensor:
        class Whole(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.schedule = schedule

            def forward(self) -> Tensor:
                end = mo.minimize(loss_fn, SGD(self.schedule), w, batches).params
                return loss_fn(end, mo.tree.index(batches, 0))

        given = {f"schedule.{n}": v for n, v in zip(names, tensors, strict=True)}
        return functional_call(Whole(), given, ())

    tracked = w.clone().requires_grad_()
    found = torch.autograd.grad(run(*values), values)
    expected = torch.autograd.grad(by_hand(loss_fn, tracked, batches, schedule), values)
    for name, one, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14, msg=name)
        assert one.abs().max() > 1e-7, name
    inputs = tuple(value.detach().clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    recipe = by_hand(loss_fn, tracked, batches, schedule, detached=True)
    assert all(one is None for one in torch.autograd.grad(recipe, values, allow_unused=True))


@each_kind
def test_untrained_it_is_what_it_starts_from(kind: str) -> None:
    loss_fn, w, batches = problem()
    wave = Warmup(Cosine(0.4, STEPS), 2, start=0.3)

    def run(lr: Any) -> Tensor:
        return mo.minimize(loss_fn, SGD(lr), w, batches).losses

    for change in ("multiplicative", "additive"):
        schedule = KINDS[kind](wave, STEPS, change=change)
        torch.testing.assert_close(run(schedule), run(wave), rtol=1e-13, atol=0)
    number = Warmup(Cosine(0.4, 40), 2, start=0.1) if kind == "gp" else 0.4
    torch.testing.assert_close(run(KINDS[kind](0.4, 40)), run(number), rtol=1e-13, atol=0)


@each_kind
def test_values_are_what_the_next_step_uses_and_survive_a_file(kind: str, tmp_path: Path) -> None:
    loss_fn, w, batches = problem()
    optimizer = Adam(busy(KINDS[kind](Cosine(0.3, STEPS), STEPS)))
    optimizer.save(tmp_path / "weights.safetensors")
    loaded = Adam.load(tmp_path / "weights.safetensors")
    assert loaded.config() == optimizer.config()
    torch.testing.assert_close(
        mo.minimize(loss_fn, loaded, w, batches).losses,
        mo.minimize(loss_fn, optimizer, w, batches).losses,
        rtol=0,
        atol=0,
    )
    state = optimizer.init(w)
    optimizer.values(state)  # without a loss it answers all the same
    for t in range(3):
        gradient, loss = torch.func.grad_and_value(loss_fn)(w, mo.tree.index(batches, t))
        value = optimizer.values(state, loss=loss, grads=gradient)["lr"]
        before = state
        update, state = optimizer(gradient, state, w, loss=loss)
        reference, _ = Adam(value.detach().item())(gradient, {**before, "schedules": {}}, w)
        torch.testing.assert_close(update, reference, rtol=1e-12, atol=0)


@each_kind
def test_it_is_batched_by_vmap_and_finite_at_a_zero_gradient(kind: str) -> None:
    loss_fn, w, batches = problem()
    optimizer = SGD(busy(KINDS[kind](0.3, STEPS)))
    starts = torch.stack([w, 2 * w])
    batched = vmap(lambda w: mo.minimize(loss_fn, optimizer, w, batches).losses)(starts)
    single = torch.stack([mo.minimize(loss_fn, optimizer, w, batches).losses for w in starts])
    torch.testing.assert_close(batched, single, rtol=1e-12, atol=0)

    flat = torch.zeros(3, requires_grad=True)
    end = mo.minimize(lambda w, _: w.square().sum(), optimizer, flat, None, steps=3).params
    learned = [parameter for parameter in optimizer.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(end.sum(), [flat, *learned], allow_unused=True)
    assert all(one is None or one.isfinite().all() for one in grads)


def test_a_shared_schedule_by_names_is_one_rate_for_each_tensor() -> None:
    """The weights are shared; every tensor has a state of its own and observes its own gradient."""
    params = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    schedule = busy(MLPSchedule(0.3, STEPS, hidden_size=3))
    optimizer = SGD(dict.fromkeys(params, schedule))
    assert len(list(optimizer.parameters())) == len(list(schedule.parameters()))
    state, loss = optimizer.init(params), torch.tensor(0.7)
    own = {name: schedule.init(params[name]) for name in params}
    for t in range(3):
        updates, state = optimizer(grads, state, params, loss=loss)
        for name in params:
            rate, own[name] = schedule(
                own[name], step=torch.tensor(t), loss=loss, grads=[grads[name]]
            )
            torch.testing.assert_close(updates[name], -rate * grads[name], rtol=1e-13, atol=0)


def test_what_is_observed() -> None:
    """An MLP that hands on one feature, and changes of the size that it says."""
    gradient, loss = torch.tensor([3.0, -4.0]), torch.tensor(-0.5)
    for place, expected in enumerate([-math.log(1.5), math.log(5 + 1e-6) / 5, 0.0, 3 / STEPS]):
        schedule = MLPSchedule(0.2, STEPS, max_change=0.1)
        schedule.propose = lambda seen, memory, step, place=place: (seen[place], {})
        state = schedule.init(gradient)
        value, state = schedule(state, step=torch.tensor(3), loss=loss, grads=[gradient])
        change = 0.1 * 2 / math.pi * math.atan(math.pi / 2 * expected)
        assert value.item() == pytest.approx(0.2 * math.exp(change), rel=1e-12)
        # the next step sees the norm of SGD's update
        assert state["update"].item() == pytest.approx(
            math.log(value.item() * 5 + 1e-6) / 5, rel=1e-12
        )


def test_a_change_is_bounded_and_no_gradient_dies_at_the_bound() -> None:
    """In float32, where the slope of tanh is 0 from 10 on."""
    far = torch.tensor([-1e4, -20.0, 0.0, 20.0, 1e4], dtype=torch.float32, requires_grad=True)
    value = bounded(far)
    (slope,) = torch.autograd.grad(value.sum(), far)
    assert value.abs().max() <= 1
    assert float(slope[2]) == pytest.approx(1, rel=1e-6)
    assert slope.min() > 1e-9
    assert float(torch.func.grad(torch.tanh)(torch.tensor(20.0, dtype=torch.float32))) == 0
    z = torch.tensor([-30.0, -1.0, 0.0, 0.5, 1.0, 2.0], dtype=torch.float32, requires_grad=True)
    kept = positive(z)
    (slope,) = torch.autograd.grad(kept.sum(), z)
    # against the definition in float64; beyond -1 its two terms cancel in float32
    exact = (z.double() + (z.double() ** 2 + 4e-4).sqrt()) / (1 + math.sqrt(1 + 4e-4))
    torch.testing.assert_close(kept.double(), exact, rtol=1e-5, atol=0)
    assert slope.min() > 1e-8


def test_the_curve_is_the_posterior_mean_of_a_gaussian_process() -> None:
    """Against the normal equations, and through the places themselves; jitter 1e-8."""
    steps, points, scale = 16, 5, 0.3  # 16: sqrt(t / 16) is a place for t = 0, 1, 4, 9, 16
    matrix = posterior_matrix(steps, points, scale)
    times, places = (torch.arange(steps + 1) / steps).sqrt(), torch.arange(points) / (points - 1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-((a[:, None] - b[None]) ** 2) / (2 * scale**2))

    expected = kernel(times, places) @ torch.linalg.inv(
        kernel(places, places) + 1e-8 * torch.eye(points)
    )
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix[[0, 1, 4, 9, 16]], torch.eye(points), rtol=0, atol=1e-5)
    schedule = GPSchedule(Cosine(0.5, 40), steps, points=points, length_scale=scale).float()
    values = torch.randn(points)
    with torch.no_grad():
        schedule.values.copy_(values)
    for t in (0, 3, 9, 16, 25):
        found, _ = schedule(schedule.init(values), step=torch.tensor(t), loss=None, grads=[values])
        mean = expected[min(t, steps)] @ values.float().double()
        change = 3.0 * 2 / math.pi * math.atan(math.pi / 2 * float(mean) / 3.0)
        wanted = 0.5 * (1 + math.cos(math.pi * t / 40)) / 2 * math.exp(change)
        assert found.item() == pytest.approx(wanted, rel=1e-9)


def test_attention_is_softmax_over_the_last_steps_only() -> None:
    """Against a list of the past that grows, of which the last three are looked at."""
    schedule = busy(AttentionSchedule(0.1, STEPS, window=3, heads=2, hidden_size=4))
    memory, past = schedule.memory(torch.ones(1)), []
    for t in range(8):
        seen = torch.randn(4)
        proposal, memory = schedule.propose(seen, memory, torch.tensor(t))
        past = [*past, seen][-3:]
        rows = torch.stack(
            [torch.cat([x, torch.tensor([1 - age / 3])]) for age, x in enumerate(past[::-1])]
        )
        out = []
        for head in range(2):
            part = slice(2 * head, 2 * head + 2)
            query = schedule.query[part] @ rows[0]
            keys = rows @ schedule.key_and_value[:4][part].T
            values = rows @ schedule.key_and_value[4:][part].T
            out.append((keys @ query / math.sqrt(2)).softmax(0) @ values)
        expected = schedule.net(torch.cat([seen, *out]))
        torch.testing.assert_close(proposal, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: MLPSchedule(0.1, change="cubic"),
            ValueError,
            "`change` must be 'multiplicative' or 'additive', got 'cubic'",
        ),
        (lambda: MLPSchedule(0.0), ValueError, "`initial` must be a positive number, got 0.0"),
        (lambda: MLPSchedule("a"), TypeError, "`initial` must be a number, got 'a'"),
        (lambda: GPSchedule(0.1, 0), ValueError, "`steps` must be a positive integer, got 0"),
        (
            lambda: GPSchedule(0.1, length_scale=-1.0),
            ValueError,
            "`length_scale` must be a positive number, got -1.0",
        ),
        (
            lambda: AttentionSchedule(hidden_size=6, heads=4),
            ValueError,
            "`hidden_size` must be a multiple of `heads`, got 6 and 4",
        ),
        (lambda: PolicySchedule(std=0.0), ValueError, "`std` must be a positive number, got 0.0"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()

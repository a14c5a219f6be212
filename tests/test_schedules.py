"""Schedules: equal to torch's, differentiable in every number, the same in any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap
from torch.optim import lr_scheduler

import metaopt as mo
from metaopt import tree
from optimizers import (
    SGD,
    Adam,
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Joined,
    Linear,
    LSTMSchedule,
    OneCycle,
    PerStep,
    Piecewise,
    Plateau,
    Polynomial,
    Staircase,
    WarmRestarts,
    Warmup,
    WarmupStableDecay,
)

STEPS = 24
Value = Any
RATES = [0.3, 0.1, 0.2, 0.05, 0.4]


def row(make: Callable[[float], Value], numbers: list[float]) -> Any:
    """Return numbers as a list, or as one vector that is learned."""
    return numbers if make is float else nn.Parameter(torch.tensor(numbers))


class OnPlateau(lr_scheduler.ReduceLROnPlateau):
    """Torch's, told of the loss that `values` gives."""

    def step(self, *_: Any) -> None:
        super().step(0.5)


def stable(remaining: Callable[[float], float]) -> Callable[[torch.optim.Optimizer], Any]:
    """Warm-up for 4 steps, 6 stable, 8 of decay from .3 to .03, as a factor on .3."""

    def factor(t: int) -> float:
        over = min(max((t - 10) / 8, 0.0), 1.0)
        return min(t / 4, 1.0) * (0.1 + 0.9 * remaining(over))

    return lambda o: lr_scheduler.LambdaLR(o, factor)


# name -> (ours, as a function that turns numbers into what is learned; torch's, for an optimizer
# with lr 0.3)
CASES: dict[
    str,
    tuple[
        Callable[[Callable[[float], Value]], mo.Schedule], Callable[[torch.optim.Optimizer], Any]
    ],
] = {
    "constant": (lambda v: Constant(v(0.3)), lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0)),
    "cosine": (
        lambda v: Cosine(v(0.3), STEPS, final=v(0.02)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.02),
    ),
    "linear": (
        lambda v: Linear(v(0.06), 10, final=v(0.24)),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, end_factor=0.8, total_iters=10),
    ),
    "exponential": (
        lambda v: Exponential(v(0.3), v(0.93)),
        lambda o: lr_scheduler.ExponentialLR(o, 0.93),
    ),
    "polynomial": (
        lambda v: Polynomial(v(0.3), 10, power=v(1.7)),
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=1.7),
    ),
    "piecewise": (
        lambda v: Piecewise((v(0.3), v(0.06), v(0.012)), (4, 15)),
        lambda o: lr_scheduler.MultiStepLR(o, [4, 15], gamma=0.2),
    ),
    "piecewise-vector": (
        lambda v: Piecewise(row(v, [0.3, 0.06, 0.012]), (4, 15)),
        lambda o: lr_scheduler.MultiStepLR(o, [4, 15], gamma=0.2),
    ),
    "per-step": (
        lambda v: PerStep(row(v, RATES)),
        lambda o: lr_scheduler.LambdaLR(o, lambda t: RATES[min(t, 4)] / 0.3),
    ),
    "staircase": (
        lambda v: Staircase(v(0.3), 7, gamma=v(0.2)),
        lambda o: lr_scheduler.StepLR(o, 7, gamma=0.2),
    ),
    "inverse-sqrt": (
        lambda v: InverseSqrt(v(0.3), 5),
        lambda o: lr_scheduler.LambdaLR(o, lambda t: math.sqrt(5 / max(t, 5))),
    ),
    "transformer": (  # Vaswani et al.: width^-.5 min(t^-.5, t warmup^-1.5)
        lambda v: Warmup(InverseSqrt(v(0.3), 5), 5),
        lambda o: lr_scheduler.LambdaLR(
            o, lambda t: math.sqrt(5) * min(max(t, 1) ** -0.5, t * 5**-1.5)
        ),
    ),
    "stable-linear": (
        lambda v: WarmupStableDecay(v(0.3), warmup=4, stable=6, decay=8, final=v(0.03)),
        stable(lambda p: 1 - p),
    ),
    "stable-cosine": (
        lambda v: WarmupStableDecay(
            v(0.3), warmup=4, stable=6, decay=8, final=v(0.03), shape="cosine"
        ),
        stable(lambda p: (1 + math.cos(math.pi * p)) / 2),
    ),
    "stable-sqrt": (
        lambda v: WarmupStableDecay(
            v(0.3), warmup=4, stable=6, decay=8, final=v(0.03), shape="sqrt"
        ),
        stable(lambda p: 1 - math.sqrt(p)),
    ),
    "restarts": (
        lambda v: WarmRestarts(v(0.3), 5, final=v(0.02)),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.02),
    ),
    "restarts-longer": (
        lambda v: WarmRestarts(v(0.3), 3, factor=2, final=v(0.02)),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2, eta_min=0.02),
    ),
    "plateau": (
        lambda v: Plateau(v(0.3), v(0.5), patience=2, cooldown=3, final=v(0.05)),
        lambda o: OnPlateau(o, factor=0.5, patience=2, cooldown=3, min_lr=0.05),
    ),
    "warmup": (
        lambda v: Warmup(v(0.3), 5, start=v(0.1)),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
    ),
    "warmup-exponential": (
        lambda v: Warmup(Exponential(v(0.3), v(0.93)), 5, start=v(0.1)),
        lambda o: lr_scheduler.ChainedScheduler(
            [
                lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
                lr_scheduler.ExponentialLR(o, 0.93),
            ]
        ),
    ),
    "joined": (
        lambda v: Joined(
            (Linear(v(0.03), 5, final=v(0.3)), Cosine(v(0.3), 10), Constant(v(0.15))), (5, 15)
        ),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
                lr_scheduler.CosineAnnealingLR(o, 10),
                lr_scheduler.LambdaLR(o, lambda _: 0.5),
            ],
            [5, 15],
        ),
    ),
    "one-cycle": (
        lambda v: OneCycle(v(0.3), STEPS, div_factor=v(25.0), final_div_factor=v(1e4)),
        lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=STEPS),
    ),
    "one-cycle-linear": (
        lambda v: OneCycle(
            v(0.3),
            STEPS,
            pct_start=0.41,
            div_factor=v(10.0),
            final_div_factor=v(50.0),
            anneal="linear",
        ),
        lambda o: lr_scheduler.OneCycleLR(
            o,
            0.3,
            total_steps=STEPS,
            pct_start=0.41,
            div_factor=10,
            final_div_factor=50,
            anneal_strategy="linear",
        ),
    ),
    "one-cycle-three": (
        lambda v: OneCycle(
            v(0.3), STEPS, div_factor=v(10.0), final_div_factor=v(50.0), three_phase=True
        ),
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.3, total_steps=STEPS, div_factor=10, final_div_factor=50, three_phase=True
        ),
    ),
}
each_case = pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES)


def values(schedule: mo.Schedule, steps: int = STEPS) -> Tensor:
    """Return [steps]: the value at each step, as an optimizer asks for it."""
    grads = [torch.ones(2, dtype=torch.get_default_dtype())]
    state, found = schedule.init(grads[0]), []
    for t in range(steps):
        value, state = schedule(state, step=torch.tensor(t), loss=torch.tensor(0.5), grads=grads)
        found.append(torch.as_tensor(value, dtype=grads[0].dtype))
    return torch.stack(found)


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR makes use of it itself
@each_case
def test_values_equal_torchs(ours: Any, theirs: Any) -> None:
    """Tolerance: torch multiplies from step to step, we have closed forms."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
    scheduler, expected = theirs(optimizer), []
    for t in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if t < STEPS - 1:  # OneCycleLR has no more steps than it was told
            scheduler.step()
    assert_close(values(ours(float)), torch.tensor(expected), 1e-13)


def test_one_cycle_is_torchs_cycle_of_the_momentum() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
    scheduler, expected = lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=STEPS), []
    for t in range(STEPS):
        expected.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if t < STEPS - 1:
            scheduler.step()
    assert_close(
        values(OneCycle(0.85, STEPS, div_factor=0.85 / 0.95, final_div_factor=1.0)),
        torch.tensor(expected),
        1e-6,
    )


@pytest.mark.usefixtures("float64")
@each_case
def test_it_is_differentiated_exactly_in_every_number(ours: Any, theirs: Any) -> None:
    del theirs
    schedule = ours(lambda value: nn.Parameter(torch.tensor(value)))
    names, numbers = zip(*schedule.named_parameters(), strict=True)

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self) -> Tensor:
            return values(self.schedule)

    def run(*numbers: Tensor) -> Tensor:
        return functional_call(
            Values(), {f"schedule.{n}": v for n, v in zip(names, numbers, strict=True)}, ()
        )

    inputs = tuple(n.detach().clone().requires_grad_() for n in numbers)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_works_in_an_optimizer_under_vmap_and_past_its_end(
    ours: Any, theirs: Any, dtype: torch.dtype
) -> None:
    del theirs
    optimizer, params = Adam(ours(float)), torch.randn(3).to(dtype)

    def run(shift: Tensor) -> Tensor:
        return mo.minimize(
            lambda w, _: ((w - shift) ** 2).sum(), optimizer, params, None, steps=3 + STEPS
        ).params

    shifts = torch.randn(2, 3).to(dtype)
    batched = vmap(run)(shifts)
    assert batched.dtype == dtype
    for i in range(2):
        # bfloat16: 8 bits
        assert_close(batched[i], run(shifts[i]), 1e-13 if dtype == torch.float64 else 1e-2)


@each_case
def test_it_is_saved_and_loaded(ours: Any, theirs: Any, tmp_path: Path) -> None:
    del theirs
    schedule = ours(lambda value: nn.Parameter(torch.tensor(value)))
    Adam(schedule).save(tmp_path / "adam.safetensors")
    loaded = Adam.load(tmp_path / "adam.safetensors").lr
    assert isinstance(loaded, mo.Schedule)
    assert loaded.config() == schedule.config()
    assert torch.equal(values(loaded), values(schedule))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("cooldown", [0, 2])
def test_a_plateau_is_seen_where_torch_sees_it(relative: bool, cooldown: int) -> None:
    """Losses that fall, stay, rise and fall again; reductions by less than `eps` are not made."""
    losses = (1 + torch.linspace(0, 6, 120).cos() / 2 + 0.1 * torch.randn(120)).tolist()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=0.4,
        patience=3,
        threshold=0.02,
        threshold_mode="rel" if relative else "abs",
        cooldown=cooldown,
        eps=1e-4,
    )
    ours = Plateau(
        0.3, 0.4, patience=3, threshold=0.02, relative=relative, cooldown=cooldown, eps=1e-4
    )
    grads, expected, found = [torch.ones(1)], [], []
    state = ours.init(grads[0])
    for t, loss in enumerate(losses):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
        peeked = ours.value_at(state, step=torch.tensor(t), loss=None, grads=None, like=grads[0])
        value, state = ours(state, step=torch.tensor(t), loss=torch.tensor(loss), grads=grads)
        assert peeked == value
        found.append(torch.as_tensor(value))
    assert len(set(expected)) > 4
    assert_close(torch.stack(found), torch.tensor(expected), 1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("factor", [1, 2, 3, 10])
def test_restarts_are_where_torch_has_them_for_thousands_of_steps(factor: int) -> None:
    """Of every period the first and the last step.

    The number of the period is a rounded logarithm.
    """
    schedule = WarmRestarts(1.0, 7, factor=factor)
    start, length = 0, 7
    for _ in range(12):
        ends = torch.tensor([start, start + length - 1])
        found = schedule({}, step=ends, loss=None, grads=[torch.ones(1)])[0]
        assert_close(
            found, (1 + torch.cos(torch.tensor([0.0, math.pi * (length - 1) / length]))) / 2, 1e-12
        )
        start, length = start + length, length * factor


@pytest.mark.usefixtures("float64")
def test_each_value_of_a_step_is_learned_by_itself() -> None:
    """MAML++: five rates, one a step.

    The derivative of the last w is -g_t in rate t, times what later steps do to it.
    """
    rates = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.05, 0.15]))
    optimizer = SGD(PerStep(rates))
    assert [name for name, _ in optimizer.named_parameters()] == ["lr.values"]
    w0, curvature = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 3.0])
    end = mo.minimize(
        lambda w, _: (curvature * w * w).sum() / 2, optimizer, w0, None, steps=5
    ).params.sum()
    found = torch.autograd.grad(end, rates)[0]
    factors = 1 - rates.detach()[:, None] * curvature  # w_5 = w_0 times their product
    expected = torch.stack(
        [-(w0 * curvature * factors.prod(0) / factors[t]).sum() for t in range(5)]
    )
    assert_close(found, expected, 1e-12)


def test_an_outer_optimizer_sees_the_vector_of_a_piecewise_schedule() -> None:
    """It was accepted, and not registered."""
    vector = nn.Parameter(torch.tensor([0.1, 0.2]))
    schedule = Piecewise(vector, (3,))
    assert list(schedule.parameters()) == [vector]
    assert schedule.values is vector
    assert schedule.config()["arguments"]["values"] == {"parameter": [2], "dtype": "float32"}


@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(1.0, 1000),
        Linear(1.0, 1000),
        Polynomial(1.0, 1000),
        Warmup(1.0, 1000),
        Exponential(1.0, 0.999),
    ],
)
def test_steps_are_counted_also_in_half_precision(schedule: mo.Schedule) -> None:
    """bfloat16 has no 257: steps 256 and 257 would be the same."""
    found = [
        schedule({}, step=torch.tensor(t), loss=None, grads=[torch.ones(1, dtype=torch.bfloat16)])[
            0
        ]
        for t in (256, 257)
    ]
    assert found[0] != found[1]


def test_a_joined_schedule_observes_only_while_it_is_its_turn() -> None:
    """A learned schedule after two steps of warm-up is where it would be without.

    It comes there two steps later.
    """
    learned = LSTMSchedule(0.1, seed=3)
    with torch.no_grad():
        learned.readout.normal_()
    alone = values(learned, 4)
    joined = values(Joined((Linear(0.0, 2, final=0.1), learned), (2,)), 6)
    assert_close(joined[2:], alone, 1e-7)
    assert_close(joined[:2], torch.tensor([0.0, 0.05]), 1e-7)
    assert alone.diff().abs().min() > 0


def test_warmup_passes_on_what_a_learned_schedule_observes() -> None:
    learned = LSTMSchedule(0.1, seed=3)
    ramp = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    assert_close(values(Warmup(learned, 4), 6), ramp * values(learned, 6), 1e-7)
    out = mo.minimize(
        lambda w, _: (w**2).sum(), SGD(Warmup(learned, 2)), torch.ones(2), None, steps=3
    )
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(tuple(out)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PerStep([]), ValueError, r"PerStep: `values` must not be empty, got \[\]"),
        (
            lambda: PerStep(torch.ones(2, 2)),
            ValueError,
            r"PerStep: `values` must have one axis .*, got shape \(2, 2\)",
        ),
        (
            lambda: PerStep(0.1),
            TypeError,
            r"PerStep: `values` must be a tuple, got "
            r"float",
        ),  # type: ignore[arg-type]
        (
            lambda: PerStep([0.1, "b"]),
            TypeError,
            r"PerStep: `values` must be a tensor or a list of numbers, got \(0.1, 'b'\)",
        ),  # type: ignore[list-item]
        (
            lambda: PerStep([0.1, -0.2]),
            ValueError,
            r"PerStep: `values` must lie in \[0.0, inf\], got -0.2",
        ),
        (
            lambda: PerStep(torch.tensor([1, 2])),
            TypeError,
            r"PerStep: `values` must be real and floating-point, got .*int64",
        ),
        (
            lambda: Piecewise(0.1, (1,)),
            TypeError,
            r"Piecewise: `values` must be a tuple, got float",
        ),  # type: ignore[arg-type]
        (
            lambda: Piecewise((0.1, 0.2), 5),
            ValueError,
            r"Piecewise: `boundaries` must be increasing positive integers, got 5",
        ),  # type: ignore[arg-type]
        (
            lambda: Piecewise((0.1, 0.2), (True,)),
            ValueError,
            r"Piecewise: `boundaries` must be increasing .*, got \(True,\)",
        ),
        (
            lambda: Joined(Constant(0.1), ()),
            TypeError,
            r"Joined: `schedules` must be a tuple, got Constant",
        ),  # type: ignore[arg-type]
        (
            lambda: Staircase(0.1, 0),
            ValueError,
            r"Staircase: `every` must be a positive integer, got 0",
        ),
        (
            lambda: WarmRestarts(0.1, 5, factor=1.5),
            ValueError,
            r"WarmRestarts: `factor` must be a positive integer, got 1.5",
        ),  # type: ignore[arg-type]
        (
            lambda: WarmupStableDecay(0.1, warmup=-1, stable=1, decay=1),
            ValueError,
            r"WarmupStableDecay: `warmup` must be an integer of at least 0, got -1",
        ),
        (
            lambda: WarmupStableDecay(0.1, warmup=1, stable=1, decay=1, shape="square"),  # type: ignore[arg-type]
            ValueError,
            r"WarmupStableDecay: `shape` must be one of 'linear', 'cosine', 'sqrt', got 'square'",
        ),
        (
            lambda: Plateau(0.1, 1.0),
            ValueError,
            r"Plateau: `factor` must lie in \[0.0, 1.0\), got 1.0",
        ),
        (
            lambda: Plateau(0.1, relative="no"),
            TypeError,
            r"Plateau: `relative` must be True or False, got 'no'",
        ),  # type: ignore[arg-type]
        (
            lambda: Plateau(0.1, threshold=None),
            TypeError,
            r"Plateau: `threshold` must be a number, got None",
        ),  # type: ignore[arg-type]
        (
            lambda: Cosine(Constant(0.1), 5),  # type: ignore[arg-type]
            TypeError,
            r"Cosine: `initial` must be a number, a tensor or an nn.Parameter, got the schedule "
            r"Constant",
        ),
        (
            lambda: Warmup({"*": 0.1}, 5),
            TypeError,
            r"Warmup: `after` must be a number, .* or a Schedule, got dict",
        ),  # type: ignore[arg-type]
        (
            lambda: OneCycle(0.1, 20, three_phase=1),
            TypeError,
            r"OneCycle: `three_phase` must be True or False, got 1",
        ),  # type: ignore[arg-type]
        (
            lambda: OneCycle(0.1, 20, pct_start=1.5),
            ValueError,
            r"OneCycle: `pct_start` must lie in \[0.0, 1.0\], got 1.5",
        ),
        (lambda: Linear(0.1, 0), ValueError, r"Linear: `steps` must be a positive integer, got 0"),
        (
            lambda: Warmup(0.1, 2.5),
            ValueError,
            r"Warmup: `steps` must be a positive integer, got 2.5",
        ),  # type: ignore[arg-type]
        (
            lambda: Polynomial(0.1, True),
            ValueError,
            r"Polynomial: `steps` must be a positive integer, got True",
        ),
        (
            lambda: Exponential(-0.1, 0.9),
            ValueError,
            r"Exponential: `initial` must lie in \[0.0, inf\], got -0.1",
        ),
        (
            lambda: Piecewise((0.1, 0.2), (0,)),
            ValueError,
            r"Piecewise: `boundaries` must be increasing positive int.* got \(0,\)",
        ),
        (
            lambda: Piecewise((0.1, 0.2, 0.3), (5, 5)),
            ValueError,
            r"`boundaries` must be increasing",
        ),
        (
            lambda: Piecewise((0.1,), (5,)),
            ValueError,
            r"Piecewise: `values` must be one more than the boundaries, got 1 and 1",
        ),
        (
            lambda: Joined((Constant(0.1), 0.2), (5,)),
            TypeError,
            r"`schedules` must be schedules, got float. .*Constant",
        ),  # type: ignore[arg-type]
        (
            lambda: OneCycle(0.1, 3),
            ValueError,
            r"OneCycle: every phase needs a length, got phases that end at steps \(-0.1",
        ),
        (
            lambda: OneCycle(0.1, 10, pct_start=0.9, three_phase=True),
            ValueError,
            r"every phase needs a length",
        ),
        (
            lambda: OneCycle(0.1, 10, anneal="step"),
            ValueError,
            r"`anneal` must be 'cos' or 'linear', got 'step'",
        ),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()

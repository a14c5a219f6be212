"""Parameters to evaluate at that are not those that are moved: EMA, Lookahead, Schedule-Free."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import metaopt as mo
from optimizers import (
    EMA,
    SGD,
    Accumulate,
    Adam,
    AdamW,
    ClipNorm,
    Constant,
    Cosine,
    DecoupledWeightDecay,
    Grouped,
    Linear,
    Lookahead,
    Masked,
    NAdam,
    ScheduleFree,
    Warmup,
)

pytestmark = pytest.mark.usefixtures("float64")
Params = dict[str, Tensor]


def start() -> Params:
    return {"weight": torch.randn(2, 2), "bias": torch.randn(2), "scale": torch.randn(())}


def curve(params: Params, shift: Tensor) -> Tensor:
    hidden = torch.tanh(params["weight"].sum(-1) + params["bias"] + shift)
    return (hidden * params["scale"]).square().sum() + 0.1 * params["weight"].square().sum()


def iterates(optimizer: mo.Optimizer, params: Params, shifts: Tensor) -> list[Params]:
    """Return the parameters at the start and after each step."""
    found, state = [params], optimizer.init(params)
    for shift in shifts:
        updates, state = optimizer(grad(curve)(params, shift), state, params)
        params = mo.apply_updates(params, updates)
        found.append(params)
    return found


def end(optimizer: mo.Optimizer, params: Params, shifts: Tensor) -> tuple[Params, Params]:
    """Return (the parameters, those to evaluate at) after a step for each shift."""
    out = mo.minimize(curve, optimizer, params, shifts)
    return out.params, optimizer.evaluated(out.opt_state, out.params)


# 50 steps of 2^-53, in sums of another order
def test_the_average_is_that_of_torch() -> None:
    first, shifts = start(), torch.randn(50)
    moved, average = end(EMA(0.9, Adam(0.05)), first, shifts)
    path = iterates(Adam(0.05), first, shifts)
    assert_close(moved, path[-1], 1e-12)
    model = nn.ParameterDict(first)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for params in path:
        model.load_state_dict(params)
        theirs.update_parameters(model)
    assert_close(average, {k: p.detach() for k, p in theirs.module.items()}, 1e-12)


@pytest.mark.parametrize("every", [1, 5])
def test_lookahead_is_the_papers_loop(every: int) -> None:
    """Algorithm 1: k steps of the inner optimizer, whose memory goes on, then the slow weights."""
    first, shifts, alpha = start(), torch.randn(52), 0.3
    inner = Adam(0.05)
    slow = fast = first
    state = inner.init(first)
    for step, shift in enumerate(shifts, 1):
        updates, state = inner(grad(curve)(fast, shift), state, fast)
        fast = mo.apply_updates(fast, updates)
        if step % every == 0:
            slow = {name: s + alpha * (fast[name] - s) for name, s in slow.items()}
            fast = slow
    moved, evaluated = end(Lookahead(Adam(0.05), every=every, alpha=alpha), first, shifts)
    assert_close(moved, fast, 1e-12)
    assert_close(evaluated, slow, 1e-12)


def paper_sgd(first: Params, shifts: Tensor, rate: Callable[[int], float], beta: float) -> Any:
    """Algorithm 1 of arXiv:2405.15682 with SGD in place of Adam."""
    z = x = y = first
    total = 0.0
    for t, shift in enumerate(shifts):
        gradient, gamma = grad(curve)(y, shift), rate(t)
        z = {name: w - gamma * gradient[name] for name, w in z.items()}
        total += gamma**2
        c = gamma**2 / total if total else 0.0
        x = {name: (1 - c) * w + c * z[name] for name, w in x.items()}
        y = {name: (1 - beta) * z[name] + beta * x[name] for name in x}
    return y, x


@pytest.mark.parametrize("beta", [0.9, 1.0, 0.3])
def test_schedule_free_sgd_is_the_papers_loop(beta: float) -> None:
    first, shifts = start(), torch.randn(50)
    found = end(ScheduleFree(SGD(0.1), beta=beta), first, shifts)
    assert_close(found, paper_sgd(first, shifts, lambda _: 0.1, beta), 1e-12)


def test_schedule_free_sgd_with_a_warm_up_that_begins_at_zero() -> None:
    first, shifts, rate = start(), torch.randn(50), Warmup(0.1, 10)
    found = end(ScheduleFree(SGD(rate), weight=rate), first, shifts)
    expected = paper_sgd(first, shifts, lambda t: 0.1 * min(t / 10, 1), 0.9)
    assert_close(found, expected, 1e-12)


def test_schedule_free_adamw_is_the_papers_loop() -> None:
    """Algorithm 1, decay at y, with the bias corrected in v instead of in gamma."""
    lr, beta1, beta2, eps, decay = 0.05, 0.8, 0.95, 1e-8, 0.1
    first, shifts = start(), torch.randn(50)
    z = x = y = first
    v = {name: torch.zeros_like(w) for name, w in first.items()}
    for t, shift in enumerate(shifts, 1):
        g = grad(curve)(y, shift)
        v = {name: beta2 * old + (1 - beta2) * g[name] ** 2 for name, old in v.items()}
        root = {name: (one / (1 - beta2**t)).sqrt() + eps for name, one in v.items()}
        z = {n: w - lr * g[n] / root[n] - lr * decay * y[n] for n, w in z.items()}
        x = {name: (1 - 1 / t) * w + z[name] / t for name, w in x.items()}
        y = {name: (1 - beta1) * z[name] + beta1 * x[name] for name in x}
    inner = AdamW(lr, (0.0, beta2), eps=eps, weight_decay=decay)
    found = end(ScheduleFree(inner, beta=beta1), first, shifts)
    assert_close(found, (y, x), 1e-12)


KEEPERS: dict[str, Callable[[Any], mo.Optimizer]] = {
    "ema": lambda h: EMA(h, SGD(0.1, h)),
    "lookahead": lambda h: Lookahead(SGD(0.1, h), every=2, alpha=h),
    "schedule-free": lambda h: ScheduleFree(SGD(0.1), beta=h, weight=h),
    "accumulate": lambda h: Accumulate(2, EMA(h, SGD(0.1, h))),
    "grouped": lambda h: ClipNorm(h, Grouped({"bias": EMA(h, SGD(h)), "*": ScheduleFree(SGD(h))})),
}
each_keeper = pytest.mark.parametrize("name", KEEPERS)


@each_keeper
def test_what_is_evaluated_is_differentiated_exactly(name: str) -> None:
    """Through three steps, in the initial parameters and the numbers, twice."""
    first, shifts = {"weight": torch.randn(1, 2), "bias": torch.randn(1)}, torch.randn(3)
    first["scale"] = torch.tensor(0.7)

    def evaluate(h: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        params = dict(zip(first, leaves, strict=True))
        return tuple(end(KEEPERS[name](h), params, shifts)[1].values())

    inputs = [leaf.clone().requires_grad_() for leaf in (torch.tensor(0.7), *first.values())]
    assert gradcheck(evaluate, inputs)
    assert gradgradcheck(evaluate, inputs)


@each_keeper
def test_under_nested_vmap_and_forward_mode(name: str) -> None:
    first, shifts = start(), torch.randn(2, 3, 4)

    def evaluate(h: Tensor, shifts: Tensor) -> Tensor:
        return sum(p.sum() for p in end(KEEPERS[name](h), first, shifts)[1].values())

    h = torch.tensor(0.7)
    nested = vmap(vmap(grad(evaluate), (None, 0)), (None, 0))(h, shifts)
    one = grad(evaluate)(h, shifts[1, 2])
    assert_close(nested[1, 2], one, 1e-12)
    forward = jvp(lambda h: evaluate(h, shifts[1, 2]), (h,), (torch.ones(()),))[1]
    assert_close(forward, one, 1e-12)


def test_others_evaluate_where_they_are() -> None:
    first = start()
    for optimizer in (Adam(0.1), ClipNorm(1.0, Masked(NAdam(0.1), "bias"))):
        moved, evaluated = end(optimizer, first, torch.randn(3))
        assert all(torch.equal(moved[name], evaluated[name]) for name in first)


def test_a_transform_passes_it_through_and_a_group_asks_each() -> None:
    first, shifts = start(), torch.randn(6)
    alone = EMA(0.5, SGD(0.1))
    groups = Grouped({"bias": alone, "*": Lookahead(SGD(0.1), every=4)})
    for optimizer in (ClipNorm(1e9, groups), Masked(groups, "*"), Accumulate(1, groups)):
        moved, evaluated = end(optimizer, first, shifts)
        path = iterates(optimizer, first, shifts)
        assert_close(moved, path[-1], 1e-14)
        average = path[0]["bias"]
        for params in path[1:]:
            average = 0.5 * average + 0.5 * params["bias"]
        assert_close(evaluated["bias"], average, 1e-14)
        # after 4 of 6 steps the slow weights were the parameters
        assert_close(evaluated["weight"], path[4]["weight"], 1e-14)


def test_half_precision_loses_no_small_change() -> None:
    """An average in bfloat16 itself would stay where it is: 1e-3 of 1 is below its resolution."""
    params = torch.ones(4, dtype=torch.bfloat16)
    optimizer = EMA(0.999, SGD(1.0))
    state, expected = optimizer.init(params), torch.ones(4)
    for _ in range(200):
        updates, state = optimizer(torch.full_like(params, 2**-7), state, params)
        params = mo.apply_updates(params, updates)
        expected = 0.999 * expected + 0.001 * params.double()
    found = params.double() + state["slots"]["offset"].double()
    assert_close(found, expected, 2e-5)  # 200 steps of 2^-24
    assert_close(expected, torch.full((4,), 0.85), 0.01)
    assert optimizer.evaluated(state, params).dtype == torch.bfloat16


def gradients(steps: int = 12) -> list[list[Tensor | None]]:
    return [
        [torch.randn(2, 2), torch.randn(2) if step % 3 else None, torch.randn(())]
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMA(0.9, Adam(0.1)),
        lambda: Lookahead(NAdam(0.1), every=2),
        lambda: ScheduleFree(SGD(0.1)),
        lambda: Grouped({"0": EMA(0.9, Masked(SGD(0.1), "*")), "*": Lookahead(SGD(0.1), every=2)}),
    ],
    ids=["ema", "lookahead", "schedule-free", "grouped"],
)
def test_a_parameter_without_a_gradient_stays_and_counts_no_step(make: Any) -> None:
    """It goes as if the calls without its gradient had not been."""
    optimizer, rows = make(), gradients()
    params = [torch.ones(2, 2), torch.ones(2), torch.ones(())]
    state, moved = optimizer.init(params, per_parameter=True), params
    for grads in rows:
        updates, state = optimizer(grads, state, moved)
        moved = mo.apply_updates(moved, updates)
    evaluated = optimizer.evaluated(state, moved)
    kept = [row for row in rows if row[1] is not None]
    pairs = {"0": (rows, 0), "1": (kept, 1), "2": (rows, 2)}
    for place, (own, index) in pairs.items():
        # by itself in a row of which a group makes the same choice
        alone = (
            make()
            if not isinstance(optimizer, Grouped)
            else dict(optimizer.groups).get(place, optimizer.groups[1][1])
        )
        w, before = {place: params[index]}, alone.init({place: params[index]})
        for row in own:
            updates, before = alone({place: row[index]}, before, w)
            w = mo.apply_updates(w, updates)
        assert_close(moved[index], w[place], 1e-14)
        assert_close(evaluated[index], alone.evaluated(before, w)[place], 1e-14)


def test_k_calls_are_one_step_on_the_mean() -> None:
    """Updates are 0 between, the memory stands still, and schedules see the inner steps."""
    first, shifts = start(), torch.randn(6, 3)
    inner = NAdam(Cosine(0.1, 6))
    params, state, optimizer = first, Accumulate(3, inner).init(first), Accumulate(3, inner)
    expected, before = first, inner.init(first)
    for row in shifts:
        for call, shift in enumerate(row):
            held = state
            updates, state = optimizer(
                grad(curve)(params, shift), state, params, loss=curve(params, shift)
            )
            if call < 2:
                assert all(bool((u == 0).all()) for u in updates.values())
                assert_close(state["optimizer"], held["optimizer"], 0)
            params = mo.apply_updates(params, updates)
        mean = grad(lambda w, row=row: sum(curve(w, one) for one in row) / 3)(expected)
        updates, before = inner(mean, before, expected)
        expected = mo.apply_updates(expected, updates)
        assert_close(params, expected, 1e-13)
        assert_close(state["optimizer"], before, 1e-13)
    assert optimizer.values(state)["optimizer.lr"] == inner.values(before)["lr"]


class Losses(mo.Schedule):
    """The loss that it saw last."""

    def init(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like.sum())

    def forward(self, state: Any, *, step: Tensor, loss: Any, grads: Any) -> Any:
        return loss, torch.as_tensor(loss)


def test_the_inner_schedule_observes_the_mean_of_the_losses() -> None:
    optimizer, w = Accumulate(2, SGD(Losses())), torch.ones(2)
    state = optimizer.init(w)
    for loss in (0.1, 0.3, 0.5, 1.1):
        updates, state = optimizer(torch.ones(2), state, w, loss=torch.tensor(loss))
    assert_close(updates, torch.full((2,), -0.8), 1e-15)
    assert state["shared"]["loss"] == 0


def deployed(optimizer: torch.optim.Optimizer, model: nn.Module, shifts: Tensor) -> None:
    for shift in shifts:
        optimizer.zero_grad()
        curve(dict(model.named_parameters()), shift).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClipNorm(1.0, EMA(0.9, Adam(0.05))),
        lambda: Lookahead(SGD(0.1, 0.9), every=3),
        lambda: ScheduleFree(AdamW(0.05, (0.0, 0.9)), weight=Linear(0.1, 5)),
        lambda: Accumulate(2, ScheduleFree(SGD(0.1))),
    ],
    ids=["ema", "lookahead", "schedule-free", "accumulate"],
)
def test_deployed_it_evaluates_in_a_with_block_and_resumes(make: Any) -> None:
    first, shifts = start(), torch.randn(8)
    model, twin = (nn.ParameterDict({k: p.clone() for k, p in first.items()}) for _ in range(2))
    live = make().as_torch(model.named_parameters())
    with live.evaluated():  # before any step
        assert all(torch.equal(model[name], p) for name, p in first.items())
    deployed(live, model, shifts[:5])
    moved, evaluated = end(make(), first, shifts[:5])
    with live.evaluated():
        assert_close({k: p.detach() for k, p in model.items()}, evaluated, 1e-14)
        with pytest.raises(RuntimeError, match="Cannot make a step within `with"):
            live.step()
        with pytest.raises(RuntimeError, match="Cannot enter another block"), live.evaluated():
            pass
    assert_close({k: p.detach() for k, p in model.items()}, moved, 1e-14)
    # a run that goes on from a file, under other names, is the same
    twin.load_state_dict(model.state_dict())
    resumed = make().as_torch(list(twin.values()))
    resumed.load_state_dict(live.state_dict())
    deployed(resumed, twin, shifts[5:])
    deployed(live, model, shifts[5:])
    assert all(torch.equal(model[name], twin[name]) for name in first)
    with live.evaluated(), resumed.evaluated():
        assert all(torch.equal(model[name], twin[name]) for name in first)


def test_an_error_within_the_block_leaves_the_parameters_as_they_were() -> None:
    w = nn.Parameter(torch.ones(2))
    live = EMA(0.5, SGD(0.1)).as_torch([w])
    w.grad = torch.ones(2)
    live.step()
    with contextlib.suppress(KeyError), live.evaluated():
        assert_close(w.detach(), torch.full((2,), 0.95), 1e-15)
        raise KeyError
    assert_close(w.detach(), torch.full((2,), 0.9), 1e-15)
    live.step()


def test_updates_that_are_remembered_cannot_be_scaled_from_outside() -> None:
    w = nn.Parameter(torch.ones(2))
    live = ClipNorm(1.0, EMA(0.5, SGD(0.1))).as_torch([w])
    live.param_groups[0]["lr"], w.grad = 0.5, torch.ones(2)
    with pytest.raises(ValueError, match=r"The updates of EMA cannot be scaled, got lr=0.5 in"):
        live.step()


def test_a_hyperparameter_by_names_has_an_average_for_each() -> None:
    first, shifts = start(), torch.randn(5)
    optimizer = EMA({"bias": 0.0, "*": Constant(0.9)}, SGD(0.1))
    moved, evaluated = end(optimizer, first, shifts)
    path = iterates(SGD(0.1), first, shifts)
    average = path[0]["weight"]
    for _, params in pairwise(path):
        average = 0.9 * average + 0.1 * params["weight"]
    assert_close(evaluated["weight"], average, 1e-14)
    assert torch.equal(evaluated["bias"], moved["bias"])


def test_the_names_of_values() -> None:
    optimizer = Accumulate(2, EMA(0.9, SGD(Cosine(0.1, 10))))
    values = optimizer.values(optimizer.init(torch.ones(2)))
    assert values["optimizer.decay"] == 0.9
    assert values["optimizer.optimizer.lr"] == 0.1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EMA(1.1, SGD(0.1)), ValueError, r"EMA: `decay` must lie in \[0.0, 1.0\], got 1.1"),
        (lambda: EMA(0.9, torch.optim.SGD), TypeError, r"EMA: `optimizer` must be a metaopt"),
        (lambda: Lookahead(SGD(0.1), every=0), ValueError, r"`every` must be a positive integer"),
        (lambda: Lookahead(SGD(0.1), alpha=2.0), ValueError, r"`alpha` must lie in \[0.0, 1.0\]"),
        (lambda: ScheduleFree(SGD(0.1), beta=0.0), ValueError, r"`beta` must lie in \(0, 1\], got"),
        (lambda: ScheduleFree(SGD(0.1), beta=1.5), ValueError, r"`beta` must lie in \[0.0, 1.0\]"),
        (lambda: ScheduleFree(SGD(0.1), beta=Constant(0.5)), TypeError, "got the schedule Const"),
        (
            lambda: DecoupledWeightDecay(0.1, ClipNorm(1.0, EMA(0.9, SGD(0.1)))),
            ValueError,
            r"DecoupledWeightDecay changes the updates of EMA, which .* behind: `EMA\(..., Decoup",
        ),
        (lambda: ScheduleFree(EMA(0.9, SGD(0.1))), ValueError, "ScheduleFree changes the updates"),
        (lambda: Lookahead(EMA(0.9, SGD(0.1))), ValueError, "Lookahead changes the updates of EMA"),
        (lambda: Accumulate(0, SGD(0.1)), ValueError, r"`every` must be a positive integer, got 0"),
        (
            lambda: Accumulate(2, SGD(0.1)).init(torch.ones(2), per_parameter=True),
            ValueError,
            "every parameter needs a gradient in every call",
        ),
        (
            lambda: Accumulate(2, SGD(0.1))(
                torch.ones(2), Accumulate(2, SGD(0.1)).init(torch.ones(2)), loss=torch.ones(2)
            ),
            ValueError,
            r"Accumulate: `loss` must be a scalar, got shape \(2,\)",
        ),
        (
            lambda: EMA(0.9, SGD(0.1)).evaluated(SGD(0.1).init(torch.ones(2)), torch.ones(2)),
            ValueError,
            r"must be that of this EMA, with that of another under \"optimizer\", got \['s",
        ),
        (
            lambda: EMA(0.9, SGD(0.1))(torch.ones(2), EMA(0.9, SGD(0.1)).init(torch.ones(2))),
            ValueError,
            "`EMA` needs `params` because it keeps others beside them",
        ),
    ],
)
def test_bad_arguments_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()

"""Live `torch.optim` optimizers as ours, going on where they stand."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.optim import lr_scheduler

import metaopt as mo
from optimizers import SGD, Adam, AdamW, Linear

pytestmark = pytest.mark.usefixtures("float64")

CASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02},
    ),
    "sgd-nesterov": (
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    ),
    "sgd-maximize": (
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.02},
    ),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
    "adam-all": (
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.02, "amsgrad": True},
    ),
    "adam-maximize": (torch.optim.Adam, {"lr": 0.02, "maximize": True}),
    "adam-decoupled": (
        torch.optim.Adam,
        {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "amsgrad": True}),
    "adamax": (torch.optim.Adamax, {"lr": 0.02, "weight_decay": 0.02}),
    "radam": (
        torch.optim.RAdam,
        {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "nadam": (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.02, "momentum_decay": 0.01}),
    "nadam-decoupled": (
        torch.optim.NAdam,
        {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "adagrad": (
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.02, "initial_accumulator_value": 0.3},
    ),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.05, "weight_decay": 0.02}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0, "rho": 0.8, "weight_decay": 0.02}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop-all": (
        torch.optim.RMSprop,
        {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.02, "momentum": 0.7, "centered": True},
    ),
    "asgd": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.01, "t0": 3, "weight_decay": 0.02}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01, "etas": (0.4, 1.3), "step_sizes": (1e-4, 0.1)}),
}
each_case = pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2))


def objective(net: mo.Functional) -> Callable[[Any, Any], Tensor]:
    return lambda params, batch: (net(params, batch[0]) - batch[1]).square().mean()


def batches(steps: int) -> tuple[Tensor, Tensor]:
    return torch.randn(steps, 6, 3), torch.randn(steps, 6, 2)


def train(model: nn.Module, live: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(*data, strict=True):
        live.zero_grad()
        (model(x) - y).square().mean().backward()
        live.step()


def outer(params: dict[str, Tensor]) -> Tensor:
    return sum(
        (p.sin() * torch.linspace(0.5, 1.5, p.numel()).reshape(p.shape)).sum()
        for p in params.values()
    )


# 20 steps of 2^-53, through Adam's division by sqrt(v) in the worst case.
@each_case
@pytest.mark.parametrize("done", [0, 5])
def test_it_goes_on_as_the_live_optimizer_does(kind: Any, options: Any, done: int) -> None:
    model = network()
    net, live = mo.functional(model), kind(model.parameters(), **options)
    train(model, live, batches(done))
    saved, optimizer = copy.deepcopy(live.state_dict()), mo.from_torch(live)
    torch.testing.assert_close(live.state_dict(), saved, rtol=0, atol=0)  # reading changes nothing
    start, data = {name: p.detach().clone() for name, p in net.params.items()}, batches(20)
    train(model, live, data)  # what was read is a copy
    out = mo.minimize(objective(net), optimizer, start, data)
    assert_close(out.params, {name: p.detach() for name, p in net.params.items()}, 1e-12)
    assert all((out.params[name] != p).all() for name, p in start.items())


@each_case
def test_its_meta_gradients_under_every_transform(kind: Any, options: Any) -> None:
    """Autograd, `func.grad`, rebuilt steps and a batch of tasks agree.

    Finite differences say with what.
    """
    model = network()
    net, live = mo.functional(model), kind(model.parameters(), **options)
    train(model, live, batches(3))
    optimizer = mo.from_torch(live)
    start = {name: p.detach() for name, p in net.params.items()}
    tasks = (torch.randn(3, 6, 3), torch.randn(3, 6, 2))

    def value(params: Any, task: Any, memory: Any = "full") -> Tensor:
        rule = mo.Backprop(memory=memory)
        return outer(
            mo.minimize(objective(net), optimizer, params, task, steps=3, differentiate=rule).params
        )

    batched = vmap(grad(value), (None, 0))(start, tasks)
    for i in range(3):
        task = mo.tree.index(tasks, i)
        expected = dict(
            zip(
                start,
                torch.autograd.grad(value(net.params, task), list(net.params.values())),
                strict=True,
            )
        )
        for memory in ("full", "steps"):
            assert_close(grad(value)(start, task, memory), expected, 1e-12)
        # batched products sum in another order
        assert_close(mo.tree.index(batched, i), expected, 1e-10)
    # the derivative of a sign is 0, but not its difference at a jump
    if kind is not torch.optim.Rprop:
        direction = {name: torch.randn_like(p) for name, p in start.items()}
        moved = [
            value({k: p + size * direction[k] for k, p in start.items()}, task)
            for size in (1e-6, -1e-6)
        ]
        slope = sum((expected[k] * direction[k]).sum() for k in start)
        # h^2 times third derivatives at small sqrt(v), 1e-16 / h
        assert_close(slope, (moved[0] - moved[1]) / 2e-6, 1e-5)


def test_muon_goes_on_with_its_memory() -> None:
    """torch iterates in bfloat16: a step agrees to 2^-8 of its entries, which are at most 1.2.

    The memory is exact.
    """
    weight = nn.Parameter(torch.randn(4, 3))
    live = torch.optim.Muon([weight], lr=0.02, weight_decay=0.1)
    gradients = torch.randn(10, 4, 3)
    for g in gradients[:5]:
        weight.grad = g.clone()
        live.step()
    optimizer, w = mo.from_torch(live), weight.detach().clone()
    state = optimizer.init(w)
    fresh = optimizer.optimizers[0].init([w])
    assert_close(
        state["shared"]["parts"][0]["slots"]["mean"], [live.state[weight]["momentum_buffer"]], 0
    )
    assert not torch.equal(
        state["shared"]["parts"][0]["slots"]["mean"][0], fresh["slots"]["mean"][0]
    )
    for g in gradients[5:]:
        weight.grad = g.clone()
        live.step()
        updates, state = optimizer(g, state, w)
        w = w + updates
    # 5 steps, factor sqrt(4/3), five roundings each
    assert (w - weight.detach()).abs().max() < 5 * 0.02 * 1.2 * 2 * 2**-6
    assert_close(
        state["shared"]["parts"][0]["slots"]["mean"], [live.state[weight]["momentum_buffer"]], 1e-14
    )


@pytest.mark.parametrize("done", [0, 4])
def test_groups_in_another_order_than_the_names(done: int) -> None:
    model = network()
    net = mo.functional(model)
    kinds = [
        [layer.bias for layer in model if hasattr(layer, "bias")],
        [layer.weight for layer in model if hasattr(layer, "weight")],
    ]
    live = torch.optim.Adam(
        [
            {"params": kinds[0], "lr": 0.01},
            {"params": kinds[1], "weight_decay": 0.1, "amsgrad": True},
        ],
        lr=0.03,
    )
    train(model, live, batches(done))
    optimizer = mo.from_torch(live, net.params)
    start, data = {name: p.detach().clone() for name, p in net.params.items()}, batches(20)
    train(model, live, data)
    out = mo.minimize(objective(net), optimizer, start, data)
    assert_close(out.params, {name: p.detach() for name, p in net.params.items()}, 1e-12)
    assert int(out.opt_state["step"]) == done + 20


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.ASGD])
def test_parameters_that_made_different_numbers_of_steps(kind: Any) -> None:
    """One group joins late, and one parameter of the first has no gradient at first."""
    model = network()
    net = mo.functional(model)
    live = kind([*model[0].parameters(), model[4].weight], lr=0.05)
    model[0].bias.requires_grad_(False)
    train(model, live, batches(2))
    model[0].bias.requires_grad_(True)
    live.add_param_group({"params": [model[4].bias, *model[2].parameters()], "lr": 0.02})
    train(model, live, batches(3))
    params = mo.functional(model).params
    optimizer = mo.from_torch(live, params)
    assert [part.step for part in optimizer.parts] == [5, 3, 3]
    start, data = {name: p.detach().clone() for name, p in params.items()}, batches(20)
    train(model, live, data)
    net = mo.functional(model)
    out = mo.minimize(objective(net), optimizer, start, data)
    assert_close(out.params, {name: p.detach() for name, p in net.params.items()}, 1e-12)


def test_sgd_with_dampening_where_one_parameter_has_no_memory_yet() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    live = torch.optim.SGD([one, other], 0.1, momentum=0.9, dampening=0.5)
    one.grad = torch.ones(2)
    live.step()
    optimizer = mo.from_torch(live)
    params = [one.detach().clone(), other.detach().clone()]
    state = optimizer.init(params)
    for t in range(3):
        one.grad, other.grad = torch.full((2,), t + 1.0), torch.full((2,), t + 2.0)
        live.step()
        updates, state = optimizer([one.grad, other.grad], state, params)
        params = mo.apply_updates(params, updates)
        assert_close(params, [one.detach(), other.detach()], 1e-14)


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[2].requires_grad_(False)
    live = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, live, batches(2))
    net, data = mo.functional(model), batches(3)
    out = mo.minimize(objective(net), mo.from_torch(live), net.params, data)
    train(model, live, data)
    assert_close(
        mo.tree.map(torch.detach, out.params),
        {name: p.detach() for name, p in net.params.items()},
        1e-14,
    )


def test_hyperparameters_stay_tensors_and_can_be_learned() -> None:
    weight, g = nn.Parameter(torch.ones(2)), torch.ones(2)
    rate = torch.tensor(0.1)
    optimizer = mo.from_torch(torch.optim.SGD([weight], lr=rate))
    rate.fill_(5.0)  # as a scheduler of torch does
    assert_close(optimizer(g, optimizer.init(weight), weight)[0], -0.1 * g, 1e-15)

    tracked = torch.tensor(0.1, requires_grad=True)
    learned = mo.from_torch(torch.optim.SGD([weight], lr=tracked))
    learned(g, learned.init(weight), weight)[0].sum().backward()
    assert_close(tracked.grad, torch.tensor(-2.0), 1e-15)

    optimizer = mo.from_torch(torch.optim.Adam([weight], lr=0.1, betas=(0.8, 0.9)))
    inner = optimizer.optimizers[0]
    assert type(inner) is Adam
    assert (inner.lr, inner.betas) == (0.1, (0.8, 0.9))
    inner.lr = nn.Parameter(torch.tensor(0.1))
    out = mo.minimize(lambda w, _: (w**2).sum(), optimizer, torch.ones(2), None, steps=1)
    out.params.sum().backward()
    assert_close(inner.lr.grad, torch.tensor(-2.0), 1e-7)  # 2 / (2 + eps) for each entry


def test_a_schedule_goes_on_from_the_live_step_count() -> None:
    """After one step with velocity 1: velocity 1/2 + 1, at the rate of step 1, which is .075."""
    weight = nn.Parameter(torch.ones(2))
    live = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    weight.grad = torch.ones(2)
    live.step()
    optimizer = mo.from_torch(live)
    optimizer.optimizers[0].lr = Linear(0.1, 4, final=0.0)
    updates, _ = optimizer(weight.grad, optimizer.init(weight), weight)
    assert_close(updates, torch.full((2,), -0.1125), 1e-15)


def test_the_kind_follows_the_decoupled_flag() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert (
        type(mo.from_torch(torch.optim.Adam([weight], decoupled_weight_decay=True)).optimizers[0])
        is AdamW
    )
    assert type(mo.from_torch(torch.optim.AdamW([weight])).optimizers[0]) is AdamW


def test_the_learning_rate_is_that_of_now() -> None:
    weight = nn.Parameter(torch.ones(2))
    live = torch.optim.SGD([weight], lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(live, 0.5)
    weight.grad = torch.ones(2)
    live.step()
    scheduler.step()
    with pytest.warns(
        UserWarning,
        match=r"the rate stays 0\.05, what it is now\. Pass it, `from_torch\(optimizer, scheduler=",
    ):
        optimizer = mo.from_torch(live)
    assert optimizer.optimizers[0].lr == 0.05


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5, 9], 0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 6),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.2, 0.9, 7),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 0.01),  # up again after 5
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sgd-momentum", "adamw", "asgd"])
def test_a_scheduler_goes_on_where_it_stands(kind: str, schedule: str) -> None:
    """A case of a scheduler without effect, without a word: relative difference 2.1.

    Two groups, four live steps, then eight.
    """
    make, options = CASES[kind]
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    live = make([{"params": weights[0]}, {"params": weights[1], "lr": 0.03}], **options)
    scheduler = SCHEDULERS[schedule](live)
    gradients = torch.randn(12, 5)

    def step(rows: Tensor) -> None:
        for row in rows:
            weights[0].grad, weights[1].grad = row[:3], row[3:]
            live.step()
            scheduler.step()

    step(gradients[:4])
    pure = mo.from_torch(live, weights, scheduler=scheduler)
    params = [weight.detach().clone() for weight in weights]
    state = pure.init(weights)
    for row in gradients[4:]:
        params, state = pure.moved([row[:3], row[3:]], state, params)
    step(gradients[4:])
    assert_close(params, [weight.detach() for weight in weights], 1e-12)


def test_a_carried_schedule_is_learned() -> None:
    """w - lr (1 + gamma + gamma^2).

    By gamma the derivative is -lr (1 + 2 gamma), by lr -(1 + gamma + gamma^2).
    """
    weight = nn.Parameter(torch.zeros(()))
    live = torch.optim.SGD([weight], lr=0.1)
    pure = mo.from_torch(live, scheduler=lr_scheduler.ExponentialLR(live, 0.5))
    schedule: Any = pure.optimizers[0].lr
    schedule.gamma, schedule.initial = (
        nn.Parameter(torch.tensor(0.5)),
        nn.Parameter(torch.tensor(0.1)),
    )
    mo.minimize(lambda p, _: p, pure, weight, None, steps=3).params.backward()
    assert_close(schedule.gamma.grad, torch.tensor(-0.2), 1e-12)
    assert_close(schedule.initial.grad, torch.tensor(-1.75), 1e-12)


@pytest.mark.parametrize(
    "make", [lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0), lr_scheduler.ReduceLROnPlateau]
)
def test_a_scheduler_that_is_not_known_is_refused(make: Callable[[Any], Any]) -> None:
    live = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(
        ValueError,
        match=r"`scheduler` must be one of ConstantLR, .*StepLR, got .*\. Others are not carried "
        r"over",
    ):
        mo.from_torch(live, scheduler=make(live))


def test_a_scheduler_that_does_not_fit_is_refused() -> None:
    live, other = (torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1) for _ in range(2))
    with pytest.raises(
        ValueError,
        match="`scheduler` must be a scheduler of `optimizer`, got StepLR of another one",
    ):
        mo.from_torch(live, scheduler=lr_scheduler.StepLR(other, 3))
    scheduler = lr_scheduler.StepLR(live, 3)
    live.param_groups[0]["lr"] = 0.3
    with pytest.raises(
        ValueError,
        match=r"The rate of group 0 must be that of `scheduler`, 0\.1 after its 0 steps, got 0\.3",
    ):
        mo.from_torch(live, scheduler=scheduler)


def test_updates_are_pure_and_the_optimizer_can_be_copied_and_shown() -> None:
    model = network()
    net, live = mo.functional(model), torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, live, batches(2))
    optimizer = copy.deepcopy(mo.from_torch(live))
    grads, params = (
        mo.tree.map(torch.randn_like, net.params),
        {name: p.detach() for name, p in net.params.items()},
    )
    state = optimizer.init(params)
    before = mo.tree.map(torch.clone, (params, grads, state))
    first, second = optimizer(grads, state, params), optimizer(grads, state, params)
    for one, other in [
        (before, (params, grads, state)),
        (first, second),
        (state, optimizer.init(params)),
    ]:
        assert all(
            torch.equal(*pair)
            for pair in zip(mo.tree.leaves(one), mo.tree.leaves(other), strict=True)
        )
    assert "Adam(lr=0.1, " in repr(optimizer)


def test_state_follows_the_parameters() -> None:
    weight = nn.Parameter(torch.ones(2))
    live = torch.optim.Adam([weight])
    weight.grad = torch.ones(2)
    live.step()
    state = mo.from_torch(live).init(weight.detach().float())
    (part,) = state["shared"]["parts"]
    assert part["slots"]["mean"][0].dtype == torch.float32
    assert int(part["step"]) == int(state["step"]) == 1


class Homemade(torch.optim.SGD):
    pass


def two_groups() -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}],
        lr=0.1,
    )


def swapped() -> Any:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    live = torch.optim.SGD([*model[1].parameters(), *model[0].parameters()], lr=0.1)
    return mo.from_torch(live).init(mo.functional(model).params)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: mo.from_torch(torch.optim.LBFGS([nn.Parameter(torch.ones(1))])),
            TypeError,
            r"one of torch.optim's \['ASGD', .*LBFGS",
        ),
        (
            lambda: mo.from_torch(torch.optim.SparseAdam([nn.Parameter(torch.ones(1))])),
            TypeError,
            "got torch.optim.*SparseAdam",
        ),
        (
            lambda: mo.from_torch(Homemade([nn.Parameter(torch.ones(1))], 0.1)),
            TypeError,
            "Homemade.*subclasses, have no known equal",
        ),
        (lambda: mo.from_torch(SGD(0.1)), TypeError, "got metaopt.optimizers.sgd.SGD"),
        (
            lambda: mo.from_torch(two_groups()),
            ValueError,
            "`params` is needed where there are several groups, got 2",
        ),
        (
            lambda: mo.from_torch(two_groups(), {"w": torch.ones(1)}),
            ValueError,
            r"got another tensor at \['w'\]",
        ),
        (
            lambda: mo.from_torch(torch.optim.SGD([torch.ones(1)], 0.1)),
            ValueError,
            "must have a parameter that requires grad, got none",
        ),
        (
            lambda: mo.from_torch(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)).init(
                torch.ones(3)
            ),
            ValueError,
            r"`params` must hold the trainable parameters of the torch optimizer in its order, "
            r"shapes \[\(2,\)\], got \[\(3,\)\]",
        ),
        (swapped, ValueError, r"in its order, got another one at \['0.weight'\]"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_compiler_sees_through_it() -> None:
    model, task = network(), (torch.randn(6, 3), torch.randn(6, 2))
    net, live = mo.functional(model), torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, live, batches(2))
    optimizer = mo.from_torch(live, net.params)
    start = {name: p.detach() for name, p in net.params.items()}
    slope = grad(
        lambda params: outer(mo.minimize(objective(net), optimizer, params, task, steps=2).params)
    )
    assert_close(torch.compile(slope, fullgraph=True, backend="eager")(start), slope(start), 1e-12)


def test_saving_is_refused(tmp_path: Any) -> None:
    optimizer = mo.from_torch(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
    with pytest.raises(
        TypeError, match=r"`from_torch` returns cannot be saved: .*Save that one's `state_dict"
    ):
        optimizer.save(tmp_path / "w.safetensors")


def test_a_known_tree_must_come_again() -> None:
    model = network()
    params = mo.functional(model).params
    optimizer = mo.from_torch(torch.optim.SGD(model.parameters(), 0.1), params)
    with pytest.raises(
        ValueError,
        match=r"`params` does not have the expected structure: missing \[\"\['0.bias'\]\"\]",
    ):
        optimizer.init({name: p for name, p in params.items() if name != "0.bias"})


def test_it_works_for_those_who_never_imported_our_optimizers() -> None:
    program = (
        "import sys, torch, metaopt as mo; assert 'optimizers' not in sys.modules; model = "
        "torch.nn.Linear(2, 1);o = mo.from_torch(torch.optim.SGD(model.parameters(), lr=0.1, "
        "momentum=0.9)); net = mo.functional(model);out = mo.minimize(lambda p, x: net(p, "
        "x).square().mean(), o, net.params, torch.ones(3, 2), "
        "steps=2);out.losses.sum().backward(); assert model.weight.grad.abs().min() > 0"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

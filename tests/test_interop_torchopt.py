"""TorchOpt's transformations as our optimizers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from problems import assert_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torchopt import schedule, transform

import metaopt as mo
from optimizers import SGD, Adagrad, Adam, AdamW, ClipNorm, Grouped, Linear, RAdam, RMSprop

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch batches TorchOpt's addcmul_ in a loop
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]
STEPS = 7  # radam is rectified from step 6 on where beta2 = 0.9


def matrices(params: Any) -> Any:
    """A mask, where TorchOpt's own containers and ours have the same numbers of axes.

    They have different names.
    """
    return torchopt.pytree.tree_map(lambda p: p.ndim > 1, params)


def meta(make: Callable[..., Any]) -> Callable[[nn.Module], torchopt.MetaOptimizer]:
    return lambda net: torchopt.MetaOptimizer(net, make())


def kind(alias: Any, meta_class: Any, **options: Any) -> tuple[Any, Any]:
    return lambda: alias(**options), lambda net: meta_class(net, **options)


def plain(make: Callable[[], Any]) -> tuple[Any, Any]:
    return make, meta(make)


# eps is large enough for the derivatives to be well conditioned, eps_root keeps them finite where a
# gradient is 0.
EVERY: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], torchopt.MetaOptimizer]]] = {
    "sgd": kind(torchopt.sgd, torchopt.MetaSGD, lr=0.1),
    "sgd-momentum": kind(torchopt.sgd, torchopt.MetaSGD, lr=0.1, momentum=0.9, weight_decay=0.02),
    "sgd-dampening": kind(torchopt.sgd, torchopt.MetaSGD, lr=0.1, momentum=0.9, dampening=0.3),
    "sgd-nesterov": kind(torchopt.sgd, torchopt.MetaSGD, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-maximize": kind(torchopt.sgd, torchopt.MetaSGD, lr=0.1, maximize=True, weight_decay=0.02),
    "sgd-moment-requires-grad": kind(
        torchopt.sgd, torchopt.MetaSGD, lr=0.1, momentum=0.9, moment_requires_grad=True
    ),
    "adam": kind(torchopt.adam, torchopt.MetaAdam, lr=0.05, eps=1e-2, eps_root=1e-4),
    "adam-decay": kind(
        torchopt.adam, torchopt.MetaAdam, lr=0.05, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.1
    ),
    "adamw": kind(torchopt.adamw, torchopt.MetaAdamW, lr=0.05, eps=1e-2, weight_decay=0.1),
    "adamax": kind(torchopt.adamax, torchopt.MetaAdaMax, lr=0.05, eps=1e-2),
    "radam": kind(torchopt.radam, torchopt.MetaRAdam, lr=0.05, betas=(0.9, 0.9), eps=1e-2),
    "radam-not-yet-rectified": kind(torchopt.radam, torchopt.MetaRAdam, lr=0.05, eps=1e-2),
    "adagrad": kind(
        torchopt.adagrad,
        torchopt.MetaAdaGrad,
        lr=0.05,
        lr_decay=0.1,
        eps=1e-2,
        initial_accumulator_value=0.1,
    ),
    "adadelta": kind(torchopt.adadelta, torchopt.MetaAdaDelta, lr=0.5, eps=1e-2),
    "rmsprop": kind(torchopt.rmsprop, torchopt.MetaRMSProp, lr=0.05, eps=1e-2),
    "rmsprop-all": kind(
        torchopt.rmsprop,
        torchopt.MetaRMSProp,
        lr=0.02,
        eps=1e-2,
        centered=True,
        momentum=0.7,
        nesterov=True,
        weight_decay=0.02,
    ),
    "accelerated-adam": kind(
        torchopt.adam, torchopt.MetaAdam, lr=0.05, eps=1e-2, eps_root=1e-4, use_accelerated_op=True
    ),
    "linear": kind(torchopt.sgd, torchopt.MetaSGD, lr=schedule.linear_schedule(0.1, 0.01, 3)),
    "polynomial": kind(
        torchopt.sgd, torchopt.MetaSGD, lr=schedule.polynomial_schedule(0.1, 0.01, 2, 3, 1)
    ),
    "exponential": kind(
        torchopt.adam,
        torchopt.MetaAdam,
        lr=schedule.exponential_decay(0.1, 0.5, transition_begin=1, end_value=0.02),
        eps=1e-2,
    ),
    "staircase": kind(
        torchopt.sgd,
        torchopt.MetaSGD,
        lr=schedule.exponential_decay(0.1, 0.5, transition_steps=2, staircase=True),
    ),
    "clip": plain(lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), torchopt.sgd(0.1))),
    "clip-inf": plain(
        lambda: torchopt.clip_grad_norm(0.5, norm_type=torch.inf).chain(torchopt.sgd(0.1))
    ),
    "nan-to-num": plain(
        lambda: torchopt.chain(torchopt.nan_to_num(0.0, 1.0, -1.0), torchopt.sgd(0.1))
    ),
    "hook": plain(
        lambda: torchopt.chain(torchopt.register_hook(lambda g: 2 * g), torchopt.sgd(0.1))
    ),
    "masked": plain(
        lambda: torchopt.chain(
            transform.masked(torchopt.sgd(2.0, momentum=0.5), matrices), torchopt.sgd(0.05)
        )
    ),
    "trace": plain(lambda: torchopt.chain(transform.trace(0.9, 0.2), transform.scale(-0.1))),
    "scale-by": plain(
        lambda: torchopt.chain(
            transform.scale_by_stddev(eps=1e-2),
            transform.add_decayed_weights(0.1, matrices),
            transform.scale_by_schedule(lambda t: -0.1 / (t + 1)),
        )
    ),
    "scale-by-adam": plain(
        lambda: torchopt.chain(
            transform.scale_by_adam(eps=0.1), transform.scale_by_rms(eps=0.5), transform.scale(-0.1)
        )
    ),
    "scale-by-rss": plain(
        lambda: torchopt.chain(transform.scale_by_rss(eps=1e-2), transform.scale(-0.1))
    ),
}
# reads the norm's value: no vmap, and its derivative is left out
CONSTANT_NORM = {"clip", "clip-inf"}
NEEDS_AUTOGRAD = {"accelerated-adam", "hook"}
each = pytest.mark.parametrize("name", EVERY)


def each_but(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in EVERY if name not in names])


each_pure = each_but(*NEEDS_AUTOGRAD)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batches() -> tuple[Tensor, Tensor]:
    return torch.randn(STEPS, 6, 3), torch.randn(STEPS, 6, 2)


def objective(net: mo.Functional) -> Callable[[Any, Any], Tensor]:
    return lambda params, batch: (net(params, batch[0]) - batch[1]).square().mean()


def outer(params: Any) -> Tensor:
    """Weighs every entry of the last parameters differently."""
    return sum(
        (p.sin() * torch.linspace(0.5, 1.5, p.numel()).reshape(p.shape)).sum() for p in params
    )


@each
def test_meta_gradients_equal_those_of_torchopts_meta_optimizer(name: str) -> None:
    make, meta_optimizer = EVERY[name]
    model, data = network(), batches()
    net, starts = mo.functional(model), list(model.parameters())
    last = mo.minimize(objective(net), mo.from_torchopt(make()), net.params, data).params
    ours = torch.autograd.grad(outer(last.values()), starts)

    theirs = meta_optimizer(model)  # from here on the model has TorchOpt's tensors
    for t in range(STEPS):
        theirs.step((model(data[0][t]) - data[1][t]).square().mean())
    moved = [p for layer in model.modules() for p in layer._parameters.values() if p is not None]
    expected = torch.autograd.grad(outer(moved), starts)
    # the same operations, but for the order of a few
    assert_close(list(last.values()), moved, 1e-12)
    assert_close(list(ours), list(expected), 1e-9)
    assert all(g.abs().max() > 1e-3 for g in ours)


@each_but(*CONSTANT_NORM, *NEEDS_AUTOGRAD)
def test_meta_gradients_equal_finite_differences(name: str) -> None:
    net, data = mo.functional(network()), batches()
    optimizer = mo.from_torchopt(EVERY[name][0]())
    start = {key: p.detach() for key, p in net.params.items()}
    direction = {key: torch.randn_like(p) for key, p in start.items()}

    def value(size: float) -> Tensor:
        at = {key: p + size * direction[key] for key, p in start.items()}
        return outer(mo.minimize(objective(net), optimizer, at, data).params.values())

    last = mo.minimize(objective(net), optimizer, net.params, data).params
    slopes = torch.autograd.grad(outer(last.values()), list(net.params.values()))
    slope = sum((g * d).sum() for g, d in zip(slopes, direction.values(), strict=True))
    # Rounding 1e-16 / h and the third derivative times h^2; one of 10^3 is what the smallest eps
    # gives.
    assert_close(slope, (value(1e-5) - value(-1e-5)) / 2e-5, 1e-6)


def test_clipping_takes_the_norm_for_a_constant_as_promised() -> None:
    """du/dg of -g / max(|g|, 1) is -I / |g| instead of -(I - g g' / |g|^2) / |g|.

    The 1e-6 is TorchOpt's.
    """
    optimizer = mo.from_torchopt(torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(1.0)))
    g = torch.tensor([3.0, 4.0])

    def update(g: Tensor) -> Tensor:
        return optimizer(g, optimizer.init(g), g)[0]

    rows = [grad(lambda g, row=row: update(g)[row])(g) for row in range(2)]
    assert_close(torch.stack(rows), -torch.eye(2) / 5.000001, 1e-12)
    with pytest.raises(
        ValueError, match=r"reads the value of a tensor that differs over a `vmap`.*use `ClipNorm"
    ):
        vmap(update)(torch.stack([g, g]))


@each_pure
@pytest.mark.parametrize("memory", ["full", "steps", mo.Revolve(2)], ids=str)
def test_memory_modes_and_func_grad_agree(name: str, memory: Any) -> None:
    net, data = mo.functional(network()), batches()
    optimizer = mo.from_torchopt(EVERY[name][0]())

    def value(params: Any, memory: Any) -> Tensor:
        rule = mo.Backprop(memory=memory)
        return outer(
            mo.minimize(objective(net), optimizer, params, data, differentiate=rule).params.values()
        )

    start = {key: p.detach() for key, p in net.params.items()}
    expected = torch.autograd.grad(value(net.params, "full"), list(net.params.values()))
    assert_close(
        list(torch.autograd.grad(value(net.params, memory), list(net.params.values()))),
        list(expected),
        1e-12,
    )
    assert_close(list(grad(value)(start, memory).values()), list(expected), 1e-12)


@pytest.mark.parametrize("memory", ["full", "steps"])
@each_but(*NEEDS_AUTOGRAD, *CONSTANT_NORM)
def test_vmap_from_shared_initial_parameters_equals_a_loop(name: str, memory: Any) -> None:
    net, optimizer = mo.functional(network()), mo.from_torchopt(EVERY[name][0]())
    start = {key: p.detach() for key, p in net.params.items()}
    tasks = (torch.randn(3, 6, 3), torch.randn(3, 6, 2))

    def value(params: Any, task: Any) -> Tensor:
        rule = mo.Backprop(memory=memory)
        return outer(
            mo.minimize(
                objective(net), optimizer, params, task, steps=3, differentiate=rule
            ).params.values()
        )

    batched = vmap(grad(value), (None, 0))(start, tasks)
    for i in range(3):
        assert_close(mo.tree.index(batched, i), grad(value)(start, mo.tree.index(tasks, i)), 1e-12)


LEARNABLE = {
    "sgd": (torchopt.sgd, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.02}, ["lr", "momentum"]),
    "adam": (
        torchopt.adam,
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, "eps_root": 1e-3},
        ["lr", "eps", "eps_root"],
    ),
    "adamw": (torchopt.adamw, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}, ["lr", "eps"]),
    "adamax": (torchopt.adamax, {"lr": 0.05, "eps": 1e-2}, ["lr", "eps"]),
    "radam": (torchopt.radam, {"lr": 0.05, "betas": (0.9, 0.9), "eps": 1e-2}, ["lr", "eps"]),
    "adagrad": (torchopt.adagrad, {"lr": 0.05, "eps": 1e-2}, ["lr", "eps"]),
    "adadelta": (torchopt.adadelta, {"lr": 0.5, "eps": 1e-2}, ["lr", "eps"]),
    "rmsprop": (
        torchopt.rmsprop,
        {"lr": 0.02, "eps": 1e-2, "momentum": 0.7},
        ["lr", "eps", "momentum"],
    ),
    "clip": (
        lambda max_norm, lr: torchopt.chain(torchopt.clip_grad_norm(max_norm), torchopt.sgd(lr)),
        {"max_norm": 0.05, "lr": 0.1},
        ["max_norm", "lr"],
    ),
}


@pytest.mark.parametrize("memory", ["full", "steps"])
@pytest.mark.parametrize("name", LEARNABLE)
def test_learned_hyperparameters(name: str, memory: Any) -> None:
    """As plain tensors under `func.grad`, and as parameters in plain autograd."""
    make, numbers, learned = LEARNABLE[name]
    net, data = mo.functional(network()), batches()
    # at a later step the norm of the gradient, a constant to TorchOpt, depends on both
    steps = 1 if name == "clip" else STEPS
    data, start = (
        mo.tree.index(data, slice(steps)),
        {key: p.detach() for key, p in net.params.items()},
    )

    def value(at: dict[str, Tensor]) -> Tensor:
        rule = mo.Backprop(memory=memory)
        optimizer = mo.from_torchopt(make, **{**numbers, **at})
        return outer(
            mo.minimize(objective(net), optimizer, start, data, differentiate=rule).params.values()
        )

    at = {key: torch.tensor(numbers[key]) for key in learned}
    slopes = grad(value)(at)
    for key in learned:
        # the difference is off by 1e-8 of the third derivative in log(value), and by 1e-16 / size
        size = 1e-4 * numbers[key]
        above, below = ({**at, key: at[key] + sign * size} for sign in (1, -1))
        assert_close(slopes[key], (value(above) - value(below)) / (2 * size), 1e-6)
    parameters = {key: nn.Parameter(tensor) for key, tensor in at.items()}
    value(parameters).backward()
    assert_close({key: p.grad for key, p in parameters.items()}, slopes, 1e-10)


def test_a_step_rebuilt_from_its_function_keeps_its_momentum() -> None:
    """Trap: the transformation counts its first call itself.

    w = -(.1 + .15 + .175) g with momentum 1/2.
    """
    for optimizer in (
        mo.from_torchopt(torchopt.sgd, lr=0.1, momentum=0.5),
        mo.from_torchopt(torchopt.sgd(0.1, momentum=0.5)),
    ):
        for _ in range(2):  # a second run starts afresh
            w, g = torch.zeros(2), torch.ones(2)
            state = optimizer.init(w)
            for _ in range(3):
                updates, state = optimizer(g, state, w)
                w = w + updates
            assert_close(w, torch.full((2,), -0.425), 1e-12)


def test_dampening_spares_the_first_gradient_of_every_run_as_in_torch() -> None:
    optimizer = mo.from_torchopt(torchopt.sgd(0.1, momentum=0.5, dampening=0.2))
    weight = nn.Parameter(torch.zeros(2))
    theirs, state = torch.optim.SGD([weight], 0.1, momentum=0.5, dampening=0.2), None
    for _ in range(2):
        theirs.state.clear()
        state, w = optimizer.init(weight), weight.detach().clone()
        for t in range(3):
            weight.grad = torch.tensor([1.0, t])
            theirs.step()
            updates, state = optimizer(weight.grad, state, w)
            w = w + updates
            assert_close(w, weight.detach(), 1e-14)


@each_pure
def test_an_update_is_pure(name: str) -> None:
    optimizer = mo.from_torchopt(EVERY[name][0]())
    params = {"b": torch.randn(3), "a": torch.randn(2, 2)}  # TorchOpt sorts the keys
    grads = mo.tree.map(torch.randn_like, params)
    state = optimizer.init(params)
    for _ in range(2):  # the first step and another one
        before = mo.tree.map(torch.clone, (params, grads, state))
        first = optimizer(grads, state, params)
        second = optimizer(grads, state, params)
        assert all(
            torch.equal(*pair)
            for pair in zip(
                mo.tree.leaves(before), mo.tree.leaves((params, grads, state)), strict=True
            )
        )
        assert all(
            torch.equal(*pair)
            for pair in zip(mo.tree.leaves(first), mo.tree.leaves(second), strict=True)
        )
        assert list(first[0]) == ["b", "a"]
        assert first[0]["a"].shape == (2, 2)
        state = first[1]


def test_integers_in_a_state_are_tensors_from_step_to_step() -> None:
    state = mo.from_torchopt(torchopt.adamax(0.1)).init(torch.zeros(2))
    assert all(isinstance(leaf, Tensor) for leaf in mo.tree.leaves(state))


def test_it_composes_with_transforms_and_groups() -> None:
    params = {"w": torch.zeros(2), "b": torch.zeros(2)}
    grads = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 1.0])}
    optimizer = Grouped(
        {"w": ClipNorm(1.0, mo.from_torchopt(torchopt.sgd(1.0, momentum=0.5))), "*": SGD(0.1)}
    )
    state = optimizer.init(params)
    _, state = optimizer(grads, state, params)
    updates, _ = optimizer(grads, state, params)
    assert_close(updates, {"w": torch.tensor([-0.9, -1.2]), "b": torch.tensor([-0.1, -0.1])}, 1e-12)


def test_our_schedules_and_deployment() -> None:
    """TorchOpt's sgd with our linear rate: w = -(.1 + .075 + .05) g.

    A copy does not share a step count.
    """
    weight = nn.Parameter(torch.zeros(2))
    deployed = mo.from_torchopt(torchopt.sgd, lr=Linear(0.1, 4, final=0.0)).as_torch([weight])
    for _ in range(3):
        weight.grad = torch.ones(2)
        deployed.step()
    assert_close(weight.detach(), torch.full((2,), -0.225), 1e-12)


def test_a_copy_makes_the_same_steps() -> None:
    optimizer = mo.from_torchopt(torchopt.adam, lr=nn.Parameter(torch.tensor(0.1)))
    twin, g = copy.deepcopy(optimizer), torch.ones(2)
    assert twin.lr is not optimizer.lr
    assert_close(twin(g, twin.init(g), g), optimizer(g, optimizer.init(g), g), 0)


def test_it_says_what_it_is() -> None:
    assert (
        repr(mo.from_torchopt(torchopt.adam, lr=0.1, betas=(0.8, 0.9)))
        == "FromTorchOpt(adam, betas=(0.8, 0.9), lr=0.1)"
    )
    assert repr(mo.from_torchopt(torchopt.adam(0.1))) == "FromTorchOpt(GradientTransformation)"


ZERO_CASES = [
    ("adam", {}),
    ("adamw", {}),
    ("radam", {}),
    ("rmsprop", {}),
    ("rmsprop", {"centered": True}),
    ("adagrad", {}),
]


@pytest.mark.parametrize(("name", "options"), ZERO_CASES)
def test_gradients_that_are_zero_have_the_derivative_of_our_optimizers(
    name: str, options: dict[str, Any]
) -> None:
    """A case of sqrt'(0) = inf times 0: TorchOpt's derivatives were not a number, without a word.

    Values are TorchOpt's.
    """
    options = {"lr": 0.1, "eps": 1e-8, **options}
    ours = {"adam": Adam, "adamw": AdamW, "radam": RAdam, "rmsprop": RMSprop, "adagrad": Adagrad}[
        name
    ]

    def slope(optimizer: mo.Optimizer) -> Tensor:
        def last(g: Tensor) -> Tensor:
            state = optimizer.init(g)
            for _ in range(7):  # radam is rectified then
                updates, state = optimizer(g, state, g)
            return updates.sum()

        return grad(last)(torch.zeros(2))

    found = slope(mo.from_torchopt(getattr(torchopt, name)(**options)))
    # TorchOpt's adagrad does not move an entry whose gradient has been zero: a constant
    expected = torch.zeros(2) if name == "adagrad" else slope(ours(**options))
    assert_close(found, expected, 1e-9 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "adagrad"])
def test_a_meta_gradient_through_a_dead_unit_is_finite(name: str) -> None:
    """Linear -> BatchNorm -> ReLU with a dead unit: entries of a gradient are exactly zero.

    It equals a finite difference.
    """
    torch.manual_seed(0)
    net = mo.functional(
        nn.Sequential(
            nn.Linear(3, 4),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(4, 1),
        )
    )
    start = {name: p.detach().clone() for name, p in net.params.items()}
    start["1.bias"][0] = -9.0  # below every normalized value: dead
    x, y = torch.randn(6, 3), torch.randn(6, 1)
    optimizer = mo.from_torchopt(getattr(torchopt, name)(1e-2))

    def outer(weight: Tensor) -> Tensor:
        def loss(p: Any, batch: Any, weight: Tensor) -> Tensor:
            return weight * (net(p, x) - y).square().mean() + 0.1 * p["3.weight"].square().sum()

        return (
            (net(mo.minimize(loss, optimizer, start, None, steps=3, meta=weight).params, x) - y)
            .square()
            .mean()
        )

    weight = torch.tensor(1.3, requires_grad=True)
    (found,) = torch.autograd.grad(outer(weight), weight)
    with torch.no_grad():
        expected = (outer(weight + 1e-5) - outer(weight - 1e-5)) / 2e-5
    assert_close(found, expected, 1e-7)


def test_a_missing_gradient_is_refused() -> None:
    optimizer, params = (
        mo.from_torchopt(torchopt.sgd(0.1, momentum=0.9)),
        {"a": torch.ones(2), "b": torch.ones(2)},
    )
    with pytest.raises(
        ValueError,
        match=r"`grads` must hold a gradient for every parameter, got None at \['b'\]. Give zeros",
    ):
        optimizer({"a": torch.ones(2), "b": None}, optimizer.init(params), params)
    with pytest.raises(
        ValueError,
        match="`from_torchopt`: every parameter needs a gradient, got None, or a state with a step",
    ):
        optimizer.init(params, per_parameter=True)


def test_the_accelerated_adam_has_wrong_derivatives_as_documented() -> None:
    """At the third step, with a growing gradient; its values are right."""

    def value(g: Tensor, accelerated: bool) -> Tensor:
        optimizer = mo.from_torchopt(torchopt.adam(1.0, eps=1e-2, use_accelerated_op=accelerated))
        state, total = optimizer.init(g), torch.zeros(())
        for t in range(3):
            updates, state = optimizer(g * (t + 1), state, g)
            total = total + updates.sum()
        return total

    g = torch.tensor(0.3, requires_grad=True)
    right, wrong = value(g, False), value(g, True)
    assert_close(wrong, right, 1e-12)
    ratio = torch.autograd.grad(wrong, g)[0] / torch.autograd.grad(right, g)[0]
    assert 1.9 < ratio < 2.1


def test_a_batch_of_learning_rates() -> None:
    rates, g = torch.tensor([0.1, 0.2]), torch.ones(3)

    def run(make: Any) -> Callable[[Tensor], Tensor]:
        def updated(lr: Tensor) -> Tensor:
            optimizer = mo.from_torchopt(make, lr=lr)
            return optimizer(g, optimizer.init(g), g)[0]

        return updated

    with pytest.raises(
        ValueError, match=r"for an lr with a batch, give TorchOpt a function: .*lambda count: lr"
    ):
        vmap(run(torchopt.sgd))(rates)
    assert_close(
        vmap(run(lambda lr: torchopt.sgd(lambda count: lr)))(rates),
        -rates[:, None].expand(2, 3),
        1e-15,
    )


@pytest.mark.parametrize("name", sorted(NEEDS_AUTOGRAD))
def test_what_needs_plain_autograd_says_so(name: str) -> None:
    optimizer, g = mo.from_torchopt(EVERY[name][0]()), torch.ones(3, 2)
    with pytest.raises(
        ValueError, match="accelerated operators and its hooks work in plain autograd only"
    ):
        vmap(lambda g: optimizer(g, optimizer.init(g), g)[0])(g)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: mo.from_torchopt(torchopt.adam),
            TypeError,
            "must be a TorchOpt gradient transformation, got function",
        ),
        (
            lambda: mo.from_torchopt(Adam()),
            TypeError,
            "must be a TorchOpt gradient transformation, got Adam",
        ),
        (
            lambda: mo.from_torchopt(torchopt.adam(0.1), lr=0.1),
            TypeError,
            "must be the function that makes a transformation",
        ),
        (
            lambda: mo.from_torchopt(torchopt.sgd(nn.Parameter(torch.tensor(0.1)))),
            ValueError,
            "finds tensors that require grad in .*Give each by a name of its own",
        ),
        (
            lambda: mo.from_torchopt(torchopt.adam, betas=(nn.Parameter(torch.tensor(0.1)), 0.9)),
            ValueError,
            r"finds tensors that require grad in betas\[0\]",
        ),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (
            torchopt.sgd,
            {"lr": 0.1, "weight_decay": 0.1},
            TypeError,
            "TorchOpt needs a number where a tensor that requires grad",
        ),
        (
            lambda b: torchopt.adam(0.1, (b, 0.9)),
            {"b": 0.8},
            TypeError,
            "Those in `metaopt.optimizers` can all be",
        ),
        (
            torchopt.sgd,
            {"lr": 0.1, "momentum": 0.0},
            ValueError,
            "`momentum` must not be 0 where it is a tensor",
        ),
        (
            torchopt.sgd,
            {"lr": 0.1, "weight_decay": 0.0},
            ValueError,
            "`weight_decay` must not be 0 where it is a tensor",
        ),
    ],
)
def test_what_cannot_be_learned_is_an_error(
    make: Any, options: Any, error: type[Exception], message: str
) -> None:
    """TorchOpt turns these into numbers, or leaves them out: their gradient would be lost."""
    optimizer = mo.from_torchopt(
        make, **{name: nn.Parameter(torch.tensor(value)) for name, value in options.items()}
    )
    g = torch.ones(2)
    with pytest.raises(error, match=message):
        optimizer(g, optimizer.init(g), g)


def test_torchopt_is_not_imported_before_it_is_asked_for() -> None:
    program = "import sys, metaopt; assert 'torchopt' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
